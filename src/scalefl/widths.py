"""Width scaling: where the tensors of a narrower model lie in those of the wide one.

A factory that takes a `width` makes both. Along a dimension that grows with it, C units of the wide tensor lie side
by side, and a narrower one has c of them; a unit is a channel, or several where the narrowest model has several (one
of each attention head). Which units a client takes is drawn for each C, so that neighbouring layers, and the two sides
of a residual sum, take the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from scalefl.caches import remembered
from scalefl.errors import UnsliceableModel
from scalefl.models.skeleton import tensors
from scalefl.models.spec import ModelSpec
from scalefl.partition import partition
from scalefl.problem import Problem
from scalefl.rng import generator
from scalefl.types import Coords, Window

Units = Callable[[int, int], Tensor]
"""Which c of C units a narrower model takes: [c], each from 0 to C − 1 and none twice."""

NARROWEST = 1e-6
"""A width at which no dimension has more than one unit."""


def leading(count: int, taken: int) -> Tensor:
    """The first ones (HeteroFL)."""
    return torch.arange(taken)


def rolled(shift: int) -> Units:
    """Those from `shift` on, and from the first again after the last (FedRolex)."""
    return lambda count, taken: (shift + torch.arange(taken)) % count


def drawn(seed: int) -> Units:
    """Any, at random (Federated Dropout)."""
    return lambda count, taken: torch.randperm(count, generator=generator(seed, "units", count))[:taken]


def windows(wide: ModelSpec, narrow: ModelSpec, units: Units = leading) -> Coords:
    """Where each tensor of `narrow` lies in that of `wide`, of which it is a slice; None where it is whole."""
    sizes = _sizes(wide)
    found: dict[str, Window | None] = {}
    for name, taken in _shapes(narrow).items():
        window = tuple(
            None if c == count else _indices(count, c, unit, units)
            for c, (count, unit) in zip(taken, sizes[name], strict=True)
        )
        found[name] = None if all(index is None for index in window) else window
    return found


def check_sliceable(wide: ModelSpec, narrow: ModelSpec) -> None:
    """Refuse two models of which one's tensors are no slices of the other's.

    Raises:
        UnsliceableModel: the factory has no width, or a tensor is no slice: the error names the first.
    """
    sizes, shapes = _sizes(wide), _shapes(narrow)
    _check_names(wide, shapes)
    for name, shape in shapes.items():
        whole = sizes[name]
        fits = len(shape) == len(whole) and all(
            c == count or (c < count and c % unit == 0 and count % unit == 0)
            for c, (count, unit) in zip(shape, whole, strict=True)
        )
        if not fits:
            wide_shape = tuple(count for count, _ in whole)
            raise UnsliceableModel(f"{wide.name}: {name} {shape} is no slice of the wide model's {wide_shape}")


def class_rows(model: ModelSpec, problem: Problem) -> tuple[str, ...]:
    """The tensors of the model's own head, whose rows belong to the classes; none where it can't be told."""
    last = partition(model, problem, ()).layers[-1][1]
    shapes = _shapes(model)
    rows = tuple(name for name in last if shapes[name][:1] == (problem.num_classes,))
    return rows if len(rows) == len(last) else ()


def _indices(count: int, taken: int, unit: int, units: Units) -> Tensor:
    chosen = units(count // unit, taken // unit)
    return (chosen[:, None] * unit + torch.arange(unit)).flatten()


@remembered(64)
def _sizes(wide: ModelSpec) -> dict[str, tuple[tuple[int, int], ...]]:
    """The size of each dimension of each tensor, and that of one unit."""
    try:
        narrowest = _shapes(wide.at_width(NARROWEST))
    except UnsliceableModel:
        raise
    except Exception as error:  # a user's factory may fail in any way at a width that it was not made for
        raise UnsliceableModel(
            f"{wide.name}: the factory fails at width {NARROWEST:g} ({type(error).__name__}: {error}); it should keep "
            "one channel"
        ) from error
    _check_names(wide, narrowest)
    sizes = {}
    for name, shape in _shapes(wide).items():
        unit = narrowest[name]
        if len(unit) != len(shape) or 0 in unit:
            raise UnsliceableModel(
                f"{wide.name}: {name} {shape} is {unit} at width {NARROWEST:g}: the factory should keep one channel"
            )
        sizes[name] = tuple(zip(shape, unit, strict=True))
    return sizes


def _check_names(wide: ModelSpec, narrow: Mapping[str, tuple[int, ...]]) -> None:
    for name in sorted(_shapes(wide).keys() ^ narrow.keys()):
        raise UnsliceableModel(f"{wide.name}: not at every width is there a tensor {name}")


@remembered(256)
def _shapes(model: ModelSpec) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in tensors(model.skeleton()).items()}
