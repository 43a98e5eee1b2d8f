"""What is learned: how a batch becomes model inputs, and how outputs become a loss and metrics.

Shapes: B examples in a batch, C channels, H×W pixels, L tokens, K classes.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from scalefl.errors import ConfigError, nearest

Batch = Mapping[str, Tensor]
"""Named columns of equal length; the first dimension counts examples."""

Weighted = tuple[Tensor, float | Tensor]
"""A sum over examples and the weight to divide it by: a number, or a tensor of one."""


def num_rows(batch: Batch) -> int:
    """Examples in a batch; 0 for a batch without columns."""
    return next((len(column) for column in batch.values()), 0)


def take(batch: Batch, indices: Tensor) -> dict[str, Tensor]:
    """The rows at `indices` [N], numbers from 0 on, copied."""
    # Not `column[indices]`, which copies number by number: 15 times as long for a batch of images.
    return {name: column.index_select(0, indices) for name, column in batch.items()}


def masks(mask_BL: Tensor | None, features: Tensor) -> bool:
    """Whether a mask says which tokens of features [B, L, D] count; it does not for another number of tokens."""
    return mask_BL is not None and features.ndim == 3 and mask_BL.shape == features.shape[:2]


def without_padding(features: Tensor, mask_BL: Tensor | None) -> Tensor:
    """Token features [B, L, D], zero where `mask_BL` says that a token does not count; others as they are."""
    if mask_BL is None or not masks(mask_BL, features):
        return features
    return features.masked_fill((mask_BL == 0).unsqueeze(-1), 0.0)


@dataclass(frozen=True)
class Column:
    """One column of a batch: the shape of one example and its dtype (a torch name, as "uint8").

    Raises:
        ConfigError: no such dtype, or sizes that are no numbers from 1 on.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        shape = tuple(self.shape) if isinstance(self.shape, Sequence) else None
        if shape is None or not all(isinstance(size, int) and size > 0 for size in shape):
            raise ConfigError(
                f"column {self.name!r}: shape = {self.shape!r}: expected the sizes of one example, as (3, 32, 32), or "
                "() for a single number"
            )
        short = str(self.dtype).removeprefix("torch.")
        dtype = getattr(torch, short, None)
        if not isinstance(dtype, torch.dtype):
            known = ("float32", "float64", "uint8", "int16", "int32", "int64", "bool")
            raise ConfigError(
                f"column {self.name!r}: dtype = {self.dtype!r}{nearest(short, known)}: expected a name "
                f"of torch's, as {', '.join(known)}"
            )
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "dtype", str(dtype).removeprefix("torch."))

    def zeros(self, num_examples: int) -> Tensor:
        """`num_examples` rows of zeros, on the current default device."""
        return torch.zeros(num_examples, *self.shape, dtype=getattr(torch, self.dtype))


class Problem(Protocol):
    """What is learned. Frozen and hashable: two equal problems have equal memory predictions."""

    def __hash__(self) -> int: ...

    @property
    def num_classes(self) -> int:
        """K."""
        ...

    def example(self, num_examples: int) -> Batch:
        """A batch of zeros with the shapes and dtypes of real data."""
        ...

    def inputs(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keyword arguments for the model's forward."""
        ...

    def output(self, raw: Any) -> Tensor:
        """The logits [B, K] in what the model returned."""
        ...

    def loss(self, output: Tensor, batch: Batch) -> Weighted:
        """Summed loss and the weight that makes it a mean."""
        ...

    def metrics(self, output: Tensor, batch: Batch) -> dict[str, Weighted]:
        """Summed metrics and their weights."""
        ...

    def y_features(self, batch: Batch) -> Tensor:
        """The label as a vector for each example, for nHSIC(Y; Z): [B, K]."""
        ...

    def labels(self, batch: Batch) -> Tensor:
        """The label of each example, by which data is partitioned and stratified: [B], int64."""
        ...

    def mask(self, batch: Batch) -> Tensor | None:
        """Which tokens count, [B, L], for token models; None otherwise."""
        ...

    @property
    def couples_examples(self) -> bool:
        """Whether the loss of a batch is more than the sum of its examples', as a contrastive one is.

        Clients then keep whole batches together.
        """
        ...

    @property
    def augments(self) -> bool:
        """Whether `augment` changes batches."""
        ...

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        """A randomly changed copy of a training batch."""
        ...


Augmentation = Literal["crop", "flip"]


@dataclass(frozen=True)
class Classification:
    """One label for each example, from an image, a sequence of tokens or a vector.

    Args:
        num_classes: K.
        columns: the model's inputs. One image or vector column is passed by position; several
            (token ids, a mask) are passed by keyword under their own names, and so are token ids alone: int64, or
            int32 [L].
        label: name of the int64 label column.
        mean, std: per-channel normalisation of 8-bit images (uint8 [H, W] and more, and a uint8 column alone) after
            division by 255. Integer columns alone, and int16 images, else become real numbers as they are; other
            columns are passed as they are.
        augmentation: "crop" (4 pixels of padding, then a random window) and "flip" (left-right),
            drawn for each example of the first column, an image.
        couples_examples: whether the loss (of a subclass) compares the examples of a batch with each other.

    Raises:
        ConfigError: columns that are none or not told apart, or a normalisation that does not fit them.
    """

    num_classes: int
    columns: tuple[Column, ...]
    label: str = "label"
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    augmentation: tuple[Augmentation, ...] = ()
    couples_examples: bool = False

    def __post_init__(self) -> None:
        self._settle()
        names = [column.name for column in self.columns]
        has_own_example = type(self).example is not Classification.example
        if not names or len({*names, self.label}) <= len(names) - has_own_example:
            raise ConfigError(
                f"columns {names} and label {self.label!r}: expected one column or more, each of another name"
            )
        self._check_normalisation()
        if self.augmentation and len(self.columns[0].shape) != 3:
            shape = self.columns[0].shape
            raise ConfigError(f"augmentation {self.augmentation} needs images [C, H, W], the data has {shape}")

    def example(self, num_examples: int) -> Batch:
        """A batch of zeros with the shapes and dtypes of real data."""
        batch = {column.name: column.zeros(num_examples) for column in self.columns}
        return {**batch, self.label: torch.zeros(num_examples, dtype=torch.int64)}

    def inputs(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keyword arguments for the model's forward."""
        if len(self.columns) > 1 or _is_token_ids(self.columns[0]):
            return (), {column.name: self._ready(column, batch[column.name]) for column in self.columns}
        return (self._ready(self.columns[0], batch[self.columns[0].name]),), {}

    def output(self, raw: Any) -> Tensor:
        """The logits [B, K] in what the model returned: a tensor, or an object or a mapping with `logits`."""
        logits = raw.get("logits") if isinstance(raw, Mapping) else getattr(raw, "logits", raw)
        if not isinstance(logits, Tensor):
            raise ConfigError(
                f"the model returned {_told(raw)}: expected a tensor, or an object or dict with `logits`. A Problem of "
                "your own (a subclass of Classification) can say in `output` which of it is the prediction"
            )
        return logits

    def loss(self, output: Tensor, batch: Batch) -> Weighted:
        """Summed cross-entropy and the number of examples."""
        labels = batch[self.label]
        return F.cross_entropy(output, labels, reduction="sum"), len(labels)

    def metrics(self, output: Tensor, batch: Batch) -> dict[str, Weighted]:
        """Summed loss and correct answers, each with the number of examples."""
        labels = batch[self.label]
        return {
            "loss": self.loss(output, batch),
            "accuracy": ((output.argmax(1) == labels).sum(), len(labels)),
        }

    def y_features(self, batch: Batch) -> Tensor:
        """One-hot labels [B, K]."""
        return F.one_hot(batch[self.label], self.num_classes)

    def labels(self, batch: Batch) -> Tensor:
        """The label column."""
        return batch[self.label]

    def mask(self, batch: Batch) -> Tensor | None:
        """`attention_mask` where the data has one."""
        return batch.get("attention_mask")

    @property
    def augments(self) -> bool:
        """Whether there is any augmentation."""
        return bool(self.augmentation)

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Randomly cropped and flipped images; the batch itself where nothing is asked for."""
        if not self.augmentation:
            return batch
        name = self.columns[0].name
        images_BCHW = batch[name]
        if "crop" in self.augmentation:
            images_BCHW = _random_crop(images_BCHW, 4, generator)
        if "flip" in self.augmentation:
            images_BCHW = _random_flip(images_BCHW, generator)
        return {**batch, name: images_BCHW}

    def _settle(self) -> None:
        """Make of lists and numpy's numbers what can be hashed and sent."""
        columns = (self.columns,) if isinstance(self.columns, Column) else tuple(self.columns)
        if not all(isinstance(column, Column) for column in columns):
            raise ConfigError(f"columns = {self.columns!r}: expected Column(name, shape, dtype) of each input")
        if not hasattr(self.num_classes, "__index__") or operator.index(self.num_classes) < 1:
            raise ConfigError(f"num_classes = {self.num_classes!r}: expected a whole number from 1 on")
        unknown = [word for word in self.augmentation if word not in get_args(Augmentation)]
        if unknown:
            hint = nearest(str(unknown[0]), get_args(Augmentation))
            raise ConfigError(f"augmentation {unknown[0]!r}{hint}; known: {', '.join(get_args(Augmentation))}")
        object.__setattr__(self, "columns", columns)
        object.__setattr__(self, "num_classes", operator.index(self.num_classes))
        object.__setattr__(self, "augmentation", tuple(self.augmentation))
        for name in ("mean", "std"):
            values = getattr(self, name)
            numbers = (values,) if isinstance(values, int | float) else values
            object.__setattr__(self, name, tuple(float(value) for value in numbers))

    def _check_normalisation(self) -> None:
        if 0 in self.std:
            raise ConfigError(f"std = {self.std}: expected no zero, by which images would be divided")
        for column in filter(self._is_8_bit_image, self.columns):
            channels = column.shape[0] if column.shape else 1
            if len(self.mean) not in (1, channels) or len(self.std) not in (1, channels):
                raise ConfigError(
                    f"mean of {len(self.mean)} and std of {len(self.std)} numbers for column {column.name!r} of "
                    f"{channels} channels: expected 1 or {channels}"
                )

    def _is_8_bit_image(self, column: Column) -> bool:
        return column.dtype == "uint8" and (len(column.shape) > 1 or len(self.columns) == 1)

    def _ready(self, column: Column, x: Tensor) -> Tensor:
        """A column as the model gets it."""
        if self._is_8_bit_image(column):
            return self._normalised(x)
        alone = len(self.columns) == 1 and not _is_token_ids(column)
        is_image = column.dtype in ("int8", "int16", "uint16") and len(column.shape) > 1
        is_real = x.is_floating_point() or x.is_complex()
        return x.float() if (alone or is_image) and not is_real else x

    def _normalised(self, x: Tensor) -> Tensor:
        mean, std = (_of_channels(values, x) for values in (self.mean, self.std))
        return x.float().div_(255).sub_(mean).div_(std)


def _told(raw: Any) -> str:
    """What a model returned, for messages."""
    if isinstance(raw, Mapping):
        return f"a {type(raw).__name__} with {', '.join(map(repr, raw)) or 'nothing in it'}"
    if isinstance(raw, tuple | list):
        return f"a {type(raw).__name__} of {len(raw)}"
    return type(raw).__name__


def _is_token_ids(column: Column) -> bool:
    return column.dtype == "int64" or (column.dtype == "int32" and len(column.shape) < 2)


def _of_channels(values: tuple[float, ...], x: Tensor) -> Tensor | float:
    """One number for all channels of x [B, C, ...], or one for each."""
    if len(values) == 1:
        return values[0]
    return torch.tensor(values, device=x.device).view(-1, *([1] * (x.ndim - 2)))


def _random_crop(images_BCHW: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    b, _, h, w = images_BCHW.shape
    padded = F.pad(images_BCHW, (padding,) * 4)
    top, left = torch.randint(0, 2 * padding + 1, (2, b), generator=generator)
    windows_BCTLHW = padded.unfold(2, h, 1).unfold(3, w, 1)
    return windows_BCTLHW[torch.arange(b), :, top, left]


def _random_flip(images_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    flip_B = torch.rand(len(images_BCHW), generator=generator) < 0.5
    return torch.where(flip_B[:, None, None, None], images_BCHW.flip(3), images_BCHW)
