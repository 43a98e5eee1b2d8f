"""What was found out about models, kept for the length of a process: and forgotten when a model may have changed."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

_forget: list[Callable[[], None]] = []


def remembered(maxsize: int) -> Callable[[F], F]:
    """Cache a function of a model (or of what is made of one) as `functools.lru_cache` does, until `forget_models`."""

    def decorate(function: F) -> F:
        cached = lru_cache(maxsize=maxsize)(function)
        _forget.append(cached.cache_clear)
        return cached  # type: ignore[return-value]

    return decorate


def forget_models() -> None:
    """Forget all: a recipe names its factory, which may be another one by now (a notebook edits and reloads it)."""
    for forget in _forget:
        forget()
