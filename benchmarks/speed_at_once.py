"""Clients with equal tasks in one vectorised run, beside one after another.

    python benchmarks/speed_at_once.py --repeats 9

Prints a JSON line for each model, method and number of clients. In this process, on one thread, by CPU time; both ways
take turns. `benchmarks/speed.py` makes a table of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from scalefl.client import Residents, run_task
from scalefl.measure import keep_freed_memory
from scalefl.methods.fedavg import FedAvg
from scalefl.methods.scalefl import ScaleFL
from scalefl.models.spec import ModelSpec
from scalefl.problem import Classification, Column
from scalefl.types import ClientTask, LocalWork, Method
from scalefl.vectorized import run_vectorized

WORK = LocalWork(batch_size=10, lr=0.01)
EXAMPLES = 50
DIGIT, PHOTO, VECTOR = (1, 28, 28), (3, 32, 32), (64,)
TOGETHER = (4, 16)
BY_METHOD: dict[str, Method] = {
    "FedAvg": FedAvg(work=WORK),
    "ScaleFL": ScaleFL(work=WORK, spans="single", tails=False),
}


@dataclass(frozen=True)
class Case:
    """A model, and what its examples look like."""

    name: str
    model: ModelSpec
    shape: tuple[int, ...]
    methods: tuple[str, ...] = ("FedAvg",)


def cnn(**arguments: object) -> ModelSpec:
    return ModelSpec.of("scalefl.models.cnn:cnn", **arguments)


def resnet(width: float, channels: int, norm: str) -> ModelSpec:
    return ModelSpec.of("scalefl.models.resnet:resnet10", width=width, in_channels=channels, norm=norm)


CASES = (
    Case("softmax regression, 64 features", ModelSpec.of("torch.nn:Linear", in_features=64, out_features=10), VECTOR),
    Case(
        "CNN of 4 and 8 channels, 28×28",
        cnn(width=0.125, in_channels=1, image_size=28),
        DIGIT,
    ),
    Case("ResNet-10 of 4 channels, batch norm, 28×28", resnet(0.0625, 1, "batch"), DIGIT, ("FedAvg", "ScaleFL")),
    Case("ResNet-10 of 4 channels, group norm, 28×28", resnet(0.0625, 1, "group"), DIGIT, ("FedAvg", "ScaleFL")),
    Case("ResNet-10 of 16 channels, group norm, 32×32", resnet(0.25, 3, "group"), PHOTO, ("FedAvg", "ScaleFL")),
    Case("CNN of 32 and 64 channels, 32×32", cnn(), PHOTO),
)


def ways(case: Case, method: Method, count: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """So many clients one after another, and at once: what the method's menu offers first."""
    dtype = "uint8" if len(case.shape) == 3 else "float32"
    problem = Classification(10, (Column("x", case.shape, dtype),))
    state = method.init(case.model, problem, seed=0, smallest_memory_bytes=2**50)
    step = method.menu(state)[0].step
    draw = torch.Generator().manual_seed(0)

    def client() -> dict[str, torch.Tensor]:
        x = torch.rand(EXAMPLES, *case.shape, generator=draw)
        x = x if dtype == "float32" else (255 * x).to(torch.uint8)
        return {"x": x, "label": torch.randint(0, 10, (EXAMPLES,), generator=draw)}

    examples = [client() for _ in range(count)]
    tasks = [ClientTask(i, 0, (step,), seed=i) for i in range(count)]
    sent = {name: state.params[name] for name in step.part.names()}
    residents = Residents(measured=False)

    def alone() -> None:
        for task, mine in zip(tasks, examples, strict=True):
            own = {name: t.clone() if name in task.moving else t for name, t in sent.items()}
            run_task(method, problem, residents, task, own, mine)

    def at_once() -> None:
        run_vectorized(method, problem, residents, tasks, [sent] * count, examples)

    return alone, at_once


def cpu_seconds(do: Callable[[], None]) -> float:
    start = time.process_time()
    do()
    return time.process_time() - start


def rows(cases: Sequence[Case], repeats: int) -> Iterator[dict[str, object]]:
    for case in cases:
        for name in case.methods:
            for count in TOGETHER:
                alone, at_once = ways(case, BY_METHOD[name], count)
                alone(), at_once()  # warm up
                seconds, shares = [], []
                for turn in range(repeats):
                    first, second = (alone, at_once) if turn % 2 else (at_once, alone)
                    taken = {first: cpu_seconds(first), second: cpu_seconds(second)}
                    seconds.append(taken[alone] / count)
                    shares.append(taken[at_once] / taken[alone])
                quartiles = statistics.quantiles(shares, n=4)
                yield {
                    "model": case.name,
                    "method": name,
                    "clients": count,
                    "milliseconds_a_client": 1000 * statistics.median(seconds),
                    "time": quartiles[1],
                    "time_low": quartiles[0],
                    "time_high": quartiles[2],
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="the first model, the smallest, alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    for row in rows(CASES[: 1 if options.quick else None], options.repeats):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
