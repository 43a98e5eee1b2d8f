"""What a server and its nodes say to each other: a typed header, and tensors beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import torch
from torch import Tensor

from scalefl.params import Params, bytes_of
from scalefl.types import ClientInfo

T = TypeVar("T")

DIGEST_BYTES = 16
DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}
"""The kinds of tensor that may cross."""


@dataclass(frozen=True)
class Parcel:
    """A message as transports carry it."""

    header: bytes
    tensors: Params

    @property
    def num_bytes(self) -> int:
        """Of the header and all tensors."""
        return len(self.header) + sum(t.nbytes for t in self.tensors.values())


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Checked for its types when it is read; unknown fields are an error."""


class WhoAreYou(_Header, frozen=True):
    """The server asks what a node offers; in private runs without what its data would tell."""

    is_private: bool = False


class Order(_Header, frozen=True):
    """The server asks for a task.

    Args:
        content: the task, an objective for each of its steps, and the problem; see `scalefl.engines.codec`.
        digests: every tensor that the task needs -> its digest. Those that the server takes the node to have are not
            sent.
    """

    content: bytes
    digests: dict[str, bytes]


class Offer(_Header, frozen=True):
    """A node says what it offers."""

    client: ClientInfo


class Lacking(_Header, frozen=True):
    """A node has not got these tensors, though it was taken to have them."""

    names: list[str]


class Update(_Header, frozen=True):
    """A node has done its task; what moved is beside."""

    client_id: int
    round: int
    num_examples: int
    metrics: dict[str, tuple[float, float]]
    seconds: float
    peak_bytes: int | None


class Failure(_Header, frozen=True):
    """A node could not do its task."""

    cause: str
    out_of_memory: bool = False
    peak_bytes: int | None = None


Reply = Offer | Lacking | Update | Failure


def pack(header: _Header, tensors: Params | None = None) -> Parcel:
    """A message, ready to be sent."""
    return Parcel(msgspec.msgpack.encode(header), tensors or {})


def unpack(parcel: Parcel, kind: Any) -> Any:
    """The header of a message of that kind, or one of several.

    Raises:
        ValueError: it is none, or a value has the wrong type.
    """
    try:
        return msgspec.msgpack.decode(parcel.header, type=kind)
    except msgspec.DecodeError as error:
        raise ValueError(str(error)) from error


def digest(tensor: Tensor) -> bytes:
    """What a tensor's dtype, shape and bytes are known by."""
    found = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=DIGEST_BYTES)
    found.update(bytes_of(tensor.cpu().contiguous()))
    return found.digest()


def tensor_of(dtype: str, shape: tuple[int, ...], content: bytes) -> Tensor:
    """A tensor in memory of its own.

    Raises:
        ValueError: the bytes are not as many as dtype and shape ask for, or there is no such dtype.
    """
    kind = DTYPES.get(dtype)
    if kind is None:
        raise ValueError(f"tensors of {dtype!r} are not exchanged")
    if any(size < 0 for size in shape):
        raise ValueError(f"{shape} is no shape")
    tensor = torch.empty(shape, dtype=kind) if _holds(shape, kind, len(content)) else None
    if tensor is None:
        raise ValueError(f"{len(content)} bytes are no {dtype} tensor of shape {shape}")
    bytes_of(tensor)[:] = content
    return tensor


def _holds(shape: tuple[int, ...], dtype: torch.dtype, num_bytes: int) -> bool:
    count = 1
    for size in shape:
        count *= size
    return count * dtype.itemsize == num_bytes
