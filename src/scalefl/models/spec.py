"""A model as a recipe: a factory and its arguments. Built whole, as a skeleton, or at another width."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import inspect
import sys
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from scalefl import lookup
from scalefl.errors import ConfigError, ScaleFLError, UnsliceableModel, nearest
from scalefl.rng import seeded

Factory = Callable[..., nn.Module]


def load_object(path: str) -> Any:
    """The object at "package.module:name".

    Raises:
        ConfigError: the module cannot be imported or has no such name.
    """
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise ConfigError(f"{path!r} is not of the form 'package.module:name'")
    _check_own(path, module_name)
    try:
        target: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a user's module may fail in any way while it is imported
        raise ConfigError(f"cannot import {module_name!r} for {path!r}: {cause(error, module_name)}") from error
    _check_own(path, module_name)
    try:
        return functools.reduce(getattr, attribute.split("."), target)
    except AttributeError as error:
        if module_name == "__main__":
            raise ConfigError(f"{path!r} is defined in the program that was started, not in a module") from error
        names = [name for name in vars(target) if not name.startswith("_")]
        raise ConfigError(f"{path!r}: {error}{nearest(attribute, names)}") from error


def _check_own(path: str, module: str) -> None:
    """Refuse to take a module of the same name for the one beside the config, which may have been loaded before."""
    if (found := lookup.another(module)) is not None:
        raise ConfigError(
            f"{path!r}: {found[0]} lies beside the config, but {found[1]} has been imported under that name: give "
            "yours another name, or start it in a process of its own"
        )


def cause(error: BaseException, module: str = "") -> str:
    """What stopped a user's code, a `module` while it was imported or a function, and what to do about it."""
    if isinstance(error, SystemExit):
        guard = 'put what parses arguments or runs under `if __name__ == "__main__":`'
        return f"it ends the program (SystemExit: {error}): {guard}"
    said = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        if module == error.name or module.startswith(f"{error.name}."):
            return f"{said}; {lookup.told(error.name)}"
        return f"{said}: it needs that one, which is not installed for {sys.executable}"
    if isinstance(error, FileNotFoundError) and error.filename and not Path(error.filename).is_absolute():
        return f"{said}; a relative path of your code is looked for in the working directory, {Path.cwd()}"
    places = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    own = next((f for f in reversed(places) if not f.filename.startswith(("<", sys.base_prefix, sys.prefix))), None)
    return f"{said} ({Path(own.filename).name}, line {own.lineno})" if own else said


@dataclass(frozen=True)
class ModelSpec:
    """How to build a model; hashable, and picklable where the factory is.

    Args:
        factory: "package.module:function", or the callable itself.
        arguments: keyword arguments for it, as sorted pairs (see `ModelSpec.of`).
    """

    factory: str | Factory
    arguments: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, model: str | Factory | nn.Module | ModelSpec, **arguments: Any) -> ModelSpec:
        """A spec for a factory, a "package.module:factory" path, or a module to be copied."""
        if isinstance(model, ModelSpec):
            return replace(model, arguments=_frozen({**dict(model.arguments), **arguments}))
        if isinstance(model, nn.Module):
            return cls(_CopyOf(model))
        return cls(model, _frozen(arguments))

    def build(self, seed: int) -> nn.Module:
        """The whole model with its own initial weights, drawn from `seed`."""
        with seeded(seed):
            return self.make()

    def skeleton(self) -> nn.Module:
        """The model without memory: every tensor on the meta device."""
        with seeded(0):
            self._callable()  # imported here, as what is computed during an import may not be on the meta device
            try:
                with torch.device("meta"), _WithoutDraws(), _quiet_copies():
                    module = self._made().to("meta")
                if not _has_plain_tensors(module):
                    return module
            except ScaleFLError:
                raise
            except (Exception, SystemExit):
                pass
            # A factory that looks at its own weights (an .item() in an initialiser) can't run on meta
            # tensors, and fails in any way; and a tensor that is neither parameter nor buffer could not be laid on
            # later: build it once for real and let the memory go.
            return self.make().to("meta")

    def at_width(self, width: float) -> ModelSpec:
        """The same model with `width` times the channels.

        Raises:
            UnsliceableModel: the factory takes no `width`.
        """
        if "width" not in inspect.signature(self._callable()).parameters:
            raise UnsliceableModel(f"{self.name}: the factory has no `width` argument to scale the model by")
        current = dict(self.arguments).get("width", 1.0)
        return ModelSpec.of(self, width=current * width)

    def around(self, factory: str, **arguments: Any) -> ModelSpec:
        """The recipe of what `factory` makes of this model, whose own recipe it gets as `factory` and `arguments`."""
        return ModelSpec.of(factory, factory=self.factory, arguments=self.arguments, **arguments)

    def completed(self, facts: Mapping[str, Any]) -> ModelSpec:
        """The spec with those of `facts` that the factory has a parameter for and the arguments leave open."""
        wanted = inspect.signature(self._callable()).parameters
        return ModelSpec.of(self, **{k: v for k, v in facts.items() if k in wanted and k not in dict(self.arguments)})

    @property
    def name(self) -> str:
        """A short name for tables and messages: of the model itself, if this is a recipe around one."""
        if isinstance(self.factory, str) and self.factory.startswith("scalefl.models.") and self._inner is not None:
            return ModelSpec(self._inner).name
        if isinstance(self.factory, str):
            return self.factory.rpartition(":")[2]
        return getattr(self.factory, "__name__", type(self.factory).__name__)

    @property
    def _inner(self) -> str | Factory | None:
        """The factory that this one is made around (see `around`)."""
        return dict(self.arguments).get("factory")

    def _callable(self) -> Factory:
        return load_object(self.factory) if isinstance(self.factory, str) else self.factory

    def make(self) -> nn.Module:
        """The whole model, its weights drawn from the current default generators.

        Raises:
            ConfigError: the factory does not take the arguments, fails, or returns no module.
        """
        try:
            return self._made()
        except ScaleFLError:
            raise
        except (Exception, SystemExit) as error:
            raise ConfigError(f"model {self.name}: its factory fails with {cause(error)}") from error

    def _made(self) -> nn.Module:
        """See `make`; what the factory raises is passed on."""
        factory = self._callable()
        try:
            inspect.signature(factory).bind(**dict(self.arguments))
        except TypeError as error:
            raise ConfigError(f"model {self.name}: {error}") from error
        except ValueError:
            pass  # a built-in without a signature: let the call itself speak
        model = factory(**dict(self.arguments))
        if not isinstance(model, nn.Module):
            returned = type(model).__name__
            raise ConfigError(f"model {self.name}: the factory returned {returned}, not an nn.Module")
        return model


class _WithoutDraws(TorchFunctionMode):
    """Leaves out initialisers' random draws: on the meta device they would do nothing but load torch's compiler."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.normal_, Tensor.uniform_) and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _quiet_copies() -> Iterator[None]:
    """Without torch's word, for each tensor that a factory loads, that on the meta device this does nothing: so it is
    meant, as values come from the model that is built for real.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*copying from a non-meta parameter in the checkpoint to a meta parameter")
        yield


class _CopyOf:
    """A factory that copies a module; equal to itself after a trip to a worker, which so knows it again."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._id = module, uuid.uuid4().hex
        self.__name__ = type(module).__name__

    def __call__(self) -> nn.Module:
        return copy.deepcopy(self._module)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _CopyOf) and self._id == other._id

    def __hash__(self) -> int:
        return hash(self._id)


def _has_plain_tensors(module: nn.Module) -> bool:
    return any(isinstance(value, Tensor) for child in module.modules() for value in vars(child).values())


def _frozen(arguments: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted((k, _hashable(v)) for k, v in arguments.items()))


def _hashable(value: Any) -> Any:
    if isinstance(value, dict):
        raise ConfigError(f"model argument {value!r}: tables are not supported, only numbers, words and lists")
    return tuple(_hashable(item) for item in value) if isinstance(value, list) else value
