"""Tables of plans and runs, for terminals, Markdown and pages, and of the numbers behind pictures."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

import rich.box
from rich.console import Console
from rich.table import Table as RichTable

from scalefl.report import Run, measured
from scalefl.units import digits, mib, privacy

NOTHING = "–"


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; the first column names the row, numbers follow.

    Args:
        title: what it shows.
        header: a name for each column; a line break starts the unit.
        rows: as wide as the header.
        notes: what a reader has to know beside it.
        texts: columns beside the first that hold words, not numbers.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    texts: frozenset[str] = frozenset()

    def is_text(self, column: str) -> bool:
        """Whether a column holds words."""
        return column == self.header[0] or column in self.texts


@dataclass(frozen=True)
class Numbers:
    """What a picture is drawn from.

    Args:
        title: what they are.
        header: a name for each column, the first of words; a line break starts the unit.
        rows: words, numbers, and None where there is nothing.
        notes: what a reader has to know beside them.
        texts: columns beside the first that hold words.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str | float | None, ...], ...]
    notes: tuple[str, ...] = ()
    texts: frozenset[str] = frozenset()

    def to_table(self) -> Table:
        """For people: the largest number of a column has four digits or more, the others as many decimals."""
        columns = [_alike(column) for column in zip(*self.rows, strict=True)]
        return Table(self.title, self.header, tuple(zip(*columns, strict=True)), self.notes, self.texts)

    def to_csv(self) -> str:
        """For programs: six digits."""
        file = StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(name.replace("\n", " ") for name in self.header)
        writer.writerows([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in self.rows)
        return file.getvalue()


def _alike(column: Sequence[str | float | None]) -> list[str]:
    sizes = [abs(cell) for cell in column if isinstance(cell, float) and cell]
    decimals = max(0, 3 - math.floor(math.log10(max(sizes)))) if sizes else 0

    def text(cell: str | float | None) -> str:
        if cell is None or isinstance(cell, str):
            return NOTHING if cell is None else cell
        return f"{cell:,.{decimals}f}" if isinstance(cell, float) else f"{cell:,}"

    return [text(cell) for cell in column]


def to_rich(table: Table) -> RichTable:
    """For a terminal; without the notes, which run on below it."""
    drawn = RichTable(
        title=table.title,
        title_justify="left",
        title_style="bold",
        box=rich.box.SIMPLE_HEAD,
        padding=(0, 0),
        pad_edge=False,
    )
    # Where a terminal is too narrow, words are wrapped: those of other columns rather than the rows' names.
    wrapped = table.texts or {table.header[0]}
    for column in table.header:
        drawn.add_column(column, justify="left" if table.is_text(column) else "right", no_wrap=column not in wrapped)
    for row in table.rows:
        drawn.add_row(*row)
    return drawn


def show(console: Console, table: Table) -> None:
    """Print a table and its notes."""
    console.print(to_rich(table))
    for note in table.notes:
        console.print(note, style="dim", highlight=False)
    console.print()


def to_markdown(table: Table) -> str:
    """For a file."""
    lines = [
        f"## {table.title}",
        "",
        _markdown_row(name.replace("\n", " ") for name in table.header),
        _markdown_row(":--" if table.is_text(name) else "--:" for name in table.header),
        *(_markdown_row(row) for row in table.rows),
    ]
    for note in table.notes:
        lines += ["", note]
    return "\n".join(lines) + "\n"


COLUMNS = {
    "weights": ("weights",),
    "grads": ("gradients",),
    "optim.": ("optimizer",),
    "copies": ("copies",),
    "φ": ("output_module",),
    "mentor": ("mentor",),
    "activ.": ("activations", "transients"),
}
"""Columns of a memory table, and the terms that each adds up; those that are 0 everywhere are left out."""


def memory_table(plan: Mapping[str, Any]) -> Table:
    """What full training and each item of a plan need, and which memory classes hold it."""
    full, budgets = plan["full"], plan["budgets_bytes"]
    columns = [name for name in COLUMNS if any(_sum_of(row, name) for row in (full, *plan["rows"]))]
    return Table(
        f"Memory plan: {plan['model']}, batches of {plan['batch_size']}",
        (
            "trained",
            "peak\nMiB",
            "of\nfull",
            *(f"{name}\nMiB" for name in columns),
            "least\nMiB",
            "FLOPs\nof f.",
            "upload\nMiB",
            "fits",
        ),
        tuple(
            (
                row["label"],
                _mib(row["peak_bytes"]),
                _percent(row["peak_bytes"] / full["peak_bytes"]),
                *(_mib(_sum_of(row, name)) for name in columns),
                _mib(row["least"]["peak_bytes"]),
                _percent(row["flops_per_example"] / full["flops_per_example"]),
                _mib(row["bytes_up"]),
                _fitting(row["fits"], budgets),
            )
            for row in (full, *plan["rows"])
        ),
        (
            "Peak: predicted, the sum of the terms at the fullest moment. φ is the output module, with gradients and "
            "momentum; activ. the batch, what backward needs, and what lives for a moment, scratch included. "
            "Least: by all means that the method allows (micro-batches, recomputation, a streamed prefix); the other "
            "figures are by none. FLOPs are for one example. Fits: the memory classes that can train it, and how.",
        ),
        frozenset({"fits"}),
    )


def class_table(classes: Sequence[Mapping[str, Any]], full_bytes: int, base_bytes: int | None) -> Table:
    """The memory classes: their budgets, what of them is planned with, and the base that they come on top of.

    Args:
        classes: each with `name`, `budget_bytes`, `planned_bytes` and `share`.
        full_bytes: predicted peak of full training.
        base_bytes: what a worker holds without it, None where it can't be measured.
    """

    def row(c: Mapping[str, Any]) -> tuple[str, ...]:
        budget, planned = c["budget_bytes"], c["planned_bytes"]
        base, total = (NOTHING, NOTHING) if base_bytes is None else (_mib(base_bytes), _mib(base_bytes + budget))
        return c["name"], _mib(budget), _mib(planned), _percent(planned / full_bytes), _percent(c["share"]), base, total

    notes = [
        "A budget is what training may add to a warmed-up worker. The base is what such a worker holds "
        "without it (interpreter, torch, scalefl), measured here after a first task on a tiny ResNet.",
    ]
    if any(c["planned_bytes"] < c["budget_bytes"] for c in classes):
        notes.append("Planned: a hard cap leaves 3 % of a budget, or 4 MiB if that is more, to what no plan knows.")
    return Table(
        "Memory classes",
        ("class", "budget\nMiB", "planned\nMiB", "planned\nof full", "share of\nclients", "base\nMiB", "total\nMiB"),
        tuple(map(row, classes)),
        tuple(notes),
    )


def summary_table(run: Run) -> Table:
    """The final figures of a run."""
    figures = run.summary or {}
    seen, clients = figures.get("num_clients_seen"), figures.get("num_clients")
    rows = (
        ("test accuracy", _accuracy(figures.get("test"))),
        ("test accuracy, low-memory clients' data", _accuracy(figures.get("low_memory_test"))),
        ("validation accuracy", _accuracy(figures.get("validation"))),
        *((("privacy", _privacy(run)),) if "privacy" in figures else ()),
        ("clients that took part", NOTHING if seen is None else f"{seen} of {clients}"),
        ("tasks that clients lost", str(figures.get("num_clients_lost", NOTHING))),
        ("predicted peak of a client", _on_base(figures.get("predicted_peak_bytes"), run.base_bytes)),
        ("measured peak of a client", _on_base(figures.get("measured_peak_bytes"), run.base_bytes)),
        ("predicted peak of full training", _on_base(figures.get("full_training_peak_bytes"), run.base_bytes)),
        ("FLOPs of all clients", flops(figures.get("flops"))),
        ("bytes down", _with_unit(_mib(figures.get("bytes_down")), "MiB")),
        ("bytes up", _with_unit(_mib(figures.get("bytes_up")), "MiB")),
        ("time here", _with_unit(_seconds(figures.get("seconds")), "s")),
        ("simulated time on the devices", _with_unit(_seconds(figures.get("simulated_seconds")), "s")),
    )
    rounds = f"{run.num_rounds} rounds"
    if run.summary is None:
        rounds = f"unfinished, {run.num_rounds} of {run.config.get('rounds', '?')} rounds"
    return Table(f"{run.name}: {run.method}, {rounds}", ("figure", "value"), rows)


def comparison(runs: Sequence[Run]) -> Table:
    """Several runs side by side."""
    rounds = {run.num_rounds for run in runs}
    unfinished = [
        f"{run.name} is unfinished: {run.num_rounds} of {run.config.get('rounds', '?')} rounds are done."
        for run in runs
        if run.summary is None
    ]
    is_private = any("privacy" in (run.summary or {}) for run in runs)
    return Table(
        f"Comparison after {rounds.pop()} rounds" if len(rounds) == 1 else "Comparison",
        (
            "method",
            "accuracy\n%",
            "low-mem.\n%",
            *(("privacy",) if is_private else ()),
            "clients\nseen",
            "peak\nMiB",
            "FLOPs\ntera",
            "down\nMiB",
            "up\nMiB",
            "here\ns",
            "devices\ns",
        ),
        tuple((_label(run, same_rounds=not rounds), *_figures(run, with_privacy=is_private)) for run in runs),
        (
            "Accuracy is on test data; low-mem. on test rows drawn by the label distribution of the clients that "
            "cannot hold full training, the same rows for every method. Seen: clients that took part, of all. "
            f"Peak: the largest predicted training peak of a client{_bases(runs)}. FLOPs, down and up: all clients "
            "together. "
            "Here: seconds on this machine; devices: simulated seconds on the clients' devices."
            f"{' Private runs tell nothing that depends on who took part.' if is_private else ''}",
            *unfinished,
        ),
    )


def flops(count: float | None) -> str:
    """Floating-point operations for people."""
    if count is None:
        return NOTHING
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{digits(count / size)} {prefix}FLOP"
    return f"{count:.0f} FLOP"


def _label(run: Run, *, same_rounds: bool) -> str:
    """The run's name, with its method and rounds where neither the name nor the title tells them."""
    facts = [run.method] if run.method not in run.name else []
    facts += [] if same_rounds else [f"{run.num_rounds} rounds"]
    return f"{run.name} ({', '.join(facts)})" if facts else run.name


def _privacy(run: Run) -> str:
    spent = (run.summary or {}).get("privacy")
    return privacy(spent) if spent else NOTHING


def _figures(run: Run, *, with_privacy: bool) -> tuple[str, ...]:
    figures = run.summary or {}
    total_flops = figures.get("flops")
    return (
        _accuracy(figures.get("test")).removesuffix(" %"),
        _accuracy(figures.get("low_memory_test")).removesuffix(" %"),
        *((_privacy(run),) if with_privacy else ()),
        f"{figures['num_clients_seen']} / {figures['num_clients']}" if "num_clients_seen" in figures else NOTHING,
        _mib(figures.get("predicted_peak_bytes")),
        NOTHING if total_flops is None else digits(total_flops / 1e12),
        _mib(figures.get("bytes_down")),
        _mib(figures.get("bytes_up")),
        _seconds(figures.get("seconds")),
        _seconds(figures.get("simulated_seconds")),
    )


def _sum_of(row: Mapping[str, Any], column: str) -> int:
    return sum(int(row[f"{term}_bytes"]) for term in COLUMNS[column])


def _fitting(fits: Mapping[str, Mapping[str, Any]], budgets: Mapping[str, int]) -> str:
    """The memory classes, by the means that they need."""
    by_means: dict[str, list[str]] = {}
    for name, fit in fits.items():
        by_means.setdefault(fit["means"], []).append(name)
    texts = []
    for means, names in by_means.items():
        who = "all" if len(names) == len(budgets) > 1 else ", ".join(names)
        texts.append(f"{who} ({means})" if means else who)
    return "; ".join(texts) or "none"


def _accuracy(metrics: Mapping[str, float] | None) -> str:
    found = measured(metrics, "accuracy")
    return NOTHING if found is None else _percent(found, 1)


def _percent(fraction: float, digits: int = 0) -> str:
    return f"{100 * fraction:.{digits}f} %"


def _mib(num_bytes: float | None) -> str:
    return NOTHING if num_bytes is None else mib(num_bytes)


def _bases(runs: Iterable[Run]) -> str:
    bases = sorted({_mib(run.base_bytes) for run in runs if run.base_bytes is not None})
    return f", on top of a worker's base of {' or '.join(bases)} MiB" if bases else ""


def _on_base(peak_bytes: float | None, base_bytes: int | None) -> str:
    """What training adds, beside what a worker holds without it."""
    peak = _with_unit(_mib(peak_bytes), "MiB")
    return peak if NOTHING in (peak, _mib(base_bytes)) else f"base {_mib(base_bytes)} MiB + {peak}"


def _seconds(seconds: float | None) -> str:
    return NOTHING if seconds is None else digits(seconds)


def _with_unit(number: str, unit: str) -> str:
    return number if number == NOTHING else f"{number} {unit}"


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
