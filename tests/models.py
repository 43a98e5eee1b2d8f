"""Models that the tests cut, train and measure, beside the built-in ones; no mocks, no downloads.

Each `Case` is a model, the problem that it solves, and real batches for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalefl.models import resolve
from scalefl.models.spec import ModelSpec
from scalefl.problem import Classification, Column

NUM_CLASSES = 5


@dataclass(frozen=True)
class Case:
    """A model and the problem that it solves."""

    model: ModelSpec
    problem: Classification
    vocabulary: int = 50

    def batch(self, num_examples: int, seed: int = 0) -> dict[str, Tensor]:
        """Random data of the right shapes; attention masks of different lengths."""
        draw = torch.Generator().manual_seed(seed)
        batch = {c.name: self._column(c, num_examples, draw) for c in self.problem.columns}
        batch[self.problem.label] = torch.randint(0, self.problem.num_classes, (num_examples,), generator=draw)
        return batch

    def _column(self, column: Column, num_examples: int, draw: torch.Generator) -> Tensor:
        shape = (num_examples, *column.shape)
        if column.name == "attention_mask":
            lengths = torch.randint(1, column.shape[0] + 1, (num_examples, 1), generator=draw)
            return (torch.arange(column.shape[0]) < lengths).long()
        if column.dtype == "int64":
            return torch.randint(1, self.vocabulary, shape, generator=draw)
        return torch.randn(shape, generator=draw)


def images(size: int = 32, channels: int = 3, num_classes: int = NUM_CLASSES) -> Classification:
    return Classification(num_classes, (Column("image", (channels, size, size), "float32"),))


def vectors(width: int, num_classes: int = NUM_CLASSES) -> Classification:
    return Classification(num_classes, (Column("x", (width,), "float32"),))


def tokens(length: int = 6, num_classes: int = NUM_CLASSES) -> Classification:
    columns = (Column("input_ids", (length,), "int64"), Column("attention_mask", (length,), "int64"))
    return Classification(num_classes, columns)


def built_in(name: str, width: float = 0.125, **arguments: Any) -> Case:
    """A built-in model for 32×32 images, narrow unless asked otherwise."""
    return Case(ModelSpec.of(resolve(name), num_classes=NUM_CLASSES, width=width, **arguments), images())


# Hand-written models


def digits() -> nn.Sequential:
    """For mnist5k; on nobody's list of what may be made."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 16, 3, stride=2), nn.GroupNorm(2, 16), nn.ReLU()),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )


def sequential() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 16),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(16, NUM_CLASSES),
    )


class Bottleneck(nn.Module):
    """As torchvision writes it: one in-place ReLU runs three times, and the shortcut runs last."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 4, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.conv3 = nn.Conv2d(4, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += self.shortcut(x)
        return self.relu(y)


class Residual(nn.Module):
    """Stages inside a body inside the model."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict(
            {
                "stem": nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(True)),
                "stage1": nn.Sequential(Bottleneck(8, 8), Bottleneck(8, 8)),
                "stage2": nn.Sequential(Bottleneck(8, 12, 2), Bottleneck(12, 12)),
            }
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(12, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.body.values():
            x = stage(x)
        return self.head(self.dropout(self.pool(x).flatten(1)))


class Tokens(nn.Module):
    """Parameters of the model itself (a class token, positions), and a buffer that is not in its state."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 12, 8, stride=8)
        self.class_token = nn.Parameter(torch.randn(1, 1, 12))
        self.positions = nn.Parameter(torch.randn(1, 17, 12))
        self.register_buffer("wave", torch.linspace(0, 1, 17 * 12).view(1, 17, 12), persistent=False)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(12, 2, 24, batch_first=True) for _ in range(3))
        self.gain = nn.Parameter(torch.ones(12))
        self.head = nn.Linear(12, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).mT
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.positions + self.wave
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:, 0] * self.gain)


class Branching(nn.Module):
    """What it does next depends on the data: fake tensors cannot tell."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = F.relu(x) if x.abs().max() < 1e6 else x.clamp(-1, 1)
        return self.head(self.second(x))


class LooksAtItsWeights(nn.Module):
    """Its initialiser reads a number from a tensor, which no meta tensor has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, NUM_CLASSES)
        self.scale = 1 / max(self.first.weight.abs().max().item(), 1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(F.relu(self.first(x) * self.scale)))


class PartlyFrozen(nn.Module):
    """The user's own frozen parameters: a pretrained first layer and one bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, NUM_CLASSES)
        self.first.requires_grad_(False)
        self.second.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(F.relu(self.first(x))))


class TwoInputs(nn.Module):
    """An image and a vector, joined early."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 8, stride=8), nn.Linear(6, 64)
        self.joined, self.second, self.head = nn.Linear(128, 16), nn.Linear(16, 16), nn.Linear(16, NUM_CLASSES)

    def forward(self, image: Tensor, extra: Tensor) -> Tensor:
        x = torch.cat([self.conv(image).flatten(1), self.linear(extra)], 1)
        x = F.relu(self.joined(x))
        return self.head(F.relu(self.second(x)))


class PlainTensor(nn.Module):
    """A constant that is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, NUM_CLASSES)
        self.scale = torch.linspace(1, 2, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(F.relu(self.first(x) * self.scale)))


class Frozen(nn.Module):
    """A backbone that the user runs without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.first = nn.Linear(6, 8), nn.Linear(8, 8)
        self.second, self.head = nn.Linear(8, 8), nn.Linear(8, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.backbone(x)
        return self.head(self.second(F.relu(self.first(x))))


class Table(nn.Module):
    """Holds tensors for others; never called."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.linspace(0, 1, 8))
        self.gain = nn.Parameter(torch.linspace(1, 2, 8))


class Body(nn.Module):
    """A container that owns a token used first, a gain used last, and a table used between."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.gain = nn.Parameter(torch.randn(6)), nn.Parameter(torch.ones(8))
        self.table = Table()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x + self.token))
        x = F.relu(self.second(x * self.table.gain + self.table.shift))
        return F.relu(self.third(x)) * self.gain


class Owner(nn.Module):
    """A model whose one child owns almost everything."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Body(), nn.Linear(8, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class FrozenHead(nn.Module):
    """A user's fixed classifier after a trainable body, on which a log-softmax follows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, NUM_CLASSES)
        self.last = nn.LogSoftmax(1)
        self.head.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.head(F.relu(self.second(F.relu(self.first(x))))))


# Models that cannot be cut


class Dense(nn.Module):
    """Each layer reads all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6 + 4 * i, 4) for i in range(3))
        self.head = nn.Linear(6 + 12, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, F.relu(layer(x))], 1)
        return self.head(x)


class Coupled(nn.Module):
    """A coupling layer: two tensors in, two tensors out."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        a = a + torch.tanh(self.left(b))
        return a, b + torch.tanh(self.right(a))


class TwoTensors(nn.Module):
    """Two tensors flow from end to end."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Coupled() for _ in range(3))
        self.out = nn.Linear(6, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x, x.flip(1)
        for layer in self.layers:
            a, b = layer(a, b)
        return self.out(a) + self.out(b)


class Tied(nn.Module):
    """The embedding is the head."""

    def __init__(self, vocabulary: int = NUM_CLASSES) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids).mean(1)
        return self.head(F.relu(self.second(F.relu(self.first(x)))))


class TwoTowers(nn.Module):
    """Two branches side by side, a trunk before and a head after."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(x)
        left = self.left(x)
        return self.head(left * self.right(x))


# From `transformers`, by configuration


def hf_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=32,
            patch_size=8,
            num_labels=NUM_CLASSES,
        )
    )


def hf_convnext() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    return ConvNextForImageClassification(
        ConvNextConfig(hidden_sizes=[8, 12, 16], depths=[1, 2, 1], num_stages=3, num_labels=NUM_CLASSES)
    )


def hf_bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            num_labels=NUM_CLASSES,
        )
    )


def hf_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    return GPT2ForSequenceClassification(
        GPT2Config(
            vocab_size=50,
            n_positions=16,
            n_embd=16,
            n_layer=3,
            n_head=2,
            num_labels=NUM_CLASSES,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
        )
    )


TWO_INPUTS = Classification(NUM_CLASSES, (Column("image", (3, 32, 32), "float32"), Column("extra", (6,), "float32")))

BUILT_IN_CASES: dict[str, Callable[[], Case]] = {
    name: lambda name=name: built_in(name)
    for name in ("cnn", "resnet10", "resnet18", "resnet34", "squeezenet", "vgg11_bn")
} | {"vit": lambda: built_in("vit", 0.25, depth=4)}

OWN_CASES: dict[str, Callable[[], Case]] = {
    "sequential": lambda: Case(ModelSpec.of(sequential), images()),
    "residual": lambda: Case(ModelSpec.of(Residual), images()),
    "tokens": lambda: Case(ModelSpec.of(Tokens), images()),
    "branching": lambda: Case(ModelSpec.of(Branching), vectors(6)),
    "looks_at_its_weights": lambda: Case(ModelSpec.of(LooksAtItsWeights), vectors(6)),
    "partly_frozen": lambda: Case(ModelSpec.of(PartlyFrozen), vectors(6)),
    "two_inputs": lambda: Case(ModelSpec.of(TwoInputs), TWO_INPUTS),
    "plain_tensor": lambda: Case(ModelSpec.of(PlainTensor), vectors(6)),
    "owner": lambda: Case(ModelSpec.of(Owner), vectors(6)),
    "frozen_head": lambda: Case(ModelSpec.of(FrozenHead), vectors(6)),
}

TRANSFORMERS_CASES: dict[str, Callable[[], Case]] = {
    "hf_vit": lambda: Case(ModelSpec.of(hf_vit), images()),
    "hf_convnext": lambda: Case(ModelSpec.of(hf_convnext), images()),
    "hf_bert": lambda: Case(ModelSpec.of(hf_bert), tokens()),
    "hf_gpt2": lambda: Case(ModelSpec.of(hf_gpt2), tokens()),
}

CASES = BUILT_IN_CASES | OWN_CASES | TRANSFORMERS_CASES


@lru_cache
def case(name: str) -> Case:
    """The case of that name, made once: partitions and costs are remembered for equal specs."""
    return CASES[name]()


class SharedNorm(nn.Module):
    """One batch norm without weights, before every layer: it runs on both sides of every cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, NUM_CLASSES)
        self.norm = nn.BatchNorm1d(8, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(self.norm(F.relu(self.first(self.norm(x)))))))
