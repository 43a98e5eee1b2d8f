"""Algebra on named tensors: the one form in which weights are held, sent, averaged and saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

Params = Mapping[str, Tensor]

ATTACHMENT = "@"
"""First character of names that do not belong to the user's model (output modules, exits)."""


def num_bytes(params: Params) -> int:
    """Bytes that the tensors hold."""
    return sum(t.numel() * t.element_size() for t in params.values())


def select(params: Params, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors under `names`, not copied."""
    return {name: params[name] for name in names}


def copied(params: Params) -> dict[str, Tensor]:
    """The same tensors in memory of their own."""
    return {name: t.detach().clone() for name, t in params.items()}


def is_attachment(name: str) -> bool:
    """Whether `name` is an attachment of the model rather than part of it."""
    return name.startswith(ATTACHMENT)


def without_attachments(params: Params) -> dict[str, Tensor]:
    """The user's own model: what is deployed and exported."""
    return {name: t for name, t in params.items() if not is_attachment(name)}


def identical(a: Params, b: Params) -> bool:
    """Whether names, shapes, dtypes and every bit agree (NaN equals the same NaN)."""
    return a.keys() == b.keys() and all(_same_bits(a[name], b[name]) for name in a)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(_bits(a), _bits(b))


def _bits(t: Tensor) -> Tensor:
    return t.detach().contiguous().reshape(-1).view(torch.uint8)
