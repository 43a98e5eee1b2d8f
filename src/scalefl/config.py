"""A run's settings: the dataclasses themselves, read from TOML (or JSON), checked key by key."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

import msgspec

from scalefl.data import Devices, Iid, Natural, Partitioner, Source
from scalefl.engines.local import check_at_once, check_cap
from scalefl.engines.messages import Precision
from scalefl.engines.order import Cap
from scalefl.engines.remote import Patience
from scalefl.engines.trial import Auto
from scalefl.errors import ConfigError, check_range, nearest
from scalefl.harmonizer import GROWTHS, Growth
from scalefl.mentor import SCHEDULES, Schedule
from scalefl.methods import METHODS, PRESETS
from scalefl.models import resolve
from scalefl.models.spec import ModelSpec, load_object
from scalefl.privacy import Privacy
from scalefl.problem import Problem
from scalefl.tracking import Destination
from scalefl.types import LocalWork, Method

T = TypeVar("T")

OPEN: Mapping[Any, Any] = {Schedule: SCHEDULES, Growth: GROWTHS}
"""Kinds of setting that a user may write their own of, and the built-in ones."""

OWN = "or your own as 'package.module:Class'"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What clients hold.

    Args:
        source: the data set.
        clients: how many share it; "auto": as many as a `natural` partition finds, 100 for others.
        partition: how.
        validation: share of the training data that is held out to choose by.
    """

    source: Source
    clients: int | Auto = "auto"
    partition: Partitioner = Iid()
    validation: float = 0.1

    def __post_init__(self) -> None:
        if self.clients == "auto" and not isinstance(self.partition, Natural):
            object.__setattr__(self, "clients", 100)
        if self.clients != "auto":
            check_range("clients", self.clients, 1)
        if not 0 < self.validation < 1:
            raise ConfigError(f"validation = {self.validation}: expected a share between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Where clients run.

    Args:
        name: "local": in processes of this machine; "flower": so too, but each behind a Flower node of its own, over a
            grid in this process. Updates are the same to the bit; counted bytes are those that crossed.
        workers: processes beside this one; 0 runs clients in this one. Results do not depend on it.
        threads: torch's threads for each process. Results depend on it in the last bits. "auto", for each of the two:
            what a short trial before a new run finds fastest. More workers than cores or memory for them are reduced.
        cap: "measured": the journal has what each client took; "hard": and a client that takes more than its budget is
            lost. Both need workers, take time, and need Linux.
        device: where clients train and models are measured: "cpu", "cuda" or "cuda:1". Budgets are of its memory.
        clients_at_once: how many with equal tasks share a run, if their means and their model let them: small models
            then take from a quarter to nine tenths of the time. Results depend on it in the last bits. "auto": what the
            trial finds faster, and 1 where `threads` is a number.
        patience: how long to wait for nodes.
        precision: "float16": weights travel in half precision, and so do the differences that nodes send back.
    """

    name: Literal["local", "flower"] = "local"
    workers: int | Auto = "auto"
    threads: int | Auto = "auto"
    cap: Cap = "none"
    device: str = "cpu"
    clients_at_once: int | Auto = "auto"
    patience: Patience = Patience()
    precision: Precision = "exact"

    def __post_init__(self) -> None:
        if self.workers != "auto":
            check_range("workers", self.workers, 0)
            check_cap(self.cap, self.workers)
        if self.clients_at_once != "auto":
            check_at_once(self.cap, self.clients_at_once)
            if self.name == "flower" and self.clients_at_once > 1:
                raise ConfigError('engine = "flower" needs clients_at_once = 1: each node trains one client')
        if self.threads != "auto":
            check_range("threads", self.threads, 1)
        if self.name == "local" and self.precision != "exact":
            raise ConfigError(f"engine.precision = {self.precision!r}: nothing is sent by the local engine")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured along the way.

    Args:
        every: rounds between evaluations on validation data; the last round is always evaluated.
        plane_every: rounds between points of the nHSIC plane; 0 draws only the start and the end.
        plane_cuts: where the plane is read: a number of blocks, or module paths.
        plane_samples: validation samples of the plane's probe.
    """

    every: int = 1
    plane_every: int = 0
    plane_cuts: int | tuple[str, ...] = 4
    plane_samples: int = 256

    def __post_init__(self) -> None:
        for key in ("every", "plane_samples"):
            check_range(key, getattr(self, key), 1)
        check_range("plane_every", self.plane_every, 0)
        if isinstance(self.plane_cuts, int):
            check_range("plane_cuts", self.plane_cuts, 1)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run.

    Args:
        model: a built-in name, or "package.module:factory" for any `nn.Module`.
        model_arguments: keyword arguments for its factory.
        data: what clients hold.
        devices: what they can do.
        rounds: how long.
        name: of the run's folder.
        seed: of everything random.
        clients_per_round: size of the cohort; with `privacy`, on average, if all clients are eligible.
        method: its `name` (or "package.module:Class") and its settings.
        work: what each client does in a round.
        engine: where clients run.
        evaluation: what is measured along the way.
        save_every: rounds between saved states.
        tracking: where to copy what the journal gets.
        privacy: differential privacy of each client's data; None: off.
    """

    model: str
    data: DataConfig
    devices: Devices
    rounds: int
    name: str = "run"
    seed: int = 0
    clients_per_round: int = 10
    model_arguments: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=lambda: {"name": "scalefl"})
    work: LocalWork = LocalWork()
    engine: EngineConfig = EngineConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    save_every: int = 1
    tracking: tuple[Destination, ...] = ()
    privacy: Privacy | None = None

    def __post_init__(self) -> None:
        for key in ("rounds", "clients_per_round", "save_every"):
            check_range(key, getattr(self, key), 1)
        if 0 < self.work.lr_rounds < self.rounds:
            raise ConfigError(
                f"work.lr_rounds = {self.work.lr_rounds} is shorter than the run ({self.rounds} rounds): the learning "
                "rate would be 0 from there on"
            )
        if self.name in ("", ".", "..") or Path(self.name).name != self.name:
            raise ConfigError(f"name = {self.name!r}: expected the name of a folder, without slashes")
        self.make_method()

    def make_model(self, problem: Problem) -> ModelSpec:
        """The model; what its factory asks of the data by name, and the config leaves open, comes from the data."""
        spec = ModelSpec.of(resolve(self.model), **self.model_arguments)
        return spec.completed(_facts(problem))

    def make_method(self) -> Method:
        """The method, with this run's local work."""
        settings = dict(self.method)
        preset = PRESETS.get(str(settings.get("name")))
        if preset is not None:
            settings = {**preset, **settings, "name": preset["name"]}
        name = str(settings.pop("name", "scalefl"))
        target = load_object(METHODS[name]) if name in METHODS else _own_method(name)
        if "work" in settings:
            raise ConfigError("method.work: local work has a table of its own, [work], shared by all methods")
        if not (isinstance(target, type) and is_dataclass(target)):
            raise ConfigError(f"method {name!r}: {target!r} is not a dataclass (see docs/adding-a-method.md)")
        return cast(Method, replace(convert(settings, target, "method"), work=self.work))


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """A config from a TOML file (or the `config.json` of a run), with "key=value" overrides.

    Raises:
        ConfigError: the file is missing or malformed, a key is unknown, or a value has the wrong type; names the
            file, or the override that brought it about.
    """
    path, stages, names = Path(path), [read_settings(Path(path))], [str(path)]
    for override in overrides:
        stages.append(overridden(stages[-1], override))
        names.append(f"--set {override!r}")
    try:
        return make_config(stages[-1])
    except ConfigError as error:
        # The same error without the last override, and the one before it, … : the first that has it is to blame.
        first = [_complaint(stage) for stage in stages].index(str(error))
        raise ConfigError(f"{names[first]}: {error}") from error


def make_config(raw: Mapping[str, Any]) -> Config:
    """A config from plain values; `engine` may be a name alone."""
    engine = raw.get("engine")
    return convert({**raw, "engine": {"name": engine}} if isinstance(engine, str) else raw, Config, "")


def to_plain(config: Config) -> dict[str, Any]:
    """A config as JSON values, every default spelled out."""
    # asdict: msgspec leaves out what a dataclass instance has from its class, which is every default.
    return cast(dict[str, Any], msgspec.to_builtins(asdict(config)))


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


def read_settings(path: Path) -> dict[str, Any]:
    """The plain values in a TOML file, or in the `config.json` of a run.

    Raises:
        ConfigError: the file is missing or malformed.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    try:
        raw = msgspec.json.decode(content) if path.suffix == ".json" else tomllib.loads(content.decode())
    except (msgspec.DecodeError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if path.suffix == ".json" and isinstance(raw, dict):
        raw = raw.get("config", raw)
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a table of settings")
    return raw


def _complaint(raw: Mapping[str, Any]) -> str:
    """What is wrong with settings; empty if nothing is."""
    try:
        make_config(raw)
    except ConfigError as error:
        return str(error)
    return ""


def _facts(problem: Problem) -> dict[str, Any]:
    facts: dict[str, Any] = {"num_classes": problem.num_classes}
    shapes = [column.shape[1:] for column in problem.example(1).values() if column.ndim == 4]
    if shapes:
        facts |= {"in_channels": shapes[0][0], "image_size": shapes[0][-1]}
    return facts


def _own_method(path: str) -> Any:
    if ":" in path:
        return load_object(path)
    known = [*METHODS, *PRESETS]
    raise ConfigError(f"no method {path!r}{nearest(path, known)}; known: {', '.join(sorted(known))}, {OWN}")


def overridden(raw: Mapping[str, Any], text: str) -> dict[str, Any]:
    """Nested tables with `a.b.c=value` set; the value is TOML, or a bare string."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text!r}: expected key=value")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    changed: dict[str, Any] = copy.deepcopy(dict(raw))
    *path, last = key.strip().split(".")
    table = changed
    for part in path:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {text!r}: {part} is not a table")
    table[last] = parsed
    return changed


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
            raise ConfigError(f"unknown key {place!r}{nearest(str(key), known)}; known: {', '.join(known)}")
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
