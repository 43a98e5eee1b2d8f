"""A run's or a comparison's settings as plain values: read from a file, changed one by one. Needs no torch."""

from __future__ import annotations

import codecs
import copy
import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from scalefl import lookup
from scalefl.errors import ConfigError

FOLDER = "folder"
"""The key for where modules and data are looked for first: by default the file's own folder."""

_ENCODINGS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
"""By the mark that some editors put before a text."""

COMPARISON = ("compare", "variants", "scenarios")
"""The tables that make a config one of a comparison."""


def read_settings(path: Path) -> dict[str, Any]:
    """The plain values in a TOML file, or in the `config.json` of a run, with the folder where they belong.

    Raises:
        ConfigError: the file is missing or malformed.
    """
    head = _parsed(path, _text(path))
    raw = head
    if path.suffix == ".json" and isinstance(head, dict):
        raw = head.get("config", head)
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a table of settings")
    if not raw:
        raise ConfigError(f"{path} is empty: a config has model, rounds, data and devices at least (docs/config.md)")
    remembered = lookup.recalled(path.parent, head.get("places"))
    lookup.look_in(*remembered)
    home = path.parent.resolve()
    named = raw.get(FOLDER, remembered[0] if remembered else "")
    return {**raw, FOLDER: str(home / named) if isinstance(named, str) else named}


def _text(path: Path) -> str:
    if path.is_dir():
        files = sorted(entry.name for entry in path.iterdir() if entry.suffix in (".toml", ".json"))
        raise ConfigError(f"{path} is a folder: name the file" + (f", as {path / files[0]}" if files else ""))
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}{_neighbour(path)}") from error
    mark = next((mark for mark in _ENCODINGS if content.startswith(mark)), None)
    try:
        return content.decode(_ENCODINGS[mark] if mark else "utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: {error}: save it as UTF-8") from error


def _neighbour(path: Path) -> str:
    """A file beside a missing one that is called almost so, for the end of a message."""
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.is_file()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, 1)
    return f": did you mean {str(path.with_name(near[0]))!r}?" if near else ""


def _parsed(path: Path, text: str) -> Any:
    try:
        return json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def overridden(raw: Mapping[str, Any], text: str) -> dict[str, Any]:
    """Nested tables with `a.b.c=value` set; the value is TOML, or a bare string."""
    key, equals, value = text.partition("=")
    path = [part.strip() for part in key.split(".")]
    if not equals or not all(path):
        raise ConfigError(f"--set {text!r}: expected key=value")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    changed: dict[str, Any] = copy.deepcopy(dict(raw))
    table = changed
    for part in path[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {text!r}: {part} is not a table")
    table[path[-1]] = parsed
    return changed


def finite(value: Any, where: str) -> None:
    """Refuse numbers in free tables that JSON, in which a run keeps its config, has not.

    Raises:
        ConfigError: names the key.
    """
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    elif isinstance(value, float) and value - value != 0:
        raise ConfigError(f"{where} = {value}: expected a finite number")
    for key, each in items:
        finite(each, f"{where}.{key}")
