"""Profiles on disk: what a step of a model costs is traced once for a machine, not by each command again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from scalefl.memory import Profile
from scalefl.models.spec import ModelSpec

VARIABLE = "SCALEFL_CACHE"
"""Names the folder; empty: nothing is kept."""


class _Unknown(Exception):
    """Something of which only its own code knows what it does."""


def folder() -> Path | None:
    """Where profiles are kept; None where they are not. Whoever wants the space deletes it."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named) if named else None
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "scalefl"


def stored(fingerprint: str | None, facts: tuple[Any, ...], make: Callable[[], Profile | None]) -> Profile | None:
    """The profile of `facts` about a model: from disk, else made, and kept there if it can be.

    Args:
        fingerprint: of the model (see `Slices`); None: nothing is kept.
        facts: what else the profile depends on. Where a class among them isn't this package's, nothing is kept: its
            code may change, and its name does not tell.
        make: traces it.
    """
    home = folder()
    try:
        key = f"{_code()} {fingerprint} {_described(facts)}"
    except _Unknown:
        return make()
    if home is None or fingerprint is None:
        return make()
    path = home / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
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
    """What traces: this package to the byte, torch, and the kind of machine, for which torch chooses its kernels."""
    digest = hashlib.sha256(f"{torch.__version__} {platform.machine()}".encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _read(path: Path) -> Profile | None:
    try:
        return Profile(**load_file(path))
    except (OSError, SafetensorError, TypeError):  # not there, or not whole: it will be made again
        return None


def _write(path: Path, profile: Profile) -> None:
    with contextlib.suppress(OSError, SafetensorError):  # a full or a foreign disk: then the next command traces again
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            whole = Path(scratch) / path.name
            save_file({f.name: getattr(profile, f.name) for f in fields(profile)}, whole)
            whole.replace(path)
