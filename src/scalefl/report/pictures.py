"""Pictures of runs: accuracy over rounds, predicted memory, and the nHSIC plane."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from scalefl.report import Run, measured
from scalefl.report.tables import Numbers
from scalefl.units import MIB, TERMS, digits

# Okabe and Ito's palette, without its yellow: told apart by colour-blind readers, and dark enough on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
TERM_COLOURS: dict[str, str] = {
    "weights": "#0072B2",
    "gradients": "#E69F00",
    "optimizer": "#009E73",
    "copies": "#000000",
    "output_module": "#CC79A7",
    "mentor": "#D55E00",
    "activations": "#56B4E9",
    "transients": "#C9E4F5",
}
# So that colours are not all that tells lines apart.
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GRID, QUIET = "#DDDDDD", "#555555"
DASHED = (0, (4, 2))
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "text.parse_math": False,  # a name with two dollars is no formula
}
DPI = 150
LEAST = "least, by all allowed means"
ACCURACY = "validation accuracy (%)"
MANY_POINTS = 40
FAR_BUDGET = 1.35
"""Budgets above so many times the largest bar are named in words: drawn, they would flatten the bars."""


def save(figure: Figure, path: Path) -> Path:
    """Write a figure in the format that the path ends with, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, dpi=DPI, facecolor="white")
    return path


def accuracy_picture(runs: Sequence[Run]) -> Figure | None:
    """Validation accuracy over rounds, one line for each run; None if none was measured."""
    curves = [(run.name, _accuracies(run)) for run in runs]
    curves = [(name, points) for name, points in curves if points]
    if not curves:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.subplots()
        with_grid(axes, "both")
        for (name, points), look in zip(curves, looks(), strict=False):
            rounds, values = zip(*points, strict=True)
            every = math.ceil(len(points) / MANY_POINTS)
            axes.plot(rounds, values, label=name, clip_on=False, markevery=every, **look)
        axes.set(xlabel="round", ylabel=ACCURACY, ylim=(0, _headroom(curves)))
        axes.set_xlim(0, max(points[-1][0] for _, points in curves) * 1.02 or 1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(curves) == 1:
            axes.set_title(f"{curves[0][0]}: validation accuracy")
        else:
            axes.set_title("Validation accuracy")
            with_key(figure, [(name, line) for (name, _), line in zip(curves, axes.lines, strict=True)], 3)
    return figure


def accuracy_numbers(runs: Sequence[Run]) -> Numbers:
    """What `accuracy_picture` is drawn from."""
    rows = [(run.name, number, accuracy) for run in runs for number, accuracy in _accuracies(run)]
    return Numbers("Validation accuracy", ("run", "round", "validation accuracy\n%"), tuple(rows))


def memory_picture(plan: Mapping[str, Any], name: str, width: float = 8.0) -> Figure:
    """Predicted training peak by term, for full training and each item of a plan, with the budgets; width in inches."""
    rows = [plan["full"], *plan["rows"]]
    widest = max(row["peak_bytes"] for row in rows) / MIB
    budgets = {label: num_bytes / MIB for label, num_bytes in plan["budgets_bytes"].items()}
    near = {label: budget for label, budget in budgets.items() if budget <= FAR_BUDGET * widest}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, 2.1 + 0.34 * len(rows)), layout="constrained")
        axes = figure.subplots()
        with_grid(axes, "x")
        left = [0.0] * len(rows)
        for term in TERMS:
            sizes = [row[f"{term}_bytes"] / MIB for row in rows]
            if any(sizes):
                name_of = term.replace("_", " ")
                axes.barh(range(len(rows)), sizes, left=left, height=0.68, color=TERM_COLOURS[term], label=name_of)
            left = [before + size for before, size in zip(left, sizes, strict=True)]
        least = [row["least"]["peak_bytes"] / MIB for row in rows]
        if any(low < row["peak_bytes"] / MIB for low, row in zip(least, rows, strict=True)):
            look: dict[str, Any] = {"marker": "D", "c": "white", "edgecolors": "black", "s": 24, "zorder": 3}
            axes.scatter(least, range(len(rows)), label=LEAST, **look)
        axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, max([widest, *near.values()]) * 1.06)
        axes.set_xlabel("predicted training peak (MiB)")
        levels = _draw_budgets(axes, near, width)
        axes.set_title(f"{name}: memory by what is trained", pad=10 + 13 * levels)
        handles = axes.get_legend_handles_labels()[0]
        if near:
            handles.append(
                Line2D([], [], color=QUIET, linewidth=1.2, linestyle=DASHED, label="budget of a memory class")
            )
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4))
        far = [f"{label} ({digits(budget)} MiB)" for label, budget in budgets.items() if label not in near]
        if far:
            unseen = textwrap.fill(f"not shown, as they hold all of it: {', '.join(far)}", round(12 * width))
            axes.set_xlabel(f"predicted training peak (MiB)\n{unseen}")
    return figure


def memory_numbers(plan: Mapping[str, Any]) -> Numbers:
    """What `memory_picture` is drawn from."""
    rows = [plan["full"], *plan["rows"]]
    terms = [term for term in TERMS if any(row[f"{term}_bytes"] for row in rows)]
    budgets = ", ".join(f"{name} {digits(size / MIB)} MiB" for name, size in plan["budgets_bytes"].items())
    return Numbers(
        "Predicted training peak by term",
        ("trained", *(f"{name}\nMiB" for name in ("peak", *(term.replace("_", " ") for term in terms), "least"))),
        tuple((row["label"], *(size / MIB for size in _sizes(row, terms))) for row in rows),
        (f"Least: by all means that the method allows. Budgets: {budgets}.",),
    )


def _sizes(row: Mapping[str, Any], terms: Sequence[str]) -> list[int]:
    """A row's peak, its terms, and the least that it takes, in bytes."""
    return [row["peak_bytes"], *(row[f"{term}_bytes"] for term in terms), row["least"]["peak_bytes"]]


def plane_picture(run: Run, parts: Sequence[str] = ("near", "whole")) -> Figure | None:
    """The nHSIC plane: the path of each cut from the start of the run to its end; None if none was measured.

    Twice: near by, and whole, with what the estimator gives where nothing is shared; or one of them alone. The title
    names the number of samples: planes of different numbers do not compare.
    """
    paths = _paths(run)
    if not paths:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5 * len(parts), 4.4), layout="constrained")
        widths = [{"near": 3, "whole": 2}[part] for part in parts]
        panels = figure.subplots(1, len(parts), squeeze=False, width_ratios=widths)
        for axes, part in zip(panels.flat, parts, strict=True):
            lines = _draw_plane(axes, paths, whole=part == "whole")
            axes.set_title(f"{run.name}: nHSIC plane{_samples(paths)}" if part == "near" else "The whole plane")
        marks = _plane_key(paths)
        names = [*paths, *(str(mark.get_label()) for mark in marks)]
        figure.legend([*lines, *marks], names, loc="outside right upper", title="Z = output of", alignment="left")
    return figure


def plane_numbers(run: Run) -> Numbers:
    """What `plane_picture` is drawn from."""
    keys = ("x", "y", "x_permuted", "y_permuted")
    paths = _paths(run)
    return Numbers(
        f"{run.name}: nHSIC plane{_samples(paths)}",
        ("Z = output of", "round", "nHSIC(X; Z)", "nHSIC(Y; Z)", "X permuted", "Y permuted"),
        tuple(
            (cut, point["round"], *(float(point[key]) for key in keys))
            for cut, points in paths.items()
            for point in points
        ),
        ("Permuted: the same with the samples of X or Y permuted, so that nothing is shared.",),
    )


def _draw_plane(axes: Axes, paths: Mapping[str, Sequence[Mapping[str, float]]], *, whole: bool) -> list[Line2D]:
    """All paths; returns their lines."""
    with_grid(axes, "both")
    axes.set(xlabel="nHSIC(X; Z): kept of the input", ylabel="nHSIC(Y; Z): told of the label")
    lines = [_draw_path(axes, cut, points, look) for (cut, points), look in zip(paths.items(), looks(), strict=False)]
    xs, ys = ([p[axis] for points in paths.values() for p in points] for axis in ("x", "y"))
    axes.set_xlim(0, 1.02) if whole else axes.set_xlim(*_around(xs))
    axes.set_ylim(0, 1.02) if whole else axes.set_ylim(*_around(ys))
    return lines


def _draw_path(axes: Axes, cut: str, points: Sequence[Mapping[str, float]], look: Mapping[str, Any]) -> Line2D:
    xs, ys = [p["x"] for p in points], [p["y"] for p in points]
    colour, marker = look["color"], look["marker"]
    style = {**look, "linewidth": 1.5, "markersize": 7, "markevery": [len(points) - 1]}
    (line,) = axes.plot(xs, ys, label=cut, zorder=3, **style)
    axes.plot(xs[1:-1], ys[1:-1], ".", color=colour, markersize=4)
    axes.plot(xs[0], ys[0], marker, color=colour, markerfacecolor="white", markersize=7, markeredgewidth=1.6, zorder=3)
    ends = (points[0], points[-1])  # a cross for each point would be a blot
    permuted = [[p[key] for p in ends] for key in ("x_permuted", "y_permuted")]
    axes.plot(*permuted, "x", color=colour, alpha=0.6, markersize=6, markeredgewidth=1.3)
    return line


def _samples(paths: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """How many samples the points are of; journals of older versions do not say."""
    counts = {p["num_samples"] for points in paths.values() for p in points if "num_samples" in p}
    return f" of {', '.join(str(count) for count in sorted(counts))} samples" if counts else ""


def _plane_key(paths: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Line2D]:
    """What the markers mean."""
    rounds = [point["round"] for points in paths.values() for point in points]

    def mark(marker: str, label: str, **style: Any) -> Line2D:
        return Line2D([], [], linestyle="", marker=marker, color=QUIET, markersize=7, label=label, **style)

    return [
        mark("o", f"round {min(rounds)}", markerfacecolor="white", markeredgewidth=1.6),
        mark("o", f"round {max(rounds)}"),
        mark("x", "X, Y permuted:\nnothing shared", alpha=0.6),
    ]


def _draw_budgets(axes: Axes, budgets: Mapping[str, float], width: float) -> int:
    """Budget lines with their names above the bars; returns on how many levels the names stand."""
    per_character = 0.076 / (width - 1.4) * axes.get_xlim()[1]  # the rows' names take 1.4 inches or so
    level_ends: list[float] = []
    for label, budget in sorted(budgets.items(), key=lambda item: item[1]):
        text = f"{label}: {digits(budget)} MiB"
        half = len(text) / 2 * per_character
        level = next((i for i, end in enumerate(level_ends) if budget - half > end), len(level_ends))
        level_ends[level : level + 1] = [budget + half]
        axes.axvline(budget, color=QUIET, linewidth=1.2, linestyle=DASHED)
        axes.annotate(
            text,
            (budget, 1),
            xytext=(0, 4 + 13 * level),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=9,
            color=QUIET,
        )
    return len(level_ends)


def _accuracies(run: Run) -> list[tuple[int, float]]:
    found = [(line["round"], measured(line.get("validation"), "accuracy")) for line in run.journal]
    return [(number, 100 * accuracy) for number, accuracy in found if accuracy is not None]


def _headroom(curves: Sequence[tuple[str, Sequence[tuple[int, float]]]]) -> float:
    best = max(value for _, points in curves for _, value in points)
    return min(100.0, best + 8)


def _paths(run: Run) -> dict[str, list[dict[str, Any]]]:
    """The plane's points by cut, in the order of rounds; a model that has diverged gives no numbers, and no points."""
    paths: dict[str, list[dict[str, Any]]] = {}
    for line in run.journal:
        for point in line.get("plane", ()):
            if all(measured(point, key) is not None for key in ("x", "y", "x_permuted", "y_permuted")):
                paths.setdefault(point["cut"], []).append({**point, "round": line["round"]})
    return paths


def looks() -> Iterator[dict[str, Any]]:
    """How lines look that are told apart, with and without colours; all different for as long as that goes."""
    common = {"linewidth": 1.8, "markersize": 4}
    return cycle(
        {"linestyle": line, "color": colour, "marker": marker, **common}
        for line, first in (("-", 0), ("--", 3), (":", 5))  # a colour comes again with another marker
        for colour, marker in zip(PALETTE, MARKERS[first:] + MARKERS[:first], strict=True)
    )


def with_key(figure: Figure, entries: Sequence[tuple[str, Artist]], columns: int) -> None:
    """Say below a picture what its lines are called; names are taken as they are, with a first "_" too."""
    names, handles = zip(*entries, strict=True)
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(entries), columns), handlelength=3.2)


def _around(values: Sequence[float]) -> tuple[float, float]:
    """Limits that show the values with some room, and not a hair's breadth under a magnifying glass."""
    middle = (min(values) + max(values)) / 2
    half = max(0.62 * (max(values) - min(values)), 0.05)
    return middle - half, middle + half


def with_grid(axes: Axes, axis: Any) -> None:
    """Draw a quiet grid behind."""
    axes.grid(axis=axis, color=GRID, linewidth=0.8)
