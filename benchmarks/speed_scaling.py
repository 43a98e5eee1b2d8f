"""What a round costs as work grows: with the cohort, the population, the model, and the number of blocks.

    python benchmarks/speed_scaling.py [--rounds 3] [--quick]

Prints a JSON line for each point, which runs in a process of its own: one thread, clients in that process.
`benchmarks/speed.py` makes tables and pictures of it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

from scalefl.data import Devices, MemoryClass
from scalefl.data.population import SimulatedPopulation
from scalefl.engines.local import LocalEngine
from scalefl.loop import federate
from scalefl.methods.fedavg import FedAvg
from scalefl.methods.scalefl import ScaleFL
from scalefl.models.spec import ModelSpec
from scalefl.problem import Batch, Classification, Column
from scalefl.rng import generator
from scalefl.sampling import UniformSampler
from scalefl.types import LocalWork, Method

MIB = 2**20
WORK = LocalWork(batch_size=16, lr=0.01)
POINTS: dict[str, list[float]] = {
    "clients a round": [10, 30, 100, 300, 1000],
    "population": [100, 1_000, 10_000, 100_000, 1_000_000],
    "model": [0.1, 0.25, 0.5, 1.0, 1.5],
    "blocks": [1, 2, 4, 8, 16],
}
QUICK_POINTS: dict[str, list[float]] = {"clients a round": [2, 4], "population": [5, 10], "model": [0.1], "blocks": [2]}


@dataclass(frozen=True)
class Images:
    """Noise with labels, made when a client is asked: nothing is held for those that are not."""

    num_clients: int
    examples_each: int = 32
    problem: Any = Classification(10, (Column("image", (3, 32, 32), "uint8"),))

    def num_examples(self, client: int) -> int:
        return self.examples_each

    def label_counts(self, client: int) -> torch.Tensor:
        return torch.bincount(self.examples(client)["label"], minlength=10)

    def examples(self, client: int) -> Batch:
        draw = generator(0, "examples", client)
        pixels = torch.randint(0, 256, (self.examples_each, 3, 32, 32), dtype=torch.uint8, generator=draw)
        return {"image": pixels, "label": torch.randint(0, 10, (self.examples_each,), generator=draw)}

    @property
    def validation(self) -> Batch:
        return self.examples(0)

    @property
    def test(self) -> Batch:
        return self.examples(0)


def setting(what: str, value: float) -> tuple[Images, ModelSpec, Method, int]:
    """Data, model, method and clients a round of a point."""
    small = ModelSpec.of("scalefl.models.resnet:resnet10", width=0.125, norm="group")
    if what == "clients a round":
        return Images(2_000), small, FedAvg(work=WORK), int(value)
    if what == "population":
        return Images(int(value)), small, FedAvg(work=WORK), min(50, int(value))
    if what == "model":
        return Images(100), ModelSpec.of("scalefl.models.resnet:resnet18", width=value), FedAvg(work=WORK), 4
    deep = ModelSpec.of("scalefl.models.resnet:resnet34", width=0.25)
    return Images(100), deep, ScaleFL(work=WORK, blocks=int(value), spans="single", tails=False), 4


def point(what: str, value: float, rounds: int) -> dict[str, Any]:
    """Seconds of a round, of all blocks' turns where there are blocks; and the most that the process held."""
    data, model, method, cohort = setting(what, value)
    device = MemoryClass(name="all", share=1.0, memory="1000%", flops_per_second=1e9, bandwidth_bytes_per_second=1e6)
    clients = SimulatedPopulation(data, Devices(classes=(device,)), 2**36, seed=0)
    state = method.init(model, data.problem, seed=0, smallest_memory_bytes=2**36)
    turns = int(value) if what == "blocks" else 1
    seconds, flops = [], 0.0
    with LocalEngine(data, clients) as engine:
        going = federate(method, engine, UniformSampler(cohort), state)
        for number in range((rounds + 1) * turns):
            start = time.perf_counter()
            _, record = next(going)
            if number >= turns:  # the first of each are planned, and warm up
                seconds.append(time.perf_counter() - start)
                flops += record.flops
    return {
        "what": what,
        "value": value,
        "parameters": sum(t.numel() for t in state.params.values()),
        "seconds": statistics.mean(seconds) if turns > 1 else statistics.median(seconds),
        "gflop": flops / len(seconds) / 1e9,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs=2, metavar=("WHAT", "VALUE"), help="one point, in this process")
    parser.add_argument("--quick", action="store_true", help="few and small points, and one round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only:
        print(json.dumps(point(options.only[0], float(options.only[1]), options.rounds)), flush=True)
        return
    for what, values in (QUICK_POINTS if options.quick else POINTS).items():
        for value in values:
            rounds = 1 if options.quick else options.rounds
            command = [sys.executable, __file__, "--rounds", str(rounds), "--only", what, str(value)]
            subprocess.run(command, check=True, env=dict(os.environ))


if __name__ == "__main__":
    main()
