"""Fake tensors that remember: what an operation gives for arguments of some shapes is worked out once a process.

A trace is some thousands of operations, of which hundreds differ. Torch's own cache knows them too, but its keys
cost more than all the rest of a trace: with this one, traces take half the time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scalefl.torch_private import FakeTensor, FakeTensorMode, without_modes


class _Forgettable(Exception):
    """Something whose result depends on more than shapes, or that is too rare to care."""


class _Made(NamedTuple):
    """A tensor that an operation gives: of a new storage, or a view of one of its arguments."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    view_of: int | None = None
    offset: int = 0


class _Argument(NamedTuple):
    """An argument that an operation gives back."""

    place: int


UNKNOWN = object()
_Single = _Made | _Argument | None
_results: dict[Any, _Single | list[_Single] | tuple[_Single, ...]] = {}


class RememberingFakes(FakeTensorMode):  # type: ignore[no-untyped-call]
    """A mode in which tensors are fake; results whose shapes are known are made without asking torch."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._attributes: dict[torch.device, dict[str, Any]] = {}

    def dispatch(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """See `FakeTensorMode`."""
        kwargs = kwargs or {}
        result = super().dispatch(func, types, args, kwargs)
        key = key_of(func, args, kwargs)
        if key is not None and key not in _results and torch.Tag.inplace_view not in func.tags:
            with contextlib.suppress(_Forgettable):
                _results[key] = _noted(result, args, kwargs)
        return result

    def recall(self, key: Any, args: Sequence[Any]) -> Any:
        """What an operation of such a key (see `key_of`) gives; UNKNOWN where it has not been seen."""
        noted = _results.get(key, UNKNOWN)
        return UNKNOWN if noted is UNKNOWN else self._again(noted, args)

    def _again(self, noted: Any, args: Sequence[Any]) -> Any:
        if isinstance(noted, _Made):
            with without_modes():
                if noted.view_of is None:
                    made = torch.empty_strided(noted.shape, noted.stride, dtype=noted.dtype, device="meta")
                else:
                    made = torch.empty(0, dtype=noted.dtype, device="meta")
                    made.set_(args[noted.view_of].untyped_storage(), noted.offset, noted.shape, noted.stride)
            return self._faked(made, noted.device)
        if isinstance(noted, _Argument):
            return args[noted.place]
        return None if noted is None else type(noted)(self._again(item, args) for item in noted)

    def _faked(self, made: Tensor, device: torch.device) -> Any:
        """`FakeTensor(self, made, device)`, with the attributes of one that was made so, for a tenth of the time."""
        if device not in self._attributes:
            self._attributes[device] = vars(FakeTensor(self, made, device)).copy()
        fake = Tensor._make_subclass(FakeTensor, made, False, dispatch_device=True, device_for_backend_keys=device)
        vars(fake).update(self._attributes[device])
        return fake


def key_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """All that the shapes which an operation gives depend on; None where they may depend on more."""
    try:
        key = func, _key(args), _key(tuple(kwargs.items())) if kwargs else (), torch.get_default_dtype()
        hash(key)
    except (_Forgettable, TypeError):  # or an argument that can't be hashed
        return None
    return key


def _key(value: Any) -> Any:
    """What of an argument its operation's result can depend on."""
    kind = type(value)
    if kind is FakeTensor:
        if value.constant is not None or value.layout is not torch.strided or value.is_neg() or value.is_conj():
            raise _Forgettable
        return value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device
    if kind is int or kind is float or kind is bool:
        return kind, value  # 1, 1.0 and True are equal
    if isinstance(value, tuple | list):
        return tuple([_key(item) for item in value])
    if isinstance(value, Tensor):
        raise _Forgettable
    return kind, value


def _noted(result: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if result is None:
        return None
    if any(t.layout is not torch.strided for t in _tensors([result])):
        raise _Forgettable  # it has no storage
    hidden = {id(t.untyped_storage()) for t in _tensors([a for a in args if isinstance(a, tuple | list)])}
    hidden |= {id(t.untyped_storage()) for t in _tensors(list(kwargs.values()))}
    if any(id(t.untyped_storage()) in hidden for t in _tensors([result])):
        raise _Forgettable  # of an argument among others, or of one by name
    if not isinstance(result, tuple | list):
        return _noted_one(result, args)
    storages = [id(item.untyped_storage()) for item in result if isinstance(item, Tensor)]
    if type(result) not in (tuple, list) or len(set(storages)) < len(storages):
        raise _Forgettable
    return type(result)(None if item is None else _noted_one(item, args) for item in result)


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _noted_one(result: Any, args: Sequence[Any]) -> _Made | _Argument:
    if not isinstance(result, FakeTensor):
        raise _Forgettable
    _key(result)  # must be one that a key can stand for
    made = _Made(tuple(result.shape), result.stride(), result.dtype, result.fake_device)
    storage, offset = result.untyped_storage(), result.storage_offset()
    for place, argument in enumerate(args):
        if result is argument:
            return _Argument(place)
        if isinstance(argument, Tensor) and argument.untyped_storage() is storage:
            return made._replace(view_of=place, offset=int(offset))
    size = torch.empty_strided(made.shape, made.stride, dtype=made.dtype, device="meta").untyped_storage().nbytes()
    if offset or size != storage.nbytes():
        raise _Forgettable
    return made
