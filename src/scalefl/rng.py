"""Every random number is a function of a seed and of the place where it is used.

`derive(seed, "batches", round, client)` names a stream; nothing else in the package draws from a
global generator. Dropout and users' model factories do read the global generators, so `seeded`
sets them for the length of a block and puts them back. What nobody may foresee, as the noise that
protects clients, comes from the operating system.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


def derive(seed: int, *path: str | int) -> int:
    """A seed for the stream at `path`: 63 bits, equal on every machine, independent between paths."""
    digest = hashlib.blake2b(repr((seed, path)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, *path: str | int) -> torch.Generator:
    """A torch generator for the stream at `path`."""
    return torch.Generator().manual_seed(derive(seed, *path))


def random_bytes(count: int, seed: int | None, *path: str | int) -> bytes:
    """Bytes of the stream at `path`; without a seed from the operating system, and others each time."""
    if seed is None:
        return os.urandom(count)
    return hashlib.shake_128(repr((seed, path)).encode()).digest(count)


NORMAL_LIMIT = 8.6
"""No number of `normal` is larger."""
_PIECE = 2**16


def normal(shape: Sequence[int], seed: int | None, *path: str | int) -> Tensor:
    """Independent standard normal numbers in float64, made of `random_bytes`.

    By Box and Muller, from 53 bits for the radius and 53 for the angle: the generators of torch start from 32 bits,
    which can be tried one after another.
    """
    found = torch.empty(math.prod(shape), dtype=torch.float64)
    for start in range(0, len(found), _PIECE):
        piece = found[start : start + _PIECE]
        half = -(-len(piece) // 2)
        bits = torch.frombuffer(bytearray(random_bytes(16 * half, seed, *path, start)), dtype=torch.int64)
        radius, angle = ((bits & (2**53 - 1)) + 1).double().mul_(2.0**-53).view(2, half)
        radius, angle = radius.log().mul_(-2).sqrt_(), angle * (2 * math.pi)
        piece[:half] = radius * angle.cos()
        piece[half:] = (radius * angle.sin())[: len(piece) - half]
    return found.view(tuple(shape))


@contextlib.contextmanager
def undrawn() -> Iterator[None]:
    """Inside the block, nothing may draw from a global generator: one who would have to draw for several clients.

    Raises:
        RuntimeError: something has drawn.
    """
    before = _drawn_so_far()
    yield
    if _drawn_so_far() != before:
        raise RuntimeError("something draws random numbers")


def drawn_by_python() -> tuple[object, ...]:
    """Where Python's and NumPy's global generators stand: equal to an earlier value if nothing was drawn since."""
    _, keys, *place = np.random.get_state()
    return random.getstate(), np.asarray(keys).tobytes(), place


def _drawn_so_far() -> tuple[object, ...]:
    return *drawn_by_python(), torch.get_rng_state().numpy().tobytes()


class RngState(NamedTuple):
    """The state of torch's global generators: the CPU's, and the current CUDA device's where CUDA is in use."""

    cpu: Tensor
    cuda: Tensor | None


def rng_state() -> RngState:
    """Where dropout stands, so that it can be drawn again."""
    return RngState(torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None)  # type: ignore[no-untyped-call]


def set_rng_state(state: RngState) -> None:
    """Draw on from where `rng_state` was."""
    torch.set_rng_state(state.cpu)
    if state.cuda is not None:
        torch.cuda.set_rng_state(state.cuda)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Set torch's, NumPy's and Python's global generators inside the block; restore them after it."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices):
        # Not torch.manual_seed: where CUDA has not been used it queues a call, with a formatted stack, for each seed.
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
