"""Our SGD against torch.optim's, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from scalefl.sgd import SGD
from scalefl.types import LocalWork


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=draw)) for name, shape in [("w", (5, 3)), ("b", (7,))]}


def gradients(step: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(100 + step)
    return {"w": torch.randn(5, 3, generator=draw), "b": torch.randn(7, generator=draw)}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 5e-4])
@pytest.mark.parametrize("clip_norm", [0.0, 1.5])
def test_bit_equal_to_torch(momentum, weight_decay, clip_norm):
    """Over six steps, in some of which a parameter has no gradient: the first, one in between, all of them."""
    missing = {0: {"b"}, 3: {"w"}, 4: {"w", "b"}}
    ours, theirs = parameters(), parameters()
    work = LocalWork(lr=0.1, momentum=momentum, weight_decay=weight_decay, clip_norm=clip_norm)
    mine = SGD(ours, work)
    reference = torch.optim.SGD(theirs.values(), lr=0.1, momentum=momentum, weight_decay=weight_decay)
    for step in range(6):
        mine.zero_grad()
        reference.zero_grad()
        for name, grad in gradients(step).items():
            if name not in missing.get(step, ()):
                ours[name].grad, theirs[name].grad = grad.clone(), grad.clone()
        if clip_norm:
            nn.utils.clip_grad_norm_(theirs.values(), clip_norm)
        mine.step()
        reference.step()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), step


def test_a_real_model_trains_bit_for_bit_alike():
    def trained(make) -> list[Tensor]:
        torch.set_num_threads(1)
        draw = torch.Generator().manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=draw))
        optimizer = make(dict(model.named_parameters()))
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(9, 6, generator=draw)).square().sum().backward()
            optimizer.step()
        return list(model.parameters())

    settings = {"lr": 1e-3, "momentum": 0.8, "weight_decay": 0.01}
    ours = trained(lambda named: SGD(named, LocalWork(**settings)))
    theirs = trained(lambda named: torch.optim.SGD(named.values(), **settings))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_prox_is_the_gradient_of_its_term():
    """FedProx: μ/2·‖θ − θ⁽ʳ⁾‖², by autograd, for several steps away from the start."""
    mu, ours, theirs = 0.3, parameters(), parameters()
    start = {name: p.detach().clone() for name, p in theirs.items()}
    mine = SGD(ours, LocalWork(lr=0.1, momentum=0.9, weight_decay=1e-3, prox=mu))
    reference = torch.optim.SGD(theirs.values(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    for step in range(4):
        mine.zero_grad()
        reference.zero_grad()
        grads = gradients(step)
        for name, grad in grads.items():
            ours[name].grad = grad.clone()
        data_term = sum((theirs[name] * grad).sum() for name, grad in grads.items())
        prox_term = mu / 2 * sum((theirs[name] - start[name]).square().sum() for name in theirs)
        (data_term + prox_term).backward()
        mine.step()
        reference.step()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)
    assert not torch.equal(ours["w"], start["w"])


def test_prox_pulls_back_and_none_does_not():
    for prox in (0.0, 10.0):
        p = {"w": nn.Parameter(torch.zeros(1))}
        optimizer = SGD(p, LocalWork(lr=0.01, momentum=0.0, weight_decay=0.0, prox=prox))
        for _ in range(300):
            p["w"].grad = torch.tensor([-1.0])
            optimizer.step()
        # Without a pull 300 steps of 0.01; with it where the forces balance, 1/μ.
        assert float(p["w"].detach()) == pytest.approx(0.1 if prox else 3.0, rel=1e-3)


@pytest.mark.parametrize(("size", "kept"), [(3.0, 1.5), (0.1, 0.1)])
def test_clipping_shortens_long_gradients_only(size, kept):
    p = {"a": nn.Parameter(torch.zeros(2)), "b": nn.Parameter(torch.zeros(2))}
    optimizer = SGD(p, LocalWork(lr=1.0, momentum=0.0, weight_decay=0.0, clip_norm=1.5))
    for q in p.values():
        q.grad = torch.full((2,), size / 2)
    optimizer.step()
    moved = torch.cat([q.detach() for q in p.values()])
    assert float(moved.norm()) == pytest.approx(kept, rel=1e-5)


def test_scale_grad_and_zero_grad():
    p = {"a": nn.Parameter(torch.zeros(2)), "b": nn.Parameter(torch.zeros(2))}
    optimizer = SGD(p, LocalWork())
    p["a"].grad = torch.tensor([2.0, 4.0])
    optimizer.scale_grad(0.25)
    assert p["a"].grad.tolist() == [0.5, 1.0] and p["b"].grad is None
    optimizer.zero_grad()
    assert p["a"].grad is None


def test_large_parameters_move_in_backward_and_the_others_in_step():
    """The numbers are those of one step for all."""
    found, wanted = parameters(), parameters()
    sizes = sorted(p.nbytes for p in found.values())
    work = LocalWork(lr=0.1, momentum=0.9, weight_decay=0.01)
    optimizer, usual = SGD(found, work, in_backward=sizes[-1]), SGD(wanted, work)
    for _ in range(2):
        before = {name: p.detach().clone() for name, p in found.items()}
        for each in (found, wanted):
            sum((p.square() * p).sum() for p in each.values()).backward()
        for name, p in found.items():
            is_large = p.nbytes == sizes[-1]
            assert (p.grad is None) == is_large and torch.equal(p, before[name]) != is_large, name
        optimizer.step(), usual.step()
        optimizer.zero_grad(), usual.zero_grad()
    assert all(torch.equal(p, wanted[name]) for name, p in found.items())


class Still(torch.autograd.Function):
    """Its weight has no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        return x * weight.mean()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def test_a_parameter_that_gets_no_gradient_in_a_backward_pass_stays():
    """Where it would be updated in that pass, too: torch calls its hook all the same."""
    for in_backward in (None, 0):
        found = parameters()
        before = found["w"].detach().clone()
        optimizer = SGD(found, LocalWork(), in_backward=in_backward)
        Still.apply(found["b"], found["w"]).sum().backward()
        optimizer.step()
        assert torch.equal(found["w"], before) and not torch.equal(found["b"], parameters()["b"])
