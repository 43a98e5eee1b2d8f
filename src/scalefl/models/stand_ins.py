"""Stand-ins for what modules return that need not run, because a run starts after them.

A run can start in the middle of a model: the modules before the cut return zeros of the right shape, which take
no memory (all elements are one), and the last of them returns the tensor that was kept.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Blank:
    """A tensor of a module's output, without its values.

    Args:
        shape: of one example where `batched`, else of the whole.
        dtype: a torch name, as "float32".
        batched: whether the first dimension counts examples.
    """

    shape: tuple[int, ...]
    dtype: str
    batched: bool

    @property
    def is_floating_point(self) -> bool:
        """Whether its values are."""
        return bool(getattr(torch, self.dtype).is_floating_point)

    def zeros(self, num_examples: int) -> Tensor:
        """Zeros in memory of their own."""
        shape = (num_examples, *self.shape) if self.batched else self.shape
        return torch.zeros(shape, dtype=getattr(torch, self.dtype))

    def filled(self, num_examples: int, value: float, device: torch.device) -> Tensor:
        """One value in every place, in the memory of one: torch refuses to write into it, but for a single place."""
        shape = (num_examples, *self.shape) if self.batched else self.shape
        return torch.full((), value, dtype=getattr(torch, self.dtype), device=device).expand(shape)


@dataclass(frozen=True)
class Group:
    """A tuple, list or mapping in a module's output: its class, keys (none for sequences) and items."""

    kind: type
    keys: tuple[str, ...]
    items: tuple[Template, ...]


Template = Blank | Group | None


class NoTemplate(Exception):
    """A module returned something that cannot be stood in for."""


def template_of(output: Any, num_examples: int) -> Template:
    """What a module returned for so many examples, without values.

    Raises:
        NoTemplate: it holds anything but tensors, None, tuples, lists and mappings.
    """
    if output is None:
        return None
    if isinstance(output, Tensor):
        batched = output.ndim > 0 and output.shape[0] == num_examples
        shape = tuple(output.shape[1:] if batched else output.shape)
        return Blank(shape, str(output.dtype).removeprefix("torch."), batched)
    if isinstance(output, Mapping):
        items = tuple(template_of(item, num_examples) for item in output.values())
        return Group(type(output), tuple(map(str, output)), items)
    if type(output) in (tuple, list):
        return Group(type(output), (), tuple(template_of(item, num_examples) for item in output))
    raise NoTemplate(type(output).__name__)


def blanks(template: Template) -> list[Blank]:
    """The tensors of a template, in order."""
    if isinstance(template, Group):
        return [blank for item in template.items for blank in blanks(item)]
    return [] if template is None else [template]


class StandIns:
    """Makes outputs that templates describe: zeros, or, to show who reads them, NaN and 1 where there is no NaN.

    Args:
        num_examples: of the batch.
        wrong: not zeros.
        device: where they are.
    """

    def __init__(self, num_examples: int, device: torch.device, *, wrong: bool = False) -> None:
        self._num_examples, self._device, self._wrong = num_examples, device, wrong
        self._made_before: dict[Blank, Tensor] = {}

    def __call__(self, template: Template, position: int = -1, given: Tensor | None = None) -> Any:
        """The output that a template describes, with `given` as its floating-point tensor number `position`."""
        return self._made(template, itertools.count(), position, given)

    # Not a closure that calls itself: that is a cycle, which would hold the tensor until Python's collector comes by.
    def _made(self, part: Template, floating: Iterator[int], position: int, given: Tensor | None) -> Any:
        if part is None:
            return None
        if isinstance(part, Blank):
            is_given = part.is_floating_point and next(floating) == position
            return given if is_given else self._blank(part)
        items = [self._made(item, floating, position, given) for item in part.items]
        return part.kind(**dict(zip(part.keys, items, strict=True))) if part.keys else part.kind(items)

    def _blank(self, blank: Blank) -> Tensor:
        # A run passes a stand-in for each module before its start, most of them alike: to make one costs more than
        # to call the module.
        found = self._made_before.get(blank)
        if found is not None and found.shape[blank.batched :] == blank.shape:  # nobody has squeezed it in place
            return found
        value = 0.0 if not self._wrong else math.nan if blank.is_floating_point else 1.0
        found = blank.filled(self._num_examples, value, self._device)
        if found.ndim:  # else it could be written into
            self._made_before[blank] = found
        return found


def floating(output: Any) -> list[Tensor]:
    """The floating-point tensors in a module's output, in order: of a tensor, tuple, list, dict or dataclass."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    elif not isinstance(output, tuple | list) and hasattr(output, "__dict__"):
        output = list(vars(output).values())
    if isinstance(output, tuple | list):
        return [tensor for item in output for tensor in floating(item)]
    return []
