"""Residual networks of basic blocks: He et al., Deep Residual Learning for Image Recognition, CVPR 2016.

ResNet-10, with one block in each stage, is the usual small one of the federated literature. The
last norm of a block starts at one, not at zero.
"""

from __future__ import annotations

from itertools import chain

import torch.nn.functional as F
from torch import Tensor, nn

from scalefl.models.norms import ConvUnit, Norm, Stem, check_choice, scaled, spatial_mean


def resnet10(
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    width: float = 1.0,
    norm: Norm = "batch",
    stem: Stem = "cifar",
) -> nn.Module:
    """ResNet-10: images [B, C, H, W] to logits [B, K]; the "imagenet" stem divides H and W by 4."""
    return ResNet((1, 1, 1, 1), num_classes, in_channels, width, norm, stem)


def resnet18(
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    width: float = 1.0,
    norm: Norm = "batch",
    stem: Stem = "cifar",
) -> nn.Module:
    """ResNet-18: images [B, C, H, W] to logits [B, K]; the "imagenet" stem divides H and W by 4."""
    return ResNet((2, 2, 2, 2), num_classes, in_channels, width, norm, stem)


def resnet34(
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    width: float = 1.0,
    norm: Norm = "batch",
    stem: Stem = "cifar",
) -> nn.Module:
    """ResNet-34: images [B, C, H, W] to logits [B, K]; the "imagenet" stem divides H and W by 4."""
    return ResNet((3, 4, 6, 3), num_classes, in_channels, width, norm, stem)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut, projected where the shape changes (option B of the paper)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.first = ConvUnit(in_channels, out_channels, 3, stride=stride, norm=norm)
        self.second = ConvUnit(out_channels, out_channels, 3, norm=norm, relu=False)
        self.shortcut = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = ConvUnit(in_channels, out_channels, 1, stride=stride, norm=norm, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C', H', W']."""
        shortcut = self.shortcut(x) if self.shortcut else x
        return F.relu(self.second(self.first(x)) + shortcut, inplace=True)


class ResNet(nn.Module):
    """A stem, four stages with `num_blocks` basic blocks, and a linear classifier."""

    def __init__(
        self,
        num_blocks: tuple[int, int, int, int],
        num_classes: int,
        in_channels: int,
        width: float,
        norm: Norm,
        stem: Stem,
    ) -> None:
        super().__init__()
        check_choice("stem", stem, Stem)
        c1, c2, c3, c4 = (scaled(c, width) for c in (64, 128, 256, 512))
        if stem == "cifar":
            self.stem = ConvUnit(in_channels, c1, 3, norm=norm)
        else:
            self.stem = ConvUnit(in_channels, c1, 7, stride=2, norm=norm, pool=3)
        self.layer1 = _stage(num_blocks[0], c1, c1, 1, norm)
        self.layer2 = _stage(num_blocks[1], c1, c2, 2, norm)
        self.layer3 = _stage(num_blocks[2], c2, c3, 2, norm)
        self.layer4 = _stage(num_blocks[3], c3, c4, 2, norm)
        self.fc = nn.Linear(c4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, K]."""
        x = self.stem(x)
        for block in chain(self.layer1, self.layer2, self.layer3, self.layer4):
            x = block(x)
        logits: Tensor = self.fc(spatial_mean(x))
        return logits


def _stage(num_blocks: int, in_channels: int, out_channels: int, stride: int, norm: Norm) -> nn.ModuleList:
    later = (BasicBlock(out_channels, out_channels, 1, norm) for _ in range(num_blocks - 1))
    return nn.ModuleList([BasicBlock(in_channels, out_channels, stride, norm), *later])
