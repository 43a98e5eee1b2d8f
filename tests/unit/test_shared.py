"""Memory that processes share: lent, read from elsewhere, taken back; and what an engine does where there is none."""

from __future__ import annotations

import errno
import gc
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch

import scalefl.engines.local
import scalefl.engines.shared
from scalefl.aggregate import Total
from scalefl.engines.local import LocalEngine
from scalefl.engines.shared import Arena, Board, Desk, Reader
from scalefl.errors import RoundFailed
from scalefl.loop import _Reduction
from scalefl.methods.fedavg import FedAvg
from support import (
    PROBLEM,
    WORK,
    Clients,
    MadeData,
    comparable,
    full_bytes,
    identical,
    kill_workers,
    make_method,
    play,
    spec,
)

DATA = MadeData([9, 12, 10, 8])
CLIENTS = Clients(DATA, (10 * full_bytes(),))

WRITES = """
import pickle, sys
from scalefl.engines.shared import Reader
sheets = pickle.load(sys.stdin.buffer)
for tensor in Reader().tensors(sheets).values():
    tensor.mul_(2)
"""


def elsewhere(sheets) -> None:
    """Another process doubles what is on the sheets."""
    subprocess.run([sys.executable, "-c", WRITES], input=pickle.dumps(sheets), check=True)


def test_another_process_writes_and_we_see_it():
    arena = Arena()
    tensors = {
        "w": torch.arange(6.0).view(2, 3),
        "n": torch.tensor(7),
        "none": torch.zeros(0, 3),
        "half": torch.ones(5, dtype=torch.float16),
        "large": torch.ones(2**24),  # longer than a file of the usual size
    }
    sheets = {name: arena.put(t) for name, t in tensors.items()}
    elsewhere(sheets)
    for name, sheet in sheets.items():
        found = arena.tensor(sheet)
        assert torch.equal(found, 2 * tensors[name]) and found.dtype == tensors[name].dtype, name
        assert found.shape == tensors[name].shape, name
    arena.close()


def test_pieces_do_not_overlap_and_are_lent_again():
    arena = Arena()
    first = [arena.put(torch.full((count,), float(count))) for count in (1, 5, 17, 1000, 16)]
    assert all(bool((arena.tensor(sheet) == sheet.shape[0]).all()) for sheet in first)
    assert all(sheet.place.start % 64 == 0 for sheet in first)
    arena.take_back(first[3].place)
    again = arena.put(torch.ones(990))
    assert again.place == first[3].place
    assert bool((arena.tensor(first[4]) == 16).all()), "its neighbour is as it was"
    arena.close()


def test_memory_is_bounded_by_what_is_lent_at_a_time():
    arena = Arena()
    for length in range(1, 3000):
        sheet = arena.put(torch.zeros(length * 100))
        arena.take_back(sheet.place)
    held = sum(os.fstat(descriptor).st_size for descriptor in arena._files)
    assert held <= 2 * 2**25
    arena.close()


def test_the_board_holds_a_tensor_once_until_it_is_gone():
    arena = Arena()
    board, w, other = Board(arena), torch.ones(10), torch.zeros(10)
    (sheet,) = board.put_up({"w": w}).values()
    assert board.put_up({"other name": w}) == {"other name": sheet}
    assert board.put_up({"w": other})["w"] != sheet
    w.add_(1)
    assert board.put_up({"w": w}) == {"w": sheet} and bool((arena.tensor(sheet) == 2).all()), "written into since"
    del w
    gc.collect()
    assert board.put_up({"w": torch.full((10,), 3.0)})["w"].place == sheet.place, "its place is free"
    arena.close()


def test_the_board_never_takes_a_new_tensor_for_one_that_is_gone():
    arena = Arena()
    board = Board(arena)
    for length in range(1, 200):  # Python gives the ids of what is gone to what is new
        assert board.put_up({"w": torch.ones(length)})["w"].shape == (length,)
    arena.close()


def test_a_desk_gives_its_places_back():
    arena = Arena()
    board, params = Board(arena), {"w": torch.ones(100), "frozen": torch.ones(100)}
    desk = Desk(board, params, ["w"], {"x": torch.ones(3)})
    assert desk.brief.own.keys() == {"w"} and desk.brief.params.keys() == {"w", "frozen"}
    own = Reader().tensors(desk.brief.own)["w"]
    own.fill_(5)
    assert bool((desk.results()["w"] == 5).all())
    desk.close()
    again = Desk(board, params, ["w"], {"x": torch.ones(3)})
    assert again.brief == desk.brief
    arena.close()


def test_nothing_stays_lent_after_rounds():
    with LocalEngine(DATA, CLIENTS, workers=2) as engine:
        play(make_method("fedavg"), engine, 3)
        assert engine._board is not None
        arena = engine._board.arena
        free = sum(len(places) for places in arena._free.values())
        play(make_method("fedavg"), engine, 3)
        assert sum(len(places) for places in arena._free.values()) == free
        descriptors = set(Path("/proc/self/fd").iterdir())
    assert len(set(Path("/proc/self/fd").iterdir())) < len(descriptors), "all of it is given back"


@pytest.mark.parametrize("why", ["no such system", "no memory left"])
def test_without_memory_to_share_tensors_are_sent(monkeypatch, why):
    with LocalEngine(DATA, CLIENTS) as here:
        wanted, _ = play(make_method("fedavg"), here, 2)

    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if why == "no such system":
        monkeypatch.setattr(scalefl.engines.local, "can_share", lambda: False)
    else:
        monkeypatch.setattr(scalefl.engines.shared.os, "posix_fallocate", full)
    with LocalEngine(DATA, CLIENTS, workers=2) as beside:
        found, _ = play(make_method("fedavg"), beside, 2)
    assert identical(found[-1].params, wanted[-1].params)


def test_an_engine_may_be_entered_again():
    method = make_method("fedavg")
    engine = LocalEngine(DATA, CLIENTS, workers=2)
    with engine:
        states, _ = play(method, engine, 1)
    with engine:
        again, _ = play(method, engine, 2, state=states[0])
    assert identical(again[1].params, states[1].params)


def test_a_worker_that_dies_once_costs_nobody(monkeypatch):
    with LocalEngine(DATA, CLIENTS) as here:
        wanted, _ = play(make_method("fedavg"), here, 2)
    with LocalEngine(DATA, CLIENTS, workers=2) as beside:
        engine_fit, killed = beside.fit_into, []

        def fit(*arguments):
            for answer in engine_fit(*arguments):
                if not killed:
                    killed.extend(kill_workers(beside))
                yield answer

        monkeypatch.setattr(beside, "fit_into", fit)
        states, records = play(make_method("fedavg"), beside, 2)
    assert len(killed) == 2
    assert [record.lost for record in records] == [[], []]
    assert identical(states[-1].params, wanted[-1].params)


@pytest.fixture
def adding(monkeypatch) -> None:
    """Two workers are enough for them to add up themselves."""
    monkeypatch.setattr(scalefl.engines.local, "ADDING_WORKERS", 2)


class Watched(LocalEngine):
    """Notes whose updates came added up."""

    def fit_into(self, *arguments):
        for answer in super().fit_into(*arguments):
            self.added = {**getattr(self, "added", {}), answer.client_id: getattr(answer, "is_added", None)}
            yield answer


def both_ways(method, data=DATA, clients=CLIENTS, **more):
    """What rounds give here and beside, and who was added up by workers."""
    with LocalEngine(data, clients) as here:
        wanted = play(method, here, 2, **more)
    with Watched(data, clients, workers=2) as beside:
        return play(method, beside, 2, **more), wanted, beside.added


@pytest.mark.parametrize(
    "method",
    [{"name": "fedavg"}, {"name": "scalefl", "blocks": ["0", "1"]}, {"name": "scalefl-paper", "blocks": ["0", "1"]}],
    ids=str,
)
def test_workers_that_add_up_change_no_bit(adding, method):
    (states, records), (wanted, wanted_records), added = both_ways(make_method(**method))
    assert identical(states[-1].params, wanted[-1].params)
    assert [comparable(record) for record in records] == [comparable(record) for record in wanted_records]
    assert list(added.values()) == [True] * 4


def test_windows_are_left_to_the_server(adding):
    clients = Clients(DATA, (10 * full_bytes(), int(0.7 * full_bytes())))
    method = make_method("heterofl", rates=[1.0, 0.5], statistics="running", own_classes=False)
    (states, records), (wanted, _), added = both_ways(method, clients=clients, model=spec())
    assert len(records[0].rungs) == 2
    assert identical(states[-1].params, wanted[-1].params)
    assert set(added.values()) == {True, False}, "those that hold the whole model, and the others"


def test_few_workers_leave_it_to_the_server():
    _, _, added = both_ways(make_method("fedavg"))
    assert list(added.values()) == [False] * 4


def test_large_values_are_left_to_the_server(adding):
    """They need a second grid."""
    state = make_method("fedavg").init(spec(), PROBLEM, seed=0, smallest_memory_bytes=10 * full_bytes())
    name = next(name for name, t in state.params.items() if t.ndim == 1 and t.is_floating_point())
    state = replace(state, params={**state.params, name: torch.full_like(state.params[name], 40.0)})
    (states, records), (wanted, _), added = both_ways(make_method("fedavg"), state=state)
    assert [record.lost for record in records] == [[], []]
    assert identical(states[-1].params, wanted[-1].params) and not any(added.values())


def test_a_client_that_diverged_is_not_added(adding):
    work = replace(WORK, lr=1e6)
    with LocalEngine(DATA, CLIENTS) as here, pytest.raises(RoundFailed) as wanted:
        play(make_method("fedavg", work=work), here, 1)
    with LocalEngine(DATA, CLIENTS, workers=2) as beside, pytest.raises(RoundFailed) as found:
        play(make_method("fedavg", work=work), beside, 1)
    assert str(found.value) == str(wanted.value)


FIRST = (1, 2)
"""Those with most examples, done first: what a worker has added when it dies adding another."""


@dataclass(frozen=True)
class DiesAdding(FedAvg):
    """A method that ends the worker it comes to in the middle of an addition, once."""

    mark: str = ""
    when: str = "in the middle"

    def __setstate__(self, state):
        self.__dict__.update(state)
        worker = sys.modules["scalefl.engines.worker"]
        add = worker.add_fine

        def dies(sums, *more):
            is_first = not any(total.any() for total in sums)
            add(sums, *more)
            after = Path(self.mark)
            if is_first or after.exists():  # what was there before shall be lost, too
                return
            after.touch()
            if self.when == "before it tells":
                worker._told = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
                return
            sums[0].fill_(1e9)
            os.kill(os.getpid(), signal.SIGKILL)

        worker.add_fine = dies
        run = worker.run_safely

        def dies_again(method, problem, residents, task, *more):
            if self.when == "and so does who does it again" and Path(self.mark).exists() and task.client_id in FIRST:
                os.kill(os.getpid(), signal.SIGKILL)
            return run(method, problem, residents, task, *more)

        worker.run_safely = dies_again


@pytest.mark.parametrize("when", ["in the middle", "before it tells"])
def test_what_a_worker_had_added_when_it_died_adding_is_done_again(adding, tmp_path, when):
    data = MadeData([9, 12, 10, 8, 11, 7])
    clients = Clients(data, (10 * full_bytes(),))
    with LocalEngine(data, clients) as here:
        wanted, wanted_records = play(make_method("fedavg"), here, 2, cohort=6)
    usual = make_method("fedavg")
    settings = {f.name: getattr(usual, f.name) for f in fields(usual)}
    method = DiesAdding(**settings, mark=str(tmp_path / "died"), when=when)
    with LocalEngine(data, clients, workers=2) as beside:
        states, records = play(method, beside, 2, cohort=6)
    assert (tmp_path / "died").exists()
    assert identical(states[-1].params, wanted[-1].params)
    assert [comparable(record) for record in records] == [comparable(record) for record in wanted_records]


def test_who_was_added_and_is_lost_when_done_again_is_told_as_lost(adding, tmp_path):
    """And counts no more: the round is one without that client."""
    data = MadeData([9, 12, 11, 8, 10, 7])
    clients = Clients(data, (10 * full_bytes(),))
    usual = make_method("fedavg")
    settings = {f.name: getattr(usual, f.name) for f in fields(usual)}
    method = DiesAdding(**settings, mark=str(tmp_path / "died"), when="and so does who does it again")
    with LocalEngine(data, clients, workers=2) as beside:
        states, (record,) = play(method, beside, 1, cohort=6)
    lost = [loss["client"] for loss in record.lost]
    assert lost and set(lost) <= set(FIRST) and "SIGKILL" in record.lost[0]["cause"]
    assert sorted([*lost, *(i for ids in record.rungs.values() for i in ids)]) == list(range(6)), "each once"
    total = sum(size for client, size in enumerate(data.sizes) if client not in lost)
    assert record.num_examples == total
    plan = usual.plan(states[0], [clients[i] for i in range(6)])
    mean = Total(states[0].params, sum(data.sizes))
    with LocalEngine(data, clients) as here:
        for update in here.fit(usual, [(t, dict(states[0].params)) for t in plan.tasks if t.client_id not in lost]):
            mean.add(
                update.params, update.num_examples, plan.coords[update.client_id], dict.fromkeys(update.params, 1.0)
            )
    wanted = mean.mean(states[0].params)
    assert identical({name: states[-1].params[name] for name in wanted}, wanted)


def test_sums_are_given_back_when_the_caller_gives_up(adding):
    with LocalEngine(DATA, CLIENTS, workers=2) as beside:
        method = make_method("fedavg")
        states, _ = play(method, beside, 1)
        plan = method.plan(states[0], [CLIENTS[i] for i in range(4)])
        total = Total(states[0].params, sum(DATA.sizes))
        orders = ((task, {n: t.clone() for n, t in states[0].params.items()}) for task in plan.tasks)
        answers = beside.fit_into(method, orders, _Reduction(plan, total))
        next(answers)
        answers.close()
        assert total.mean(states[0].params) == {}, "half a round is none"
        again, _ = play(method, beside, 2)
    assert identical(again[1].params, states[1].params)


@pytest.fixture
def given(monkeypatch) -> list[tuple[int, int, bool]]:
    """Which worker was given which client's task, and whether ahead of another."""
    found, send = [], scalefl.engines.local.Worker.send

    def noting(self, lesson, cap_bytes, job, *, is_ahead):
        found.append((id(self), job.members[0].given.task.client_id, is_ahead))
        send(self, lesson, cap_bytes, job, is_ahead=is_ahead)

    monkeypatch.setattr(scalefl.engines.local.Worker, "send", noting)
    return found


def test_a_worker_that_dies_costs_nobody_whose_task_was_sent_ahead(given, monkeypatch):
    data = MadeData([10] * 14)
    clients = Clients(data, (10 * full_bytes(),))
    with LocalEngine(data, clients) as here:
        wanted, _ = play(make_method("fedavg"), here, 1, cohort=14)
    with LocalEngine(data, clients, workers=2) as beside:
        engine_fit, seen = beside.fit_into, []

        def fit(*arguments):
            for answer in engine_fit(*arguments):
                seen.append(answer)
                if len(seen) == 6:
                    assert any(is_ahead for _, _, is_ahead in given)
                    kill_workers(beside)
                yield answer

        monkeypatch.setattr(beside, "fit_into", fit)
        states, (record,) = play(make_method("fedavg"), beside, 1, cohort=14)
    assert record.lost == [] and sorted(answer.client_id for answer in seen) == list(range(14))
    assert identical(states[-1].params, wanted[-1].params)


def test_nothing_waits_behind_a_first_task(given):
    """It is the longest, and may take as long as all others together."""
    sizes = [2000, *([4] * 11)]
    data = MadeData(sizes)
    clients = Clients(data, (10 * full_bytes(),))
    with LocalEngine(data, clients, workers=2) as beside:
        play(make_method("fedavg"), beside, 1, cohort=12)
    (first, client, _), *_ = given
    assert client == 0 and any(is_ahead for _, _, is_ahead in given)
    assert [is_ahead for worker, _, is_ahead in given if worker == first][1:2] in ([], [False])
