"""Tensors and a header as one block of bytes, for a pipe between two processes of this package.

Not `multiprocessing`'s own pickling of tensors: that moves them through shared memory, which a worker under a
memory cap must not use, since the system does not count it.
"""

from __future__ import annotations

import pickle
import struct
from typing import Any

import safetensors.torch
from torch import Tensor

from scalefl.errors import ConfigError
from scalefl.params import Params

_LENGTH = struct.Struct("<Q")


def encode(header: Any, *groups: Params) -> bytes:
    """A picklable header and groups of tensors. Both ends are processes that we started: pickle is safe here.

    Raises:
        ConfigError: the header cannot be pickled.
    """
    try:
        head = pickle.dumps(header)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"the model, problem or method cannot be sent to workers ({error}): define it at the top of a module "
            "that can be imported, or run with workers = 0"
        ) from error
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for i, group in enumerate(groups):
        for name, t in group.items():
            # safetensors refuses tensors that share memory, as a column that is input and label at once.
            shared = t.untyped_storage().data_ptr() in storages
            tensors[f"{i}/{name}"] = t.contiguous().clone() if shared else t.contiguous()
            storages.add(t.untyped_storage().data_ptr())
    return b"".join([_LENGTH.pack(len(head)), head, safetensors.torch.save(tensors)])


def decode(content: bytes, num_groups: int) -> tuple[Any, list[dict[str, Tensor]]]:
    """The header and the groups that `encode` was given; the tensors are the caller's own."""
    (length,) = _LENGTH.unpack_from(content)
    start = _LENGTH.size
    groups: list[dict[str, Tensor]] = [{} for _ in range(num_groups)]
    for name, tensor in safetensors.torch.load(content[start + length :]).items():
        index, _, own = name.partition("/")
        groups[int(index)][own] = tensor
    return pickle.loads(content[start : start + length]), groups
