"""Linear layers that move their weights in the backward pass, against torch's and gradients that are made."""

from __future__ import annotations

import gc
import pickle
import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalefl.costs import step_cost
from scalefl.engines.local import LocalEngine
from scalefl.models.linear import Linear
from scalefl.models.spec import ModelSpec
from scalefl.objectives import TaskLoss
from scalefl.sgd import SGD
from scalefl.steps import full_step
from scalefl.types import LocalWork
from support import PROBLEM, Clients, MadeData, identical, make_method, play

MIB = 2**20
LARGE = ModelSpec.of("scalefl.models.cnn:cnn", num_classes=3, in_channels=1, image_size=8, width=2.0)
"""Its hidden layer has 2 MiB."""


class Two(nn.Module):
    """Two layers, both large enough."""

    def __init__(self, kind: type[nn.Linear]) -> None:
        super().__init__()
        self.first, self.second = kind(6, 8), kind(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def pair(**settings) -> tuple[Two, SGD, Two, torch.optim.SGD]:
    """The same model twice: whose layers move their weights, and torch's own."""
    torch.set_num_threads(1)
    ours, theirs = Two(Linear), Two(nn.Linear)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn(p.shape, generator=draw))
    ours.load_state_dict(theirs.state_dict())
    mine = SGD(dict(ours.named_parameters()), LocalWork(**settings), in_layers=0)
    return ours, mine, theirs, torch.optim.SGD(theirs.parameters(), **settings)


@pytest.mark.parametrize("shape", [(6,), (5, 6), (3, 5, 6)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_weights_move_as_by_their_gradients(shape, momentum, weight_decay):
    """Over several steps, for one example without a dimension of its own, for many, and for sequences of many."""
    ours, mine, theirs, reference = pair(lr=0.1, momentum=momentum, weight_decay=weight_decay)
    draw = torch.Generator().manual_seed(1)
    for _ in range(5):
        x = torch.randn(shape, generator=draw)
        xs = x.clone().requires_grad_(), x.clone().requires_grad_()
        for model, optimizer, x in ((ours, mine, xs[0]), (theirs, reference, xs[1])):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            with mine.descending():
                loss.backward()
            if model is ours:
                assert ours.first.weight.grad is None and ours.second.weight.grad is None
            optimizer.step()
        torch.testing.assert_close(xs[0].grad, xs[1].grad)
    for found, wanted in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(found, wanted)
    assert not torch.equal(ours.first.weight, Two(Linear).first.weight)


def test_no_gradient_is_made_beside_the_weight():
    """What would be its gradient is never allocated."""
    layer = Linear(512, 1024, bias=False)
    optimizer = SGD({"w": layer.weight}, LocalWork(momentum=0.0), in_layers=0)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            found = func(*args, **(kwargs or {}))
            if isinstance(found, Tensor) and found.untyped_storage().data_ptr() != layer.weight.data_ptr():
                largest = max(largest, found.untyped_storage().nbytes())
            return found

    before = layer.weight.detach().clone()
    loss = layer(torch.randn(2, 512, requires_grad=True)).sum()
    with Watch(), optimizer.descending():
        loss.backward()
    assert not torch.equal(layer.weight, before) and 0 < largest < layer.weight.nbytes / 8


def one(in_layers: int | None = 0, **settings) -> tuple[Linear, SGD, Tensor]:
    """A layer, its optimizer and a copy of its weight."""
    layer = Linear(6, 6)
    return (
        layer,
        SGD(dict(layer.named_parameters()), LocalWork(**settings), in_layers=in_layers),
        layer.weight.detach().clone(),
    )


@pytest.mark.parametrize(
    "settings", [{"clip_norm": 1.0}, {"prox": 0.1}, {"in_layers": None}, {"in_layers": 6 * 6 * 4 + 1}]
)
def test_gradients_are_made_where_the_optimizer_needs_them(settings):
    layer, optimizer, before = one(**settings)
    with optimizer.descending():
        layer(torch.ones(3, 6)).sum().backward()
    assert layer.weight.grad is not None and torch.equal(layer.weight, before)


def test_weights_move_in_training_steps_only():
    """Not by gradients that an objective takes on its way, nor when the optimizer is done."""
    layer, optimizer, before = one()
    x = torch.randn(3, 6, requires_grad=True)
    out = layer(x).square().sum()
    torch.autograd.grad(out, x, retain_graph=True)
    assert torch.equal(layer.weight, before)
    with optimizer.descending():
        out.backward()
    assert layer.weight.grad is None and not torch.equal(layer.weight, before)
    optimizer.settle()
    with optimizer.descending():
        layer(x).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("ends", [True, False])
def test_an_optimizer_leaves_nothing_behind(ends):
    """Nor does one that has failed; without waiting for a garbage collection: memory is counted from task to task."""
    gc.collect()
    gc.disable()
    try:
        layer, optimizer, _ = one(momentum=0.9)
        held = [weakref.ref(t) for t in (layer.weight, optimizer.momentum["weight"])]
        with optimizer.descending():
            layer(torch.ones(3, 6)).sum().backward()
        if ends:
            optimizer.settle()
            assert not vars(layer.weight)
        pickle.loads(pickle.dumps(layer))
        del layer, optimizer
        assert [ref() for ref in held] == [None, None]
    finally:
        gc.enable()


class Nothing(torch.autograd.Function):
    """No gradient comes back through it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> None:
        return None


def test_a_layer_into_which_no_gradient_comes_stays():
    layer, optimizer, before = one(weight_decay=0.1)
    with optimizer.descending():
        Nothing.apply(layer(torch.ones(3, 6))).sum().backward()
    optimizer.step()
    assert torch.equal(layer.weight, before)


ELSEWHERE = {
    "in a penalty": lambda run, w, x: run(x).sum() + w.square().sum(),
    "in a function": lambda run, w, x: run(x).sum() + F.linear(x, w).square().sum(),
    "in an embedding": lambda run, w, x: run(F.embedding(torch.tensor([0, 2]), w)).square().sum(),
    "under autocast": lambda run, w, x: run(x).sum() + _autocast(run, x),
    "under vmap": lambda run, w, x: run(x).sum() + torch.func.vmap(run)(x).square().sum(),
}


def _autocast(run, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return run(x).float().square().sum()


def test_a_saved_copy_is_not_taken_for_the_weight():
    layer, optimizer, before = one()
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
        found = layer(torch.ones(3, 6)).sum()
    with optimizer.descending():
        found.backward()
    assert layer.weight.grad is not None
    optimizer.step()
    assert not torch.equal(layer.weight, before)


def assert_moves_as_usual(losses: Sequence[Callable[..., Tensor]], in_backward: int | None = None, **settings) -> None:
    """A step by each loss of a layer, its weight and x: as of torch's layer, whose weight has gradients."""
    work = LocalWork(lr=0.05, **settings)
    found, wanted = Linear(6, 6), nn.Linear(6, 6)
    wanted.load_state_dict(found.state_dict())
    mine = SGD(dict(found.named_parameters()), work, in_layers=0, in_backward=in_backward)
    usual = SGD(dict(wanted.named_parameters()), work)
    draw = torch.Generator().manual_seed(2)
    for loss in losses:
        x = torch.randn(3, 6, generator=draw)
        for layer, optimizer in ((found, mine), (wanted, usual)):
            optimizer.zero_grad()
            value = loss(layer, layer.weight, x)
            with optimizer.descending():
                value.backward()
            optimizer.step()
    torch.testing.assert_close(found.weight, wanted.weight)


@pytest.mark.parametrize("where", ELSEWHERE)
@pytest.mark.parametrize("in_backward", [None, 0])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_weight_that_is_used_elsewhere_too_moves_once(where, in_backward, momentum):
    """By the sum of its gradients, over several steps."""
    assert_moves_as_usual([ELSEWHERE[where]] * 4, in_backward, momentum=momentum, weight_decay=0.01)


def test_each_step_is_looked_at_anew():
    """One that needs a gradient, between two that do not: each decays and has momentum once."""

    def once(run, w: Tensor, x: Tensor) -> Tensor:
        return run(x).square().mean()

    def twice(run, w: Tensor, x: Tensor) -> Tensor:
        return run(run(x)).square().mean()

    assert_moves_as_usual([once, twice, once], momentum=0.9, weight_decay=0.1)


def test_what_is_used_more_than_once_has_a_gradient():
    """A layer that runs twice, and one whose gradient has a gradient itself; in the step after that it moves again."""
    layer, optimizer, before = one()
    x = torch.randn(3, 6, requires_grad=True)

    def twice(run) -> Tensor:
        return run(run(x)).square().sum()

    def penalised(run) -> Tensor:
        (gradient,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
        return gradient.square().sum()

    for loss in (twice, penalised):
        found = loss(layer)
        with optimizer.descending():
            found.backward()
        (wanted,) = torch.autograd.grad(loss(lambda x: F.linear(x, layer.weight, layer.bias)), layer.weight)
        assert torch.equal(layer.weight, before)
        torch.testing.assert_close(layer.weight.grad, wanted)
        optimizer.zero_grad()
    found = layer(x).square().sum()
    with optimizer.descending():
        found.backward()
    assert not torch.equal(layer.weight, before)


def test_layers_under_vmap_and_autocast_are_torchs_own():
    layer, optimizer, before = one()
    found = torch.func.vmap(layer)(torch.ones(3, 6)).sum()
    with torch.autocast("cpu", torch.bfloat16):
        found = found + layer(torch.ones(3, 6)).float().sum()
    with optimizer.descending():
        found.backward()
    assert layer.weight.grad is not None and torch.equal(layer.weight, before)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_clients_hold_no_gradient_of_a_large_layer(momentum):
    """As predicted, and as measured; in the server's process and beside it, the numbers are the same bits."""
    work = LocalWork(batch_size=8, lr=0.05, momentum=momentum)

    def gradients(work: LocalWork) -> int:
        return dict(step_cost(full_step(LARGE, PROBLEM, work), PROBLEM, TaskLoss()).terms)["gradients"]

    assert gradients(LocalWork(batch_size=8, momentum=momentum, clip_norm=1.0)) - gradients(work) == 2 * MIB
    data, method = MadeData([24, 16, 24]), make_method("fedavg", work=work)
    clients = Clients(data, (64 * MIB,))
    with LocalEngine(data, clients) as here, LocalEngine(data, clients, workers=1, cap="measured") as beside:
        states, _ = play(method, here, 2, model=LARGE, cohort=3)
        others, records = play(method, beside, 2, model=LARGE, cohort=3)
    assert identical(states[-1].params, others[-1].params)
    for record in records:
        assert record.measured_peak_bytes == pytest.approx(record.predicted_peak_bytes, abs=MIB)
