"""What every method promises, on every engine. A new line in `METHODS` or `PRESETS` is tested by being there."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch

import scalefl.engines.local
from scalefl.checkpoint import load_deployed, load_state, save_state
from scalefl.coords import extract
from scalefl.engines.flower.grid import in_process
from scalefl.engines.local import LocalEngine
from scalefl.methods import METHODS, PRESETS
from scalefl.models.skeleton import tensors
from scalefl.params import num_bytes
from scalefl.planner import least
from scalefl.record import RoundRecord
from scalefl.rng import derive, generator
from scalefl.sampling import UniformSampler
from scalefl.types import ClientInfo, Collects, Engine, LocalWork, Method, RoundPlan, ServerState
from support import (
    PROBLEM,
    WORK,
    Clients,
    MadeData,
    comparable,
    full_bytes,
    global_rng,
    identical,
    make_method,
    play,
    spec,
)

ROUNDS, COHORT = 4, 4
NODES = "nodes"
IN_BLOCKS = ("depthfl", "fedepth", "profl", "scalefl", "slt", *PRESETS)
BLOCKS = ["0", "1"]
# Rows of each client: one batch, several, one row, a single leftover; client 3, 7, … have one class.
SIZES = [8, 20, 5, 9, 17, 1, 12, 30]
# Everything, less than full training, the cheaper blocks, with micro-batches only.
BUDGETS = tuple(int(share * full_bytes()) for share in (1.3, 0.95, 1.3, 0.9))

ALL: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in [*METHODS, *PRESETS]},
    "fedavg all": {"name": "fedavg", "population": "all"},
    "fedavg all_small": {"name": "fedavg", "population": "all_small"},
    "fedavg micro": {"name": "fedavg", "means": {"micro_batch_size": "auto", "smallest_micro_batch": 2}},
    "fedavg adam": {"name": "fedavg", "server": {"kind": "fedadam"}},
    "depthfl feddyn": {"name": "depthfl", "feddyn": {"clients": 8, "alpha": 0.3}},
    "depthfl micro": {"name": "depthfl", "ramp_rounds": 3, "means": {"micro_batch_size": "auto", "recompute": "auto"}},
    "fedepth micro": {"name": "fedepth", "means": {"micro_batch_size": "auto", "smallest_micro_batch": 2}},
    "profl short": {"name": "profl", "window": 2, "threshold": 10.0, "longest": 2, "server": {"kind": "fedavgm"}},
    "profl growing": {"name": "profl", "shrinking": False, "longest": 1},
    "slt short": {"name": "slt", "rounds": 3},
    "scalefl micro momentum": {
        "name": "scalefl",
        "means": {"micro_batch_size": "auto", "smallest_micro_batch": 2},
        "server": {"kind": "fedavgm"},
    },
    "scalefl converged": {
        "name": "scalefl",
        "spans": "single",
        "coadapted_layers": 0,
        "means": {"micro_batch_size": "auto", "smallest_micro_batch": 4},
        "growth": {"kind": "converged", "threshold": 10.0, "patience": 1},
        "mentor": {
            "lambda_max": 0.1,
            "gamma_max": 0.1,
            "form": "cca",
            "tap": "cut",
            "projection": "linear",
            "schedule": {"kind": "constant"},
        },
    },
    "heterofl running": {"name": "heterofl", "statistics": "running", "own_classes": False, "rates": [1.0, 0.5, 0.2]},
    "heterofl micro": {"name": "heterofl", "means": {"micro_batch_size": "auto", "smallest_micro_batch": 4}},
    "fedrolex random": {"name": "fedrolex", "window": "random", "server": {"kind": "fedavgm"}},
    "scalefl counted": {"name": "scalefl", "blocks": 2},
    "scalefl elastic": {"name": "scalefl", "spans": "elastic"},
    "scalefl elastic without tails": {"name": "scalefl", "spans": "elastic", "tails": False, "outputs": "plain"},
    "scalefl memory": {
        "name": "scalefl",
        "blocks": "memory",
        "means": {"micro_batch_size": "auto", "smallest_micro_batch": 4},
        "coadapted_layers": 0,
    },
}


@cache
def method_of(case: str) -> Method:
    settings = dict(ALL[case])
    name = settings.pop("name")
    if name in IN_BLOCKS:
        settings.setdefault("blocks", BLOCKS)
    if case in ("sbt", "scalefl-no-growth"):
        settings["growth"] = {"kind": "sequential", "rounds": 1}
    return make_method(name, work=replace(WORK, lr_schedule="cosine", lr_rounds=9), **settings)


DATA = MadeData(SIZES)
CLIENTS = Clients(DATA, BUDGETS)


@pytest.fixture(scope="module")
def engines() -> Iterator[dict[int | str, Engine]]:
    """An engine in this process, ones with one and two workers, and one whose clients are Flower's nodes."""
    with (
        LocalEngine(DATA, CLIENTS) as here,
        LocalEngine(DATA, CLIENTS, workers=1) as beside,
        LocalEngine(DATA, CLIENTS, workers=2) as apart,
        in_process(LocalEngine(DATA, CLIENTS), PROBLEM) as nodes,
    ):
        yield {0: here, 1: beside, 2: apart, NODES: nodes}


@dataclass
class Played:
    """A few rounds, and what was planned in each."""

    method: Method
    states: list[ServerState]
    records: list[RoundRecord]
    cohorts: list[list[ClientInfo]]
    plans: list[RoundPlan]
    collections: list[RoundPlan | None]


RUNS: dict[tuple[str, int], Played] = {}


def played(case: str, workers: int, engines: dict[int, LocalEngine]) -> Played:
    if (case, workers) not in RUNS:
        method = method_of(case)
        rng = global_rng()
        states, records = play(method, engines[workers], ROUNDS, cohort=COHORT)
        assert global_rng() == rng, "the global generators are not as before"
        cohorts = [UniformSampler(COHORT)(CLIENTS, method.floor_bytes(s), s) for s in states[:-1]]
        plans = [method.plan(s, c) for s, c in zip(states, cohorts, strict=False)]
        collections = [collection(method, s) for s in states[1:]]
        RUNS[case, workers] = Played(method, states, records, cohorts, plans, collections)
    return RUNS[case, workers]


def collection(method: Method, state: ServerState) -> RoundPlan | None:
    """How norms' statistics are collected after a round, by methods that do so."""
    floor = method.collection_floor_bytes(state) if isinstance(method, Collects) else None
    if floor is None:
        return None
    return method.collection(state, UniformSampler(COHORT)(CLIENTS, floor, state))


each_case = pytest.mark.parametrize("case", ALL)
each_engine = pytest.mark.parametrize("workers", [0, 2])


@each_case
@each_engine
def test_rounds_train(case, workers, engines):
    """Finite loss, nobody lost, and only what was planned moves; all else keeps its bits, names, shapes, dtypes."""
    run = played(case, workers, engines)
    rounds = zip(run.states, run.states[1:], run.records, run.plans, run.collections, strict=False)
    for before, after, record, plan, collection in rounds:
        assert record.lost == []
        assert (before.round + 1, after.round) == (record.round, record.round)
        assert all(math.isfinite(v) for v in record.train.values())
        assert 0 <= record.train["accuracy"] <= 1 and record.train["loss"] > 0
        moving = frozenset().union(*(task.moving for task in (*plan.tasks, *(collection.tasks if collection else ()))))
        assert before.params.keys() == after.params.keys()
        moved = {n for n in before.params if not identical({n: before.params[n]}, {n: after.params[n]})}
        assert moved and moved <= moving
        for name, tensor in after.params.items():
            assert (tensor.shape, tensor.dtype) == (before.params[name].shape, before.params[name].dtype)
            assert bool(tensor.isfinite().all())
            assert not tensor.requires_grad


@each_case
@each_engine
def test_the_record_tells_the_truth(case, workers, engines):
    run = played(case, workers, engines)
    for state, record, plan, after in zip(run.states, run.records, run.plans, run.collections, strict=False):
        down = up = 0
        for each in (plan, *([after] if after else [])):
            for task in each.tasks:
                sent = {**extract(state.params, each.coords[task.client_id]), **each.own.get(task.client_id, {})}
                down, up = down + num_bytes(sent), up + num_bytes({n: sent[n] for n in task.moving})
        assert (record.bytes_down, record.bytes_up) == (down, up)
        assert record.collected == (sorted(task.client_id for task in after.tasks) if after else [])
        ids = sorted(task.client_id for task in plan.tasks)
        assert sorted(i for members in record.rungs.values() for i in members) == ids
        assert record.num_examples == sum(SIZES[i] for i in ids)
        more = list(after.costs.values()) if after else []
        assert record.predicted_peak_bytes == max(c.peak_bytes for c in [*(plan.costs[i] for i in ids), *more])
        assert record.stage == plan.stage
        epochs = method_of(case).work.epochs
        flops = sum(plan.costs[i].flops_per_example * SIZES[i] * epochs for i in ids)
        flops += sum(c.flops_per_example * SIZES[i] for i, c in after.costs.items()) if after else 0
        assert record.flops == pytest.approx(flops)
        assert record.simulated_seconds > 0 and record.seconds > 0


@each_case
def test_gate_menu_and_plan_agree(case, engines):
    """Whoever passes the gate has something to do, and what it is asked to do fits its budget."""
    run = played(case, 0, engines)
    settings = ALL[case]
    for state, cohort, plan in zip(run.states, run.cohorts, run.plans, strict=False):
        floor, menu = run.method.floor_bytes(state), run.method.menu(state)
        assert {task.client_id for task in plan.tasks} == {client.id for client in cohort}
        assert len(plan.tasks) == len(cohort)
        work = run.method.work.at_round(state.round)
        offered = {offer.label: least(offer, PROBLEM, run.method.objective) for offer in menu}
        assert len(offered) == len(menu)
        for task in plan.tasks:
            client, cost = plan.clients[task.client_id], plan.costs[task.client_id]
            assert floor <= cost.peak_bytes
            assert sum(size for _, size in cost.terms) == cost.peak_bytes
            if settings.get("population") != "all":
                assert cost.peak_bytes <= client.memory_bytes
            works = {replace(step.work, clip_norm=work.clip_norm) for step in task.steps}
            assert works == {work}, "hyperparameters are the run's, not the client's"
            labels = [rung.partition(",")[0] for rung in plan.rungs[task.client_id].split(" + ")]
            assert len(labels) == len(task.steps)
            assert all(offered[label].cost.peak_bytes <= cost.peak_bytes for label in labels)
            assert plan.coords[task.client_id].keys() >= task.moving - plan.own.get(task.client_id, {}).keys()
            assert plan.coords[task.client_id].keys() <= state.params.keys()
        # A client with a byte less than the floor could not have been planned for.
        if floor:
            poor = replace(cohort[0], memory_bytes=floor - 1)
            poor_plan = run.method.plan(state, [poor])
            assert all(poor_plan.costs[t.client_id].peak_bytes > floor - 1 for t in poor_plan.tasks)
            exact = replace(cohort[0], memory_bytes=floor)
            exact_plan = run.method.plan(state, [exact])
            assert [exact_plan.costs[t.client_id].peak_bytes for t in exact_plan.tasks] == [floor]


@each_case
def test_the_result_does_not_depend_on_workers(case, engines):
    runs = [played(case, workers, engines) for workers in (0, 1, 2)]
    for other in runs[1:]:
        for a, b in zip(runs[0].states, other.states, strict=True):
            assert identical(a.params, b.params) and identical(a.aux.tensors, b.aux.tensors)
            assert a.aux.values == b.aux.values
        assert [comparable(r) for r in runs[0].records] == [comparable(r) for r in other.records]


@each_case
def test_clients_at_once_get_what_each_gets_alone(case, monkeypatch):
    """In one vectorised run, up to rounding; all have the memory that they like, or they would train in pieces."""
    bundles, run = [], scalefl.engines.local.at_once

    def noting(method, problem, residents, tasks, *rest):
        updates = run(method, problem, residents, tasks, *rest)
        bundles.append(0 if updates is None else len(tasks))
        return updates

    monkeypatch.setattr(scalefl.engines.local, "at_once", noting)
    rich = Clients(DATA, (10 * full_bytes(),))
    method = method_of(case)
    with LocalEngine(DATA, rich) as alone, LocalEngine(DATA, rich, clients_at_once=3) as together:
        wanted, records = play(method, alone, ROUNDS, cohort=8)
        assert bundles == []
        found, others = play(method, together, ROUNDS, cohort=8)
    assert bundles and 0 not in bundles
    start = wanted[0].params
    names = sorted(name for name, t in wanted[-1].params.items() if name in start and start[name].shape == t.shape)
    moved, other = (
        torch.cat([(s[-1].params[n] - start[n]).double().flatten() for n in names]) for s in (wanted, found)
    )
    assert (other - moved).norm() <= 0.001 * moved.norm()
    for one, two in zip(records, others, strict=True):
        assert one.train == pytest.approx(two.train, rel=1e-3)
        assert replace(comparable(one), train={}) == replace(comparable(two), train={})


@each_case
def test_the_result_is_the_same_on_nodes(case, engines):
    """Over a grid: every bit of the states, and what is recorded but for bytes, which are those that crossed."""
    here, there = played(case, 0, engines), played(case, NODES, engines)
    for a, b in zip(here.states, there.states, strict=True):
        assert identical(a.params, b.params) and identical(a.aux.tensors, b.aux.tensors)
        assert a.aux.values == b.aux.values
    for a, b in zip(here.records, there.records, strict=True):
        assert b.bytes_down > 0 and b.bytes_up > a.bytes_up
        same = {"bytes_down": 0, "bytes_up": 0, "simulated_seconds": 0.0}
        assert replace(comparable(a), **same) == replace(comparable(b), **same)


@each_case
def test_deploy_loads_into_the_users_module(case, engines):
    run = played(case, 0, engines)
    model, params = run.method.deploy(run.states[-1])
    module = model.build(0)
    module.load_state_dict(dict(params), strict=True)
    assert identical(tensors(module), dict(params))
    assert bool(module.eval()(DATA.test["x"]).isfinite().all())
    if ALL[case].get("population") != "all_small" and ALL[case]["name"] not in ("depthfl", "slt"):
        spec().build(0).load_state_dict(dict(params), strict=True)


@each_case
def test_what_is_deployed_can_be_loaded_without_the_method(case, engines, tmp_path):
    run = played(case, 0, engines)
    model, params = run.method.deploy(run.states[-1])
    save_state(tmp_path / "state.safetensors", run.states[-1], (model, params))
    found, loaded = load_deployed(tmp_path / "state.safetensors")
    assert found == model and identical(loaded, dict(params))


@each_case
def test_resuming_from_a_file_changes_nothing(case, engines, tmp_path):
    run = played(case, 0, engines)
    half = run.states[2]
    save_state(tmp_path / "state.safetensors", half, run.method.deploy(half))
    loaded = load_state(tmp_path / "state.safetensors", half.model, half.problem)
    save_state(tmp_path / "again.safetensors", loaded, run.method.deploy(loaded))
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "state.safetensors").read_bytes()
    assert identical(loaded.params, half.params) and identical(loaded.aux.tensors, half.aux.tensors)
    assert (loaded.round, loaded.seed, loaded.aux.values) == (half.round, half.seed, half.aux.values)
    states, records = play(run.method, engines[2], ROUNDS - 2, state=loaded, cohort=COHORT)
    for a, b in zip(states, run.states[2:], strict=True):
        assert identical(a.params, b.params) and identical(a.aux.tensors, b.aux.tensors)
        assert (a.round, a.aux.values) == (b.round, b.aux.values)
    assert [comparable(r) for r in records] == [comparable(r) for r in run.records[2:]]


@each_case
def test_the_seed_decides(case, engines):
    run = played(case, 0, engines)
    again, _ = play(run.method, engines[0], 2, cohort=COHORT)
    assert all(identical(a.params, b.params) for a, b in zip(again, run.states, strict=False))
    other, _ = play(run.method, engines[0], 1, cohort=COHORT, seed=2)
    assert not identical(other[0].params, run.states[0].params)
    assert not identical(other[1].params, run.states[1].params)


@each_case
def test_methods_are_frozen_values(case):
    method = method_of(case)
    copy = pickle.loads(pickle.dumps(method))
    assert copy == method and hash(copy) == hash(method)
    with pytest.raises(AttributeError):
        method.work = LocalWork()  # type: ignore[misc]


@each_case
def test_rounds_do_not_touch_older_states(case, engines):
    """A state is a value: going on from it twice gives the same, and leaves it as it was."""
    run = played(case, 0, engines)
    start = run.states[1]
    before = {name: t.clone() for name, t in start.params.items()}
    for workers in (0, 2):
        states, _ = play(run.method, engines[workers], 1, state=start, cohort=COHORT)
        assert identical(states[1].params, run.states[2].params)
    assert identical(start.params, before)


@each_case
def test_training_learns(case):
    """Ten more rounds lower the loss on held-out data: wiring that trains nothing would pass all else."""
    data = MadeData([24] * 6)
    method = method_of(case)
    with LocalEngine(data, Clients(data, (2 * full_bytes(),))) as engine:
        states, _ = play(method, engine, 9, cohort=4)

    def loss(state: ServerState) -> float:
        model, params = method.deploy(state)
        module = model.build(0)
        module.load_state_dict(dict(params))
        with torch.no_grad():
            return float(torch.nn.functional.cross_entropy(module.eval()(data.test["x"]), data.test["label"]))

    assert loss(states[-1]) < loss(states[0])


# Reductions: methods that must be FedAvg under some settings, to the bit.


def params_of(method: Method, budgets: tuple[int, ...] = (2 * full_bytes(),), rounds: int = 3) -> dict[str, Any]:
    with LocalEngine(DATA, Clients(DATA, budgets)) as engine:
        states, records = play(method, engine, rounds, cohort=COHORT)
    _, params = method.deploy(states[-1])
    assert all(record.lost == [] for record in records)
    return dict(params)


@pytest.fixture(scope="module")
def fedavg() -> dict[str, Any]:
    return params_of(make_method("fedavg"))


@pytest.mark.parametrize("spans", ["single", "elastic", "all"])
@pytest.mark.parametrize("mentor", [None, {"lambda_max": 0.0, "gamma_max": 0.0}])
@pytest.mark.parametrize("blocks", [1, []])
def test_scalefl_with_one_block_is_fedavg(fedavg, spans, mentor, blocks):
    assert identical(params_of(make_method("scalefl", blocks=blocks, spans=spans, mentor=mentor)), fedavg)


@pytest.mark.parametrize("blocks", [1, [], BLOCKS])
def test_fedepth_where_the_whole_model_fits_is_fedavg(fedavg, blocks):
    assert identical(params_of(make_method("fedepth", blocks=blocks)), fedavg)


def test_a_client_of_fedepth_trains_all_blocks_one_after_another(fedavg):
    budget = (int(0.95 * full_bytes()),)
    clients, method = Clients(DATA, budget), make_method("fedepth", blocks=BLOCKS)
    state = method.init(spec(), PROBLEM, seed=1, smallest_memory_bytes=0)
    for task in method.plan(state, [clients[i] for i in range(COHORT)]).tasks:
        trained = [step.trainable for step in task.steps]
        assert len(trained) > 1
        assert all(a.isdisjoint(b) for a, b in itertools.combinations(trained, 2))
        assert frozenset().union(*trained) >= {name for name, _ in spec().build(0).named_parameters()}
    assert not identical(params_of(method, budget), fedavg)


@pytest.mark.parametrize("spans", ["elastic", "all"])
def test_the_models_own_loss_comes_before_a_longer_span(spans):
    method = make_method("scalefl", blocks=BLOCKS, mentor=None, spans=spans, coadapted_layers=0)
    state = method.init(spec(), PROBLEM, seed=1, smallest_memory_bytes=0)
    peaks = {offer.label: least(offer, PROBLEM, method.objective).cost.peak_bytes for offer in method.menu(state)}
    budget = peaks["blocks 1-2 with tail"] - 1
    assert max(peaks["block 1 with tail"], peaks["blocks 1-2"]) <= budget
    (task,) = method.plan(state, [Clients(DATA, (budget,))[0]]).tasks
    first = task.steps[0]
    assert first.part.output is None and any(name.startswith("0.") for name in first.trainable)
    assert not any(name.startswith("1.") for name in first.trainable)


def test_a_block_that_fits_by_no_means_is_left_out_by_fedepth():
    method = make_method("fedepth", blocks=BLOCKS)
    state = method.init(spec(), PROBLEM, seed=1, smallest_memory_bytes=0)
    budget = method.floor_bytes(state)
    (task,) = method.plan(state, [Clients(DATA, (budget,))[0]]).tasks
    assert 0 < len(task.steps) < len(BLOCKS) + 1


def test_scalefl_with_one_block_and_a_mentor_is_not_fedavg(fedavg):
    assert not identical(params_of(make_method("scalefl", blocks=1)), fedavg)


@pytest.mark.parametrize("mentor", [None, {"lambda_max": 0.0, "gamma_max": 0.0}])
@pytest.mark.parametrize("spans", ["elastic", "all"])
def test_spans_with_memory_for_everything_are_fedavg(fedavg, mentor, spans):
    assert identical(params_of(make_method("scalefl", blocks=BLOCKS, mentor=mentor, spans=spans)), fedavg)


@pytest.mark.parametrize("tails", [False, True])
def test_a_client_trains_all_blocks_span_after_span(fedavg, tails):
    """With the model's own loss where what follows a span fits; more memory never means more spans."""
    method = make_method("scalefl", blocks=BLOCKS, mentor=None, tails=tails)
    state = method.init(spec(), PROBLEM, seed=1, smallest_memory_bytes=0)
    counts = []
    for share in (0.525, 0.56, 0.585, 0.6):
        budget = int(share * full_bytes())
        (task,) = method.plan(state, [Clients(DATA, (budget,))[0]]).tasks
        trained = [step.trainable for step in task.steps]
        assert all(a.isdisjoint(b) for a, b in itertools.combinations(trained, 2))
        assert frozenset().union(*trained) >= {name for name, _ in spec().build(0).named_parameters()}
        assert tails == all(step.part.output is None for step in task.steps) or len(trained) == 1
        counts.append(len(trained))
    assert counts == sorted(counts, reverse=True) and counts[0] > 1 == counts[-1]


def test_exclusive_fedavg_with_memory_for_everything_is_fedavg_for_all(fedavg):
    assert identical(params_of(make_method("fedavg", population="all")), fedavg)
    assert identical(params_of(make_method("fedavg", population="all_small")), fedavg)


def test_micro_batches_that_nobody_needs_change_nothing(fedavg):
    assert identical(
        params_of(make_method("fedavg", means={"micro_batch_size": "auto", "smallest_micro_batch": 1})), fedavg
    )


def test_blocks_by_memory_are_one_block_where_it_fits(fedavg):
    assert identical(params_of(make_method("scalefl", blocks="memory", mentor=None)), fedavg)


def test_single_spans_train_the_block_in_turn_and_nothing_else():
    method = make_method("scalefl", blocks=BLOCKS, spans="single", tails=False, coadapted_layers=0, mentor=None)
    with LocalEngine(DATA, Clients(DATA, (2 * full_bytes(),))) as engine:
        states, records = play(method, engine, 4, cohort=COHORT)
    assert [record.stage for record in records] == ["block 1", "block 2", "block 3", "block 1"]
    for i, prefixes in enumerate([("0.", "@output.0."), ("1.", "@output.1."), ("2.",), ("0.", "@output.0.")]):
        a, b = states[i].params, states[i + 1].params
        moved = {n for n in a if not identical({n: a[n]}, {n: b[n]})}
        assert moved == {n for n in a if n.startswith(prefixes)}


def test_one_client_is_plain_training():
    """One client with everything, one round: the same as `torch.optim.SGD` on its shuffled batches."""
    data = MadeData([24])
    method = make_method("fedavg", work=replace(WORK, epochs=2))
    with LocalEngine(data, Clients(data, (2 * full_bytes(),))) as engine:
        (start, end), _ = play(method, engine, 1)
    module = spec().build(0)
    module.load_state_dict(dict(start.params))
    optimizer = torch.optim.SGD(module.parameters(), lr=WORK.lr, momentum=0.9, weight_decay=5e-4)
    examples, seed = data.examples(0), derive(derive(start.seed, "task", 0, 0), "step", 0)
    for epoch in range(2):
        order = torch.randperm(24, generator=generator(derive(seed, "epoch", epoch), "order"))
        for rows in order.split(WORK.batch_size):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(module(examples["x"][rows]), examples["label"][rows]).backward()
            optimizer.step()
    assert data.problem == PROBLEM
    for name, tensor in tensors(module).items():
        torch.testing.assert_close(end.params[name], tensor, rtol=1e-6, atol=1e-7)
