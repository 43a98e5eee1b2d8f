"""The one mean: coordinate by coordinate, weighted, exact, and independent of the order of its terms.

Each term x·w/W is rounded to a fixed grid and summed as an integer, held in float64. Sums of integers below
2⁵³ are exact, so neither the order in which clients finish nor the number of workers that reduce changes a
bit of the result. One rounding costs at most 2⁻⁴⁸ of absolute precision for each client: far below float32 for
values of ordinary size, while a tensor of values near 1e-10 keeps four or five digits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scalefl.coords import add
from scalefl.errors import BadUpdate
from scalefl.params import Params, real
from scalefl.types import ClientTask, ClientUpdate, Coords, Window

FINE = 2.0**-47
COARSE = 2.0**-10
# Up to here the fine grid alone holds Σ x·w/W as an integer below 2⁵²; larger values use both grids.
FINE_LIMIT = 32.0
LIMIT = 2.0**42
DIVERGED = 1000.0
"""A client's training has diverged if a parameter has grown so many times as large as the largest of its tensor, or 1.

Such values are finite, but one client that sends them is enough to end the run.
"""
VARIANCE = "running_var"
"""How torch's batch norms call theirs. A negative one is finite, and has every evaluation give NaN."""
PIECE = 2**17


@dataclass
class _Sum:
    """Σ x·w/W of one tensor as whole numbers on two grids, and Σ w."""

    fine: Tensor
    coarse: Tensor | None
    weight: int | Tensor


class Total:
    """An additive (sum, weight) for each coordinate.

    Args:
        reference: the global tensors; only shapes and dtypes are read.
        largest_weight: at least the sum of all weights that will be added.
    """

    def __init__(self, reference: Params, largest_weight: int) -> None:
        self._reference = reference
        self.scale = 2.0 ** math.ceil(math.log2(max(largest_weight, 1)))
        self._sums: dict[str, _Sum] = {}
        self.own: dict[int, Params] = {}

    def keep(self, client_id: int, own: Params) -> None:
        """Note a client's own tensors as it sent them back; copied."""
        self.own[client_id] = {name: t.clone() for name, t in own.items()}

    def add(self, params: Params, weight: int, coords: Coords, largest: Mapping[str, float]) -> None:
        """Add a client's tensors, finite and at most `LIMIT` in size, with its weight; `largest` as `check` returns."""
        fine = dict.fromkeys(name for name in params if coords[name] is None and largest[name] <= FINE_LIMIT)
        sums = [self._sum(name, windowed=False) for name in fine]
        add_fine([total.fine for total in sums], [real(params[name]) for name in fine], weight, self.scale)
        for total in sums:
            total.weight += weight
        for name in params:
            if name not in fine:
                self._add(name, params[name], weight, coords[name], largest[name])

    def merge(self, name: str, fine: Tensor, weight: int) -> None:
        """Add a sum that `add_fine` has made elsewhere of whole tensors, and their weight."""
        total = self._sum(name, windowed=False)
        total.fine += fine
        total.weight += weight

    def mean(self, base: Params) -> dict[str, Tensor]:
        """The mean of every tensor that moved; coordinates that nobody trained keep the bits of `base`."""
        return {name: self._mean(base[name], total) for name, total in self._sums.items()}

    def held(self, name: str) -> Tensor | None:
        """Which coordinates of a tensor moved, as booleans of its shape; None where all did."""
        weight = self._sums[name].weight
        return weight > 0 if isinstance(weight, Tensor) else None

    def _add(self, name: str, tensor: Tensor, weight: int, window: Window | None, largest: float) -> None:
        total = self._sum(name, windowed=window is not None)
        if tensor.is_complex():
            window = None if window is None else (*window, None)
        tensor = real(tensor)
        if window is not None and not isinstance(total.weight, Tensor):
            total.weight = torch.full(total.fine.shape, total.weight, dtype=torch.int64)
        value = tensor.to(torch.float64, copy=True).mul_(weight / self.scale)
        if largest > FINE_LIMIT:
            coarse = (value / COARSE).round_()
            if total.coarse is None:
                total.coarse = torch.zeros_like(total.fine)
            add(total.coarse, window, coarse)
            value -= coarse * COARSE
        add(total.fine, window, value.div_(FINE).round_())
        if isinstance(total.weight, Tensor):
            add(total.weight, window, weight)
        else:
            total.weight += weight

    def _sum(self, name: str, *, windowed: bool) -> _Sum:
        if name not in self._sums:
            shape = real(self._reference[name]).shape
            weight = torch.zeros(shape, dtype=torch.int64) if windowed else 0
            self._sums[name] = _Sum(torch.zeros(shape, dtype=torch.float64), None, weight)
        return self._sums[name]

    def _mean(self, base: Tensor, total: _Sum) -> Tensor:
        if base.is_complex():
            return torch.view_as_complex(self._mean(torch.view_as_real(base), total))
        # Powers of 2 go to the divisor, where they change no bit and cost no pass over the tensor.
        unit, value = FINE * self.scale, total.fine
        if total.coarse is None and not isinstance(total.weight, Tensor):
            return _divided(value, total.weight / unit, base.dtype)
        if total.coarse is not None:
            value = total.fine + total.coarse * (COARSE / FINE)
        if isinstance(total.weight, Tensor):
            held = total.weight > 0
            return torch.where(held, _cast(value / (total.weight.clamp(min=1) / unit), base.dtype), base)
        return _cast(value / (total.weight / unit), base.dtype)


def add_fine(sums: Sequence[Tensor], tensors: Sequence[Tensor], weight: int, scale: float) -> None:
    """Add x·w/W, rounded to the fine grid: together as much as stays in the processor's cache.

    Args:
        sums: float64, in whole steps of the grid.
        tensors: x, of the same shapes, finite and at most `FINE_LIMIT` in size.
        weight, scale: w and W.
    """
    factor = weight / scale / FINE
    for to, pieces in _together(sums, tensors):
        values = [piece.to(torch.float64, copy=True) for piece in pieces]
        torch._foreach_mul_(values, factor)
        torch._foreach_round_(values)
        torch._foreach_add_(to, values)


def _together(sums: Sequence[Tensor], tensors: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Sums and tensors in lists of at most `PIECE` numbers: small ones with others, large ones in pieces."""
    to: list[Tensor] = []
    found: list[Tensor] = []
    size = 0
    for total, tensor in zip(sums, tensors, strict=True):
        pieces: Iterable[tuple[Tensor, ...]] = [(total, tensor)]
        if tensor.numel() > PIECE:
            pieces = zip(*(torch.split(t.reshape(-1), PIECE) for t in (total, tensor)), strict=True)
        for part, piece in pieces:
            if found and size + piece.numel() > PIECE:
                yield to, found
                to, found, size = [], [], 0
            to.append(part)
            found.append(piece.detach())
            size += piece.numel()
    if found:
        yield to, found


def _divided(sums: Tensor, divisor: float, dtype: torch.dtype) -> Tensor:
    """A quotient in pieces that stay in the processor's cache: as a whole it would take twice the room of the mean."""
    mean = torch.empty(sums.shape, dtype=dtype)
    for to, piece in zip(*(torch.split(t.view(-1), PIECE) for t in (mean, sums)), strict=True):
        to.copy_(_cast(piece / divisor, dtype))
    return mean


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers (counters of batches) become the rounded mean, and booleans what most of the weight says."""
    return value.to(dtype) if dtype.is_floating_point else value.round_().to(dtype)


def largest(tensor: Tensor) -> float:
    """The largest size of a value, NaN if there is one; not by `abs`, which the smallest integer overflows."""
    if not tensor.numel():
        return 0.0
    low, high = real(tensor).aminmax()
    return max(-float(low), float(high))


def check(
    task: ClientTask, update: ClientUpdate, expected: Mapping[str, Tensor], num_examples: int
) -> dict[str, float]:
    """Refuse what must not enter the mean.

    Args:
        task: what was asked for.
        update: what came.
        expected: the global tensors under its names.
        num_examples: of the client, as the round was planned with: it may not claim a larger weight.

    Returns:
        The largest size of a value in each tensor.

    Raises:
        BadUpdate: a name is missing or foreign, a shape or dtype differs, a value is not finite, or so large that the
            client's training has diverged, or a variance is negative.
    """

    def refuse(name: str, why: str) -> BadUpdate:
        return BadUpdate(update.client_id, task.round, name, why)

    if not 1 <= update.num_examples <= num_examples:
        raise refuse("num_examples", f"{update.num_examples} is not a weight from 1 to {num_examples}")
    for name in sorted(update.params.keys() ^ task.moving):
        raise refuse(name, "missing" if name in task.moving else "not asked for")
    trained = frozenset[str]().union(*(step.trainable for step in task.steps))
    sizes: dict[str, float] = {}
    for name, tensor in update.params.items():
        wanted = expected[name]
        if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
            raise refuse(name, f"{tensor.dtype} {tuple(tensor.shape)}, not {wanted.dtype} {tuple(wanted.shape)}")
        sizes[name] = largest(tensor)
        if not sizes[name] < LIMIT:
            raise refuse(name, f"holds NaN, infinity or values beyond 4e12: {_DIVERGES}")
        if name.endswith(VARIANCE) and bool((tensor < 0).any()):
            raise refuse(name, "a negative variance")
        if name in trained and sizes[name] > DIVERGED and sizes[name] > DIVERGED * largest(wanted):
            raise refuse(name, f"has grown to {sizes[name]:.2g}: {_DIVERGES}")
    return sizes


_DIVERGES = (
    "the client's training has diverged. Lower work.lr, clip gradients (work.clip_norm), or bring the inputs to a "
    "scale near 1"
)
