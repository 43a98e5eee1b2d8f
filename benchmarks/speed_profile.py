"""Where the time of a round goes: torch's profiler over rounds of the demo and of a round of small clients.

    python benchmarks/speed_profile.py [--quick]

Prints a JSON line for each kind of operation and job. Everything runs in this process, on one thread. Operations are
counted by their own time, without what they call; what is left of the process's CPU time is Python, and the profiler.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from scalefl.bench import WORKLOADS, Crew, Federation
from scalefl.config import load_config
from scalefl.engines.local import LocalEngine
from scalefl.experiment import Experiment
from scalefl.loop import federate
from scalefl.sampling import UniformSampler

ROUNDS = 2
KINDS = {
    "convolutions, backward": ("convolution_backward",),
    "convolutions, forward": ("mkldnn_convolution", "convolution"),
    "pooling": ("pool",),
    "norms": ("norm",),
    "linear layers and nHSIC's kernels": ("addmm", "::mm", "bmm", "matmul", "linear", "cdist"),
    "SGD's updates": ("_foreach", "AccumulateGrad"),
    "activations, losses and sums": (
        "relu", "threshold", "softmax", "nll", "cross_entropy", "exp", "sum", "mean", "add", "mul", "div", "sub", "max",
    ),
    "copies, and memory made ready": ("copy", "empty", "zero", "fill", "clone", "index", "cat", "contiguous", "select"),
}  # fmt: skip
OTHER, PYTHON = "other operations", "Python, the round loop, the profiler"


def demo(*overrides: str) -> Iterator[Any]:
    """Rounds of the demo, or of one with other settings, as `make demo` runs it, without evaluations."""
    config = load_config(Path(__file__).parents[1] / "examples" / "demo.toml", overrides)
    experiment = Experiment(config)
    with LocalEngine(experiment.data, experiment.population, workers=0, threads=1) as engine:
        sampler = UniformSampler(config.clients_per_round)
        yield from federate(
            experiment.method, engine, sampler, experiment.initial_state(), is_looked_at=lambda round: False
        )


def small_clients(clients: int) -> Iterator[Any]:
    """Rounds of FedAvg like work A of the comparison with peers."""
    federation = Federation(replace(WORKLOADS[0], clients=clients, cohort=min(clients, WORKLOADS[0].cohort)))
    return federation.rounds(federation.workload.cohort, Crew(0, 1))


def kind_of(operation: str) -> str:
    return next((kind for kind, words in KINDS.items() if any(word in operation for word in words)), OTHER)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round, of a lighter demo and of few clients")
    options = parser.parse_args()
    torch.set_num_threads(1)
    jobs, count = (("the demo", demo()), ("small clients", small_clients(200))), ROUNDS
    if options.quick:
        lighter = demo('model="cnn"', "model_arguments={width=0.25}", "clients_per_round=2")
        jobs, count = (("the demo", lighter), ("small clients", small_clients(4))), 1
    for job, rounds in jobs:
        for _ in range(count):  # kernels are compiled, memory is taken
            next(rounds)
        start = time.process_time()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(count):
                next(rounds)
            taken = time.process_time() - start
        seconds: dict[str, float] = defaultdict(float)
        for event in profiler.key_averages():
            seconds[kind_of(event.key)] += event.self_cpu_time_total / 1e6
        seconds[PYTHON] = max(0.0, taken - sum(seconds.values()))
        for kind in sorted(seconds, key=seconds.__getitem__, reverse=True):
            print(json.dumps({"job": job, "kind": kind, "share": seconds[kind] / taken, "seconds": seconds[kind]}))


if __name__ == "__main__":
    main()
