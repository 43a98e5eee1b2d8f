"""Clients behind Flower: what a round costs on real processes, what crosses, what a server holds, what halving costs.

    python benchmarks/flower.py rounds|bytes|scale|precision --out docs/benchmarks [--quick]

Each command writes its section and a CSV file to OUT/flower/, and puts the sections together as OUT/flower.md.
`precision` reads what `scalefl compare benchmarks/precision.toml` has written to OUT/precision/. With `--quick` each
takes seconds, for little: figures mean nothing then, that they can be made is seen.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from scalefl.bookkeeping import environment as versions
from scalefl.client import Residents
from scalefl.config import make_config, to_plain
from scalefl.data import Dataset, Source, load
from scalefl.deployment.layout import CONNECTION, Deployment
from scalefl.deployment.programs import ask, descendants, end, environment, free_port
from scalefl.deployment.server import connected, register, write_connection
from scalefl.deployment.setup import set_up
from scalefl.deployment.submit import run_status
from scalefl.engines.flower.grid import in_process
from scalefl.engines.local import LocalEngine
from scalefl.evaluate import evaluate
from scalefl.experiment import Experiment
from scalefl.loop import federate
from scalefl.methods.common import initial_params
from scalefl.models.spec import ModelSpec
from scalefl.params import num_bytes, without_attachments
from scalefl.problem import Batch, Classification, Column, take
from scalefl.record import RoundRecord
from scalefl.run_folder import RunFolder, read_json
from scalefl.sampling import UniformSampler
from scalefl.types import LocalWork
from scalefl.units import MIB

ORDER = ("rounds", "bytes", "scale", "precision")
APPS = Path(__file__).parent / "flower_apps"

# What a round costs on real processes.

NODES, SHARES, WIDTH = 2, 4, 0.5
WORK = LocalWork(batch_size=16, lr=0.02)
PATIENCE_SECONDS = 900.0


def quiet(line: str) -> None:
    """Commands are not shown."""


@dataclass(frozen=True)
class Mark:
    """The end of a round, and the CPU seconds that all processes had taken by then."""

    at: float
    cpu_seconds: float


@dataclass
class Area:
    """A server and its nodes on this machine, and their processes."""

    deployment: Deployment
    rows: list[Path]
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, *command: str, home: Path) -> None:
        with (home / "started.log").open("ab") as log:
            where = environment(home)
            del where["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"]  # what `scalefl deploy` starts sets it by itself
            self.processes.append(subprocess.Popen(command, env=where, stdout=log, stderr=log))

    def submit(self, app: str, name: str, settings: dict[str, Any]) -> str:
        chosen = self.deployment.path / f"{name}.toml"
        chosen.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
        arguments = (str(APPS / app), CONNECTION, "--run-config", str(chosen), "--format", "json")
        said = ask(quiet, "flwr", "run", *arguments, home=self.deployment.flower)
        return str(json.loads(said[said.index("{") :])["run-id"])

    def watch(self, path: Path, count: int) -> list[Mark]:
        """When each line of a file that grows was written; the last of so many ends the wait."""
        marks: list[Mark] = []
        give_up = time.monotonic() + PATIENCE_SECONDS
        while len(marks) < count:
            if time.monotonic() > give_up:
                raise SystemExit(f"{path} has {len(marks)} of {count} lines; logs are in {self.deployment.path}")
            lines = path.read_bytes().count(b"\n") if path.exists() else 0
            if lines > len(marks):
                marks += [Mark(time.time(), self.cpu_seconds())] * (lines - len(marks))
            time.sleep(0.02)
        return marks

    def finish(self, run: str) -> None:
        status = wait_until(lambda: (found := run_status(self.deployment, run))["status"].startswith("fin") and found)
        if status["status"] != "finished:completed":
            raise SystemExit(f"run {run}: {status}; logs are in {self.deployment.path}")

    def cpu_seconds(self) -> float:
        """Of all processes that live, and of those that they have waited for."""
        ticks = 0
        for root in [process.pid for process in self.processes]:
            for pid in (root, *descendants(root)):
                with contextlib.suppress(OSError):
                    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                    ticks += sum(map(int, fields[11:15]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def wait_for_nodes(self) -> None:
        wait_until(lambda: self._online() == NODES)

    def _online(self) -> int:
        with contextlib.suppress(KeyError):  # flwr may say that it failed, and exit with status 0
            return [node["status"] for node in connected(self.deployment, quiet)].count("online")
        return 0

    def stop(self) -> None:
        for process in self.processes[::-1]:
            end([process.pid, *descendants(process.pid)])
            process.wait()


def wait_until(holds: Callable[[], Any], seconds: float = 120.0) -> Any:
    give_up = time.monotonic() + seconds
    while not (found := holds()):
        if time.monotonic() > give_up:
            raise SystemExit("it takes too long")
        time.sleep(0.5)
    return found


@dataclass(frozen=True)
class Task:
    """What both ways learn: the same model from the same weights, on the same rows."""

    folder: Path

    @cached_property
    def data(self) -> Dataset:
        found = load(Source(name="mnist5k"))
        assert isinstance(found, Dataset)
        return found

    @cached_property
    def model(self) -> ModelSpec:
        return ModelSpec.of("scalefl.models.cnn:cnn", in_channels=1, image_size=28, num_classes=10, width=WIDTH)

    def write(self) -> list[Path]:
        """The first weights; and each node's rows, ready to be trained on, as `--share` gives them to our nodes."""
        torch.save(initial_params(self.model, 0), self.folder / "start.pt")
        paths = []
        for node in range(NODES):
            rows = take(self.data.train, torch.arange(node, len(self.data.train["label"]), SHARES))
            (x,), _ = self.data.problem.inputs(rows)
            paths.append(self.folder / f"rows-{node}.pt")
            torch.save((x, rows["label"]), paths[-1])
        return paths

    def accuracy(self, weights: Path) -> float:
        found = evaluate(Residents(), self.model, torch.load(weights), self.data.problem, self.data.test)
        return found["accuracy"]


def start_ours(area: Area) -> None:
    scalefl = (sys.executable, "-m", "scalefl.cli", "deploy")
    area.start(*scalefl, "server", "--dir", str(area.deployment.path), home=area.deployment.flower)
    names = area.deployment.registered
    wait_until(lambda: names.exists() and len(read_json(names)) == NODES)
    for i in range(NODES):
        folder = area.deployment.node(f"node-{i}")
        folder.flower.mkdir(exist_ok=True)
        options = ("--budget", "1GiB", "--data", "mnist5k", "--share", f"{i}/{SHARES}")
        area.start(*scalefl, "node", "--dir", str(folder.path), *options, home=folder.flower)


def start_plain(area: Area) -> None:
    """Flower's programs as its documentation has one start them, with our certificates and keys."""
    here, program = area.deployment, str(Path(sys.executable).parent / "flower-")
    port = here.settings().port
    write_connection(here)
    area.start(
        f"{program}superlink",
        *("--ssl-ca-certfile", str(here.authority)),
        *("--ssl-certfile", str(here.certificate)),
        *("--ssl-keyfile", str(here.certificate_key)),
        *("--enable-supernode-auth", "--host", "127.0.0.1", "--port", str(port), "--database", str(here.database)),
        home=here.flower,
    )
    wait_until(lambda: _registers(here))
    for i, rows in enumerate(area.rows):
        folder = here.node(f"node-{i}")
        folder.flower.mkdir(exist_ok=True)
        area.start(
            f"{program}supernode",
            *("--superlink", f"127.0.0.1:{port}", "--root-certificates", str(folder.authority)),
            *("--auth-supernode-private-key", str(folder.key), "--port", str(free_port())),
            *("--node-config", f'rows="{rows}"'),
            home=folder.flower,
        )


def _registers(deployment: Deployment) -> bool:
    with contextlib.suppress(Exception):  # until it listens
        register(deployment, quiet)
        return True
    return False


@dataclass(frozen=True)
class Timed:
    """A run: the ends of its rounds, what the slowest client of each trained, and where the rest went, if known."""

    marks: list[Mark]
    seconds: list[float]
    accuracy: float
    parts: list[tuple[float, float, float]]


def run_ours(area: Area, task: Task, name: str, rounds: int) -> Timed:
    config = make_config(
        {
            "name": name,
            "model": "cnn",
            "model_arguments": {"width": WIDTH},
            "rounds": rounds,
            "clients_per_round": NODES,
            "data": {"source": {"name": "mnist5k"}},
            "devices": {"classes": "mixed"},
            "method": {"name": "fedavg"},
            "work": {"batch_size": WORK.batch_size, "lr": WORK.lr},
            "engine": {"name": "flower", "patience": {"min_clients": NODES}},
            "evaluation": {"every": rounds},
        }
    )
    files = RunFolder(area.deployment.runs / name)
    settings = {"config": json.dumps(to_plain(config)), "folder": str(files.path), "resume": False}
    run = area.submit("timed", name, settings)
    marks = area.watch(files.journal, rounds + 1)
    area.finish(run)
    notes = [json.loads(line) for line in files.path.with_suffix(".messages").read_text().splitlines()]
    seconds, parts = [], []
    for number in range(1, rounds + 1):
        sent, came = ([n for n in notes if n["round"] == number and n["what"] == w] for w in ("sent", "came"))
        seconds.append(max(n["seconds"] for n in came))
        first, last = min(n["at"] for n in sent), max(n["at"] for n in came)
        parts.append((first - marks[number - 1].at, last - first - seconds[-1], marks[number].at - last))
    return Timed(marks, seconds, read_json(files.summary)["test"]["accuracy"], parts)


def run_plain(area: Area, task: Task, name: str, rounds: int) -> Timed:
    folder = area.deployment.runs / name
    folder.mkdir()
    (folder / "start.pt").symlink_to(task.folder / "start.pt")
    work = {"lr": WORK.lr, "momentum": WORK.momentum, "weight-decay": WORK.weight_decay, "batch-size": WORK.batch_size}
    run = area.submit("plain", name, {"folder": str(folder), "rounds": rounds, "width": WIDTH, **work})
    marks = area.watch(folder / "rounds.jsonl", rounds + 1)
    area.finish(run)
    seconds = list(json.loads((folder / "seconds.json").read_text()).values())
    return Timed(marks, seconds, task.accuracy(folder / "end.pt"), [])


WAYS = {"ScaleFL": (start_ours, run_ours), "Flower's FedAvg": (start_plain, run_plain)}


def rounds(folder: Path, options: argparse.Namespace) -> None:
    rows, accuracies, parts = [], {way: [] for way in WAYS}, []
    count = options.rounds + 2  # the first warms up, the last is evaluated
    with tempfile.TemporaryDirectory(prefix="scalefl-bench-") as home, contextlib.ExitStack() as stack:
        task = Task(Path(home))
        paths = task.write()
        areas = {}
        for number, (way, (start, _)) in enumerate(WAYS.items()):
            place = Path(home) / str(number)
            set_up(place, host="localhost", port=free_port(), public_port=None, nodes=NODES)
            areas[way] = Area(Deployment(place), paths)
            stack.callback(areas[way].stop)
            start(areas[way])
        for area in areas.values():
            area.wait_for_nodes()
        for pair in range(options.pairs):
            for way in list(WAYS)[:: -1 if pair % 2 else 1]:  # who goes first alternates
                found = WAYS[way][1](areas[way], task, f"run-{pair}", count)
                accuracies[way].append(found.accuracy)
                parts += found.parts[1:-1]
                for n in range(2, count):
                    before, after, trained = found.marks[n - 1], found.marks[n], found.seconds[n - 1]
                    wall = after.at - before.at
                    rows.append([pair, way, n, wall, trained, wall - trained, after.cpu_seconds - before.cpu_seconds])
                print(pair, way, [f"{row[5]:.2f}" for row in rows[-options.rounds :]], found.accuracy, flush=True)
    _write_csv(
        folder / "rounds.csv",
        ["pair", "way", "round", "wall_seconds", "trained_seconds", "overhead_seconds", "cpu_seconds"],
        rows,
    )
    _write_section(folder, "rounds", _rounds_told(rows, accuracies, parts, options), options.quick)


def _rounds_told(rows: list[list], accuracies: dict, parts: list, options: argparse.Namespace) -> list[str]:
    def of(way: str, column: int, pair: int | None = None) -> list[float]:
        return [row[column] for row in rows if row[1] == way and pair in (None, row[0])]

    ours, plain = WAYS
    medians = [[statistics.median(of(way, 5, pair)) for way in WAYS] for pair in range(options.pairs)]
    ratios = [a / b for a, b in medians]
    planning, between, closing = (statistics.median(part[i] for part in parts) for i in range(3))
    model_mib = num_bytes(initial_params(Task(Path()).model, 0)) / MIB
    lines = [
        "## What a round costs",
        "",
        f"A SuperLink with TLS and {NODES} registered SuperNodes for each way, real processes on loopback; CNN of "
        f"width {WIDTH} ({model_mib:.1f} MiB), a {SHARES}th of mnist5k's 4,000 "
        f"training rows on each node, one epoch in batches of {WORK.batch_size}, one thread. {options.pairs} "
        f"interleaved pairs of runs of {options.rounds} rounds, after one that does not count. *Flower's FedAvg*: "
        "`flwr.serverapp.strategy.FedAvg` and a ClientApp with torch.optim.SGD and a DataLoader, SuperNodes with their "
        "own executor, every setting at its default. Overhead: from the end of a round to the end of the next, less "
        "what the slowest client trained by its own clock. Medians (range) over rounds; CPU: of the server's and all "
        "nodes' processes, mean.",
        "",
        "| way | seconds a round | training | overhead, s | CPU seconds a round | test accuracy after "
        f"{options.rounds + 2} rounds, % |",
        "|---|---|---|---|---|---|",
    ]
    for way in WAYS:
        cells = [_range(of(way, column)) for column in (3, 4, 5)]
        accuracy = ", ".join(f"{100 * a:.1f}" for a in accuracies[way])
        lines.append(f"| {way} | {' | '.join(cells)} | {statistics.mean(of(way, 6)):.1f} | {accuracy} |")
    return [
        *lines,
        "",
        f"Overhead of {ours} as a share of that of {plain}: {statistics.median(ratios):.2f} in the median of the pairs "
        f"({', '.join(f'{ratio:.2f}' for ratio in ratios)}).",
        "",
        f"Where ours goes, medians: {planning:.2f} s from the end of a round to the first task sent (the journal, the "
        f"state, who is there, the plan), {between:.2f} s from there to the last answer, training excluded, and "
        f"{closing:.2f} s from there to the end of the round. The second part is mostly waiting: our "
        "nodes look for messages once a second (`poll_seconds`; Flower's SuperNode by itself every three), and who "
        "asks for a message whose content is still on its way is put off, on the server for a second. Our nodes train "
        "under a hard memory cap, for which compiled kernels are not kept: our explanation of longer training, not "
        "tested.",
    ]


def _range(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


# Clients in this process.


class Noise:
    """Images of noise, made for each client when asked for."""

    def __init__(self, clients: int, examples: int, size: int) -> None:
        self.problem = Classification(10, (Column("image", (3, size, size), "uint8"),))
        self.num_clients, self._count = clients, examples

    def num_examples(self, client: int) -> int:
        return self._count

    def label_counts(self, client: int) -> torch.Tensor:
        return torch.bincount(self.examples(client)["label"], minlength=10)

    def examples(self, client: int) -> Batch:
        draw = torch.Generator().manual_seed(client)
        images = torch.randint(0, 256, (self._count, *self.problem.columns[0].shape), dtype=torch.uint8, generator=draw)
        return {"image": images, "label": torch.randint(0, 10, (self._count,), generator=draw)}

    validation = test = property(lambda self: self.examples(0))


def experiment(
    model: str, width: float, memory: str, method: dict[str, Any], noise: dict[str, int], **more: Any
) -> Experiment:
    kind = {"name": "all", "share": 1.0, "memory": memory, "flops_per_second": 1e9, "bandwidth_bytes_per_second": 1e6}
    return Experiment(
        make_config(
            {
                "model": model,
                "model_arguments": {"width": width},
                "data": {"source": {"name": "flower:Noise", "arguments": noise}},
                "devices": {"classes": [kind]},
                "method": method,
                **more,
            }
        )
    )


@contextlib.contextmanager
def engine_of(found: Experiment, over: str, **settings: Any) -> Iterator[Any]:
    local = LocalEngine(found.data, found.population, threads=1)
    with local if over == "local" else in_process(local, found.problem, **settings) as engine:
        yield engine


def played(found: Experiment, engine: Any) -> Iterator[RoundRecord]:
    config = found.config
    sampler = UniformSampler(config.clients_per_round)
    going = federate(found.method, engine, sampler, found.initial_state(), is_looked_at=lambda round: False)
    for _ in range(config.rounds):
        yield next(going)[1]


# What crosses.

SEQUENTIAL = {"kind": "sequential", "rounds": 4}
CROSSING = {
    "fedavg": {"name": "fedavg", "population": "all"},
    "sbt": {"name": "sbt", "means": "auto", "growth": SEQUENTIAL},
    "scalefl-paper": {"name": "scalefl-paper", "means": "auto"},
    "scalefl-elastic": {"name": "scalefl", "spans": "elastic"},
    "scalefl": {"name": "scalefl"},
}
"""Four blocks each (the default), each four rounds in turn: in a row or round robin."""
CLIENTS, COHORT, CROSSING_ROUNDS = 8, 4, 16


def bytes_(folder: Path, options: argparse.Namespace) -> None:
    lines = [
        "## What crosses",
        "",
        f"ResNet-18 (batch norm) in four blocks, {CLIENTS} clients with two batches of 8 images each and budgets of "
        f"70 % of full training, {COHORT} a round, {options.crossing_rounds} rounds, over the grid in one process; MiB "
        "of all rounds, as journals count them. Full: the whole model to each client in each round. Without cache: all "
        "tensors of each task (which is what the local engine counts). What the cache saves is the difference. Half: "
        '`precision = "float16"`, both ways.',
        "",
        "| width | method | full | without cache | down | of full | half | of full | up | of full | half | of full |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = []
    for width in options.widths:
        for name in options.methods:
            row = _crossed(width, name, CROSSING[name], options.crossing_rounds)
            rows.append(row)
            full, uncached, down, _, down_half, up, up_half = row[2:]
            cells = [f"{n / MIB:.0f}" for n in (full, uncached)]
            for crossed in (down, down_half, up, up_half):
                cells += [f"{crossed / MIB:.0f}", f"{100 * crossed / full:.0f} %"]
            lines.append(f"| {width} | {name} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    head = ["width", "method", "full", "without_cache", "down", "down_if_nothing_is_kept", "down_half", "up", "up_half"]
    _write_csv(folder / "bytes.csv", head, rows)
    _write_section(folder, "bytes", lines, options.quick)


def _crossed(width: float, name: str, method: dict[str, Any], num_rounds: int) -> list[Any]:
    noise = {"clients": CLIENTS, "examples": 16, "size": 16}
    work, of_run = {"batch_size": 8, "lr": 0.001}, {"rounds": num_rounds, "clients_per_round": COHORT}
    found = experiment("resnet18", width, "70%", method, noise, work=work, **of_run)
    whole = num_bytes(without_attachments(found.initial_state().params))

    def counted(over: str = "flower", **settings: Any) -> tuple[int, int]:
        with engine_of(found, over, **settings) as engine:
            records = list(played(found, engine))
        if any(record.lost for record in records):
            raise SystemExit(f"{name}: clients were lost: {[record.lost for record in records]}")
        return sum(r.bytes_down for r in records), sum(r.bytes_up for r in records)

    down, up = counted()
    down_half, up_half = counted(precision="float16")
    return [
        width,
        name,
        whole * COHORT * num_rounds,
        counted("local")[0],
        down,
        counted(cache_bytes=0)[0],
        down_half,
        up,
        up_half,
    ]


# What a server holds.

POPULATION, MANY = 1000, 50
SHOWN = (1, 2, 5, 10, 20, 30, 40, 50)


def scale(folder: Path, options: argparse.Namespace) -> None:
    found = {}
    population, many, shown = options.population, options.cohort, [n for n in SHOWN if n <= options.many_rounds]
    sizes = (population, many, options.many_rounds)
    steady = min(10, options.many_rounds)
    for over in ("flower", "local"):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # each in a fresh process
            found[over] = pool.submit(_held, over, *sizes).result()
    rows = [[n, *(found[over][n - 1][i] for over in found for i in (0, 1))] for n in shown]
    _write_csv(folder / "scale.csv", ["round", "flower_bytes", "flower_seconds", "local_bytes", "local_seconds"], rows)
    model_bytes = found["flower"][0][2]
    all_updates = many * options.many_rounds * model_bytes
    lines = [
        "## What a server holds",
        "",
        f"{population:,} registered clients of 8 examples, {many} a round, {options.many_rounds} rounds of "
        f"`scalefl-paper` (CNN, {model_bytes / MIB:.2f} MiB: as many copies as there are tasks would take "
        f"{all_updates / MIB:.0f} MiB), over the grid in one process, and on the local engine. Resident memory of "
        "that process after a round, server and clients together. The first round of the grid asks all clients "
        "what they offer.",
        "",
        "| round | grid, MiB | local engine, MiB |",
        "|---|---|---|",
        *(f"| {row[0]} | {row[1] / MIB:.1f} | {row[3] / MIB:.1f} |" for row in rows),
        "",
    ]
    for over, name in (("flower", "grid"), ("local", "local engine")):
        times = [seconds for _, seconds, _ in found[over][1:]]
        growth = (found[over][-1][0] - found[over][steady - 1][0]) / MIB
        lines.append(
            f"- {name}: {_range(times)} s a round (the first {found[over][0][1]:.1f}); from round {steady} to round "
            f"{options.many_rounds} memory grew by {growth:.1f} MiB."
        )
    _write_section(folder, "scale", lines, options.quick)


def _held(over: str, population: int, many: int, num_rounds: int) -> list[tuple[int, float, int]]:
    """Resident bytes after each round, its seconds, and the model's bytes."""
    torch.set_num_threads(1)
    found = experiment(
        "cnn",
        0.25,
        "200%",
        {"name": "scalefl-paper", "blocks": ["conv1", "conv2"]},
        {"clients": population, "examples": 8, "size": 16},
        work={"batch_size": 8, "lr": 0.001},
        rounds=num_rounds,
        clients_per_round=many,
    )
    model_bytes = num_bytes(without_attachments(found.initial_state().params))
    held, start = [], time.perf_counter()
    with engine_of(found, over) as engine:
        for record in played(found, engine):
            if record.lost:
                raise SystemExit(f"clients were lost: {record.lost}")
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            held.append((resident, time.perf_counter() - start, model_bytes))
            start = time.perf_counter()
    return held


# What half precision costs.


def precision(folder: Path, options: argparse.Namespace) -> None:
    with (folder.parent / "precision" / "comparison.csv").open() as file:
        runs = {(row["variant"], int(row["seed"])): row for row in csv.DictReader(file)}
    seeds = sorted({seed for _, seed in runs})
    lines = [
        "## What half precision costs",
        "",
        "`benchmarks/precision.toml`: `examples/demo.toml` with tensors that travel as they are, or in half precision: "
        "weights on their way down, differences from what was sent on their way up; seeds "
        f"{', '.join(map(str, seeds))}. Test accuracy, mean ± standard deviation; difference: seed by seed, half less "
        "exact. MiB: of a run, mean.",
        "",
        "| method | exact, % | half, % | difference, points | seed by seed | down, MiB | up, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = []
    for method in sorted({variant.rpartition("-")[0] for variant, _ in runs}):

        def of(column: str, method: str = method) -> list[list[float]]:
            return [[float(runs[f"{method}-{precision}", s][column]) for s in seeds] for precision in ("exact", "half")]

        exact, half = ([100 * accuracy for accuracy in found] for found in of("test"))
        down, up = ([statistics.mean(found) for found in of(f"bytes_{way}")] for way in ("down", "up"))
        differences = [b - a for a, b in zip(exact, half, strict=True)]
        cells = [_spread(exact), _spread(half), _spread(differences), ", ".join(f"{d:+.1f}" for d in differences)]
        cells += [f"{before / MIB:.0f} → {after / MIB:.0f}" for before, after in (down, up)]
        lines.append(f"| {method} | {' | '.join(cells)} |")
        rows += [[method, s, a, b, *down, *up] for s, a, b in zip(seeds, exact, half, strict=True)]
    head = ["method", "seed", "exact", "half", "down_exact", "down_half", "up_exact", "up_half"]
    _write_csv(folder / "precision.csv", head, rows)
    _write_section(folder, "precision", lines, options.quick)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else math.nan:.1f}"


def _write_csv(path: Path, head: list[str], rows: list[list]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([head, *rows])


def _write_section(folder: Path, name: str, lines: list[str], is_quick: bool) -> None:
    about = versions()
    where = f"torch {about['packages']['torch']}, flwr {version('flwr')}, {about['platform']}, {about['cores']} cores."
    (folder / f"{name}.md").write_text("\n".join([*lines, "", where, ""]))
    sections = [(folder / f"{part}.md").read_text() for part in ORDER if (folder / f"{part}.md").exists()]
    head = (
        "# Clients behind Flower: measured\n\nWritten by `make bench-flower`; figures behind it in [flower/](flower).\n"
    )
    if is_quick:
        head += "\n**Quick form: little of everything. Figures mean nothing.**\n"
    (folder.parent / "flower.md").write_text("\n".join([head, *sections]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=ORDER)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=3, help="of runs, for rounds")
    parser.add_argument("--rounds", type=int, default=6, help="of each run that count, for rounds")
    parser.add_argument("--widths", type=float, nargs="+", default=[0.25, 1.0], help="of the model, for bytes")
    parser.add_argument("--quick", action="store_true", help="in seconds, for little: figures mean nothing")
    parser.set_defaults(
        methods=tuple(CROSSING),
        crossing_rounds=CROSSING_ROUNDS,
        population=POPULATION,
        cohort=MANY,
        many_rounds=SHOWN[-1],
    )
    options = parser.parse_args()
    if options.quick:
        options.pairs = options.rounds = 1
        options.widths, options.methods, options.crossing_rounds = [0.0625], ("fedavg", "scalefl-paper"), 2
        options.population, options.cohort, options.many_rounds = 10, 3, 2
    torch.set_num_threads(1)
    folder = options.out / "flower"
    folder.mkdir(parents=True, exist_ok=True)
    {"rounds": rounds, "bytes": bytes_, "scale": scale, "precision": precision}[options.what](folder, options)


if __name__ == "__main__":
    main()
