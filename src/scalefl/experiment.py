"""What a config describes, assembled: data, clients, model and method."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from msgspec import structs
from torch import Tensor

from scalefl.blocks import blocks_by_count
from scalefl.caches import forget_models
from scalefl.config import Config
from scalefl.costs import step_cost
from scalefl.data import Dataset, FederatedData, Iid, Natural, PartitionedData, Partitioner, load, warn_of_scale
from scalefl.data.population import DeclaredPopulation, SimulatedPopulation
from scalefl.engines.gauge import device_of
from scalefl.engines.local import offered
from scalefl.engines.remote import RemoteEngine
from scalefl.engines.trial import Crew, by_trial, most_workers
from scalefl.engines.wire import check_sendable
from scalefl.errors import ConfigError, DataError, ScaleFLError, UncuttableModel
from scalefl.evaluate import (
    rows_by_distribution,
    stratified_rows,
)
from scalefl.lookup import beside, look_in
from scalefl.measure import usable_bytes
from scalefl.memory import Cost
from scalefl.memory_plan import MemoryPlan, memory_plan
from scalefl.models.spec import ModelSpec
from scalefl.objectives import TaskLoss
from scalefl.partition import Cut, partition
from scalefl.privacy import Mechanism
from scalefl.problem import Batch, Problem, num_rows, take
from scalefl.rehearsal import check_vocabulary, rehearse, with_coupling
from scalefl.rng import derive
from scalefl.sampling import UniformSampler, everybody, shuffled
from scalefl.steps import full_step
from scalefl.tracing import output_shape
from scalefl.tracking import check_installed
from scalefl.types import Method, Population, RoundPlan, ServerState, floor_of

_log = logging.getLogger("scalefl")

LOW_MEMORY_CLIENTS = 1000
"""So many clients, drawn at random, are asked at most for the label distribution of low-memory clients."""

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
        forget_models()
        self.config = config
        self._has_checked_clients = False
        if config.folder is not None:
            look_in(config.folder)
        check_installed(config.tracking)
        device_of(config.engine.device)
        self.method: Method = config.make_method()
        _log.info("loading the data: %s", config.data.source.name)
        loaded = _load_data(config)
        self.problem: Problem = loaded.problem
        _log.info("tracing the model: %s", config.model)
        self.model: ModelSpec = config.make_model(self.problem)
        shape = output_shape(self.model, self.problem)
        if len(shape) == 1 and shape[0] < self.problem.num_classes:
            raise ConfigError(
                f"model {self.model.name} has {shape[0]} outputs, the data {self.problem.num_classes} classes"
            )
        self.problem = self._with_coupling(loaded)
        self.remote = reach(self.problem) if reach else None
        _log.info("predicting what full training takes")
        self.data = self._data(loaded)
        self.population = self._population()
        for split in ("validation", "test"):
            if not num_rows(getattr(self.data, split)):
                raise DataError(f"the {split} data is empty: there is nothing to measure accuracy on")
        warn_of_scale(self.problem, self.data.validation)
        check_vocabulary(self.model, self.problem, self.data, of_clients=False)
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

    def check_clients(self) -> None:
        """Share the rows among the clients, and look at them.

        Raises:
            ConfigError, DataError: they can't be shared so, or are not what the problem and the model expect.
        """
        if self.remote is None and not self._has_checked_clients:
            self.data.examples(0)  # rows that are made when asked for are held against the problem then
            check_vocabulary(self.model, self.problem, self.data, of_clients=True)
            self._has_checked_clients = True

    def rehearse(self, state: ServerState) -> None:
        """Try what the first round will ask of clients, on a few examples; see `rehearsal`.

        Raises:
            ConfigError: it fails.
        """
        plan = self.planned(state)
        if plan is not None:
            rehearse(self.method, state, plan, self.data, device_of(self.config.engine.device))

    def _with_coupling(self, loaded: Dataset | FederatedData) -> Problem:
        examples = loaded.train if isinstance(loaded, Dataset) else loaded.validation
        found = with_coupling(self.model, self.problem, examples)
        if found is not self.problem:
            _log.warning("the loss compares the examples of a batch with each other: clients keep whole batches")
        return found

    def settle_engine(self) -> Crew | None:
        """Decide what the config leaves to "auto"; reduce workers that this machine has no room for, and warn of it.

        Returns:
            Who trains, where that is not simply what the config says.
        """
        settings = self.config.engine
        if self.remote is not None:
            return None
        if settings.clients_at_once == "auto" and (settings.threads != "auto" or settings.name != "local"):
            settings = replace(settings, clients_at_once=1)  # who settles threads wants the same bits everywhere
            self.config = replace(self.config, engine=settings)
        if settings.workers not in ("auto", 0) or settings.cap != "none":
            check_sendable(self.method, self.problem, self.model)
        if settings.threads != "auto" and settings.workers in (0, 1):
            return None
        _log.info("planning the first round")
        plan = self.planned(self.initial_state())
        most = most_workers(max(cost.peak_bytes for cost in plan.costs.values()) if plan else 0)
        found = self._found(plan, most)
        workers = found.workers if settings.workers == "auto" else settings.workers
        threads = found.threads if settings.threads == "auto" else settings.threads
        at_once = found.clients_at_once if settings.clients_at_once == "auto" else settings.clients_at_once
        crew = Crew(workers, threads, found.why, at_once)
        if workers > most:
            why = f"{workers} workers were asked for, and there is room for {most}"
            _log.warning("%s", why)
            crew = crew._replace(workers=most, why=why)
        engine = replace(settings, workers=crew.workers, threads=crew.threads, clients_at_once=at_once)
        if engine == settings:
            return None
        self.config = replace(self.config, engine=engine)
        return crew

    def _found(self, plan: RoundPlan | None, most: int) -> Crew:
        settings, most = self.config.engine, min(most, self.config.clients_per_round)
        if settings.cap != "none":
            return Crew(most, 1)
        if plan is None or settings.name != "local":
            return Crew(0, 1)
        if "auto" not in (settings.workers, settings.threads, settings.clients_at_once):
            return Crew(0, 1)
        device = device_of(settings.device)
        on_cpu = device.type == "cpu"
        state, stays_here = self.initial_state(), ""
        if settings.workers == "auto":
            try:
                check_sendable(self.method, self.problem, self.model)
            except ConfigError as error:
                settings, stays_here = replace(settings, workers=0), f"; {error}"
        _log.info("timing a task, to settle workers and threads")
        try:
            examples = self.data.examples(plan.longest_first()[0].client_id)
            crew = by_trial(
                self.method,
                state,
                plan,
                examples,
                rounds=self.config.rounds,
                most=most,
                workers=settings.workers if on_cpu or settings.workers != "auto" else 0,
                threads=settings.threads if on_cpu or settings.threads != "auto" else 1,
                clients_at_once=settings.clients_at_once,
                device=device,
            )
            return crew._replace(why=crew.why + stays_here)
        except Exception as error:  # the run meets it too, and records or tells it
            return Crew(0, 1, f"the trial failed with {type(error).__name__}")

    def planned(self, state: ServerState) -> RoundPlan | None:
        """The round after a state, in private runs with all that may take part; None where nobody can."""
        sample = everybody if self.privacy else UniformSampler(self.config.clients_per_round)
        try:
            plan = self.method.plan(state, sample(self.offered, floor_of(self.method, state, self.offered), state))
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
    def low_memory_test(self) -> Tensor | None:
        """Which test rows, drawn by the label distribution of the clients that cannot hold full training.

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
        return rows_by_distribution(labels, shares, derive(self.config.seed, "low memory"))

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
        count: int | None = 1
        groups = [0]
        if self.remote is None:  # else nobody is given what is not held out
            shares, count = config.data.partition, None if config.data.clients == "auto" else config.data.clients
            strengths = [member.strength for member in devices.resolve(self.full_cost.peak_bytes)]
            groups = [strengths[devices.class_of(i, config.seed)] for i in range(count or 0)]
        return PartitionedData.from_dataset(
            loaded, shares, count, groups=groups, validation_fraction=config.data.validation, seed=config.seed
        )

    def _population(self) -> SimulatedPopulation | DeclaredPopulation:
        if self.remote is not None:
            return self.remote.population()
        config = self.config
        return SimulatedPopulation(self.data, config.devices, self.full_cost.peak_bytes, config.seed)


def _load_data(config: Config) -> Dataset | FederatedData:
    by, source = config.data.partition, config.data.source
    name = source.name if ":" in source.name else beside(source.name, config.folder)
    try:
        return load(structs.replace(source, name=name), natural_ids=by.column if isinstance(by, Natural) else None)
    except DataError as error:
        is_missing = str(error).startswith(("no folder", "cannot read")) and not Path(name).exists()
        if not is_missing or config.folder is None or Path(config.folder) == Path.cwd() or Path(name).is_absolute():
            raise
        raise DataError(f"{error}; nor is it beside the config, in {config.folder}") from error
