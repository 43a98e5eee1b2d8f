"""The models of motion.toml and questions.toml, which name them as ones beside themselves."""

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


def bert(num_classes: int) -> nn.Module:
    """A small BERT with weights drawn anew, from a config of transformers."""
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=4096,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=32,
            num_labels=num_classes,
            initializer_range=0.1,
        )
    )
