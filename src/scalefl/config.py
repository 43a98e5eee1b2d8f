"""A run's settings: the dataclasses themselves, read from TOML (or JSON), checked key by key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import msgspec
from torch import nn

from scalefl import advice
from scalefl.conversion import OWN, convert
from scalefl.data import Dataset, Devices, FederatedData, Iid, Natural, Partitioner, Source
from scalefl.engines.local import check_at_once, check_cap
from scalefl.engines.messages import Precision
from scalefl.engines.order import Cap
from scalefl.engines.remote import Patience
from scalefl.engines.trial import Auto
from scalefl.errors import ConfigError, check_range, nearest
from scalefl.lookup import Given, look_in
from scalefl.methods import METHODS, PRESETS
from scalefl.models import resolve
from scalefl.models.spec import ModelSpec, load_object
from scalefl.privacy import Privacy
from scalefl.problem import Problem
from scalefl.settings import COMPARISON, FOLDER, finite, overridden, read_settings
from scalefl.tracking import Destination
from scalefl.types import LocalWork, Method


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
        model: a built-in name, or "package.module:factory" for any `nn.Module`. From Python also a factory or a
            module itself (see `make_config`).
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
        folder: where modules and data are looked for before the working directory: by default where the config lies.
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
    folder: str | None = None

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
        if isinstance(self.model, Given) and isinstance(self.model.value, nn.Module) and self.model_arguments:
            raise ConfigError("model_arguments are a factory's: the model is a module that has been made already")
        for key in ("method", "model_arguments"):
            finite(getattr(self, key), key)
        finite(self.data.source.arguments, "data.source.arguments")
        self.make_method()

    def make_model(self, problem: Problem) -> ModelSpec:
        """The model; what its factory asks of the data by name, and the config leaves open, comes from the data."""
        model = self.model.value if isinstance(self.model, Given) else resolve(self.model)
        return ModelSpec.of(model, **self.model_arguments).completed(_facts(problem))

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
    if any(key in stages[0] for key in COMPARISON):
        raise ConfigError(f"{path} is a comparison: scalefl compare {path}")
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
    """A config from plain values; `engine` may be a name alone.

    From Python, `model` may also be a factory or an `nn.Module`, and `data` or its `source` a `Dataset`,
    `FederatedData`, or a function that returns one. What can be imported is then kept by its path. What can't (it is
    defined in the program that was started or in a function, or made already) has to be given again to resume the run
    or to export its model; and what is defined in the program that was started trains in its process.

    Raises:
        ConfigError: names an unknown key and the nearest known one, or a value that it can't have.
    """
    raw = dict(raw)
    if isinstance(raw.get("engine"), str):
        raw["engine"] = {"name": raw["engine"]}
    if callable(raw.get("model")):
        raw["model"] = Given.of(raw["model"])
    data = raw.get("data")
    if _is_data(data):
        raw["data"] = data = {"source": data}
    if isinstance(data, Mapping) and _is_data(source := data.get("source")):
        raw["data"] = {**data, "source": {"name": Given.of(source)}}
    elif isinstance(data, Mapping) and isinstance(source, Mapping) and _is_data(source.get("name")):
        raw["data"] = {**data, "source": {**source, "name": Given.of(source["name"])}}
    if isinstance(folder := raw.get(FOLDER), str):
        if not Path(folder).is_dir():
            raise ConfigError(f"{FOLDER} = {folder!r}: there is no such folder")
        look_in(folder)
        raw[FOLDER] = str(Path(folder).resolve())
    return convert(raw, Config, "")


def _is_data(value: Any) -> bool:
    return not isinstance(value, Mapping) and (callable(value) or isinstance(value, Dataset | FederatedData))


def to_plain(config: Config) -> dict[str, Any]:
    """A config as JSON values, every default spelled out; without its folder, which is not the same everywhere."""
    # asdict: msgspec leaves out what a dataclass instance has from its class, which is every default.
    plain = cast(dict[str, Any], msgspec.to_builtins(asdict(config), enc_hook=_text))
    del plain[FOLDER]
    return plain


def _text(value: Any) -> str:
    """The name of a Python object in the place of one."""
    if isinstance(value, Given):
        return str(value)
    raise NotImplementedError(f"{type(value).__name__} is no setting")


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
    what = advice.of_method(path) or nearest(path.lower(), known)
    raise ConfigError(f"no method {path!r}{what}; known: {', '.join(sorted(known))}, {OWN}")
