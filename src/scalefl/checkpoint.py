"""Save and load a server state: one safetensors file, replaced in one move, never half written."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import msgspec
import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scalefl.errors import CheckpointError
from scalefl.models.spec import ModelSpec
from scalefl.problem import Problem
from scalefl.types import Aux, ServerState

FORMAT = "scalefl-state"
VERSION = 1


class _Header(msgspec.Struct):
    """What a state holds beside tensors."""

    format: str
    version: int
    round: int
    seed: int
    aux: dict[str, Any]


_PARAMS, _AUX = "params/", "aux/"


def save_state(path: Path, state: ServerState) -> None:
    """Write `state` to `path`; until that has worked, what was there stays. Equal states make equal bytes.

    Raises:
        CheckpointError: the file cannot be written (a full disk, no permission).
    """
    tensors = {_PARAMS + name: t for name, t in state.params.items()}
    tensors |= {_AUX + name: t for name, t in state.aux.tensors.items()}
    header = _Header(FORMAT, VERSION, state.round, state.seed, dict(state.aux.values))
    # One key: safetensors writes several in an order that differs from process to process.
    metadata = {"scalefl": msgspec.json.encode(header).decode()}
    contiguous = {name: t.detach().contiguous() for name, t in tensors.items()}
    write_whole(path, safetensors.torch.save(contiguous, metadata))


def load_state(path: Path, model: ModelSpec, problem: Problem) -> ServerState:
    """The state in `path`.

    Raises:
        CheckpointError: the file is missing, truncated, not ours, or from a newer version.
    """
    metadata, tensors = _read(path)
    if "scalefl" not in metadata:
        raise CheckpointError(f"{path} is a safetensors file, but not a ScaleFL state")
    try:
        header = msgspec.json.decode(metadata["scalefl"], type=_Header)
    except msgspec.MsgspecError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if header.format != FORMAT:
        raise CheckpointError(f"{path} is a safetensors file, but not a ScaleFL state")
    if header.version > VERSION:
        raise CheckpointError(
            f"{path} has format version {header.version}; this ScaleFL reads up to {VERSION}: upgrade it"
        )
    params = {n.removeprefix(_PARAMS): t for n, t in tensors.items() if n.startswith(_PARAMS)}
    aux = {n.removeprefix(_AUX): t for n, t in tensors.items() if n.startswith(_AUX)}
    return ServerState(model, problem, params, header.round, header.seed, Aux(aux, header.aux))


def write_whole(path: Path, content: bytes) -> None:
    """Write a file through a neighbour and a rename: a reader sees the old content or the new, never a part.

    Raises:
        CheckpointError: it cannot be written.
    """
    temporary = path.with_name(path.name + ".partial")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error.strerror}; what was saved before is intact") from error


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file: {error}") from error
