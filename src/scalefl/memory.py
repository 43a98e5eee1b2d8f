"""Predict the peak memory of a computation, term by term, without doing it.

The computation runs once on fake tensors while a dispatch mode follows every live storage; oneDNN's reorder
scratch at convolutions is added where it would exist. Batches have prime numbers of examples there, so that the
size of each storage tells what it grows with: one run predicts every batch and micro-batch. Measured against the
resident growth of fresh processes this stays within a few per cent (docs/memory.md).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scalefl.fakes import UNKNOWN, RememberingFakes, key_of
from scalefl.operators import flops, is_unknown, workspace
from scalefl.torch_private import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    TorchDispatchMode,
)
from scalefl.units import TERMS, Term

Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Cost:
    """What one training step costs.

    Args:
        peak_bytes: the highest sum of live tensors and scratch.
        terms: that sum by term.
        flops: floating-point operations of the step, forward and backward (multiply and add count as two).
        num_examples: examples in the step.
        unknown: operators in it that may cost much and are not counted, as nothing says how much.
    """

    peak_bytes: int
    terms: tuple[tuple[Term, int], ...]
    flops: int
    num_examples: int
    unknown: tuple[str, ...] = ()

    @property
    def flops_per_example(self) -> float:
        """FLOPs for one example."""
        return self.flops / self.num_examples


@dataclass(frozen=True)
class Symbols:
    """Numbers of examples by which a traced size tells what it grows with.

    Args:
        first, later: examples in the first and in the second micro-batch.
        batch: in the batch: their sum, or as many as either where there are no micro-batches.
    """

    first: int
    later: int
    batch: int

    def growth(self, size: int) -> tuple[int, ...]:
        """`size` as (constant, by a micro-batch's examples, by a batch's, by the squares of both, and by the cubes)."""
        found = [0] * SHAPES
        for count, place in ((self.batch, 2), (self.later, 1), (self.first, 1)):
            if size and size % count == 0:
                power = next(power for power in (3, 2, 1) if size % count**power == 0)
                found[place + 2 * (power - 1)] = size // count**power
                return tuple(found)
        found[0] = size
        return tuple(found)


SHAPES = 7
# Numbers that share no factor and have a prime factor in the thousands each, as no layer's width does.
SPLIT = Symbols(first=8462, later=8461, batch=16923)
WHOLE = Symbols(first=8461, later=8461, batch=8461)  # as a later one: what fakes do for it is known


@dataclass(frozen=True, eq=False)
class Profile:
    """What a traced step costs, for any batch.

    Args:
        moments: sizes of all terms at the moments that can be the peak, [moments, terms, SHAPES].
        waiting: the same where the step waits for the features of a frozen prefix.
        flops: [SHAPES].
        unknown: operators in it that may cost much and are not counted.
    """

    moments: Array
    waiting: Array
    flops: Array
    unknown: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        arrays = {name: getattr(self, name).tolist() for name in ("moments", "waiting", "flops")}
        return {**arrays, "unknown": self.unknown}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Profile:
        """From what `to_json` gave."""
        moments, waiting, flops = (np.array(found[n], dtype=np.int64) for n in ("moments", "waiting", "flops"))
        return cls(moments, waiting, flops, tuple(found["unknown"]))

    def peak(self, micro: int, batch: int) -> Array:
        """Bytes of each term at the peak, [terms]."""
        return _largest(self.moments @ _sizes(micro, batch))

    def waiting_peak(self, micro: int, batch: int) -> Array:
        """Bytes of each term at the fullest moment at which the prefix runs, [terms]."""
        return _largest(self.waiting @ _sizes(micro, batch))

    def total_flops(self, micro: int, batch: int) -> int:
        """FLOPs of the step on the whole batch."""
        constant, each, of_batch, each_square, batch_square, each_cube, batch_cube = (int(f) for f in self.flops)
        for_each = each + each_square * micro + each_cube * micro**2
        return constant + for_each * batch + of_batch * batch + batch_square * batch**2 + batch_cube * batch**3


def _sizes(micro: int, batch: int) -> Array:
    return np.array([1, *(count**power for power in (1, 2, 3) for count in (micro, batch))], dtype=np.int64)


def _largest(bytes_by_moment: Array) -> Array:
    """The row with the largest sum."""
    found: Array = bytes_by_moment[bytes_by_moment.sum(1).argmax()]
    return found


@dataclass(frozen=True, eq=False)
class Slices:
    """What the units of a model take while it trains whole, each beside what lives when it is reached.

    Args:
        before: what lives where each unit begins, [SHAPES] each.
        during: the moments of its forward and of its backward pass that can be the peak, [moments, SHAPES] each.
    """

    before: tuple[Array, ...]
    during: tuple[Array, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"before": [a.tolist() for a in self.before], "during": [a.tolist() for a in self.during]}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Slices:
        """From what `to_json` gave."""
        before = tuple(np.array(unit, dtype=np.int64) for unit in found["before"])
        return cls(before, tuple(np.array(unit, dtype=np.int64).reshape(-1, SHAPES) for unit in found["during"]))

    def peak(self, units: range, num_examples: int) -> int:
        """About what the activations of some units come to, without what they leave to later ones."""
        sizes = _sizes(num_examples, num_examples)
        highest = max(int((self.during[u] @ sizes).max(initial=0)) for u in units)
        return highest - int(self.before[units[0]] @ sizes)


@dataclass
class _Entry:
    """A followed storage: its term, how it grows, since when it is there, and what tells when it is gone."""

    term: int
    growth: Array
    since: int
    gone: weakref.ref[torch.UntypedStorage] | None = None


_flops: dict[Any, int | None] = {}
"""Of operations that were seen, by `fakes.key_of`."""


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows live storages by term, and notes how much there was after each operation that took some."""

    def __init__(self, symbols: Symbols | None = None, fakes: RememberingFakes | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fakes = fakes
        self._symbols = symbols
        self._term: Term = "transients"
        self._reads = False
        self._live = np.zeros((len(TERMS), SHAPES), dtype=np.int64)
        self._moments: list[Array] = []
        self._waiting: list[Array] = []
        self._marks: dict[tuple[str, int], tuple[int, Array]] = {}
        self._later: list[tuple[slice, int, int, Array]] = []
        self._flops = np.zeros(SHAPES, dtype=np.int64)
        self._unknown: set[str] = set()
        self._known: dict[int, _Entry] = {}
        self._growths: dict[int, Array] = {}

    @contextlib.contextmanager
    def counting_as(self, term: Term) -> Iterator[None]:
        """File what is allocated inside the block under `term`."""
        before, self._term = self._term, term
        try:
            yield
        finally:
            self._term = before

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Inside the block, numbers that are taken out of fake tensors are 1: there they are no control flow."""
        self._reads = True
        try:
            yield
        finally:
            self._reads = False

    def file(self, tensors: Iterable[Tensor], term: Term) -> None:
        """File tensors, known or not, under `term`; also for the time that they have been there."""
        for tensor in tensors:
            if tensor.layout is not torch.strided:
                continue
            storage = tensor.untyped_storage()
            if storage._cdata in self._known:
                self._move(self._known[storage._cdata], TERMS.index(term))
            else:
                self._follow(storage, term)

    def settle(self) -> None:
        """The forward pass is over: what of it still lives, backward needs."""
        transient, saved = TERMS.index("transients"), TERMS.index("activations")
        for entry in list(self._known.values()):
            if entry.term == transient:
                self._move(entry, saved)

    def mark(self, place: tuple[str, int]) -> None:
        """Name this moment."""
        self._marks[place] = (len(self._moments), self._live.copy())

    def slices(self, num_units: int) -> Slices:
        """The units, between marks ("forward", u) where unit u ends and ("backward", u) where its gradient comes."""
        passing = [TERMS.index("activations"), TERMS.index("transients")]
        moments = np.stack(self._moments)[:, passing].sum(1)
        nothing, last = (0, np.zeros_like(self._live)), (len(moments), self._live)
        before, during = [], []
        for unit in range(num_units):
            start, live = self._marks.get(("forward", unit - 1), nothing)
            end, _ = self._marks.get(("forward", unit), last)
            turn, _ = self._marks.get(("backward", unit), (end, live))
            done, _ = self._marks.get(("backward", unit - 1), last)
            before.append(live[passing].sum(0))
            both = np.concatenate([moments[start:end], moments[turn:done]])
            during.append(np.unique(both, axis=0))
        return Slices(tuple(before), tuple(during))

    def wait(self) -> None:
        """A frozen prefix runs at this moment, elsewhere."""
        self._waiting.append(self._live.copy())

    def forget(self) -> None:
        """What lives now is not counted."""
        for entry in self._known.values():
            self._live[entry.term] -= entry.growth
            entry.growth = np.zeros(SHAPES, dtype=np.int64)
        self._moments.clear()
        self._later.clear()

    def close(self) -> None:
        """Follow nothing any more: what tells of a storage's end holds this."""
        self._known.clear()

    def profile(self) -> Profile:
        """What was noted."""
        moments = np.stack(self._moments) if self._moments else self._live[None]
        for when, before, after, growth in self._later:
            moments[when, before] -= growth
            moments[when, after] += growth
        waiting = np.stack(self._waiting) if self._waiting else np.zeros_like(moments[:1])
        flops = self._flops.copy()
        if self._symbols and self._symbols.first != self._symbols.batch:
            flops[[1, 3, 5]] //= 2  # two micro-batches were run, and each counted for an example
        return Profile(_undominated(moments), waiting, flops, tuple(sorted(self._unknown)))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nobody compiles here, and the guard against it costs more than most operations

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # half of all calls; autograd asks where its tensors are
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        if self._reads and func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return _one_of(args[0].dtype)
        key = None if self._fakes is None else key_of(func, args, kwargs or {})
        result = UNKNOWN if self._fakes is None or key is None else self._fakes.recall(key, args)
        if result is UNKNOWN:
            result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, tuple | list) else (result,)
        kept = None if self._fakes is None else workspace(func, args, outputs)
        if kept is not None:
            outputs = result = (*outputs[:-1], torch.empty(kept, dtype=torch.uint8))
        new = False
        for output in outputs:
            if not isinstance(output, Tensor) or output.layout is not torch.strided:
                continue  # a sparse gradient of an embedding: small, and made dense before it is used
            storage = output.untyped_storage()
            if storage._cdata not in self._known:
                self._follow(storage, self._term)
                new = True
        scratches = _scratch(func, args, outputs)
        for scratch in scratches or ([[]] if new else []):
            self._note(scratch)
        self._count_flops(key, func, args, kwargs or {}, result)
        return result

    def _follow(self, storage: torch.UntypedStorage, term: Term) -> None:
        entry = _Entry(TERMS.index(term), self._growth(storage.nbytes()), len(self._moments))
        number = storage._cdata
        entry.gone = weakref.ref(storage, lambda _: self._release(number))
        self._known[number] = entry
        self._live[entry.term] += entry.growth

    def _release(self, number: int) -> None:
        entry = self._known.pop(number)
        self._live[entry.term] -= entry.growth

    def _move(self, entry: _Entry, term: int) -> None:
        self._later.append((slice(entry.since, len(self._moments)), entry.term, term, entry.growth))
        self._live[entry.term] -= entry.growth
        self._live[term] += entry.growth
        entry.term = term

    def _note(self, scratch: list[Tensor]) -> None:
        moment = self._live.copy()
        for tensor in scratch:
            moment[TERMS.index("transients")] += self._growth(tensor.numel() * tensor.element_size())
        self._moments.append(moment)

    def _growth(self, size: int) -> Array:
        if size not in self._growths:
            found = (size, *[0] * (SHAPES - 1)) if self._symbols is None else self._symbols.growth(size)
            self._growths[size] = np.array(found, dtype=np.int64)
        return self._growths[size]

    def _count_flops(self, key: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        # FlopCounterMode itself counts by the same table, at the price of a third of the trace's time.
        counted = _flops[key] if key in _flops else flops(func, args, kwargs, result)
        if key is not None:
            _flops[key] = counted
        if counted is not None:
            self._flops += self._growth(counted)
        elif is_unknown(func):
            self._unknown.add(func.name())


def profile(step: Callable[[Ledger], None], symbols: Symbols) -> Profile | None:
    """The profile of `step`, which builds its own tensors and files them; None where it can't run on fake tensors.

    Control flow that depends on data cannot.
    """
    try:
        return _watched(step, Ledger(symbols, fakes := RememberingFakes()), fakes)
    except (DataDependentOutputException, DynamicOutputShapeException):
        return None


def slices(step: Callable[[Ledger], None], symbols: Symbols, num_units: int) -> Slices | None:
    """What the units of a model take in `step`, which marks them; None where it can't run on fake tensors."""
    ledger = Ledger(symbols, fakes := RememberingFakes())
    try:
        _watched(step, ledger, fakes)
    except (DataDependentOutputException, DynamicOutputShapeException):
        return None
    return ledger.slices(num_units)


def predict(step: Callable[[Ledger], None], num_examples: int) -> Cost:
    """The cost of `step` at the sizes that it has; on fake tensors, or for real, on zeros, where it must."""
    try:
        found = _watched(step, Ledger(None, fakes := RememberingFakes()), fakes)
    except (DataDependentOutputException, DynamicOutputShapeException):
        found = _watched(step, Ledger(), contextlib.nullcontext())
    return cost_of(found.peak(0, 0), int(found.flops[0]), num_examples, found.unknown)


def cost_of(terms: Array, flops: int, num_examples: int, unknown: tuple[str, ...] = ()) -> Cost:
    """A cost from bytes by term, [terms]."""
    named = tuple((term, int(size)) for term, size in zip(TERMS, terms, strict=True))
    return Cost(int(terms.sum()), named, flops, num_examples, unknown)


def _watched(
    step: Callable[[Ledger], None], ledger: Ledger, mode: contextlib.AbstractContextManager[object]
) -> Profile:
    with mode, ledger, contextlib.closing(ledger):
        step(ledger)
        return ledger.profile()


def _one_of(dtype: torch.dtype) -> bool | int | float:
    if dtype is torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


def _scratch(func: Any, args: tuple[Any, ...], outputs: Any) -> list[list[Tensor]]:
    """Reorder buffers of oneDNN's convolutions, as alternatives: max(x, y) + w forward, x + g + w backward."""
    if func is torch.ops.aten.convolution.default:
        x, w, y = args[0], args[1], outputs[0]
        return [[x, w], [y, w]]
    if func is torch.ops.aten.convolution_backward.default:
        g, x, w = args[:3]
        return [[x, g, w]]
    return []


def _undominated(moments: Array) -> Array:
    """The moments that can be the peak for some batch: no other is at least as large in every shape of growth."""
    totals, first = np.unique(moments.sum(1), axis=0, return_index=True)
    kept: list[int] = []
    for i in np.argsort(-totals.sum(1), kind="stable"):
        if not any((totals[k] >= totals[i]).all() for k in kept):
            kept.append(int(i))
    found: Array = moments[first[sorted(kept)]]
    return found
