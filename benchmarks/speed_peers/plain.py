"""The models of the comparison without ScaleFL: same layers, names and order, so that the same weights load."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def make(name: str) -> nn.Module:
    """The model of that name, its weights random."""
    return {"cnn": CNN, "small-cnn": lambda: CNN(4), "resnet10": ResNet10}[name]()


class ConvUnit(nn.Module):
    """Convolution, group norm where asked for, ReLU, and pooling by two where asked for."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        *,
        stride: int = 1,
        norm: bool,
        relu: bool = True,
        pool: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=not norm)
        self.norm = nn.GroupNorm(outputs // 4, outputs) if norm else nn.Identity()
        self.relu, self.pool = relu, pool
        # torch's own first convolution of few channels corrupts memory where its input lies so.
        self.turns = inputs < 8 and bool(os.environ.get("CHANNELS_LAST"))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C', H', W']."""
        x = self.conv(x)
        x = self.norm(x.contiguous(memory_format=torch.channels_last) if self.turns else x)
        x = F.relu(x, inplace=True) if self.relu else x
        return F.max_pool2d(x, 2) if self.pool else x


class CNN(nn.Module):
    """Two 5×5 convolutions, a hidden layer and a classifier."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.conv1 = ConvUnit(3, channels, 5, norm=False, pool=True)
        self.conv2 = ConvUnit(channels, 2 * channels, 5, norm=False, pool=True)
        self.hidden = nn.Linear(2 * channels * 8 * 8, 16 * channels)
        self.classifier = nn.Linear(16 * channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, 32, 32] to [B, 10]."""
        x = self.conv2(self.conv1(x))
        return self.classifier(F.relu(self.hidden(x.flatten(1))))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut, projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = ConvUnit(inputs, outputs, 3, stride=stride, norm=True)
        self.second = ConvUnit(outputs, outputs, 3, norm=True, relu=False)
        self.shortcut = None
        if stride != 1 or inputs != outputs:
            self.shortcut = ConvUnit(inputs, outputs, 1, stride=stride, norm=True, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C', H', W']."""
        shortcut = self.shortcut(x) if self.shortcut else x
        return F.relu(self.second(self.first(x)) + shortcut, inplace=True)


class ResNet10(nn.Module):
    """A stem of 16 channels, four stages of one basic block each, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvUnit(3, 16, 3, norm=True)
        self.layer1 = nn.ModuleList([BasicBlock(16, 16, 1)])
        self.layer2 = nn.ModuleList([BasicBlock(16, 32, 2)])
        self.layer3 = nn.ModuleList([BasicBlock(32, 64, 2)])
        self.layer4 = nn.ModuleList([BasicBlock(64, 128, 2)])
        self.fc = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, 32, 32] to [B, 10]."""
        x = self.stem(x)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage[0](x)
        return self.fc(x.mean((2, 3)))
