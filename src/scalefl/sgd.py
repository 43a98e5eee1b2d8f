"""SGD with momentum, in place: bit for bit torch.optim.SGD where it is given gradients, without what that imports.

`torch.optim` loads torch's compiler stack (2 CPU-seconds and some 60 MiB in each process that trains), which
a small client cannot spare. Momentum buffers exist from the start, so one step shows the peak of all steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from scalefl.errors import ConfigError
from scalefl.models.linear import Descent, descend_by
from scalefl.params import Params
from scalefl.types import LocalWork


class SGD:
    """SGD over named parameters, with gradient clipping and the pull of FedProx or FedDyn towards where they started.

    Args:
        parameters: what trains.
        work: lr, momentum, weight_decay, clip_norm and prox.
        feddyn: α of FedDyn; 0 turns it off.
        drift: h of FedDyn, for each parameter: changed in place by `settle`.
        in_backward: update each parameter of so many bytes or more when its gradient is complete, and free that; the
            numbers are the same. None: all at once, in `step`.
        in_layers: have a `Linear` layer whose weight has so many bytes or more move it itself while `descending`, by a
            gradient that is never made; last bits differ. None: none does; nor does any where gradients are clipped or
            something pulls.

    Raises:
        ConfigError: `in_backward` with clipping, which needs all gradients at once.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        work: LocalWork,
        *,
        feddyn: float = 0.0,
        drift: Params | None = None,
        in_backward: int | None = None,
        in_layers: int | None = None,
    ) -> None:
        if in_backward is not None and work.clip_norm:
            raise ConfigError("clip_norm needs all gradients at once: they cannot be applied during backward")
        self._names, self._parameters = list(parameters), list(parameters.values())
        self._work = work
        self._momentum = [torch.zeros_like(p) for p in self._parameters] if work.momentum else None
        self._pull, self._feddyn = work.prox + feddyn, feddyn
        self._start = [p.detach().clone() for p in self._parameters] if self._pull else None
        self._drift = [drift[name] for name in self._names] if drift else None
        self._hooks: list[RemovableHandle] = [
            p.register_post_accumulate_grad_hook(self._applying(i))  # type: ignore[no-untyped-call]
            for i, p in enumerate(self._parameters)
            if in_backward is not None and p.nbytes >= in_backward
        ]
        self._descents: dict[int, Descent] = {}
        for i, p in enumerate(self._parameters):
            if in_layers is not None and p.dim() == 2 and p.nbytes >= in_layers and not (work.clip_norm or self._pull):
                self._descents[i] = _ByProduct(work, self._momentum[i] if self._momentum else None)
                descend_by(p, self._descents[i])

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What trains, by name."""
        return dict(zip(self._names, self._parameters, strict=True))

    @property
    def momentum(self) -> dict[str, Tensor]:
        """The momentum buffers, by parameter."""
        return dict(zip(self._names, self._momentum or (), strict=False))

    @property
    def copies(self) -> dict[str, Tensor]:
        """What the parameters were at the start, where something pulls towards it."""
        return dict(zip(self._names, self._start or (), strict=False))

    def of_rows(self, rows: slice | Tensor) -> SGD:
        """The optimizer of some rows of every parameter, where rows are of different clients.

        A slice shares its memory with this one; numbers of rows give copies, which `put_back` returns.
        """
        found = _RowsSGD(
            {name: nn.Parameter(p.detach()[rows]) for name, p in self.parameters.items()},
            self._work,
            feddyn=self._feddyn,
        )
        for kept in ("_momentum", "_start", "_drift"):
            whole: list[Tensor] | None = getattr(self, kept)
            setattr(found, kept, None if whole is None else [t[rows] for t in whole])
        return found

    @torch.no_grad()
    def put_back(self, rows: Tensor, found: SGD) -> None:
        """Take what `of_rows` gave as copies, and has since moved."""
        for whole, some in zip(
            [*self._parameters, *(self._momentum or ())], [*found._parameters, *(found._momentum or ())], strict=True
        ):
            whole.data[rows] = some

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for p in self._parameters:
            p.grad = None
        for descent in self._descents.values():
            descent.visits, descent.has_moved = 0, False

    @contextlib.contextmanager
    def descending(self) -> Iterator[None]:
        """Inside the block, a backward pass is that of a whole step: what can move by it does."""
        for descent in self._descents.values():
            descent.is_on = True
        try:
            yield
        finally:
            for descent in self._descents.values():
                descent.is_on = False

    def scale_grad(self, factor: float) -> None:
        """Multiply the gradients."""
        for p in self._parameters:
            if p.grad is not None:
                p.grad.mul_(factor)

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters from their gradients; those without a gradient stay."""
        moving = [i for i, p in enumerate(self._parameters) if p.grad is not None]
        if not moving:
            return
        for i in moving:
            if _gradient(self._parameters[i]).is_sparse:  # of an embedding; weight decay makes it dense anyway
                self._parameters[i].grad = _gradient(self._parameters[i]).to_dense()
        self._pull_to_start(moving)
        if self._work.clip_norm:
            # Paper: FedProx, eq. 2: the pull is part of the gradient, so it is there before the norm is taken.
            self._clip()
        self._move(moving)

    @torch.no_grad()
    def settle(self) -> None:
        """The client is done: FedDyn's h takes in how far it went, and gradients are applied no more.

        Paper: Acar et al., "Federated Learning Based on Dynamic Regularization", ICLR 2021, algorithm 1.
        """
        for hook in self._hooks:  # they and the parameters would keep each other alive, and the momentum with them
            hook.remove()
        for i in self._descents:
            descend_by(self._parameters[i], None)
        if self._drift is not None and self._start is not None:
            for drift, p, start in zip(self._drift, self._parameters, self._start, strict=True):
                drift.sub_(p - start, alpha=self._feddyn)

    def _clip(self) -> None:
        nn.utils.clip_grad_norm_(self._parameters, self._work.clip_norm)

    def _applying(self, i: int) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def apply(p: Tensor) -> None:
            if p.grad is None:  # it has moved already, or nothing has come back
                return
            if p.grad.is_sparse:
                p.grad = p.grad.to_dense()
            self._pull_to_start([i])
            self._move([i])
            p.grad = None

        return apply

    def _pull_to_start(self, moving: Sequence[int]) -> None:
        """Add the gradient of μ/2·‖θ − θ⁽ʳ⁾‖² − ⟨h, θ⟩, which is μ(θ − θ⁽ʳ⁾) − h."""
        for i in moving if self._start is not None else ():
            p, start = self._parameters[i], self._start[i]  # type: ignore[index]
            _gradient(p).add_(p - start, alpha=self._pull)
            if self._drift is not None:
                _gradient(p).sub_(self._drift[i])

    def _move(self, moving: Sequence[int]) -> None:
        work = self._work
        late = [i for i in moving if i in self._descents and self._descents[i].has_moved]
        for i in late:
            self._move_on(i)
        moving = [i for i in moving if i not in late]
        if not moving:
            return
        parameters: list[Tensor] = [self._parameters[i] for i in moving]
        steps = [_gradient(p) for p in parameters]
        if work.weight_decay:
            torch._foreach_add_(steps, parameters, alpha=work.weight_decay)
        if self._momentum is not None:
            momentum = [self._momentum[i] for i in moving]
            torch._foreach_mul_(momentum, work.momentum)
            torch._foreach_add_(momentum, steps)
            steps = momentum
        torch._foreach_add_(parameters, steps, alpha=-work.lr)

    def _move_on(self, i: int) -> None:
        """Finish the step of a weight that has moved by its layer, with the gradient that has come from elsewhere."""
        p = self._parameters[i]
        if self._momentum is not None:
            self._momentum[i].add_(_gradient(p))
        p.add_(_gradient(p), alpha=-self._work.lr)


class _RowsSGD(SGD):
    """SGD over parameters of which each row is another client's."""

    def _clip(self) -> None:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        squares = [g.flatten(1).square().sum(1) for g in gradients]
        norms = sum(squares[1:], squares[0]).sqrt()
        factors = (self._work.clip_norm / (norms + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_ does it
        for g in gradients:
            g.mul_(factors.view(-1, *[1] * (g.dim() - 1)))


class _ByProduct(Descent):
    """What `SGD._move` does, with a gradient gᵀx."""

    def __init__(self, work: LocalWork, momentum: Tensor | None) -> None:
        super().__init__()
        self._work, self._momentum = work, momentum

    def move(self, weight: Tensor, rows: Tensor, inputs: Tensor) -> None:
        """See `Descent`."""
        work, momentum = self._work, self._momentum
        if momentum is None:
            torch.addmm(weight, rows.t(), inputs, beta=1 - work.lr * work.weight_decay, alpha=-work.lr, out=weight)
            return
        torch.addmm(momentum, rows.t(), inputs, beta=work.momentum, out=momentum)
        if work.weight_decay:
            momentum.add_(weight, alpha=work.weight_decay)
        weight.add_(momentum, alpha=-work.lr)


def _gradient(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad
