"""Plain values as the dataclasses that they mean, checked key by key: what is wrong is named, with what is near."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from typing import Any, TypeVar, get_args

import msgspec

from scalefl import advice
from scalefl.errors import ConfigError, nearest
from scalefl.harmonizer import GROWTHS, Growth
from scalefl.mentor import SCHEDULES, Schedule
from scalefl.models.spec import load_object

T = TypeVar("T")

OPEN: Mapping[Any, Any] = {Schedule: SCHEDULES, Growth: GROWTHS}
"""Kinds of setting that a user may write their own of, and the built-in ones."""

OWN = "or your own as 'package.module:Class'"


def convert(raw: Any, target: type[T], where: str) -> T:
    """Plain values as `target`.

    Raises:
        ConfigError: names an unknown key and the nearest known one, or a value of the wrong type.
    """
    checked = _checked(raw, msgspec.inspect.type_info(target), where)
    try:
        return msgspec.convert(checked, target)
    except msgspec.ValidationError as error:
        message = str(error).replace("`$.", f"`{where}." if where else "`").replace("`$`", f"`{where or 'config'}`")
        raise ConfigError(message) from error


def _checked(raw: Any, target: Any, where: str) -> Any:
    """`raw` with the user's own objects made, and no key that no field has.

    msgspec passes over such keys in dataclasses, and never names the nearest.
    """
    members = getattr(target, "types", (target,))
    kind = next((t.cls for t in members if getattr(t, "cls", None) in OPEN), None)
    if kind is not None:
        return raw if raw is None else _made(raw, kind, where)
    if isinstance(raw, str):
        _check_word(raw, members, where)
    elif isinstance(raw, list | tuple):
        items = [t.item_type for t in members if hasattr(t, "item_type")]
        return [_checked(item, items[0], f"{where}[{i}]") for i, item in enumerate(raw)] if items else raw
    elif isinstance(raw, Mapping):
        table = _table(members, raw, where)
        return raw if table is None else _checked_table(raw, table, where)
    return raw


def _made(raw: Any, kind: Any, where: str) -> Any:
    """An object of an open kind, from a table whose `kind` is a built-in name or "package.module:Class"."""
    if isinstance(raw, kind):
        return raw
    path = raw.get("kind") if isinstance(raw, Mapping) else None
    if not isinstance(path, str) or ":" not in path:
        return convert(raw, OPEN[kind], where)
    target = load_object(path)
    if not (isinstance(target, type) and (is_dataclass(target) or issubclass(target, msgspec.Struct))):
        raise ConfigError(f"{where}.kind = {path!r}: {target!r} is not a dataclass")
    made = convert({key: value for key, value in raw.items() if key != "kind"}, target, where)
    if not isinstance(made, kind) or target.__hash__ is None:
        raise ConfigError(
            f"{where}.kind = {path!r}: expected a frozen dataclass with the methods of "
            f"{kind.__module__}.{kind.__name__}"
        )
    return made


def _check_word(raw: str, members: Iterable[Any], where: str) -> None:
    """Name the nearest of a fixed set of words."""
    members = list(members)
    known = [word for t in members for word in getattr(t, "values", ()) if isinstance(word, str)]
    tags = {t.tag: t.tag_field for t in members if getattr(t, "tag", None) is not None}
    if raw in tags:
        key = where.rpartition(".")[2]
        raise ConfigError(f'{where} = {raw!r}: expected a table, as {key} = {{ {tags[raw]} = "{raw}" }}')
    free = any(isinstance(t, msgspec.inspect.StrType | msgspec.inspect.AnyType) for t in members)
    if known and not free and raw not in known:
        number = any(isinstance(t, msgspec.inspect.IntType | msgspec.inspect.FloatType) for t in members)
        words = [*known, "a number"] if number else known
        raise ConfigError(f"{where} = {raw!r}{nearest(raw, known)}; known: {', '.join(words)}")


def _checked_table(raw: Mapping[str, Any], table: Any, where: str) -> dict[str, Any]:
    fields = {field.encode_name: field.type for field in table.fields}
    tag_field = getattr(table, "tag_field", None)
    known = [*fields, *([tag_field] if tag_field else [])]
    checked = {}
    for key, value in raw.items():
        place = f"{where}.{key}" if where else str(key)
        if key not in known:
            hint = nearest(str(key), known) or advice.of_key(str(key))
            raise ConfigError(f"unknown key {place!r}{hint}; known: {', '.join(known)}")
        checked[key] = _checked(value, fields[key], place) if key in fields else value
    return checked


def _table(members: Iterable[Any], raw: Mapping[str, Any], where: str) -> Any:
    """The member of a union that a table means: by its tag, or the only one with fields."""
    tables = [t for t in members if hasattr(t, "fields")]
    tagged = [t for t in tables if getattr(t, "tag", None) is not None]
    if tagged:
        field, known = tagged[0].tag_field, [t.tag for t in tagged]
        tag = raw.get(field)
        if tag is not None and tag not in known:
            place = f"{where}.{field}" if where else field
            own = f", {OWN}" if any(t.cls in get_args(kinds) for t in tagged for kinds in OPEN.values()) else ""
            raise ConfigError(f"{place} = {tag!r}{nearest(str(tag), known)}; known: {', '.join(known)}{own}")
        return next((t for t in tagged if t.tag == tag), None)
    return tables[0] if tables else None
