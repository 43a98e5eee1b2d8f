"""What local training minimises. The mentor's objective is in `scalefl.mentor`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from scalefl.parts import Taps
from scalefl.problem import Batch, Problem, Weighted


@dataclass(frozen=True)
class TaskLoss:
    """The problem's own loss, and nothing else."""

    @property
    def coupled(self) -> tuple[str, ...]:
        """None."""
        return ()

    def sample_terms(self, taps: Taps, batch: Batch, problem: Problem) -> Weighted:
        """The loss of the logits."""
        return problem.loss(taps.logits, batch)

    def batch_terms(self, taps: Taps, batch: Batch, problem: Problem) -> Tensor | None:
        """None."""
        return None
