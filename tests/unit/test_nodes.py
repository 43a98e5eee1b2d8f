"""Clients on nodes: what crosses, what is kept, and what becomes of nodes that fail."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import pytest
import torch

from scalefl.engines import remote
from scalefl.engines.codec import Allowed
from scalefl.engines.flower.grid import from_records, in_process, to_records
from scalefl.engines.local import LocalEngine
from scalefl.engines.messages import (
    DTYPES,
    Offer,
    Parcel,
    Update,
    WhoAreYou,
    digest,
    expanded,
    halved,
    pack,
    reduced,
    restored,
    tensor_of,
    unpack,
)
from scalefl.engines.node import Node, TensorCache
from scalefl.engines.remote import Answer, Patience, RemoteEngine
from scalefl.errors import EmptyCohort
from scalefl.loop import federate
from scalefl.params import num_bytes
from scalefl.problem import Problem
from scalefl.sampling import UniformSampler
from scalefl.types import ClientInfo
from support import PROBLEM, Clients, MadeData, full_bytes, identical, make_method, play, spec

SIZES = [8, 20, 9, 17]
DATA = MadeData(SIZES)
CLIENTS = Clients(DATA, (2 * full_bytes(),))
TESTS = Allowed(("support:*",))
HASTY = Patience(poll_seconds=0.001, deadline_seconds=0.3, meeting_seconds=0.1, absence_seconds=0.0)
Tamper = Callable[[Parcel], Parcel | str | None]


def node_of(client: int, engine: LocalEngine, problem: Problem, cache: TensorCache, allowed: Allowed = TESTS) -> Node:
    def engine_for(asked: Problem) -> LocalEngine:
        if asked != problem:
            raise ValueError(f"the run is about {asked}")
        return engine

    return Node(client, engine_for, lambda: engine.population()[client], cache, allowed)


@dataclass
class Lab:
    """Nodes in this process, of which some do with their answers to tasks what `tampers` say (None: nothing comes)."""

    folder: Path
    data: MadeData = DATA
    engine: LocalEngine = field(default_factory=lambda: LocalEngine(DATA, CLIENTS))
    tampers: dict[int, Tamper] = field(default_factory=dict)
    present: list[int] = field(default_factory=lambda: [100, 101, 102, 103])
    ids: dict[int, int] = field(default_factory=dict)
    cache_bytes: int = 2**20
    out: dict[str, Callable[[], Parcel | str | None]] = field(default_factory=dict)
    sent: list[tuple[int, Parcel, int | None]] = field(default_factory=list)

    def node(self, number: int) -> Node:
        cache = TensorCache(self.folder / str(number), self.cache_bytes)
        return node_of(self.ids.get(number, number - 100), self.engine, self.data.problem, cache)

    def nodes(self) -> list[int]:
        return self.present

    def push(self, node: int, parcel: Parcel, *, round: int | None) -> str:
        self.sent.append((node, parcel, round))
        name = str(len(self.sent))
        tamper = self.tampers.get(node - 100) if round is not None else None

        def answer() -> Parcel | str | None:
            said = from_records(to_records(self.node(node).answer(from_records(to_records(parcel)))))
            return tamper(said) if tamper else said

        self.out[name] = answer
        return name

    def pull(self, messages: Iterable[str]) -> list[Answer]:
        found = []
        for name in [name for name in messages if name in self.out]:
            answer = self.out[name]()
            if answer is not None:
                del self.out[name]
                found.append(
                    Answer(name, None, answer, is_undone=True) if isinstance(answer, str) else Answer(name, answer)
                )
        return found


@pytest.fixture
def lab(tmp_path) -> Lab:
    return Lab(tmp_path)


def server(lab: Lab, patience: Patience = HASTY) -> RemoteEngine:
    return RemoteEngine(lab, PROBLEM, patience)


def rounds(lab: Lab, count: int = 1, name: str = "fedavg", patience: Patience = HASTY, **settings):
    return play(make_method(name, **settings), server(lab, patience), count, model=spec())


def with_header(parcel: Parcel, **changes) -> Parcel:
    return pack(msgspec.structs.replace(unpack(parcel, Update), **changes), parcel.tensors)


def with_first(parcel: Parcel, make) -> Parcel:
    name = min(parcel.tensors)
    return Parcel(parcel.header, {**parcel.tensors, name: make(parcel.tensors[name])})


def without_first(parcel: Parcel) -> Parcel:
    return Parcel(parcel.header, {n: t for n, t in parcel.tensors.items() if n != min(parcel.tensors)})


LIES: dict[str, tuple[Tamper, str]] = {
    "silent": (lambda parcel: None, "no answer by the deadline"),
    "killed": (lambda parcel: "Flower's error 8: app crashed", "Flower's error 8"),
    "nonsense": (lambda parcel: Parcel(b"?", {}), ""),
    "offer": (lambda parcel: pack(Offer(ClientInfo(2, 9, 1))), "answered something else: Offer"),
    "nan": (lambda parcel: with_first(parcel, lambda t: torch.full_like(t, float("nan"))), "NaN"),
    "shape": (lambda parcel: with_first(parcel, lambda t: t[:1]), "not torch"),
    "dtype": (lambda parcel: with_first(parcel, lambda t: t.double()), "float64"),
    "foreign": (lambda parcel: Parcel(parcel.header, {**parcel.tensors, "x": torch.ones(1)}), "x: not asked for"),
    "missing": (without_first, "missing"),
    "old round": (lambda parcel: with_header(parcel, round=-1), "answered something else: Update"),
    "other client": (lambda parcel: with_header(parcel, client_id=1), "answered something else: Update"),
    "weight": (lambda parcel: with_header(parcel, num_examples=10**9), "num_examples"),
    "negative": (lambda parcel: with_header(parcel, num_examples=-1), "num_examples"),
    "variance": (
        lambda parcel: Parcel(
            parcel.header, {n: -t if n.endswith("running_var") else t for n, t in parcel.tensors.items()}
        ),
        "a negative variance",
    ),
    "word": (
        lambda parcel: Parcel(parcel.header.replace(b"\xacnum_examples\x09", b"\xacnum_examples\xa1x"), {}),
        "int",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_node_that_fails_or_lies_is_lost_and_named(lab, lie):
    """The round goes on without it, and ends as if it had not been there; its next answer counts again."""
    tamper, cause = LIES[lie]
    lab.tampers[2] = tamper
    method = make_method("fedavg")
    states, records = play(method, server(lab), 1, model=spec())
    (lost,) = records[0].lost
    assert lost["client"] == 2 and cause in lost["cause"], lost
    others = [CLIENTS[i] for i in (0, 1, 3)]
    with LocalEngine(DATA, CLIENTS) as here:
        start = states[0]
        expected, _ = next(federate(method, here, lambda *_: others, start))
    assert identical(states[-1].params, expected.params)


def test_enough_answers_are_enough(lab):
    lab.tampers[2] = lambda parcel: None
    _, (record,) = rounds(lab, patience=replace(HASTY, deadline_seconds=60.0, quorum=0.75))
    assert [(loss["client"], loss["cause"]) for loss in record.lost] == [(2, "not waited for: enough others answered")]
    assert record.seconds < 30


def test_an_answer_after_its_round_does_not_count(lab):
    late: list[Parcel] = []

    def tardy(parcel: Parcel) -> Parcel | None:
        late.append(parcel)
        return None

    lab.tampers[2] = tardy
    engine = server(lab)
    states, _ = play(make_method("fedavg"), engine, 1, model=spec())
    lab.tampers[2] = lambda parcel: late[0]
    _, (record,) = play(make_method("fedavg"), engine, 1, state=states[-1])
    assert record.lost[0]["cause"].startswith("it answered something else: Update")


def test_nodes_come_and_go_and_tell_their_budgets(lab):
    engine = server(lab)
    assert [c.id for c in map(engine.population().__getitem__, range(4))] == [0, 1, 2, 3]
    lab.present = [101, 103]
    assert len(engine.population()) == 2 and engine.population()[1] == CLIENTS[3]
    lab.present = [101, 103, 100]
    assert [engine.population()[i].id for i in range(3)] == [0, 1, 3]
    lab.present = []
    with pytest.raises(EmptyCohort, match="0 of 0 connected nodes have said"):
        engine.population()


def test_a_node_that_leaves_after_the_plan_is_lost(lab):
    engine = server(lab)
    method = make_method("fedavg")
    state = method.init(spec(), PROBLEM, seed=1, smallest_memory_bytes=full_bytes())

    def sample(population, floor, state):
        cohort = UniformSampler(4)(population, floor, state)
        lab.present.remove(102)
        engine.population()
        return cohort

    _, record = next(federate(method, engine, sample, state))
    assert [(loss["client"], loss["cause"]) for loss in record.lost] == [(2, "its node has left")]


def test_two_nodes_of_one_client_are_one(lab, caplog):
    lab.ids = {103: 1}
    assert len(server(lab).population()) == 3
    assert "another one is client 1 already" in caplog.text


@pytest.mark.parametrize("precision", ["exact", "float16"])
def test_only_what_a_node_lacks_is_sent(lab, precision):
    """Frozen tensors cross once; what moves crosses each time; a node that has forgotten says so and is sent all."""
    engine = RemoteEngine(lab, PROBLEM, HASTY, precision=precision)
    method = make_method("sbt", blocks=["0", "1"], growth={"kind": "sequential", "rounds": 5})
    states, _ = play(method, engine, 1, model=spec())
    state = states[-1]
    while method.plan(state, [CLIENTS[0]]).stage == method.plan(states[0], [CLIENTS[0]]).stage:
        states, _ = play(method, engine, 1, state=state)
        state = states[-1]
    (task,) = method.plan(state, [CLIENTS[0]]).tasks
    lab.sent.clear()
    play(method, engine, 2, state=state)
    orders = [parcel for node, parcel, round in lab.sent if node == 100]
    assert orders[0].tensors.keys() > task.moving, "the prefix of a new stage"
    assert orders[1].tensors.keys() == task.moving
    lab.cache_bytes = 0
    for path in lab.folder.glob("*/*"):
        path.unlink()
    lab.sent.clear()
    states, (record,) = play(method, engine, 1, state=state)
    again = [parcel for node, parcel, round in lab.sent if node == 100]
    assert record.lost == [] and [p.tensors.keys() == task.moving for p in again] == [True, False]
    assert record.bytes_down == sum(parcel.num_bytes for _, parcel, round in lab.sent if round is not None)


def test_a_node_refuses_what_is_not_its_own(lab, tmp_path):
    lab.engine = LocalEngine(DATA, CLIENTS)
    lab.data = MadeData(SIZES, replace(PROBLEM, num_classes=PROBLEM.num_classes + 1))
    with pytest.raises(Exception, match="refused: ValueError: the run is about"):
        rounds(lab)
    other = node_of(1, LocalEngine(DATA, CLIENTS), PROBLEM, TensorCache(tmp_path, 0))
    order = next(parcel for node, parcel, round in lab.sent if node == 100 and round is not None)
    assert b"another client's" in other.answer(order).header
    foreign = node_of(0, LocalEngine(DATA, CLIENTS), PROBLEM, TensorCache(tmp_path, 0), Allowed())
    assert b"NotAllowed: support:tiny is not on this node's list" in foreign.answer(order).header
    damaged = with_first(order, lambda t: t + 1)
    here = node_of(0, LocalEngine(DATA, CLIENTS), PROBLEM, TensorCache(tmp_path, 0))
    assert b"was damaged on its way" in here.answer(damaged).header
    assert b"refused" in here.answer(Parcel(b"\x00", {})).header


def test_caches_keep_to_their_limit_and_find_damage(tmp_path):
    cache = TensorCache(tmp_path / "new", 40_000)
    tensors = [torch.full((1000,), float(i)) for i in range(12)]
    names = [digest(t) for t in tensors]
    for name, tensor in zip(names, tensors, strict=True):
        cache.put(name, tensor)
        assert cache.get(names[0]) is not None, "used each time: never the one to go"
    assert sum(path.stat().st_size for path in (tmp_path / "new").iterdir()) <= 40_000
    held = [name for name in names if cache.get(name) is not None]
    assert names[0] in held and names[-1] in held and len(held) == 9
    path = next(p for p in (tmp_path / "new").iterdir() if names[-1].hex() in p.name)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert cache.get(names[-1]) is None and not path.exists()
    path.write_bytes(b"short")
    assert cache.get(names[-1]) is None
    TensorCache(Path("/proc/nowhere"), 40_000).put(names[0], tensors[0])  # as a disk that is full: nothing is kept


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_cross_as_they_are(dtype):
    kind = DTYPES[dtype]
    sent = {"a": torch.arange(6).view(2, 3).to(kind), "t": torch.arange(6).view(2, 3).t().to(kind)}
    sent |= {"scalar": torch.tensor(1).to(kind), "none": torch.ones(0, 2).to(kind)}
    arrived = from_records(to_records(Parcel(b"h", sent)))
    assert arrived.header == b"h" and identical(arrived.tensors, sent)
    arrived.tensors["a"].zero_()
    assert not identical(arrived.tensors, sent), "memory of its own"


@pytest.mark.parametrize(
    ("dtype", "shape", "size"), [("float32", (2,), 7), ("float32", (-1, -2), 8), ("complex64", (1,), 8), ("x", (), 4)]
)
def test_tensors_that_are_none_are_refused(dtype, shape, size):
    with pytest.raises(ValueError):
        tensor_of(dtype, shape, bytes(size))


def test_a_thousand_nodes_are_no_state(tmp_path):
    """The server holds what nodes offer and the digests of what they have; digests of old rounds go."""
    data = MadeData([8] * 40)
    clients = Clients(data, (2 * full_bytes(),))
    with in_process(LocalEngine(data, clients), PROBLEM) as engine:
        states, records = play(make_method("fedavg"), engine, 6, model=spec(), cohort=30)
        assert all(record.lost == [] for record in records)
        largest = max(len(peer.has) for peer in engine._peers.values())
    assert largest <= len(states[0].params)
    assert records[-1].bytes_up > 30 * num_bytes(states[0].params)


def away() -> Tamper:
    """The node goes away twice over its task, as Flower reports it, and is there for the third try."""
    answers = ["Flower's error 5: node unavailable", "Flower's error 5: still"]

    def tamper(parcel: Parcel) -> Parcel | str | None:
        return answers.pop(0) if answers else parcel

    return tamper


def test_a_task_whose_node_went_away_is_sent_again_when_it_is_back(lab, monkeypatch):
    """The round ends as if nothing had been, and counts the bytes of all tries."""
    monkeypatch.setattr(remote, "_LOOK_SECONDS", 0.01)
    calm, _ = rounds(Lab(lab.folder / "calm"))
    lab.tampers[2] = away()
    patience = replace(HASTY, deadline_seconds=30.0, absence_seconds=20.0)
    states, (record,) = rounds(lab, patience=patience)
    assert record.lost == [] and identical(states[-1].params, calm[-1].params)
    orders = [parcel for node, parcel, round in lab.sent if node == 102 and round is not None]
    assert len(orders) == 3
    assert record.bytes_down == sum(parcel.num_bytes for _, parcel, round in lab.sent if round is not None)


def test_a_node_that_does_not_come_back_in_time_is_lost(lab):
    patience = replace(HASTY, deadline_seconds=60.0, absence_seconds=0.05)

    def leaves(parcel: Parcel) -> str:
        lab.present = [100, 101, 103]
        return "Flower's error 5: node unavailable"

    lab.tampers[2] = leaves
    _, (record,) = rounds(lab, patience=patience)
    assert [(loss["client"], loss["cause"]) for loss in record.lost] == [(2, "Flower's error 5: node unavailable")]
    assert record.seconds < 30


@pytest.mark.parametrize("is_private", [False, True])
def test_a_task_that_its_node_has_forgotten_is_sent_again(lab, monkeypatch, is_private):
    """As a node that was restarted forgets: it answers what is asked after, and never the task."""
    monkeypatch.setattr(remote, "_LOOK_SECONDS", 0.001)
    calm, _ = rounds(Lab(lab.folder / "calm"))
    forgotten: list[str] = []
    push = lab.push

    def push_and_forget(node: int, parcel: Parcel, *, round: int | None) -> str:
        name = push(node, parcel, round=round)
        if node == 102 and round is not None and not forgotten:
            forgotten.append(name)
            lab.out[name] = lambda: None
        return name

    lab.push = push_and_forget  # type: ignore[method-assign]
    patience = replace(HASTY, deadline_seconds=30.0, doubt_seconds=0.02)
    engine = RemoteEngine(lab, PROBLEM, patience, is_private=is_private)
    states, (record,) = play(make_method("fedavg"), engine, 1, model=spec())
    questions = [unpack(parcel, WhoAreYou) for _, parcel, round in lab.sent if round is None]
    assert len(questions) > 4 and all(question.is_private is is_private for question in questions)
    assert record.lost == [] and record.seconds < 20
    assert identical(states[-1].params, calm[-1].params) or is_private, "then weights are not told"


def test_what_a_node_offers_is_taken_from_each_answer(lab):
    """A budget that has changed counts from the next round on, without a question."""
    engine = server(lab)
    states, _ = play(make_method("fedavg"), engine, 1, model=spec())
    smaller = Clients(DATA, (full_bytes() + 1,))
    lab.engine = LocalEngine(DATA, smaller)
    play(make_method("fedavg"), engine, 1, state=states[-1])
    assert engine.population().largest_memory_bytes == full_bytes() + 1
    questions = [node for node, _, round in lab.sent if round is None]
    assert sorted(questions) == [100, 101, 102, 103], "each was asked once"


def test_nodes_that_were_not_heard_for_long_are_asked_again_and_not_waited_for(lab):
    engine = server(lab, replace(HASTY, fresh_seconds=0.0))
    engine.population()
    lab.engine = LocalEngine(DATA, Clients(DATA, (full_bytes() + 1,)))
    engine.population()
    assert engine.population().largest_memory_bytes == full_bytes() + 1
    questions = [node for node, _, round in lab.sent if round is None]
    assert questions.count(100) > 1


def test_a_node_that_was_away_says_anew_what_it_offers(lab):
    engine = server(lab)
    engine.population()
    lab.present = [100, 101, 103]
    engine.population()
    lab.engine = LocalEngine(DATA, Clients(DATA, (full_bytes() + 1,)))
    lab.present = [100, 101, 102, 103]
    found = {client.id: client.memory_bytes for client in engine.population().clients}
    assert found[2] == full_bytes() + 1 and found[1] == 2 * full_bytes()


def test_a_round_waits_until_enough_clients_are_there(lab, monkeypatch):
    monkeypatch.setattr(remote, "_LOOK_SECONDS", 0.01)
    lab.present = [100]
    engine = server(lab, replace(HASTY, min_clients=3, absence_seconds=0.2))
    with pytest.raises(EmptyCohort, match="1 of 1 connected nodes have said what they offer; a round needs 3"):
        engine.population()
    looks: list[int] = []
    nodes = lab.nodes

    def arriving() -> list[int]:
        looks.append(1)
        lab.present = [100, 101, 102][: len(looks)]
        return nodes()

    lab.nodes = arriving  # type: ignore[method-assign]
    assert len(server(lab, replace(HASTY, min_clients=3, absence_seconds=0.5)).population()) == 3


def test_a_mute_node_holds_up_one_round_only(lab, caplog):
    push = lab.push

    def deaf(node: int, parcel: Parcel, *, round: int | None) -> str:
        name = push(node, parcel, round=round)
        if node == 103:
            lab.out[name] = lambda: None
        return name

    lab.push = deaf  # type: ignore[method-assign]
    engine = server(lab, replace(HASTY, meeting_seconds=0.3))
    assert len(engine.population()) == 3 and "node 103 has not said what it offers" in caplog.text
    start = time.monotonic()
    assert len(engine.population()) == 3
    assert time.monotonic() - start < 0.2


def test_halved_tensors_are_close_and_half_as_large(lab):
    """Clients start from weights rounded by 2⁻¹¹, and send differences, which the server adds to its exact ones."""
    whole, (exact,) = rounds(Lab(lab.folder / "exact"))
    engine = RemoteEngine(lab, PROBLEM, HASTY, precision="float16")
    half, (record,) = play(make_method("fedavg"), engine, 1, model=spec())
    assert record.lost == []
    halves = 4 * sum(tensor.nbytes / 2 for tensor in whole[0].params.values() if tensor.ndim > 1)
    assert record.bytes_up < 0.65 * exact.bytes_up and exact.bytes_down - record.bytes_down > 0.9 * halves
    for name, tensor in whole[-1].params.items():
        change = (tensor - whole[0].params[name]).abs().max()
        error = (tensor - half[-1].params[name]).abs().max()
        assert error <= 0.03 * change, name
    counters = [name for name in whole[-1].params if name.endswith("num_batches_tracked")]
    assert counters and all(torch.equal(whole[-1].params[n], half[-1].params[n]) for n in counters)


def test_what_is_halved_on_its_way_down_is_not_halved_on_the_server(lab):
    """A client that changes nothing costs no rounding: its difference is zero."""
    weight = 1 + torch.rand(4, 4) * 1e-5
    wire, scale = halved(weight)
    started = restored({"w": wire}, {"w": scale})
    assert not torch.equal(started["w"], weight), "else this shows nothing"
    differences, scales = reduced(started, started)
    assert torch.equal(expanded(differences, scales, {"w": weight})["w"], weight)


@pytest.mark.parametrize(
    ("scales", "cause"), [({"foreign": 1.0}, "a difference from nothing"), ({"0.0.weight": float("nan")}, "NaN")]
)
def test_scales_that_are_lies_cost_their_client(lab, scales, cause):
    lab.tampers[2] = lambda parcel: with_header(parcel, scales=scales)
    _, (record,) = rounds(lab)
    assert [loss["client"] for loss in record.lost] == [2] and cause in record.lost[0]["cause"]


def test_reduced_tensors_expand_to_what_they_were():
    base = {"w": torch.randn(50), "same": torch.ones(3), "count": torch.tensor(7), "nan": torch.ones(2)}
    after = {"w": base["w"] + 1e-6 * torch.randn(50), "same": torch.ones(3), "count": torch.tensor(9)}
    after["nan"] = torch.tensor([float("nan"), 1.0])
    tensors, scales = reduced(after, base)
    assert tensors["w"].dtype == torch.float16 and tensors["count"].dtype == torch.int64
    assert "nan" not in scales and torch.isnan(tensors["nan"]).any(), "seen by whoever checks updates"
    back = expanded(tensors, scales, base)
    assert torch.equal(back["same"], after["same"]) and torch.equal(back["count"], after["count"])
    assert (back["w"] - after["w"]).abs().max() <= 2e-3 * (after["w"] - base["w"]).abs().max()
