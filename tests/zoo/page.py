"""Writes docs/what-works.md from what the cells of the zoo came to: `python -m zoo.page RESULTS PAGE`."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from zoo.cells import CELLS, METHODS, PASSES, WRONG, Cell, Result
from zoo.models import VARIANTS, ZOO

RESULTS = "SCALEFL_ZOO_RESULTS"
"""The environment variable that names the folder of results; without it none are kept."""


def keep(cell: Cell, result: Result) -> None:
    """Write a result where the environment says."""
    folder = os.environ.get(RESULTS)
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        content = {**asdict(cell), **asdict(result)}
        (Path(folder) / f"{cell}.json").write_text(json.dumps(content))


def kept(folder: Path) -> dict[Cell, Result]:
    """All results in a folder."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return {Cell(one["model"], one["variant"], one["method"]): Result(one["said"], one["units"]) for one in found}


HEAD = """# What works with what

The tests make this page (`make zoo-table`): it says what they saw. A cell passes if

- `scalefl plan` tells what the run takes,
- two rounds run, with two clients that hold 45 % of full training and two that hold 200 %,
- everything that is to be trained has moved (with `scalefl-paper` some of it, as a round trains one block), and what
  the user froze has not, to the bit,
- the run that is stopped after a round and resumed, and the run on two worker processes, end with the same bytes,
- and the export fits the user's own model, freshly made, under strict names, and has the test figures of the run.

Each cell has three marks: the model **as it is**, with the first **half** of its parameters **frozen**, and with
**adapters** (peft's LoRA on its layers, the head trained beside them). ✓: it passes. A number: it is refused before
the first round, in the sentence of that number below. **Units** are the pieces between the places at which the model,
as it is, can be cut; –: it can't be, and is trained whole.

"""


NOT_RUN = "·"
"""The mark of a cell that the page was made without."""


def page(results: Mapping[Cell, Result]) -> str:
    """The page of some results; those that are neither have a cross, and cells without a result a dot."""
    notes: list[str] = []
    lines = [
        f"| model | units | {' | '.join(f'`{method}`' for method in METHODS)} |",
        f"|---|---|{'---|' * len(METHODS)}",
    ]
    for model in dict.fromkeys(cell.model for cell in results):
        cells = [[results.get(Cell(model, v, method)) for v in VARIANTS] for method in METHODS]
        marks = [" ".join(_mark(result, notes) if result else NOT_RUN for result in row) for row in cells]
        units = max((row[0].units or 0 for row in cells if row[0]), default=0)
        lines.append(f"| {ZOO[model].about} | {units or '–'} | {' | '.join(marks)} |")
    told = [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    if any(result.said == WRONG for result in results.values()):
        told += ["", "✗: neither. A mistake of ours, or of the test."]
    if any(f" {NOT_RUN}" in line for line in lines):
        told += ["", f"{NOT_RUN}: not run when this page was made."]
    if absent := [entry.about for name, entry in ZOO.items() if name not in {cell.model for cell in results}]:
        told += ["", f"Not run at all when this page was made: {'; '.join(absent)}."]
    return HEAD + "\n".join(lines) + "\n" + ("\n" + "\n".join(told) + "\n" if told else "")


def _mark(result: Result, notes: list[str]) -> str:
    if result.said == PASSES:
        return "✓"
    if result.said == WRONG:
        return "✗"
    said = " ".join(result.said.split())
    if said not in notes:
        notes.append(said)
    return str(notes.index(said) + 1)


def marks_of(text: str) -> tuple[dict[tuple[str, str, str], str], list[str]]:
    """What a page says of each cell (a model's description stands for it), and its notes."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    found = {
        (row[0], variant, method): mark
        for row in rows[1:]
        for method, marks in zip(METHODS, row[2:], strict=True)
        for variant, mark in zip(VARIANTS, marks.split(), strict=True)
    }
    return found, re.findall(r"^\d+\. (.*)$", text, re.MULTILINE)


def main(arguments: Sequence[str]) -> None:
    """Write the page from a folder of results."""
    folder, target = map(Path, arguments)
    results = kept(folder)
    print(f"{len(results)} of {len(CELLS)} cells have a result in {folder}")
    target.write_text(page({cell: results[cell] for cell in CELLS if cell in results}))


if __name__ == "__main__":
    main(sys.argv[1:])
