"""Algebra on named tensors: the one form in which weights are held, sent, averaged and saved."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

Params = Mapping[str, Tensor]

CPU = torch.device("cpu")
"""Where the server holds tensors, and clients their data."""

ATTACHMENT = "@"
"""First character of names that do not belong to the user's model (output modules, exits)."""


class LazyParams(Mapping[str, Tensor]):
    """Named tensors that may be read anew each time they are asked for."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Of all tensors; known without reading them."""

    @abstractmethod
    def holding(self, names: frozenset[str], moving: frozenset[str]) -> AbstractContextManager[None]:
        """Inside the block, the tensors `names` are in memory; what has become of the `moving` ones is kept."""

    @abstractmethod
    def keep(self, names: frozenset[str]) -> None:
        """Forget all others."""


def num_bytes(params: Params) -> int:
    """Bytes that the tensors hold."""
    if isinstance(params, LazyParams):
        return params.num_bytes
    return sum(t.numel() * t.element_size() for t in params.values())


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor, as bytes to read from or write to; not copied."""
    content: Any = tensor.detach().view(-1).view(torch.uint8).numpy()
    return memoryview(content)


def real(tensor: Tensor) -> Tensor:
    """A complex tensor [...] as its real and imaginary parts [..., 2], in the same memory; others as they are."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def select(params: Params, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors under `names`, not copied."""
    return {name: params[name] for name in names}


def moved(params: Params, device: torch.device) -> dict[str, Tensor]:
    """The tensors on a device; not copied where they are there already."""
    return {name: t.to(device) for name, t in params.items()}


def is_attachment(name: str) -> bool:
    """Whether `name` is an attachment of the model rather than part of it."""
    return name.startswith(ATTACHMENT)


def without_attachments(params: Params) -> dict[str, Tensor]:
    """The user's own model: what is deployed and exported."""
    return {name: t for name, t in params.items() if not is_attachment(name)}
