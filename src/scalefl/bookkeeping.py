"""What is measured after a round and at the end of a run, and written down."""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch

from scalefl.checkpoint import save_state, write_whole
from scalefl.client import Residents
from scalefl.disk_cache import kept
from scalefl.effects import effects
from scalefl.engines.gauge import device_of
from scalefl.errors import CheckpointError
from scalefl.evaluate import accuracy_over_clients, evaluate, evaluate_groups, nhsic_plane
from scalefl.experiment import Experiment
from scalefl.measure import warm_worker_bytes
from scalefl.models.spec import ModelSpec
from scalefl.params import Params, without_attachments
from scalefl.partition import Cut
from scalefl.problem import num_rows
from scalefl.rng import derive
from scalefl.run_folder import RunFolder, to_json, with_nulls
from scalefl.sampling import shuffled
from scalefl.tracking import Tracking
from scalefl.types import ServerState

ASKED_CLIENTS = 1000
"""Of so many clients, drawn at random, the accuracies are compared."""


@dataclass(frozen=True)
class RunProgress:
    """A round that is done.

    Attributes:
        line: of the journal.
        rounds: how many there are in all.
        epochs: for which a client trains on its examples.
    """

    line: Mapping[str, Any]
    rounds: int
    epochs: int

    @property
    def samples(self) -> int:
        """Examples that clients trained on, in each epoch; none where they don't tell."""
        return self.epochs * int(self.line.get("num_examples", 0))


class Keeper:
    """Measures the state after each round and writes both down; while the next round is under way, if others do that.

    A context manager: what it was given is kept at the end, whatever has ended the rounds.
    """

    def __init__(self, experiment: Experiment, files: RunFolder, tracking: Tracking) -> None:
        self._experiment, self._files, self._tracking = experiment, files, tracking
        engine = experiment.config.engine
        self.observer = Observer(experiment, Residents(device_of(engine.device)))
        self._beside = None
        if experiment.remote is not None or (engine.name == "local" and engine.workers):
            threads = torch.get_num_threads()  # as in this thread: bits depend on their number
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
        line = with_nulls(line)  # copies get what the journal gets
        append(self._files.journal, line)
        if state.round % config.save_every == 0 or state.round == config.rounds:
            save_state(self._files.state, state, deployed)
        self._tracking.add(line)
        return RunProgress(line, config.rounds, config.work.epochs)


class _Tested(NamedTuple):
    """Metrics of all test data, of that with low-memory clients' labels, and how accuracy differs between clients."""

    all: dict[str, float]
    low_memory: dict[str, float] | None
    over_clients: dict[str, float] | None


class Observer:
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
            effects(each, self._experiment.problem)
        cuts = self._experiment.plane_cuts(state.model) if is_drawn else ((), None)

        def found() -> dict[str, Any]:
            seen: dict[str, Any] = {}
            if is_measured:
                data = self._experiment.data.validation
                seen["validation"] = evaluate(self._residents, model, params, self._experiment.problem, data)
            if is_drawn:
                seen["plane"] = self._plane(state.model, without_attachments(state.params), *cuts)
            return seen

        return found

    def _is_due(self, round: int, every: int) -> bool:
        return is_due(round, every, self._experiment.config.rounds)

    def conclude(self, state: ServerState, journal: list[dict[str, Any]]) -> dict[str, Any]:
        """The final figures: test data is touched here and nowhere else, and run through the model once."""
        experiment = self._experiment
        rounds = [line for line in journal if line["round"] > 0]
        tested = self._tested(*experiment.method.deploy(state))
        figures = {
            "name": experiment.config.name,
            "rounds": state.round,
            "test": tested.all,
            "validation": journal[-1]["validation"],
            "full_training_peak_bytes": experiment.full_cost.peak_bytes,
            "mean_budget": experiment.mean_budget,
            "predicted_peak_bytes": max(line["predicted_peak_bytes"] for line in rounds),
        }
        if experiment.privacy is not None:  # the rest takes clients' labels, or who took part
            return {**figures, "num_clients": experiment.num_clients(set()), "privacy": rounds[-1]["privacy"]}
        measured = [peak for line in rounds if (peak := line["measured_peak_bytes"]) is not None]
        clients = {i for line in rounds for ids in line["rungs"].values() for i in ids}
        return {
            **figures,
            "low_memory_test": tested.low_memory,
            "client_test": tested.over_clients,
            "measured_peak_bytes": max(measured, default=None),
            "num_clients": experiment.num_clients(clients),
            "num_clients_seen": len(clients),
            "num_clients_lost": sum(len(line["lost"]) for line in rounds),
            **{k: sum(line[k] for line in rounds) for k in ("flops", "bytes_down", "bytes_up", "simulated_seconds")},
            "seconds": sum(line["seconds"] for line in rounds),
        }

    def _tested(self, model: ModelSpec, params: Params) -> _Tested:
        experiment, data, problem = self._experiment, self._experiment.data, self._experiment.problem
        labels, groups = problem.labels(data.test), [torch.arange(num_rows(data.test))]
        present: list[int] = []
        if experiment.privacy is None and (low := experiment.low_memory_test) is not None:
            present = sorted(set(labels.tolist()))
            groups += [low, *((labels == label).nonzero().flatten() for label in present)]
        all_, *found = evaluate_groups(self._residents, model, params, problem, data.test, groups)
        if not found:  # clients keep their labels
            return _Tested(all_, None, None)
        of_label = torch.full((problem.num_classes,), torch.nan, dtype=torch.float64)
        of_label[present] = torch.tensor([metrics.get("accuracy", torch.nan) for metrics in found[1:]]).double()
        order = shuffled(len(experiment.population), derive(experiment.config.seed, "asked clients"))
        counts = [data.label_counts(client) for _, client in zip(range(ASKED_CLIENTS), order, strict=False)]
        return _Tested(all_, found[0], accuracy_over_clients(of_label, torch.stack(counts)))

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


def is_due(round: int, every: int, rounds: int) -> bool:
    """Whether what is measured at both ends of a run, and every so many rounds if not 0, is so after this one."""
    return round in (0, rounds) or (every > 0 and round % every == 0)


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Add a line to a journal, on the disk when this returns.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        with path.open("a") as file:
            file.write(to_json(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}; what was saved before is intact") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file whole or not at all."""
    write_whole(path, (to_json(content, indent=2) + "\n").encode())


@functools.cache
def base_bytes() -> int | None:
    """Resident bytes of a worker that has warmed up: what a budget comes on top of.

    Measured once for a machine and a version of this package; see `warm_worker_bytes`.
    """
    found: int | None = kept("base", (), warm_worker_bytes)
    return found


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
