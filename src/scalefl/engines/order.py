"""What a worker process is asked to do, as it crosses to it."""

from __future__ import annotations

from typing import Literal, NamedTuple

from scalefl.engines.shared import Brief
from scalefl.problem import Problem
from scalefl.types import Adding, ClientTask, Method

Cap = Literal["none", "measured", "hard"]
"""Whether a worker tells what its client took, and whether that may be more than the client's budget."""


class Order(NamedTuple):
    """A task, and what it takes to do it. Its tensors follow, group by group, or lie where the brief says.

    Attributes:
        adding: how what comes of it is to be added to the brief's sums; None: not at all.
    """

    method: Method
    problem: Problem
    task: ClientTask
    cap_bytes: int | None
    brief: Brief | None
    adding: Adding | None
