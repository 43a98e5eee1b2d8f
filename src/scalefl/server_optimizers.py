"""What the server does with the round's mean: take it, or treat the difference as a gradient.

Source: Reddi et al., "Adaptive Federated Optimization", ICLR 2021 (algorithm 2), for FedAdam; Hsu et al.,
"Measuring the Effects of Non-Identical Data Distribution", 2019, for FedAvgM.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import torch
from torch import Tensor

from scalefl.errors import check_range
from scalefl.params import real
from scalefl.types import RoundPlan, ServerState, Totals


class Average(msgspec.Struct, frozen=True, tag_field="kind", tag="average", forbid_unknown_fields=True):
    """The mean replaces the parameters (FedAvg)."""

    def update(self, old: Tensor, mean: Tensor, history: dict[str, Tensor]) -> Tensor:
        """The mean itself."""
        return mean


class FedAvgM(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="fedavgm", forbid_unknown_fields=True):
    """Momentum on the server: v ← βv + Δ, θ ← θ + ηv."""

    lr: float = 1.0
    momentum: float = 0.9

    def __post_init__(self) -> None:
        check_range("server.lr", self.lr, 0.0)
        check_range("server.momentum", self.momentum, 0.0, 1.0)

    def update(self, old: Tensor, mean: Tensor, history: dict[str, Tensor]) -> Tensor:
        """One step along the accumulated difference."""
        delta = mean - old
        history["momentum"] = history.get("momentum", torch.zeros_like(old)) * self.momentum + delta
        return old + self.lr * history["momentum"]


class FedAdam(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="fedadam", forbid_unknown_fields=True):
    """Adam on the server, without bias correction as in the paper."""

    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        check_range("server.lr", self.lr, 0.0)
        check_range("server.beta1", self.beta1, 0.0, 1.0)
        check_range("server.beta2", self.beta2, 0.0, 1.0)
        check_range("server.tau", self.tau, 1e-12)

    def update(self, old: Tensor, mean: Tensor, history: dict[str, Tensor]) -> Tensor:
        """One Adam step along the difference."""
        delta = mean - old
        first = self.beta1 * history.get("first", torch.zeros_like(old)) + (1 - self.beta1) * delta
        # Paper: algorithm 2 starts from v₋₁ ≥ τ².
        before = history.get("second", torch.full_like(old, self.tau**2))
        second = self.beta2 * before + (1 - self.beta2) * delta.square()
        history["first"], history["second"] = first, second
        return old + self.lr * first / (second.sqrt() + self.tau)


ServerOptimizer = Average | FedAvgM | FedAdam


def apply_mean(
    optimizer: ServerOptimizer, state: ServerState, plan: RoundPlan, total: Totals
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The global tensors after a round, and the optimizer's history.

    Parameters go through the optimizer. Norm statistics and integer counters are no gradients: their weighted
    mean (rounded, for integers) is taken as it is. What nobody trained keeps its bits.
    """
    # Deviation: the papers do not say what becomes of statistics. The mean of variances leaves out how means differ.
    trained = frozenset().union(*(step.trainable for task in plan.tasks for step in set(task.steps)))
    params = dict(state.params)
    history = dict(state.aux.tensors)
    for name, mean in total.mean(state.params).items():
        if name in trained:
            before, held = _history(history, name), total.held(name)
            own, old = dict(before), real(state.params[name])
            new = optimizer.update(old, real(mean), own)
            if held is not None:  # momentum rests where nobody trained
                new = torch.where(held, new, old)
                own = {kind: torch.where(held, t, before.get(kind, t)) for kind, t in own.items()}
            params[name] = torch.view_as_complex(new) if mean.is_complex() else new
            history.update({f"server.{kind}.{name}": t for kind, t in own.items()})
        else:
            params[name] = mean
    return params, history


def _history(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    kinds = ("momentum", "first", "second")
    return {kind: tensors[key] for kind in kinds if (key := f"server.{kind}.{name}") in tensors}
