"""The splits of a data set as they lie in files, and their columns as tensors.

Shapes: N rows, C channels, H×W pixels.
"""

from __future__ import annotations

import contextlib
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from scalefl.data.checks import check_finite
from scalefl.data.images import Size, as_planes, frame, stacked
from scalefl.errors import DataError
from scalefl.rng import seeded

READERS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".json": "json", ".jsonl": "json"}
"""What `datasets` calls the reader for files of an ending."""

IMAGE, CLASS = "Image", "ClassLabel"


class Split(Protocol):
    """Rows of named columns."""

    name: str

    def __len__(self) -> int: ...

    @property
    def kinds(self) -> Mapping[str, str]:
        """What each column holds: "Image", "ClassLabel", "List", or the name of a type as "int64" or "string"."""
        ...

    def class_names(self, column: str) -> Sequence[str] | None:
        """The names of classes, where the file has them."""
        ...

    def values(self, column: str) -> Any:
        """Labels or ids as an array, [N] or [N, ...]; text as unicode."""
        ...

    def numbers(self, column: str) -> Tensor:
        """Numbers as int64 or float32 (pixels and signals in arrays as they are), [N] or [N, ...], all finite."""
        ...

    def texts(self, column: str) -> Sequence[str]:
        """Text."""
        ...

    def images(self, column: str, size: Size | None) -> Tensor:
        """Images as uint8 [N, C, H, W]."""
        ...


def require(split: Split, column: str) -> None:
    """Refuse a column that is not there.

    Raises:
        DataError: it names those that are.
    """
    if column not in split.kinds:
        raise DataError(f"split {split.name!r} has no column {column!r}; columns: {described(split)}")


def described(split: Split) -> str:
    """The columns and what they hold, for messages."""
    return ", ".join(f"{name} ({kind})" for name, kind in split.kinds.items())


def is_integer(kind: str) -> bool:
    """Whether a column holds single whole numbers."""
    return kind == CLASS or kind.startswith(("int", "uint", "bool"))


class TableSplit:
    """A split that `datasets` has read."""

    def __init__(self, name: str, rows: Any) -> None:
        self.name, self._rows = name, rows

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def kinds(self) -> Mapping[str, str]:
        """See `Split`."""
        return {name: _kind(feature) for name, feature in self._rows.features.items()}

    def class_names(self, column: str) -> Sequence[str] | None:
        """See `Split`."""
        return self._rows.features[column].names if self.kinds[column] == CLASS else None

    def values(self, column: str) -> Any:
        """See `Split`."""
        values = self._filled(column)
        if self.kinds[column] == IMAGE:
            raise DataError(f"label column {column!r} holds {IMAGE}: expected integers or text")
        try:
            array = np.asarray(values)
        except ValueError as error:
            raise DataError(
                f"column {column!r} holds lists of unequal length: expected a value for each row"
            ) from error
        if array.dtype.kind == "O" and all(isinstance(value, str) for value in values):
            array = array.astype(str)
        if array.dtype.kind not in "biufUS":
            raise DataError(f"column {column!r} holds {self.kinds[column]}: expected integers or text")
        return array

    def numbers(self, column: str) -> Tensor:
        """See `Split`."""
        require(self, column)
        where = f"column {column!r} of split {self.name!r}"
        if (flat := _regular(self._rows.data.column(column).combine_chunks())) is not None:
            return _as_input(flat, where)
        values = self._filled(column)
        kind = self.kinds[column]
        if kind == "string" or kind == "large_string":
            raise DataError(
                f"column {column!r} holds {kind}: expected numbers in every row; words of a text are numbered by "
                f"`text = {column!r}`, kinds by a column of 0 and 1 for each"
            )
        try:
            array = np.asarray(values)
        except ValueError as error:
            raise DataError(f"column {column!r}: {_odd_row(values)}: pad or cut them to one length") from error
        if array.dtype.kind not in "iubf" or kind == IMAGE:
            lists = [row for row, value in enumerate(values) if isinstance(value, list)]
            empty = [row for row in lists if np.asarray(values[row]).dtype.kind == "O"]
            hole = f", and row {empty[0]} has none in some place" if empty else ""
            raise DataError(f"column {column!r} holds {kind}: expected numbers in every row{hole}")
        return _as_input(array, where)

    def texts(self, column: str) -> Sequence[str]:
        """See `Split`."""
        values = self._filled(column)
        if not all(isinstance(value, str) for value in values):
            raise DataError(f"column {column!r} holds {self.kinds[column]}: expected text")
        return values

    def images(self, column: str, size: Size | None) -> Tensor:
        """See `Split`."""
        import datasets

        require(self, column)
        try:
            # Not decoded by `datasets`, so that a bad image can be named by its row.
            encoded = self._rows.cast_column(column, datasets.Image(decode=False))[column]
        except (TypeError, ValueError, NotImplementedError) as error:
            raise DataError(f"column {column!r} holds {self.kinds[column]}: expected images") from error
        decode = datasets.Image().decode_example
        frames = (
            frame(decode, image, f"image {row} of split {self.name!r}", size) for row, image in enumerate(encoded)
        )
        return stacked(frames, self.name)

    def _filled(self, column: str) -> list[Any]:
        require(self, column)
        values: list[Any] = self._rows[column][:]
        if None in values:
            raise DataError(f"column {column!r} of split {self.name!r}: row {values.index(None)} is empty")
        return values


class ArraySplit:
    """A split of numpy's arrays: 8-bit ones [N, H, W] and more are images."""

    def __init__(self, name: str, arrays: Mapping[str, Any]) -> None:
        self.name, self._arrays = name, arrays

    def __len__(self) -> int:
        return len(next(iter(self._arrays.values())))

    @property
    def kinds(self) -> Mapping[str, str]:
        """See `Split`."""
        return {name: self._kind(array) for name, array in self._arrays.items()}

    def class_names(self, column: str) -> Sequence[str] | None:
        """See `Split`."""
        return None

    def values(self, column: str) -> Any:
        """See `Split`."""
        require(self, column)
        array = self._arrays[column]
        return array.astype(str) if array.dtype.kind in "US" else array

    def numbers(self, column: str) -> Tensor:
        """See `Split`."""
        require(self, column)
        array = self._arrays[column]
        if array.dtype.kind not in "iubf":
            raise DataError(f"column {column!r} holds {self.kinds[column]}: expected numbers in every row")
        # Pixels and signals; what else is of few bits may be ids or a mask.
        dims = {np.dtype(np.uint8): 1, np.dtype(np.int8): 2, np.dtype(np.int16): 2}.get(array.dtype, array.ndim)
        return _as_input(array, f"column {column!r} of split {self.name!r}", as_is=array.ndim > dims)

    def texts(self, column: str) -> Sequence[str]:
        """See `Split`."""
        values = self.values(column)
        if values.dtype.kind != "U" or values.ndim != 1:
            raise DataError(f"column {column!r} holds {self.kinds[column]}: expected text")
        texts: list[str] = values.tolist()
        return texts

    def images(self, column: str, size: Size | None) -> Tensor:
        """See `Split`."""
        require(self, column)
        if self.kinds[column] != IMAGE:
            raise DataError(
                f"column {column!r} holds {self.kinds[column]}: expected images, uint8 [N, H, W] or [N, H, W, C]; "
                f"other numbers are read by `columns = [{column!r}]`, as they are"
            )
        return as_planes(self._arrays[column], column, size)

    def _kind(self, array: Any) -> str:
        if array.dtype.kind in "US":
            return "string"
        if array.dtype == np.uint8 and array.ndim in (3, 4):
            return IMAGE
        shape = array.shape[1:] if array.shape[1:] != (1,) else ()
        return f"{array.dtype}" if not shape else f"arrays {list(shape)} of {array.dtype}"


@contextlib.contextmanager
def opened(name: str, subset: str | None, path: Path) -> Iterator[Mapping[str, Split]]:
    """The splits by name, from a file, a folder or the hub; they can be read as long as the block lasts.

    Raises:
        DataError: there is no such thing, or it cannot be read.
    """
    if path.is_file() and path.suffix == ".npz":
        yield _of_arrays(path)
    elif path.is_dir() and (archives := sorted(path.glob("*.npz"))):
        yield _of_archives(archives)
    else:
        # seeded: importing `datasets` draws from Python's global generator. The cache of a folder goes when its
        # rows are in memory; it would only outlive the folder's next change.
        with seeded(0), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache, _no_progress_bars():
            yield {key: TableSplit(key, rows) for key, rows in _read(name, subset, path, cache).items()}


def _read(name: str, subset: str | None, path: Path, cache: str) -> Any:
    import datasets  # here: it takes a second, which runs on other data should not pay

    options: dict[str, Any] = {"cache_dir": cache if path.exists() else None}
    if path.is_dir():
        target, what = str(path), f"folder {path}, which holds {_listing(path)}"
    elif path.is_file():
        if path.suffix not in READERS:
            known = ", ".join((*READERS, ".npz"))
            raise DataError(f"{path} is a file that ends in {path.suffix!r}: give a folder, or a file of {known}")
        target, what = READERS[path.suffix], str(path)
        options["data_files"] = {"train": str(path)}
        if path.suffix == ".tsv":
            options["sep"] = "\t"
    elif _looks_like_path(name):
        raise DataError(f"no folder {path}; {_nearest_parent(path)} holds {_listing(_nearest_parent(path))}")
    else:
        target, what = name, f"{name!r}: no such folder here, and none from the Hugging Face hub"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # its reader of CSV leaves files to the garbage collector
            return datasets.load_dataset(target, subset, **options)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"cannot read {what}: {' '.join(str(error.__cause__ or error).split())}") from error


def _of_arrays(path: Path) -> dict[str, Split]:
    """One file: all its arrays are a split, unless their names begin or end with those of splits."""
    found: dict[str, dict[str, Any]] = {}
    for name, array in _arrays(path).items():
        words = name.split("_")
        place = next((i for i in (0, -1) if len(words) > 1 and words[i] in _SPLIT_NAMES), None)
        split = "train" if place is None else _SPLIT_NAMES[words.pop(place)]
        found.setdefault(split, {})["_".join(words)] = array
    return {split: _checked(path, split, arrays) for split, arrays in found.items()}


def _of_archives(paths: Sequence[Path]) -> dict[str, Split]:
    """Several files: each is a split."""
    if len(paths) == 1 and paths[0].stem not in _SPLIT_NAMES:
        return _of_arrays(paths[0])
    return {path.stem: _checked(path, path.stem, _arrays(path)) for path in paths}


_SPLIT_NAMES = {
    "train": "train",
    "test": "test",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
}


def _arrays(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        why = "it holds Python objects, not arrays of numbers or text" if "allow_pickle" in str(error) else error
        raise DataError(f"cannot read {path}: {why}") from error


def _checked(path: Path, split: str, arrays: dict[str, Any]) -> Split:
    lengths = {name: len(array) if array.ndim else None for name, array in arrays.items()}
    if not arrays or len(set(lengths.values())) > 1 or None in lengths.values():
        raise DataError(f"{path}: the arrays of split {split!r} have the lengths {lengths}: expected one for all")
    return ArraySplit(split, arrays)


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
    is_file = Path(name).suffix in (*READERS, ".npz")
    return is_file or name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1


def _nearest_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def _listing(folder: Path, limit: int = 10) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "nothing") + more


def _kind(feature: Any) -> str:
    return str(getattr(feature, "dtype", None) if type(feature).__name__ == "Value" else type(feature).__name__)


def _odd_row(values: Sequence[Any]) -> str:
    """The first row that is made otherwise than row 0."""
    lengths = [len(value) if isinstance(value, list) else 1 for value in values]
    for row, value in enumerate(values):
        if lengths[row] != lengths[0]:
            return f"row {row} has {lengths[row]} values, row 0 has {lengths[0]}"
        try:
            np.asarray(value)
        except ValueError:
            return f"row {row} has lists of unequal length"
    shapes = [np.shape(value) for value in values]
    row = next((row for row, shape in enumerate(shapes) if shape != shapes[0]), 0)
    return f"row {row} has the shape {list(shapes[row])}, row 0 has {list(shapes[0])}"


def _regular(lists: Any) -> Any:
    """Nested lists of Arrow's, all of one length, as an array; None where they are something else.

    A twentieth of the time that lists of Python's numbers take, and of their memory.
    """
    from pyarrow import compute, types

    shape = [len(lists)]
    while types.is_list(lists.type) or types.is_large_list(lists.type) or types.is_fixed_size_list(lists.type):
        lengths = compute.min_max(compute.list_value_length(lists))
        if lists.null_count or lengths["min"] != lengths["max"] or not lengths["max"].as_py():
            return None
        shape.append(lengths["max"].as_py())
        lists = lists.flatten()
    numbers = types.is_floating(lists.type) or types.is_integer(lists.type) or types.is_boolean(lists.type)
    return lists.to_numpy(zero_copy_only=False).reshape(shape) if numbers and not lists.null_count else None


def _as_input(array: Any, where: str, *, as_is: bool = False) -> Tensor:
    array = np.ascontiguousarray(array, np.float32 if array.dtype.kind == "f" else array.dtype if as_is else np.int64)
    found = torch.from_numpy(array if array.flags.writeable else array.copy())
    check_finite(found, where)
    return found
