"""Memory that this process shares with its workers: tensors cross by naming their place.

Not by way of /dev/shm, whose size containers keep small, nor `multiprocessing`, whose tensors need a file each: unnamed
files in memory, which vanish with the process however it ends, and which a worker opens through /proc. Only for
workers without a cap: what is shared is not counted by a limit on a process's data.
"""

from __future__ import annotations

import math
import mmap
import os
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from scalefl.params import Params, real
from scalefl.problem import Batch

_SEGMENT_BYTES = 2**25
_ALIGNMENT = 64
_MOST_KEPT = 2**6
"""Groups of tensors that are remembered: of a few tasks at a time, and of as many kinds as there are at once."""


class Place(NamedTuple):
    """Where memory lies: in which file of the process that shares it, how long that is, and from which byte on."""

    process: int
    descriptor: int
    file_bytes: int
    start: int
    num_bytes: int


class Sheet(NamedTuple):
    """A tensor in shared memory, as it is told to another process."""

    place: Place
    shape: tuple[int, ...]
    dtype: torch.dtype


_Shapes = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]


class Sheets(dict[str, Sheet]):
    """Tensors in shared memory by name. The same ones are the same object, in each process: then it is told once."""


_NOTHING = Sheets()


class Brief(NamedTuple):
    """What a task works on.

    Attributes:
        examples: the client's.
        params: what the server sends.
        own: room for what training changes of it.
        sums: where that is added up, if it may be.
        steps: where the beginnings and ends of additions to sums are counted.
    """

    examples: dict[str, Sheet]
    params: Sheets
    own: Sheets
    sums: Sheets
    steps: Sheet | None


class _Laid:
    """The tensors on sheets that come again and again, made once.

    Args:
        lay: makes one.
    """

    def __init__(self, lay: Callable[[Sheet], Tensor]) -> None:
        self._lay = lay
        self._kept: dict[int, tuple[Sheets, dict[str, Tensor]]] = {}

    def __call__(self, sheets: Sheets) -> dict[str, Tensor]:
        kept = self._kept.get(id(sheets))
        if kept is None:
            if len(self._kept) == _MOST_KEPT:
                self._kept.clear()
            kept = self._kept[id(sheets)] = sheets, {name: self._lay(sheet) for name, sheet in sheets.items()}
        return kept[1]

    def clear(self) -> None:
        """Forget them."""
        self._kept.clear()


def can_share() -> bool:
    """Whether this system has unnamed files in memory that another process can open."""
    return hasattr(os, "memfd_create") and Path("/proc/self/fd").is_dir()


class Arena:
    """Memory that is lent piece by piece; freed pieces are lent again, and all of it is given back by `close`."""

    def __init__(self) -> None:
        self._files: dict[int, mmap.mmap] = {}
        self._free: dict[int, list[Place]] = defaultdict(list)
        self._rest: Place | None = None
        self._blocks: dict[tuple[Place, _Shapes], Sheets] = {}
        self.tensors = _Laid(self.tensor)
        """The tensors on sheets, not copied."""

    def lend(self, num_bytes: int) -> Place:
        """Memory for so many bytes, or a few more.

        Raises:
            OSError: the system has none left.
        """
        size = _rounded(num_bytes)
        if self._free[size]:
            return self._free[size].pop()
        if self._rest is None or self._rest.num_bytes < size:
            if size > _SEGMENT_BYTES // 4:  # what is left of a file is given up for small pieces only
                return self._new_file(size)
            self._rest = self._new_file(_SEGMENT_BYTES)
        rest = self._rest
        self._rest = rest._replace(start=rest.start + size, num_bytes=rest.num_bytes - size)
        return rest._replace(num_bytes=size)

    def take_back(self, place: Place) -> None:
        """Nobody uses it any more."""
        self._free[place.num_bytes].append(place)

    def put(self, tensor: Tensor) -> Sheet:
        """A copy of a tensor, in memory of its own."""
        sheet = self.room_for(tensor)
        self.tensor(sheet).copy_(tensor)
        return sheet

    def room_for(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Sheet:
        """Memory for a tensor of the same shape, and of the same dtype by default; what is in it is of no use."""
        dtype = dtype or tensor.dtype
        return Sheet(self.lend(tensor.numel() * dtype.itemsize), tuple(tensor.shape), dtype)

    def block_for(self, params: Params) -> tuple[Place, Sheets]:
        """Memory for tensors of these shapes in one piece; what is in it is of no use."""
        shapes = tuple((name, tuple(t.shape), t.dtype) for name, t in params.items())
        sizes = [_aligned(t.nbytes) for t in params.values()]
        place = self.lend(sum(sizes))
        sheets = self._blocks.get((place, shapes))
        if sheets is None:
            if len(self._blocks) == _MOST_KEPT:
                self._blocks.clear()
            starts = accumulate(sizes, initial=place.start)
            laid = zip(shapes, sizes, starts, strict=False)
            sheets = self._blocks[place, shapes] = Sheets(
                (name, Sheet(place._replace(start=start, num_bytes=size), shape, dtype))
                for (name, shape, dtype), size, start in laid
            )
        return place, sheets

    def tensor(self, sheet: Sheet) -> Tensor:
        """The tensor on a sheet, not copied."""
        return _laid(self._files[sheet.place.descriptor], sheet)

    def close(self) -> None:
        """Give everything back; tensors that somebody still holds keep their memory until they are gone."""
        self.tensors.clear()
        self._blocks.clear()
        for descriptor in self._files:
            os.close(descriptor)
        self._files.clear()
        self._free.clear()
        self._rest = None

    def _new_file(self, num_bytes: int) -> Place:
        descriptor = os.memfd_create("scalefl")
        try:
            os.posix_fallocate(descriptor, 0, num_bytes)  # here an error, later a signal that ends the process
            self._files[descriptor] = mmap.mmap(descriptor, num_bytes)
        except BaseException:
            os.close(descriptor)
            raise
        return Place(os.getpid(), descriptor, num_bytes, 0, num_bytes)


class _Known(NamedTuple):
    """A tensor that is on the board: its sheet, the version that was copied, and what tells when it is gone."""

    sheet: Sheet
    version: int
    gone: weakref.ref[Tensor]


class Board:
    """What the server sends: each tensor is put up once, however many clients it goes to, until it is gone.

    Args:
        arena: where copies lie.
    """

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self._known: dict[int, _Known] = {}
        self._together: dict[tuple[tuple[str, ...], tuple[int, ...]], Sheets] = {}

    def put_up(self, params: Params) -> Sheets:
        """The sheets of tensors that the caller keeps, and leaves as they are, for as long as sheets are read."""
        for tensor in params.values():
            self._put_up(tensor)
        key = tuple(params), tuple(map(id, params.values()))
        together = self._together.get(key)  # not asked again: tensors may go at any moment, and then it is cleared
        if together is None:
            together = self._together[key] = Sheets((name, self._known[id(t)].sheet) for name, t in params.items())
        return together

    def _put_up(self, tensor: Tensor) -> None:
        key, version = id(tensor), tensor._version  # grows when somebody writes into it
        known = self._known.get(key)
        if known is None:
            gone = weakref.ref(tensor, lambda _: self._take_down(key))
            known = self._known[key] = _Known(self.arena.put(tensor), version, gone)
        elif known.version != version:
            self.arena.tensor(known.sheet).copy_(tensor)
            self._known[key] = known._replace(version=version)

    def _take_down(self, key: int) -> None:
        self._together.clear()
        self.arena.take_back(self._known.pop(key).sheet.place)


class Ledger:
    """What one worker has added up in a round, in shared memory.

    Args:
        arena: where it lies.
    """

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._sums: dict[str, Sheet] = {}
        self._together: dict[tuple[str, ...], Sheets] = {}
        self._weights: dict[str, int] = {}
        self._noted = 0
        self.steps = arena.put(torch.zeros((), dtype=torch.int64))

    def sheets(self, params: Params) -> Sheets:
        """Where tensors of these shapes are added up.

        Raises:
            OSError: the system has no memory left.
        """
        for name, tensor in params.items():
            if name not in self._sums:
                self._sums[name] = self._arena.room_for(real(tensor), torch.float64)
                self._arena.tensor(self._sums[name]).zero_()
        names = tuple(params)
        if names not in self._together:
            self._together[names] = Sheets((name, self._sums[name]) for name in names)
        return self._together[names]

    def note(self, names: Iterable[str], weight: int) -> None:
        """Something of that weight has been added, and its worker has said so."""
        self._noted += 1
        for name in names:
            self._weights[name] = self._weights.get(name, 0) + weight

    def spoilt(self) -> bool:
        """Whether a worker that died had begun more additions than it has told of; then all of them are forgotten."""
        steps = self._arena.tensor(self.steps)
        if steps == 2 * self._noted:
            return False
        steps.zero_()
        self._noted = 0
        for sheet in self._sums.values():
            self._arena.tensor(sheet).zero_()
        self._weights.clear()
        return True

    def sums(self) -> Iterator[tuple[str, Tensor, int]]:
        """Each tensor's sum, not copied, and its weight."""
        for name, weight in self._weights.items():
            yield name, self._arena.tensor(self._sums[name]), weight

    def close(self) -> None:
        """Nobody adds, or looks at the sums, any more."""
        for sheet in (*self._sums.values(), self.steps):
            self._arena.take_back(sheet.place)


class Desk:
    """What one task works on in shared memory, until it is closed."""

    def __init__(self, board: Board, params: Params, moving: Iterable[str], examples: Batch) -> None:
        """Lay it out.

        Args:
            board: where what is sent is put up; all else lies beside it.
            params: what is sent; the caller keeps the tensors for as long as the task may run.
            moving: what of it training changes.
            examples: the client's.

        Raises:
            OSError: the system has no memory left.
        """
        self._arena = arena = board.arena
        self._places: list[Place] = []
        try:
            laid = {}
            for name, column in examples.items():
                laid[name] = arena.put(column)
                self._places.append(laid[name].place)
            place, own = arena.block_for({name: params[name] for name in sorted(moving)})
            self._places.append(place)
            self.brief = Brief(laid, board.put_up(params), own, _NOTHING, None)
        except BaseException:
            self.close()
            raise

    def add_to(self, ledger: Ledger, params: Params, moving: Iterable[str]) -> None:
        """Have what comes of it added up by whoever works here.

        Raises:
            OSError: the system has no memory left.
        """
        sums = ledger.sheets({name: params[name] for name in moving})
        self.brief = self.brief._replace(sums=sums, steps=ledger.steps)

    def results(self) -> dict[str, Tensor]:
        """What training has made of the moving tensors, not copied."""
        return self._arena.tensors(self.brief.own)

    def close(self) -> None:
        """Nobody uses its examples and results any more."""
        for place in self._places:
            self._arena.take_back(place)


class Reader:
    """Another process's shared memory, opened when it is first named."""

    def __init__(self) -> None:
        self._files: dict[tuple[int, int], mmap.mmap] = {}
        self.tensors = _Laid(self.tensor)
        """The tensors on sheets; as `tensor`."""

    def tensor(self, sheet: Sheet) -> Tensor:
        """The tensor on a sheet, not copied: what is written into it, the other process sees.

        Raises:
            OSError: that process is gone.
        """
        return _laid(self._file(sheet.place), sheet)

    def _file(self, place: Place) -> mmap.mmap:
        key = (place.process, place.descriptor)
        if key not in self._files:
            descriptor = os.open(f"/proc/{place.process}/fd/{place.descriptor}", os.O_RDWR | os.O_CLOEXEC)
            try:
                self._files[key] = mmap.mmap(descriptor, place.file_bytes)
            finally:
                os.close(descriptor)
        return self._files[key]


def _laid(file: mmap.mmap, sheet: Sheet) -> Tensor:
    count = math.prod(sheet.shape)
    if not count:
        return torch.empty(sheet.shape, dtype=sheet.dtype)
    return torch.frombuffer(file, dtype=sheet.dtype, count=count, offset=sheet.place.start).view(sheet.shape)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _rounded(num_bytes: int) -> int:
    """Upwards, to one of four sizes for each power of two: so pieces that are free fit what is asked for next."""
    step = max(_ALIGNMENT, 1 << max(0, num_bytes.bit_length() - 3))
    return max(_ALIGNMENT, -(-num_bytes // step) * step)
