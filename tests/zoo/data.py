"""Small data that can be learned, of each kind that the zoo's models take; each function is a `[data] source`.

Shapes: N rows, C channels, L tokens or steps, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scalefl.data import Dataset
from scalefl.problem import Batch, Classification, Column, Problem, Weighted, take
from scalefl.rng import generator

NUM_CLASSES = 3
NUM_TRAIN, NUM_TEST = 80, 48
VOCABULARY, LENGTH = 24, 10
NUMBERS, CATEGORIES = 6, 5


def images(size: int = 8) -> Dataset:
    """Noise with one bright quarter, which says the class."""
    y, draw = _labels("images")
    x, half = 0.5 * torch.randn(len(y), 3, size, size, generator=draw), size // 2
    x[y == 0, :, :half, :half] += 1
    x[y == 1, :, half:, :half] += 1
    x[y == 2, :, half:, half:] += 1
    return _dataset(_classified(Column("image", (3, size, size), "float32")), {"image": x, "label": y})


def signals(length: int = 12) -> Dataset:
    """Two channels of a wave each, whose frequency says the class: [N, 2, L]."""
    y, draw = _labels("signals")
    phase = torch.rand(len(y), 2, 1, generator=draw)
    x = torch.sin(2 * torch.pi * ((1 + y[:, None, None]) * torch.arange(length) / length + phase))
    x = x + 0.2 * torch.randn(x.shape, generator=draw)
    return _dataset(_classified(Column("x", (2, length), "float32")), {"x": x, "label": y})


def sequences(length: int = 6) -> Dataset:
    """Steps of three numbers, of which the class says the largest on average: [N, L, 3]."""
    y, draw = _labels("sequences")
    x = torch.randn(len(y), length, 3, generator=draw) + F.one_hot(y, 3)[:, None]
    return _dataset(_classified(Column("x", (length, 3), "float32")), {"x": x, "label": y})


def volumes(size: int = 6) -> Dataset:
    """Noise with one bright end along the first dimension, or none: [N, 1, D, H, W]."""
    y, draw = _labels("volumes")
    x, half = 0.5 * torch.randn(len(y), 1, size, size, size, generator=draw), size // 2
    x[y == 0, :, :half] += 1
    x[y == 1, :, half:] += 1
    return _dataset(_classified(Column("x", (1, size, size, size), "float32")), {"x": x, "label": y})


def table() -> Dataset:
    """Rows of numbers; the class is the largest of three sums."""
    _, draw = _labels("table")
    x = torch.randn(NUM_TRAIN + NUM_TEST, NUMBERS, generator=draw)
    y = x.view(-1, NUM_CLASSES, NUMBERS // NUM_CLASSES).sum(2).argmax(1)
    return _dataset(_classified(Column("x", (NUMBERS,), "float32")), {"x": x, "label": y})


def categories() -> Dataset:
    """Rows of numbers and of categories; both count."""
    _, draw = _labels("categories")
    count = NUM_TRAIN + NUM_TEST
    numbers = torch.randn(count, 3, generator=draw)
    kinds = torch.randint(0, CATEGORIES, (count, 2), generator=draw)
    y = (numbers + F.one_hot(kinds[:, 0] % NUM_CLASSES, NUM_CLASSES)).argmax(1)
    columns = (Column("numbers", (3,), "float32"), Column("kinds", (2,), "int64"))
    return _dataset(_classified(*columns), {"numbers": numbers, "kinds": kinds, "label": y})


def tokens(mask: bool = True) -> Dataset:
    """Sentences of different lengths, padded with 0; the class says from which third of the words most come."""
    y, draw = _labels("tokens")
    third = (VOCABULARY - 1) // NUM_CLASSES
    common = 1 + y[:, None] * third + torch.randint(0, third, (len(y), LENGTH), generator=draw)
    other = torch.randint(1, VOCABULARY, (len(y), LENGTH), generator=draw)
    ids = torch.where(torch.rand(len(y), LENGTH, generator=draw) < 0.7, common, other)
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (len(y), 1), generator=draw)
    counting = (torch.arange(LENGTH) < lengths).long()
    rows = {"input_ids": ids * counting, "attention_mask": counting, "label": y}
    columns = tuple(Column(name, (LENGTH,), "int64") for name in ("input_ids", "attention_mask")[: 1 + mask])
    return _dataset(_classified(*columns), {name: rows[name] for name in (*(c.name for c in columns), "label")})


def image_and_numbers(size: int = 8) -> Dataset:
    """An image that tells one class from the others, and numbers that tell these apart."""
    y, draw = _labels("image and numbers")
    image = 0.5 * torch.randn(len(y), 3, size, size, generator=draw)
    image[y == 0, :, : size // 2] += 1
    numbers = 0.5 * torch.randn(len(y), 4, generator=draw)
    numbers[y == 1, :2] += 1
    numbers[y == 2, 2:] += 1
    columns = (Column("image", (3, size, size), "float32"), Column("numbers", (4,), "float32"))
    return _dataset(_classified(*columns), {"image": image, "numbers": numbers, "label": y})


def pictures_with_masks(size: int = 8) -> Dataset:
    """Images whose pixels are dark, middling or bright; each pixel's class is to be told."""
    _, draw = _labels("pictures")
    smooth = F.avg_pool2d(torch.randn(NUM_TRAIN + NUM_TEST, 1, size + 2, size + 2, generator=draw), 3, stride=1)
    classes = ((smooth > -0.15).long() + (smooth > 0.15).long()).squeeze(1)
    x = 3 * smooth + 0.1 * torch.randn(len(smooth), 3, size, size, generator=draw)
    return _dataset(Segmentation(NUM_CLASSES, size), {"image": x, "classes": classes})


def sentences() -> Dataset:
    """Tokens that count up, by one, two or three: which of them the first two say."""
    step, draw = _labels("sentences")
    first = torch.randint(0, VOCABULARY, (len(step), 1), generator=draw)
    ids = (first + (1 + step[:, None]) * torch.arange(LENGTH)) % VOCABULARY
    return _dataset(NextToken(VOCABULARY, LENGTH), {"input_ids": ids})


@dataclass(frozen=True)
class _Own:
    """What a user's own problem says in no other way than the built-in one."""

    num_classes: int

    def output(self, raw: Any) -> Tensor:
        """The logits in what the model returned."""
        return getattr(raw, "logits", raw)

    def mask(self, batch: Batch) -> Tensor | None:
        """No padding."""
        return None

    @property
    def augments(self) -> bool:
        """No."""
        return False

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch itself."""
        return batch


@dataclass(frozen=True)
class Segmentation(_Own):
    """A class for each pixel: logits [B, K, H, W]."""

    size: int

    def example(self, num_examples: int) -> Batch:
        """A batch of zeros."""
        shape = (num_examples, self.size, self.size)
        return {
            "image": torch.zeros(num_examples, 3, self.size, self.size),
            "classes": torch.zeros(shape, dtype=torch.int64),
        }

    def inputs(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The image."""
        return (batch["image"],), {}

    def loss(self, output: Tensor, batch: Batch) -> Weighted:
        """Summed over pixels, and their number."""
        return F.cross_entropy(output, batch["classes"], reduction="sum"), batch["classes"].numel()

    def metrics(self, output: Tensor, batch: Batch) -> dict[str, Weighted]:
        """Loss, and the share of pixels that are right."""
        right = (output.argmax(1) == batch["classes"]).sum()
        return {"loss": self.loss(output, batch), "accuracy": (right, batch["classes"].numel())}

    def y_features(self, batch: Batch) -> Tensor:
        """The share of each class in the picture."""
        return F.one_hot(batch["classes"], self.num_classes).float().mean((1, 2))

    def labels(self, batch: Batch) -> Tensor:
        """The class of most pixels."""
        return self.y_features(batch).argmax(1)


@dataclass(frozen=True)
class NextToken(_Own):
    """A word for each place of a sentence, from those before it: logits [B, L, V]."""

    length: int

    def example(self, num_examples: int) -> Batch:
        """A batch of zeros."""
        return {"input_ids": torch.zeros(num_examples, self.length, dtype=torch.int64)}

    def inputs(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The tokens, by name."""
        return (), {"input_ids": batch["input_ids"]}

    def loss(self, output: Tensor, batch: Batch) -> Weighted:
        """Summed over all tokens but the first, and their number."""
        wanted = batch["input_ids"][:, 1:]
        return F.cross_entropy(output[:, :-1].flatten(0, 1), wanted.flatten(), reduction="sum"), wanted.numel()

    def metrics(self, output: Tensor, batch: Batch) -> dict[str, Weighted]:
        """Loss, and the share of tokens that are right."""
        wanted = batch["input_ids"][:, 1:]
        right = (output[:, :-1].argmax(2) == wanted).sum()
        return {"loss": self.loss(output, batch), "accuracy": (right, wanted.numel())}

    def y_features(self, batch: Batch) -> Tensor:
        """How often each word is there."""
        return F.one_hot(batch["input_ids"], self.num_classes).float().mean(1)

    def labels(self, batch: Batch) -> Tensor:
        """The first word."""
        return batch["input_ids"][:, 0]


def _labels(kind: str) -> tuple[Tensor, torch.Generator]:
    """Classes in turn, so that each split has as many of each; and the generator of the rest."""
    return torch.arange(NUM_TRAIN + NUM_TEST) % NUM_CLASSES, generator(0, kind)


def _classified(*columns: Column) -> Classification:
    return Classification(NUM_CLASSES, columns)


def _dataset(problem: Problem, rows: Mapping[str, Tensor]) -> Dataset:
    every = torch.arange(NUM_TRAIN + NUM_TEST)
    return Dataset(problem, take(rows, every[:NUM_TRAIN]), take(rows, every[NUM_TRAIN:]))
