"""What a node is asked to do as bytes, and back, without pickle: nothing runs but what the receiver has on its list.

Values are numbers, texts, bytes, tuples, sets of texts, mappings, and frozen objects of them: dataclasses, named
tuples and msgspec's structs, each written with its class's name. A class is looked up by that name only if `Allowed`
has it, and only if it is of these kinds; so are the factories of models.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from fnmatch import fnmatchcase
from typing import Any

import msgspec

from scalefl.errors import ConfigError, NotAllowed
from scalefl.models import BUILT_IN
from scalefl.models.spec import ModelSpec, load_object

LARGEST_BYTES = 2**26
"""Of what is decoded, once decompressed."""

_KIND = ""
"""The key of a mapping that says what stands for what; no field has this name."""
_SET, _MAPPING, _CLASS = "set", "mapping", "class"

_OWN_CLASSES = (
    "scalefl.types:*",
    "scalefl.parts:*",
    "scalefl.partition:*",
    "scalefl.problem:*",
    "scalefl.objectives:*",
    "scalefl.mentor:*",
    "scalefl.methods.*:*",
    "scalefl.models.*:*",
    "builtins:tuple",
    "builtins:list",
    "builtins:dict",
)
_OWN_FACTORIES = (
    *BUILT_IN.values(),
    "scalefl.models.exits:with_exits",
    "scalefl.models.mixed:mixed",
    "scalefl.models.scaler:dividing",
)


@dataclass(frozen=True)
class Allowed:
    """What a receiver makes of names in a message, beside this package's own values and models.

    Args:
        names: "package.module:name", of classes (problems, objectives, what models return) and of models' factories.
            A name may end in "*": then it stands for what its modules define themselves, not for what they import.
            "*" alone is everything, for nodes that trust their server as themselves.
    """

    names: tuple[str, ...] = ()

    def value_class(self, path: str) -> Any:
        """The class of that name, of frozen values.

        Raises:
            NotAllowed: it is not on the list, or no such class.
        """
        found = self._load(path, (*_OWN_CLASSES, *self.names))
        is_value = isinstance(found, type) and (is_dataclass(found) or issubclass(found, tuple | msgspec.Struct))
        if not is_value or found is tuple:
            raise NotAllowed(f"{path} is not a class of frozen values")
        return found

    def container_class(self, path: str) -> type:
        """The class of that name, of what a module returns.

        Raises:
            NotAllowed: it is not on the list, or no class.
        """
        found = self._load(path, (*_OWN_CLASSES, *self.names))
        if not isinstance(found, type):
            raise NotAllowed(f"{path} is not a class")
        return found

    def check_model(self, model: ModelSpec) -> None:
        """Refuse a model whose factory, or one that it is made around, is not on the list.

        Raises:
            NotAllowed: names it.
        """
        paths = [model.factory, *(value for name, value in _pairs(model.arguments) if name == "factory")]
        for path in paths:
            if not isinstance(path, str):
                raise NotAllowed(f"a model's factory {path!r} is no name")
            self._load(path, (*_OWN_FACTORIES, *self.names))

    def _load(self, path: str, names: tuple[str, ...]) -> Any:
        if path in names or "*" in names:
            return load_object(path)
        module, _, name = path.partition(":")
        if "." in name or not any(fnmatchcase(path, pattern) for pattern in names if pattern.endswith("*")):
            raise NotAllowed(f"{path} is not on this node's list of what may be run (its `allow`)")
        found = load_object(path)
        if getattr(found, "__module__", None) != module:
            raise NotAllowed(f"{path} is not defined in {module}: name it where it is")
        return found


def encode(value: Any) -> bytes:
    """A value as bytes.

    Raises:
        ConfigError: it holds something that has no name by which another machine could find it.
    """
    return zlib.compress(msgspec.msgpack.encode(_plain(value)), 1)


def decode(content: bytes, allowed: Allowed) -> Any:
    """The value in bytes that `encode` made somewhere.

    Raises:
        NotAllowed: it needs what is not on the list.
        ValueError, TypeError: the bytes are no such value.
    """
    unpacker = zlib.decompressobj()
    try:
        plain = unpacker.decompress(content, LARGEST_BYTES)
        if not unpacker.eof:
            raise ValueError(f"cut off, or larger than {LARGEST_BYTES} bytes")
        return _value(msgspec.msgpack.decode(plain), allowed)
    except (zlib.error, msgspec.DecodeError) as error:
        raise ValueError(str(error)) from error


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    if isinstance(value, type):
        return {_KIND: _CLASS, "name": _name_of(value)}
    if isinstance(value, frozenset):
        return {_KIND: _SET, "items": sorted(value)}
    if isinstance(value, tuple):
        if hasattr(value, "_asdict"):
            return _tagged(value, value._asdict())
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {_KIND: _MAPPING, "items": {key: _plain(item) for key, item in value.items()}}
    if isinstance(value, msgspec.Struct):
        return _tagged(value, msgspec.structs.asdict(value))
    if is_dataclass(value):
        return _tagged(value, {field.name: getattr(value, field.name) for field in fields(value)})
    raise ConfigError(
        f"{value!r} cannot be sent to nodes: name models as 'package.module:factory', and make your own problems and "
        "objectives frozen dataclasses of numbers, texts and tuples"
    )


def _tagged(value: Any, content: Mapping[str, Any]) -> dict[str, Any]:
    return {_KIND: _name_of(type(value)), **{name: _plain(item) for name, item in content.items()}}


def _name_of(kind: type) -> str:
    if "." in kind.__qualname__:
        raise ConfigError(f"{kind.__qualname__} cannot be sent to nodes: define it at the top of a module")
    return f"{kind.__module__}:{kind.__qualname__}"


def _value(plain: Any, allowed: Allowed) -> Any:
    if isinstance(plain, list):
        return tuple(_value(item, allowed) for item in plain)
    if not isinstance(plain, dict):
        return plain
    content = dict(plain)
    kind = content.pop(_KIND, None)
    if kind == _SET:
        return frozenset(content["items"])
    if kind == _MAPPING:
        return {key: _value(item, allowed) for key, item in content["items"].items()}
    if kind == _CLASS:
        return allowed.container_class(content["name"])
    made = allowed.value_class(kind)(**{name: _value(item, allowed) for name, item in content.items()})
    if isinstance(made, ModelSpec):
        allowed.check_model(made)
    return made


def _pairs(arguments: Any) -> list[tuple[Any, Any]]:
    """All pairs in nested arguments of a factory: what it is made around has arguments of its own."""
    if not isinstance(arguments, tuple):
        return []
    own = [arguments] if len(arguments) == 2 and isinstance(arguments[0], str) else []
    return [*own, *(pair for item in arguments for pair in _pairs(item))]
