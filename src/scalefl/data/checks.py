"""Rows held against the problem that they are said to be about, before anything is predicted or trained with them.

Shapes: N rows.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scalefl.data.labels import check_classes, class_labels
from scalefl.errors import DataError, nearest
from scalefl.problem import Batch, Classification, Problem, num_rows

_log = logging.getLogger("scalefl")

LARGE = 1e4
"""From values of this size on, a column that nobody scales is warned of."""
_SAMPLE = 1024  # rows
_CHUNK_NUMBERS = 2**22  # looked through at once: what that takes should not count beside the rows


def conformed(problem: Problem, rows: Any, what: str) -> dict[str, Tensor]:
    """Rows as tensors with the names, shapes and dtypes that the problem says; columns that it does not name too.

    Arrays become tensors; numbers become wider ones of their kind (float64 as float32, too), and labels of a
    `Classification` int64 [N], see `class_labels`. Other differences are refused.

    Args:
        problem: what it says is read from its `example`.
        rows: columns by name.
        what: whose rows these are, for messages: "training", "client 3".

    Raises:
        DataError: it names the column, what is said, and what is there.
    """
    if not isinstance(rows, Mapping):
        raise DataError(
            f"the {what} rows are a {type(rows).__name__}: expected a mapping from column names to tensors [N, ...]"
        )
    if not rows:
        return {}
    said = problem.example(2)
    for name in said:
        if name not in rows:
            raise DataError(
                f"the {what} rows have no column {name!r}, which the problem names{nearest(name, map(str, rows))}; "
                f"columns: {', '.join(map(str, rows))}"
            )
    found = {name: _tensor(column, name, what, is_read=name in said) for name, column in rows.items()}
    for name, example in said.items():
        if isinstance(problem, Classification) and name == problem.label and _is_class(example):
            found[name] = class_labels(found[name], f"label column {name!r} of the {what} rows")
        found[name] = _as_said(found[name], example, name, what)
    lengths = {name: len(column) for name, column in found.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"the {what} columns differ in length: {lengths}")
    return found


def check_values(problem: Problem, rows: Batch, what: str) -> None:
    """Refuse numbers that are not finite in what the problem reads, and labels that are no classes of it.

    Raises:
        DataError: it names column, row and value.
    """
    if not num_rows(rows):
        return
    for name in problem.example(1):
        check_finite(rows[name], f"column {name!r} of the {what} rows")
    try:
        labels = problem.labels(rows)
    except Exception as error:  # a problem of the user's own may fail in any way
        raise DataError(
            f"{type(problem).__name__}.labels of the {what} rows: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(labels, Tensor) or labels.shape != (num_rows(rows),) or labels.dtype != torch.int64:
        told = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise DataError(
            f"{type(problem).__name__}.labels gives {told} for the {what} rows: expected int64 [{num_rows(rows)}]"
        )
    check_classes(labels, problem.num_classes, what)


def check_finite(column: Tensor, where: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        DataError: it names the first row that has one.
    """
    numbers = torch.view_as_real(column) if column.is_complex() else column
    if not numbers.is_floating_point() or not numbers.numel() or all(map(torch.isfinite, numbers.aminmax())):
        return
    flat = column.reshape(len(column), -1)
    at_once = max(1, _CHUNK_NUMBERS // flat.shape[1])
    for row in range(0, len(flat), at_once):
        chunk = flat[row : row + at_once]
        bad = (~chunk.isfinite()).nonzero()
        if len(bad):
            at, place = bad[0].tolist()
            among = f", number {place} of it," if chunk.shape[1] > 1 else ""
            raise DataError(
                f"{where}: row {row + at}{among} is {chunk[at, place].item()}: leave the row out, or fill the value in"
            )


def warn_of_scale(problem: Problem, rows: Batch) -> None:
    """Warn where the model would get numbers so large that training is likely to diverge; a sample of rows tells."""
    if not num_rows(rows):
        return
    args, kwargs = problem.inputs({name: column[:_SAMPLE] for name, column in rows.items()})
    columns = problem.columns if isinstance(problem, Classification) else ()
    named = {(columns[i].name if i < len(columns) else f"input {i}"): x for i, x in enumerate(args)}
    for name, x in {**named, **kwargs}.items():
        if not isinstance(x, Tensor) or not x.is_floating_point() or not x.numel():
            continue
        low, high = (float(value) for value in x.aminmax())
        if max(-low, high) < LARGE:
            continue
        sizes = x.reshape(len(x), -1).abs().amax(0)
        large = (sizes >= LARGE).nonzero().flatten().tolist()
        where = f", in number {', '.join(map(str, large[:5]))} of {len(sizes)}" if len(large) < len(sizes) else ""
        _log.warning(
            "column %r has values from %.4g to %.4g%s: training on numbers of this size is likely to diverge; bring "
            "them near -1 … 1 first (subtract the mean, divide by the deviation)",
            *(name, low, high, where),
        )


def _is_class(example: Tensor) -> bool:
    return example.ndim == 1 and example.dtype == torch.int64


def _tensor(column: Any, name: str, what: str, *, is_read: bool) -> Tensor:
    """A column as a dense tensor in this process's memory, without history."""
    where = f"column {name!r} of the {what} rows"
    if isinstance(column, Tensor):
        if column.layout is not torch.strided or column.is_quantized or column.is_nested:
            kind = "quantized" if column.is_quantized else "nested" if column.is_nested else "sparse"
            way = {"sparse": "to_dense()", "quantized": "dequantize()", "nested": "to_padded_tensor(0)"}[kind]
            raise DataError(f"{where} is a {kind} tensor: rows are taken from dense ones; make it one with .{way}")
        if column.is_meta:
            raise DataError(f"{where} is on the meta device: it has no values")
        found = column.detach().cpu()
    else:
        found = _from_array(column, where, is_read=is_read)
    if not found.ndim:
        raise DataError(f"{where} is a single number: expected one for each row")
    return found.contiguous()


def _from_array(column: Any, where: str, *, is_read: bool) -> Tensor:
    told = f"{where} is a {type(column).__name__}"
    if np.ma.is_masked(column):
        raise DataError(f"{told} with masked values: fill them in, as by .filled(0), or leave their rows out")
    try:
        array = np.asarray(column)
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{told} that makes no array ({error}): expected a tensor [N, ...]") from error
    if array.dtype.kind in "USO" and array.ndim == 1 and all(isinstance(value, str) for value in array):
        # Nobody computes with ids of clients: any numbers for them will do.
        codes = np.unique(array, return_inverse=True)[1]
        if not is_read:
            return torch.from_numpy(codes)
        raise DataError(f"{where} holds text: number it first, as by numpy.unique(values, return_inverse=True)[1]")
    if array.dtype.kind not in "biufc":
        dense = "; make it dense first, as by .toarray()" if hasattr(column, "toarray") else ""
        raise DataError(f"{told} of {array.dtype}: expected a tensor or array of numbers [N, ...]{dense}")
    if array.dtype.itemsize > (16 if array.dtype.kind == "c" else 8):  # numpy's long double
        array = array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    # Copied where it may not be written to: models may change their input in place.
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _as_said(column: Tensor, example: Tensor, name: str, what: str) -> Tensor:
    shape, said = tuple(column.shape[1:]), tuple(example.shape[1:])
    if shape != said:
        raise DataError(
            f"column {name!r} of the {what} rows has the shape {list(shape)} for each example, the problem says "
            f"{list(said)}: {_advice(name, shape, column.dtype)}"
        )
    if column.dtype == example.dtype or _is_wider(example.dtype, column.dtype):
        return column.to(example.dtype)
    found, wanted = _short(column.dtype), _short(example.dtype)
    raise DataError(
        f"column {name!r} of the {what} rows holds {found}, the problem says {wanted}: "
        f"{_advice(name, shape, column.dtype)}, or convert the data with .to(torch.{wanted})"
    )


def _is_wider(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether numbers of one kind become others of it without another meaning; float64 is as good as float32."""
    if (wide.is_floating_point and narrow.is_floating_point) or (wide.is_complex and narrow.is_complex):
        return True
    if wide.is_floating_point or wide.is_complex or narrow.is_floating_point or narrow.is_complex:
        return False
    # Not truth values as pixels: those are divided by 255.
    return wide != torch.uint8 and torch.promote_types(wide, narrow) == wide


def _advice(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"say Column({name!r}, {shape}, {_short(dtype)!r})"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
