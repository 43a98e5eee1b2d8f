"""Predict the peak memory of a computation, term by term, without doing it.

The computation runs once on fake tensors while a dispatch mode follows every live storage; oneDNN's reorder
scratch at convolutions is added where it would exist. Measured against the resident growth of fresh processes
this stays within a few per cent (docs/architecture.md, "Memory").
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from scalefl.torch_private import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    TorchDispatchMode,
)

Term = Literal["weights", "gradients", "optimizer", "activations"]
TERMS: tuple[Term, ...] = ("weights", "gradients", "optimizer", "activations")

MIB = 2**20


@dataclass(frozen=True)
class Cost:
    """What one training step costs.

    Args:
        peak_bytes: the highest sum of live tensors and scratch.
        terms: that sum by term; "activations" holds saved activations, the batch and transients.
        flops: floating-point operations of the step, forward and backward (multiply and add count as two).
        num_examples: examples in the step.
    """

    peak_bytes: int
    terms: tuple[tuple[Term, int], ...]
    flops: int
    num_examples: int

    @property
    def flops_per_example(self) -> float:
        """FLOPs for one example."""
        return self.flops / self.num_examples


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows live storages by term; `peak` is the moment at which they were most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.term: Term = "activations"
        self.live: Counter[Term] = Counter()
        self.peak: Counter[Term] = Counter()
        self._clock = self._peak_at = 0
        self._known: weakref.WeakKeyDictionary[torch.UntypedStorage, list[Any]] = weakref.WeakKeyDictionary()

    @contextlib.contextmanager
    def counting_as(self, term: Term) -> Iterator[None]:
        """File what is allocated inside the block under `term`."""
        before, self.term = self.term, term
        try:
            yield
        finally:
            self.term = before

    def file(self, tensors: Iterable[Tensor], term: Term) -> None:
        """File tensors, known or not, under `term`."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage in self._known:
                entry = self._known[storage]
                self.live[entry[0]] -= entry[1]
                self.live[term] += entry[1]
                if entry[2] <= self._peak_at:  # it was there at the peak, under the wrong name
                    self.peak[entry[0]] -= entry[1]
                    self.peak[term] += entry[1]
                entry[0] = term
            else:
                self._follow(storage, term)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._clock += 1
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, tuple | list) else (result,)
        for output in outputs:
            if isinstance(output, Tensor) and output.untyped_storage() not in self._known:
                self._follow(output.untyped_storage(), self.term)
        self._note(_scratch_bytes(func, args, outputs))
        return result

    def _follow(self, storage: torch.UntypedStorage, term: Term) -> None:
        entry: list[Any] = [term, storage.nbytes(), self._clock]
        self._known[storage] = entry
        self.live[term] += entry[1]
        weakref.finalize(storage, self._release, entry)

    def _release(self, entry: list[Any]) -> None:
        self.live[entry[0]] -= entry[1]

    def _note(self, scratch: int) -> None:
        if self.live.total() + scratch > self.peak.total():
            self.peak, self._peak_at = self.live.copy(), self._clock
            self.peak["activations"] += scratch


def predict(step: Callable[[Ledger], None], num_examples: int) -> Cost:
    """The cost of `step`, which builds its own tensors and files them in the ledger; it runs on fake tensors.

    Control flow that depends on data can't run on fake tensors: such a step is done for real, on zeros.
    """
    try:
        return _watched(step, num_examples, FakeTensorMode(allow_non_fake_inputs=True))
    except (DataDependentOutputException, DynamicOutputShapeException):
        return _watched(step, num_examples, contextlib.nullcontext())


def _watched(
    step: Callable[[Ledger], None], num_examples: int, mode: contextlib.AbstractContextManager[object]
) -> Cost:
    ledger = Ledger()
    with mode, FlopCounterMode(display=False) as flops, ledger:
        step(ledger)
    terms = tuple((term, ledger.peak[term]) for term in TERMS)
    return Cost(ledger.peak.total(), terms, flops.get_total_flops(), num_examples)


def _scratch_bytes(func: Any, args: tuple[Any, ...], outputs: Any) -> int:
    """Reorder buffers of oneDNN's convolutions: max(x, y) + w forward, x + g + w backward."""
    if func is torch.ops.aten.convolution.default:
        x, w, y = args[0], args[1], outputs[0]
        return max(_bytes(x), _bytes(y)) + _bytes(w)
    if func is torch.ops.aten.convolution_backward.default:
        g, x, w = args[:3]
        return _bytes(x) + _bytes(g) + _bytes(w)
    return 0


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()
