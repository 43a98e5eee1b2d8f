"""Seconds and FLOPs of a client's local epoch by stage, and by memory format, beside full training of the same model.

    python benchmarks/speed_blocks.py stages|stages-last|formats --repeats 9

Prints a JSON line for each. Everything is trained by the client's own loop, in this process, on one thread, by CPU
time; who is compared takes turns. `benchmarks/speed.py` makes tables of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch

from scalefl.client import Residents, run_task
from scalefl.costs import step_cost
from scalefl.measure import keep_freed_memory
from scalefl.mentor import Mentor
from scalefl.methods.fedavg import FedAvg
from scalefl.methods.scalefl import ScaleFL
from scalefl.models.spec import ModelSpec
from scalefl.problem import Batch, Classification, Column
from scalefl.types import ClientTask, LocalWork, Means, Method, ServerState, Step

PROBLEM = Classification(10, (Column("image", (3, 32, 32), "uint8"),))
WORK = LocalWork(batch_size=32, lr=0.001, weight_decay=0.0)
LAST = replace(WORK, memory_format="channels_last")
CACHED_EPOCHS = 5
PLENTY = 2**50
MODELS = {
    "CNN": ModelSpec.of("scalefl.models.cnn:cnn"),
    "ResNet-10, 16 channels, group norm": ModelSpec.of("scalefl.models.resnet:resnet10", width=0.25, norm="group"),
    "ResNet-18": ModelSpec.of("scalefl.models.resnet:resnet18"),
    "ResNet-34": ModelSpec.of("scalefl.models.resnet:resnet34"),
    "VGG-11": ModelSpec.of("scalefl.models.vgg:vgg11_bn"),
    "SqueezeNet": ModelSpec.of("scalefl.models.squeezenet:squeezenet"),
    "ViT": ModelSpec.of("scalefl.models.vit:vit"),
}
MEMORY_BOUND = ("CNN", "ResNet-10, 16 channels, group norm", "VGG-11", "SqueezeNet")
"""Where pooling, norms and large linear layers take a part of the time that FLOPs do not show."""
BATCHES, OF_LARGE_MODELS = 8, 2
"""In an epoch. What a client does once for all of them takes a millisecond, and a batch of a large model a second."""
STAGED: dict[str, dict[str, Any]] = {
    "blocks alone": {"mentor": None, "coadapted_layers": 0},
    "co-adapted": {"mentor": None, "coadapted_layers": 1},
    "with mentor": {"mentor": Mentor(), "coadapted_layers": 1},
}


@dataclass(frozen=True)
class Case:
    """A step to be timed, and what a row says of it."""

    about: dict[str, Any]
    method: Method
    state: ServerState
    step: Step

    @property
    def flops(self) -> float:
        """Predicted, for an example and an epoch."""
        return step_cost(self.step, PROBLEM, self.method.objective(self.step)).flops_per_example

    def seconds(self, examples: Batch, residents: Residents) -> float:
        """CPU seconds of an epoch."""
        params = {name: self.state.params[name] for name in self.step.part.names()}
        own = {name: t.clone() if name in self.step.moving else t for name, t in params.items()}
        task = ClientTask(0, 0, (self.step,), seed=0)
        start = time.process_time()
        run_task(self.method, PROBLEM, residents, task, own, examples)
        return (time.process_time() - start) / self.step.work.epochs


def made_examples(batches: int) -> Batch:
    draw = torch.Generator().manual_seed(0)
    count = batches * WORK.batch_size
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=draw)
    return {"image": pixels, "label": torch.randint(0, 10, (count,), generator=draw)}


def whole(model: ModelSpec, about: dict[str, Any], work: LocalWork = WORK) -> Case:
    """Full training."""
    method = FedAvg(work=work)
    state = method.init(model, PROBLEM, seed=0, smallest_memory_bytes=PLENTY)
    return Case(about, method, state, method.menu(state)[0].step)


def stages(model: ModelSpec, usual: LocalWork = WORK) -> Iterator[Case]:
    """Each block of four, as the paper trains it and with parts of that left out; and from cached features."""
    for variant, settings in STAGED.items():
        method = ScaleFL(work=usual, spans="single", tails=False, outputs="plain", **settings)
        state = method.init(model, PROBLEM, seed=0, smallest_memory_bytes=PLENTY)
        offers = [offer for offer in method.menu(state) if not offer.fallback]
        for number, offer in enumerate(offers, 1):
            yield Case({"variant": variant, "stage": number}, method, state, offer.step)
            if variant == "blocks alone" and offer.step.part.entry is not None:
                work = replace(usual, epochs=CACHED_EPOCHS)
                step = replace(offer.step, work=work, means=Means(prefix="cached"))
                yield Case({"variant": "from cached features", "stage": number}, method, state, step)


def measured(cases: list[Case], repeats: int) -> Iterator[dict[str, Any]]:
    """A row for each case: what it takes of the first one's seconds and FLOPs."""
    batches = BATCHES if cases[0].about["model"] in MEMORY_BOUND else OF_LARGE_MODELS
    examples, residents = made_examples(batches), Residents()
    seconds: list[list[float]] = [[] for _ in cases]
    for repeat in range(repeats + 1):
        for case, found in zip(cases, seconds, strict=True):
            taken = case.seconds(examples, residents)
            if repeat:  # the first warms up
                found.append(taken)
    for case, found in zip(cases, seconds, strict=True):
        ratios = sorted(mine / whole for mine, whole in zip(found, seconds[0], strict=True))
        yield {
            **case.about,
            "milliseconds_a_batch": 1000 * statistics.median(found) / batches,
            "flops": case.flops / cases[0].flops,
            "time": statistics.median(ratios),
            "time_low": ratios[len(ratios) // 4],
            "time_high": ratios[-1 - len(ratios) // 4],
        }


def cases_by_stage(models: Iterable[str] = tuple(MODELS), work: LocalWork = WORK) -> Iterator[list[Case]]:
    for name in models:
        first = whole(MODELS[name], {"variant": "full training", "stage": 0}, work)
        yield [replace(case, about={"model": name, **case.about}) for case in (first, *stages(MODELS[name], work))]


def cases_by_format() -> Iterator[list[Case]]:
    for name, model in MODELS.items():
        yield [whole(model, {"model": name, "format": w.memory_format}, w) for w in (WORK, LAST)]


COMMANDS: dict[str, Callable[[], Iterator[list[Case]]]] = {
    "stages": cases_by_stage,
    "stages-last": lambda: cases_by_stage(MEMORY_BOUND, LAST),
    "formats": cases_by_format,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=list(COMMANDS))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="the first model, the smallest, alone")
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    for cases in islice(COMMANDS[options.what](), 1 if options.quick else None):
        for row in measured(cases, options.repeats):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
