"""Tables and pictures of a comparison, made from its folders alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from scalefl.report import Run, measured, read_run
from scalefl.report.page import Page, Picture, Section, write_page
from scalefl.report.pictures import ACCURACY, STYLE, looks, save, with_grid, with_key
from scalefl.report.tables import NOTHING, Numbers, Table, to_markdown
from scalefl.run_folder import RunFolder, read_json
from scalefl.units import MIB, digits, rounded_up

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
        run_once: variant -> the one scenario in which it ran, for those whose runs stand in all of them.
    """

    name: str
    path: Path
    settings: Mapping[str, Any]
    runs: Mapping[str, Mapping[str, Mapping[int, Run]]]
    run_once: Mapping[str, str] = field(default_factory=dict)

    def run_in(self, scenario: str) -> dict[str, Mapping[int, Run]]:
        """The variants that ran in a scenario, without those whose runs come from another."""
        return {v: found for v, found in self.runs[scenario].items() if self.run_once.get(v, scenario) == scenario}

    @property
    def num_runs(self) -> int:
        """Runs of the comparison, finished or not."""
        return len(self.settings["seeds"]) * sum(len(self.run_in(scenario)) for scenario in self.runs)

    @property
    def num_missing(self) -> int:
        """Runs that are not finished."""
        return self.num_runs - sum(len(found) for scenario in self.runs for found in self.run_in(scenario).values())


def read_results(folder: Path) -> Results:
    """The results in the folder of a comparison.

    Raises:
        CheckpointError: there is none, or one of its runs is damaged.
    """
    head = read_json(RunFolder(folder).comparison)
    run_once = head.get("run_once", {})  # earlier versions wrote none
    runs: dict[str, dict[str, dict[int, Run]]] = {}
    for scenario in head["scenarios"]:
        for variant in head["variants"]:
            home = folder / run_once.get(variant, scenario)
            folders = {seed: home / f"{variant}-{seed}" for seed in head["settings"]["seeds"]}
            done = {seed: read_run(at) for seed, at in folders.items() if RunFolder(at).summary.exists()}
            runs.setdefault(scenario, {})[variant] = done
    return Results(head["name"], folder, head["settings"], runs, run_once)


# Figures


def figures(run: Run, target: float | None, equal_flops: float) -> dict[str, float | None]:
    """What a finished run came to.

    Args:
        run: of a comparison.
        target: the validation accuracy up to which seconds are counted.
        equal_flops: of all clients, at which validation accuracy is read.
    """
    summary = run.summary or {}
    return {
        "test": measured(summary["test"], "accuracy"),
        "low_memory": measured(summary.get("low_memory_test"), "accuracy"),
        "p10": measured(summary.get("client_test"), "accuracy_p10"),
        "validation": measured(summary["validation"], "accuracy"),
        "epsilon": summary.get("privacy", {}).get("epsilon"),
        "at_equal_flops": max(
            (y for x, y in curve(run, "flops") if x <= equal_flops and "flops" in summary), default=None
        ),
        "clients": summary.get("num_clients_seen"),
        "lost": summary.get("num_clients_lost"),
        "predicted_peak_bytes": summary["predicted_peak_bytes"],
        "measured_peak_bytes": summary.get("measured_peak_bytes"),
        "flops": summary.get("flops"),
        "bytes_down": summary.get("bytes_down"),
        "bytes_up": summary.get("bytes_up"),
        "seconds": summary.get("seconds"),
        "simulated_seconds": summary.get("simulated_seconds"),
        "seconds_to_target": _spent_until(run, target, "simulated_seconds"),
        "here_to_target": _spent_until(run, target, "seconds"),
    }


AXES: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], float]]] = {
    "rounds": ("round", lambda line: 1.0),
    "flops": ("FLOPs of all clients (tera)", lambda line: float(line.get("flops", math.nan))),
    "bytes": ("bytes moved (MiB)", lambda line: float(line.get("bytes_down", math.nan) + line.get("bytes_up", 0))),
    "seconds": ("simulated seconds on the devices", lambda line: float(line.get("simulated_seconds", math.nan))),
}
"""What accuracy is drawn over: its name, and what each round adds to it; not known of private runs, but for rounds."""
UNITS = {"rounds": 1.0, "flops": 1e12, "bytes": float(MIB), "seconds": 1.0}


def curve(run: Run, axis: str) -> list[tuple[float, float]]:
    """Validation accuracy over one of `AXES`, at each round that was evaluated."""
    return _over(run, AXES[axis][1])


def _over(run: Run, added: Callable[[Mapping[str, Any]], float]) -> list[tuple[float, float]]:
    spent = accumulate(added(line) if line["round"] else 0.0 for line in run.journal)
    found = [measured(line.get("validation"), "accuracy") for line in run.journal]
    return [(x, accuracy) for x, accuracy in zip(spent, found, strict=True) if accuracy is not None]


def _spent_until(run: Run, target: float | None, what: str) -> float | None:
    points = _over(run, lambda line: float(line.get(what, math.nan)))
    reached = next((x for x, y in points if target is not None and y >= target), None)
    return None if reached is None else _known(reached)


def target_of(results: Results, scenario: str) -> float | None:
    """The accuracy that counts as reached: as set, or the highest that every run of a scenario comes to."""
    chosen = results.settings["target_accuracy"]
    curves = [curve(run, "rounds") for found in results.runs[scenario].values() for run in found.values()]
    best = [max(y for _, y in points) for points in curves if points]
    return float(chosen) if chosen is not None else min(best, default=None)


def title(results: Results, scenario: str) -> str:
    """What a scenario of the comparison is called in tables and pictures."""
    return f"{results.name}: {scenario}" if scenario else results.name


def all_figures(results: Results, scenario: str) -> dict[str, dict[int, dict[str, float | None]]]:
    """The figures of each variant, by seed."""
    runs = results.runs[scenario]
    target = target_of(results, scenario)
    done = [run.summary for found in runs.values() for run in found.values() if run.summary]
    flops = [summary["flops"] for summary in done if "flops" in summary]
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
    "epsilon": ("ε", 1.0),
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
    "seconds_to_target": ("to target,\ndevices s", 1.0),
    "here_to_target": ("to target,\nhere s", 1.0),
}
"""The heading of each figure, and its unit."""
SPREAD = ("test", "low_memory", "p10", "validation", "at_equal_flops")
GAINS = (*SPREAD, "epsilon", "clients", "lost")


def tables(results: Results, scenario: str) -> list[Table]:
    """The variants of a scenario side by side, means over seeds: what they reach, and what it costs."""
    found = all_figures(results, scenario)
    notes = [
        "Means over seeds ± standard deviation. Low-mem.: on test rows drawn by the label distribution of the clients "
        "that cannot hold full training. 10th pct.: a tenth of the clients do worse, on test data with their labels' "
        "shares. Equal FLOPs: the best validation accuracy before the clients have spent what the cheapest run spent."
    ]
    for home in dict.fromkeys(results.run_once.values()):
        names = ", ".join(variant for variant, where in results.run_once.items() if where == home)
        notes.append(f"Run in {home} alone, and the same in each scenario: {names}.")
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
        _table(f"{title(results, scenario)}: accuracy", found, [key for key in COLUMNS if key in GAINS], notes),
        _table(f"{title(results, scenario)}: cost", found, [key for key in COLUMNS if key not in GAINS], costs),
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
    return rounded_up(mean) if key == "epsilon" else digits(mean)


def write(results: Results, out: Path) -> list[Path]:
    """Write a comparison into a folder: its tables (Markdown and CSV), its pictures, and a page that has it all.

    Raises:
        OSError: the folder can't be made or written to.
    """
    out.mkdir(parents=True, exist_ok=True)
    found = [to_markdown(table) for scenario in results.runs for table in tables(results, scenario)]
    (out / "comparison.md").write_text("\n".join(found))
    (out / "comparison.csv").write_text(runs_numbers(results).to_csv())
    written = [out / "comparison.md", out / "comparison.csv"]
    for scenario in results.runs:
        figure = curves_picture(mean_curves(results, scenario), title(results, scenario))
        if figure is not None:
            written.append(save(figure, out / f"accuracy{'-' if scenario else ''}{scenario}.png"))
    figure = budgets_picture(results)
    if figure is not None:
        written.append(save(figure, out / "budgets.png"))
    return [*written, write_page(_page(results), out)]


def _page(results: Results) -> Page:
    variants = [*next(iter(results.runs.values()))]
    seeds = results.settings["seeds"]
    missing = f", {results.num_missing} missing" if results.num_missing else ""
    facts = {
        "variants": ", ".join(variants),
        "scenarios": ", ".join(results.runs),
        "seeds": ", ".join(map(str, seeds)),
        "runs": f"{results.num_runs - results.num_missing} of {results.num_runs} finished{missing}",
    }
    sections = [
        Section(scenario or "Variants", tables(results, scenario), _curves_on_page(results, scenario))
        for scenario in results.runs
    ]
    figure = budgets_picture(results)
    if figure is not None:
        numbers = budgets_numbers(results)
        sections.insert(0, Section("Over budgets", pictures=[Picture(numbers.title, [figure], numbers)]))
    runs = runs_numbers(results)
    if runs.rows:
        sections.append(Section("Each run", numbers=[runs]))
    return Page(results.name, [(term, text) for term, text in facts.items() if text], sections)


def _curves_on_page(results: Results, scenario: str) -> list[Picture]:
    """The curves, each axis in a plot of its own, which a narrow page shows one below another."""
    whole = mean_curves(results, scenario)
    curves = {variant: _thinned(points) for variant, points in whole.items()}
    panels = [figure for axis in AXES if (figure := curves_picture(curves, "", [axis])) is not None]
    caption = f"{title(results, scenario)}: validation accuracy, means over seeds and their range"
    numbers = curves_numbers(curves, caption)
    if curves != whole:
        note = f"Here, and in the picture, are {MOST_ON_PAGE} of the evaluated rounds; the PNG beside the page has all."
        numbers = replace(numbers, notes=(*numbers.notes, note))
    return [Picture(caption, panels, numbers)] if panels else []


def _thinned(points: Sequence[Point]) -> list[Point]:
    """No more points than a page is to hold, spread evenly; the first and the last are among them."""
    step = max(1.0, (len(points) - 1) / (MOST_ON_PAGE - 1))
    return [points[round(number * step)] for number in range(min(len(points), MOST_ON_PAGE))]


def runs_numbers(results: Results) -> Numbers:
    """The figures of each finished run."""
    rows = [
        {"scenario": scenario, "variant": variant, "seed": seed, **found}
        for scenario in results.runs
        for variant, seeds in all_figures(results, scenario).items()
        for seed, found in seeds.items()
    ]
    header = tuple(rows[0]) if rows else ("scenario", "variant", "seed")
    cells = tuple(tuple(row.values()) for row in rows)
    return Numbers("The figures of each run", header, cells, texts=frozenset({"variant"}))


# Pictures

FEW_MARKS = 8
"""Markers that tell a curve among others."""
MOST_ON_PAGE = 60
"""Points of a curve that a page holds, in its picture and in the numbers behind it."""


@dataclass(frozen=True)
class Point:
    """Validation accuracy of a variant after a round, over its seeds, in %.

    Args:
        spent: what the runs have spent by then, on each of `AXES` in its unit: means over seeds.
        mean, lowest, highest: the accuracy.
    """

    spent: Mapping[str, float]
    mean: float
    lowest: float
    highest: float


def mean_curves(results: Results, scenario: str) -> dict[str, list[Point]]:
    """The curve of each variant of a scenario that was evaluated, at the rounds that all its seeds have in common."""
    curves = {variant: _mean_curve(list(found.values())) for variant, found in results.runs[scenario].items() if found}
    return {variant: points for variant, points in curves.items() if points}


def _mean_curve(runs: Sequence[Run]) -> list[Point]:
    seeds = [_by_round(run) for run in runs]
    shared = [number for number in seeds[0] if all(number in found for found in seeds)]
    points = []
    for number in shared:
        spent, accuracies = zip(*(found[number] for found in seeds), strict=True)
        means = {axis: statistics.mean(one[axis] for one in spent) for axis in AXES}
        points.append(Point(means, statistics.mean(accuracies), min(accuracies), max(accuracies)))
    return points


def _by_round(run: Run) -> dict[float, tuple[dict[str, float], float]]:
    """What a run has spent, and its accuracy in %, at each round that was evaluated."""
    curves = [[(x / UNITS[axis], y) for x, y in curve(run, axis)] for axis in AXES]
    rounds = (dict(zip(AXES, points, strict=True)) for points in zip(*curves, strict=True))
    return {
        points["rounds"][0]: ({axis: x for axis, (x, _) in points.items()}, 100 * points["rounds"][1])
        for points in rounds
    }


def curves_picture(
    curves: Mapping[str, Sequence[Point]], title: str, over: Sequence[str] = tuple(AXES)
) -> Figure | None:
    """Validation accuracy over each of some `AXES`: means over seeds, with the seeds' range; None without curves."""
    over = [axis for axis in over if any(math.isfinite(points[-1].spent[axis]) for points in curves.values())]
    if not over:
        return None
    columns = min(len(over), 2)
    rows = math.ceil(len(over) / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5 * columns, 3.7 * rows), layout="constrained")
        for axes, axis in zip(figure.subplots(rows, columns, sharey=True, squeeze=False).flat, over, strict=True):
            lines = _draw_curves(axes, curves, axis)
            if axes.get_subplotspec().is_first_col():
                axes.set_ylabel(ACCURACY)
        figure.suptitle(title, x=0.01, ha="left", weight="bold")
        with_key(figure, lines, 5)
    return figure


def _draw_curves(axes: Axes, curves: Mapping[str, Sequence[Point]], axis: str) -> list[tuple[str, Line2D]]:
    """The mean over seeds at each evaluated round, and between their lowest and highest; returns the lines, named."""
    with_grid(axes, "both")
    lines = []
    for (variant, points), look in zip(curves.items(), looks(), strict=False):
        xs = [point.spent[axis] for point in points]
        every = math.ceil(len(points) / FEW_MARKS)
        (line,) = axes.plot(xs, [point.mean for point in points], markevery=every, **look)
        lines.append((variant, line))
        lowest, highest = [point.lowest for point in points], [point.highest for point in points]
        if lowest != highest:
            axes.fill_between(xs, lowest, highest, color=look["color"], alpha=0.15, linewidth=0)
    axes.set_xlabel(AXES[axis][0])
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    return lines


def curves_numbers(curves: Mapping[str, Sequence[Point]], title: str) -> Numbers:
    """What `curves_picture` is drawn from."""
    spent = ("round", "FLOPs\ntera", "moved\nMiB", "devices\ns")
    return Numbers(
        title,
        ("variant", *spent, "mean\n%", "lowest\n%", "highest\n%"),
        tuple(
            (variant, round(rounds), *map(_known, others), point.mean, point.lowest, point.highest)
            for variant, points in curves.items()
            for point in points
            for rounds, *others in [point.spent.values()]
        ),
        (
            "What all clients have spent by then, and validation accuracy: means over seeds. "
            "Lowest, highest: accuracy of single seeds.",
        ),
    )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


@dataclass(frozen=True)
class BudgetPoint:
    """Final accuracy of a variant in a scenario, over its seeds, in %.

    Args:
        scenario: its name.
        budget: the clients' mean budget, of what full training takes, in %.
        mean, spread: the accuracy, and its standard deviation; 0 where there is one seed.
        num_seeds: that were measured.
    """

    scenario: str
    budget: float
    mean: float
    spread: float
    num_seeds: int


def budget_curves(results: Results) -> dict[str, list[BudgetPoint]]:
    """For each variant its accuracy in each scenario, by budget: on test data, unless these are not to be looked at."""
    key = _final(results)
    curves: dict[str, list[BudgetPoint]] = {}
    for scenario in results.runs:
        for variant, seeds in all_figures(results, scenario).items():
            values = [100 * value for f in seeds.values() if (value := f[key]) is not None]
            share = _mean_budget(results, scenario, variant)
            if values and share is not None:
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                point = BudgetPoint(scenario, 100 * share, statistics.mean(values), spread, len(values))
                curves.setdefault(variant, []).append(point)
    return {variant: sorted(points, key=lambda point: point.budget) for variant, points in curves.items()}


def _mean_budget(results: Results, scenario: str, variant: str) -> float | None:
    """The clients' mean budget of a variant in a scenario; None where no run tells it.

    Runs that come from another scenario had that one's budgets: most of the runs that were done here tell this one's.
    """
    here = results.run_in(scenario)
    tell = [here[variant]] if variant in here else here.values()
    shares = [run.summary["mean_budget"] for found in tell for run in found.values() if run.summary]
    return statistics.mode(shares) if shares else None


def _final(results: Results) -> str:
    return "validation" if results.settings["validation_only"] else "test"


def budgets_numbers(results: Results) -> Numbers:
    """What `budgets_picture` is drawn from."""
    return Numbers(
        f"{results.name}: accuracy over client budget",
        ("variant", "scenario", "seeds", "budget\n% of full", f"{_final(results)}\n%", "st. dev.\n%"),
        tuple(
            (variant, point.scenario, point.num_seeds, point.budget, point.mean, point.spread)
            for variant, points in budget_curves(results).items()
            for point in points
        ),
        ("Accuracy: mean over seeds, and standard deviation. Budget: the clients' mean, of what full training takes.",),
        frozenset({"scenario"}),
    )


def budgets_picture(results: Results) -> Figure | None:
    """Final accuracy over the clients' mean budget, one curve for each variant; None without several scenarios."""
    curves = budget_curves(results)
    if len(results.runs) < 2 or not curves:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        axes = figure.subplots()
        with_grid(axes, "both")
        lines = []
        for (variant, points), look in zip(curves.items(), looks(), strict=False):
            xs, ys = [point.budget for point in points], [point.mean for point in points]
            bars = axes.errorbar(xs, ys, [point.spread for point in points], capsize=3, elinewidth=1, **look)
            lines.append((variant, bars.lines[0]))
        axes.set(xlabel="clients' mean budget (% of full training)", ylabel=f"{_final(results)} accuracy (%)")
        axes.set_ylim(bottom=0)
        axes.set_title(f"{results.name}: accuracy over client budget")
        with_key(figure, lines, 4)
    return figure
