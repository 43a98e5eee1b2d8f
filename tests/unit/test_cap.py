"""Hard memory caps: who asks for more than its budget is refused and lost; everybody else trains as without a cap."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_experiment import settings
from test_federate import Chosen
from test_spool import Data as BigData
from test_spool import answered, done, step_of
from torch import Tensor, nn

import scalefl.engines.local
import scalefl.engines.process
import scalefl.measure
from scalefl.checkpoint import load_state, save_state
from scalefl.config import EngineConfig
from scalefl.costs import step_cost
from scalefl.engines.local import LocalEngine
from scalefl.errors import BudgetError, ConfigError
from scalefl.experiment import Experiment
from scalefl.loop import federate
from scalefl.measure import cap_refusal, limited, start_peak, usable_bytes
from scalefl.models.spec import ModelSpec
from scalefl.objectives import TaskLoss
from scalefl.record import MEASURED, RoundRecord
from scalefl.run_folder import RunFolder
from scalefl.runner import run, run_rounds
from scalefl.sampling import UniformSampler
from scalefl.types import ClientLoss, ServerState
from support import (
    PROBLEM,
    Clients,
    MadeData,
    children,
    comparable,
    full_bytes,
    identical,
    make_method,
    shared_fields,
    tiny,
    waited,
)

MIB = 2**20
BUDGET = 24 * MIB
TORCH, PYTHON, SHARED, ABORT, SLEEP = 1e6, 2e6, 3e6, 4e6, 5e6
"""Pixels that have `Hungry` take 64 MiB in some way, or fall asleep."""


class Hungry(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        mark = float(x.detach().max())
        if mark == TORCH:
            torch.ones(16 * MIB)
        if mark == PYTHON:
            bytearray(64 * MIB)
        if mark == SHARED:
            shared = [torch.ones(MIB).share_memory_() for _ in range(16)]  # 4 MiB at a time, all of it granted
            del shared
        if mark == ABORT:  # as C++ code that catches nothing
            print("terminate called after throwing an instance of 'std::bad_alloc'", file=sys.stderr)
            os.abort()
        if mark == SLEEP:
            time.sleep(60)
        return x


def hungry(width: float = 1.0) -> nn.Module:
    return nn.Sequential(Hungry(), *tiny(width))


MODEL = ModelSpec.of("test_cap:hungry")
SIZES = [9, 12, 10, 8, 8, 8, 8, 8, 11]
SPOILT = {3: TORCH, 4: PYTHON, 5: SHARED, 6: ABORT, 7: SLEEP}
DATA = MadeData(SIZES, spoilt=SPOILT)
CLIENTS = Clients(DATA, (BUDGET,))


def start() -> ServerState:
    return make_method("fedavg").init(MODEL, PROBLEM, seed=3, smallest_memory_bytes=0)


def one_round(engine: Any, *ids: int, state: ServerState | None = None) -> tuple[ServerState, RoundRecord]:
    return next(federate(make_method("fedavg"), engine, Chosen(*ids), state or start()))


@pytest.fixture(scope="module")
def capped() -> Iterator[LocalEngine]:
    with LocalEngine(DATA, CLIENTS, workers=1, cap="hard") as engine:
        yield engine


@pytest.fixture(scope="module")
def free() -> Iterator[LocalEngine]:
    with LocalEngine(DATA, CLIENTS) as engine:
        yield engine


def worker_of(engine: LocalEngine) -> int:
    return engine._workers[0]._process.pid


@pytest.mark.parametrize("bad", [3, 4, 5])
def test_who_asks_for_more_than_its_budget_is_lost_and_its_worker_lives_on(capped, free, bad):
    worker = worker_of(capped)
    state, record = one_round(capped, 0, bad, 1)
    (lost,) = record.lost
    predicted = record.peaks[0]["predicted_bytes"]
    assert lost["client"] == bad and lost["predicted_peak_bytes"] == predicted
    assert lost["cause"] == f"memory cap hit: budget 24.0 MiB, predicted {predicted / MIB:.2f} MiB"
    # What was refused was never there; what was shared was seen too late.
    assert lost["measured_peak_bytes"] > 64 * MIB if bad == 5 else lost["measured_peak_bytes"] < BUDGET
    wanted, _ = one_round(free, 0, 1)
    assert identical(state.params, wanted.params)
    assert state.tightened == {bad: int(0.9 * predicted)}
    assert worker_of(capped) == worker
    assert resource.prlimit(worker, resource.RLIMIT_DATA) == resource.getrlimit(resource.RLIMIT_DATA)
    again, record = one_round(capped, 0, 1, 2, state=state)
    assert record.lost == [] and again.tightened == state.tightened


def test_a_worker_that_dies_of_its_cap_is_started_again(capped, free):
    worker = worker_of(capped)
    state, record = one_round(capped, 0, 6, 1)
    assert record.lost[0]["cause"].startswith("memory cap hit: budget 24.0 MiB")
    assert record.lost[0]["measured_peak_bytes"] is None
    assert 6 in state.tightened and worker_of(capped) != worker
    assert identical(state.params, one_round(free, 0, 1)[0].params)


def test_a_worker_that_is_killed_in_the_middle(capped, free, monkeypatch):
    """By whatever: it is no matter of its budget."""
    one_round(capped, 0)
    killer = threading.Timer(1, os.kill, (worker_of(capped), signal.SIGKILL))
    send = scalefl.engines.local.Worker.send

    def sending(self, lesson, cap_bytes, job, **more):
        send(self, lesson, cap_bytes, job, **more)
        if job.members[0].given.task.client_id == 7 and not killer.ident:
            killer.start()

    monkeypatch.setattr(scalefl.engines.local.Worker, "send", sending)
    state, record = one_round(capped, 0, 7, 1)
    killer.join()
    assert [loss["client"] for loss in record.lost] == [7]
    assert record.lost[0]["cause"] == "its worker died: signal 9 (SIGKILL)"
    assert state.tightened == {}
    assert identical(state.params, one_round(free, 0, 1)[0].params)


def test_a_cap_changes_no_number(capped, free):
    ids = (0, 1, 2, 8)
    state, record = one_round(free, *ids)
    with LocalEngine(DATA, CLIENTS, workers=2, cap="hard") as twice:
        for engine in (capped, twice):
            other, capped_record = one_round(engine, *ids)
            assert identical(state.params, other.params)
            assert comparable(capped_record) == comparable(record)
            assert all(0 <= peak["measured_bytes"] < BUDGET for peak in capped_record.peaks)
            assert capped_record.measured_peak_bytes == max(p["measured_bytes"] for p in capped_record.peaks)
    assert record.measured_peak_bytes is None and {peak["measured_bytes"] for peak in record.peaks} == {None}
    assert [peak["client"] for peak in record.peaks] == sorted(ids)


def test_the_planner_leaves_a_margin_under_a_cap(capped, free):
    assert [usable_bytes(n) for n in (0, 4 * MIB, 5 * MIB, 1000 * MIB)] == [0, 0, MIB, 970 * MIB]
    assert free.population()[0].memory_bytes == BUDGET
    shown = capped.population()
    assert shown[0].memory_bytes == shown.smallest_memory_bytes == shown.largest_memory_bytes == 20 * MIB
    assert len(shown) == len(DATA.sizes) and shown[2].num_examples == 10


@pytest.mark.parametrize("mode", ["resident", "chunked", "streamed", "cached"])
def test_what_is_predicted_to_fit_does(mode):
    """In a worker that has never seen the model: what libraries keep of a first step is not charged to a client."""
    step = step_of(mode)
    data = BigData([64] * 4)
    peak = step_cost(step, PROBLEM, TaskLoss()).peak_bytes
    with LocalEngine(data, Clients(data, (peak + 4 * MIB,)), workers=1, cap="hard") as engine:
        assert engine.population()[0].memory_bytes == peak
        for _ in range(2):
            assert (done(engine, 0, step).receipt.peak_bytes or 0) < peak + MIB
    with LocalEngine(data, Clients(data, (int(0.7 * peak),)), workers=1, cap="hard") as engine:
        answer = answered(engine, 0, step)
        assert isinstance(answer, ClientLoss) and answer.out_of_memory


# Where there is no cap to be had.


def test_a_cap_needs_workers():
    for make in (lambda: EngineConfig(cap="hard", workers=0), lambda: LocalEngine(DATA, CLIENTS, cap="hard")):
        with pytest.raises(ConfigError, match=r"engine\.cap = 'hard' needs workers >= 1"):
            make()
    with pytest.raises(ConfigError, match=r"engine\.cap = 'hrad': did you mean 'hard'"):
        settings("200%", engine={"cap": "hrad", "workers": 1})


def test_why_a_system_cannot_cap(monkeypatch):
    assert cap_refusal() is None
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(MemoryError), limited(start_peak(), MIB):
        bytearray(4096 * MIB)  # more than this process may have kept of what it freed
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    for error in (ValueError("not allowed"), PermissionError(errno.EPERM, "not allowed")):

        def refuse(*_arguments: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(scalefl.measure.resource, "setrlimit", refuse)
        assert cap_refusal() == "not allowed"
    monkeypatch.setattr(scalefl.measure.resource, "setrlimit", lambda *_: None)
    assert cap_refusal() == "it grants memory beyond RLIMIT_DATA"
    monkeypatch.setattr(scalefl.measure, "_CLEAR", Path("/proc/nothing"))
    assert cap_refusal() == "the system does not tell what a process holds"


def test_a_system_that_cannot_cap_is_refused_before_anything_is_trained(monkeypatch):
    class Refusal:
        header = "it says no"

    before = set(children())
    monkeypatch.setattr(scalefl.engines.process.Channel, "receive", lambda _channel: Refusal)
    with pytest.raises(ConfigError, match=r"cannot cap a worker's memory \(it says no\)"):
        LocalEngine(DATA, CLIENTS, workers=2, cap="hard").__enter__()
    waited(lambda: set(children()) <= before)


# A full disk.


@contextlib.contextmanager
def started_on_a_full_disk(num_bytes: int) -> Iterator[LocalEngine]:
    """An engine whose workers cannot write files of more than so many bytes."""
    data = BigData([64] * 4)
    engine = LocalEngine(data, Clients(data, (2**40,)), workers=1, cap="hard")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        engine.__enter__()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with engine:
        yield engine


def test_a_disk_without_room_costs_the_client_and_not_the_run():
    with started_on_a_full_disk(MIB) as engine:
        method = make_method("fedavg")
        state = method.init(ModelSpec.of("support:tiny"), PROBLEM, seed=0, smallest_memory_bytes=0)
        after, record = next(federate(method, engine, Chosen(0, 2, 1, 3), state))
        (cause,) = {loss["cause"] for loss in record.lost}
        assert [loss["client"] for loss in record.lost] == [2, 3] and after.tightened == {}
        assert "no room on disk for the client's examples (16.0 MiB): File too large" in cause
        answer = answered(engine, 0, step_of("streamed"))
        assert isinstance(answer, ClientLoss) and not answer.out_of_memory
        assert "no room on disk for the model (2.25 MiB): File too large" in answer.cause
        done(engine, 0, step_of("resident"))


# What a run learns from a cap.


class Losing:
    """An engine all of whose tasks but client 0's hit a cap."""

    def __init__(self, engine: LocalEngine) -> None:
        self._engine = engine
        self.population = engine.population

    def fit(self, method, orders):
        for answer in self._engine.fit(method, orders):
            lost = ClientLoss(answer.client_id, 0, "memory cap hit", out_of_memory=True)
            yield lost if answer.client_id else answer


def test_a_tightened_client_is_planned_with_less():
    data = MadeData([8, 8, 8])
    clients = Clients(data, (2 * full_bytes(),))
    method = make_method("fedavg")
    state = method.init(ModelSpec.of("support:tiny"), PROBLEM, seed=0, smallest_memory_bytes=0)
    seen = []

    class Looking(UniformSampler):
        def __call__(self, population, floor_bytes, state):
            seen.append([population[i].memory_bytes for i in range(3)] + [population.smallest_memory_bytes])
            assert population.largest_memory_bytes == clients.largest_memory_bytes and len(population) == 3
            return super().__call__(population, floor_bytes, state)

    with LocalEngine(data, clients) as engine:
        rounds = federate(method, Losing(engine), Looking(3), state)
        records = [next(rounds) for _ in range(2)]
    tightened = int(0.9 * full_bytes())
    whole = clients.largest_memory_bytes
    assert seen == [[whole] * 4, [whole, tightened, tightened, tightened]]
    assert records[0][0].tightened == records[1][0].tightened == {1: tightened, 2: tightened}
    assert [loss["client"] for loss in records[0][1].lost] == [1, 2]
    assert records[1][1].lost == [], "full training is more than they get"
    assert records[1][1].rungs == {"full": [0]}


class LosingOnce(Losing):
    """An engine all of whose tasks hit a cap in the first round that it is asked for."""

    asked = 0

    def fit(self, method, orders):
        self.asked += 1
        for answer in self._engine.fit(method, orders):
            lost = ClientLoss(answer.client_id, 0, "memory cap hit", out_of_memory=True)
            yield lost if self.asked == 1 else answer


def test_a_round_in_which_all_run_out_of_memory_is_planned_again_for_less():
    data = MadeData([8, 8, 8])
    method = make_method("fedavg", means="micro-batches")
    state = method.init(ModelSpec.of("support:tiny"), PROBLEM, seed=0, smallest_memory_bytes=0)
    with LocalEngine(data, Clients(data, (2 * full_bytes(),))) as engine:
        losing = LosingOnce(engine)
        state, record = next(federate(method, losing, UniformSampler(3), state))
    assert (losing.asked, record.round, record.lost) == (2, 1, [])
    assert record.rungs == {"full, micro-batch 4 (own norms)": [0, 1, 2]}
    assert state.tightened == dict.fromkeys(range(3), int(0.9 * full_bytes()))


def test_what_is_tightened_is_saved(tmp_path):
    state = replace(start(), tightened={12: 5, 3: 10**12})
    path = tmp_path / "state.safetensors"
    save_state(path, state, make_method("fedavg").deploy(state))
    loaded = load_state(path, MODEL, PROBLEM)
    assert loaded.tightened == {3: 10**12, 12: 5}
    first = path.read_bytes()
    save_state(path, replace(state, tightened={3: 10**12, 12: 5}), make_method("fedavg").deploy(state))
    assert path.read_bytes() == first


def make_data() -> MadeData:
    return MadeData([9, 12, 10, 8], spoilt={2: TORCH})


def test_a_run_under_a_cap_and_its_resumption_are_the_same(tmp_path):
    config = settings(
        "24MiB",
        rounds=4,
        clients_per_round=3,
        model="test_cap:hungry",
        model_arguments={"width": 16.0},
        data={"source": {"name": "test_cap:make_data"}},
        engine={"workers": 1, "cap": "hard"},
    )
    summary = run(config, tmp_path / "whole")
    assert summary["num_clients_lost"] == 1, "once bitten, it is not asked again"
    assert MIB / 2 < summary["measured_peak_bytes"] < 24 * MIB
    rounds = run_rounds(Experiment(config), tmp_path / "half")
    for progress in rounds:
        if progress.line["lost"]:
            break
    rounds.close()
    run(config, tmp_path / "half", resume=True)
    files = [RunFolder(tmp_path / name) for name in ("whole", "half")]
    assert files[0].state.read_bytes() == files[1].state.read_bytes()
    journals = [shared_fields(f.read_journal()) for f in files]
    assert journals[0] == journals[1]
    summaries = [shared_fields(json.loads(f.summary.read_text())) for f in files]
    assert summaries[0] == summaries[1] and not set(MEASURED) & set(summaries[0])


def test_a_budget_that_the_margin_eats_is_refused_at_the_start(tmp_path):
    with pytest.raises(BudgetError, match=r"on offer is 4\.00 MiB, of which a hard cap keeps 4\.00 MiB"):
        run(settings("4MiB", engine={"workers": 1, "cap": "hard"}), tmp_path / "run")
    experiment = Experiment(settings("24MiB", engine={"workers": 1, "cap": "hard"}))
    assert experiment.plan().budgets == {"class 0": 20 * MIB}
