"""Tables and pictures of a comparison, made from its folders alone."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scalefl.report import Run, read_run
from scalefl.report.pictures import STYLE, line_styles, save, with_grid
from scalefl.report.tables import NOTHING, Table, to_markdown
from scalefl.run_folder import RunFolder, read_json
from scalefl.units import MIB, digits

HIDDEN = ("test", "low_memory", "p10")
"""Figures of test data."""


@dataclass(frozen=True)
class Results:
    """What the runs of a comparison have come to so far.

    Args:
        name: of the comparison.
        path: its folder.
        settings: `seeds`, `target_accuracy` and `validation_only`.
        runs: scenario -> variant -> its finished runs, by seed. A comparison without scenarios has one without a name.
    """

    name: str
    path: Path
    settings: Mapping[str, Any]
    runs: Mapping[str, Mapping[str, Mapping[int, Run]]]

    @property
    def num_missing(self) -> int:
        """Runs that are not finished."""
        seeds = len(self.settings["seeds"])
        return sum(seeds - len(found) for variants in self.runs.values() for found in variants.values())


def read_results(folder: Path) -> Results:
    """The results in the folder of a comparison.

    Raises:
        CheckpointError: there is none, or one of its runs is damaged.
    """
    head = read_json(RunFolder(folder).comparison)
    runs: dict[str, dict[str, dict[int, Run]]] = {}
    for scenario in head["scenarios"]:
        for variant in head["variants"]:
            folders = {seed: folder / scenario / f"{variant}-{seed}" for seed in head["settings"]["seeds"]}
            done = {seed: read_run(at) for seed, at in folders.items() if RunFolder(at).summary.exists()}
            runs.setdefault(scenario, {})[variant] = done
    return Results(head["name"], folder, head["settings"], runs)


# Figures


def figures(run: Run, target: float | None, equal_flops: float) -> dict[str, float | None]:
    """What a finished run came to.

    Args:
        run: of a comparison.
        target: the validation accuracy up to which simulated seconds are counted.
        equal_flops: of all clients, at which validation accuracy is read.
    """
    summary = run.summary or {}
    return {
        "test": summary["test"].get("accuracy"),
        "low_memory": summary["low_memory_test"].get("accuracy"),
        "p10": summary.get("client_test", {}).get("accuracy_p10"),
        "validation": summary["validation"].get("accuracy"),
        "at_equal_flops": max((y for x, y in curve(run, "flops") if x <= equal_flops), default=None),
        "clients": summary["num_clients_seen"],
        "lost": summary["num_clients_lost"],
        "predicted_peak_bytes": summary["predicted_peak_bytes"],
        "measured_peak_bytes": summary["measured_peak_bytes"],
        "flops": summary["flops"],
        "bytes_down": summary["bytes_down"],
        "bytes_up": summary["bytes_up"],
        "seconds": summary["seconds"],
        "simulated_seconds": summary["simulated_seconds"],
        "seconds_to_target": _seconds_to(run, target),
    }


AXES: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], float]]] = {
    "rounds": ("round", lambda line: 1.0),
    "flops": ("FLOPs of all clients (tera)", lambda line: float(line["flops"])),
    "bytes": ("bytes moved (MiB)", lambda line: float(line["bytes_down"] + line["bytes_up"])),
    "seconds": ("simulated seconds on the devices", lambda line: float(line["simulated_seconds"])),
}
"""What accuracy is drawn over: its name, and what each round adds to it."""
UNITS = {"rounds": 1.0, "flops": 1e12, "bytes": float(MIB), "seconds": 1.0}


def curve(run: Run, axis: str) -> list[tuple[float, float]]:
    """Validation accuracy over one of `AXES`, at each round that was evaluated."""
    added = AXES[axis][1]
    spent = accumulate(added(line) if line["round"] else 0.0 for line in run.journal)
    return [
        (x, line["validation"]["accuracy"])
        for x, line in zip(spent, run.journal, strict=True)
        if "accuracy" in line.get("validation", ())
    ]


def _seconds_to(run: Run, target: float | None) -> float | None:
    return next((x for x, y in curve(run, "seconds") if target is not None and y >= target), None)


def target_of(results: Results, scenario: str) -> float | None:
    """The accuracy that counts as reached: as set, or the highest that every run of a scenario comes to."""
    chosen = results.settings["target_accuracy"]
    curves = [curve(run, "rounds") for found in results.runs[scenario].values() for run in found.values()]
    best = [max(y for _, y in points) for points in curves if points]
    return float(chosen) if chosen is not None else min(best, default=None)


def all_figures(results: Results, scenario: str) -> dict[str, dict[int, dict[str, float | None]]]:
    """The figures of each variant, by seed."""
    runs = results.runs[scenario]
    target = target_of(results, scenario)
    flops = [run.summary["flops"] for found in runs.values() for run in found.values() if run.summary]
    equal = min(flops, default=0.0)
    hidden = HIDDEN if results.settings["validation_only"] else ()
    return {
        variant: {
            seed: {key: value for key, value in figures(run, target, equal).items() if key not in hidden}
            for seed, run in found.items()
        }
        for variant, found in runs.items()
    }


# Tables

COLUMNS: Mapping[str, tuple[str, float]] = {
    "test": ("accuracy\n%", 0.01),
    "low_memory": ("low-mem.\n%", 0.01),
    "p10": ("10th pct.\n%", 0.01),
    "validation": ("validation\n%", 0.01),
    "at_equal_flops": ("equal FLOPs\n%", 0.01),
    "clients": ("clients\nseen", 1.0),
    "lost": ("tasks\nlost", 1.0),
    "predicted_peak_bytes": ("predicted\nMiB", MIB),
    "measured_peak_bytes": ("measured\nMiB", MIB),
    "flops": ("FLOPs\ntera", 1e12),
    "bytes_down": ("down\nMiB", MIB),
    "bytes_up": ("up\nMiB", MIB),
    "seconds": ("here\ns", 1.0),
    "simulated_seconds": ("devices\ns", 1.0),
    "seconds_to_target": ("to target\ns", 1.0),
}
"""The heading of each figure, and its unit."""
SPREAD = ("test", "low_memory", "p10", "validation", "at_equal_flops")
GAINS = (*SPREAD, "clients", "lost")


def tables(results: Results, scenario: str) -> list[Table]:
    """The variants of a scenario side by side, means over seeds: what they reach, and what it costs."""
    found = all_figures(results, scenario)
    title = f"{results.name}: {scenario}" if scenario else results.name
    notes = [
        "Means over seeds ± standard deviation. Low-mem.: on test rows drawn by the label distribution of the clients "
        "that cannot hold full training. 10th pct.: a tenth of the clients do worse, on test data with their labels' "
        "shares. Equal FLOPs: the best validation accuracy before the clients have spent what the cheapest run spent."
    ]
    if results.num_missing:
        notes.append(f"{results.num_missing} runs of the comparison are not finished.")
    costs = [
        "Predicted, measured: the largest peak of a task, on top of a worker's base. FLOPs, down, up: all clients "
        "together. Here: on this machine. Devices: simulated."
    ]
    target = target_of(results, scenario)
    if target is not None:
        costs.append(f"Target: {100 * target:.1f} % on validation data; {NOTHING} where not every seed reached it.")
    return [
        _table(f"{title}: accuracy", found, [key for key in COLUMNS if key in GAINS], notes),
        _table(f"{title}: cost", found, [key for key in COLUMNS if key not in GAINS], costs),
    ]


def _table(
    title: str, found: Mapping[str, Mapping[int, Mapping[str, float | None]]], keys: list[str], notes: list[str]
) -> Table:
    keys = [k for k in keys if any(f.get(k) is not None for seeds in found.values() for f in seeds.values())]
    rows = tuple(
        (variant, str(len(seeds)), *(_cell(key, [f[key] for f in seeds.values()]) for key in keys))
        for variant, seeds in found.items()
    )
    return Table(title, ("variant", "seeds", *(COLUMNS[key][0] for key in keys)), rows, tuple(notes))


def _cell(key: str, values: Sequence[float | None]) -> str:
    known = [value / COLUMNS[key][1] for value in values if value is not None]
    if not known or len(known) < len(values):
        return NOTHING
    mean = statistics.mean(known)
    if key in SPREAD:
        return f"{mean:.1f} ± {statistics.stdev(known):.1f}" if len(known) > 1 else f"{mean:.1f}"
    return digits(mean)


def write(results: Results, out: Path) -> list[Path]:
    """Write a comparison's tables (Markdown and CSV) and pictures into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    found = [to_markdown(table) for scenario in results.runs for table in tables(results, scenario)]
    (out / "comparison.md").write_text("\n".join(found))
    _write_csv(results, out / "comparison.csv")
    written = [out / "comparison.md", out / "comparison.csv"]
    for scenario in results.runs:
        figure = curves_picture(results, scenario)
        if figure is not None:
            written.append(save(figure, out / f"accuracy{'-' if scenario else ''}{scenario}.png"))
    figure = budgets_picture(results)
    if figure is not None:
        written.append(save(figure, out / "budgets.png"))
    return written


def _write_csv(results: Results, path: Path) -> None:
    rows = [
        {"scenario": scenario, "variant": variant, "seed": seed, **found}
        for scenario in results.runs
        for variant, seeds in all_figures(results, scenario).items()
        for seed, found in seeds.items()
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["scenario", "variant", "seed"], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


# Pictures


def curves_picture(results: Results, scenario: str) -> Figure | None:
    """Validation accuracy over rounds, FLOPs, bytes and simulated time: means over seeds, with the seeds' range."""
    runs = {variant: list(found.values()) for variant, found in results.runs[scenario].items() if found}
    if not any(curve(run, "rounds") for found in runs.values() for run in found):
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 7.4), layout="constrained")
        for axes, axis in zip(figure.subplots(2, 2, sharey=True).flat, AXES, strict=True):
            with_grid(axes, "both")
            for (variant, found), (line, colour) in zip(runs.items(), line_styles(), strict=False):
                _draw(axes, [curve(run, axis) for run in found], UNITS[axis], variant, line, colour)
            axes.set_xlabel(AXES[axis][0])
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
            if axes.get_subplotspec().is_first_col():
                axes.set_ylabel("validation accuracy (%)")
        figure.suptitle(f"{results.name}{': ' if scenario else ''}{scenario}", x=0.01, ha="left", weight="bold")
        handles = figure.axes[0].get_legend_handles_labels()[0]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5))
    return figure


def _draw(
    axes: Axes, curves: Sequence[Sequence[tuple[float, float]]], unit: float, label: str, line: str, colour: str
) -> None:
    """The mean over seeds at each evaluated round, and between their lowest and highest."""
    xs = [statistics.mean(x for x, _ in points) / unit for points in zip(*curves, strict=False)]
    ys = [[100 * y for _, y in points] for points in zip(*curves, strict=False)]
    axes.plot(xs, [statistics.mean(y) for y in ys], line, color=colour, linewidth=1.8, label=label)
    if len(curves) > 1:
        axes.fill_between(xs, [min(y) for y in ys], [max(y) for y in ys], color=colour, alpha=0.15, linewidth=0)


def budgets_picture(results: Results) -> Figure | None:
    """Final accuracy over the clients' mean budget, one curve for each variant; None without several scenarios."""
    if len(results.runs) < 2:
        return None
    key = "validation" if results.settings["validation_only"] else "test"
    points: dict[str, list[tuple[float, float, float]]] = {}
    for scenario, variants in results.runs.items():
        for variant, seeds in all_figures(results, scenario).items():
            values = [100 * value for f in seeds.values() if (value := f[key]) is not None]
            if values:
                share = next(iter(variants[variant].values())).summary["mean_budget"]  # type: ignore[index]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                points.setdefault(variant, []).append((100 * share, statistics.mean(values), spread))
    if not points:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        axes = figure.subplots()
        with_grid(axes, "both")
        for (variant, found), (line, colour) in zip(points.items(), line_styles(), strict=False):
            xs, ys, spreads = zip(*sorted(found), strict=True)
            look: dict[str, Any] = {"capsize": 3, "elinewidth": 1, "linewidth": 1.8, "markersize": 4}
            axes.errorbar(xs, ys, spreads, fmt=f"o{line}", color=colour, label=variant, **look)
        axes.set(xlabel="clients' mean budget (% of full training)", ylabel=f"{key} accuracy (%)")
        axes.set_xlim(0, 103)
        axes.set_ylim(bottom=0)
        axes.set_title(f"{results.name}: accuracy over client budget")
        figure.legend(loc="outside lower center", ncols=min(len(points), 4))
    return figure
