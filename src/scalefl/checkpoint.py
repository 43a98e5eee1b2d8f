"""Save and load a server state: one safetensors file, replaced in one move, never half written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scalefl.errors import CheckpointError, ConfigError
from scalefl.models.spec import ModelSpec
from scalefl.params import Params
from scalefl.problem import Problem
from scalefl.types import Aux, ServerState

FORMAT = "scalefl-state"
VERSION = 1


class _Deployed(msgspec.Struct):
    """The model that a method makes of the state: what to build, and which tensors go into it.

    Args:
        model: its name, for messages.
        factory: "package.module:function"; None where it was a Python object, which a file can't hold.
        arguments: for the factory, completed from the data.
        names: its tensors, sorted: those of the state, but for those that are saved beside it.
        elsewhere: those of the state that have another name there, and that name.
    """

    model: str
    factory: str | None
    arguments: dict[str, Any]
    names: list[str]
    elsewhere: dict[str, str] = {}


class _Header(msgspec.Struct):
    """What a state holds beside tensors."""

    format: str
    version: int
    round: int
    seed: int
    aux: dict[str, Any]
    deployed: _Deployed
    tightened: dict[int, int] = {}
    releases: int = 0


_PARAMS, _AUX, _OWN = "params/", "aux/", "deployed/"


def save_state(path: Path, state: ServerState, deployed: tuple[ModelSpec, Params]) -> None:
    """Write `state` to `path`; until that has worked, what was there stays. Equal states make equal bytes.

    Args:
        path: the file.
        state: what training goes on from.
        deployed: what the method deploys of it. Of its tensors only those that are not the state's own take room.

    Raises:
        CheckpointError: the file cannot be written (a full disk, no permission).
    """
    model, params = deployed
    # Copied, as they may be views of the state's tensors: safetensors refuses those that share memory.
    places = {id(t): name for name, t in state.params.items()}
    elsewhere = {name: places[id(t)] for name, t in sorted(params.items()) if places.get(id(t), name) != name}
    own = {name: t.clone() for name, t in params.items() if id(t) not in places}
    tensors = {_PARAMS + name: t for name, t in state.params.items()}
    tensors |= {_AUX + name: t for name, t in state.aux.tensors.items()}
    tensors |= {_OWN + name: t for name, t in own.items()}
    tightened = dict(sorted(state.tightened.items()))
    header = _Header(
        FORMAT,
        VERSION,
        state.round,
        state.seed,
        dict(state.aux.values),
        _recipe(model, params, elsewhere),
        tightened,
        state.releases,
    )
    # One key: safetensors writes several in an order that differs from process to process.
    metadata = {"scalefl": msgspec.json.encode(header).decode()}
    contiguous = {name: t.detach().contiguous() for name, t in tensors.items()}
    write_whole(path, safetensors.torch.save(contiguous, metadata))


def load_state(path: Path, model: ModelSpec, problem: Problem) -> ServerState:
    """The state in `path`.

    Raises:
        CheckpointError: the file is missing, truncated, not ours, or from a newer version.
    """
    header, tensors = _read(path)
    aux = Aux(_under(_AUX, tensors), header.aux)
    params = _under(_PARAMS, tensors)
    return ServerState(model, problem, params, header.round, header.seed, aux, header.tightened, header.releases)


def load_deployed(path: Path, model: ModelSpec | None = None) -> tuple[ModelSpec, Params]:
    """The model that was deployed of the state in `path`: needs neither data nor method.

    Args:
        path: the file.
        model: how to build the model, where the file can't tell: it was a Python object.

    Raises:
        CheckpointError: as `load_state`; or the model was a Python object, which cannot be built from a file.
    """
    header, tensors = _read(path)
    found = header.deployed
    if found.factory is not None:
        model = ModelSpec.of(found.factory, **found.arguments)
    if model is None:
        raise CheckpointError(
            f"{path} cannot say how to build {found.model}: its factory or an argument was a Python object. Give it "
            "again from Python, as the last argument of scalefl.export.export(folder, file, model); or have a run that "
            "names the factory as 'package.module:factory', with numbers, words and lists"
        )
    state, own = _under(_PARAMS, tensors), _under(_OWN, tensors)
    params = {name: own[name] if name in own else state[found.elsewhere.get(name, name)] for name in found.names}
    return model, params


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


def _recipe(model: ModelSpec, params: Params, elsewhere: dict[str, str]) -> _Deployed:
    """How to build a model, as JSON values; without a factory where they would not give the same model again."""
    nothing = _Deployed(model.name, None, {}, sorted(params))
    if not isinstance(model.factory, str):
        return nothing
    try:
        arguments = msgspec.json.decode(msgspec.json.encode(dict(model.arguments)))
        same = ModelSpec.of(model.factory, **arguments) == model
    except (TypeError, OverflowError, ConfigError):  # an argument has no JSON value, or one that is no argument
        return nothing
    return _Deployed(model.name, model.factory, arguments, sorted(params), elsewhere) if same else nothing


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _read(path: Path) -> tuple[_Header, dict[str, Tensor]]:
    metadata, tensors = _read_file(path)
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
    return header, tensors


def _read_file(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            # Copied: in the file they lie anywhere, in a run at multiples of 64, and some kernels round by that.
            return file.metadata() or {}, {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file: {error}") from error
