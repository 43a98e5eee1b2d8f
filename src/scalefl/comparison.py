"""Compare methods: the same config in variants, for several seeds, under several budgets, side by side.

A comparison is a run's config with three tables of its own: `[compare]` (seeds), `[variants.NAME]` and
`[scenarios.NAME]`, each with tables of the config that replace its own. Every run is a process and a folder of its
own: finished ones are not run again, and broken ones go on where they were. A variant whose runs no scenario's budgets
change can be run in one of them alone, for all.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Any

from scalefl.checkpoint import write_whole
from scalefl.config import Config, make_config, to_plain
from scalefl.conversion import convert
from scalefl.errors import ConfigError, ScaleFLError, check_range, nearest
from scalefl.lookup import remembered
from scalefl.privacy import check_accountant
from scalefl.run_folder import RunFolder, to_json
from scalefl.runner import check_same
from scalefl.settings import COMPARISON, overridden, read_settings
from scalefl.tracking import check_installed

ONCE = "run_once_in"
"""The key of a variant that names the one scenario in which it runs."""


@dataclass(frozen=True, kw_only=True)
class Compare:
    """The settings of a comparison.

    Args:
        seeds: each variant runs once with each.
        target_accuracy: on validation data, up to which seconds are counted; None: the highest that every
            variant of a scenario reaches.
        validation_only: leave test figures out of tables, for choices that must not depend on them.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    target_accuracy: float | None = None
    validation_only: bool = False

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"compare.seeds = {list(self.seeds)}: expected different numbers, one at least")
        if self.target_accuracy is not None:
            check_range("compare.target_accuracy", self.target_accuracy, 0.0)


@dataclass(frozen=True)
class Job:
    """One run of a comparison."""

    scenario: str
    variant: str
    seed: int
    config: Config
    folder: Path


@dataclass(frozen=True)
class Ended:
    """A run that has ended, now or `before`, what went wrong, and what it warned of."""

    job: Job
    error: str = ""
    before: bool = False
    warnings: tuple[str, ...] = ()


@dataclass
class Comparison:
    """All runs of a comparison, under one folder.

    Args:
        name: of the comparison.
        path: its folder.
        settings: its own.
        scenarios, variants: names, in the order of the file; a comparison without scenarios has one without a name.
        run_once: variant -> the one scenario in which it runs, for those whose runs stand in all of them.
        jobs: the runs, seed by seed, so that each seed is a comparison already.
    """

    name: str
    path: Path
    settings: Compare
    scenarios: tuple[str, ...]
    variants: tuple[str, ...]
    run_once: Mapping[str, str]
    jobs: tuple[Job, ...]
    _running: set[subprocess.Popen[str]] = field(default_factory=set)
    _is_over: Event = field(default_factory=Event)

    def describe(self) -> None:
        """Write what is compared into the folder, for reports."""
        self.path.mkdir(parents=True, exist_ok=True)
        content = {"name": self.name, "settings": asdict(self.settings)}
        content |= {"scenarios": self.scenarios, "variants": self.variants, "run_once": self.run_once}
        write_whole(RunFolder(self.path).comparison, to_json(content, indent=2).encode())

    def run(self, parallel: int | None = None) -> Generator[Ended]:
        """Do what is not done yet, as many runs side by side as asked (or as there are cores); yield each that ends.

        A run that fails does not stop the others. Whoever stops asking stops the runs that are under way; what they
        have saved is found again.
        """
        self._is_over.clear()
        with ThreadPoolExecutor(parallel or os.cpu_count() or 1) as pool:
            futures = [pool.submit(self._done, job) for job in self.jobs]
            try:
                for future in as_completed(futures):
                    yield future.result()
            finally:
                self._is_over.set()
                for future in futures:
                    future.cancel()
                for process in list(self._running):
                    process.terminate()  # a run may be killed at any moment

    def _done(self, job: Job) -> Ended:
        files = RunFolder(job.folder)
        if files.summary.exists():
            try:
                check_same(job.config, files)
            except ScaleFLError as error:
                return Ended(job, str(error), before=True)
            return Ended(job, before=True)
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        path = job.folder.with_name(f"{job.folder.name}.json")
        places = remembered(path.parent, job.config.folder, Path.cwd())
        path.write_text(to_json({"config": to_plain(job.config), "places": places}))
        command = [
            sys.executable,
            "-P",
            "-m",
            "scalefl.cli",
            "run",
            str(path),
            "--resume",
            "--runs",
            str(job.folder.parent),
        ]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)}
        # A session of its own: Ctrl-C is ours to handle.
        with subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            self._running.add(process)
            if self._is_over.is_set():
                process.terminate()
            _, said = process.communicate()
            self._running.discard(process)
        path.unlink(missing_ok=True)
        warnings = tuple(line for line in said.splitlines() if line.startswith("warning: "))
        if process.returncode != 0:
            rest = "\n".join(line for line in said.strip().splitlines() if line not in warnings)
            return Ended(job, rest or f"exit status {process.returncode}", warnings=warnings)
        return Ended(job, warnings=warnings)


def load_comparison(path: str | Path, overrides: tuple[str, ...] = (), *, runs: Path) -> Comparison:
    """A comparison from a TOML file, with "key=value" overrides; its runs lie in `runs`/NAME/….

    Raises:
        ConfigError: as `load_config`, `check_installed` or `check_accountant`; names the variant and the scenario
            whose config is wrong, before anything runs.
    """
    raw = read_settings(Path(path))
    if not any(key in raw for key in COMPARISON):
        raise ConfigError(f"{path} is no comparison, as it has no [variants]: scalefl run {path}")
    for override in overrides:
        raw = overridden(raw, override)
    settings = convert(raw.pop("compare", {}), Compare, "compare")
    variants, scenarios = (_tables(raw, name) for name in ("variants", "scenarios"))
    if not variants:
        raise ConfigError(f"{path}: a comparison needs variants, as [variants.fedavg] with method = {{ name = … }}")
    run_once = _taken_once(raw, variants, scenarios)
    name = str(raw.get("name", Path(path).stem))
    jobs = []
    for seed in settings.seeds:
        for scenario, budgets in (scenarios or {"": {}}).items():
            for variant, changes in variants.items():
                folder = runs / name / scenario / f"{variant}-{seed}"
                try:
                    config = make_config({**raw, **budgets, **changes, "name": folder.name, "seed": seed})
                    check_installed(config.tracking)
                    if config.privacy is not None:
                        check_accountant()
                except ConfigError as error:
                    where = f"variant {variant!r}" + (f" in scenario {scenario!r}" if scenario else "")
                    raise ConfigError(f"{path}: {where}: {error}") from error
                if run_once.get(variant, scenario) == scenario:
                    jobs.append(Job(scenario, variant, seed, _beside_others(config), folder))
    return Comparison(name, runs / name, settings, tuple(scenarios or {"": {}}), tuple(variants), run_once, tuple(jobs))


def _beside_others(config: Config) -> Config:
    """The config of a run that has a core for itself: cores are taken by other runs, not by its own workers."""
    engine = config.engine
    workers = engine.workers if engine.workers != "auto" else 0 if engine.cap == "none" else 1
    threads = engine.threads if engine.threads != "auto" else 1
    at_once = engine.clients_at_once if engine.clients_at_once != "auto" else 1
    return replace(config, engine=replace(engine, workers=workers, threads=threads, clients_at_once=at_once))


def _taken_once(
    raw: Mapping[str, Any], variants: Mapping[str, dict[str, Any]], scenarios: Mapping[str, Mapping[str, Any]]
) -> dict[str, str]:
    """The one scenario in which a variant runs, of each that names one; that key is taken out of its table.

    Raises:
        ConfigError: there is no such scenario, or another changes more than budgets, so that results would differ.
    """
    found = {}
    for variant, changes in variants.items():
        if ONCE not in changes:
            continue
        home = changes.pop(ONCE)
        key = f"variants.{variant}.{ONCE} = {home!r}"
        if home not in list(scenarios):  # whatever its type
            known = f"known: {', '.join(scenarios)}" if scenarios else "there are no scenarios"
            raise ConfigError(f"{key}{nearest(str(home), scenarios)}; {known}")
        for scenario, tables in scenarios.items():
            replaced = {**scenarios[home], **tables}.keys() - changes.keys() - {"devices"}
            here, there = {**raw, **scenarios[home]}, {**raw, **tables}
            differing = sorted(name for name in replaced if here.get(name) != there.get(name))
            if differing:
                raise ConfigError(
                    f"{key}: scenario {scenario!r} differs from it in {', '.join(differing)}, not in devices alone, so "
                    "that the variant has to run in both"
                )
        found[variant] = home
    return found


def _tables(raw: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    found = raw.pop(name, {})
    if not isinstance(found, Mapping) or not all(isinstance(table, Mapping) for table in found.values()):
        raise ConfigError(f"{name}: expected tables, as [{name}.NAME]")
    for key in found:
        if key in ("", ".", "..") or Path(key).name != key:
            raise ConfigError(f"{name}.{key!r}: expected a name that can be a folder's, without slashes")
    return {key: dict(table) for key, table in found.items()}
