"""What a worker is sent but does not hold, and what its tasks are measured to add."""

from __future__ import annotations

import itertools
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from scalefl.blocks import Span, blocks_by_hand
from scalefl.client import held_by
from scalefl.coords import extract
from scalefl.costs import step_cost
from scalefl.engines.local import LocalEngine
from scalefl.engines.spool import MappedExamples, TaskParams, lasting_names
from scalefl.engines.wire import Channel, Store
from scalefl.methods.common import initial_params, make_plan
from scalefl.methods.fedavg import FedAvg
from scalefl.methods.scalefl import ScaleFL
from scalefl.models.spec import ModelSpec
from scalefl.objectives import TaskLoss
from scalefl.params import num_bytes
from scalefl.steps import span_step
from scalefl.types import Choice, ClientLoss, ClientTask, ClientUpdate, PrefixMode, ServerState, Step
from support import PROBLEM, WORK, Clients, MadeData, copied, examples_of, identical, tiny

MIB = 2**20
WIDTH = 256


def heavy() -> nn.Module:
    """Most of its weights lie before the cut: 4 × 2.25 MiB."""
    widths = [1, *[WIDTH] * 5]
    units = [nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.ReLU()) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(nn.Sequential(*units), nn.Sequential(nn.Conv2d(WIDTH, 4, 1), nn.Flatten(), nn.Linear(256, 3)))


HEAVY = ModelSpec.of("test_spool:heavy")
PREFIX_BYTES = 4 * 9 * WIDTH**2 * 4


def step_of(mode: PrefixMode) -> Step:
    step = span_step(blocks_by_hand(HEAVY, PROBLEM, ("0.0", "0.2", "0")), Span(3, 3), None, WORK)
    return replace(step, means=replace(step.means, prefix=mode))


def received(store: Store, tensors: dict[str, Tensor]) -> None:
    ours, theirs = (Channel(end) for end in socket.socketpair())
    thread = threading.Thread(target=ours.send, args=(None, tensors))
    thread.start()
    theirs.receive().receive(store)
    thread.join()
    ours.close()
    theirs.close()


def test_what_every_step_holds_lasts():
    resident, streamed, cached = (step_of(mode) for mode in ("resident", "streamed", "cached"))
    everything = frozenset(initial_params(HEAVY, 0))
    own = frozenset(name for name in everything if not name.startswith("0."))
    assert lasting_names(ClientTask(0, 0, (resident,), 0)) == everything
    assert lasting_names(ClientTask(0, 0, (streamed,), 0)) == own
    assert lasting_names(ClientTask(0, 0, (streamed, cached), 0)) == own
    assert lasting_names(ClientTask(0, 0, (resident, streamed), 0)) == own


def test_what_a_step_holds_is_in_memory_for_as_long():
    params = initial_params(HEAVY, 0)
    resident, streamed = step_of("resident"), step_of("streamed")
    name, other, lasting = "0.1.0.weight", "0.2.0.weight", "1.0.weight"
    with closing(TaskParams(ClientTask(0, 0, (resident, streamed), 0))) as store:
        received(store, params)
        with store.holding(held_by(resident), frozenset({name, lasting})):
            assert store[name] is store[name]
            for changed in (name, other, lasting):
                store[changed].fill_(7.0)
        assert store[name] is not store[name]
        assert (store[name] == 7).all() and (store[lasting] == 7).all(), "what moves is kept"
        assert torch.equal(store[other], params[other]), "and nothing else"
        with pytest.raises(RuntimeError), store.holding(held_by(resident), frozenset({name})):
            store[name].fill_(8.0)
            raise RuntimeError
        assert store[name] is not store[name]
        assert identical(
            {n: store[n] for n in params if n not in (name, lasting)},
            {n: t for n, t in params.items() if n not in (name, lasting)},
        )


def test_tensors_of_a_streamed_prefix_are_read_by_name():
    params = initial_params(HEAVY, 0) | {"0.4.0.bias": torch.tensor(3.0), "0.3.0.bias": torch.ones(0)}
    store = TaskParams(ClientTask(0, 0, (step_of("streamed"),), 0))
    received(store, params)
    assert identical(dict(store), params) and list(store) == list(params) and len(store) == len(params)
    assert num_bytes(store) == num_bytes(params)
    with pytest.raises(KeyError):
        store["nothing"]
    assert store["1.0.weight"] is store["1.0.weight"], "what trains is held"
    first, second = store["0.1.0.weight"], store["0.1.0.weight"]
    assert first.data_ptr() != second.data_ptr(), "read anew"
    first.zero_()
    assert torch.equal(store["0.1.0.weight"], params["0.1.0.weight"])
    store.close()


def test_examples_are_mapped_from_a_file():
    examples = {**examples_of(3, 50), "flag": torch.ones(50, dtype=torch.bool), "none": torch.ones(50, 0)}
    store = MappedExamples()
    received(store, examples)
    assert identical(store, examples)
    maps = Path("/proc/self/maps").read_text()
    assert sum("(deleted)" in line and "rw-s" in line for line in maps.splitlines()) >= 3


# In workers.


class Data(MadeData):
    """Clients 0 and 1 have few examples, the others 16 MiB of them."""

    def examples(self, client: int) -> dict[str, Tensor]:
        made = examples_of(client, 64)
        if client > 1:
            made["ballast"] = torch.ones(64, MIB // 16)
        return made


DATA = Data([64] * 4)


@pytest.fixture(scope="module")
def engine() -> Iterator[LocalEngine]:
    with LocalEngine(DATA, Clients(DATA, (10**12,)), workers=1, cap="measured") as beside:
        yield beside


def done(engine: LocalEngine, client: int, step: Step) -> ClientUpdate:
    """What a client answers that is asked to do a step."""
    answer = answered(engine, client, step)
    assert isinstance(answer, ClientUpdate), answer
    return answer


def answered(engine: LocalEngine, client: int, step: Step) -> ClientUpdate | ClientLoss:
    state = ServerState(step.part.model, PROBLEM, initial_params(step.part.model, 0), round=0, seed=0)
    choice = Choice(step, step_cost(step, PROBLEM, TaskLoss()), "step")
    plan = make_plan(state, "step", [engine.population()[client]], {client: (choice,)}, step.work)
    (answer,) = engine.fit(FedAvg(), [(t, extract(state.params, plan.coords[client])) for t in plan.tasks])
    return answer


def whole(model: ModelSpec) -> Step:
    return span_step(blocks_by_hand(model, PROBLEM, ()), Span(0, 0), None, WORK)


def test_a_peak_is_as_predicted_and_without_the_examples(engine):
    for mode in ("resident", "chunked", "streamed", "cached"):
        step = step_of(mode)
        predicted = step_cost(step, PROBLEM, TaskLoss()).peak_bytes
        measured = [done(engine, client, step).receipt.peak_bytes or 0 for client in (0, 2)]
        assert abs(measured[0] - predicted) < 0.05 * predicted + MIB, mode
        # Of its 16 MiB a client holds a batch at a time: 2 MiB that no model asks for, so that nothing predicts them.
        assert measured[1] - measured[0] < 3 * MIB, mode


def test_a_streamed_prefix_is_not_held(engine):
    peaks = {mode: done(engine, 0, step_of(mode)).receipt.peak_bytes or 0 for mode in ("resident", "streamed")}
    assert peaks["resident"] - peaks["streamed"] > 0.4 * PREFIX_BYTES, "one unit is held at a time"


def test_how_a_worker_holds_tensors_changes_no_bit(engine):
    updates = [done(engine, 2, step_of(mode)) for mode in ("chunked", "streamed", "cached")]
    with LocalEngine(DATA, Clients(DATA, (10**12,))) as here:
        updates.append(done(here, 2, step_of("streamed")))
    assert all(identical(update.params, updates[0].params) for update in updates)
    assert len({(u.receipt.bytes_down, u.receipt.bytes_up) for u in updates}) == 1
    assert updates[-1].receipt.peak_bytes is None, "clients in this process cannot be told from it"


class Suspicious(nn.Module):
    """Fails where a tensor that it sees, or any page of its process, is shared with another process."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        if in_a_worker() and (self.scale.is_shared() or x.is_shared() or shared_bytes()):
            raise ValueError("shared")
        return x * self.scale


def in_a_worker() -> bool:
    return "MALLOC_TRIM_THRESHOLD_" in os.environ


def shared_bytes() -> int:
    """Of this process; its examples not counted where the folder for temporary files lies in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssShmem"))
    return found if Path(tempfile.gettempdir()).stat().st_dev != Path("/dev/shm").stat().st_dev else 0


def suspicious() -> nn.Module:
    return nn.Sequential(Suspicious(), *tiny())


class Sharing(nn.Module):
    """Keeps 24 MiB in shared memory, which no limit of the system counts."""

    def forward(self, x: Tensor) -> Tensor:
        if in_a_worker():  # not in a trace
            torch.ones(6 * MIB).share_memory_()
        return x


def sharing() -> nn.Module:
    return nn.Sequential(Sharing(), *tiny())


def test_a_worker_holds_nothing_in_shared_memory(engine):
    done(engine, 2, whole(ModelSpec.of("test_spool:suspicious")))


def test_shared_memory_is_measured(engine):
    plain, sharing = (ModelSpec.of(f"test_spool:{name}") for name in ("suspicious", "sharing"))
    peaks = [done(engine, 0, whole(model)).receipt.peak_bytes or 0 for model in (plain, sharing)]
    assert peaks[1] - peaks[0] > 23 * MIB


def test_memory_of_one_task_is_not_charged_to_the_next(engine):
    peaks = [done(engine, 0, step_of("resident")).receipt.peak_bytes or 0 for _ in range(3)]
    assert max(peaks) - min(peaks) < MIB
    params = copied(initial_params(HEAVY, 0))
    assert max(peaks) > num_bytes(params), "what is received is part of the peak"


DEEP_BYTES = 16 * WIDTH * WIDTH * 9 * 4


def deep() -> nn.Module:
    """16 units of 2.25 MiB."""
    widths = [1, *[WIDTH] * 17]
    units = [nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.ReLU()) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*units, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 3)))


def test_a_client_trains_and_sends_a_model_that_its_memory_does_not_hold(engine):
    """Block after block, each read from the disk for its turn, and from there sent tensor by tensor."""
    method = ScaleFL(work=replace(WORK, epochs=1), blocks=18, mentor=None)
    state = method.init(ModelSpec.of("test_spool:deep"), PROBLEM, seed=0, smallest_memory_bytes=0)
    info = replace(engine.population()[0], memory_bytes=DEEP_BYTES // 2)
    plan = method.plan(state, [info])
    (task,) = plan.tasks
    assert task.moving >= {name for name, _ in deep().named_parameters()}
    orders = [(task, extract(state.params, plan.coords[0]))]
    (beside,) = engine.fit(method, orders)
    assert isinstance(beside, ClientUpdate), beside
    peak = beside.receipt.peak_bytes or 0
    assert 0 < peak < plan.costs[0].peak_bytes + 2 * MIB < DEEP_BYTES * 2 // 3
    assert beside.receipt.bytes_up == num_bytes(beside.params) > DEEP_BYTES
    with LocalEngine(DATA, Clients(DATA, (10**12,))) as here:
        (alone,) = here.fit(method, orders)
        assert isinstance(alone, ClientUpdate)
        assert identical(alone.params, beside.params)


def test_what_is_not_kept_is_forgotten():
    params = initial_params(HEAVY, 0)
    with closing(TaskParams(ClientTask(0, 0, (step_of("streamed"),), 0))) as store:
        received(store, params)
        store.keep(frozenset({"0.1.0.weight", "1.0.weight"}))
        assert set(store) == {"0.1.0.weight", "1.0.weight"}
        assert identical(dict(store), {name: params[name] for name in store})
        assert num_bytes(store) == sum(params[name].nbytes for name in store)
        with pytest.raises(KeyError):
            store["0.2.0.weight"]
