"""What is peculiar to each of the methods that ScaleFL is compared with; what all promise is in `conformance`."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalefl.blocks import blocks_as_asked
from scalefl.checkpoint import save_state
from scalefl.coords import extract
from scalefl.costs import step_cost
from scalefl.engines.local import LocalEngine
from scalefl.errors import ConfigError, UnsliceableModel
from scalefl.methods.depthfl import MutualDistillation
from scalefl.methods.profl import Turn
from scalefl.models import resolve
from scalefl.models.mixed import narrower_behind
from scalefl.models.skeleton import tensors
from scalefl.models.spec import ModelSpec
from scalefl.objectives import TaskLoss
from scalefl.params import without_attachments
from scalefl.parts import Taps
from scalefl.problem import Classification, Column
from scalefl.steps import full_step
from scalefl.types import ServerState
from support import PROBLEM, WORK, Clients, MadeData, full_bytes, identical, make_method, play, spec

BLOCKS = ["0", "1"]
EQUAL = MadeData([16] * 8)
RICH = (2 * full_bytes(),)


def states_of(method: Any, budgets: tuple[int, ...] = RICH, rounds: int = 3) -> list[ServerState]:
    with LocalEngine(EQUAL, Clients(EQUAL, budgets)) as engine:
        states, records = play(method, engine, rounds, cohort=4)
    assert all(record.lost == [] for record in records)
    return states


def moved_between(a: ServerState, b: ServerState) -> set[str]:
    return {n for n in a.params if not identical({n: a.params[n]}, {n: b.params[n]})}


@pytest.fixture(scope="module")
def fedavg() -> dict[str, Tensor]:
    return dict(states_of(make_method("fedavg"))[-1].params)


# DepthFL


def test_one_depth_is_fedavg(fedavg):
    """With one block there is one classifier, the model's own; clients have equally many examples."""
    assert identical(dict(states_of(make_method("depthfl", blocks=1))[-1].params), fedavg)


def test_a_depth_trains_its_blocks_and_their_classifiers():
    method = make_method("depthfl", blocks=BLOCKS)
    state = method.init(spec(), PROBLEM, seed=1, smallest_memory_bytes=0)
    deep, middle, shallow = (offer.step for offer in method.menu(state))
    own = {name for name, _ in spec().build(0).named_parameters()}
    exits = {name for name in state.params if name.startswith("@")}
    assert deep.trainable == own | exits
    assert middle.trainable == {n for n in own if n[0] in "01"} | exits
    assert shallow.trainable == {n for n in own if n[0] == "0"} | {n for n in exits if n.startswith("@output.0.")}
    for step in (deep, middle, shallow):
        assert set(step.part.names()) >= step.moving


def test_weak_clients_train_less_deep_and_only_that_moves():
    method = make_method("depthfl", blocks=BLOCKS)
    state = method.init(spec(), PROBLEM, seed=1, smallest_memory_bytes=0)
    (before, after) = states_of(method, (method.floor_bytes(state),), rounds=1)
    moved = moved_between(before, after)
    assert moved and all(name.startswith(("0.", "@output.0.")) for name in moved)


def test_holders_of_a_depth_count_alike():
    """However many examples they have: what two clients send, averaged by hand."""
    uneven = MadeData([16, 6])
    method, clients = make_method("depthfl", blocks=BLOCKS), Clients(uneven, RICH)
    state = method.init(spec(), PROBLEM, seed=1, smallest_memory_bytes=0)
    plan = method.plan(state, [clients[0], clients[1]])
    with LocalEngine(uneven, clients) as engine:
        orders = [(task, extract(state.params, plan.coords[task.client_id])) for task in plan.tasks]
        a, b = ({n: t.clone() for n, t in update.params.items()} for update in engine.fit(method, orders))
        (_, after), _ = play(method, engine, 1, state=state, sample=lambda *_: [clients[0], clients[1]])
    for name in plan.tasks[0].steps[0].trainable:
        torch.testing.assert_close(after.params[name], (a[name] + b[name]) / 2, rtol=1e-6, atol=1e-6)


def test_mutual_distillation_is_the_papers_loss():
    draw = torch.Generator().manual_seed(0)
    all_logits = [torch.randn(6, 3, generator=draw, dtype=torch.float64).requires_grad_() for _ in range(3)]
    batch = {"x": torch.zeros(6, 1, 8, 8), "label": torch.tensor([0, 1, 2, 2, 1, 0])}
    taps = Taps(all_logits[2], batch["x"], all_logits[2], all_logits[2], all_logits[2], tuple(all_logits[:2]))
    loss, weight = MutualDistillation(0.7).sample_terms(taps, batch, PROBLEM)
    assert weight == 6
    expected = torch.zeros((), dtype=torch.float64)
    for i, own in enumerate(all_logits):
        expected = expected + F.cross_entropy(own, batch["label"], reduction="sum")
        for j, other in enumerate(all_logits):
            if i != j:
                p = other.detach().softmax(1)
                expected = expected + 0.7 * (p * (p.log() - own.log_softmax(1))).sum() / 2
    torch.testing.assert_close(loss, expected)
    found, wanted = (torch.autograd.grad(value, all_logits, retain_graph=True) for value in (loss, expected))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_the_weight_of_distillation_grows():
    method = make_method("depthfl", blocks=BLOCKS, consistency=2.0, ramp_rounds=10)
    state, client = method.init(spec(), PROBLEM, seed=1, smallest_memory_bytes=0), Clients(EQUAL, RICH)[0]
    weights = []
    for round in (0, 5, 10, 11):
        (task,) = method.plan(replace(state, round=round), [client]).tasks
        weights.append(method.objective(task.steps[0]).weight)
    assert weights == pytest.approx([2 * math.exp(-5), 2 * math.exp(-1.25), 2.0, 2.0])


def test_what_is_deployed_is_the_mean_of_all_classifiers():
    method = make_method("depthfl", blocks=BLOCKS)
    state = states_of(method, rounds=2)[-1]
    model, params = method.deploy(state)
    ensemble = model.build(0)
    ensemble.load_state_dict(dict(params))
    module = spec().build(0)
    module.load_state_dict(without_attachments(state.params))
    module.eval()
    x, said = EQUAL.test["x"], []
    with torch.no_grad():
        z = x
        for block, name in enumerate(["0", "1"]):
            z = module[block](z)
            output = method.menu(state)[0].step.part.exits[block].output
            head = output.build()
            head.load_state_dict({n.removeprefix(output.prefix): state.params[n] for n in output.names()})
            assert output.cut == name
            said.append(head(z).logits)
        said.append(module[2](z))
        torch.testing.assert_close(ensemble.eval()(x), torch.stack(said).mean(0))


def writing(inplace: bool) -> nn.Module:
    """ReLUs write into what convolutions give; so does a dropout, in train mode."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(inplace)),
        *(nn.Conv2d(6, 16, 3, stride=2, padding=1), nn.Dropout(0.2, inplace)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(inplace)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3)),
    )


def test_exits_read_what_later_modules_write_into():
    method = make_method("depthfl", blocks=["0", "2"])
    states, copies = {}, {}
    for inplace in (True, False):
        model = ModelSpec.of("test_peers:writing", inplace=inplace)
        with LocalEngine(EQUAL, Clients(EQUAL, (10**9,))) as engine:
            (first, *_, states[inplace]), records = play(method, engine, 2, cohort=4, model=model)
        assert {rung for record in records for rung in record.rungs} == {"depth 3"}
        exits = method.menu(first)[0].step.part.exits
        copies[inplace] = [each.copies for each in exits]
    assert copies == {True: [True, True], False: [False, False]}
    assert identical(states[True].params, states[False].params)


def test_feddyn_is_its_algorithm():
    """Two clients, two rounds of one step each without momentum, against algorithm 1 by hand."""
    data = MadeData([16, 16])
    work = replace(WORK, batch_size=16, momentum=0.0, weight_decay=0.0)
    alpha, lr = 0.3, WORK.lr
    model = spec(norm="none")
    method = make_method("depthfl", blocks=1, work=work, feddyn={"clients": 5, "alpha": alpha})
    with LocalEngine(data, Clients(data, RICH)) as engine:
        states, _ = play(method, engine, 2, cohort=2, model=model)
    theta = dict(states[0].params)
    h = [{n: torch.zeros_like(t) for n, t in theta.items()} for _ in range(2)]
    server = {n: torch.zeros_like(t) for n, t in theta.items()}
    for state in states[1:]:
        ends = []
        for client in range(2):
            module = model.build(0)
            module.load_state_dict(theta)
            examples = data.examples(client)
            F.cross_entropy(module(examples["x"]), examples["label"]).backward()
            end = {n: theta[n] - lr * (p.grad - h[client][n]) for n, p in module.named_parameters()}
            h[client] = {n: h[client][n] - alpha * (end[n] - theta[n]) for n in end}
            ends.append(end)
        server = {n: t - alpha / 5 * sum(end[n] - theta[n] for end in ends) for n, t in server.items()}
        theta = {n: (ends[0][n] + ends[1][n]) / 2 - server[n] / alpha for n in theta}
        for name, tensor in theta.items():
            torch.testing.assert_close(state.params[name], tensor, rtol=1e-4, atol=1e-6)


def test_feddyn_counts_in_a_clients_memory():
    costs = []
    for feddyn in ({"clients": 8}, None):
        method = make_method("depthfl", blocks=BLOCKS, feddyn=feddyn)
        state = method.init(spec(), PROBLEM, seed=1, smallest_memory_bytes=0)
        step = method.menu(state)[0].step
        costs.append(step_cost(step, PROBLEM, method.objective(step)))
    parameters = sum(state.params[name].numel() * 4 for name in step.trainable)
    terms = [dict(cost.terms) for cost in costs]
    assert terms[1]["copies"] == 0
    # A copy of where it started and its own tensors; what belongs to output modules is counted as theirs.
    assert 2 * parameters <= costs[0].peak_bytes - costs[1].peak_bytes + 64


def test_a_client_that_sits_a_round_out_keeps_what_is_its_own():
    method = make_method("depthfl", blocks=BLOCKS, feddyn={"clients": 8})
    clients = Clients(EQUAL, (2 * full_bytes(), method.floor_bytes(fresh := started(method))))
    cohorts = iter([[0, 1], [1, 2], [0, 3]])
    with LocalEngine(EQUAL, clients) as engine:
        states, _ = play(method, engine, 3, state=fresh, sample=lambda *_: [clients[i] for i in next(cohorts)])
    first, second, third = (dict(state.aux.tensors) for state in states[1:])
    of_0 = [name for name in first if name.startswith("client.0.")]
    assert of_0 and all(torch.equal(first[name], second[name]) for name in of_0)
    assert any(not torch.equal(second[name], third[name]) for name in of_0)
    deep, shallow = ({n.split("@own.")[1] for n in third if n.startswith(f"client.{i}.")} for i in (0, 1))
    assert shallow < deep, "a client has its own for what it trains"


def started(method: Any) -> ServerState:
    return method.init(spec(), PROBLEM, seed=1, smallest_memory_bytes=0)


def test_what_is_deployed_is_not_saved_twice(tmp_path):
    method = make_method("depthfl", blocks=BLOCKS)
    state = started(method)
    save_state(tmp_path / "state.safetensors", state, method.deploy(state))
    size = sum(t.numel() * t.element_size() for t in state.params.values())
    assert (tmp_path / "state.safetensors").stat().st_size < 1.2 * size + 8000


def test_feddyn_is_the_servers_step():
    with pytest.raises(ConfigError, match="what the server does"):
        make_method("depthfl", feddyn={"clients": 8}, server={"kind": "fedadam"})


# SLT


def slt(budget_share: float, **settings: Any) -> tuple[Any, ServerState]:
    method = make_method("slt", blocks=BLOCKS, **{"rounds": 30, **settings})
    budget = int(budget_share * full_bytes())
    return method, method.init(spec(), PROBLEM, seed=1, smallest_memory_bytes=budget)


def test_slt_where_everything_fits_trains_the_whole_model_first():
    method, state = slt(1.2)
    assert state.aux.values["widths"] == [1.0]
    (offer,) = method.menu(state)
    assert offer.label == "full"
    assert offer.step.trainable == {name for name, _ in spec().build(0).named_parameters()}


def test_slt_is_as_wide_behind_as_the_weakest_client_can_train():
    method, state = slt(0.8)
    budget, widths = int(0.8 * full_bytes()), state.aux.values["widths"]
    assert 0 < widths[0] < 1 and widths[-1] == 1.0
    for stage, (offer, width) in enumerate(zip(method.menu(state), widths, strict=True)):
        poor = Clients(EQUAL, (budget,))[0]
        starts = state.aux.values["starts"]
        (task,) = method.plan(replace(state, round=starts[stage]), [poor]).tasks
        assert task.steps[0].part.model == offer.step.part.model
        if width < 1:
            wider = method._least_bytes(blocks_as_asked(spec(), PROBLEM, method.blocks), stage, width + 1 / 32)
            assert wider > budget, "a wider one would fit too"


def test_slt_freezes_what_is_done_and_moves_windows_of_what_comes():
    method, state = slt(0.8, rounds=3)
    budget = (int(0.8 * full_bytes()),)
    assert state.aux.values["starts"] == [0, 1, 2]
    with LocalEngine(EQUAL, Clients(EQUAL, budget)) as engine:
        states, records = play(method, engine, 3, state=state, cohort=4)
    assert [record.stage.split(" (")[0] for record in records] == ["block 1", "block 2", "block 3"]
    first, second, third = (moved_between(a, b) for a, b in itertools.pairwise(states))
    assert any(n.startswith("0.") for n in first) and any(n.startswith("2.") for n in first)
    assert not any(n.startswith("0.") for n in second | third) and not any(n.startswith("1.") for n in third)
    narrow = method.menu(state)[0].step.part.model
    width = tensors(narrow.skeleton())["1.0.weight"].shape[0]
    assert tensors(narrow.skeleton())["1.0.weight"].shape[1] == 6, "it takes all that the wide block gives"
    before, after = (s.params["1.0.weight"] for s in states[:2])
    assert 0 < width < 6
    assert torch.equal(before[width:], after[width:]) and not torch.equal(before[:width], after[:width])


def test_slt_deploys_the_model_that_it_trains():
    method, state = slt(0.8, rounds=3)
    with LocalEngine(EQUAL, Clients(EQUAL, (int(0.8 * full_bytes()),))) as engine:
        states, _ = play(method, engine, 3, state=state, cohort=4)
    model, params = method.deploy(states[1])
    assert {n: t.shape for n, t in params.items()} == {n: t.shape for n, t in tensors(model.skeleton()).items()}
    assert model != spec()
    model.build(0).load_state_dict(dict(params))
    whole, params = method.deploy(states[3])
    assert whole == spec() and identical(dict(params), dict(states[3].params))


def test_rounds_go_by_the_parameters_that_stages_train():
    method, state = slt(0.8, rounds=100)
    starts, widths = state.aux.values["starts"], state.aux.values["widths"]
    weights = [method._trained(blocks_as_asked(spec(), PROBLEM, method.blocks), k, w) for k, w in enumerate(widths)]
    lengths = [starts[1], starts[2] - starts[1], 100 - starts[2]]
    for length, weight in zip(lengths, weights, strict=True):
        assert length == pytest.approx(100 * weight / sum(weights), abs=1.01)


def test_slt_needs_to_know_how_long_it_runs():
    with pytest.raises(ConfigError, match="say how many"):
        slt(0.8, rounds=0)


def test_slt_leaves_out_clients_that_no_width_fits():
    method, state = slt(0.01)
    assert state.aux.values["widths"] == [1 / 32, 1 / 32, 1.0]
    assert [offer.label for offer in method.menu(state)][1:] == ["block 2 (0.03125 wide behind)", "block 3"]
    clients = Clients(EQUAL, (int(0.01 * full_bytes()), 2 * full_bytes()))
    plan = method.plan(state, [clients[0], clients[1]])
    assert [task.client_id for task in plan.tasks] == [1]
    assert 0.01 * full_bytes() < method.floor_bytes(state) < full_bytes()


@pytest.mark.parametrize("name", ["resnet10", "vgg11_bn", "squeezenet"])
def test_built_in_models_can_be_narrow_behind_a_cut(name):
    method = make_method("slt", blocks=4, rounds=40)
    problem = Classification(10, (Column("image", (3, 32, 32), "float32"),))
    model = ModelSpec.of(resolve(name), width=0.125)
    full = step_cost(full_step(model, problem, WORK), problem, TaskLoss()).peak_bytes
    state = method.init(model, problem, seed=0, smallest_memory_bytes=int(0.95 * full))
    assert min(state.aux.values["widths"]) < 1
    deployed, params = method.deploy(state)
    module = deployed.build(0)
    module.load_state_dict(dict(params))
    assert module.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


class Residual(nn.Module):
    def __init__(self, width: float) -> None:
        super().__init__()
        c = max(1, round(8 * width))
        self.stem, self.again = nn.Conv2d(1, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1)
        self.head = nn.Linear(c, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.again(x)).mean((2, 3)))


def residual(width: float = 1.0) -> nn.Module:
    return Residual(width)


def grouped(width: float = 1.0) -> nn.Module:
    c = 4 * max(1, round(2 * width))
    layers = [nn.Conv2d(1, c, 3), nn.Conv2d(c, c, 3, groups=4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 3)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize(
    ("factory", "narrow", "message"),
    [
        (residual, ["again", "head"], "residual: narrower behind a cut, it breaks off after again"),
        (grouped, ["1", "4"], "grouped: narrower behind a cut, it breaks off after 1: a layer in groups"),
        (nn.Flatten, [], "no `width`"),
    ],
)
def test_models_that_cannot_be_narrow_behind_a_cut_say_where(factory, narrow, message):
    with pytest.raises(UnsliceableModel, match=message):
        narrower_behind(ModelSpec.of(factory), narrow, 0.5, lambda module: module(torch.zeros(2, 1, 8, 8)))


def test_slt_caches_features_where_the_disk_holds_them():
    method, state = slt(0.8, means={"prefix": "cached", "cache_bytes": 0})
    later = replace(state, round=state.aux.values["starts"][1])
    (task,) = method.plan(later, [Clients(EQUAL, RICH)[0]]).tasks
    assert task.steps[0].means.prefix == "streamed"


# ProFL


def test_profl_shrinks_from_the_back_and_grows_from_the_front():
    method = make_method("profl", blocks=BLOCKS, longest=1)
    states = states_of(method, rounds=6)
    firsts = [{n[0] for n in moved_between(a, b) if not n.startswith("@")} for a, b in itertools.pairwise(states)]
    assert firsts == [{"2"}, {"1"}, {"0"}, {"1"}, {"2"}, {"2"}]


def test_a_turn_ends_when_the_block_hardly_moves_on():
    """A block that goes back and forth has a path, but gets nowhere; one that goes straight on has both."""
    method = make_method("profl", blocks=BLOCKS, window=4, threshold=0.5)
    state = method.init(spec(), PROBLEM, seed=1, smallest_memory_bytes=0)
    names = sorted(method.menu(state)[2].step.trainable)

    def turns(step: Any) -> list[Turn]:
        found, now = [], state
        for round in range(4):
            params = {n: t + step(round) if n in names else t for n, t in now.params.items()}
            turn, start = method._after_round(now, params, names)
            values = {key: getattr(turn, key) for key in turn.__struct_fields__}
            now = replace(now, params=params, aux=replace(now.aux, tensors=start, values=values))
            found.append(turn)
        return found

    assert [t.position for t in turns(lambda round: 0.1)] == [0, 0, 0, 0]
    there_and_back = turns(lambda round: 0.1 * (-1) ** round)
    assert [t.position for t in there_and_back] == [0, 0, 0, 1]
    assert there_and_back[-1] == Turn(1)


def test_the_movement_is_the_blocks_own():
    """What stands behind the block for a while is not the block."""
    method = make_method("profl", blocks=BLOCKS, shrinking=False, window=3)
    state = states_of(method, rounds=1)[-1]
    kept = {name.removeprefix("start.") for name in state.aux.tensors}
    assert kept == {name for name in method.menu(state)[0].step.trainable if not name.startswith("@")}


def test_profl_without_shrinking_only_grows():
    method = make_method("profl", blocks=BLOCKS, shrinking=False, longest=1)
    state = method.init(spec(), PROBLEM, seed=1, smallest_memory_bytes=0)
    assert method.order(state) == [0, 1, 2]
    one = make_method("profl", blocks=1)
    assert one.order(one.init(spec(), PROBLEM, seed=1, smallest_memory_bytes=0)) == [0]


def test_profl_with_one_block_is_fedavg(fedavg):
    state = states_of(make_method("profl", blocks=1))[-1]
    assert identical(extract(state.params, dict.fromkeys(fedavg)), fedavg)
