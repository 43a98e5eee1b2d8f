"""VGG-11 with norms: Simonyan & Zisserman, Very Deep Convolutional Networks, ICLR 2015.

As usual for CIFAR, one linear layer replaces the three of the paper; the mean over what the fifth
pooling leaves (one position at 32×32) lets every image size from 32 on in.
"""

from __future__ import annotations

from torch import Tensor, nn

from scalefl.models.norms import ConvUnit, Norm, scaled, spatial_mean

# Channels of each convolution, and whether a pooling follows.
VGG11 = (
    (64, True),
    (128, True),
    (256, False),
    (256, True),
    (512, False),
    (512, True),
    (512, False),
    (512, True),
)


def vgg11_bn(num_classes: int = 10, *, in_channels: int = 3, width: float = 1.0, norm: Norm = "batch") -> nn.Module:
    """VGG-11: images [B, C, H, W] with H, W ≥ 32 to logits [B, K]."""
    return VGG(num_classes, in_channels, width, norm)


class VGG(nn.Module):
    """Eight 3×3 convolutions, the five poolings inside their units, and a linear classifier."""

    def __init__(self, num_classes: int, in_channels: int, width: float, norm: Norm) -> None:
        super().__init__()
        self.features = nn.ModuleList()
        for base, pools in VGG11:
            out_channels = scaled(base, width)
            self.features.append(ConvUnit(in_channels, out_channels, 3, norm=norm, pool=2 if pools else 0))
            in_channels = out_channels
        self.classifier = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, K]."""
        for unit in self.features:
            x = unit(x)
        logits: Tensor = self.classifier(spatial_mean(x))
        return logits
