"""Linear layers that move their weights in the backward pass: the gradient of a weight is never made.

It is gᵀx, a product of what comes back to a layer and of what went into it. An optimizer that adds a multiple of it
to something of the same size can have the product added there at once: no room for the gradient, and a third less to
read and write.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalefl.torch_private import is_transformed

_DESCENT = "_scalefl_descent"


class Descent:
    """How a layer moves its weight: while `is_on`, and if it is used once until `uses` are counted anew.

    Args:
        move: the weight [O, I] by its gradient gᵀx, given g [N, O] and x [N, I].
    """

    def __init__(self, move: Callable[[Tensor, Tensor], None]) -> None:
        self.move, self.is_on, self.uses = move, False, 0

    @property
    def is_due(self) -> bool:
        """Whether the gradient that has come is the whole one of a training step."""
        return self.is_on and self.uses == 1


def descend_by(weight: nn.Parameter, descent: Descent | None) -> None:
    """Have a `Linear` layer with this weight move it so; None: have it make a gradient again."""
    setattr(weight, _DESCENT, descent)


class Linear(nn.Linear):
    """`nn.Linear`, whose weight can move in the backward pass; for weights that nothing else in their model uses."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        descent: Descent | None = getattr(self.weight, _DESCENT, None)
        if descent is None or not torch.is_grad_enabled() or not _suits(input):
            return F.linear(input, self.weight, self.bias)
        descent.uses += 1
        output: Tensor = _Descending.apply(input, self.weight, self.bias, descent)  # type: ignore[no-untyped-call]
        return output


def _suits(x: Tensor) -> bool:
    return not (torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling() or is_transformed(x))


class _Descending(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, descent: Descent) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.descent = descent
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        rows, inputs = (t.reshape(-1, t.shape[-1]) for t in (gradient, x))
        back = gradient @ weight if ctx.needs_input_grad[0] else None
        of_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        if torch.is_grad_enabled():
            ctx.descent.uses += 1  # somebody will come back through this, too
        if torch.is_grad_enabled() or is_transformed(gradient) or not ctx.descent.is_due:
            return back, rows.t() @ inputs, of_bias, None
        ctx.descent.move(rows, inputs)
        return back, None, of_bias, None
