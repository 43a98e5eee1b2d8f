"""Pictures of runs: accuracy over rounds, predicted memory, and the nHSIC plane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from scalefl.report import Run
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
}
DPI = 150
LEAST = "least, by all allowed means"
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
        for (name, points), (line, colour) in zip(curves, line_styles(), strict=False):
            rounds, values = zip(*points, strict=True)
            marker = "o" if len(points) <= MANY_POINTS else None
            style = {"color": colour, "marker": marker, "markersize": 3.5, "linewidth": 1.8}
            axes.plot(rounds, values, line, label=name, clip_on=False, **style)
        axes.set(xlabel="round", ylabel="validation accuracy (%)", ylim=(0, _headroom(curves)))
        axes.set_xlim(0, max(points[-1][0] for _, points in curves) * 1.02 or 1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(curves) == 1:
            axes.set_title(f"{curves[0][0]}: validation accuracy")
        else:
            axes.set_title("Validation accuracy")
            figure.legend(loc="outside lower center", ncols=min(len(curves), 3))
    return figure


def memory_picture(plan: Mapping[str, Any], name: str) -> Figure:
    """Predicted training peak by term, for full training and each item of a plan, with the budgets."""
    rows = [plan["full"], *plan["rows"]]
    widest = max(row["peak_bytes"] for row in rows) / MIB
    budgets = {label: num_bytes / MIB for label, num_bytes in plan["budgets_bytes"].items()}
    near = {label: budget for label, budget in budgets.items() if budget <= FAR_BUDGET * widest}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 2.1 + 0.34 * len(rows)), layout="constrained")
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
        levels = _draw_budgets(axes, near)
        axes.set_title(f"{name}: memory by what is trained", pad=10 + 13 * levels)
        handles = axes.get_legend_handles_labels()[0]
        if near:
            handles.append(
                Line2D([], [], color=QUIET, linewidth=1.2, linestyle=DASHED, label="budget of a memory class")
            )
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4))
        far = [f"{label} ({digits(budget)} MiB)" for label, budget in budgets.items() if label not in near]
        if far:
            axes.set_xlabel(f"predicted training peak (MiB)\nnot shown, as they hold all of it: {', '.join(far)}")
    return figure


def plane_picture(run: Run) -> Figure | None:
    """The nHSIC plane: the path of each cut from the start of the run to its end; None if none was measured.

    Twice: near by, and whole, with what the estimator gives where nothing is shared. The title names the number of
    samples: planes of different numbers do not compare.
    """
    paths = _paths(run)
    if not paths:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.4), layout="constrained")
        near, whole = figure.subplots(1, 2, width_ratios=(3, 2))
        for axes in (near, whole):
            with_grid(axes, "both")
            axes.set(xlabel="nHSIC(X; Z): kept of the input", ylabel="nHSIC(Y; Z): told of the label")
            for (cut, points), (line, colour) in zip(paths.items(), line_styles(), strict=False):
                _draw_path(axes, cut, points, line, colour)
        for axis, set_near, set_whole in (("x", near.set_xlim, whole.set_xlim), ("y", near.set_ylim, whole.set_ylim)):
            values = [p[axis] for points in paths.values() for p in points]
            set_near(*_around(values))
            set_whole(0, 1.02)
        near.set_title(f"{run.name}: nHSIC plane{_samples(paths)}")
        whole.set_title("The whole plane")
        handles = [*near.get_legend_handles_labels()[0], *_plane_key(run)]
        figure.legend(handles=handles, loc="outside right upper", title="Z = output of", alignment="left")
    return figure


def _draw_path(axes: Axes, cut: str, points: Sequence[Mapping[str, float]], line: str, colour: str) -> None:
    xs, ys = [p["x"] for p in points], [p["y"] for p in points]
    marker = "." if len(points) > 2 else None
    axes.plot(xs, ys, line, color=colour, marker=marker, markersize=4, linewidth=1.5, label=cut)
    axes.plot(xs[0], ys[0], "o", color=colour, markerfacecolor="white", markersize=7, markeredgewidth=1.6, zorder=3)
    axes.plot(xs[-1], ys[-1], "o", color=colour, markersize=7, zorder=3)
    ends = (points[0], points[-1])  # a cross for each point would be a blot
    permuted = [[p[key] for p in ends] for key in ("x_permuted", "y_permuted")]
    axes.plot(*permuted, "x", color=colour, alpha=0.35, markersize=6, markeredgewidth=1.3)


def _samples(paths: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """How many samples the points are of; journals of older versions do not say."""
    counts = {p["num_samples"] for points in paths.values() for p in points if "num_samples" in p}
    return f" of {', '.join(str(count) for count in sorted(counts))} samples" if counts else ""


def _plane_key(run: Run) -> list[Line2D]:
    """What the markers mean."""
    rounds = [line["round"] for line in run.journal if "plane" in line]

    def mark(marker: str, label: str, **style: Any) -> Line2D:
        return Line2D([], [], linestyle="", marker=marker, color=QUIET, markersize=7, label=label, **style)

    return [
        mark("o", f"round {rounds[0]}", markerfacecolor="white", markeredgewidth=1.6),
        mark("o", f"round {rounds[-1]}"),
        mark("x", "X, Y permuted:\nnothing shared", alpha=0.5),
    ]


def _draw_budgets(axes: Axes, budgets: Mapping[str, float]) -> int:
    """Budget lines with their names above the bars; returns on how many levels the names stand."""
    per_character = 0.0115 * axes.get_xlim()[1]
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
    measured = [line for line in run.journal if "accuracy" in line.get("validation", {})]
    return [(line["round"], 100 * line["validation"]["accuracy"]) for line in measured]


def _headroom(curves: Sequence[tuple[str, Sequence[tuple[int, float]]]]) -> float:
    best = max(value for _, points in curves for _, value in points)
    return min(100.0, best + 8)


def _paths(run: Run) -> dict[str, list[dict[str, float]]]:
    """The plane's points by cut, in the order of rounds."""
    paths: dict[str, list[dict[str, float]]] = {}
    for line in run.journal:
        for point in line.get("plane", ()):
            paths.setdefault(point["cut"], []).append(point)
    return paths


def line_styles() -> Any:
    """Pairs of line style and colour, all different for as long as that goes."""
    return cycle((line, colour) for line in ("-", "--", ":") for colour in PALETTE)


def _around(values: Sequence[float]) -> tuple[float, float]:
    """Limits that show the values with some room, and not a hair's breadth under a magnifying glass."""
    middle = (min(values) + max(values)) / 2
    half = max(0.62 * (max(values) - min(values)), 0.05)
    return middle - half, middle + half


def with_grid(axes: Axes, axis: Any) -> None:
    """Draw a quiet grid behind."""
    axes.grid(axis=axis, color=GRID, linewidth=0.8)
