"""The pages of one run, and of several side by side."""

from __future__ import annotations

from collections.abc import Sequence

from scalefl.report import Run
from scalefl.report.page import Page, Picture, Section
from scalefl.report.pictures import (
    accuracy_numbers,
    accuracy_picture,
    memory_numbers,
    memory_picture,
    plane_numbers,
    plane_picture,
)
from scalefl.report.svg import WIDTH
from scalefl.report.tables import comparison, memory_table, summary_table


def run_page(run: Run) -> Page:
    """A run's figures, its curve, its memory plan and its nHSIC plane; what was not measured is left out."""
    plan = Picture(
        f"{run.name}: memory by what is trained", [memory_picture(run.plan, "", WIDTH)], memory_numbers(run.plan)
    )
    sections = [
        Section("Figures", [summary_table(run)], _accuracy([run])),
        Section("Memory", [memory_table(run.plan)], [plan]),
    ]
    near, whole = plane_picture(run, ["near"]), plane_picture(run, ["whole"])
    if near is not None and whole is not None:
        numbers = plane_numbers(run)
        caption = f"{numbers.title}, near by and whole; Z is the output of the modules that are named"
        sections.append(Section("nHSIC plane", pictures=[Picture(caption, [near, whole], numbers)]))
    facts = [
        ("method", run.method),
        ("model", str(run.plan["model"])),
        ("seed", str(run.config.get("seed", 0))),
        ("rounds", f"{run.num_rounds} of {run.config.get('rounds', '?')}{'' if run.summary else ': unfinished'}"),
    ]
    return Page(run.name, facts, sections)


def side_by_side_page(runs: Sequence[Run]) -> Page:
    """Several runs, whatever they are: their figures and their curves."""
    unfinished = [run.name for run in runs if run.summary is None]
    facts = [("runs", ", ".join(run.name for run in runs)), ("unfinished", ", ".join(unfinished) or "none")]
    return Page("Runs side by side", facts, [Section("Figures", [comparison(runs)], _accuracy(runs))])


def _accuracy(runs: Sequence[Run]) -> list[Picture]:
    figure = accuracy_picture(runs)
    return [] if figure is None else [Picture("Validation accuracy", [figure], accuracy_numbers(runs))]
