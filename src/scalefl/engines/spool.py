"""What a worker is sent but need not hold: unnamed files, which vanish with the process however it ends.

A client's examples lie in its storage whatever it trains, so they are no part of its budget: a worker maps them
from a file, which a cap on memory does not count, and copies batches out of it. Tensors that are streamed are wanted
one unit at a time, and those of a task's other steps not now: they are read from a file when asked for by name.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Iterator
from typing import IO

import torch
from torch import Tensor

from scalefl.client import held_by
from scalefl.engines.wire import Head, Read
from scalefl.params import CPU, LazyParams, bytes_of
from scalefl.types import ClientTask
from scalefl.units import mib

_PIECE_BYTES = 2**16


class MappedExamples(dict[str, Tensor]):
    """A client's examples, mapped from files.

    Received through the mapping, so that all of its pages are there before a measurement starts: read later, they
    would come and go in the middle of it.
    """

    def accept(self, head: Head, read: Read) -> None:
        """Receive a column.

        Raises:
            OSError: the disk has no room for it.
        """
        if not head.num_bytes:
            self[head.name] = head.empty()
            return
        with _unnamed_file() as file:
            try:
                _reserve(file, head.num_bytes)
            except OSError as error:
                raise _no_room(error, "the client's examples", head.num_bytes) from error
            mapped = mmap.mmap(file.fileno(), head.num_bytes)
        read(memoryview(mapped))
        self[head.name] = torch.frombuffer(mapped, dtype=head.dtype).view(head.shape)


class TaskParams(LazyParams):
    """The tensors of a task: on the worker's device, or in a file where not every step holds them while it trains."""

    def __init__(self, task: ClientTask, device: torch.device = CPU) -> None:
        self._device = device
        self._lasting = lasting_names(task)
        self._held: dict[str, Tensor] = {}
        self._heads: dict[str, Head] = {}
        self._places: dict[str, int] = {}
        self._file = _unnamed_file()

    def accept(self, head: Head, read: Read) -> None:
        """Receive a tensor.

        Raises:
            OSError: the disk has no room for it.
        """
        self._heads[head.name] = head
        if head.name in self._lasting:
            tensor = head.empty()
            read(bytes_of(tensor))
            self._held[head.name] = tensor.to(self._device)
            return
        self._places[head.name] = self._file.tell()
        try:
            _write(self._file, head.num_bytes, read)
        except OSError as error:
            raise _no_room(error, "the model", head.num_bytes) from error

    def close(self) -> None:
        """Give the file back: what it holds cannot be read any more."""
        self._file.close()

    @contextlib.contextmanager
    def holding(self, names: frozenset[str], moving: frozenset[str]) -> Iterator[None]:
        """See `LazyParams`."""
        lent = [name for name in sorted(names) if name in self._places]
        self._held |= {name: self._read(name) for name in lent}
        try:
            yield
        finally:
            for name in lent:
                tensor = self._held.pop(name)
                if name in moving:
                    _overwrite(self._file, self._places[name], bytes_of(tensor.to(CPU).contiguous()))

    def keep(self, names: frozenset[str]) -> None:
        """See `LazyParams`."""
        for kept in (self._heads, self._places, self._held):
            for name in [n for n in kept if n not in names]:
                del kept[name]

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(head.num_bytes for head in self._heads.values())

    def __getitem__(self, name: str) -> Tensor:
        return self._held[name] if name in self._held else self._read(name)

    def _read(self, name: str) -> Tensor:
        tensor, place = self._heads[name].empty(), self._places[name]
        content = bytes_of(tensor)
        while content:
            count = os.preadv(self._file.fileno(), [content], place)
            content, place = content[count:], place + count
        return tensor.to(self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._heads)

    def __len__(self) -> int:
        return len(self._heads)


def lasting_names(task: ClientTask) -> frozenset[str]:
    """The tensors that every step of a task holds for as long as it trains."""
    return frozenset.intersection(*map(held_by, task.steps))


def _unnamed_file() -> IO[bytes]:
    return tempfile.TemporaryFile(prefix="scalefl-", buffering=0)


def _reserve(file: IO[bytes], num_bytes: int) -> None:
    """Take room on disk beforehand: a write through a mapping that finds none kills the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, num_bytes)
    else:  # macOS
        file.truncate(num_bytes)


def _write(file: IO[bytes], num_bytes: int, read: Read) -> None:
    buffer = memoryview(bytearray(min(num_bytes, _PIECE_BYTES)))
    while num_bytes:
        piece = buffer[:num_bytes]
        read(piece)
        num_bytes -= len(piece)
        while piece:
            piece = piece[file.write(piece) :]


def _overwrite(file: IO[bytes], place: int, content: memoryview) -> None:
    while content:
        count = os.pwrite(file.fileno(), content, place)
        content, place = content[count:], place + count


def _no_room(error: OSError, what: str, num_bytes: int) -> OSError:
    return OSError(error.errno, f"no room on disk for {what} ({mib(num_bytes)} MiB): {error.strerror}")
