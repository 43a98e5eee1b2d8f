"""Tables and pictures of finished and unfinished runs, made from their folders alone: no data set, no torch."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalefl.run_folder import RunFolder, read_json

if "MPLBACKEND" in os.environ:
    from scalefl.report import backend as backend


@dataclass(frozen=True)
class Run:
    """What a run's folder tells.

    Args:
        path: the folder.
        config: the resolved settings.
        plan: the memory plan, as `MemoryPlan.to_json` has it.
        journal: the lines of all rounds; the first is the state before round 1.
        summary: the final figures; None where the run is not finished.
        base_bytes: what a worker of that machine holds before it trains, in bytes; None where it wasn't measured.
    """

    path: Path
    config: dict[str, Any]
    plan: dict[str, Any]
    journal: list[dict[str, Any]]
    summary: dict[str, Any] | None
    base_bytes: int | None

    @property
    def name(self) -> str:
        """Its name."""
        return str(self.config.get("name", self.path.name))

    @property
    def method(self) -> str:
        """The name of its method."""
        return str(self.config.get("method", {}).get("name", "scalefl"))

    @property
    def num_rounds(self) -> int:
        """Rounds that are done."""
        return int(self.journal[-1]["round"]) if self.journal else 0


def read_run(folder: Path) -> Run:
    """The run in a folder.

    Raises:
        CheckpointError: there is none, it is damaged, or of a newer format.
    """
    files = RunFolder(folder)
    environment = read_json(files.environment) if files.environment.exists() else {}
    return Run(
        path=folder,
        config=files.read_settings(),
        plan=read_json(files.plan),
        journal=files.read_journal(),
        summary=read_json(files.summary) if files.summary.exists() else None,
        base_bytes=environment.get("base_bytes"),
    )


def measured(metrics: Mapping[str, float] | None, name: str) -> float | None:
    """One of the figures that were measured; None where it was not, or is no number, as the mean over no examples."""
    value = (metrics or {}).get(name)
    return value if value is not None and math.isfinite(value) else None


def is_comparison(folder: Path) -> bool:
    """Whether a folder is that of a comparison."""
    return RunFolder(folder).comparison.exists()


def draw(run: Run, out: Path) -> list[Path]:
    """Draw a run's pictures into a folder, and a page that has its tables too; what was not measured is left out.

    Raises:
        OSError: the folder can't be made or written to.
    """
    from scalefl.report.page import write_page
    from scalefl.report.pictures import accuracy_picture, memory_picture, plane_picture, save
    from scalefl.report.run_page import run_page

    pictures = {
        "accuracy.png": accuracy_picture([run]),
        "memory.png": memory_picture(run.plan, run.name),
        "nhsic.png": plane_picture(run),
    }
    written = [save(figure, out / name) for name, figure in pictures.items() if figure is not None]
    return [*written, write_page(run_page(run), out)]


def side_by_side(runs: Sequence[Run], out: Path) -> list[Path]:
    """Write several runs, whatever they are, into a folder: a table, a picture of their accuracy, and a page of both.

    Raises:
        OSError: the folder can't be made or written to.
    """
    from scalefl.report.page import write_page
    from scalefl.report.pictures import accuracy_picture, save
    from scalefl.report.run_page import side_by_side_page
    from scalefl.report.tables import comparison, to_markdown

    out.mkdir(parents=True, exist_ok=True)
    table = out / "comparison.md"
    table.write_text(to_markdown(comparison(runs)))
    figure = accuracy_picture(runs)
    written = [table] if figure is None else [table, save(figure, out / "accuracy.png")]
    return [*written, write_page(side_by_side_page(runs), out)]
