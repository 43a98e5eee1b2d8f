"""What the local engine costs over a bare PyTorch loop that does the same local steps: interleaved pairs.

    python benchmarks/engine.py --out docs/benchmarks/engine

A bare loop holds one model, copies the global weights into it for each client, trains with torch.optim.SGD and
adds the result to a running mean. Both train on the same synthetic CIFAR-shaped clients, one thread each.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from scalefl import types
from scalefl.data import Devices, MemoryClass
from scalefl.data.population import SimulatedPopulation
from scalefl.engines.local import LocalEngine
from scalefl.experiment import environment
from scalefl.loop import federate
from scalefl.methods.fedavg import FedAvg
from scalefl.models.spec import ModelSpec
from scalefl.problem import Batch, Classification, Column
from scalefl.sampling import UniformSampler


@dataclass(frozen=True)
class Workload:
    name: str
    model: ModelSpec
    clients: int
    examples: int
    cohort: int
    work: types.LocalWork


WORKLOADS = (
    Workload(
        "A: two-convolution CNN, 50 clients of 50 examples a round, batch 10",
        ModelSpec.of("scalefl.models.cnn:cnn"),
        200,
        50,
        50,
        types.LocalWork(batch_size=10, lr=0.1, momentum=0, weight_decay=0),
    ),
    Workload(
        "B: ResNet-10 (16 channels, GroupNorm), 10 clients of 200 examples a round, batch 32",
        ModelSpec.of("scalefl.models.resnet:resnet10", width=0.25, norm="group"),
        50,
        200,
        10,
        types.LocalWork(batch_size=32, lr=0.05, weight_decay=0),
    ),
)


class SyntheticClients:
    """CIFAR-shaped noise with labels; all in memory, as a bare loop would hold it."""

    def __init__(self, workload: Workload) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (workload.clients, workload.examples)
        self._x = torch.randint(0, 256, (*shape, 3, 32, 32), dtype=torch.uint8, generator=generator)
        self._y = torch.randint(0, 10, shape, generator=generator)
        self.problem = Classification(10, (Column("image", (3, 32, 32), "uint8"),))
        self.num_clients = workload.clients

    def num_examples(self, client: int) -> int:
        return self._x.shape[1]

    def label_counts(self, client: int) -> torch.Tensor:
        return torch.bincount(self._y[client], minlength=10)

    def examples(self, client: int) -> Batch:
        return {"image": self._x[client], "label": self._y[client]}

    validation = test = property(lambda self: self.examples(0))


def scalefl_rounds(workload: Workload, data: SyntheticClients) -> Iterator[None]:
    everything = MemoryClass(name="all", share=1.0, memory=10.0, flops_per_second=1e9, bandwidth_bytes_per_second=1e6)
    clients = SimulatedPopulation(data, Devices(classes=(everything,)), 2**40, seed=0)
    method = FedAvg(work=workload.work)
    state = method.init(workload.model, data.problem, seed=0, smallest_memory_bytes=2**40)
    with LocalEngine(data, clients, threads=1) as engine:
        for _ in federate(method, engine, UniformSampler(workload.cohort), state):
            yield


def bare_rounds(workload: Workload, data: SyntheticClients) -> Iterator[None]:
    model, work = workload.model.build(0), workload.work
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    for number in itertools.count():
        chosen = torch.randperm(data.num_clients, generator=torch.Generator().manual_seed(number))
        total = {name: torch.zeros_like(t) for name, t in weights.items()}
        for client in chosen[: workload.cohort].tolist():
            bare_client(model, weights, work, data.examples(client))
            for name, t in model.state_dict().items():
                total[name] += t / workload.cohort
        weights = total
        yield


def bare_client(model: torch.nn.Module, weights: dict, work: types.LocalWork, examples: Batch) -> None:
    model.load_state_dict(weights)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=work.lr, momentum=work.momentum)
    for rows in torch.randperm(len(examples["label"])).split(work.batch_size):
        x = examples["image"][rows].float().div_(255).sub_(0.5).div_(0.5)
        loss = F.cross_entropy(model(x), examples["label"][rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def timed(rounds: Iterator[None], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        next(rounds)
    return time.perf_counter() - start


def pairs(workload: Workload, count: int, rounds: int) -> list[tuple[float, float]]:
    data = SyntheticClients(workload)
    makers: tuple[Callable[..., Iterator[None]], ...] = (scalefl_rounds, bare_rounds)
    ours, bare = (make(workload, data) for make in makers)
    timed(ours, 1), timed(bare, 1)  # warm up
    found = []
    for i in range(count):  # who goes first alternates
        if i % 2:
            b = timed(bare, rounds)
            found.append((timed(ours, rounds), b))
        else:
            found.append((timed(ours, rounds), timed(bare, rounds)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = ["| workload | ScaleFL, s a round | bare loop, s a round | ratio, median | ratio, range |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for workload in WORKLOADS:
        found = pairs(workload, options.pairs, options.rounds)
        ratios = sorted(ours / bare for ours, bare in found)
        ours, bare = (statistics.median(p[i] for p in found) / options.rounds for i in (0, 1))
        lines.append(
            f"| {workload.name} | {ours:.2f} | {bare:.2f} | {statistics.median(ratios):.3f} "
            f"| {ratios[0]:.3f}-{ratios[-1]:.3f} |"
        )
        print(lines[-1], flush=True)
    about = environment()
    where = f"torch {about['packages']['torch']}, {about['platform']}, one thread, {options.pairs} interleaved pairs"
    options.out.with_suffix(".md").write_text("\n".join(lines) + f"\n\n{where}\n")


if __name__ == "__main__":
    main()
