"""What was found out about a model, on disk: it is found out once for a machine, not by each command again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import torch

from scalefl.models.spec import ModelSpec

VARIABLE = "SCALEFL_CACHE"
"""Names the folder; empty: nothing is kept."""


class _Unknown(Exception):
    """Something of which only its own code knows what it does."""


def folder() -> Path | None:
    """Where findings are kept; None where they are not. Whoever wants the space deletes it."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named) if named else None
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "scalefl"


def kept(name: str | None, facts: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """What `make` gives, of JSON's types: from disk, else made, and kept there if it can be.

    Args:
        name: the fingerprint of the model that it is about (see `tracing.fingerprint`), or another name; None: nothing
            is kept.
        facts: what else it depends on. Recipes of models count by the fingerprint. Where the class of anything else
            isn't this package's, nothing is kept: its code may change, and its name does not tell.
        make: finds it out; None is not kept.
    """
    home = folder()
    if home is None or name is None:
        return make()
    try:
        key = f"{_code()} {name} {_described(facts)}"
    except _Unknown:
        return make()
    path = home / hashlib.sha256(key.encode()).hexdigest()
    found = _read(path)
    if found is None and (found := make()) is not None:
        _write(path, found)
    return found


def _described(value: Any) -> str:
    """A value in words, the same in every process; models count by their fingerprint."""
    if value is None or isinstance(value, str | int | float):
        return repr(value)
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, frozenset | set):
        return f"{{{', '.join(sorted(map(_described, value)))}}}"
    if isinstance(value, Mapping):
        return _described(sorted(value.items()))
    if type(value) is tuple and {str}.issuperset(map(type, value)):
        return repr(value)  # most of a part are lists of names
    if isinstance(value, list) or type(value) is tuple:
        return f"({', '.join(map(_described, value))})"
    if isinstance(value, ModelSpec):
        return "model"
    if type(value).__module__.partition(".")[0] != __name__.partition(".")[0]:
        raise _Unknown
    return f"{type(value).__qualname__}{_described([getattr(value, name) for name in _fields(value)])}"


def _fields(value: Any) -> Sequence[str]:
    if is_dataclass(value):
        return [field.name for field in fields(value)]
    for attribute in ("_fields", "__struct_fields__"):  # a named tuple's, a msgspec struct's
        if hasattr(value, attribute):
            found: Sequence[str] = getattr(value, attribute)
            return found
    raise _Unknown


@lru_cache(maxsize=1)
def _code() -> str:
    """What finds out: this package to the byte, Python and torch, and the machine, for which torch chooses kernels."""
    machine = (*platform.uname(), torch.backends.cpu.get_cpu_capability())
    digest = hashlib.sha256(f"{sys.version} {torch.__version__} {machine}".encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _read(path: Path) -> Any:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, found = content[:32], content[32:]
    # What is not whole will be made again.
    return msgspec.json.decode(found) if digest == hashlib.sha256(found).digest() else None


def _write(path: Path, value: Any) -> None:
    found = msgspec.json.encode(value)
    with contextlib.suppress(OSError):  # a full or a foreign disk: then the next command finds it out again
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            whole = Path(scratch) / path.name
            whole.write_bytes(hashlib.sha256(found).digest() + found)
            whole.replace(path)
