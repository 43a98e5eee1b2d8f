"""The files of a run, and how to read them: JSON and text only, so that reports need neither data nor torch."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalefl.errors import CheckpointError, ConfigError
from scalefl.lookup import recalled

FORMAT = "scalefl-run"
VERSION = 1
PAGE = "report.html"
"""Beside the pictures of a run, or of several: the page that shows all of them."""


_LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from running in a folder, which is made if need be; freed by any kind of death.

    Raises:
        CheckpointError: another process runs there, or the folder cannot be made.
    """
    lock = folder / _LOCK
    try:
        folder.resolve().mkdir(parents=True, exist_ok=True)  # resolved: a link may lead to what is not there yet
        file = lock.open("w")
    except (OSError, RuntimeError) as error:  # the latter of links that lead to each other
        raise CheckpointError(f"cannot make {folder}: {getattr(error, 'strerror', None) or error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"{folder} is in use by another process") from error
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
            if not folder.is_symlink() and not any(folder.iterdir()):
                folder.rmdir()


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
        """Versions and machine, with the base of its workers."""
        return self.path / "environment.json"

    @property
    def plan(self) -> Path:
        """The memory plan."""
        return self.path / "plan.json"

    @property
    def clients(self) -> Path:
        """Where clients exist elsewhere: what each offered when the run started."""
        return self.path / "clients.json"

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

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's event files, where the run is tracked so."""
        return self.path / "tensorboard"

    @property
    def event_files(self) -> list[Path]:
        """TensorBoard's event files."""
        return sorted(self.tensorboard.glob("events.out.tfevents.*"))

    @property
    def mlflow(self) -> Path:
        """The id of the run in MLflow, where it is tracked so."""
        return self.path / "mlflow.json"

    @property
    def comparison(self) -> Path:
        """In the folder of a comparison, in which runs lie: what is compared."""
        return self.path / "comparison.json"

    @property
    def lock(self) -> Path:
        """Held by the process that runs in the folder."""
        return self.path / _LOCK

    def only_begun(self) -> bool:
        """Whether nothing has been written but what precedes the first round."""
        first = {path.name for path in (self.plan, self.environment, self.config, self.clients, self.lock)}
        return all(entry.name.removesuffix(".partial") in first for entry in self.path.iterdir())

    def check_free(self, *, resume: bool = False) -> None:
        """Refuse a folder in which no run can begin, nor one go on if that is asked for.

        Raises:
            ConfigError: there is something else in it, or a run.
            CheckpointError: it is no folder, or can't be read.
        """
        try:
            others = [entry for entry in self.path.iterdir() if entry != self.lock]
        except FileNotFoundError:
            return
        except OSError as error:
            raise CheckpointError(f"cannot make {self.path}: {error.strerror}") from error
        if others and not (resume and (self.config.exists() or self.only_begun())):
            raise ConfigError(
                f"{self.path} is not empty: resume the run in it (--resume), remove it (--overwrite), "
                "or give this one another name (--set name=...)"
            )

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """See `locked`."""
        return locked(self.path)

    def remove(self) -> None:
        """Remove the run's files, and nothing else."""
        for entry in (*self.path.glob("*.partial"), *self.path.glob("*.png"), *self.event_files):
            entry.unlink()
        files = (self.config, self.environment, self.plan, self.clients, self.journal, self.state, self.summary)
        for path in (*files, self.mlflow, self.path / PAGE):
            path.unlink(missing_ok=True)
        if self.tensorboard.is_dir() and not any(self.tensorboard.iterdir()):
            self.tensorboard.rmdir()

    def read_settings(self) -> dict[str, Any]:
        """The resolved config, as plain values.

        Raises:
            CheckpointError: there is no run in the folder, it is damaged, or of a newer format.
        """
        head = read_json(self.config)
        if head.get("format") != FORMAT:
            raise CheckpointError(f"{self.path} is not the folder of a run")
        if not isinstance(head.get("version"), int):
            raise CheckpointError(f"{self.config} is damaged: its format version is {head.get('version')!r}")
        if head["version"] > VERSION:
            raise CheckpointError(
                f"{self.path} has format version {head['version']}; this ScaleFL reads up to {VERSION}: upgrade it"
            )
        return dict(head.get("config", {}))

    def places(self) -> list[str]:
        """The folders in which the run's modules and data were looked for, as far as there are any still.

        Raises:
            CheckpointError: see `read_json`.
        """
        return recalled(self.path, read_json(self.config).get("places"))

    def read_journal(self) -> list[dict[str, Any]]:
        """The journal's lines, up to one that a killed run left half-written; none where there is no journal.

        Raises:
            CheckpointError: a line is not a round's.
        """
        lines: list[dict[str, Any]] = []
        for text in self.journal.read_text(errors="replace").splitlines() if self.journal.exists() else ():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                break
            if not isinstance(line, dict) or not isinstance(line.get("round"), int):
                raise CheckpointError(f"{self.journal} is damaged: line {len(lines) + 1} is not a round")
            lines.append(line)
        return lines


def to_json(content: Any, indent: int | None = None) -> str:
    """Content as JSON, in which there is neither NaN nor infinity: null instead."""
    return json.dumps(with_nulls(content), indent=indent, allow_nan=False)


def with_nulls(content: Any) -> Any:
    """Content with None in the place of numbers that are none."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: with_nulls(value) for key, value in content.items()}
    return [with_nulls(value) for value in content] if isinstance(content, list | tuple) else content


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
