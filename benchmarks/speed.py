"""How fast the local engine is: beside other simulators and bare loops, on the same work.

    python benchmarks/speed.py peers|whole|small|stages|stages-last|formats|at-once|tried|profile|scaling --out DIR

Each command writes its section and CSV files to OUT/speed/, and puts the sections together as OUT/speed.md. This
process imports neither torch nor scalefl: what is measured shares no memory with it. With `--quick` each command takes
seconds, for little: figures mean nothing then, that they can be made is seen. `peers`, `whole` and `small` are left out
then, as they need an environment for each peer; and so is what `tried` compiles.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from speed_peers.family import Peak
from speed_peers.programs import HERE, PROGRAMS, QUIET, Environments, Resident
from speed_peers.works import CHECK, SMALL, WORKS, Work

MIB = 2**20
ORDER = ("peers", "whole", "small", "stages", "stages-last", "formats", "at-once", "tried", "profile", "scaling")

# Beside other simulators.

OURS = "scalefl"
CACHED_EPOCHS = 5
WHOLE, WHOLE_ROUNDS = WORKS[0], 30
"""The work of which whole runs are timed, and for how long: Flower's simulation is no resident."""
CHECK_ROUNDS, CHECK_TOLERANCE = 3, 1e-3


@dataclass(frozen=True)
class Turn:
    """Some rounds of a program, in a pair with the other programs' turns."""

    work: str
    pair: int
    program: str
    rounds: int
    seconds: float
    cpu_seconds: float


@dataclass
class Found:
    """What is known of a program at a work beside its turns; `score` after all of them."""

    ready: list[tuple[float, float]] = field(default_factory=list)
    first_round: list[tuple[float, float]] = field(default_factory=list)
    peak: Peak = field(default_factory=Peak)
    score: dict[str, float] = field(default_factory=dict)


@dataclass
class Measured:
    """Everything that was measured, by work and program."""

    turns: list[Turn] = field(default_factory=list)
    found: dict[tuple[str, str], Found] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def of(self, work: str, program: str) -> Found:
        """What is known of a program at a work."""
        return self.found.setdefault((work, program), Found())

    def seconds(self, work: str, program: str, column: str = "seconds") -> list[float]:
        """Seconds a round, pair by pair."""
        mine = (turn for turn in self.turns if (turn.work, turn.program) == (work, program))
        return [getattr(turn, column) / turn.rounds for turn in mine]

    def ratios(self, work: str, program: str) -> list[float]:
        """How many times as long as ours a program takes, pair by pair."""
        both = zip(self.seconds(work, program), self.seconds(work, OURS), strict=True)
        return [theirs / ours for theirs, ours in both]


@dataclass(frozen=True)
class Bench:
    """Where programs run: their environments, what they read, and where they complain."""

    environments: Environments
    home: Path

    def launch(self, work: Work, name: str) -> Resident:
        """A fresh process at the beginning of a work."""
        return Resident(PROGRAMS[name], self.environments, self.home / work.name, self.home / f"{name}.log")

    def export(self, works: Sequence[Work]) -> None:
        """Write the works down, in a process of its own."""
        command = (sys.executable, str(HERE / "export.py"), str(self.home), *(work.name for work in works))
        subprocess.run(command, check=True, env={**os.environ, **QUIET})


def peers(folder: Path, options: argparse.Namespace) -> None:
    compare(folder, "peers", WORKS, options)


def small(folder: Path, options: argparse.Namespace) -> None:
    compare(folder, "small", SMALL, options)


def whole(folder: Path, options: argparse.Namespace) -> None:
    """Flower's simulation and ScaleFL, from launch to the last weights."""
    names, measured = (OURS, "flower"), Measured()
    with bench_of([WHOLE], names, options) as bench:
        for name in names:
            measured.of(WHOLE.name, name).peak = peak_of(bench, WHOLE, name)
        for pair in range(options.pairs):
            for name in names[:: -1 if pair % 2 else 1]:
                measured.turns.append(take_whole_run(bench, name, pair, measured))
            write_peers(folder, "whole", measured, options)


def compare(folder: Path, name: str, works: Sequence[Work], options: argparse.Namespace) -> None:
    """All programs at some works, side by side."""
    works = [work for work in works if work.name in options.works]
    measured = Measured()
    with bench_of(works, options.programs, options) as bench:
        for work in works:
            names = [name for name in work.programs if name in options.programs]
            take_turns(bench, work, names, options.pairs, measured)
            measure_alone(bench, work, names, options.starts, measured)
            write_peers(folder, name, measured, options)


@contextlib.contextmanager
def bench_of(works: Sequence[Work], names: Sequence[str], options: argparse.Namespace) -> Iterator[Bench]:
    """Where these works lie written down, and where these programs were seen to do the same."""
    with tempfile.TemporaryDirectory(prefix="scalefl-speed-") as home:
        bench = Bench(Environments(options.environments), Path(home))
        bench.export([*works, CHECK])
        check_same_work(bench, names)
        yield bench


def write_peers(folder: Path, name: str, measured: Measured, options: argparse.Namespace) -> None:
    """What is known until now: a run takes long, and may be stopped."""
    head = list(Turn.__annotations__)
    _write_csv(folder / f"{name}.csv", head, [[_rounded(getattr(turn, n)) for n in head] for turn in measured.turns])
    rows = summary(measured)
    _write_csv(
        folder / f"{name}_summary.csv", list(rows[0]), [[_rounded(cell) for cell in row.values()] for row in rows]
    )
    _write_section(folder, name, section(name, rows, measured.versions, options))


def check_same_work(bench: Bench, names: Sequence[str]) -> None:
    """Refuse to compare programs that do not do the same: on `CHECK` they differ by rounding only."""
    losses = {}
    for name in (name for name in CHECK.programs if name in names):
        with bench.launch(CHECK, name) as resident:
            resident.ready()
            resident.run(CHECK_ROUNDS)
            losses[name] = resident.score()["loss"]
    print("loss after the same steps:", losses, flush=True)
    if max(losses.values()) - min(losses.values()) > CHECK_TOLERANCE:
        raise SystemExit(f"the programs do not do the same work: {losses}")


def take_turns(bench: Bench, work: Work, names: Sequence[str], pairs: int, measured: Measured) -> None:
    """Interleaved pairs: each program does some rounds while the others wait; who goes first moves on."""
    with contextlib.ExitStack() as stack:
        residents = {name: stack.enter_context(bench.launch(work, name)) for name in names}
        for resident in residents.values():
            measured.versions |= resident.ready()
        for resident in residents.values():
            resident.run(work.turn)  # warms up
        for pair in range(pairs):
            first = pair % len(names)
            for name in [*names[first:], *names[:first]]:
                measured.turns.append(timed(residents[name], work, pair))
            print(work.name, pair, {n: round(measured.seconds(work.name, n)[-1], 2) for n in names}, flush=True)
        for name, resident in residents.items():
            measured.of(work.name, name).score = resident.score()


def timed(resident: Resident, work: Work, pair: int) -> Turn:
    """A turn by the program's own clock."""
    before = resident.family.cpu_seconds()
    start, end = resident.run(work.turn)
    cpu_seconds = resident.family.cpu_seconds() - before
    return Turn(work.name, pair, resident.program.name, work.turn, end - start, cpu_seconds)


def measure_alone(bench: Bench, work: Work, names: Sequence[str], starts: int, measured: Measured) -> None:
    """What a program takes to start, and what it holds at most, while no other runs that could share its pages."""
    for name in [name for _ in range(starts) for name in names]:
        found = measured.of(work.name, name)
        with bench.launch(work, name) as resident, resident.family.watched():
            resident.ready()
            found.ready.append(since_launch(resident))
            resident.run(1)
            found.first_round.append(since_launch(resident))
    for name in names:
        measured.of(work.name, name).peak = peak_of(bench, work, name)


def since_launch(resident: Resident) -> tuple[float, float]:
    """Seconds, and CPU seconds of all its processes."""
    return time.time() - resident.launched, resident.family.cpu_seconds()


def peak_of(bench: Bench, work: Work, name: str) -> Peak:
    """In a run that is not timed: to ask for memory takes time."""
    with bench.launch(work, name) as resident, resident.family.watched(memory=True) as peak:
        resident.ready()
        resident.run(1 + work.turn)
    return peak


def take_whole_run(bench: Bench, name: str, pair: int, measured: Measured) -> Turn:
    """A run from launch to the last weights; evaluation is not timed."""
    with bench.launch(WHOLE, name) as resident, resident.family.watched():
        measured.versions |= resident.ready()
        _, end = resident.run(WHOLE_ROUNDS)
        seconds, cpu_seconds = end - resident.launched, resident.family.cpu_seconds()
        measured.of(WHOLE.name, name).score = resident.score()
    turn = Turn(WHOLE.name, pair, name, WHOLE_ROUNDS, seconds, cpu_seconds)
    print(turn, flush=True)
    return turn


def summary(measured: Measured) -> list[dict[str, Any]]:
    """A row for each program at each work."""
    rows = []
    for (work, program), found in measured.found.items():
        ratios = measured.ratios(work, program)
        low, high = interval(ratios)
        ready, first_round = (list(zip(*pairs, strict=True)) or [[], []] for pairs in (found.ready, found.first_round))
        rows.append(
            {
                "work": work,
                "program": program,
                "seconds_a_round": statistics.median(measured.seconds(work, program)),
                "cpu_seconds_a_round": statistics.median(measured.seconds(work, program, "cpu_seconds")),
                "ratio": statistics.median(ratios),
                "ratio_low": low,
                "ratio_high": high,
                "ready_seconds": _median(ready[0]),
                "ready_cpu_seconds": _median(ready[1]),
                "first_round_seconds": _median(first_round[0]),
                "first_round_cpu_seconds": _median(first_round[1]),
                "peak_pss_mib": found.peak.pss / MIB,
                "peak_rss_mib": found.peak.rss / MIB,
                "processes": found.peak.processes,
                "accuracy": found.score["accuracy"],
                "loss": found.score["loss"],
            }
        )
    return rows


def interval(values: Sequence[float], draws: int = 10_000) -> tuple[float, float]:
    """A 95 % confidence interval of the median, by the bootstrap."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(draws))
    return medians[round(0.025 * (draws - 1))], medians[round(0.975 * (draws - 1))]


def section(name: str, rows: Sequence[dict[str, Any]], versions: dict[str, str], options: argparse.Namespace) -> str:
    """The section's text."""
    lines = {"peers": _prose, "whole": _prose_of_whole, "small": _prose_of_small}[name](options)
    for work in (*WORKS, *SMALL):
        mine = [row for row in rows if row["work"] == work.name]
        if mine:
            lines += _whole_table(mine) if name == "whole" else _table(work, mine)
    about = ", ".join(f"{name} {number}" for name, number in sorted(versions.items()))
    return "\n".join([*lines, f"{machine()}. {about}."])


def _prose_of_whole(options: argparse.Namespace) -> list[str]:
    return [
        f"## Beside Flower's simulation, {WHOLE_ROUNDS} rounds from launch to the last weights",
        "",
        f"{WHOLE.name} as above: all that a process does before, between and after rounds counts, but no evaluation. "
        "*Flower's simulation*: `flwr.serverapp.strategy.FedAvg`, a ClientApp with the bare loop's training, one node "
        f"for each user, Ray with two actors of one core. {options.pairs} pairs of runs, and who goes first changes.",
        "",
    ]


def _prose_of_small(_options: argparse.Namespace) -> list[str]:
    return [
        "## Beside other simulators, small models",
        "",
        "As above, for a model whose operations take longer to start than to do. *At once*: as many clients share a "
        "run as ScaleFL's own trial finds fastest (`engine.clients_at_once`).",
        "",
    ]


def _prose(options: argparse.Namespace) -> list[str]:
    return [
        "## Beside other simulators",
        "",
        "CIFAR-10 (JPEG), images from -1 to 1; the same first weights, users, cohorts and local SGD (one epoch, no "
        "weight decay) for every program, each on two processes of one thread. Before anything is timed, all "
        f"programs do {CHECK_ROUNDS} rounds of {CHECK.epochs} steps on whole batches, and must find the same loss "
        f"within {CHECK_TOLERANCE:g}. {options.pairs} interleaved pairs, in which every program in turn does some "
        "rounds while the others wait, and who goes first moves on; a turn before does not count. Seconds by the wall "
        "clock, median; how many times as long as ScaleFL: the median over pairs, with a 95 % bootstrap interval. CPU: "
        "of all processes of a program. Start: from the launch until it waits for the first round, and until the end "
        f"of that, alone, median of {options.starts}; ScaleFL with nothing kept from earlier runs, and planning in its "
        "first round. Memory: the most that all processes of a program held at one moment of a run of its own, looked "
        "at every 0.2 s; in PSS what is shared counts once.",
        "",
        "*Bare loops*: `torch.optim.SGD` in two processes, every other user of a cohort each, weights in one vector, "
        "one all-reduce a round, examples as bytes mapped from a file: no framework does less. *Tuned*: with glibc "
        "told to keep what is freed and to ask for huge pages, as ScaleFL tells its workers. *Channels last*: behind "
        'the first convolution; ScaleFL by `work.memory_format = "channels_last"`. *pfl-research*: '
        "`FederatedAveraging` in "
        "a `SimulatedBackend`, users as float32 tensors in memory as in its own benchmarks, weighted by examples and "
        "balanced between processes by them; it does not shuffle, and in its first round it also evaluates each user "
        "before and after. Its processes: torchrun's, two that train, and with each of these one that draws cohorts.",
        "",
        "In F what a user leaves as it is enters the mean as it was, for every program. pfl-research balances by "
        "numbers of examples, which its documentation takes for a user's time; ScaleFL by predicted FLOPs.",
        "",
    ]


def _table(work: Work, rows: Sequence[dict[str, Any]]) -> list[str]:
    return [
        f"### {work.name}: {work.title}",
        "",
        *_markdown(
            {
                "program": "{title}",
                "seconds a round": "{seconds_a_round:.2f}",
                "times ScaleFL's": "{times}",
                "CPU s a round": "{cpu_seconds_a_round:.2f}",
                "CPU s to start": "{ready_cpu_seconds:.1f}",
                "with the first round": "{first_round_cpu_seconds:.1f}",
                **_AT_THE_END,
            },
            map(_told, rows),
        ),
        "",
    ]


_AT_THE_END = {
    "peak PSS, MiB": "{peak_pss_mib:.0f}",
    "sum of RSS, MiB": "{peak_rss_mib:.0f}",
    "processes": "{processes}",
    "test accuracy, %": "{percent:.1f}",
}


def _told(row: dict[str, Any]) -> dict[str, Any]:
    """A row with what tables say of it."""
    return {**row, "title": PROGRAMS[row["program"]].title, "times": _ratio(row), "percent": 100 * row["accuracy"]}


def _whole_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [
        *_markdown(
            {
                "program": "{title}",
                "seconds": "{seconds:.1f}",
                "times ScaleFL's": "{times}",
                "CPU s": "{cpu_seconds:.1f}",
                **_AT_THE_END,
            },
            (
                {
                    **_told(row),
                    "seconds": WHOLE_ROUNDS * row["seconds_a_round"],
                    "cpu_seconds": WHOLE_ROUNDS * row["cpu_seconds_a_round"],
                }
                for row in rows
            ),
        ),
        "",
    ]


def _ratio(row: dict[str, Any]) -> str:
    if row["program"] == OURS:
        return "1"
    return f"{row['ratio']:.3f} ({row['ratio_low']:.3f}-{row['ratio_high']:.3f})"


# Stages beside full training, and memory formats.


def stages(folder: Path, options: argparse.Namespace) -> None:
    prose = (
        "A client's epoch by stage (four blocks, eight batches of 32 CIFAR-shaped images, two for ResNet-18, ResNet-34 "
        "and the ViT, momentum, one thread), of what full training of the same model takes: median of "
        f"{options.repeats} turns, in which stages and full training take turns; CPU time, since the machine may be "
        "busy. *Saving in time*: how much of the predicted saving of "
        "FLOPs is one of seconds, over the stages together. *From cached features*: stages 2 to 4 of blocks alone, an "
        f"epoch of {CACHED_EPOCHS}, making the features included."
    )
    _write_stages(folder, "stages", "A block beside full training", prose, options)


def stages_last(folder: Path, options: argparse.Namespace) -> None:
    prose = (
        "The same for models in which pooling, norms or large linear layers take a part of the time, with "
        '`work.memory_format = "channels_last"` for the blocks and for full training.'
    )
    _write_stages(folder, "stages-last", "A block beside full training, channels last", prose, options)


def _write_stages(folder: Path, name: str, title: str, prose: str, options: argparse.Namespace) -> None:
    rows = _rows_of("speed_blocks.py", name, "--repeats", str(options.repeats), *_quick(options))
    _write_rows(folder / f"{name}.csv", rows)
    full = {row["model"]: row for row in rows if row["stage"] == 0}
    lines = [
        f"## {title}",
        "",
        prose,
        "",
        "| model | full, ms a batch | trained | FLOPs, stages 1 to 4 | time, stages 1 to 4 | saving in time |",
        "|---|---|---|---|---|---|",
    ]
    for model, first in full.items():
        mine = [row for row in rows if row["model"] == model and row["stage"]]
        for variant in dict.fromkeys(row["variant"] for row in mine):
            found = [row for row in mine if row["variant"] == variant]
            flops, time_ = ([row[key] for row in found] for key in ("flops", "time"))
            cells = [model, f"{first['milliseconds_a_batch']:.1f}", variant, _shares(flops), _shares(time_)]
            saved = (len(time_) - sum(time_)) / (len(flops) - sum(flops))
            lines.append(f"| {' | '.join([*cells, f'{100 * saved:.0f} %'])} |")
    _write_section(folder, name, "\n".join([*lines, "", _machine_and_versions(options)]))


def formats(folder: Path, options: argparse.Namespace) -> None:
    rows = _rows_of("speed_blocks.py", "formats", "--repeats", str(options.repeats), *_quick(options))
    _write_rows(folder / "formats.csv", rows)
    lines = [
        "## Channels last",
        "",
        'Full training, batches of 32, one thread: `work.memory_format = "channels_last"` beside the usual format. '
        f"CPU time, median of {options.repeats} turns with the quartiles. Bits differ, the mathematics does not.",
        "",
        "| model | contiguous, ms a batch | channels last, of that |",
        "|---|---|---|",
    ]
    for first, last in zip(rows[::2], rows[1::2], strict=True):
        share = f"{last['time']:.2f} ({last['time_low']:.2f}-{last['time_high']:.2f})"
        lines.append(f"| {first['model']} | {first['milliseconds_a_batch']:.1f} | {share} |")
    _write_section(folder, "formats", "\n".join([*lines, "", _machine_and_versions(options)]))


def at_once(folder: Path, options: argparse.Namespace) -> None:
    rows = _rows_of("speed_at_once.py", "--repeats", str(options.repeats), *_quick(options))
    _write_rows(folder / "at-once.csv", rows)
    lines = [
        "## Clients at once",
        "",
        "Clients with equal tasks in one vectorised run (`engine.clients_at_once`), of the CPU time that they take one "
        "after another: 50 examples each, batches of 10, one thread, median of "
        f"{options.repeats} turns with the quartiles. *ScaleFL*: the first of four blocks, with its mentor. Bits "
        "differ, the mathematics does not.",
        "",
        "| model | method | alone, ms a client | 4 at once, of that | 16 at once |",
        "|---|---|---|---|---|",
    ]
    for few, many in zip(rows[::2], rows[1::2], strict=True):
        shares = (f"{row['time']:.2f} ({row['time_low']:.2f}-{row['time_high']:.2f})" for row in (few, many))
        cells = [few["model"], few["method"], f"{few['milliseconds_a_client']:.1f}", *shares]
        lines.append(f"| {' | '.join(cells)} |")
    _write_section(folder, "at-once", "\n".join([*lines, "", _machine_and_versions(options)]))


def tried(folder: Path, options: argparse.Namespace) -> None:
    rows = _rows_of("speed_tried.py", "--repeats", str(options.repeats), *_quick(options))
    _write_rows(folder / "tried.csv", rows)
    lines = [
        "## What else was tried",
        "",
        "Other ways to take the same SGD steps, in plain PyTorch, of the CPU time of plain ones (`torch.optim.SGD` "
        "with momentum, client after client): the models of A and B, one thread, freed memory kept; median of "
        f"{options.repeats} turns with the quartiles. The first four clients with `torch.compile`: CPU seconds "
        "of their process, beside which compilers run.",
        "",
        "| model | way | time, of plain steps | first clients, CPU s |",
        "|---|---|---|---|",
    ]
    for row in rows:
        share = f"{row['time']:.2f} ({row['time_low']:.2f}-{row['time_high']:.2f})"
        first = f"{row['first_seconds']:.0f}" if row["first_seconds"] else ""
        lines.append(f"| {row['model']} | {row['way']} | {share} | {first} |")
    _write_section(folder, "tried", "\n".join([*lines, "", _machine_and_versions(options)]))


def profile(folder: Path, options: argparse.Namespace) -> None:
    rows = _rows_of("speed_profile.py", *_quick(options))
    _write_rows(folder / "profile.csv", rows)
    jobs = list(dict.fromkeys(row["job"] for row in rows))
    shares = {(row["job"], row["kind"]): f"{100 * row['share']:.1f}" for row in rows}
    lines = [
        "## Where the time goes",
        "",
        "Rounds in one process, on one thread, by torch's profiler: shares of the process's CPU time, per cent, each "
        "operation's own. *The demo*: `examples/demo.toml`, ScaleFL with its mentor, without evaluations. *Small "
        "clients*: the model and the clients of A. What is called Python has the profiler's own work in it, which "
        "makes it larger than it is.",
        "",
        f"| what | {' | '.join(jobs)} |",
        f"|---|{'---|' * len(jobs)}",
    ]
    kinds = dict.fromkeys(row["kind"] for row in rows)
    lines += [f"| {kind} | {' | '.join(shares.get((job, kind), '') for job in jobs)} |" for kind in kinds]
    _write_section(folder, "profile", "\n".join([*lines, "", _machine_and_versions(options)]))


def _shares(values: Sequence[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)


# What a round costs as work grows.


def scaling(folder: Path, options: argparse.Namespace) -> None:
    rows = _rows_of("speed_scaling.py", *_quick(options))
    _write_rows(folder / "scaling.csv", rows)
    lines = [
        "## As work grows",
        "",
        "Seconds of a round and the most that its process held, one thread, in a process of its own for each point, "
        "clients of 32 images. Cohort and population: ResNet-10 of 8 channels, FedAvg; of a population 50 clients take "
        "part. Model: ResNet-18 by its width, 4 clients. Blocks: ResNet-34 of 16 channels, ScaleFL, 4 clients, mean "
        "over one turn of all blocks. Linear in the work: seconds for a GFLOP stay; flat in the population.",
        "",
        "| | | parameters | s a round | GFLOP | s for a GFLOP | peak, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["what"], f"{row['value']:,}".removesuffix(".0"), f"{row['parameters']:,}", f"{row['seconds']:.2f}"]
        cells += [f"{row['gflop']:.0f}", f"{row['seconds'] / row['gflop']:.4f}", f"{row['peak_mib']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "![Seconds and memory as work grows](scaling.png)"]
    _draw_scaling(folder / "scaling.png", rows)
    _write_section(folder, "scaling", "\n".join([*lines, "", _machine_and_versions(options)]))


def _draw_scaling(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure  # only where it is drawn: what is measured is measured elsewhere

    titles = {
        "clients a round": "clients a round",
        "population": "population",
        "model": "parameters",
        "blocks": "blocks",
    }
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    axes = figure.subplots(2, len(titles), sharex="col")
    for column, (what, title) in enumerate(titles.items()):
        mine = [row for row in rows if row["what"] == what]
        across = [row["parameters" if what == "model" else "value"] for row in mine]
        for line, (key, label) in enumerate((("seconds", "s a round"), ("peak_mib", "peak, MiB"))):
            ax = axes[line][column]
            ax.plot(across, [row[key] for row in mine], marker="o", color="#1f6feb")
            ax.set_xscale("log")
            ax.grid(alpha=0.3)
            if key == "seconds" and what in ("clients a round", "model"):
                ax.set_yscale("log")
            else:  # from 0: what is flat shall look so
                ax.set_ylim(0, 1.15 * max(row[key] for row in mine))
            if column == 0:
                ax.set_ylabel(label)
            if line == 1:
                ax.set_xlabel(title)
    figure.savefig(path, dpi=110)


# All sections.


def _markdown(columns: dict[str, str], rows: Iterable[dict[str, Any]]) -> list[str]:
    """A table's lines; `columns` says under which title which of a row's values stands, and how."""
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return [*lines, *(f"| {' | '.join(how.format(**row) for how in columns.values())} |" for row in rows)]


def _rows_of(program: str, *arguments: str) -> list[dict[str, Any]]:
    """The JSON lines of a program, as they come."""
    command = [sys.executable, str(HERE.parent / program), *arguments]
    rows = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **QUIET}) as process:
        for line in process.stdout or ():
            print(line.rstrip(), flush=True)
            rows.append(json.loads(line))
    if process.returncode:
        raise SystemExit(f"{program} failed")
    return rows


def _quick(options: argparse.Namespace) -> list[str]:
    return ["--quick"] if options.quick else []


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    _write_csv(path, list(rows[0]), [[_rounded(cell) for cell in row.values()] for row in rows])


def _machine_and_versions(options: argparse.Namespace) -> str:
    note = "**Quick form: figures mean nothing.** " if options.quick else ""
    return f"{note}{machine()}. torch {version('torch')}, scalefl {version('scalefl')}."


def machine() -> str:
    """What this ran on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    vectors = next((name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), "no AVX2")
    return f"{model} ({vectors}), {os.cpu_count()} cores, {platform.platform()}, Python {platform.python_version()}"


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _rounded(cell: Any) -> Any:
    return round(cell, 4) if isinstance(cell, float) else cell


def _write_csv(path: Path, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([head, *rows])


def _write_section(folder: Path, name: str, text: str) -> None:
    (folder / f"{name}.md").write_text(f"{text}\n")
    sections = [(folder / f"{part}.md").read_text() for part in ORDER if (folder / f"{part}.md").exists()]
    head = "# Speed: measured\n\nWritten by `make bench-speed`; figures behind it in [speed/](speed).\n"
    whole = "\n".join([head, *sections])
    for picture in folder.glob("*.png"):  # sections lie beside their pictures, the whole above them
        whole = whole.replace(f"({picture.name})", f"({folder.name}/{picture.name})")
    (folder.parent / "speed.md").write_text(whole)


COMMANDS: dict[str, Callable[[Path, argparse.Namespace], None]] = {
    "peers": peers,
    "whole": whole,
    "small": small,
    "stages": stages,
    "stages-last": stages_last,
    "formats": formats,
    "at-once": at_once,
    "tried": tried,
    "profile": profile,
    "scaling": scaling,
}


BESIDE_PEERS = ("peers", "whole", "small")


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=[name for name in ORDER if name in COMMANDS])
    parser.add_argument("--out", type=Path, required=True)
    names = [work.name for work in (*WORKS, *SMALL)]
    parser.add_argument("--works", nargs="+", choices=names, default=names, help="for peers")
    parser.add_argument(
        "--programs", nargs="+", choices=list(PROGRAMS), default=list(PROGRAMS), help="for peers; and ours"
    )
    parser.add_argument("--pairs", type=_at_least_one, default=10, help="of turns, for peers; of runs, for whole")
    parser.add_argument("--repeats", type=_at_least_one, default=9, help="of each step, for stages and formats")
    parser.add_argument("--starts", type=_at_least_one, default=3, help="of each program alone, for peers")
    parser.add_argument(
        "--environments", type=Path, default=Path("~/.cache/scalefl-speed").expanduser(), help="of peers, kept here"
    )
    parser.add_argument("--quick", action="store_true", help="in seconds, for little: figures mean nothing")
    options = parser.parse_args()
    if options.quick and options.what in BESIDE_PEERS:
        print(f"{options.what}: left out in quick form, as it needs an environment of its own for each peer (2.5 GB)")
        return
    if options.quick:
        options.repeats = 2
    options.programs = [*{*options.programs, OURS}]
    folder = options.out / "speed"
    folder.mkdir(parents=True, exist_ok=True)
    COMMANDS[options.what](folder, options)


if __name__ == "__main__":
    main()
