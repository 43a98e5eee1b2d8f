"""What the convolutional models share: scaled channel counts, norms by name, and the convolution unit.

BatchNorm: Ioffe & Szegedy 2015. GroupNorm: Wu & He 2018, which keeps no statistics of a client's data.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from scalefl.errors import ConfigError
from scalefl.models.pooling import halved

Norm = Literal["batch", "group", "none"]
Stem = Literal["cifar", "imagenet"]


def check_choice(name: str, value: str, choices: Any) -> None:
    """Raise a ConfigError unless the value is one of the Literal's."""
    if value not in get_args(choices):
        raise ConfigError(f"{name} {value!r} is not one of {', '.join(get_args(choices))}")


def scaled(num_channels: int, width: float) -> int:
    """`width` times the channels, at least one."""
    return max(1, round(num_channels * width))


def make_norm(kind: Norm, num_channels: int) -> nn.Module:
    """The norm of that name; groups have at least 4 channels where there are 4, and number at most 32."""
    check_choice("norm", kind, Norm)
    if kind == "batch":
        return nn.BatchNorm2d(num_channels)
    if kind == "group":
        most = min(32, max(1, num_channels // 4))
        return nn.GroupNorm(max(g for g in range(1, most + 1) if num_channels % g == 0), num_channels)
    return nn.Identity()


class ConvUnit(nn.Module):
    """Convolution (padded to keep the size at stride 1), norm, max-pooling and ReLU as one module.

    Kaiming-normal weights by fan-out (He et al. 2015); a bias only where no norm follows.
    Activation and pooling are functions, so that this module alone names the unit's last tensor.

    Args:
        pool: window of the max-pooling by two at the end; 0 for none.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        norm: Norm,
        stride: int = 1,
        relu: bool = True,
        pool: int = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=norm == "none"
        )
        self.norm = make_norm(norm, out_channels)
        self.relu, self.pool = relu, pool
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C', H', W']."""
        x = self.norm(self.conv(x))
        if self.pool:  # before the activation, which gives the same numbers and gradients, and keeps a quarter of them
            x = halved(x, self.pool)
        return F.relu(x, inplace=True) if self.relu else x


def spatial_mean(x: Tensor) -> Tensor:
    """The mean over all positions, [B, C]."""
    return x.mean((2, 3))
