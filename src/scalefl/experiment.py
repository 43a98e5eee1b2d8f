"""A run from its config into a folder: assembled, driven round by round, saved, resumed and summed up."""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch

from scalefl.blocks import blocks_by_count
from scalefl.checkpoint import load_state, save_state, write_whole
from scalefl.client import Residents
from scalefl.config import Config, make_config, to_plain
from scalefl.costs import step_cost
from scalefl.data import Dataset, FederatedData, Iid, Natural, PartitionedData, Partitioner, load
from scalefl.data.population import DeclaredPopulation, SimulatedPopulation
from scalefl.engines.gauge import device_of
from scalefl.engines.local import LocalEngine, offered
from scalefl.engines.remote import RemoteEngine
from scalefl.engines.trial import Crew, by_trial, described, most_workers
from scalefl.errors import BudgetError, CheckpointError, ConfigError, DataError, ScaleFLError, UncuttableModel
from scalefl.evaluate import (
    accuracy_of_labels,
    accuracy_over_clients,
    evaluate,
    nhsic_plane,
    rows_by_distribution,
    stratified_rows,
)
from scalefl.loop import federate
from scalefl.measure import base_bytes, usable_bytes
from scalefl.memory import Cost
from scalefl.memory_plan import MemoryPlan, memory_plan
from scalefl.models.spec import ModelSpec
from scalefl.objectives import TaskLoss
from scalefl.params import Params, without_attachments
from scalefl.partition import Cut, partition
from scalefl.planner import budget_error, fit, least_of
from scalefl.privacy import Mechanism, check_private
from scalefl.problem import Batch, Problem, num_rows, take
from scalefl.record import PrivateRecord, RoundRecord
from scalefl.rng import derive
from scalefl.run_folder import FORMAT, VERSION, RunFolder, read_json
from scalefl.sampling import UniformSampler, everybody, shuffled
from scalefl.steps import full_step
from scalefl.tracing import num_outputs
from scalefl.tracking import Tracking, check_installed
from scalefl.types import UNTOLD, ClientInfo, Collects, Engine, Method, Population, RoundPlan, ServerState
from scalefl.units import mib

_log = logging.getLogger("scalefl")

LOW_MEMORY_CLIENTS = 1000
"""So many clients, drawn at random, are asked at most for the label distribution of low-memory clients."""
ASKED_CLIENTS = 1000
"""Of so many clients, drawn at random, the accuracies are compared."""

Reach = Callable[[Problem], RemoteEngine]
"""Gives the engine of clients that exist elsewhere, once it is known what is learned."""


class Experiment:
    """What a config describes, assembled: data, clients, model and method.

    Args:
        config: what to run.
        reach: gives the engine whose clients exist elsewhere; then the config's data is the server's own, of which
            only validation and test rows are used, and its devices are nobody's. None: clients are simulated.
    """

    def __init__(self, config: Config, reach: Reach | None = None) -> None:
        self.config = config
        check_installed(config.tracking)
        self.method: Method = config.make_method()
        loaded = _load_data(config)
        self.problem: Problem = loaded.problem
        self.model: ModelSpec = config.make_model(self.problem)
        outputs = num_outputs(self.model, self.problem)
        if outputs < self.problem.num_classes:
            raise ConfigError(
                f"model {self.model.name} has {outputs} outputs, the data {self.problem.num_classes} classes"
            )
        self.remote = reach(self.problem) if reach else None
        self.data = self._data(loaded)
        self.population = self._population()
        for split in ("validation", "test"):
            if not num_rows(getattr(self.data, split)):
                raise DataError(f"the {split} data is empty: there is nothing to measure accuracy on")
        self.privacy: Mechanism | None = None
        if config.privacy is not None:
            self.privacy = config.privacy.for_clients(len(self.population), config.clients_per_round)

    @property
    def offered(self) -> Population:
        """The clients as the engine shows them to methods."""
        if self.remote is not None:
            return self.population
        return offered(self.population, self.config.engine.cap)

    @cached_property
    def full_cost(self) -> Cost:
        """Full training of the configured model on whole batches: what fractions of budgets refer to."""
        step = full_step(self.model, self.problem, self.config.work.at_round(0))
        return step_cost(step, self.problem, TaskLoss())

    def initial_state(self, smallest_memory_bytes: int | None = None) -> ServerState:
        """The state before the first round, for a smallest client of so much memory: by default the smallest now."""
        smallest = self.offered.smallest_memory_bytes if smallest_memory_bytes is None else smallest_memory_bytes
        return self.method.init(self.model, self.problem, seed=self.config.seed, smallest_memory_bytes=smallest)

    def settle_engine(self) -> Crew | None:
        """Decide what the config leaves to "auto", and reduce workers that this machine has no room for.

        Returns:
            Who trains, where that is not simply what the config says.
        """
        settings = self.config.engine
        if self.remote is not None or (settings.threads != "auto" and settings.workers in (0, 1)):
            return None
        plan = self.planned(self.initial_state())
        most = most_workers(max(cost.peak_bytes for cost in plan.costs.values()) if plan else 0)
        found = self._found(plan, most)
        workers = found.workers if settings.workers == "auto" else settings.workers
        threads = found.threads if settings.threads == "auto" else settings.threads
        crew = Crew(workers, threads, found.why)
        if workers > most:
            crew = Crew(most, threads, f"{workers} workers were asked for, and there is room for {most}")
        engine = replace(settings, workers=crew.workers, threads=crew.threads)
        if engine == settings:
            return None
        self.config = replace(self.config, engine=engine)
        return crew

    def _found(self, plan: RoundPlan | None, most: int) -> Crew:
        settings, most = self.config.engine, min(most, self.config.clients_per_round)
        if settings.cap != "none":
            return Crew(most, 1)
        if plan is None or settings.name != "local" or settings.device != "cpu":
            return Crew(0, 1)
        state = self.initial_state()
        try:
            examples = self.data.examples(plan.longest_first()[0].client_id)
            return by_trial(
                self.method,
                state,
                plan,
                examples,
                rounds=self.config.rounds,
                most=most,
                workers=settings.workers,
                threads=settings.threads,
            )
        except Exception as error:  # the run meets it too, and records or tells it
            return Crew(0, 1, f"the trial failed with {type(error).__name__}")

    def planned(self, state: ServerState) -> RoundPlan | None:
        """The round after a state, in private runs with all that may take part; None where nobody can."""
        sample = everybody if self.privacy else UniformSampler(self.config.clients_per_round)
        try:
            plan = self.method.plan(state, sample(self.offered, self.method.floor_bytes(state), state))
        except ScaleFLError:  # so it is in the run, which tells it
            return None
        return plan if plan.tasks else None

    def plan(self, state: ServerState | None = None) -> MemoryPlan:
        """The memory plan; its budgets are what may be planned with."""
        capped = self.config.engine.cap == "hard" and self.remote is None
        budgets = {
            member.name: usable_bytes(member.memory_bytes) if capped else member.memory_bytes
            for member in self.population.classes
        }
        return memory_plan(self.method, state or self.initial_state(), budgets)

    def num_clients(self, seen: set[int]) -> int:
        """How many clients there are; where they exist elsewhere, those of the start and those `seen` since."""
        if isinstance(self.population, DeclaredPopulation):
            return len(seen | {client.id for client in self.population.clients})
        return len(self.population)

    @property
    def mean_budget(self) -> float:
        """The clients' mean budget as a share of what full training takes; more than that counts as that."""
        classes, full_bytes = self.population.classes, self.full_cost.peak_bytes
        held = sum(member.share * min(member.memory_bytes / full_bytes, 1.0) for member in classes)
        return held / sum(member.share for member in classes)

    @cached_property
    def probe(self) -> Batch:
        """The fixed, stratified validation samples of the nHSIC plane."""
        labels = self.problem.labels(self.data.validation)
        rows = stratified_rows(labels, self.config.evaluation.plane_samples, derive(self.config.seed, "probe"))
        return take(self.data.validation, rows)

    @cached_property
    def low_memory_test(self) -> Batch | None:
        """Test rows drawn by the label distribution of the clients that cannot hold full training.

        The same rows for every method: they depend on data, devices and seed only. Where all clients hold full
        training, those of the weakest class are meant. None where clients exist elsewhere: they keep their labels.
        """
        if isinstance(self.population, DeclaredPopulation):
            return None
        smallest = self.population.smallest_memory_bytes
        limit = max(self.full_cost.peak_bytes, smallest + 1)
        counts = torch.zeros(self.problem.num_classes, dtype=torch.int64)
        order = shuffled(len(self.population), derive(self.config.seed, "low-memory clients"))
        low = (i for i in order if self.population.device(i).memory_bytes < limit)
        for _, client in zip(range(LOW_MEMORY_CLIENTS), low, strict=False):
            counts += self.data.label_counts(client)
        labels = self.problem.labels(self.data.test)
        shares = counts.double() / counts.sum().clamp(min=1)
        return take(self.data.test, rows_by_distribution(labels, shares, derive(self.config.seed, "low memory")))

    def plane_cuts(self, model: ModelSpec) -> tuple[tuple[Cut, ...], str | None]:
        """Where the nHSIC plane is read, and the module that stands for the input.

        Nowhere, where a model can't be cut: methods that train it whole run all the same.
        """
        wanted = self.config.evaluation.plane_cuts
        if isinstance(wanted, tuple):
            found = partition(model, self.problem, wanted)
            return found.cuts, found.source
        try:
            found = partition(model, self.problem)
        except UncuttableModel:
            return (), None
        blocks = blocks_by_count(model, self.problem, min(wanted, found.num_units))
        cuts = [blocks.cut(block) for block in range(len(blocks) - 1)]
        return tuple(cut for cut in cuts if cut), found.source

    def _data(self, loaded: Dataset | FederatedData) -> FederatedData:
        if isinstance(loaded, FederatedData):
            return loaded
        config, devices = self.config, self.config.devices
        shares: Partitioner = Iid()
        count, groups = 1, [0]
        if self.remote is None:  # else nobody is given what is not held out
            shares, count = config.data.partition, config.data.clients
            strengths = [member.strength for member in devices.resolve(self.full_cost.peak_bytes)]
            groups = [strengths[devices.class_of(i, config.seed)] for i in range(count)]
        return PartitionedData.from_dataset(
            loaded, shares, count, groups=groups, validation_fraction=config.data.validation, seed=config.seed
        )

    def _population(self) -> SimulatedPopulation | DeclaredPopulation:
        if self.remote is not None:
            return self.remote.population()
        config = self.config
        return SimulatedPopulation(self.data, config.devices, self.full_cost.peak_bytes, config.seed)


@dataclass(frozen=True)
class RunProgress:
    """A round that is done: its journal line, and how many there are in all."""

    line: Mapping[str, Any]
    rounds: int


def run(config: Config, folder: str | Path, *, resume: bool = False) -> dict[str, Any]:
    """Run a config into a folder and return its summary; see `run_rounds`."""
    folder = Path(folder)
    for _ in run_rounds(Experiment(config), folder, resume=resume):
        pass
    return read_json(RunFolder(folder).summary)


def run_rounds(experiment: Experiment, folder: Path, *, resume: bool = False) -> Generator[RunProgress]:
    """Run round by round, yielding after each. Whatever stops it, what was saved last is whole and can be resumed.

    Args:
        experiment: what to run.
        folder: where to; a new or empty one unless `resume`.
        resume: go on from the last saved state, in the folder of a run of the same config.

    Raises:
        ConfigError: the folder holds another run; or this machine lacks the device, or can't cap memory.
        CheckpointError: the folder cannot be resumed from or written to.
    """
    files = RunFolder(folder)
    with files.locked():
        yield from _rounds(experiment, files, resume=resume)


def _rounds(experiment: Experiment, files: RunFolder, *, resume: bool) -> Generator[RunProgress]:
    config = experiment.config
    device_of(config.engine.device)  # refused before anything is written
    again = resume and files.config.exists()
    state = _resumed(experiment, files) if again else _started(experiment, files, resume=resume)
    if crew := experiment.settle_engine():  # resumed where there is less room
        _log.warning("%s", described(crew))
    with (
        Tracking(config.tracking, files) as tracking,
        engine_of(experiment) as engine,
        _Keeper(experiment, files, tracking) as keeper,
    ):
        if state.round == 0 and not files.state.exists():
            keeper.keep(state, {"round": 0})
        rounds = rounds_after(state, experiment, engine, _privacy(experiment, files))
        while state.round < config.rounds:
            state, record = next(rounds)
            yield from keeper.keep(state, asdict(record))
        yield from keeper.kept()
        if not files.summary.exists():
            _write_json(files.summary, keeper.observer.conclude(state, files.read_journal()))


class _Keeper:
    """Measures the state after each round and writes both down; while the next round is under way, if workers do that.

    A context manager: what it was given is kept at the end, whatever has ended the rounds.
    """

    def __init__(self, experiment: Experiment, files: RunFolder, tracking: Tracking) -> None:
        self._experiment, self._files, self._tracking = experiment, files, tracking
        engine = experiment.config.engine
        self.observer = _Observer(experiment, Residents(device_of(engine.device)))
        self._beside = None
        if experiment.remote is None and engine.name == "local" and engine.workers:
            assert engine.threads != "auto"
            threads = engine.threads  # as everywhere: bits depend on their number
            self._beside = ThreadPoolExecutor(1, initializer=lambda: torch.set_num_threads(threads))
        self._pending: list[Future[RunProgress]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._beside is not None:
            self._beside.shutdown()

    def keep(self, state: ServerState, record: Mapping[str, Any]) -> list[RunProgress]:
        """Keep the state after a round; returns the rounds that have been kept by now, and were not returned before."""
        before = self.kept()
        # In this thread, where rounds are planned too: models are made with the global generators.
        params = self._experiment.method.deploy(state)
        look = self.observer.look(state, params)

        def write() -> RunProgress:
            return self._write(state, params, {**record, **look()})

        if self._beside is None:
            return [progress for progress in (*before, write()) if progress.line["round"]]
        self._pending.append(self._beside.submit(write))
        return before

    def kept(self) -> list[RunProgress]:
        """All rounds that were not returned before.

        Raises:
            CheckpointError: one could not be written.
        """
        pending, self._pending = self._pending, []
        return [progress for future in pending if (progress := future.result()).line["round"]]

    def _write(self, state: ServerState, deployed: tuple[ModelSpec, Params], line: Mapping[str, Any]) -> RunProgress:
        config = self._experiment.config
        _append(self._files.journal, line)
        if state.round % config.save_every == 0 or state.round == config.rounds:
            save_state(self._files.state, state, deployed)
        self._tracking.add(line)
        return RunProgress(line, config.rounds)


def _privacy(experiment: Experiment, files: RunFolder) -> Mechanism | None:
    """With a rate by the number of clients when the run began: ε is of one rate, whoever has come and gone since."""
    settings, begun = experiment.config.privacy, experiment.privacy
    if settings is None or not files.clients.exists():
        return begun
    return settings.for_clients(len(read_json(files.clients)["clients"]), experiment.config.clients_per_round)


def rounds_after(
    state: ServerState, experiment: Experiment, engine: Engine, privacy: Mechanism | None
) -> Iterator[tuple[ServerState, RoundRecord | PrivateRecord]]:
    """The rounds of a run from a state on, for as long as the caller keeps asking; see `federate`."""
    config = experiment.config
    return federate(
        experiment.method,
        engine,
        everybody if experiment.privacy else UniformSampler(config.clients_per_round),
        state,
        is_looked_at=lambda round: any(
            is_due(round, every, config.rounds) for every in (config.evaluation.every, config.evaluation.plane_every)
        ),
        privacy=privacy,
    )


def is_due(round: int, every: int, rounds: int) -> bool:
    """Whether what is measured at both ends of a run, and every so many rounds if not 0, is so after this one."""
    return round in (0, rounds) or (every > 0 and round % every == 0)


def engine_of(experiment: Experiment) -> AbstractContextManager[Engine]:
    """Where the clients of a run live, once `settle_engine` has decided who trains.

    Raises:
        ConfigError: the engine needs a package that is not installed; or this machine lacks the device.
    """
    if experiment.remote is not None:
        return nullcontext(experiment.remote)
    settings = experiment.config.engine
    assert settings.workers != "auto" and settings.threads != "auto"
    local = LocalEngine(
        experiment.data,
        experiment.population,
        workers=settings.workers,
        threads=settings.threads,
        cap=settings.cap,
        device=settings.device,
    )
    if settings.name == "local":
        return local
    try:
        from scalefl.engines.flower.grid import in_process
    except ModuleNotFoundError as error:
        raise ConfigError(f'engine = "flower" needs Flower ({error}): pip install "scalefl[flower]"') from error
    return in_process(
        local,
        experiment.problem,
        patience=settings.patience,
        precision=settings.precision,
        is_private=experiment.privacy is not None,
    )


def read_config(folder: Path) -> Config:
    """The resolved config of a run.

    Raises:
        CheckpointError: there is no run in the folder, or it is of a newer format.
        ConfigError: this version does not know one of its settings.
    """
    files = RunFolder(folder)
    try:
        return make_config(files.read_settings())
    except ConfigError as error:
        raise ConfigError(f"{files.config}: {error}") from error


def check_same(config: Config, files: RunFolder) -> None:
    """Refuse to take the run in a folder for one of `config`.

    Raises:
        ConfigError: it names the settings that differ.
        CheckpointError: there is no run in the folder, or it is of a newer format.
    """
    saved, asked = to_plain(read_config(files.path)), to_plain(config)
    for content in (saved, asked):  # what the result does not depend on
        del content["save_every"], content["tracking"], content["engine"]["workers"], content["engine"]["patience"]
    if asked["engine"]["threads"] == "auto":  # whatever it was found to be
        asked["engine"]["threads"] = saved["engine"]["threads"]
    differing = [key for key in asked if asked[key] != saved[key]]
    if differing:
        raise ConfigError(f"{files.path} holds a run whose {', '.join(differing)} differ: resume with its own config")


class _Observer:
    """What is measured beside training."""

    def __init__(self, experiment: Experiment, residents: Residents) -> None:
        self._experiment, self._residents = experiment, residents
        self._evaluation = experiment.config.evaluation

    def look(self, state: ServerState, deployed: tuple[ModelSpec, Params]) -> Callable[[], dict[str, Any]]:
        """What gives validation metrics and the nHSIC plane, where this round is due for them; in any thread."""
        is_measured = self._is_due(state.round, self._evaluation.every)
        is_drawn = self._is_due(state.round, self._evaluation.plane_every)
        model, params = deployed
        # Made now: the rest draws no number and makes no model. The plane is of the model that is trained, by whose
        # names cuts go: what is deployed may be made around it.
        for each in {model, state.model} if is_drawn else {model}:
            self._residents.make(each)
        cuts = self._experiment.plane_cuts(state.model) if is_drawn else ((), None)

        def found() -> dict[str, Any]:
            seen: dict[str, Any] = {}
            if is_measured:
                seen["validation"] = self._measure(model, params, self._experiment.data.validation)
            if is_drawn:
                seen["plane"] = self._plane(state.model, without_attachments(state.params), *cuts)
            return seen

        return found

    def _is_due(self, round: int, every: int) -> bool:
        return is_due(round, every, self._experiment.config.rounds)

    def conclude(self, state: ServerState, journal: list[dict[str, Any]]) -> dict[str, Any]:
        """The final figures: test data is touched here and nowhere else."""
        experiment = self._experiment
        model, params = experiment.method.deploy(state)
        rounds = [line for line in journal if line["round"] > 0]
        figures = {
            "name": experiment.config.name,
            "rounds": state.round,
            "test": self._measure(model, params, experiment.data.test),
            "validation": journal[-1]["validation"],
            "full_training_peak_bytes": experiment.full_cost.peak_bytes,
            "mean_budget": experiment.mean_budget,
            "predicted_peak_bytes": max(line["predicted_peak_bytes"] for line in rounds),
        }
        if experiment.privacy is not None:  # the rest takes clients' labels, or who took part
            return {**figures, "num_clients": experiment.num_clients(set()), "privacy": rounds[-1]["privacy"]}
        measured = [peak for line in rounds if (peak := line["measured_peak_bytes"]) is not None]
        clients = {i for line in rounds for ids in line["rungs"].values() for i in ids}
        low = experiment.low_memory_test
        return {
            **figures,
            "low_memory_test": None if low is None else self._measure(model, params, low),
            "client_test": self._over_clients(model, params),
            "measured_peak_bytes": max(measured, default=None),
            "num_clients": experiment.num_clients(clients),
            "num_clients_seen": len(clients),
            "num_clients_lost": sum(len(line["lost"]) for line in rounds),
            **{k: sum(line[k] for line in rounds) for k in ("flops", "bytes_down", "bytes_up", "simulated_seconds")},
            "seconds": sum(line["seconds"] for line in rounds),
        }

    def _over_clients(self, model: ModelSpec, params: Params) -> dict[str, float] | None:
        experiment, data = self._experiment, self._experiment.data
        if experiment.remote is not None:  # clients elsewhere keep their labels
            return None
        order = shuffled(len(experiment.population), derive(experiment.config.seed, "asked clients"))
        counts = [data.label_counts(client) for _, client in zip(range(ASKED_CLIENTS), order, strict=False)]
        of_label = accuracy_of_labels(self._residents, model, params, experiment.problem, data.test)
        return accuracy_over_clients(of_label, torch.stack(counts))

    def _measure(self, model: ModelSpec, params: Params, examples: Batch) -> dict[str, float]:
        return evaluate(self._residents, model, params, self._experiment.problem, examples)

    def _plane(
        self, model: ModelSpec, params: Params, cuts: tuple[Cut, ...], source: str | None
    ) -> list[dict[str, Any]]:
        experiment = self._experiment
        if not cuts:
            return []
        seed = derive(experiment.config.seed, "plane")
        return nhsic_plane(
            self._residents, model, params, experiment.problem, experiment.probe, cuts, source, seed=seed
        )


def _load_data(config: Config) -> Dataset | FederatedData:
    by = config.data.partition
    return load(config.data.source, natural_ids=by.column if isinstance(by, Natural) else None)


def _started(experiment: Experiment, files: RunFolder, *, resume: bool) -> ServerState:
    others = [entry for entry in files.path.iterdir() if entry != files.lock]
    if others and not (resume and files.only_begun()):
        raise ConfigError(
            f"{files.path} is not empty: resume the run in it (--resume), remove it (--overwrite), "
            "or give this one another name (--set name=...)"
        )
    state = first_state(experiment)
    experiment.settle_engine()
    if isinstance(experiment.population, DeclaredPopulation):
        _write_json(files.clients, {"clients": [_declared(client) for client in experiment.population.clients]})
    _write_json(files.plan, experiment.plan(state).to_json())
    _write_json(files.environment, environment())
    # Last: a folder with a config in it can be resumed.
    content = {"format": FORMAT, "version": VERSION, "config": to_plain(experiment.config)}
    _write_json(files.config, content)
    return state


def first_state(experiment: Experiment) -> ServerState:
    """The state before the first round of a run that can be done.

    Raises:
        BudgetError: no client could ever train some part of the model.
        ConfigError: the method needs more of clients than a private run lets them tell.
    """
    state = experiment.initial_state()
    _check_budgets(experiment, state)
    if experiment.privacy is not None:
        check_private(experiment.method, state)
    return state


def _check_budgets(experiment: Experiment, state: ServerState) -> None:
    """Refuse a run in which no client could ever train some part of the model.

    Raises:
        BudgetError: says what the cheapest way to train that part needs, by term, and the largest budget on offer.
    """
    if experiment.method.floor_bytes(state) == 0:
        return  # a reference that ignores memory
    largest = experiment.offered.largest_memory_bytes
    menu = sorted(experiment.method.menu(state), key=lambda offer: offer.fallback)
    trained: frozenset[str] = frozenset()
    for offer in menu:
        if not offer.trained <= trained and fit(offer, state.problem, experiment.method.objective, largest):
            trained |= offer.trained
    objective = experiment.method.objective
    lacking = tuple(offer for offer in menu if not offer.trained <= trained)
    lacking += tuple(o for o in menu if o.is_stage and not fit(o, state.problem, objective, largest))
    if lacking:
        floor = least_of(lacking, state.problem, objective)
        what = f"{floor.rung} of {state.model.name}"
        budget = experiment.population.largest_memory_bytes
        raise budget_error(what, floor, state.problem, objective(floor.step), budget, budget - largest)
    needed = method.collection_floor_bytes(state) if isinstance(method := experiment.method, Collects) else None
    if needed is not None and needed > largest:
        raise BudgetError(
            f"collecting the norms' statistics of {state.model.name} needs {mib(needed)} MiB; the largest budget on "
            f'offer is {mib(largest)} MiB. method.statistics = "running" does without, and so do norms that have none'
        )


def _resumed(experiment: Experiment, files: RunFolder) -> ServerState:
    check_same(experiment.config, files)
    saved, engine = read_config(files.path).engine, experiment.config.engine
    threads = saved.threads if engine.threads == "auto" else engine.threads
    workers = saved.workers if engine.workers == "auto" else engine.workers
    experiment.config = replace(experiment.config, engine=replace(engine, workers=workers, threads=threads))
    if not files.state.exists():  # it was killed before its first save
        files.journal.unlink(missing_ok=True)
        return experiment.initial_state(_smallest_at_start(files))
    state = _loaded(experiment, files)
    kept = [line for line in files.read_journal() if line["round"] <= state.round]  # later rounds are done again
    if [line["round"] for line in kept] != list(range(state.round + 1)):
        raise CheckpointError(f"{files.journal} is damaged: it lacks rounds that {files.state.name} has")
    if experiment.privacy is not None and experiment.privacy.privacy.seed is None:
        state = _with_releases(experiment, files, state, len(kept))
    write_whole(files.journal, "".join(json.dumps(line) + "\n" for line in kept).encode())
    return state


def _with_releases(experiment: Experiment, files: RunFolder, state: ServerState, num_kept: int) -> ServerState:
    """The state, saved anew, with the rounds counted that will be done again: with other noise, so both tell something.

    Half a line is one too. The state is saved before the journal forgets them: a kill in between counts them twice.
    """
    again = len(files.journal.read_text(errors="replace").splitlines()) - num_kept
    if again:
        state = replace(state, releases=state.releases + again)
        save_state(files.state, state, experiment.method.deploy(state))
    return state


def _loaded(experiment: Experiment, files: RunFolder) -> ServerState:
    """The saved state, with the model that the method trains, which may not be the configured one.

    Raises:
        CheckpointError: the state is not of this run.
    """
    start = experiment.initial_state(_smallest_at_start(files))
    state = load_state(files.state, start.model, experiment.problem)
    shapes = [{name: (t.shape, t.dtype) for name, t in s.params.items()} for s in (start, state)]
    if shapes[0] != shapes[1] or state.seed != start.seed or state.aux.values.keys() != start.aux.values.keys():
        raise CheckpointError(
            f"{files.state} belongs to another run: its tensors, seed or history are not this config's"
        )
    return state


def _declared(client: ClientInfo) -> dict[str, Any]:
    return {
        "client": client.id,
        "name": client.device,
        "num_examples": None if client.num_examples == UNTOLD else client.num_examples,
        "memory_bytes": client.memory_bytes,
    }


def _smallest_at_start(files: RunFolder) -> int | None:
    """By which the model was cut: clients may have come and gone since."""
    if not files.clients.exists():
        return None
    return min(int(client["memory_bytes"]) for client in read_json(files.clients)["clients"])


def _append(path: Path, line: Mapping[str, Any]) -> None:
    try:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}; what was saved before is intact") from error


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())


def environment() -> dict[str, Any]:
    """Versions and machine, for the record; with the base on top of which predicted peaks come."""
    packages = ("scalefl", "torch", "numpy", "datasets", "flwr-datasets", "safetensors", "msgspec")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "packages": {name: version(name) for name in packages},
        "torch_cpu": torch.backends.cpu.get_cpu_capability(),
        "base_bytes": base_bytes(),
    }
