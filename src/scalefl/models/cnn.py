"""The two-convolution network of McMahan et al., Communication-Efficient Learning, AISTATS 2017."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from scalefl.models.linear import Linear
from scalefl.models.norms import ConvUnit, Norm, scaled


def cnn(
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    image_size: int = 32,
    width: float = 1.0,
    norm: Norm = "none",
) -> nn.Module:
    """A small CNN: square images [B, C, image_size, image_size] to logits [B, K]; MNIST is 1×28×28."""
    return CNN(num_classes, in_channels, image_size, width, norm)


class CNN(nn.Module):
    """Two 5×5 convolutions with pooling, a hidden layer and a linear classifier."""

    def __init__(self, num_classes: int, in_channels: int, image_size: int, width: float, norm: Norm) -> None:
        super().__init__()
        c1, c2, num_hidden = (scaled(c, width) for c in (32, 64, 512))
        self.conv1 = ConvUnit(in_channels, c1, 5, norm=norm, pool=2)
        self.conv2 = ConvUnit(c1, c2, 5, norm=norm, pool=2)
        self.hidden = Linear(c2 * (image_size // 4) ** 2, num_hidden)
        self.classifier = nn.Linear(num_hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, K]."""
        x = self.conv2(self.conv1(x))
        logits: Tensor = self.classifier(F.relu(self.hidden(x.flatten(1))))
        return logits
