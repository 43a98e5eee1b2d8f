"""The files of a run, and how to read them: JSON and text only, so that reports need neither data nor torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalefl.errors import CheckpointError

FORMAT = "scalefl-run"
VERSION = 1


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config and the format version."""
        return self.path / "config.json"

    @property
    def environment(self) -> Path:
        """Versions and machine."""
        return self.path / "environment.json"

    @property
    def plan(self) -> Path:
        """The memory plan."""
        return self.path / "plan.json"

    @property
    def journal(self) -> Path:
        """One line for each round, and a first one for the state before them."""
        return self.path / "journal.jsonl"

    @property
    def state(self) -> Path:
        """The last saved state."""
        return self.path / "state.safetensors"

    @property
    def summary(self) -> Path:
        """The final figures; exists once the run is done."""
        return self.path / "summary.json"

    def only_begun(self) -> bool:
        """Whether nothing has been written but what precedes the first round."""
        first = {path.name for path in (self.plan, self.environment, self.config)}
        return all(entry.name.removesuffix(".partial") in first for entry in self.path.iterdir())

    def read_settings(self) -> dict[str, Any]:
        """The resolved config, as plain values.

        Raises:
            CheckpointError: there is no run in the folder, it is damaged, or of a newer format.
        """
        head = read_json(self.config)
        if head.get("format") != FORMAT:
            raise CheckpointError(f"{self.path} is not the folder of a run")
        if head.get("version", 0) > VERSION:
            raise CheckpointError(
                f"{self.path} has format version {head['version']}; this ScaleFL reads up to {VERSION}: upgrade it"
            )
        return dict(head.get("config", {}))

    def read_journal(self) -> list[dict[str, Any]]:
        """The journal's lines, up to one that a killed run left half-written; none where there is no journal."""
        lines: list[dict[str, Any]] = []
        for text in self.journal.read_text(errors="replace").splitlines() if self.journal.exists() else ():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
        return lines


def read_json(path: Path) -> dict[str, Any]:
    """The table in a JSON file of a run.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist: not the folder of a run, or not of a finished one") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: it holds no table")
    return content
