"""Messages between processes of this package: a header, then tensors, streamed one by one.

A tensor goes from the memory where it lives straight to where it will be used: neither side holds a message as a
whole, so that receiving a task costs a worker its tensors and nothing beside them. Not `multiprocessing`'s own
pickling of tensors: that moves them through shared memory, which a cap on memory does not count.
"""

from __future__ import annotations

import io
import pickle
import socket
import struct
from collections.abc import Callable, Hashable, Sequence
from types import FunctionType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from scalefl.errors import ConfigError
from scalefl.params import Params, bytes_of

_LENGTH = struct.Struct("<Q")
_PIECE_BYTES = 2**16
_MOST_KNOWN = 2**7
"""Values after which a sender starts anew, with the first number, which then means another value to the receiver too:
where each client has tensors of its own, none of them comes again.
"""
_FOUND_BY_NAME = (type, FunctionType)

Key = Callable[[Any], Hashable]
"""By what a value is known that will be sent again and again; None where it will not."""
_Numbered = tuple[int, Any]
"""A value, and by which number the other end knows it."""


class Head(NamedTuple):
    """What is said of a tensor before its bytes come."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    num_bytes: int

    def empty(self) -> Tensor:
        """Memory for it."""
        return torch.empty(self.shape, dtype=self.dtype)


Read = Callable[[memoryview], None]
"""Fills a buffer with the next bytes of a tensor."""


class Store(Protocol):
    """Where received tensors go."""

    def accept(self, head: Head, read: Read) -> None:
        """Take a tensor, of whose bytes `read` gives the next ones."""
        ...


class InMemory(dict[str, Tensor]):
    """Received tensors, by name, in memory of their own."""

    def accept(self, head: Head, read: Read) -> None:
        """Receive a tensor into its final memory."""
        tensor = self[head.name] = head.empty()
        read(bytes_of(tensor))


class Incoming:
    """A message whose header has been read; its tensors come group by group."""

    def __init__(self, connection: socket.socket, header: Any, groups: Sequence[Sequence[Head]]) -> None:
        self.header = header
        self._connection = connection
        self._groups = list(groups)
        self._left = sum(head.num_bytes for heads in groups for head in heads)

    def receive(self, store: Store) -> None:
        """Receive the next group of tensors."""
        for head in self._groups.pop(0):
            store.accept(head, self._read)

    def discard(self) -> None:
        """Read past what has not been received, so that the next message can be."""
        piece = memoryview(bytearray(_PIECE_BYTES))
        while self._left:
            self._read(piece[: self._left])

    def _read(self, into: memoryview) -> None:
        _read(self._connection, into)
        self._left -= len(into)


class Channel:
    """One end of a connection to another process that we started.

    Args:
        connection: to the other end.
        key: tells which values are sent once, and then by a number: such as stay as they are, and do not hold
            themselves. It may be a value's `id`: they are kept.
    """

    def __init__(self, connection: socket.socket, key: Key = lambda value: None) -> None:
        self._connection, self._key = connection, key
        self._sent: dict[Hashable, _Numbered] = {}
        self._received: dict[int, Any] = {}

    def fileno(self) -> int:
        """What the system calls it, by which one can wait for it."""
        return self._connection.fileno()

    def close(self) -> None:
        """Close it: the other end reads that as the end."""
        self._connection.close()

    def send(self, header: Any, *groups: Params) -> None:
        """Send a picklable header and groups of tensors. We started both ends: pickle is safe here.

        Raises:
            ConfigError: the header cannot be pickled; nothing was sent.
            OSError: the other end is gone.
        """
        heads = [[Head(name, tuple(t.shape), t.dtype, t.nbytes) for name, t in group.items()] for group in groups]
        known = {} if len(self._sent) > _MOST_KNOWN else self._sent
        content, new = _pickled((header, heads), self._key, known)
        self._connection.sendall(_LENGTH.pack(len(content)) + content)
        self._sent = known | new if new else known
        for group in groups:
            for tensor in group.values():
                self._connection.sendall(bytes_of(tensor.cpu().contiguous()))

    def receive(self) -> Incoming:
        """The next message; its tensors are to be received, or discarded, before the one after it.

        Raises:
            EOFError: the other end has closed.
        """
        (length,) = _LENGTH.unpack(self._content(_LENGTH.size))
        content = io.BytesIO(self._content(length))
        return Incoming(self._connection, *_Unpickler(content, self._received).load())

    def _content(self, length: int) -> bytearray:
        content = bytearray(length)
        _read(self._connection, memoryview(content))
        return content


def _read(connection: socket.socket, into: memoryview) -> None:
    while into:
        count = connection.recv_into(into)
        if not count:
            raise EOFError
        into = into[count:]


class _Pickler(pickle.Pickler):
    """Writes what is known as its number; what has a key and is not, with the number that it has from then on."""

    def __init__(self, content: io.BytesIO, key: Key, known: dict[Hashable, _Numbered]) -> None:
        super().__init__(content)
        self._key, self._known = key, known
        self.new: dict[Hashable, _Numbered] = {}
        self._told: Any = None

    def persistent_id(self, value: Any) -> int | _Numbered | None:
        if isinstance(value, _FOUND_BY_NAME) and value.__module__ == "__main__":
            raise pickle.PicklingError(f"{value.__qualname__} is defined in the program that was started")
        key = self._key(value)
        if key is None:
            return None
        if value is self._told:  # what follows its number
            self._told = None
            return None
        found = self._known.get(key) or self.new.get(key)
        if found:
            return found[0]
        found = self.new[key] = (len(self._known) + len(self.new), value)
        self._told = value
        return found


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: io.BytesIO, known: dict[int, Any]) -> None:
        super().__init__(content)
        self._known = known

    def persistent_load(self, told: Any) -> Any:
        if isinstance(told, tuple):
            number, value = told
            self._known[number] = value
            return value
        return self._known[told]


def check_sendable(*values: Any) -> None:
    """Refuse what a process that is no copy of this one could not be sent.

    Raises:
        ConfigError: names it, and says where it has to be defined.
    """
    _pickled(values, lambda _: None, {})


def _pickled(content: Any, key: Key, known: dict[Hashable, _Numbered]) -> tuple[bytes, dict[Hashable, _Numbered]]:
    """Content as bytes, and what of it is known from now on."""
    written = io.BytesIO()
    pickler = _Pickler(written, key, known)
    try:
        pickler.dump(content)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"the model, problem or method cannot be sent to workers ({error}): define it at the top of a module "
            "that can be imported, or run with workers = 0"
        ) from error
    return written.getvalue(), pickler.new
