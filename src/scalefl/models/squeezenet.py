"""SqueezeNet 1.1: Iandola et al., SqueezeNet: AlexNet-level accuracy with 50x fewer parameters, 2016.

Deviation: a norm after each convolution, since federated models start from scratch; no ReLU on the
logits, where it would stop the gradient of a class; the mean comes before the dropout and the 1×1
convolution that classifies, here a linear layer; poolings are padded, so that each halves the size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalefl.models.norms import ConvUnit, Norm, Stem, check_choice, scaled, spatial_mean
from scalefl.models.pooling import halved

# Channels of each fire module's squeeze and of each of its two expansions, and whether a pooling follows.
FIRES = (
    (16, 64, False),
    (16, 64, True),
    (32, 128, False),
    (32, 128, True),
    (48, 192, False),
    (48, 192, False),
    (64, 256, False),
    (64, 256, False),
)


def squeezenet(
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    width: float = 1.0,
    norm: Norm = "batch",
    stem: Stem = "cifar",
) -> nn.Module:
    """SqueezeNet 1.1: images [B, C, H, W] to logits [B, K]; the "imagenet" stem has stride 2, not 1."""
    check_choice("stem", stem, Stem)
    return SqueezeNet(num_classes, in_channels, width, norm, stem_stride=1 if stem == "cifar" else 2)


class Fire(nn.Module):
    """A 1×1 convolution to few channels, then 1×1 and 3×3 convolutions side by side."""

    def __init__(self, in_channels: int, squeezed: int, expanded: int, norm: Norm, pools: bool) -> None:
        super().__init__()
        self.squeeze = ConvUnit(in_channels, squeezed, 1, norm=norm)
        self.expand1 = ConvUnit(squeezed, expanded, 1, norm=norm)
        self.expand3 = ConvUnit(squeezed, expanded, 3, norm=norm)
        self.pools = pools

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C', H', W']."""
        x = self.squeeze(x)
        # Interleaved, not concatenated, so that the leading channels, which a narrower model takes,
        # are the leading ones of both.
        x = torch.stack((self.expand1(x), self.expand3(x)), 2).flatten(1, 2)
        return halved(x, 3) if self.pools else x


class SqueezeNet(nn.Module):
    """A stem, eight fire modules, and a linear classifier."""

    def __init__(self, num_classes: int, in_channels: int, width: float, norm: Norm, stem_stride: int) -> None:
        super().__init__()
        channels = scaled(64, width)
        self.stem = ConvUnit(in_channels, channels, 3, stride=stem_stride, norm=norm, pool=3)
        self.fires = nn.ModuleList()
        for squeeze, expand, pools in FIRES:
            expanded = scaled(expand, width)
            self.fires.append(Fire(channels, scaled(squeeze, width), expanded, norm, pools))
            channels = 2 * expanded
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, K]."""
        x = self.stem(x)
        for fire in self.fires:
            x = fire(x)
        logits: Tensor = self.classifier(F.dropout(spatial_mean(x), 0.5, self.training))
        return logits
