"""Linear layers that move their weights in the backward pass: the gradient of a weight is never made.

It is gᵀx, a product of what comes back to a layer and of what went into it. An optimizer that adds a multiple of it
to something of the same size can have the product added there at once: no room for the gradient, and a third less to
read and write.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalefl.torch_private import is_transformed

_DESCENT = "_scalefl_descent"


class Descent(ABC):
    """Moves the weight of a layer. What an optimizer tells a `Linear` layer, and what that tells it.

    Attributes:
        is_on: whether gradients that come back are those of a training step.
        visits: how often gradients will come back to the layer in this step: one is whole if it is the only one.
        has_moved: whether the weight has moved in this step.
    """

    def __init__(self) -> None:
        self.is_on, self.visits, self.has_moved = False, 0, False

    @abstractmethod
    def move(self, weight: Tensor, rows: Tensor, inputs: Tensor) -> None:
        """Move a weight [O, I] in place by its gradient gᵀx, given g [N, O] and x [N, I]."""


def descend_by(weight: nn.Parameter, descent: Descent | None) -> None:
    """Have a `Linear` layer with this weight move it so; None: have it make a gradient again."""
    vars(weight).pop(_DESCENT, None)
    if descent is not None:
        setattr(weight, _DESCENT, descent)


class Linear(nn.Linear):
    """`nn.Linear`, whose weight can move in the backward pass.

    For weights that run once in a step: others have a gradient, as ever. Where something else than the layer needs the
    weight in its own backward pass, autograd says that it has been modified.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        descent: Descent | None = getattr(self.weight, _DESCENT, None)
        if descent is None or not torch.is_grad_enabled():
            return F.linear(input, self.weight, self.bias)
        descent.visits += 1
        if not _suits(input):
            return F.linear(input, self.weight, self.bias)
        output: Tensor = _Descending.apply(input, self.weight, self.bias, descent)  # type: ignore[no-untyped-call]
        return output


def _suits(x: Tensor) -> bool:
    return not (torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling() or is_transformed(x))


class _Descending(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, descent: Descent) -> Tensor:
        ctx.set_materialize_grads(False)  # no gradient is not one of zeros: the weight stays
        ctx.save_for_backward(x, weight)
        ctx.descent, ctx.own = descent, weakref.ref(weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        if gradient is None:
            return None, None, None, None
        x, weight = ctx.saved_tensors
        descent: Descent = ctx.descent
        rows, inputs = (t.reshape(-1, t.shape[-1]) for t in (gradient, x))
        back = gradient @ weight if ctx.needs_input_grad[0] else None
        of_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        if torch.is_grad_enabled():
            descent.visits += 1  # somebody goes back through this, too
        is_whole = descent.is_on and descent.visits == 1 and not is_transformed(gradient)
        # What has been saved may be a copy, where somebody has set hooks for saved tensors.
        if torch.is_grad_enabled() or not is_whole or weight is not ctx.own():
            return back, rows.t() @ inputs, of_bias, None
        with torch.no_grad():
            descent.move(weight, rows, inputs)
        descent.has_moved = True
        return back, None, of_bias, None
