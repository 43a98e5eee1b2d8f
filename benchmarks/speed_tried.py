"""Other ways to take the same SGD steps, beside plain ones: what they could do for a framework, on this machine.

    python benchmarks/speed_tried.py --repeats 9

Prints a JSON line for each way and model. Plain PyTorch, in processes of their own, on one thread, by CPU time; each
way takes turns with plain steps. `benchmarks/speed.py` makes a table of it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalefl.measure import keep_freed_memory

sys.path.insert(0, str(Path(__file__).parent / "speed_peers"))
import plain

STEPS, TOGETHER = 5, 4
BATCHES = {"cnn": 10, "resnet10": 32}


class Work:
    """`TOGETHER` clients with a batch for each of their steps: x [clients, steps, B, 3, 32, 32]."""

    def __init__(self, name: str) -> None:
        draw = torch.Generator().manual_seed(0)
        size = (TOGETHER, STEPS, BATCHES[name])
        self.model = plain.make(name)
        self.start = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.x = torch.randn(*size, 3, 32, 32, generator=draw)
        self.y = torch.randint(0, 10, size, generator=draw)


def one_by_one(work: Work, model: nn.Module | None = None, **sgd: Any) -> None:
    """Client after client, as a bare loop trains them."""
    runs = work.model if model is None else model
    for xs, ys in zip(work.x, work.y, strict=True):
        with torch.no_grad():
            for name, p in work.model.named_parameters():
                p.copy_(work.start[name])
        optimizer = torch.optim.SGD(work.model.parameters(), lr=0.01, momentum=0.9, **sgd)
        for x, y in zip(xs, ys, strict=True):
            loss = F.cross_entropy(runs(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def together(work: Work) -> None:
    """All clients in one call: torch.func's vmap over weights that differ."""

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(work.model, weights, (x,)), y)

    weights = {name: t.expand(TOGETHER, *t.shape).clone() for name, t in work.start.items()}
    momentum = {name: torch.zeros_like(t) for name, t in weights.items()}
    gradients = torch.func.vmap(torch.func.grad(loss))
    for step in range(STEPS):
        for name, gradient in gradients(weights, work.x[:, step], work.y[:, step]).items():
            weights[name].sub_(momentum[name].mul_(0.9).add_(gradient), alpha=0.01)


def in_bfloat16(work: Work) -> None:
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        one_by_one(work)


def ways(work: Work) -> Iterator[tuple[str, Callable[[], None]]]:
    """Each way, by name; "plain" is what the others are held against."""
    yield "plain", lambda: one_by_one(work)
    yield "foreach updates", lambda: one_by_one(work, foreach=True)
    yield "fused updates", lambda: one_by_one(work, fused=True)
    yield f"{TOGETHER} clients at once (vmap)", lambda: together(work)
    yield "bfloat16", lambda: in_bfloat16(work)


def compiled(name: str, repeats: int) -> None:
    """`torch.compile`, in a process of its own for an empty cache, and one that finds the cache of the first."""
    work = Work(name)
    start = time.process_time()
    model = torch.compile(work.model)
    one_by_one(work, model)
    first = time.process_time() - start
    shares = turns(lambda: one_by_one(work), lambda: one_by_one(work, model), repeats)
    print(json.dumps({**row(name, "torch.compile", shares), "first_seconds": first}), flush=True)


def cpu_seconds(do: Callable[[], None]) -> float:
    start = time.process_time()
    do()
    return time.process_time() - start


def turns(usual: Callable[[], None], other: Callable[[], None], repeats: int) -> list[float]:
    """How long one takes, of the other, turn by turn."""
    usual(), other()  # warm up
    shares = []
    for number in range(repeats):
        if number % 2:  # who goes first alternates
            seconds = cpu_seconds(other)
            shares.append(seconds / cpu_seconds(usual))
        else:
            seconds = cpu_seconds(usual)
            shares.append(cpu_seconds(other) / seconds)
    return shares


def row(name: str, way: str, shares: list[float]) -> dict[str, Any]:
    quartiles = statistics.quantiles(shares, n=4)
    return {"model": name, "way": way, "time": quartiles[1], "time_low": quartiles[0], "time_high": quartiles[2]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="the first model alone, and nothing compiled")
    parser.add_argument("--compiled", choices=list(BATCHES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    if options.compiled:
        compiled(options.compiled, options.repeats)
        return
    for name in list(BATCHES)[: 1 if options.quick else None]:
        (_, usual), *others = ways(Work(name))
        for way, other in others:
            print(
                json.dumps({**row(name, way, turns(usual, other, options.repeats)), "first_seconds": 0.0}), flush=True
            )
        if options.quick:
            continue
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, __file__, "--compiled", name, "--repeats", str(options.repeats)]
            where = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
            found = [subprocess.run(command, env=where, check=True, capture_output=True, text=True) for _ in range(2)]
        for cache_is, done in zip(("nothing", "all of it"), found, strict=True):
            told = json.loads(done.stdout.splitlines()[-1])
            print(json.dumps({**told, "way": f"torch.compile, {cache_is} compiled before"}), flush=True)


if __name__ == "__main__":
    main()
