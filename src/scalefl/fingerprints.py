"""What a model does, as a digest: it tells a model from others in every process, whatever it is called."""

from __future__ import annotations

import hashlib
import inspect
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
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


def code(classes: Iterable[type]) -> str | None:
    """A digest of the files that define some classes, and of what these files take from others.

    Of what is installed (Python, torch, libraries) the files of the classes themselves only: the rest has versions.
    None where a class has no source.
    """
    digest, read = hashlib.sha256(), set[str]()
    for kind in {base: None for one in classes for base in one.__mro__ if not _is_torch(base.__module__)}:
        try:
            source = inspect.getsource(kind)
        except (OSError, TypeError):
            return None
        digest.update(source.encode())
        read.add(kind.__module__)
    for name in sorted(read | {used for one in read for used in _used_by(one)}):
        path = getattr(sys.modules.get(name), "__file__", None)
        if path is not None and Path(path).suffix == ".py":
            digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def _is_torch(module: str) -> bool:
    return module.partition(".")[0] in ("torch", "builtins", "typing", "abc")


def _used_by(name: str) -> set[str]:
    """The modules of which one uses something, but for installed ones."""
    values = list(vars(sys.modules[name]).values()) if name in sys.modules else []
    found = {v.__name__ if inspect.ismodule(v) else getattr(v, "__module__", None) for v in values}
    files = {one: getattr(sys.modules.get(one), "__file__", None) for one in found if isinstance(one, str)}
    return {one for one, path in files.items() if path and not path.startswith(_INSTALLED)}
