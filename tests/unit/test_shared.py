"""Memory that processes share: lent, read from elsewhere, taken back; and what an engine does where there is none."""

from __future__ import annotations

import errno
import gc
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import scalefl.engines.local
import scalefl.engines.shared
from scalefl.engines.local import LocalEngine
from scalefl.engines.shared import Arena, Board, Desk, Reader
from support import Clients, MadeData, children, full_bytes, identical, make_method, play

DATA = MadeData([9, 12, 10, 8])
CLIENTS = Clients(DATA, (10 * full_bytes(),))

WRITES = """
import pickle, sys
from scalefl.engines.shared import Reader
sheets = pickle.load(sys.stdin.buffer)
for tensor in Reader().read(sheets).values():
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


def test_a_desk_gives_its_places_back():
    arena = Arena()
    board, params = Board(arena), {"w": torch.ones(100), "frozen": torch.ones(100)}
    desk = Desk(board, params, ["w"], {"x": torch.ones(3)})
    assert desk.brief.own.keys() == {"w"} and desk.brief.params.keys() == {"w", "frozen"}
    own = Reader().read(desk.brief.own)["w"]
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
    before = set(children())
    with LocalEngine(DATA, CLIENTS, workers=2) as beside:
        engine_fit, killed = beside.fit, []

        def fit(method, orders):
            for answer in engine_fit(method, orders):
                if not killed:
                    killed.extend(set(children()) - before)
                    for pid in killed:
                        os.kill(pid, 9)
                yield answer

        monkeypatch.setattr(beside, "fit", fit)
        states, records = play(make_method("fedavg"), beside, 2)
    assert len(killed) == 2
    assert [record.lost for record in records] == [[], []]
    assert identical(states[-1].params, wanted[-1].params)
