"""How a client gets the features of its frozen prefix: run with each micro-batch, or once and kept on disk."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from scalefl.params import CPU, bytes_of, moved
from scalefl.parts import Features, PartRunner
from scalefl.problem import Batch, Problem, num_rows, take
from scalefl.types import Step

CHUNK = 16
"""Examples that a frozen prefix takes at a time, where it does not take the whole micro-batch."""

Prefix = Callable[[Batch, Tensor], Callable[[], Features] | None]
"""Gives what gives the features of a micro-batch, whose rows in the client's examples are the second argument; None
where the part runs from its input."""


def from_input(batch: Batch, rows: Tensor) -> None:
    """The prefix of a part that runs from its input."""


_Run = Callable[[Batch], Features]


@contextlib.contextmanager
def prefix_of(
    step: Step, runner: PartRunner, examples: Batch, problem: Problem, device: torch.device = CPU
) -> Iterator[Prefix]:
    """The prefix of a step as its means say; "cached" runs it here, for all examples, on the device.

    Raises:
        OSError: the disk has no room for the cache; what was written of it is gone by then.
    """

    def resident(batch: Batch) -> Features:
        return runner.prefix_features(batch, problem)

    def streamed(batch: Batch) -> Features:
        return runner.streamed_features(batch, problem)

    mode = step.means.prefix
    if step.part.entry is None:
        yield from_input
    elif mode == "resident":
        yield lambda batch, rows: partial(resident, batch)
    elif mode == "cached":
        # As many at a time as in chunks with each micro-batch: that is what is predicted.
        with _Cache(streamed, examples, min(CHUNK, step.largest_micro_batch), device) as cache:
            yield lambda batch, rows: partial(cache.read, rows)
    else:
        run = resident if mode == "chunked" else streamed
        yield lambda batch, rows: partial(_in_chunks, run, batch)


def _in_chunks(run: _Run, batch: Batch) -> Features:
    """The features of a batch, of which only `CHUNK` examples run at a time."""
    total = num_rows(batch)
    if total <= CHUNK:
        return run(batch)
    found: Features | None = None
    for start in range(0, total, CHUNK):
        piece = run({name: column[start : start + CHUNK] for name, column in batch.items()})
        if found is None:
            found = Features(_room(piece.z, total), None if piece.x is None else _room(piece.x, total))
        found.z[start : start + CHUNK] = piece.z
        if found.x is not None and piece.x is not None:
            found.x[start : start + CHUNK] = piece.x
        del piece  # or it would be there while the next one is made
    assert found is not None
    return found


def _room(piece: Tensor, rows: int) -> Tensor:
    lies = torch.channels_last if piece.dim() == 4 and not piece.is_contiguous() else torch.contiguous_format
    return torch.empty((rows, *piece.shape[1:]), dtype=piece.dtype, device=piece.device, memory_format=lies)


class _Cache:
    """The features of all examples in unnamed files, which vanish with the process however it ends."""

    def __init__(self, run: _Run, examples: Batch, chunk: int, device: torch.device = CPU) -> None:
        with contextlib.ExitStack() as files:
            self._z = self._x = None
            for start in range(0, num_rows(examples), chunk):
                rows = torch.arange(start, min(start + chunk, num_rows(examples)))
                found = run(moved(take(examples, rows), device))
                self._z = self._z or _Rows(files, found.z)
                self._z.append(found.z)
                if found.x is not None:
                    self._x = self._x or _Rows(files, found.x)
                    self._x.append(found.x)
                del found
            self._files = files.pop_all()

    def __enter__(self) -> _Cache:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._files.close()

    def read(self, rows: Tensor) -> Features:
        """The features of some examples."""
        assert self._z is not None
        return Features(self._z.read(rows), self._x.read(rows) if self._x else None)


class _Rows:
    """A file of equally long rows; read and written, not mapped, so that its pages are no memory of the process."""

    def __init__(self, files: contextlib.ExitStack, like: Tensor) -> None:
        self._file = files.enter_context(tempfile.TemporaryFile(prefix="scalefl-", buffering=0))  # noqa: SIM115
        self._shape, self._dtype, self._device = like.shape[1:], like.dtype, like.device
        self._row_bytes = like[0].numel() * like.element_size()

    def append(self, values: Tensor) -> None:
        content = bytes_of(values.cpu().contiguous())
        while content:
            content = content[self._file.write(content) :]

    def read(self, rows: Tensor) -> Tensor:
        found = torch.empty(len(rows), *self._shape, dtype=self._dtype)
        content = bytes_of(found)
        for i, row in enumerate(rows.tolist()):
            place = content[i * self._row_bytes : (i + 1) * self._row_bytes]
            os.preadv(self._file.fileno(), [place], row * self._row_bytes)
        return found.to(self._device)
