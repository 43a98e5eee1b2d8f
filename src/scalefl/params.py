"""Algebra on named tensors: the one form in which weights are held, sent, averaged and saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

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


def is_attachment(name: str) -> bool:
    """Whether `name` is an attachment of the model rather than part of it."""
    return name.startswith(ATTACHMENT)


def without_attachments(params: Params) -> dict[str, Tensor]:
    """The user's own model: what is deployed and exported."""
    return {name: t for name, t in params.items() if not is_attachment(name)}
