"""Width scaling: slices fit together, and only what clients hold and own enters the mean."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scalefl.coords import add, extract, take, within
from scalefl.costs import step_cost
from scalefl.engines.local import LocalEngine
from scalefl.errors import ConfigError, EmptyCohort, UnsliceableModel
from scalefl.methods.common import initial_params
from scalefl.models import BUILT_IN, resolve
from scalefl.models.scaler import with_scaler
from scalefl.models.skeleton import tensors
from scalefl.models.spec import ModelSpec
from scalefl.objectives import OwnClasses, TaskLoss
from scalefl.parts import Taps
from scalefl.planner import fitting_collection, least_collection
from scalefl.problem import Batch, Classification, Column
from scalefl.problem import take as take_rows
from scalefl.sampling import UniformSampler
from scalefl.steps import collecting_step, full_step
from scalefl.types import ClientLoss, RoundPlan
from scalefl.widths import Units, class_rows, drawn, leading, rolled, windows
from support import PROBLEM, WORK, Clients, MadeData, full_bytes, identical, make_method, play, spec

WINDOWS: dict[str, Units] = {"leading": leading, "rolled": rolled(5), "far": rolled(10**6 + 3), "drawn": drawn(7)}
NORMS = {"vit": ("layer", "batch", "group")}


def wide_and_narrow(name: str, **arguments: Any) -> tuple[ModelSpec, ModelSpec]:
    wide = ModelSpec.of(resolve(name), width=0.25, **arguments)
    return wide, wide.at_width(0.5)


@pytest.mark.parametrize("units", WINDOWS)
@pytest.mark.parametrize("name", BUILT_IN)
def test_slices_of_neighbouring_layers_belong_together(name: str, units: str) -> None:
    """A wide model with a narrow one in its window, and zeros beside it, computes what the narrow one does."""
    wide_spec, narrow_spec = wide_and_narrow(name, norm="batch")
    wide, narrow = wide_spec.build(1).eval(), narrow_spec.build(0).eval()
    inside, state = windows(wide_spec, narrow_spec, WINDOWS[units]), wide.state_dict()
    for key, tensor in narrow.state_dict().items():
        if key.endswith(("weight", "bias", "position")):
            add(state[key].zero_(), inside[key], tensor)
            if name == "vit" and ".query." in key:  # attention divides by the square root of a head's width
                state[key] *= math.sqrt(2)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(wide(images), narrow(images))


@pytest.mark.parametrize("units", WINDOWS)
@pytest.mark.parametrize(("name", "norm"), [(n, k) for n in BUILT_IN for k in NORMS.get(n, ("none", "group"))])
def test_a_norm_takes_the_channels_of_its_layer(name: str, norm: str, units: str) -> None:
    """Whatever the norm, and wrapped or not: the windows of tensors that models share are those that were proven."""
    proven = windows(*wide_and_narrow(name, norm="batch"), WINDOWS[units])
    found = windows(*wide_and_narrow(name, norm=norm), WINDOWS[units])
    renamed = {key.replace(".over_channels", ""): window for key, window in proven.items()}
    for key, window in found.items():
        other = renamed.get(key.replace(".over_channels", ""))
        if norm == "none" and other is None:
            continue  # a bias that stands in for a norm's: [C], as the norm's own
        assert (window is None) == (other is None), key
        for a, b in zip(window or (), other or (), strict=True):
            assert (a is None and b is None) or torch.equal(a, b), key


def test_a_client_gets_its_window_and_the_mean_goes_back_there() -> None:
    wide, narrow = spec(), spec(width=0.5)
    params = initial_params(wide, 0)
    inside = windows(wide, narrow, rolled(4))
    got = extract(params, inside)
    assert {name: t.shape for name, t in got.items()} == {n: t.shape for n, t in tensors(narrow.build(0)).items()}
    assert torch.equal(got["0.0.weight"], params["0.0.weight"][[4, 5, 0]])
    assert torch.equal(got["1.0.weight"], params["1.0.weight"][[4, 5, 0]][:, [4, 5, 0]])
    assert torch.equal(got["2.5.weight"], params["2.5.weight"][:, [4, 5, 0]])


def test_a_window_in_a_window() -> None:
    tensor = torch.arange(60).view(5, 12)
    outer, inner = (torch.tensor([4, 0, 2]), None), (torch.tensor([2, 0]), torch.tensor([1, 7]))
    assert torch.equal(take(tensor, within(outer, inner)), take(take(tensor, outer), inner))
    assert torch.equal(take(tensor, within(None, inner)), take(tensor, inner))


def without_width() -> nn.Module:
    return nn.Linear(4, 3)


def renamed_when_narrow(width: float = 1.0) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)) if width == 1 else nn.Sequential(nn.Linear(4, 3))


def rounds_down(width: float = 1.0) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, int(8 * width), 3), nn.Flatten(), nn.Linear(36 * int(8 * width), 3))


def flattens(width: float = 1.0) -> nn.Module:
    """The classifier has a column for each pixel of each channel: a unit is as many as there are pixels."""
    c = max(1, round(8 * width))
    return nn.Sequential(nn.Conv2d(1, c, 3), nn.Flatten(), nn.Linear(36 * c, 3))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (without_width, "without_width: the factory has no `width`"),
        (renamed_when_narrow, "renamed_when_narrow: not at every width is there a tensor 1.bias"),
        (rounds_down, "rounds_down: 0.weight .8, 1, 3, 3. is .0, 1, 3, 3. at width 1e-06"),
    ],
)
def test_models_that_have_no_slices_say_so(factory: Any, message: str) -> None:
    method = make_method("heterofl", rates=[1.0, 0.5])
    with pytest.raises(UnsliceableModel, match=message):
        method.init(ModelSpec.of(factory), PROBLEM, seed=0, smallest_memory_bytes=0)


def test_channels_stay_together_where_a_model_flattens_them() -> None:
    wide, narrow = ModelSpec.of(flattens), ModelSpec.of(flattens, width=0.5)
    whole, part = wide.build(0), narrow.build(1)
    state, inside = whole.state_dict(), windows(wide, narrow, rolled(6))
    for key, tensor in part.state_dict().items():
        add(state[key].zero_(), inside[key], tensor)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(whole(x), part(x))


# Methods


@pytest.mark.parametrize(
    "settings",
    [
        {"rates": []},
        {"rates": [0.0]},
        {"rates": [1.5]},
        {"rates": [math.nan]},
        {"clip_norm": -1},
        {"clip_norm": math.nan},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        make_method("heterofl", **settings)


EQUAL = MadeData([16] * 8)
PLAIN = {"statistics": "running", "own_classes": False, "clip_norm": 0.0, "rates": [1.0, 0.5]}


def planned(method: Any, budgets: tuple[int, ...], rounds: int = 1) -> tuple[Any, list[RoundPlan]]:
    data = Clients(EQUAL, budgets)
    with LocalEngine(EQUAL, data) as engine:
        states, _ = play(method, engine, rounds, cohort=4)
    return states, [method.plan(s, UniformSampler(4)(data, method.floor_bytes(s), s)) for s in states[:-1]]


@pytest.mark.parametrize("name", ["heterofl", "fedrolex"])
def test_full_widths_are_fedavg(name: str) -> None:
    """Where all clients hold the whole model and have equally many examples, width scaling is FedAvg, to the bit."""
    rich = (2 * full_bytes(),)
    states, _ = planned(make_method(name, **PLAIN), rich, rounds=3)
    expected, _ = planned(make_method("fedavg"), rich, rounds=3)
    assert identical(states[-1].params, expected[-1].params)


def test_one_width_is_the_small_model() -> None:
    """HeteroFL at one width trains the leading channels as FedAvg trains the narrow model; the rest keeps its bits."""
    rich = (2 * full_bytes(),)
    method = make_method("heterofl", **{**PLAIN, "rates": [0.5], "scaler": False})
    states, _ = planned(method, rich, rounds=2)
    inside = windows(spec(), spec(width=0.5))
    small = make_method("fedavg")
    start = small.init(spec(width=0.5), PROBLEM, seed=1, smallest_memory_bytes=0)
    start = replace(start, params=extract(states[0].params, inside))
    with LocalEngine(EQUAL, Clients(EQUAL, rich)) as engine:
        expected, _ = play(small, engine, 2, state=start, cohort=4)
    assert identical(extract(states[-1].params, inside), expected[-1].params)
    for name, window in inside.items():
        outside = torch.ones_like(states[0].params[name], dtype=torch.bool)
        outside[() if window is None else torch.meshgrid(*_full(outside, window), indexing="ij")] = False
        assert torch.equal(states[0].params[name][outside], states[-1].params[name][outside])


def _full(tensor: Tensor, window: Any) -> list[Tensor]:
    return [torch.arange(n) if index is None else index for n, index in zip(tensor.shape, window, strict=True)]


def test_each_coordinate_is_the_mean_over_its_holders() -> None:
    """All holders count alike, however many examples they have."""
    uneven = MadeData([16, 9, 24, 12])
    method = make_method("fedrolex", window="random", **{**PLAIN, "rates": [1.0, 0.5, 0.2]})
    budgets = tuple(int(share * full_bytes()) for share in (1.3, 0.6, 0.3, 0.6))
    data = Clients(uneven, budgets)
    state = method.init(spec(), PROBLEM, seed=1, smallest_memory_bytes=0)
    plan = method.plan(state, [data[i] for i in range(4)])
    widths = {plan.rungs[i] for i in range(4)}
    assert len(widths) == 3, "clients of three widths"
    with LocalEngine(uneven, data) as engine:
        orders = [(task, extract(state.params, plan.coords[task.client_id])) for task in plan.tasks]
        updates = {
            u.client_id: {n: t.clone() for n, t in u.params.items()}
            for u in engine.fit(method, orders)  # their memory is the engine's
        }
    with LocalEngine(uneven, data) as engine:
        (_, after), _ = play(method, engine, 1, state=state, cohort=4, sample=lambda *_: [data[i] for i in range(4)])
    for name in updates[0]:
        total = torch.zeros_like(state.params[name], dtype=torch.float64)
        count = torch.zeros_like(total)
        for client, params in updates.items():
            add(total, plan.coords[client][name], params[name].double())
            add(count, plan.coords[client][name], 1)
        expected = torch.where(count > 0, total / count.clamp(min=1), state.params[name].double())
        torch.testing.assert_close(after.params[name].double(), expected, rtol=1e-6, atol=1e-6)


def test_windows_roll_and_are_the_same_for_all_clients() -> None:
    poor = (int(0.6 * full_bytes()),)
    _, plans = planned(make_method("fedrolex", **PLAIN), poor, rounds=7)
    for round, plan in enumerate(plans):
        for coords in plan.coords.values():
            window = coords["1.0.weight"]
            assert window is not None and window[0] is not None
            assert window[0].tolist() == [(round + k) % 6 for k in range(3)]


def test_random_windows_differ_between_clients_and_rounds() -> None:
    poor = (int(0.6 * full_bytes()),)
    _, plans = planned(make_method("fedrolex", window="random", **PLAIN), poor, rounds=3)
    seen = {tuple(coords["1.0.weight"][0].tolist()) for plan in plans for coords in plan.coords.values()}
    assert len(seen) > 4


def test_rows_of_foreign_classes_do_not_count() -> None:
    """Client 3 has one class only: its rows of the others do not enter the mean; alone, it leaves them their bits."""
    data = Clients(EQUAL, (2 * full_bytes(),))
    alone = replace(data[3], classes=(0,))
    method = make_method("heterofl")
    assert class_rows(spec(), PROBLEM) == ("2.5.weight", "2.5.bias")
    with LocalEngine(EQUAL, data) as engine:
        (before, after), _ = play(method, engine, 1, cohort=1, sample=lambda *_: [alone])
    for name in ("2.5.weight", "2.5.bias"):
        assert torch.equal(before.params[name][1:], after.params[name][1:])
        assert not torch.equal(before.params[name][0], after.params[name][0])


def test_own_classes_is_cross_entropy_with_zeros_for_the_others() -> None:
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    batch = {"x": torch.zeros(5, 1, 8, 8), "label": torch.tensor([0, 2, 2, 0, 0])}
    taps = Taps(logits, batch["x"], logits, logits, logits)
    loss, weight = OwnClasses((0, 2)).sample_terms(taps, batch, PROBLEM)
    z = logits.detach().double().clone()
    z[:, 1] = 0
    expected = -(z - z.logsumexp(1, keepdim=True)).gather(1, batch["label"][:, None]).sum()
    torch.testing.assert_close(loss.double(), expected)
    loss.backward()
    assert weight == 5 and logits.grad is not None and bool((logits.grad[:, 1] == 0).all())


def test_the_scaler_divides_what_enters_norms_while_training() -> None:
    plain, scaled = spec().build(0), with_scaler(spec(), 0.25).build(0)
    assert identical(tensors(plain), tensors(scaled))
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    plain(x), scaled(x)
    torch.testing.assert_close(scaled[0][1].running_mean, 4 * plain[0][1].running_mean)
    scaled.load_state_dict(plain.state_dict())
    assert torch.equal(plain.eval()(x), scaled.eval()(x))


class Sorted(MadeData):
    """Each client's examples sorted by label."""

    def examples(self, client: int) -> Batch:
        found = super().examples(client)
        return take_rows(found, found["label"].argsort())


@pytest.mark.parametrize("batch_size", [64, 8])
def test_collected_statistics_are_those_of_all_data_together(batch_size: int) -> None:
    """Of clients, and of batches, whose pixels have different means: what lies between them is in the variance."""
    data = Sorted([12, 20, 8, 16])
    clients = Clients(data, (2 * full_bytes(),))
    method = make_method("heterofl", work=replace(WORK, batch_size=batch_size))
    with LocalEngine(data, clients) as engine:
        (_, after), records = play(method, engine, 1, cohort=4)
    assert records[0].collected == [0, 1, 2, 3]
    module = spec().build(0)
    module.load_state_dict(dict(after.params))
    x = torch.cat([data.examples(i)["x"] for i in range(4)])
    with torch.no_grad():
        seen = module[0][0](x)
    norm = module[0][1]
    torch.testing.assert_close(norm.running_mean, seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, seen.var((0, 2, 3), correction=0), rtol=1e-3, atol=1e-5)


def test_only_clients_that_hold_a_run_of_the_model_collect() -> None:
    method = make_method("heterofl", rates=[1.0, 0.2])
    state = method.init(spec(), PROBLEM, seed=1, smallest_memory_bytes=0)
    floor, least = method.collection_floor_bytes(state), method.floor_bytes(state)
    assert least < floor < full_bytes()
    data = Clients(EQUAL, (least, floor))
    with LocalEngine(EQUAL, data) as engine:
        _, records = play(method, engine, 3, cohort=4)
    assert all(len(record.collected) == 4 and all(i % 2 for i in record.collected) for record in records)
    with LocalEngine(EQUAL, Clients(EQUAL, (least,))) as engine, pytest.raises(EmptyCohort):
        play(method, engine, 1, cohort=4)


def test_nothing_is_collected_where_norms_have_no_statistics() -> None:
    method = make_method("heterofl")
    with LocalEngine(EQUAL, Clients(EQUAL, (2 * full_bytes(),))) as engine:
        _, records = play(method, engine, 1, cohort=4, model=spec(norm="group"))
    assert records[0].collected == []


class Failing:
    """An engine whose clients are lost, for want of memory, where statistics are collected: all, or all but one."""

    def __init__(self, engine: LocalEngine, spared: int) -> None:
        self._engine, self._spared = engine, spared
        self.population = engine.population

    def fit(self, method: Any, orders: Any) -> Any:
        for task, params in orders:
            if task.steps[0].collects and task.client_id != self._spared:
                yield ClientLoss(task.client_id, task.round, "memory cap hit", out_of_memory=True)
            else:
                yield from self._engine.fit(method, [(task, params)])


@pytest.mark.parametrize("spared", [-1, 2])
def test_a_collection_that_costs_clients_costs_nothing_else(spared: int) -> None:
    data = MadeData([16] * 4)
    method = make_method("heterofl")
    with LocalEngine(data, Clients(data, (2 * full_bytes(),))) as engine:
        states, records = play(method, Failing(engine, spared), 2, cohort=4)
    for record in records:
        assert record.collected == ([] if spared < 0 else [spared])
        assert {loss["client"] for loss in record.lost} == {0, 1, 2, 3} - {spared}
    assert states[-1].tightened == {}, "what was too much there says nothing of training"


class Spoiling:
    """An engine by which one client's collected statistics hold what they must not; its training is as ever."""

    def __init__(self, engine: LocalEngine, client: int, value: float) -> None:
        self._engine, self._client, self._value = engine, client, value
        self.population = engine.population

    def fit(self, method: Any, orders: Any) -> Any:
        orders = list(orders)
        collects = {task.client_id for task, _ in orders if task.steps[0].collects}
        for answer in self._engine.fit(method, orders):
            if answer.client_id == self._client and self._client in collects:
                spoilt = answer.params["0.1.running_var"].index_fill(0, torch.tensor([2]), self._value)
                answer = replace(answer, params={**answer.params, "0.1.running_var": spoilt})
            yield answer


class Absent(Spoiling):
    """An engine by which that client is not there where statistics are collected."""

    def fit(self, method: Any, orders: Any) -> Any:
        here = [o for o in orders if not (o[0].steps[0].collects and o[0].client_id == self._client)]
        yield from self._engine.fit(method, here)


@pytest.mark.parametrize("name", ["heterofl", "fedrolex"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e13])
def test_statistics_that_are_no_numbers_cost_their_client_alone(name: str, value: float) -> None:
    data = MadeData([16] * 4)
    method = make_method(name)
    with LocalEngine(data, Clients(data, (2 * full_bytes(),))) as engine:
        states, records = play(method, Spoiling(engine, 1, value), 2, cohort=4)
        without, _ = play(method, Absent(engine, 1, value), 2, cohort=4)
    for record in records:
        assert record.collected == [0, 2, 3]
        (lost,) = record.lost
        assert (lost["client"], lost["cause"].partition(":")[0]) == (1, "0.1.running_var")
        assert sorted(i for ids in record.rungs.values() for i in ids) == [0, 1, 2, 3], "it has trained"
    assert identical(states[-1].params, without[-1].params)


@pytest.mark.parametrize("workers", [0, 2])
def test_data_that_are_no_numbers_cost_their_client_its_collection(workers: int) -> None:
    """It is lost where it trains, and again where statistics are collected."""
    data = MadeData([16] * 4, spoilt={1: math.nan})
    with LocalEngine(data, Clients(data, (2 * full_bytes(),)), workers=workers) as engine:
        (_, after), (record,) = play(make_method("heterofl"), engine, 1, cohort=4)
    assert record.collected == [0, 2, 3]
    assert [(loss["client"], loss["cause"].partition(":")[0]) for loss in record.lost] == [
        (1, "0.0.weight"),
        (1, "0.1.running_mean"),
    ]
    assert all(bool(tensor.isfinite().all()) for tensor in after.params.values())


def test_a_servers_momentum_rests_where_nobody_trained() -> None:
    poor = (int(0.6 * full_bytes()),)
    method = make_method("fedrolex", server={"kind": "fedavgm"}, **PLAIN)
    states, plans = planned(method, poor, rounds=4)
    for before, after, plan in zip(states, states[1:], plans, strict=False):
        coords = next(iter(plan.coords.values()))
        for name in plan.tasks[0].moving:
            window, held = coords[name], torch.zeros_like(before.params[name], dtype=torch.bool)
            held[() if window is None else torch.meshgrid(*_full(held, window), indexing="ij")] = True
            assert torch.equal(before.params[name][~held], after.params[name][~held]), name


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_predicted_peaks_of_collections_are_not_below_what_they_take(norm: str) -> None:
    wide = ModelSpec.of(resolve("resnet10"), width=0.25, norm=norm)
    problem = Classification(10, (Column("image", (3, 32, 32), "uint8"),))
    step = collecting_step(wide, problem, replace(WORK, batch_size=64))
    if norm == "group":
        assert step is None
        return
    assert step is not None
    cost = step_cost(step, problem, TaskLoss())
    whole = full_step(wide, problem, replace(WORK, batch_size=64))
    training = step_cost(whole, problem, TaskLoss())
    assert cost.peak_bytes < 0.5 * training.peak_bytes, "no activations are kept"
    assert 0.3 < cost.flops / training.flops < 0.4, "a third: forward only"
    weights = sum(t.numel() * t.element_size() for t in tensors(wide.skeleton()).values())
    assert dict(cost.terms)["weights"] == weights
    assert dict(cost.terms)["gradients"] == dict(cost.terms)["optimizer"] == 0


def test_collections_take_smaller_batches_where_larger_ones_do_not_fit() -> None:
    step = collecting_step(spec(), PROBLEM, replace(WORK, batch_size=32))
    assert step is not None
    least = least_collection(step, PROBLEM)
    rich = fitting_collection(step, PROBLEM, 10 * least.cost.peak_bytes)
    middle = fitting_collection(step, PROBLEM, 2 * least.cost.peak_bytes)
    assert rich is not None and middle is not None
    assert 4 == least.step.largest_micro_batch < middle.step.largest_micro_batch < rich.step.largest_micro_batch == 32
    assert middle.cost.peak_bytes <= 2 * least.cost.peak_bytes
    assert fitting_collection(step, PROBLEM, least.cost.peak_bytes - 1) is None


@pytest.mark.parametrize(("of_the_run", "found"), [(0.0, 1.0), (3.0, 3.0)])
def test_gradients_are_clipped_unless_the_run_says_how(of_the_run: float, found: float) -> None:
    method = make_method("heterofl", work=replace(WORK, clip_norm=of_the_run))
    state = method.init(spec(), PROBLEM, seed=1, smallest_memory_bytes=0)
    (task,) = method.plan(state, [Clients(EQUAL, (2 * full_bytes(),))[0]]).tasks
    assert {step.work.clip_norm for step in task.steps} == {found}


@pytest.mark.parametrize("statistics", ["collected", "running"])
def test_micro_batches_are_said_to_have_norms_of_their_own(statistics: str) -> None:
    """Whether or not their statistics are sent, norms see micro-batches where they would see batches."""
    method = make_method("heterofl", statistics=statistics, rates=[1.0], means={"micro_batch_size": 4})
    state = method.init(spec(), PROBLEM, seed=1, smallest_memory_bytes=0)
    plan = method.plan(state, [Clients(EQUAL, (2 * full_bytes(),))[0]])
    assert plan.rungs[0] == "width 1, micro-batch 4 (own norms)"


def test_more_memory_never_means_a_narrower_model() -> None:
    method = make_method("heterofl", means="micro-batches")
    state = method.init(spec(), PROBLEM, seed=1, smallest_memory_bytes=0)
    client = Clients(EQUAL, (1,))[0]
    sizes = []
    for share in (0.3, 0.5, 0.7, 0.9, 1.1, 1.3):
        budget = int(share * full_bytes())
        plan = method.plan(state, [replace(client, memory_bytes=budget)])
        if plan.tasks:
            assert plan.costs[0].peak_bytes <= budget
            sizes.append(sum(t.numel() for t in extract(state.params, plan.coords[0]).values()))
    assert len(sizes) > 3 and sizes == sorted(sizes) and sizes[0] < sizes[-1]
