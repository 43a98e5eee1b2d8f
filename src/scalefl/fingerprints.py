"""What a model does, as a digest: it tells a model from others in every process, whatever it is called."""

from __future__ import annotations

import hashlib
import inspect
import sys
import sysconfig
from collections.abc import Iterable
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from scalefl.fakes import UNKNOWN, RememberingFakes, key_of
from scalefl.torch_private import FakeTensor, TorchDispatchMode

_INSTALLED = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside it, a digest takes in all operations and the shapes of their arguments, on fake tensors."""

    def __init__(self, fakes: RememberingFakes) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fakes = fakes
        self.digest = hashlib.sha256()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nobody compiles here, and the guard against it costs more than most operations

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        kwargs = kwargs or {}
        self.note(str(func), args, kwargs)
        key = key_of(func, args, kwargs)
        result = UNKNOWN if key is None else self._fakes.recall(key, args)
        return func(*args, **kwargs) if result is UNKNOWN else result

    def note(self, *facts: Any) -> None:
        """Take in facts, of tensors their shapes and dtypes."""
        self.digest.update(repr(_shapes(facts)).encode())


def _shapes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), str(value.dtype)
    if isinstance(value, tuple | list):
        return [_shapes(item) for item in value]
    if isinstance(value, dict):
        return [(name, _shapes(item)) for name, item in value.items()]
    return str(value)


def structure(module: nn.Module) -> list[Any]:
    """The modules and tensors of a model: their names and kinds, and what of them trains."""
    modules = [(path, type(child).__qualname__, child.training) for path, child in module.named_modules()]
    parameters = [(name, p, p.requires_grad) for name, p in module.named_parameters()]
    return [modules, parameters, list(module.named_buffers())]


def code(classes: Iterable[type]) -> str:
    """A digest of the code of some classes, and of what their modules define or take from each other.

    Of what is installed (Python, torch, libraries) the classes themselves only: the rest has versions.
    """
    digest, seen = hashlib.sha256(), set[int]()
    own = list({base: None for one in classes for base in one.__mro__ if not _is_torch(base.__module__)})
    modules = {kind.__module__ for kind in own if kind.__module__ in sys.modules and not _is_installed(kind.__module__)}
    used = [value for name in sorted(modules) for _, value in sorted(vars(sys.modules[name]).items())]
    for value in (*own, *used):
        if inspect.isclass(value) and (value in own or not _is_installed(value.__module__)):
            members = [member for _, member in sorted(vars(value).items())]
        elif inspect.isfunction(value) and not _is_installed(value.__module__):
            members = [value]
        else:
            continue
        for member in members:
            for function in _functions(member):
                if id(function) not in seen:
                    seen.add(id(function))
                    digest.update(repr(_told(function.__code__)).encode())
    return digest.hexdigest()


def _functions(member: Any) -> list[FunctionType]:
    """The functions that a member of a class or a module is made of."""
    if isinstance(member, property):
        return [f for f in (member.fget, member.fset, member.fdel) if inspect.isfunction(f)]
    found = getattr(member, "__func__", member)
    return [inspect.unwrap(found)] if inspect.isfunction(found) else []


def _told(value: Any) -> Any:
    """What compiled code does, the same in every process."""
    if isinstance(value, CodeType):
        return value.co_code, value.co_names, value.co_varnames, [_told(constant) for constant in value.co_consts]
    if isinstance(value, frozenset):
        return sorted(map(repr, value))
    return repr(value)


def _is_torch(module: str) -> bool:
    return module.partition(".")[0] in ("torch", "builtins", "typing", "abc")


def _is_installed(module: str | None) -> bool:
    path = getattr(sys.modules.get(module or ""), "__file__", None)
    return module != "__main__" and (path is None or path.startswith(_INSTALLED))
