"""A small problem on which whole rounds run in milliseconds. Importable, since workers build its model by name."""

from __future__ import annotations

import contextlib
import math
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scalefl.conversion import convert
from scalefl.costs import step_cost
from scalefl.data import FederatedData
from scalefl.engines.local import LocalEngine
from scalefl.loop import federate
from scalefl.methods import METHODS, PRESETS
from scalefl.models.spec import ModelSpec, load_object
from scalefl.objectives import TaskLoss
from scalefl.params import Params
from scalefl.problem import Batch, Classification, Column, Problem
from scalefl.record import MEASURED, RoundRecord
from scalefl.rng import generator
from scalefl.run_folder import RunFolder, read_json
from scalefl.sampling import Sampler, UniformSampler
from scalefl.steps import full_step
from scalefl.tracking import figures
from scalefl.types import ClientInfo, LocalWork, Method, ServerState

NUM_CLASSES = 3
IMAGE = (1, 8, 8)
WORK = LocalWork(epochs=1, batch_size=8, lr=0.05)
PROBLEM = Classification(NUM_CLASSES, (Column("x", IMAGE, "float32"),))


def tiny(width: float = 1.0, norm: str = "batch", dropout: float = 0.0) -> nn.Module:
    """Three units with two cuts between them."""
    c = max(1, round(6 * width))
    return nn.Sequential(_unit(1, c, norm), _unit(c, c, norm), _head(c, dropout))


def binary() -> nn.Module:
    """Fewer outputs than the problem has classes."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2))


def deadly() -> nn.Module:
    """`tiny`, but it raises or aborts on a marked example, as an out-of-memory kill or a bug would."""
    return nn.Sequential(_Trap(), *tiny())


class _Trap(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        mark = float(x.max())
        if mark == ABORTS:
            os.abort()
        if mark == RAISES:
            raise ValueError("the camera is\nbroken")
        return x


RAISES, ABORTS = 1e6, 2e6
"""Pixels on which `deadly` fails."""


def _unit(a: int, b: int, norm: str) -> nn.Module:
    norms = {"batch": nn.BatchNorm2d, "group": lambda c: nn.GroupNorm(1, c), "none": lambda c: nn.Identity()}
    return nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=norm == "none"), norms[norm](b), nn.ReLU())


def _head(c: int, dropout: float) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(c, c, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(c, NUM_CLASSES),
    )


def spec(**arguments: Any) -> ModelSpec:
    """The spec of `tiny`."""
    return ModelSpec.of("support:tiny", **arguments)


def examples_of(seed: int, count: int, labels: Sequence[int] = tuple(range(NUM_CLASSES))) -> dict[str, Tensor]:
    """Images with a bright corner that says the label."""
    draw = generator(seed, "support")
    y = torch.tensor(labels)[torch.randint(0, len(labels), (count,), generator=draw)]
    x = 0.5 * torch.randn(count, *IMAGE, generator=draw)
    x[:, 0, :4, :4] += (y.float() - 1)[:, None, None]
    return {"x": x, "label": y}


Spoilt = dict[int, float] | None


class MadeData:
    """`FederatedData` whose rows are made when asked for; `spoilt` clients hold pixels that `deadly` fails on."""

    def __init__(
        self, sizes: Sequence[int], problem: Problem = PROBLEM, spoilt: dict[int, float] | None = None
    ) -> None:
        self.problem = problem
        self.sizes, self.spoilt = sizes, spoilt or {}
        self.validation: Batch = examples_of(10**6, 30)
        self.test: Batch = examples_of(10**6 + 1, 30)

    @property
    def num_clients(self) -> int:
        return len(self.sizes)

    def num_examples(self, client: int) -> int:
        return self.sizes[client]

    def label_counts(self, client: int) -> Tensor:
        return torch.bincount(self.examples(client)["label"], minlength=NUM_CLASSES)

    def examples(self, client: int) -> Batch:
        labels = (client % NUM_CLASSES,) if client % 4 == 3 else tuple(range(NUM_CLASSES))
        made = examples_of(client, self.num_examples(client), labels)
        if client in self.spoilt:
            made["x"][0] = self.spoilt[client]
        return made


@dataclass(frozen=True)
class Clients:
    """A population with a budget for each client, in turn."""

    data: FederatedData
    budgets: tuple[int, ...]

    @property
    def smallest_memory_bytes(self) -> int:
        return min(self.budgets)

    @property
    def largest_memory_bytes(self) -> int:
        return max(self.budgets)

    def __len__(self) -> int:
        return self.data.num_clients

    def __getitem__(self, index: int) -> ClientInfo:
        budget = self.budgets[index % len(self.budgets)]
        classes = tuple(self.data.label_counts(index).nonzero().flatten().tolist())
        return ClientInfo(index, self.data.num_examples(index), budget, f"{budget}B", 1e9, 1e6, classes)


def full_bytes(model: ModelSpec | None = None, work: LocalWork = WORK) -> int:
    """The peak of training the whole model."""
    return step_cost(full_step(model or spec(), PROBLEM, work), PROBLEM, TaskLoss()).peak_bytes


def make_method(name: str, **settings: Any) -> Method:
    """A method or preset by name, as a config makes it."""
    merged = {"name": name, **PRESETS.get(name, {}), **settings}
    if name in PRESETS:
        merged["name"] = PRESETS[name]["name"]
    target = load_object(METHODS[merged.pop("name")])
    work = merged.pop("work", WORK)
    return replace(convert(merged, target, "method"), work=work)


def play(
    method: Method,
    engine: LocalEngine | Any,
    rounds: int,
    *,
    state: ServerState | None = None,
    model: ModelSpec | None = None,
    problem: Problem = PROBLEM,
    seed: int = 1,
    cohort: int = 4,
    sample: Sampler | None = None,
) -> tuple[list[ServerState], list[RoundRecord]]:
    """The states from before the first round to after the last, and the records."""
    if state is None:
        least = engine.population().smallest_memory_bytes
        state = method.init(model or spec(), problem, seed=seed, smallest_memory_bytes=least)
    states, records = [state], []
    going: Iterator[tuple[ServerState, RoundRecord]] = federate(method, engine, sample or UniformSampler(cohort), state)
    for _ in range(rounds):
        state, record = next(going)
        states.append(state)
        records.append(record)
    return states, records


def comparable(record: RoundRecord) -> RoundRecord:
    """Without what two equal runs do not share."""
    return replace(
        record,
        seconds=0.0,
        measured_peak_bytes=None,
        peaks=shared_fields(record.peaks),
        lost=shared_fields(record.lost),
    )


def shared_fields(content: Any) -> Any:
    """Lines of a journal, or any part of it, without what two equal runs do not share."""
    if isinstance(content, list):
        return [shared_fields(item) for item in content]
    if isinstance(content, dict):
        return {key: shared_fields(value) for key, value in content.items() if key not in MEASURED}
    return content


def copied(params: Params) -> dict[str, Tensor]:
    """The same tensors in memory of their own."""
    return {name: t.detach().clone() for name, t in params.items()}


def identical(a: Params, b: Params) -> bool:
    """Whether names, shapes, dtypes and every bit agree (NaN equals the same NaN)."""
    return a.keys() == b.keys() and all(_same_bits(a[name], b[name]) for name in a)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(_bits(a), _bits(b))


def _bits(t: Tensor) -> Tensor:
    return t.detach().contiguous().reshape(-1).view(torch.uint8)


def global_rng() -> tuple[Any, ...]:
    """The state of every global generator, comparable with ==."""
    kind, keys, *rest = np.random.get_state()
    return tuple(torch.get_rng_state().tolist()), (kind, tuple(keys.tolist()), *rest), random.getstate()


def all_finite(values: Any) -> bool:
    """Whether every number is finite."""
    return all(math.isfinite(v) for v in values)


def children(pid: int | str = "self") -> list[int]:
    """Process ids of all that this process has started, and what these have (workers)."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *children(child)]
    return found


def workers_of(engine: LocalEngine) -> list[int]:
    """Process ids of an engine's workers."""
    return [worker._process.pid for worker in engine._workers]


def kill_workers(engine: LocalEngine) -> list[int]:
    """Kill all workers of an engine; their process ids."""
    killed = workers_of(engine)
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    return killed


def waited(condition: Callable[[], bool]) -> None:
    """Wait until something holds."""
    give_up = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.02)


def journalled(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What a copy of the run in `folder` has to have: each number of each round once, and the summary's."""
    files = RunFolder(folder)
    found: dict[str, list[tuple[int, float]]] = {}
    for line in files.read_journal():
        for name, value in figures(line).items():
            found.setdefault(name, []).append((line["round"], value))
    if files.summary.exists():
        summary = read_json(files.summary)
        for part in ("test", "low_memory_test"):
            for name, value in summary[part].items():
                if value is not None:
                    found[f"summary/{part}/{name}"] = [(summary["rounds"], value)]
    return found


def in_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard reads of the run in `folder`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def mlflow_run(folder: Path) -> Any:
    """The run in `folder`, as MLflow has it."""
    from mlflow import MlflowClient

    return MlflowClient().get_run(read_json(RunFolder(folder).mlflow)["run_id"])


def in_mlflow(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What MLflow has of the run in `folder`."""
    from mlflow import MlflowClient

    run, client = mlflow_run(folder), MlflowClient()
    history = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    return {name: sorted((metric.step, metric.value) for metric in metrics) for name, metrics in history.items()}


def has_all(copy: dict[str, list[tuple[int, float]]], folder: Path) -> bool:
    """Whether a copy has each number of the run in `folder` once, and nothing else but more of the summary."""
    wanted = journalled(folder)
    if any(name not in wanted and not name.startswith("summary/") for name in copy):
        return False
    for name, values in wanted.items():
        found = copy.get(name, [])
        if [step for step, _ in found] != [step for step, _ in values]:
            return False
        pairs = [(a, b) for (_, a), (_, b) in zip(found, values, strict=True)]
        if not all(math.isclose(a, b, rel_tol=1e-6) or (math.isnan(a) and math.isnan(b)) for a, b in pairs):
            return False
    return True
