"""Max-pooling to half the size on a CPU: torch's numbers, in half of its time, or a tenth where nothing trains.

torch's kernel walks through each window of an image in turn. Here whole rows and columns are compared, as vector units
do.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalefl.torch_private import is_transformed

_LEAST = 2**13
"""Numbers of an example from which on this pays; fewer are done before the operations have been started."""


def halved(x: Tensor, window: int) -> Tensor:
    """Max-pooled by windows of 2 or 3 to half the height and width, [B, C, H, W] to [B, C, ⌈H/2⌉ or ⌊H/2⌋, …].

    The same numbers, and gradients as far as they are finite, as those of `torch.nn.functional.max_pool2d` with a
    stride of 2, padded by one for windows of 3.
    """
    trains = x.requires_grad and torch.is_grad_enabled()
    if not _suits(x) or (trains and window != 2):
        return F.max_pool2d(x, window, stride=2, padding=(window - 1) // 2)
    if trains:
        pooled: Tensor = _Halved.apply(x)  # type: ignore[no-untyped-call]
        return pooled
    return _along(_along(x, window, -2), window, -1)


def speed_up(module: nn.Module) -> None:
    """Have each `nn.MaxPool2d` of a module that halves images do it so; for good, and wherever else it is used."""
    for child in module.modules():
        if type(child) is nn.MaxPool2d and _halves_images(child):
            child.__class__ = _MaxPool2d


class _MaxPool2d(nn.MaxPool2d):
    def forward(self, input: Tensor) -> Tensor:
        return halved(input, 2 if _is(self.kernel_size, 2) else 3)


def _halves_images(pool: nn.MaxPool2d) -> bool:
    """Whether its poolings are those of `halved`."""
    if pool.return_indices or pool.ceil_mode or not _is(pool.stride, 2) or not _is(pool.dilation, 1):
        return False
    return any(_is(pool.kernel_size, window) and _is(pool.padding, (window - 1) // 2) for window in (2, 3))


def _is(size: Any, number: int) -> bool:
    return size in (number, (number, number))


def _suits(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or x.dim() != 4:
        return False
    _, channels, height, width = x.shape
    if channels * height * width < _LEAST or height % 2 or width % 2:  # first: small models feel each question
        return False
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or not x.is_contiguous():
        return False
    return not is_transformed(x)


def _along(x: Tensor, window: int, dim: int) -> Tensor:
    """The largest in each window along a dimension of even size."""
    even, odd = _halves(x, dim)
    found = torch.maximum(even, odd)
    if window == 3:
        after = found.narrow(dim, 1, found.shape[dim] - 1)
        torch.maximum(after, odd.narrow(dim, 0, found.shape[dim] - 1), out=after)
    return found


def _halves(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Views of every other row or column, from the first on and from the second on."""
    return (x[..., 0::2], x[..., 1::2]) if dim == -1 else (x[..., 0::2, :], x[..., 1::2, :])


class _Halved(torch.autograd.Function):
    """By windows of 2. A byte is kept for each pair that was compared; torch keeps eight for each window, and x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        # Columns first, and a later one only where it is larger: of equals torch takes the first of a window.
        left, right = _halves(x, -1)
        is_right = right > left
        wide = torch.maximum(left, right)
        upper, lower = _halves(wide, -2)
        ctx.save_for_backward(is_right, lower > upper)
        return torch.maximum(upper, lower)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        is_right, is_lower = ctx.saved_tensors
        *shape, width = is_right.shape
        if torch.is_grad_enabled() or is_transformed(gradient):  # somebody goes back through this, or for many at once
            below = gradient * is_lower
            wide = torch.stack([gradient - below, below], -2).view(is_right.shape)
            beside = wide * is_right
            return torch.stack([wide - beside, beside], -1).view(*shape, 2 * width)
        # What is multiplied is made a float here, where predictions of memory see it; torch would do it by itself.
        below = is_lower.to(gradient.dtype).mul_(gradient)
        wide = gradient.new_empty(is_right.shape)
        upper, lower = _halves(wide, -2)
        torch.sub(gradient, below, out=upper)
        lower.copy_(below)
        del below
        beside = is_right.to(gradient.dtype).mul_(wide)
        # Pairs are written faster than every other place of a row.
        return torch.view_as_real(torch.complex(wide.sub_(beside), beside)).view(*shape, 2 * width)
