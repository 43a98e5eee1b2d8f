"""A run from its experiment into a folder: driven round by round, saved, and resumed."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from scalefl.bookkeeping import Keeper, RunProgress, environment, is_due, write_json
from scalefl.checkpoint import load_state, save_state, write_whole
from scalefl.config import Config, make_config, to_plain
from scalefl.data.population import DeclaredPopulation
from scalefl.engines.gauge import device_of
from scalefl.engines.local import LocalEngine
from scalefl.engines.trial import described
from scalefl.errors import BudgetError, CheckpointError, ConfigError
from scalefl.experiment import Experiment
from scalefl.lookup import remembered
from scalefl.loop import federate
from scalefl.planner import budget_error, fit, least_of
from scalefl.privacy import Mechanism, check_private
from scalefl.record import PrivateRecord, RoundRecord
from scalefl.run_folder import FORMAT, VERSION, RunFolder, read_json, to_json
from scalefl.sampling import UniformSampler, everybody
from scalefl.tracking import Tracking
from scalefl.types import UNTOLD, ClientInfo, Collects, Engine, ServerState, floor_of
from scalefl.units import mib

_log = logging.getLogger("scalefl")


def run(config: Config, folder: str | Path, *, resume: bool = False) -> dict[str, Any]:
    """Run a config into a folder and return its summary; see `run_rounds`."""
    folder = Path(folder)
    check_folder(config, folder, resume=resume)
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


def check_folder(config: Config, folder: Path, *, resume: bool) -> None:
    """Refuse at once, before data is read and anything planned, a folder into which the config can't be run.

    Raises:
        ConfigError: the folder holds another run, or something else.
        CheckpointError: the folder cannot be resumed from.
    """
    files = RunFolder(folder)
    files.check_free(resume=resume)
    if resume and files.config.exists():
        check_same(config, files)


def _rounds(experiment: Experiment, files: RunFolder, *, resume: bool) -> Generator[RunProgress]:
    config = experiment.config
    device_of(config.engine.device)  # refused before anything is written
    experiment.check_clients()
    again = resume and files.config.exists()
    state = _resumed(experiment, files) if again else _started(experiment, files, resume=resume)
    if again:
        experiment.settle_engine()  # there may be less room here
    with (
        Tracking(config.tracking, files) as tracking,
        engine_of(experiment) as engine,
        Keeper(experiment, files, tracking) as keeper,
    ):
        if state.round == 0 and not files.state.exists():
            keeper.keep(state, {"round": 0})
        rounds = rounds_after(state, experiment, engine, _privacy(experiment, files))
        while state.round < config.rounds:
            state, record = next(rounds)
            yield from keeper.keep(state, asdict(record))
        yield from keeper.kept()
        if not files.summary.exists():
            write_json(files.summary, keeper.observer.conclude(state, files.read_journal()))


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


def engine_of(experiment: Experiment) -> AbstractContextManager[Engine]:
    """Where the clients of a run live, once `settle_engine` has decided who trains.

    Raises:
        ConfigError: the engine needs a package that is not installed; or this machine lacks the device.
    """
    if experiment.remote is not None:
        return nullcontext(experiment.remote)
    settings = experiment.config.engine
    assert settings.workers != "auto" and settings.threads != "auto" and settings.clients_at_once != "auto"
    local = LocalEngine(
        experiment.data,
        experiment.population,
        workers=settings.workers,
        threads=settings.threads,
        cap=settings.cap,
        device=settings.device,
        clients_at_once=settings.clients_at_once,
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
    for key in ("threads", "clients_at_once"):
        if asked["engine"][key] == "auto":  # whatever it was found to be
            asked["engine"][key] = saved["engine"][key]
    differing = [key for key in asked if asked[key] != saved[key]]
    if differing:
        raise ConfigError(f"{files.path} holds a run whose {', '.join(differing)} differ: resume with its own config")


def _started(experiment: Experiment, files: RunFolder, *, resume: bool) -> ServerState:
    files.check_free(resume=resume)
    state = first_state(experiment)
    experiment.rehearse(state)
    if crew := experiment.settle_engine():
        _log.info("engine: %s", described(crew))
    if isinstance(experiment.population, DeclaredPopulation):
        write_json(files.clients, {"clients": [_declared(client) for client in experiment.population.clients]})
    _log.info("predicting what each part needs")
    write_json(files.plan, experiment.plan(state).to_json())
    _log.info("measuring what a worker holds before it trains")
    write_json(files.environment, environment())
    _log.info("the first round")
    # Last: a folder with a config in it can be resumed.
    config = experiment.config
    places = remembered(files.path, config.folder, Path.cwd())
    content = {"format": FORMAT, "version": VERSION, "places": places, "config": to_plain(config)}
    write_json(files.config, content)
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
    if floor_of(experiment.method, state, experiment.offered) == 0:
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
    at_once = saved.clients_at_once if engine.clients_at_once == "auto" else engine.clients_at_once
    engine = replace(engine, workers=workers, threads=threads, clients_at_once=at_once)
    experiment.config = replace(experiment.config, engine=engine)
    if not files.state.exists():  # it was killed before its first save
        files.journal.unlink(missing_ok=True)
        return experiment.initial_state(_smallest_at_start(files))
    state = _loaded(experiment, files)
    kept = [line for line in files.read_journal() if line["round"] <= state.round]  # later rounds are done again
    if [line["round"] for line in kept] != list(range(state.round + 1)):
        raise CheckpointError(f"{files.journal} is damaged: it lacks rounds that {files.state.name} has")
    if experiment.privacy is not None and experiment.privacy.privacy.seed is None:
        state = _with_releases(experiment, files, state, len(kept))
    write_whole(files.journal, "".join(to_json(line) + "\n" for line in kept).encode())
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
