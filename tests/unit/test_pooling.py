"""Pooling of our own: torch's numbers and torch's gradients, and torch's own wherever ours would not pay."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import scalefl.models.pooling
from scalefl.data import Dataset, PartitionedData
from scalefl.engines.local import LocalEngine
from scalefl.loop import federate
from scalefl.methods.fedavg import FedAvg
from scalefl.models.pooling import halved, speed_up
from scalefl.models.spec import ModelSpec
from scalefl.parts import Resident
from scalefl.problem import Classification, Column
from scalefl.rng import generator
from scalefl.sampling import UniformSampler
from scalefl.types import LocalWork
from support import Clients


def torchs(x, window):
    return F.max_pool2d(x, window, stride=2, padding=(window - 1) // 2)


def images(*shape, kind="normal", dtype=torch.float32):
    draw = torch.randn(shape, generator=generator(0, "images"))
    kinds = {
        "normal": lambda x: x,
        "rectified": torch.relu,  # many equals
        "few values": lambda x: x.round(),
        "equal": torch.zeros_like,
        "infinite": lambda x: torch.where(x > 1, torch.inf, torch.where(x < -1, -torch.inf, x)),
    }
    return kinds[kind](draw).to(dtype)


@pytest.fixture
def ours(monkeypatch) -> list[object]:
    """Poolings that were ours, so far."""
    seen: list[object] = []
    real = scalefl.models.pooling._halves

    def noting(x, dim):
        seen.append(x)
        return real(x, dim)

    monkeypatch.setattr(scalefl.models.pooling, "_halves", noting)
    return seen


@pytest.mark.parametrize("kind", ["normal", "rectified", "few values", "equal", "infinite"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("shape", [(3, 32, 16, 16), (1, 8, 32, 64), (2, 4096, 2, 2)])
def test_the_same_numbers_and_gradients(kind, dtype, window, shape, ours):
    x = images(*shape, kind=kind, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(halved(x, window), torchs(x, window))
    assert ours
    found, wanted = (x.clone().requires_grad_() for _ in range(2))
    y, wanted_y = halved(found, window), torchs(wanted, window)
    assert torch.equal(y, wanted_y)
    gradient = images(*y.shape, dtype=dtype)
    for one, outcome in ((found, y), (wanted, wanted_y)):
        (one.grad,) = torch.autograd.grad(outcome, one, gradient)
    assert torch.equal(found.grad, wanted.grad)


def test_a_window_with_nan_is_nan():
    x = images(2, 32, 16, 16)
    x[0, 0, 0, 0] = x[0, 1, 3, 3] = x[1, 2, 4, 7] = torch.nan
    for window in (2, 3):
        assert torch.equal(halved(x, window).isnan(), torchs(x, window).isnan())
    x.requires_grad_()
    assert torch.equal(halved(x, 2).isnan(), torchs(x, 2).isnan())


@pytest.mark.parametrize(
    "x",
    [
        images(2, 32, 16, 16).to(memory_format=torch.channels_last),
        images(2, 32, 16, 16).to(torch.bfloat16),
        images(2, 32, 15, 17),
        images(2, 32, 16, 15),
        images(2, 4, 8, 8),
        images(32, 16, 16),
        images(2, 32, 16, 32)[..., ::2],
        images(0, 32, 16, 16)[:0],
    ],
    ids=["channels last", "bfloat16", "odd", "odd width", "small", "no batch", "strided", "empty"],
)
@pytest.mark.parametrize("window", [2, 3])
def test_others_are_torchs(x, window):
    assert torch.equal(halved(x, window), torchs(x, window))
    assert halved(x, window).stride() == torchs(x, window).stride()


def test_what_is_small_or_lies_otherwise_does_not_come_here(ours):
    for x in (images(2, 4, 8, 8), images(2, 32, 16, 16).to(memory_format=torch.channels_last)):
        halved(x, 2), halved(x.requires_grad_(), 2)
    assert not ours


def test_for_many_clients_at_once():
    x = images(4, 3, 32, 16, 16)

    def loss(one):
        return (halved(one, 2) ** 2).sum()

    found = torch.func.vmap(torch.func.grad(loss))(x)
    wanted = torch.func.vmap(torch.func.grad(lambda one: (torchs(one, 2) ** 2).sum()))(x)
    torch.testing.assert_close(found, wanted)


def test_a_gradient_that_lies_otherwise():
    x = images(2, 32, 16, 16).requires_grad_()
    for gradient in (torch.ones(()).expand(2, 32, 8, 8), images(2, 32, 8, 8).to(memory_format=torch.channels_last)):
        (found,) = torch.autograd.grad(halved(x, 2), x, gradient)
        (wanted,) = torch.autograd.grad(torchs(x, 2), x, gradient)
        assert torch.equal(found, wanted)


def test_it_keeps_less_than_torch():
    kept = [0, 0]
    x = images(2, 32, 16, 16).requires_grad_()
    for i, pool in enumerate((halved, torchs)):

        def pack(t, i=i):
            kept[i] += t.numel() * t.element_size() if t.data_ptr() != x.data_ptr() else 0
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            pool(x, 2)
    assert kept == [x.numel() * 3 // 4, x.numel() // 4 * 8]


POOLS = [
    (nn.MaxPool2d(2), True),
    (nn.MaxPool2d((2, 2), stride=(2, 2)), True),
    (nn.MaxPool2d(3, stride=2, padding=1), True),
    (nn.MaxPool2d(3, stride=2), False),
    (nn.MaxPool2d(2, stride=1), False),
    (nn.MaxPool2d(2, ceil_mode=True), False),
    (nn.MaxPool2d(2, dilation=2), False),
    (nn.MaxPool2d(2, return_indices=True), False),
    (nn.MaxPool2d((2, 3)), False),
    (nn.MaxPool2d((2, 1)), False),
    (nn.AvgPool2d(2), False),
]


@pytest.mark.parametrize(("pool", "is_faster"), POOLS, ids=str)
def test_which_modules_are_made_faster(pool, is_faster, ours):
    x, module = images(2, 32, 16, 16), nn.Sequential(nn.Conv2d(32, 32, 1), copy.deepcopy(pool))
    with torch.no_grad():
        wanted = module(x)
        speed_up(module)
        for made in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            ours.clear()
            found = made(x)
            assert bool(ours) == is_faster
            if isinstance(wanted, tuple):
                assert all(map(torch.equal, found, wanted))
            else:
                assert torch.equal(found, wanted)


class Own(nn.MaxPool2d):
    def forward(self, x):
        return super().forward(x) + 1


def test_a_pooling_of_the_users_own_stays():
    module = nn.Sequential(Own(2))
    speed_up(module)
    assert torch.equal(module(x := images(2, 32, 16, 16)), torchs(x, 2) + 1)


def test_a_forward_that_was_set_on_a_pooling_stays():
    pool = nn.MaxPool2d(2)
    pool.forward = lambda x: x + 1
    speed_up(nn.Sequential(pool))
    assert torch.equal(pool(x := images(2, 32, 16, 16)), x + 1)


def test_arguments_by_name():
    pool = nn.Sequential(nn.MaxPool2d(2))
    speed_up(pool)
    assert torch.equal(pool[0](input=(x := images(2, 32, 16, 16))), torchs(x, 2))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("window", [2, 3])
def test_what_else_torch_can_do_with_a_pooling(window):
    """A gradient of a gradient, gradients of many outputs at once, forward-mode derivatives, and compiled code."""
    x = images(2, 32, 16, 16).requires_grad_()
    weights = images(3, 2, 32, 8, 8)

    def twice(pool):
        (first,) = torch.autograd.grad((pool(x, window) ** 3).sum(), x, create_graph=True)
        return torch.autograd.grad((first**2).sum(), x)[0]

    def batched(pool):
        return torch.autograd.grad(pool(x, window), x, weights, is_grads_batched=True)[0]

    def forward(pool):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x.detach().flip(0))
            return torch.autograd.forward_ad.unpack_dual(pool(dual, window)).tangent

    def compiled(pool):
        run = torch.compile(lambda t: pool(t, window), fullgraph=True, backend="eager")
        return torch.autograd.grad(run(x), x, weights[0])[0]

    for way in (twice, batched, forward, compiled):
        torch.testing.assert_close(way(halved), way(torchs), msg=way.__name__)


def test_predictions_know_what_it_takes():
    """The predicted peak of a model that pools is the measured one, which is two thirds activations here."""
    problem = Classification(10, (Column("image", (3, 32, 32), "uint8"),))
    rows = {"image": torch.zeros(128, 3, 32, 32, dtype=torch.uint8), "label": torch.zeros(128, dtype=torch.int64)}
    data = PartitionedData(Dataset(problem, rows, rows), [torch.arange(128)] * 2, torch.arange(0))
    clients = Clients(data, (2**30,))
    method = FedAvg(work=LocalWork(batch_size=128))
    with LocalEngine(data, clients, workers=1, cap="measured") as engine:
        state = method.init(ModelSpec.of("scalefl.models.cnn:cnn"), problem, seed=0, smallest_memory_bytes=0)
        _, record = next(federate(method, engine, UniformSampler(2), state))
    for peak in record.peaks:
        assert peak["measured_bytes"] == pytest.approx(peak["predicted_bytes"], rel=0.03)


def test_clients_hold_models_with_faster_poolings():
    resident = Resident(ModelSpec.of(nn.Sequential(nn.Conv2d(3, 32, 3), nn.MaxPool2d(2))))
    assert type(resident._module.get_submodule("1")) is scalefl.models.pooling._MaxPool2d
