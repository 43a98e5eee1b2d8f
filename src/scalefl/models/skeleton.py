"""Lay named tensors on a module and take them off again: how a client holds a part of a model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from scalefl.errors import ConfigError
from scalefl.params import Params


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, non-persistent buffers included, aliases of tied tensors left out."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach() for name, tensor in named}


def aliases(module: nn.Module) -> dict[str, str]:
    """Further names of tied tensors -> the name under which `tensors` lists them."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, tensor in _every_name(module):
        original = first.setdefault(id(tensor), name)
        if original != name:
            found[name] = original
    return found


class Skeleton:
    """A module whose tensors come and go; what is not laid on it stays on the meta device.

    Tensors are laid on, not copied: a frozen tensor may be shared by any number of skeletons, and one
    that will be trained must be the caller's own.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._empty = dict(_every_name(module))
        self._slots = {name: _slot(module, name) for name in self._empty}
        self._names = _names_by_tensor(module)

    def lay(
        self,
        params: Params,
        trainable: frozenset[str] = frozenset(),
        moving: frozenset[str] = frozenset(),
        written: Collection[str] = (),
    ) -> dict[str, nn.Parameter]:
        """Put `params` in place; return the parameters of `trainable`, which record gradients.

        Buffers that are not to move are copied, as a user's forward may change them, and so are those frozen
        parameters that it is known to write.
        """
        trained: dict[str, nn.Parameter] = {}
        for name, tensor in params.items():
            value = tensor
            if isinstance(self._empty[name], nn.Parameter):
                shared = name in trainable or name in moving or name not in written
                value = nn.Parameter(tensor if shared else tensor.clone(), requires_grad=name in trainable)
                if name in trainable:
                    trained[name] = value
            elif name not in moving:
                value = tensor.clone()
            for alias in self._names[name]:
                self._put(alias, value)
        return trained

    def laid(self, name: str) -> Tensor:
        """The tensor that lies under a name: a forward pass may have put another in the place of a buffer."""
        owner, attribute = self._slots[name]
        table: dict[str, Any] = owner._parameters if attribute in owner._parameters else owner._buffers
        found: Tensor = table[attribute]
        return found

    def exchange(self, values: Params) -> None:
        """Put values in the place of tensors that are laid, as they are."""
        for name, value in values.items():
            for alias in self._names[name]:
                self._put(alias, value)

    def clear(self, names: Iterable[str] | None = None) -> None:
        """Take tensors off, all by default; their memory is free unless the caller holds them."""
        if names is None:
            for name, tensor in self._empty.items():
                self._put(name, tensor)
            return
        for name in names:
            for alias in self._names[name]:
                self._put(alias, self._empty[alias])

    def _put(self, name: str, value: Tensor) -> None:
        owner, attribute = self._slots[name]
        table: dict[str, Any] = owner._parameters if attribute in owner._parameters else owner._buffers
        table[attribute] = value


def check_kinds(module: nn.Module) -> None:
    """Refuse tensors that are neither sent nor averaged.

    Raises:
        ConfigError: names one, and says what to do.
    """
    for name, tensor in _every_name(module):
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            raise ConfigError(
                f"{name} has no shape yet (a lazy module): run the model once on an example in its factory, before it "
                "returns it"
            )
        if tensor.layout is not torch.strided:
            raise ConfigError(
                f"{name} is a sparse tensor ({tensor.layout}), which is neither sent nor averaged: hold it dense "
                f"(.to_dense()), or make it in forward"
            )
        if tensor.dtype is torch.complex128:
            raise ConfigError(f"{name} is complex128, which is not saved: use complex64")
        if tensor.is_quantized:
            raise ConfigError(f"{name} is quantized ({tensor.dtype}), which is not averaged: hold it in float")


def _every_name(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _names_by_tensor(module: nn.Module) -> Mapping[str, list[str]]:
    names: dict[str, list[str]] = {name: [name] for name, _ in _every_name(module)}
    for alias, original in aliases(module).items():
        names[original].append(alias)
    return names


def _slot(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return module.get_submodule(path), attribute


def lay_fakes(module: nn.Module) -> None:
    """Replace every meta tensor by an empty one on the default device; under fake tensors, free of memory."""
    empty = Skeleton(module)
    trainable = frozenset(name for name, p in module.named_parameters() if p.requires_grad)
    empty.lay({name: torch.empty_like(t, device="cpu") for name, t in tensors(module).items()}, trainable)
