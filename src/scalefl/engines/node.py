"""A client's end of a distributed run: it says what it offers, keeps tensors that may come again, and does tasks."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from scalefl.engines.codec import Allowed, decode
from scalefl.engines.local import LocalEngine
from scalefl.engines.messages import (
    Failure,
    Lacking,
    Offer,
    Order,
    Parcel,
    Update,
    WhoAreYou,
    digest,
    pack,
    reduced,
    restored,
    unpack,
)
from scalefl.params import Params
from scalefl.problem import Problem
from scalefl.types import ClientInfo, ClientLoss, ClientTask, Method, Objective, Receipt, Step

_FILE = "{}.safetensors"


class TensorCache:
    """Tensors by their digests, in a folder; those not used for longest go when it holds too much.

    Args:
        folder: made when needed; other nodes may share it.
        limit_bytes: of all files in it.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder, self._limit_bytes = folder, limit_bytes

    def get(self, name: bytes) -> Tensor | None:
        """The tensor of a digest; None where it is not there, or damaged."""
        path = self._path(name)
        try:
            tensor: Tensor = safetensors.torch.load(path.read_bytes())["tensor"]
        except (OSError, SafetensorError, KeyError):
            return None
        if digest(tensor) != name:
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return tensor

    def put(self, name: bytes, tensor: Tensor) -> None:
        """Keep a tensor; a disk that is full keeps nothing, which costs bytes later."""
        content = safetensors.torch.save({"tensor": tensor.contiguous()})
        if len(content) > self._limit_bytes or self._path(name).exists():
            return
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._make_room(len(content))
            with tempfile.NamedTemporaryFile(dir=self._folder, prefix=".", delete=False) as file:
                try:
                    file.write(content)
                    file.close()
                    Path(file.name).replace(self._path(name))
                except OSError:
                    Path(file.name).unlink(missing_ok=True)

    def _make_room(self, num_bytes: int) -> None:
        files = sorted(((path.stat(), path) for path in self._folder.glob(_FILE.format("*"))), key=_last_use)
        held = sum(stat.st_size for stat, _ in files)
        for stat, path in files:
            if held + num_bytes <= self._limit_bytes:
                return
            path.unlink(missing_ok=True)
            held -= stat.st_size

    def _path(self, name: bytes) -> Path:
        return self._folder / _FILE.format(name.hex())


def _last_use(file: tuple[os.stat_result, Path]) -> float:
    return file[0].st_mtime


@dataclass(frozen=True)
class Given:
    """As much of a method as a client asks for: the objectives that came with a task."""

    objectives: Mapping[Step, Objective]

    def objective(self, step: Step) -> Objective:
        """Of one of the task's steps."""
        return self.objectives[step]


class Node:
    """A client: answers a server's messages, whatever carries them. What goes wrong is an answer too.

    Args:
        client_id: its number.
        engine_for: the engine that does its tasks, under a cap or not, when they are about a problem.
            Raises ValueError where the node's data is about something else.
        describe: what it offers now.
        cache: for tensors that tasks do not move.
        allowed: what it makes of names that a server sends.
        hardware: on what it runs, in words.
    """

    def __init__(
        self,
        client_id: int,
        engine_for: Callable[[Problem], LocalEngine],
        describe: Callable[[], ClientInfo],
        cache: TensorCache,
        allowed: Allowed,
        hardware: str = "",
    ) -> None:
        self._id, self._engine_for, self._describe = client_id, engine_for, describe
        self._cache, self._allowed, self._hardware = cache, allowed, hardware

    def answer(self, parcel: Parcel) -> Parcel:
        """What it has to say to a message."""
        try:
            header = unpack(parcel, WhoAreYou | Order)
            if isinstance(header, WhoAreYou):
                described = self._describe()
                return pack(Offer(described.untold if header.is_private else described, self._hardware))
            return self._do(header, parcel.tensors)
        except Exception as error:  # nothing that a server sends may end a node
            return pack(Failure(f"refused: {type(error).__name__}: {error}"))

    def _do(self, order: Order, sent: Params) -> Parcel:
        task, objectives, problem = decode(order.content, self._allowed)
        if not isinstance(task, ClientTask) or task.client_id != self._id:
            raise ValueError("the task is another client's")
        engine = self._engine_for(problem)
        found, lacking = self._gathered(order.digests, sent, task.moving)
        if lacking:
            return pack(Lacking(lacking))
        params = restored(found, order.scales)
        method = Given(dict(zip(task.steps, objectives, strict=True)))
        (done,) = engine.fit(cast(Method, method), [(task, params)])
        if isinstance(done, ClientLoss):
            if task.is_private:  # an error's text may quote the data, a peak tell how much there is
                return pack(Failure("it failed; its node knows why", done.out_of_memory))
            return pack(Failure(done.cause, done.out_of_memory, done.receipt.peak_bytes, self._describe()))
        tensors, scales = (done.params, {}) if order.precision == "exact" else reduced(done.params, params)
        receipt = Receipt() if task.is_private else done.receipt
        header = Update(
            done.client_id,
            task.round,
            done.num_examples,
            dict(done.metrics),
            receipt.seconds,
            receipt.peak_bytes,
            scales,
            # What is planned next must not depend on who was asked now: in private runs offers alone tell.
            None if task.is_private else self._describe(),
        )
        return pack(header, tensors)

    def _gathered(
        self, digests: Mapping[str, bytes], sent: Params, moving: frozenset[str]
    ) -> tuple[dict[str, Tensor], list[str]]:
        """The tensors of a task, from the message and the cache; and the names of those that are in neither."""
        params, lacking = {}, []
        for name, expected in digests.items():
            tensor = sent[name] if name in sent else self._cache.get(expected)
            if tensor is None:
                lacking.append(name)
                continue
            params[name] = tensor
            if name not in sent:
                continue
            if digest(tensor) != expected:
                raise ValueError(f"{name} was damaged on its way")
            if name not in moving:  # what the task moves will not be the same when it comes again
                self._cache.put(expected, tensor)
        return params, lacking
