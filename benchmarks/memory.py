"""Memory: predicted against measured, what each model needs by each means, and a tenth of full training for real.

    python benchmarks/memory.py planning|prediction|models|tenth|floors|rungs|federation --out docs/benchmarks [--quick]

Each command writes its section and a CSV file to OUT/memory/, and puts the sections together as OUT/memory.md. With
`--quick` it does so in seconds, for one small model and once: figures mean nothing then, that they can be made is seen.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from scalefl.blocks import Blocks, Span, blocks_by_count, blocks_by_hand
from scalefl.bookkeeping import environment
from scalefl.client import Residents, run_task
from scalefl.config import load_config
from scalefl.costs import step_cost
from scalefl.data import Devices, MemoryClass
from scalefl.data.population import SimulatedPopulation
from scalefl.engines.local import LocalEngine
from scalefl.errors import BudgetError
from scalefl.experiment import Experiment
from scalefl.measure import MARGIN_BYTES, MARGIN_SHARE
from scalefl.memory import Cost
from scalefl.methods.fedavg import FedAvg
from scalefl.methods.scalefl import ScaleFL
from scalefl.models import resolve
from scalefl.models.spec import ModelSpec
from scalefl.objectives import TaskLoss
from scalefl.planner import cheapest, fit
from scalefl.problem import Batch, Classification, Column, Problem
from scalefl.run_folder import RunFolder
from scalefl.runner import run
from scalefl.steps import full_step
from scalefl.types import (
    AUTO,
    ClientLoss,
    ClientTask,
    ClientUpdate,
    LocalWork,
    Means,
    Objective,
    Offer,
    ServerState,
    Step,
    described,
)
from scalefl.units import MIB

ORDER = ("planning", "prediction", "models", "tenth", "floors", "rungs", "federation")
STAGES = {
    "resnet18": ("layer1.1", "layer2.1", "layer3.1"),
    "resnet34": ("layer1.2", "layer2.3", "layer3.5"),
}
"""The paper's blocks: the stages of a ResNet. Other models are cut by a count."""


@dataclass(frozen=True)
class Subject:
    """A model on images of a size."""

    name: str
    image_size: int = 32
    width: float = 1.0

    @cached_property
    def model(self) -> ModelSpec:
        facts = {"num_classes": 10, "image_size": self.image_size, "in_channels": 3}
        extra: dict[str, Any] = {} if self.width == 1.0 else {"width": self.width}
        if self.image_size > 64 and self.name.startswith("resnet"):
            extra["stem"] = "imagenet"
        return ModelSpec.of(resolve(self.name), **extra).completed(facts)

    @cached_property
    def problem(self) -> Classification:
        return Classification(10, (Column("image", (3, self.image_size, self.image_size), "uint8"),))

    @property
    def title(self) -> str:
        return self.name if self.image_size == 32 else f"{self.name} at {self.image_size}"

    def blocks(self, count: int) -> Blocks:
        if count == 4 and self.name in STAGES:
            return blocks_by_hand(self.model, self.problem, STAGES[self.name])
        return blocks_by_count(self.model, self.problem, count)


SMALL = [Subject(name) for name in ("resnet18", "resnet34", "vgg11_bn", "squeezenet", "vit")]
LARGE = Subject("resnet34", 224)


REPEATS = 3
"""Of what is timed."""
TENTHS = {Subject("resnet18"): (68, 8), Subject("resnet34"): (116, 16), Subject("vit"): (123, 4)}
"""MiB that training may add to the worker, a tenth of full training; and the number of blocks: a ResNet's units."""
PLANNED = {"resnet18": "", "resnet34": "", "vit": ", image_size=32"}
"""Models whose planning is timed, and what `plan` has to be told of them."""


@dataclass(frozen=True)
class Scope:
    """How much is measured.

    Args:
        subjects: models, at batch 128 or less; `large`: with images of another size, at a smaller batch.
        repeats: of what is timed.
        blocks: the two numbers of blocks that models are cut into.
        batch_size: of what is not about single batches.
        tenths, planned: see `TENTHS` and `PLANNED`.
        rung_subject: the model of the rungs.
        federation: settings of the federation under caps that are changed.
        is_quick: whether figures mean nothing.
    """

    subjects: tuple[Subject, ...]
    large: Subject | None
    repeats: int
    blocks: tuple[int, int]
    batch_size: int
    tenths: Mapping[Subject, tuple[int, int]]
    planned: Mapping[str, str]
    rung_subject: Subject
    federation: tuple[str, ...] = ()
    is_quick: bool = False


FULL = Scope(tuple(SMALL), LARGE, REPEATS, (4, 8), 128, TENTHS, PLANNED, Subject("resnet18"))
TINY = Subject("resnet10", 16, 0.125)
QUICK = Scope(
    subjects=(TINY,),
    large=None,
    repeats=1,
    blocks=(3, 4),
    batch_size=64,
    tenths={TINY: (16, 3)},
    planned={"cnn": ", image_size=32"},
    rung_subject=TINY,
    federation=("rounds=2", "clients_per_round=2", "model='cnn'", "evaluation.every=2", "model_arguments={}"),
    is_quick=True,
)
scope = FULL
"""Set once, by the command line."""


class NoiseClient:
    """One client with random images: two batches, so that a step runs beside what the first has left."""

    num_clients = 1

    def __init__(self, problem: Classification, num_examples: int) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = problem.columns[0].shape
        self.problem = problem
        self._images = torch.randint(0, 256, (num_examples, *shape), dtype=torch.uint8, generator=generator)
        self._labels = torch.randint(0, problem.num_classes, (num_examples,), generator=generator)

    def num_examples(self, client: int) -> int:
        return len(self._labels)

    def label_counts(self, client: int) -> torch.Tensor:
        return torch.bincount(self._labels, minlength=self.problem.num_classes)

    def examples(self, client: int) -> Batch:
        return {"image": self._images, "label": self._labels}

    validation = test = property(lambda self: self.examples(0))


def alone(work: LocalWork, blocks: Blocks, **settings: Any) -> ScaleFL:
    """ScaleFL that trains one of these blocks at a time, each but the last against its output module."""
    cuts = tuple(cut.module for cut in map(blocks.cut, range(len(blocks) - 1)) if cut)
    return ScaleFL(work=work, blocks=cuts, spans="single", tails=False, **settings)


def whole_blocks(subject: Subject, method: ScaleFL) -> list[Step]:
    """For each block the step that trains all of it, before means are chosen."""
    state = method.init(subject.model, subject.problem, seed=0, smallest_memory_bytes=0)
    return [whole_block(method, state, block).step for block in range(len(method.blocks_of(state)))]


def whole_block(method: ScaleFL, state: ServerState, block: int) -> Offer:
    """What a method offers for a whole block."""
    label = method.blocks_of(state).label(Span(block, block))
    (found,) = (offer for offer in method.menu(state) if offer.label == label)
    return found


def tilings(method: ScaleFL, state: ServerState, block: int) -> list[list[Offer]]:
    """A block whole, then in its parts: the largest first."""
    return [[whole_block(method, state, block)], *method.tilings(state, block)]


def done_in_a_worker(
    subject: Subject, method: ScaleFL | FedAvg, step: Step, budget_bytes: int | None = None
) -> ClientUpdate | ClientLoss:
    """The answer to one task in a fresh worker; without a budget under a cap that is never hit.

    Capped workers keep no compiled convolutions, which are no part of a budget: what is measured is what is enforced.
    """
    data = NoiseClient(subject.problem, 2 * step.work.batch_size)
    everything = MemoryClass(
        name="all", share=1.0, memory=f"{budget_bytes or 2**40}B", flops_per_second=1e9, bandwidth_bytes_per_second=1e6
    )
    clients = SimulatedPopulation(data, Devices(classes=(everything,)), 2**40, seed=0)
    state = method.init(subject.model, subject.problem, seed=0, smallest_memory_bytes=2**40)
    with LocalEngine(data, clients, workers=1, threads=1, cap="hard") as engine:
        params = {name: state.params[name] for name in step.part.names()}
        (answer,) = engine.fit(method, [(ClientTask(0, 0, (step,), seed=1), params)])
    return answer


# How long planning takes.

PLANNING = """
import time
start = time.perf_counter()
import torch
from scalefl import plan
plan({model!r}, torch.zeros(128, 3, 32, 32), batch_size=128, num_classes=10{more})
print(time.perf_counter() - start)
"""


def planning(folder: Path) -> None:
    lines = [
        "## How long planning takes",
        "",
        "`plan(model, …)` at batch 128 in four blocks: every span of blocks, by every exact means, in a fresh process; "
        f"wall seconds, imports included, medians of {scope.repeats} (range). From cold: with an empty cache. Again: "
        "in another process, from the cache that the first has left.",
        "",
        "| model | from cold | again |",
        "|---|---|---|",
    ]
    rows = []
    for model, more in scope.planned.items():
        seconds: dict[str, list[float]] = {"cold": [], "again": []}
        for _ in range(scope.repeats):
            with tempfile.TemporaryDirectory() as cache:
                for which in seconds:
                    command = [sys.executable, "-c", PLANNING.format(model=model, more=more)]
                    about = {**os.environ, "SCALEFL_CACHE": cache, "OMP_NUM_THREADS": "1"}
                    done = subprocess.run(command, env=about, capture_output=True, text=True, check=True)
                    seconds[which].append(float(done.stdout))
        found = [f"{statistics.median(s):.1f} ({min(s):.1f}-{max(s):.1f})" for s in seconds.values()]
        lines.append(f"| {model} | {' | '.join(found)} |")
        rows.append([model, *(statistics.median(s) for s in seconds.values())])
        print(lines[-1], flush=True)
    _write_csv(folder / "planning.csv", ["model", "cold_seconds", "again_seconds"], rows)
    _write_section(folder, "planning", lines)


# Predicted against measured.

VARIANTS = {
    "plain": Means(),
    "micro-batch 8": Means(micro_batch_size=8),
    "recomputed": Means(recompute=True),
    "cached prefix": Means(prefix="cached"),
    "streamed, micro-batch 8, recomputed": Means(micro_batch_size=8, recompute=True, prefix="streamed"),
}


def settings() -> Iterator[tuple[Subject, int, int, str]]:
    """Model, batch size, blocks (1: the full model) and means of each measurement."""
    if scope.is_quick:
        yield TINY, 16, 1, "plain"
        yield TINY, 16, scope.blocks[0], "streamed, micro-batch 8, recomputed"
        return
    for subject in SMALL:
        for blocks, variants in (
            (1, ["plain", "micro-batch 8", "recomputed"]),
            (4, list(VARIANTS)),
            (8, ["plain"]),
        ):
            for variant in variants:
                yield subject, 32, blocks, variant
        for blocks in (1, 4):
            yield subject, 64, blocks, "plain"
    for blocks in (1, 4):
        for variant in ("plain", "recomputed"):
            yield LARGE, 8, blocks, variant


def prediction(folder: Path) -> None:
    rows = []
    for subject, batch, count, variant in settings():
        work = LocalWork(batch_size=batch)
        if count == 1:
            method: ScaleFL | FedAvg = FedAvg(work=work)
            steps = {"full": full_step(subject.model, subject.problem, work)}
        else:
            method = alone(work, subject.blocks(count), coadapted_layers=1)
            steps = {f"{Span(b, b)} of {count}": step for b, step in enumerate(whole_blocks(subject, method))}
        for label, step in steps.items():
            step = replace(step, means=VARIANTS[variant])
            predicted = step_cost(step, subject.problem, method.objective(step)).peak_bytes
            answer = done_in_a_worker(subject, method, step)
            measured = answer.receipt.peak_bytes
            if isinstance(answer, ClientLoss) or measured is None:
                raise SystemExit(f"{subject.title} {label} {variant}: {answer}")
            rows.append([subject.title, batch, label, variant, predicted, measured])
            print(f"{subject.title:16} {batch:3} {label:8} {variant:36}", _mib(predicted), _mib(measured), flush=True)
    _write_csv(
        folder / "prediction.csv", ["model", "batch", "trained", "means", "predicted_bytes", "measured_bytes"], rows
    )
    errors = [(row[4] / row[5] - 1, row) for row in rows]
    what = (
        f"{len(rows)} tasks, each in a fresh worker (two steps) as caps use them, under a cap that is never hit. "
        "Error: predicted / measured − 1. Workers without caps keep compiled convolutions: up to 5 MiB more in their "
        "first task."
    )
    lines = ["## Predicted against measured", "", what, ""]
    lines += ["| | tasks | median of errors' sizes | lowest | highest | most under, MiB |", "|---|---|---|---|---|---|"]
    for name, chosen in [
        ("all", errors),
        *((variant, [e for e in errors if e[1][3] == variant]) for variant in VARIANTS),
        *((s.title, [e for e in errors if e[1][0] == s.title]) for s in (*scope.subjects, scope.large) if s),
    ]:
        if not chosen:
            continue
        under = max(row[5] - row[4] for _, row in chosen) / MIB
        values = [error for error, _ in chosen]
        lines.append(
            f"| {name} | {len(chosen)} | {_percent(statistics.median(map(abs, values)))} | {_percent(min(values))} "
            f"| {_percent(max(values))} | {max(under, 0):.1f} |"
        )
    bad = [row for error, row in errors if row[5] - row[4] > max(0.03 * row[4], 4 * MIB) or error > 0.10]
    lines += ["", f"Under by more than max(3 %, 4 MiB), or over by more than 10 %: {len(bad)} of {len(rows)}."]
    lines += [f"- {r[0]}, batch {r[1]}, {r[2]}, {r[3]}: {_mib(r[4])} predicted, {_mib(r[5])} measured" for r in bad]
    _write_section(folder, "prediction", lines)


# What each model needs.


def models(folder: Path) -> None:
    rows = [_needs(subject) for subject in (*scope.subjects, scope.large) if subject]
    lines = [
        "## What each model needs",
        "",
        "Predicted peaks in MiB at batch 128 (ResNet-34 at 224: 32), SGD with momentum; blocks with mentor and one "
        "co-adapted layer, and the worst of them. Four blocks: the paper's for ResNets, else of equally many layers; "
        "cut by memory: as the planner places four or eight, so that the worst is as small as can be. FLOPs: those of "
        "the dearest of the four blocks, mentor and output module included, against full training.",
        "",
        "| model | full | four blocks | saved | cut by memory: four | saved | eight | saved | FLOPs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            f"{_mib(row[key])} | {_percent(1 - row[key] / row['full'], 0)}" for key in ("four", "four_cut", "eight_cut")
        ]
        lines.append(f"| {row['model']} | {_mib(row['full'])} | {' | '.join(cells)} | {_percent(row['flops'], 0)} |")
    lines += [
        "",
        "With micro-batches of an eighth of the batch, the full model too: the honest comparison.",
        "",
        "| model | full | four blocks | saved | cut by memory: four | saved | eight | saved |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        full = row["full_micro"]
        cells = [
            f"{_mib(row[key])} | {_percent(1 - row[key] / full, 0)}"
            for key in ("four_micro", "four_cut_micro", "eight_cut_micro")
        ]
        lines.append(f"| {row['model']} | {_mib(full)} | {' | '.join(cells)} |")
    lines += [
        "",
        "By all exact means (docs/memory.md), without co-adapted layers; parts: some layers of a block at a time:",
        "",
        "| model | full | four blocks | saved | eight blocks in parts | saved |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        full = row["full_least"]
        cells = [f"{_mib(row[key])} | {_percent(1 - row[key] / full, 0)}" for key in ("four_least", "eight_least")]
        lines.append(f"| {row['model']} | {_mib(full)} | {' | '.join(cells)} |")
    with (folder / "models.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    _write_section(folder, "models", lines)


def _needs(subject: Subject) -> dict[str, Any]:
    """Peaks of full training and of the worst of some blocks, in bytes."""
    work = LocalWork(batch_size=32 if subject is LARGE else scope.batch_size)
    micro = Means(micro_batch_size=work.batch_size // 8)
    whole = full_step(subject.model, subject.problem, work)
    full = step_cost(whole, subject.problem, TaskLoss())
    few, many = scope.blocks
    four = subject.blocks(few)
    found: dict[str, Any] = {
        "model": subject.title,
        "full": full.peak_bytes,
        "full_micro": step_cost(replace(whole, means=micro), subject.problem, TaskLoss()).peak_bytes,
        "full_least": cheapest(whole, subject.problem, TaskLoss(), AUTO)[1].peak_bytes,
    }
    for name, blocks in (
        ("four", four),
        ("four_cut", _cut(subject, work, few)),
        ("eight_cut", _cut(subject, work, many)),
    ):
        steps = _stages(subject, work, blocks)
        costs = [step_cost(step, subject.problem, objective) for step, objective in steps]
        found[name] = max(cost.peak_bytes for cost in costs)
        found[f"{name}_micro"] = max(
            step_cost(replace(step, means=micro), subject.problem, objective).peak_bytes for step, objective in steps
        )
        if blocks is four:
            found["flops"] = max(cost.flops for cost in costs) / full.flops
    found["four_least"], found["eight_least"] = (_worst_least(subject, work, n) for n in (few, many))
    print(found, flush=True)
    return found


def _stages(subject: Subject, work: LocalWork, blocks: Blocks) -> list[tuple[Step, Objective]]:
    method = alone(work, blocks, coadapted_layers=1)
    return [(step, method.objective(step)) for step in whole_blocks(subject, method)]


def _cut(subject: Subject, work: LocalWork, count: int) -> Blocks:
    """At most so many blocks, cut by memory: those for the smallest budget, to 1 %, that so many suffice for."""
    method = ScaleFL(work=work, blocks="memory", spans="single", tails=False, means="none", coadapted_layers=1)

    def blocks_for(budget: int) -> Blocks | None:
        try:
            state = method.init(subject.model, subject.problem, seed=0, smallest_memory_bytes=budget)
        except BudgetError:
            return None
        blocks = method.blocks_of(state)
        return blocks if len(blocks) <= count else None

    low, high = 0, step_cost(full_step(subject.model, subject.problem, work), subject.problem, TaskLoss()).peak_bytes
    best = blocks_for(high)
    while high - low > high // 100:
        middle = (low + high) // 2
        found = blocks_for(middle)
        low, high = (low, middle) if found else (middle, high)
        best = found or best
    assert best is not None
    return best


def _worst_least(subject: Subject, work: LocalWork, count: int) -> int:
    """The worst of some blocks by all exact means; of eight, each in the smallest parts where that takes less."""
    method = alone(work, subject.blocks(count), coadapted_layers=0)
    state = method.init(subject.model, subject.problem, seed=0, smallest_memory_bytes=0)
    worst = 0
    for block in range(count):
        ways = tilings(method, state, block)[: None if count > scope.blocks[0] else 1]
        # The tiles of a block all have their turn, so the dearest counts.
        worst = max(worst, min(max(_least(o.step, subject, method).peak_bytes for o in tiles) for tiles in ways))
    return worst


def _peak(cost: Cost) -> int:
    return cost.peak_bytes


def _least(step: Step, subject: Subject, method: ScaleFL) -> Cost:
    return cheapest(step, subject.problem, method.objective(step), AUTO)[1]


# A tenth.


def tenth(folder: Path) -> None:
    lines = [
        "## A tenth of full training, enforced",
        "",
        "Batch 128, 32×32, SGD with momentum, mentor on; each task in a fresh worker whose data segment is limited to "
        "its base plus the budget. Full training is tried under the same cap. Batch size and momentum are the run's; "
        "one co-adapted layer trains with each block but where the table says 0, and with no part of a block. A cached "
        "prefix excludes augmentation: with it, the prefix would be streamed.",
    ]
    rows = []
    for subject, (mib, count) in scope.tenths.items():
        name, work, budget = subject.name, LocalWork(batch_size=scope.batch_size), mib * MIB
        whole = full_step(subject.model, subject.problem, work)
        full = step_cost(whole, subject.problem, TaskLoss())
        answer = done_in_a_worker(subject, FedAvg(work=work), whole, budget)
        fate = f"dies ({answer.cause})" if isinstance(answer, ClientLoss) else "LIVES"
        lines += [
            "",
            f"### {name}: full training {_mib(full.peak_bytes)} MiB, cap: base + {mib} MiB",
            "",
            f"Full training {fate}.",
            "",
            "| trained | by | predicted MiB | measured MiB | seconds a step | |",
            "|---|---|---|---|---|---|",
        ]
        print(lines[-5:], flush=True)
        for label, words, step, cost in tenth_steps(subject, work, count, budget):
            method = tenth_method(work, count)
            answer = done_in_a_worker(subject, method, step, budget)
            measured = answer.receipt.peak_bytes
            ok = "trained" if isinstance(answer, ClientUpdate) else f"lost: {answer.cause}"
            rows.append([name, label, words, cost.peak_bytes, measured, answer.receipt.seconds / 2, ok])
            lines.append(
                f"| {label} | {words or 'as it is'} | {_mib(cost.peak_bytes)} | {_mib(measured)} "
                f"| {answer.receipt.seconds / 2:.1f} | {ok} |"
            )
            print(lines[-1], flush=True)
    head = ["model", "trained", "means", "predicted_bytes", "measured_bytes", "seconds_a_step", "outcome"]
    _write_csv(folder / "tenth.csv", head, rows)
    _write_section(folder, "tenth", lines)


def tenth_method(work: LocalWork, count: int) -> ScaleFL:
    return ScaleFL(work=work, blocks=count, spans="elastic", tails=False, coadapted_layers=1)


def tenth_steps(subject: Subject, work: LocalWork, count: int, budget: int) -> Iterator[tuple[str, str, Step, Cost]]:
    """For each block how it is trained within the budget, in parts where it must be."""
    method = tenth_method(work, count)
    state = method.init(subject.model, subject.problem, seed=0, smallest_memory_bytes=0)
    usable = budget - max(round(0.03 * budget), 4 * MIB)
    for block in range(count):
        for offers in tilings(method, state, block):
            found = [_fitting(o, subject.problem, method, usable) for o in offers]
            if all(found):
                for offer, (words, step, cost) in zip(offers, found, strict=True):
                    yield offer.label, words, step, cost
                break
        else:
            raise SystemExit(f"{subject.title}: block {block + 1} does not fit {budget / MIB} MiB")


def _fitting(offer: Offer, problem: Problem, method: ScaleFL, usable: int) -> tuple[str, Step, Cost] | None:
    choice = fit(offer, problem, method.objective, usable, num_examples=256)
    if choice is None:
        return None
    words = [*choice.label.removeprefix(offer.label).split(", ")[1:], *described(choice.step)]
    return ", ".join(words), choice.step, choice.cost


# What each rung costs.

RUNGS = {
    "none": Means(),
    "micro-batch 32": Means(micro_batch_size=32),
    "micro-batch 8": Means(micro_batch_size=8),
    "recomputed": Means(recompute=True),
    "chunked prefix": Means(prefix="chunked"),
    "streamed prefix": Means(prefix="streamed"),
    "cached prefix, 2 epochs": Means(prefix="cached"),
    "freed gradients": Means(free_gradients=True),
    "bfloat16": Means(bfloat16=True),
}


def rungs(folder: Path) -> None:
    """Tasks of one block by each rung, in turns in one process: one batch, two epochs."""
    subject, work = scope.rung_subject, LocalWork(batch_size=scope.batch_size, epochs=2)
    method, block = tenth_method(work, 4), 2
    state = method.init(subject.model, subject.problem, seed=0, smallest_memory_bytes=0)
    step = whole_block(method, state, block).step
    data, residents = NoiseClient(subject.problem, work.batch_size), Residents()
    seconds: dict[str, list[float]] = {name: [] for name in RUNGS}
    for _ in range(scope.repeats + 1):
        for name, means in RUNGS.items():
            task = ClientTask(0, 0, (replace(step, means=means),), seed=1)
            params = {tensor: state.params[tensor].clone() for tensor in step.part.names()}
            update = run_task(method, subject.problem, residents, task, params, data.examples(0))
            seconds[name].append(update.receipt.seconds / work.epochs)
    lines = [
        "## What each rung costs",
        "",
        f"Seconds a step of block {block + 1} of 4 of ResNet-18, batch 128, mentor and one co-adapted layer on: "
        f"{scope.repeats} tasks of two steps by each rung, in turns in one process, after one that does not count. "
        "Peak: predicted.",
        "",
        "| rung | median | range | of none | peak, MiB |",
        "|---|---|---|---|---|",
    ]
    rows = []
    for name, means in RUNGS.items():
        times = seconds[name][1:]
        ratio = statistics.median(t / plain for t, plain in zip(times, seconds["none"][1:], strict=True))
        peak = step_cost(replace(step, means=means), subject.problem, method.objective(step)).peak_bytes
        rows.append([name, statistics.median(times), min(times), max(times), ratio, peak])
        lines.append(
            f"| {name} | {rows[-1][1]:.2f} | {min(times):.2f}-{max(times):.2f} | {_percent(ratio, 0)} | {_mib(peak)} |"
        )
        print(lines[-1], flush=True)
    _write_csv(folder / "rungs.csv", ["rung", "median_seconds", "least", "most", "ratio", "predicted_bytes"], rows)
    _write_section(folder, "rungs", lines)


# The smallest caps.

SETTINGS = {
    "all of them": (0.9, 1, True),
    "no augmentation": (0.9, 1, False),
    "no co-adapted layer": (0.9, 0, True),
    "no momentum": (0.0, 1, True),
    "none of them": (0.0, 0, False),
}
"""Momentum, co-adapted layers, augmentation."""


def floors(folder: Path) -> None:
    lines = [
        "## The smallest caps",
        "",
        "MiB beyond its base with which a worker can train every block, predicted, margin included: batch 128, mentor "
        "on, by all exact means. Augmentation excludes cached prefixes. In parts: of blocks that are too large, some "
        "layers at a time, without co-adapted layers.",
        "",
        "| momentum, a co-adapted layer, augmentation: | " + " | ".join(SETTINGS) + " | none of them, in parts |",
        "|---|" + "---|" * (len(SETTINGS) + 1),
    ]
    rows = []
    for subject, (mib, count) in scope.tenths.items():
        name = subject.name
        caps = [_smallest_cap(subject, count, *setting, parts=False) for setting in SETTINGS.values()]
        caps.append(_smallest_cap(subject, count, *SETTINGS["none of them"], parts=True))
        rows.append([name, *caps])
        lines.append(f"| {name}, {count} blocks (a tenth: {mib}) | " + " | ".join(map(_mib, caps)) + " |")
        print(lines[-1], flush=True)
    _write_csv(folder / "floors.csv", ["model", *SETTINGS, "in_parts"], rows)
    _write_section(folder, "floors", lines)


def _smallest_cap(
    subject: Subject, count: int, momentum: float, coadapted_layers: int, augmented: bool, *, parts: bool
) -> int:
    """The smallest budget under a hard cap that lets every block train, in bytes."""
    problem = replace(subject.problem, augmentation=("flip",) if augmented else ())
    work = LocalWork(batch_size=scope.batch_size, momentum=momentum)
    method = ScaleFL(
        work=work, blocks=count, spans="single", tails=False, coadapted_layers=coadapted_layers, parts=parts
    )
    state = method.init(subject.model, problem, seed=0, smallest_memory_bytes=0)
    peaks = []
    for block in range(count):
        costs = [
            [cheapest(offer.step, problem, method.objective(offer.step), AUTO)[1] for offer in tiles]
            for tiles in tilings(method, state, block)
        ]
        peaks.append(min(max(map(_peak, tiles)) for tiles in costs))
    return max(max(peaks) + MARGIN_BYTES, round(max(peaks) / (1 - MARGIN_SHARE)))


# A federation under caps.

CAPPED = {
    "ScaleFL": ("capped-scalefl", 'method={name="scalefl", blocks=4}'),
    "FedAvg, exclusive": ("capped-exclusive", 'method={name="fedavg"}'),
    "FedAvg, micro-batches": ("capped-micro", 'method={name="fedavg", means="micro-batches"}'),
    "FedAvg, all exact means": ("capped-means", 'method={name="fedavg", means="auto"}'),
}


def federation(folder: Path) -> None:
    lines = [
        "## A federation under hard caps",
        "",
        "`benchmarks/capped.toml`: ResNet-10 (32 channels, batch norm), 4,000 MNIST digits on 50 clients whose memory "
        "goes with their labels, 100 rounds of 10 clients, each task in a worker that the system allows its client's "
        "budget and no more. One seed. Utilisation: the largest measured peak of a task as a share of its budget.",
        "",
        "| method | tasks | over the cap | clients | utilisation | test accuracy | low-memory clients' data |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = []
    for title, (name, method) in CAPPED.items():
        config = load_config(Path(__file__).with_name("capped.toml"), [f"name={name}", method, *scope.federation])
        home = (folder if scope.is_quick else Path()) / "runs" / name
        summary = run(config, home, resume=home.exists())
        journal = [line for line in RunFolder(home).read_journal() if line["round"]]
        lost = [loss for line in journal for loss in line["lost"]]
        peaks = [peak for line in journal for peak in line["peaks"]]
        clients = Experiment(config).population
        shares = [peak["measured_bytes"] / clients[peak["client"]].memory_bytes for peak in peaks]
        took_part = len({peak["client"] for peak in peaks})
        accuracies = [summary[split]["accuracy"] for split in ("test", "low_memory_test")]
        rows.append([title, len(peaks) + len(lost), len(lost), took_part, max(shares), *accuracies])
        lines.append(
            f"| {title} | {len(peaks) + len(lost)} | {len(lost)} | {took_part} of {len(clients)} "
            f"| {_percent(max(shares), 0)} | {_percent(accuracies[0])} | {_percent(accuracies[1])} |"
        )
        print(lines[-1], flush=True)
        _write_section(folder, "federation", lines)
    head = ["method", "tasks", "over_the_cap", "clients", "utilisation", "test_accuracy", "low_memory_accuracy"]
    _write_csv(folder / "federation.csv", head, rows)
    _write_section(folder, "federation", lines)


def _mib(num_bytes: float | None) -> str:
    return "–" if num_bytes is None else f"{num_bytes / MIB:.1f}"


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"


def _write_csv(path: Path, head: list[str], rows: list[list]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([head, *rows])


def _write_section(folder: Path, name: str, lines: list[str]) -> None:
    about = environment()
    where = f"torch {about['packages']['torch']}, {about['platform']}, one thread."
    (folder / f"{name}.md").write_text("\n".join([*lines, "", where, ""]))
    sections = [(folder / f"{part}.md").read_text() for part in ORDER if (folder / f"{part}.md").exists()]
    head = "# Memory: measured\n\nWritten by `make bench-memory`; figures behind it in [memory/](memory).\n"
    if scope.is_quick:
        head += "\n**Quick form: one small model, once. Figures mean nothing, and texts are those of the long form.**\n"
    (folder.parent / "memory.md").write_text("\n".join([head, *sections]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=ORDER)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="in seconds, for one small model: figures mean nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.quick:
        global scope
        scope = QUICK
    folder = options.out / "memory"
    folder.mkdir(parents=True, exist_ok=True)
    commands = {
        "planning": planning,
        "prediction": prediction,
        "models": models,
        "tenth": tenth,
        "floors": floors,
        "rungs": rungs,
        "federation": federation,
    }
    commands[options.what](folder)


if __name__ == "__main__":
    main()
