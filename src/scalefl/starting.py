"""Start a run in the middle of a model, from the tensor at a cut; and prove that this gives the same numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from scalefl.models.spec import ModelSpec
from scalefl.models.stand_ins import Template, filled
from scalefl.partition import Entry
from scalefl.problem import Batch, Problem
from scalefl.rng import generator
from scalefl.tracing import PROBE_EXAMPLES, floating

NUM_EXAMPLES = PROBE_EXAMPLES + 1
"""Of the proof: another number than the probe's, so that a stand-in of a fixed size shows."""


@contextlib.contextmanager
def skipping(module: nn.Module, entry: Entry, given: list[Tensor]) -> Iterator[None]:
    """Inside the block, modules before `entry` return stand-ins, and the one at the cut the tensor in `given`.

    The tensor is taken out of the list: nothing here keeps it longer than the model itself does.
    """
    num_examples = len(given[0])
    changed = [(module.get_submodule(path), template) for path, template in entry.skipped]
    before = [vars(child).get("forward") for child, _ in changed]
    for (path, template), (child, _) in zip(entry.skipped, changed, strict=True):
        at_cut = path == entry.cut.module
        vars(child)["forward"] = _giving(entry, given) if at_cut else _returning(template, num_examples)
    try:
        yield
    finally:
        for (child, _), forward in zip(changed, before, strict=True):
            if forward is None:
                del vars(child)["forward"]
            else:
                vars(child)["forward"] = forward


def _returning(template: Template, num_examples: int) -> Any:
    def forward(*_args: Any, **_kwargs: Any) -> Any:
        return filled(template, num_examples)

    return forward


def _giving(entry: Entry, given: list[Tensor]) -> Any:
    template = dict(entry.skipped)[entry.cut.module]

    def forward(*_args: Any, **_kwargs: Any) -> Any:
        return filled(template, len(given[0]), entry.cut.position, given.pop())

    return forward


@lru_cache(maxsize=64)
def proven(model: ModelSpec, problem: Problem, entries: tuple[Entry | None, ...]) -> tuple[Entry | None, ...]:
    """The entries from which a run ends in the same logits, bit for bit, as one from the input; None for the others.

    Tried for real, on random examples and initial weights: something besides the one tensor may pass a cut without a
    gradient (a mask that a skipped module computes), or the modules after it may write into the tensor.
    """
    try:
        module = model.build(0).eval()
        batch = _random(problem.example(NUM_EXAMPLES))
        kept: dict[int, Tensor] = {}
        with torch.no_grad(), _keeping(module, entries, kept):
            logits = _logits(module, batch, problem)
    except Exception:  # a model that only runs on real data: it then runs from the input
        return (None,) * len(entries)
    return tuple(
        entry if entry and i in kept and _alike(module, batch, problem, entry, kept[i], logits) else None
        for i, entry in enumerate(entries)
    )


def _alike(module: nn.Module, batch: Batch, problem: Problem, entry: Entry, given: Tensor, expected: Tensor) -> bool:
    version = given._version
    try:
        with torch.no_grad(), skipping(module, entry, [given]):
            logits = _logits(module, batch, problem)
    except Exception:  # whatever a user's forward makes of stand-ins
        return False
    return given._version == version and torch.equal(logits.nan_to_num(), expected.nan_to_num())


@contextlib.contextmanager
def _keeping(module: nn.Module, entries: tuple[Entry | None, ...], kept: dict[int, Tensor]) -> Iterator[None]:
    def keep(number: int, position: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            kept[number] = floating(output)[position].clone()

        return hook

    with contextlib.ExitStack() as hooks:
        for number, entry in enumerate(entries):
            if entry is not None:
                child = module.get_submodule(entry.cut.module)
                hooks.callback(child.register_forward_hook(keep(number, entry.cut.position)).remove)
        yield


def _logits(module: nn.Module, batch: Batch, problem: Problem) -> Tensor:
    args, kwargs = problem.inputs(batch)
    return problem.output(module(*args, **kwargs))


def _random(batch: Batch) -> Batch:
    """Random values for a batch of zeros; token ids and masks stay 0 or 1, and start with 1."""
    draw = generator(0, "starting in the middle")
    return {name: _random_like(column, draw) for name, column in batch.items()}


def _random_like(column: Tensor, draw: torch.Generator) -> Tensor:
    if column.is_floating_point():
        return torch.randn(column.shape, generator=draw).to(column.dtype)
    if column.dtype == torch.uint8:
        return torch.randint(0, 256, column.shape, dtype=torch.uint8, generator=draw)
    values = torch.randint(0, 2, column.shape, generator=draw).to(column.dtype)
    if values.ndim > 1:
        values[:, 0] = 1
    return values
