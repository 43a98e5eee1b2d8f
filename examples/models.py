"""The model of motion.toml, which names it as one beside itself."""

from torch import Tensor, nn


def _layer(channels: int, more: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv1d(channels, more, 5, stride, padding=2), nn.GroupNorm(4, more), nn.ReLU())


class Motion(nn.Module):
    """Convolutions over time: [B, 6, 128] → [B, K]."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(_layer(6, 32, 2), _layer(32, 32, 1), _layer(32, 64, 2), _layer(64, 64, 1))
        self.head = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean(2))


def motion(num_classes: int) -> nn.Module:
    return Motion(num_classes)
