"""What a worker process is asked to do, as it crosses to it."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Literal, NamedTuple

from scalefl.engines.shared import Brief, Sheets
from scalefl.parts import Part
from scalefl.problem import Problem
from scalefl.types import Adding, ClientTask, LocalWork, Means, Method, Step

Cap = Literal["none", "measured", "hard"]
"""Whether a worker tells what its client took, and whether that may be more than the client's budget."""


class Assignment(NamedTuple):
    """One client's part of an order.

    Attributes:
        task: what it does.
        brief: where its tensors lie; None: they follow the order, group by group.
        adding: how what comes of it is to be added to the brief's sums; None: not at all.
    """

    task: ClientTask
    brief: Brief | None
    adding: Adding | None


class Lesson(NamedTuple):
    """What is learned, and how: the same for all orders of a run."""

    method: Method
    problem: Problem


class Order(NamedTuple):
    """A task, or several equal ones to be done at once where all have briefs, and what it takes to do them."""

    lesson: Lesson
    cap_bytes: int | None
    assignments: tuple[Assignment, ...]


_COME_AGAIN = {Lesson, Step, Part, LocalWork, Means, frozenset, Sheets}


def key_of(value: Any) -> Hashable:
    """By what a channel knows again what comes with task after task, classes included; None for all else."""
    kind = type(value)
    if kind in _COME_AGAIN:
        return id(value)
    return value if issubclass(kind, type) else None
