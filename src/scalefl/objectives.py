"""What local training minimises. The mentor's objective is in `scalefl.mentor`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
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


@dataclass(frozen=True)
class OwnClasses(TaskLoss):
    """The problem's loss, in which the logits of classes that a client does not hold are 0.

    Source: HeteroFL (Diao et al., ICLR 2021, section 3), masked cross-entropy.

    Args:
        classes: those that it holds.
    """

    classes: tuple[int, ...]

    def sample_terms(self, taps: Taps, batch: Batch, problem: Problem) -> Weighted:
        """The loss of the masked logits."""
        foreign_K = torch.ones(taps.logits.shape[-1], dtype=torch.bool, device=taps.logits.device)
        foreign_K[list(self.classes)] = False
        return problem.loss(taps.logits.masked_fill(foreign_K, 0.0), batch)
