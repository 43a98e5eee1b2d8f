"""Take a submodel's tensors out of the global ones, and add them up there."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from scalefl.params import Params
from scalefl.types import Coords, Window


def whole(names: Iterable[str]) -> Coords:
    """Coordinates of whole tensors."""
    return dict.fromkeys(names)


def extract(params: Params, coords: Coords) -> dict[str, Tensor]:
    """The tensors that a client gets: views of whole tensors, copies of windows."""
    return {name: take(params[name], window) for name, window in coords.items()}


def take(tensor: Tensor, window: Window | None) -> Tensor:
    """The part of `tensor` under `window`."""
    return tensor if window is None else tensor[_mesh(tensor, window)]


def add(tensor: Tensor, window: Window | None, value: Tensor | int) -> None:
    """Add `value` to `tensor` under `window`; a window names no coordinate twice."""
    if window is None:
        tensor += value
    else:
        tensor[_mesh(tensor, window)] += value


def within(window: Window | None, inner: Window) -> Window:
    """Where a window of a submodel's tensor lies in the global one, in which that tensor lies under `window`."""
    if window is None:
        return inner
    return tuple(_picked(index, chosen) for index, chosen in zip(window, inner, strict=True))


def _picked(index: Tensor | None, chosen: Tensor | None) -> Tensor | None:
    return index if chosen is None else chosen if index is None else index[chosen]


def _mesh(tensor: Tensor, window: Window) -> tuple[Tensor, ...]:
    indices = [torch.arange(size) if index is None else index for size, index in zip(tensor.shape, window, strict=True)]
    return torch.meshgrid(*indices, indexing="ij") if indices else ()
