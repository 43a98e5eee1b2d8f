"""What a server and its nodes say to each other: a typed header, and tensors beside it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

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


Precision = Literal["exact", "float16"]
"""How tensors travel: as they are, or in half precision, those that nodes send back as differences."""


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
        digests: every tensor that the task needs -> its digest, as it travels. Those that the server takes the node to
            have are not sent.
        scales: of the tensors that travel in half precision: what to multiply them with.
        precision: of the answer.
    """

    content: bytes
    digests: dict[str, bytes]
    scales: dict[str, float] = {}
    precision: Precision = "exact"


class Offer(_Header, frozen=True):
    """A node says what it offers, and in words on what it runs."""

    client: ClientInfo
    hardware: str = ""


class Lacking(_Header, frozen=True):
    """A node has not got these tensors, though it was taken to have them."""

    names: list[str]


class Update(_Header, frozen=True):
    """A node has done its task; what moved is beside.

    Args:
        client_id, round: whose task, and of which round.
        num_examples, metrics: see `ClientUpdate`.
        seconds, peak_bytes: see `Receipt`.
        scales: of the tensors that are differences, in half precision: what to multiply them with.
        client: what the node offers now; not in private runs.
    """

    client_id: int
    round: int
    num_examples: int
    metrics: dict[str, tuple[float, float]]
    seconds: float
    peak_bytes: int | None
    scales: dict[str, float] = {}
    client: ClientInfo | None = None


class Failure(_Header, frozen=True):
    """A node could not do its task."""

    cause: str
    out_of_memory: bool = False
    peak_bytes: int | None = None
    client: ClientInfo | None = None


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


def halved(tensor: Tensor) -> tuple[Tensor, float | None]:
    """A float32 tensor in half precision, and what to multiply it with; any other, or one that is not finite, as it is.

    An element is off by at most 2⁻¹¹ of itself, or 2⁻²⁵ of the largest one.
    """
    if tensor.dtype != torch.float32:
        return tensor, None
    scale = (float(tensor.abs().max()) if tensor.numel() else 0.0) or 1.0
    if not math.isfinite(scale):
        return tensor, None
    return (tensor / scale).to(torch.float16), scale


def restored(params: Params, scales: Mapping[str, float]) -> dict[str, Tensor]:
    """Tensors of which some travelled in half precision, these as float32.

    Raises:
        ValueError: a scale is of no such tensor.
    """
    tensors = dict(params)
    for name, scale in scales.items():
        if name not in params or params[name].dtype != torch.float16:
            raise ValueError(f"{name}: a scale of nothing that was sent in half precision")
        tensors[name] = params[name].to(torch.float32) * scale
    return tensors


def reduced(params: Params, base: Params) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What moved as differences from `base`, each tensor `halved`; and their scales. What cannot be stays as it is."""
    tensors, scales = dict(params), {}
    for name, tensor in params.items():
        if tensor.dtype.is_floating_point:
            difference, scale = halved(tensor - base[name])
            if scale is not None:
                tensors[name], scales[name] = difference, scale
    return tensors, scales


def expanded(params: Params, scales: Mapping[str, float], base: Params) -> dict[str, Tensor]:
    """What moved, from what `reduced` made of it elsewhere.

    Raises:
        ValueError: a difference is of a tensor that was not sent, or has another shape.
    """
    tensors = dict(params)
    for name, scale in scales.items():
        if name not in params or name not in base or params[name].shape != base[name].shape:
            raise ValueError(f"{name}: a difference from nothing that was sent")
        tensors[name] = base[name] + params[name].to(base[name].dtype) * scale
    return tensors


def tensor_of(dtype: str, shape: tuple[int, ...], content: bytes | memoryview) -> Tensor:
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
