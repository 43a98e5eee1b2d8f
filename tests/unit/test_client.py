"""The local loop: what a step computes, what it changes, and what it leaves alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalefl.client import Residents, run_task, train_batch
from scalefl.errors import ConfigError
from scalefl.hsic import nhsic
from scalefl.mentor import Mentor, MentorLoss
from scalefl.methods.common import initial_params
from scalefl.methods.fedavg import FedAvg
from scalefl.models.skeleton import tensors
from scalefl.models.spec import ModelSpec
from scalefl.objectives import TaskLoss
from scalefl.params import Params
from scalefl.problem import Batch, Classification, Column, Problem, Weighted
from scalefl.sgd import SGD
from scalefl.steps import full_step
from scalefl.types import ClientTask, ClientUpdate, LocalWork, Means, Offer, ServerState, Step
from support import (
    IMAGE,
    PROBLEM,
    WORK,
    all_finite,
    copied,
    examples_of,
    global_rng,
    identical,
    make_method,
    spec,
    tiny,
)

WHOLE, PLAIN = Means(), FedAvg()
PRECISE = Classification(3, (Column("x", IMAGE, "float64"),))


def precise() -> nn.Module:
    """`tiny` with GroupNorm in float64: no sample depends on another."""
    return tiny(norm="group").double()


@dataclass(frozen=True)
class Masked(Classification):
    """Rows with label −1 carry no loss: a batch weighs less than its rows, and may weigh nothing."""

    def loss(self, output: Tensor, batch: Batch) -> Weighted:
        labels = batch[self.label]
        return F.cross_entropy(output, labels, reduction="sum", ignore_index=-1), int((labels >= 0).sum())


MASKED = Masked(3, (Column("x", IMAGE, "float64"),))


def batch_of(count: int, seed: int = 0, dtype: torch.dtype = torch.float64, **labels: Any) -> dict[str, Tensor]:
    batch = examples_of(seed, count, **labels)
    return {**batch, "x": batch["x"].to(dtype)}


def run(
    examples: Batch,
    *,
    model: ModelSpec | None = None,
    problem: Problem = PRECISE,
    work: LocalWork = WORK,
    means: Means = WHOLE,
    seed: int = 5,
    method: Any = PLAIN,
    step: Step | None = None,
    params: Params | None = None,
) -> ClientUpdate:
    """Full training of `precise` (or another step) on one client."""
    model = model or ModelSpec.of(precise)
    step = replace(step or full_step(model, problem, work), means=means)
    params = copied(params or initial_params(model, 0))
    task = ClientTask(4, 0, (step,), seed)
    return run_task(method, problem, Residents(), task, params, examples)


def close(a: ClientUpdate, b: ClientUpdate) -> bool:
    return all(torch.allclose(a.params[n], b.params[n], rtol=0, atol=1e-10) for n in a.params)


# Gradient accumulation.


@pytest.mark.parametrize("micro", [1, 3, 4, 7, 8, 100])
@pytest.mark.parametrize("rows", [8, 21, 23])
def test_accumulated_gradients_equal_the_batch(micro, rows):
    """Several batches and epochs with momentum, decay and clipping; the last batch and micro-batch are uneven."""
    work = LocalWork(epochs=2, batch_size=8, lr=0.1, momentum=0.9, weight_decay=1e-3, clip_norm=1.0)
    whole, split = (run(batch_of(rows), work=work, means=means) for means in (Means(), Means(micro)))
    assert close(whole, split)
    for name, (value, weight) in whole.metrics.items():
        assert split.metrics[name] == (pytest.approx(value, abs=1e-9), weight)


def gradient(batch: Batch, problem: Problem, objective: Any, means: Means = WHOLE) -> dict[str, Tensor]:
    """What one step on `batch` follows: with lr 1 and no momentum it is the way that the parameters go."""
    model = ModelSpec.of(precise)
    work = LocalWork(lr=1.0, momentum=0.0, weight_decay=0.0)
    step = full_step(model, problem, work)
    params = initial_params(model, 0)
    before = copied(params)
    with Residents()[model].holding(step.part, params, step.trainable) as (runner, trained):
        train_batch(runner, SGD(trained, work), batch, problem, objective, means)
    return {name: before[name] - params[name] for name in step.trainable}


def autograd(batch: Batch, value: Any) -> dict[str, Tensor]:
    """The gradient of `value(module, feature before the head)` by plain PyTorch."""
    model = precise()
    model.load_state_dict(initial_params(ModelSpec.of(precise), 0))
    value(model).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-12)


MASKED_LABELS = [
    [0, 1, -1, 2, -1, -1, 1, 0, 2, -1],
    [-1, -1, -1, -1, -1, -1, 1, 0, 2, 2],  # a micro-batch without any weight
    [0, 1, 2, 0, 1, 2, 0, 1, 2, 0],
]


@pytest.mark.parametrize("micro", [None, 1, 3, 4, 10])
@pytest.mark.parametrize("labels", MASKED_LABELS)
def test_weights_that_are_not_the_rows(labels, micro):
    """The mean is over what carries weight in the batch, however it is split."""
    batch = {**batch_of(10), "label": torch.tensor(labels)}
    expected = autograd(batch, lambda m: F.cross_entropy(m(batch["x"]), batch["label"], ignore_index=-1))
    assert_close(gradient(batch, MASKED, TaskLoss(), Means(micro)), expected)


def test_a_batch_without_any_weight_moves_nothing():
    batch = {**batch_of(6), "label": torch.full((6,), -1)}
    assert all(not t.any() for t in gradient(batch, MASKED, TaskLoss()).values())


@pytest.mark.parametrize("labels", MASKED_LABELS)
def test_batch_terms_do_not_depend_on_the_weight_of_the_loss(labels):
    """L = (mean loss) − λ nHSIC: λ is λ, whatever part of the rows carries loss."""
    batch = {**batch_of(10), "label": torch.tensor(labels)}

    def value(model: nn.Module) -> Tensor:
        z = model[2][:5](model[1](model[0](batch["x"])))
        logits = model[2][5](z)
        return F.cross_entropy(logits, batch["label"], ignore_index=-1) - 0.7 * nhsic(batch["x"], z)

    assert_close(gradient(batch, MASKED, MentorLoss(Mentor(), 0.7, 0.0)), autograd(batch, value))


SEEN: list[int] = []


class Counting(nn.Module):
    """Notes how many rows it sees at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        SEEN.append(len(x))
        return self.linear(x.flatten(1))


def test_batches_and_micro_batches():
    """Batches of 10 and a rest of 5; micro-batches of nearly equal length, none longer than asked for."""
    model = ModelSpec.of(Counting)
    work = LocalWork(batch_size=10)
    step = full_step(model, PROBLEM, work)
    for rows, micro, expected in [
        (25, None, [10, 10, 5]),
        (25, 4, [4, 3, 3] * 2 + [3, 2]),
        (21, None, [10, 10]),  # a single leftover is left out
        (11, 3, [3, 3, 2, 2]),
        (1, None, [1]),  # but not if it is all there is
        (1, 4, [1]),
        (12, 10, [10, 2]),
    ]:
        SEEN.clear()
        found = run(examples_of(0, rows), model=model, problem=PROBLEM, step=step, means=Means(micro))
        assert expected == SEEN, (rows, micro)
        assert found.num_examples == rows
        assert found.metrics["accuracy"][1] == sum(expected)


def test_batches_of_one_are_all_used():
    """Only a *trailing* batch of one is left out; where the batch size is 1 there is none."""
    update = run(batch_of(5), work=LocalWork(batch_size=1, lr=0.01))
    assert update.metrics["loss"][1] == 5


def test_no_example_is_normalised_alone():
    """Micro-batches of 3 or more never leave one example over."""
    model = ModelSpec.of(Counting)
    step = full_step(model, PROBLEM, LocalWork(batch_size=40))
    for micro in (3, 4, 5, 8):
        for rows in range(2, 41):
            SEEN.clear()
            run(examples_of(0, rows), model=model, problem=PROBLEM, step=step, means=Means(micro))
            assert sum(SEEN) == rows and min(SEEN) >= 2 and max(SEEN) <= micro


# Clients that federated data has every day.


@pytest.mark.parametrize("name", ["fedavg", "scalefl", "sbt"])
@pytest.mark.parametrize(("rows", "labels"), [(1, (1,)), (2, (0,)), (9, (2,)), (9, (0, 1, 2))])
def test_one_sample_and_one_class_clients(name, rows, labels):
    settings = {} if name == "fedavg" else {"blocks": ["0", "1"]}
    method = make_method(name, **settings)
    state = method.init(spec(), PROBLEM, seed=0, smallest_memory_bytes=0)
    for choice in method.menu(state):
        examples = examples_of(0, rows, labels)
        found = run(examples, problem=PROBLEM, method=method, step=choice.step, params=state.params)
        assert all(bool(t.isfinite().all()) for t in found.params.values()), choice.label
        assert all_finite(v for pair in found.metrics.values() for v in pair)
        assert found.num_examples == rows


def test_metrics_are_of_the_last_epoch():
    once, thrice = (run(batch_of(24), work=replace(WORK, epochs=n, lr=0.05)) for n in (1, 3))
    assert thrice.metrics["loss"][1] == once.metrics["loss"][1] == 24
    assert thrice.metrics["loss"][0] < once.metrics["loss"][0]


# Determinism.

AUGMENTED = replace(PROBLEM, augmentation=("crop", "flip"))


@pytest.mark.parametrize(
    ("model", "problem"), [(spec(), AUGMENTED), (spec(dropout=0.5), PROBLEM), (spec(dropout=0.5), AUGMENTED)]
)
def test_a_task_is_a_function_of_its_seed(model, problem):
    method = make_method("fedavg")
    step = full_step(model, problem, WORK)

    def result(seed: int) -> ClientUpdate:
        params = initial_params(model, 0)
        return run(examples_of(0, 20), problem=problem, step=step, params=params, seed=seed, method=method)

    first = result(5)
    torch.rand(3)  # where the global generator stands must not matter
    assert identical(first.params, result(5).params) and first.metrics == result(5).metrics
    assert not identical(first.params, result(6).params)


def test_augmentation_differs_between_epochs_and_examples():
    seen: list[Tensor] = []

    @dataclass(frozen=True)
    class Watched(Classification):
        def loss(self, output: Tensor, batch: Batch) -> Weighted:
            seen.append(batch["x"].clone())
            return super().loss(output, batch)

    problem = Watched(3, PROBLEM.columns, augmentation=("crop",))
    same = {"x": examples_of(0, 1)["x"].expand(8, -1, -1, -1).contiguous(), "label": torch.zeros(8, dtype=torch.int64)}
    step = full_step(spec(), problem, replace(WORK, epochs=2))
    seen.clear()
    run(same, problem=problem, step=step, params=initial_params(spec(), 0))
    first, second = seen[0], seen[-1]
    assert not torch.equal(first, second), "two epochs saw the same crops"
    assert any(not torch.equal(first[0], row) for row in first[1:]), "all examples got the same crop"


def test_the_order_differs_between_epochs():
    seen: list[list[int]] = []

    @dataclass(frozen=True)
    class Watched(Classification):
        def inputs(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
            seen.append(batch["label"].tolist())
            return super().inputs(batch)

    examples = {**examples_of(0, 16), "label": torch.arange(16) % 3}
    step = full_step(spec(), Watched(3, PROBLEM.columns), replace(WORK, epochs=3, batch_size=16))
    seen.clear()
    run(examples, problem=Watched(3, PROBLEM.columns), step=step, params=initial_params(spec(), 0))
    assert len(seen) == 3 and seen[0] != seen[1] != seen[2] and seen[0] != examples["label"].tolist()


def test_metrics_are_taken_in_the_last_epoch_only():
    seen: list[int] = []

    @dataclass(frozen=True)
    class Watched(Classification):
        def metrics(self, output: Tensor, batch: Batch) -> dict[str, Weighted]:
            seen.append(len(batch["label"]))
            return super().metrics(output, batch)

    problem = Watched(3, PROBLEM.columns)
    step = full_step(spec(), problem, replace(WORK, epochs=3, batch_size=8))
    seen.clear()
    update = run(examples_of(0, 20), problem=problem, step=step, params=initial_params(spec(), 0))
    assert seen == [8, 8, 4]
    assert update.metrics["accuracy"][1] == update.metrics["loss"][1] == 20


def test_the_global_generators_are_as_before():
    before = global_rng()
    run(examples_of(0, 20), problem=AUGMENTED, model=spec(dropout=0.5), params=initial_params(spec(), 0))
    assert global_rng() == before


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.max() > 1e5:
            torch.rand(3)
            raise RuntimeError("no")
        return self.linear(x.flatten(1))


def test_the_global_generators_are_as_before_after_a_failure():
    before = global_rng()
    model = ModelSpec.of(Failing)
    bad = examples_of(0, 4)
    bad["x"][1] = 1e6
    with pytest.raises(RuntimeError, match="no"):
        run(bad, problem=PROBLEM, model=model, params=initial_params(model, 0))
    assert global_rng() == before


def test_a_resident_survives_a_failed_task():
    """Hooks, tensors and modes of a failed task must not show in the next one."""
    model = ModelSpec.of("support:deadly")
    method = make_method("scalefl", blocks=["1", "2"])
    state = method.init(model, PROBLEM, seed=0, smallest_memory_bytes=0)
    good, bad = examples_of(0, 12), examples_of(1, 12)
    bad["x"][3] = 1e6
    shared = Residents()
    for choice in method.menu(state):
        task = ClientTask(0, 0, (choice.step,), 9)
        with pytest.raises(ValueError, match="camera"):
            run_task(method, PROBLEM, shared, task, copied(state.params), bad)
        after = run_task(method, PROBLEM, shared, task, copied(state.params), good)
        fresh = run_task(method, PROBLEM, Residents(), task, copied(state.params), good)
        assert identical(after.params, fresh.params), choice.label


# What a task changes.


def choices(name: str, **settings: Any) -> tuple[Any, ServerState, list[Offer]]:
    method = make_method(name, **settings)
    state = method.init(spec(), PROBLEM, seed=0, smallest_memory_bytes=0)
    return method, state, method.menu(state)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("fedavg", {}),
        ("scalefl", {"blocks": ["0", "1"]}),
        ("scalefl", {"blocks": ["0", "1"], "coadapted_layers": 0}),
        ("scalefl", {"blocks": ["0", "1"], "coadapted_layers": 5, "mentor": {"projection": "mlp"}}),
        ("sbt", {"blocks": ["0", "1"]}),
    ],
)
def test_exactly_the_moving_names_move(name, settings):
    method, state, menu = choices(name, **settings)
    for choice in menu:
        params = copied(state.params)
        task = ClientTask(0, 0, (choice.step,), 1)
        given = {name: params[name] for name in choice.step.part.names()}
        update = run_task(method, PROBLEM, Residents(), task, given, examples_of(0, 16))
        assert update.params.keys() == choice.step.moving
        moved = {n for n in params if not identical({n: params[n]}, {n: state.params[n]})}
        assert moved <= choice.step.moving, choice.label
        # Only what the loss does not look at may stay: a projection head that no term reads.
        assert {n for n in choice.step.moving - moved if ".projection." not in n} == set(), choice.label
        for name in params:
            assert params[name].shape == state.params[name].shape and params[name].dtype == state.params[name].dtype
        assert update.receipt.bytes_down == sum(t.numel() * t.element_size() for t in given.values())
        assert update.receipt.bytes_up == sum(t.numel() * t.element_size() for t in update.params.values())


def offered(method, state, label):
    return next(offer.step for offer in method.menu(state) if offer.label == label)


def test_a_span_with_its_tail_trains_the_head_along():
    """Unless the head has a step of its own in the same task."""
    head = {"2.5.weight", "2.5.bias"}
    method, state, _ = choices("scalefl", blocks=["0", "1"], spans="elastic", coadapted_layers=0)
    step = offered(method, state, "block 1 with tail")
    own = {n for n in state.params if n.startswith("0.")}
    assert step.moving == own | head
    assert set(step.part.names()) == {n for n in state.params if not n.startswith("@")}
    method, state, _ = choices("scalefl", blocks=["0", "1"])
    assert offered(method, state, "block 1 with tail").moving == own


def test_a_span_with_its_tail_has_the_mentors_weights_of_the_models_end():
    """There Z is read; and what a round gives is among the terms whose cost was predicted."""
    method, state, _ = choices("scalefl", blocks=["0", "1"])
    _, last = method.mentor.coefficients(2, 3)
    for span in ("block 1", "block 2", "blocks 1-2"):
        assert offered(method, state, span + " with tail").coefficients == (("lambda", 0.0), last)
    weights = offered(method, state, "block 1").coefficients
    assert weights == method.mentor.coefficients(0, 3) != (("lambda", 0.0), last)


def test_spans_train_what_their_names_say():
    """Block 2 of three: its own weights, the convolution before it with its norm, and its output module."""
    method, state, _ = choices("scalefl", blocks=["0", "1"], spans="elastic", tails=False)
    step = offered(method, state, "block 2")
    own = {n for n in state.params if n.startswith(("0.", "1.")) or n.startswith("@output.1.")}
    assert step.moving == own
    assert set(step.part.names()) == own


@pytest.mark.parametrize("layers", [0, 1])
def test_the_prefix_runs_with_frozen_statistics(layers):
    """Before the block the norms use what the server sent; the block's own (and co-adapted ones) the batch."""
    method, state, _ = choices("scalefl", blocks=["0", "1"], coadapted_layers=layers, spans="elastic", tails=False)
    step = offered(method, state, "block 2")
    batch = examples_of(0, 8)
    module = spec().build(0)
    module.load_state_dict(dict(method.deploy(state)[1]))
    z = module[1].train()(module[0].train(mode=bool(layers))(batch["x"]))
    params = copied(state.params)
    with Residents()[spec()].holding(step.part, params, step.trainable, step.moving) as (runner, _):
        assert torch.equal(runner(batch, PROBLEM).z, z)
    assert identical({"m": params["0.1.running_mean"]}, {"m": module[0][1].running_mean})


def test_several_steps_in_one_task_go_on_from_each_other():
    """A task of two steps ends where two tasks, one after the other, would: blocks are handed on in place."""
    method, state, menu = choices("scalefl", blocks=["0", "1"], tails=False)
    first, second = menu[0].step, menu[1].step
    params = copied(state.params)
    task = ClientTask(0, 0, (first, second), 3)
    both = run_task(method, PROBLEM, Residents(), task, params, examples_of(0, 16))
    assert both.params.keys() == first.moving | second.moving
    alone = run_task(
        method, PROBLEM, Residents(), replace(task, steps=(first,)), copied(state.params), examples_of(0, 16)
    )
    assert identical({n: both.params[n] for n in first.moving}, alone.params)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
        self.b.weight = self.a.weight
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x.flatten(1)).relu()))


def test_a_model_with_tied_weights_trains_in_blocks():
    """The cut after the two layers that share a weight is left; each block's names are of tensors that exist."""
    method = make_method("scalefl", blocks=2)
    state = method.init(ModelSpec.of(Tied), PROBLEM, seed=0, smallest_memory_bytes=0)
    for offer in method.menu(state):
        assert offer.step.moving <= state.params.keys()
        params = {name: state.params[name].clone() for name in offer.step.part.names()}
        task = ClientTask(0, 0, (offer.step,), 1)
        update = run_task(method, PROBLEM, Residents(), task, params, examples_of(0, 16))
        assert update.params.keys() == offer.step.moving


def test_tied_weights_are_trained_once_and_uploaded_once():
    model = ModelSpec.of(Tied)
    work = replace(WORK, momentum=0.9)
    update = run(examples_of(0, 16), model=model, problem=PROBLEM, work=work, params=initial_params(model, 0))
    assert "b.weight" not in update.params
    assert tensors(model.build(0)).keys() == update.params.keys()


# Learning rates.


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.4] * 6),
        ("linear", [0.4, 0.3, 0.2, 0.1, 0.0, 0.0]),
        ("cosine", [0.4, 0.2 + 0.1 * math.sqrt(2), 0.2, 0.2 - 0.1 * math.sqrt(2), 0.0, 0.0]),
    ],
)
def test_learning_rate_schedules(schedule, expected):
    work = LocalWork(lr=0.4, lr_schedule=schedule, lr_rounds=4)
    found = [work.at_round(i) for i in range(6)]
    assert [w.lr for w in found] == pytest.approx(expected, abs=1e-12)
    assert {w.lr_schedule for w in found} == {"constant"}
    assert all(replace(w, lr=0.4, lr_schedule=schedule, lr_rounds=4) == work for w in found)
    assert all(w.at_round(3) == w for w in found), "applied twice, it falls no further"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"epochs": 0}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"lr": math.nan}, "lr"),
        ({"lr": -1}, "lr"),
        ({"momentum": math.inf}, "momentum"),
        ({"weight_decay": -1e-9}, "weight_decay"),
        ({"clip_norm": -1}, "clip_norm"),
        ({"prox": math.nan}, "prox"),
        ({"lr_schedule": "cosine"}, "lr_rounds"),
    ],
)
def test_impossible_work_is_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        LocalWork(**settings)
