"""SGD with momentum, in place: bit for bit torch.optim.SGD, without what its constructor imports.

`torch.optim` loads torch's compiler stack (2 CPU-seconds and some 60 MiB in each process that trains), which
a small client cannot spare. Momentum buffers exist from the start, so one step shows the peak of all steps.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from scalefl.types import LocalWork


class SGD:
    """SGD over named parameters, with FedProx's pull towards where they started and gradient clipping.

    Args:
        parameters: what trains.
        work: lr, momentum, weight_decay, clip_norm and prox.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], work: LocalWork) -> None:
        self._parameters = list(parameters.values())
        self._work = work
        self._momentum = [torch.zeros_like(p) for p in self._parameters] if work.momentum else None
        self._start = [p.detach().clone() for p in self._parameters] if work.prox else None

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for p in self._parameters:
            p.grad = None

    def scale_grad(self, factor: float) -> None:
        """Multiply the gradients."""
        for p in self._parameters:
            if p.grad is not None:
                p.grad.mul_(factor)

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters from their gradients; those without a gradient stay."""
        work = self._work
        if self._start is not None:
            # Paper: FedProx, eq. 2; the gradient of μ/2·‖θ − θ⁽ʳ⁾‖² is μ(θ − θ⁽ʳ⁾).
            for p, start in zip(self._parameters, self._start, strict=True):
                if p.grad is not None:
                    p.grad.add_(p - start, alpha=work.prox)
        if work.clip_norm:
            nn.utils.clip_grad_norm_(self._parameters, work.clip_norm)
        for i, p in enumerate(self._parameters):
            if p.grad is not None:
                self._move(p, p.grad, i)

    def _move(self, p: nn.Parameter, step: Tensor, i: int) -> None:
        work = self._work
        if work.weight_decay:
            step.add_(p, alpha=work.weight_decay)
        if self._momentum is not None:
            step = self._momentum[i].mul_(work.momentum).add_(step)
        p.add_(step, alpha=-work.lr)
