"""Class labels from what data sets have in their place: one whole number 0 … K − 1 for each example.

Shapes: N examples, K classes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scalefl.errors import DataError, nearest

_log = logging.getLogger("scalefl")

OWN_PROBLEM = "for what is no single class for each example, write a Problem of your own (docs/data.md)"
_MOST_NAMED = 20

Values = npt.NDArray[Any]


def class_labels(column: Tensor, where: str) -> Tensor:
    """A label column as int64 [N].

    Integers of any width, booleans and whole real numbers are taken as they are, [N, 1] as [N], and one-hot rows
    [N, K] as the place of their 1.

    Args:
        column: labels.
        where: what messages call it.

    Raises:
        DataError: real targets, several labels for an example, or more than a number for each.
    """
    if column.ndim == 2 and column.shape[1] == 1:
        column = column[:, 0]
    if column.is_complex():
        raise DataError(f"{where} holds complex numbers: expected a class 0 … K − 1 for each example")
    if column.ndim == 2:
        return _places(column, where)
    if column.ndim != 1:
        shape = list(column.shape[1:])
        raise DataError(f"{where} holds {shape} for each example, not one class: {OWN_PROBLEM}")
    if column.is_floating_point():
        _check_whole(column, where)
    return column.long()


def check_classes(labels: Tensor, num_classes: int, what: str) -> None:
    """Refuse labels [N] outside of 0 … K − 1.

    Raises:
        DataError: it names the first row that has one, or says that there are no labels at all.
    """
    low, high = (int(value) for value in labels.aminmax())
    if low >= 0 and high < num_classes:
        return
    if low == high == -1:
        raise DataError(f"{what} labels are all -1: these rows have no labels; give rows that have some")
    wrong = int(((labels < 0) | (labels >= num_classes)).nonzero()[0])
    shifted = low == 1 and high == num_classes
    what_to_do = "subtract 1 from them" if shifted else "number the classes from 0, or raise num_classes"
    raise DataError(
        f"{what} labels run from {low} to {high}: expected 0 to {num_classes - 1}; "
        f"the first other is {int(labels[wrong])}, in row {wrong}: {what_to_do}"
    )


def numbered(
    splits: Mapping[str, Values], column: str, classes: Sequence[int | str] = (), *, alone: bool = False
) -> tuple[dict[str, Tensor], int]:
    """The labels of a source's splits as int64 [N] each, and K.

    Text is numbered in sorted order; whole numbers are taken as they are, and K is one more than the highest.

    Args:
        splits: values of the label column by name of the split.
        column: what it is called.
        classes: the labels in order of their numbers, where neither of these is meant.
        alone: whether these are the rows of one client of many: what others hold is not known.

    Raises:
        DataError: the values are no classes, or their numbers would be guesswork.
    """
    if classes:
        return {name: _by_list(values, column, name, classes) for name, values in splits.items()}, len(classes)
    if any(values.dtype.kind in "US" for values in splits.values()):
        known = sorted({str(value) for values in splits.values() for value in np.unique(values.astype(str))})
        if alone:
            raise DataError(
                f"label column {column!r} holds text, and what other clients hold is not known here: list all labels "
                f"in the order of the run in `classes`; here are {_listed(known)}"
            )
        _log.info("labels of %r: %s", column, ", ".join(f"{i} = {word}" for i, word in enumerate(known[:_MOST_NAMED])))
        return {name: _by_list(values, column, name, known) for name, values in splits.items()}, len(known)
    found = {
        name: class_labels(torch.from_numpy(values), f"label column {column!r} of split {name!r}")
        for name, values in splits.items()
    }
    everything = torch.cat(list(found.values()))
    low, high = (int(value) for value in everything.aminmax())
    if low < 0 or (low > 0 and not alone):
        known = np.unique(everything.numpy()).tolist()
        raise DataError(
            f"label column {column!r} has values from {low} to {high}, and classes are numbered from 0: to number them "
            f"in this order, set `classes` = {_listed(known)}"
        )
    if high >= len(everything) and not alone:
        raise DataError(
            f"label column {column!r} has values up to {high} in {len(everything)} rows, fewer than that would be "
            f"classes: set `classes` to the list of them; {OWN_PROBLEM}"
        )
    return found, 1 + high


def _by_list(values: Values, column: str, split: str, classes: Sequence[Any]) -> Tensor:
    where = f"label column {column!r} of split {split!r}"
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1:
        raise DataError(f"{where} holds {list(values.shape[1:])} for each example, and `classes` names single values")
    number_of = {value: number for number, value in enumerate(classes)}
    found = [
        number_of.get(value, -1) for value in (values.astype(str) if values.dtype.kind in "US" else values).tolist()
    ]
    if -1 in found:
        row = found.index(-1)
        value = values[row].item()
        hint = nearest(value, map(str, classes)) if isinstance(value, str) else ""
        raise DataError(f"{where}: row {row} has {value!r}, which is not among the classes {_listed(classes)}{hint}")
    return torch.tensor(found, dtype=torch.int64)


def _places(column: Tensor, where: str) -> Tensor:
    """Where each row of one-hot labels [N, K] has its 1."""
    ones = column == 1
    odd = (~(ones | (column == 0)).all(1)).nonzero().flatten()
    if len(odd):
        row = int(odd[0])
        few = ", ".join(f"{value:g}" for value in column[row, :5].tolist()) + (", ..." if column.shape[1] > 5 else "")
        raise DataError(
            f"{where} holds {column.shape[1]} numbers for each example (row {row}: {few}), not one class: {OWN_PROBLEM}"
        )
    counts = ones.sum(1)
    odd = (counts != 1).nonzero().flatten()
    if len(odd):
        row = int(odd[0])
        raise DataError(
            f"{where} marks {int(counts[row])} of {column.shape[1]} classes in row {row}, and one class for each "
            f"example is what is learned: {OWN_PROBLEM}"
        )
    return ones.int().argmax(1)


def _check_whole(column: Tensor, where: str) -> None:
    odd = (column != column.round()).nonzero().flatten()  # NaN is unlike itself; infinity is not
    odd = odd if len(odd) else column.isinf().nonzero().flatten()
    if len(odd):
        row = int(odd[0])
        raise DataError(
            f"{where} holds real numbers (row {row}: {float(column[row]):g}), not classes 0 … K − 1: {OWN_PROBLEM}"
        )


def _listed(values: Sequence[Any]) -> str:
    """As a TOML list."""
    words = [f'"{value}"' if isinstance(value, str) else str(value) for value in values[:_MOST_NAMED]]
    return f"[{', '.join(words)}{', ...' if len(values) > _MOST_NAMED else ''}]"
