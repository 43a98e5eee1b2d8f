"""Images with their channels last: the same by all means, predicted, and never where torch corrupts memory."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from scalefl.blocks import Blocks, Span, blocks_by_count
from scalefl.client import Residents, run_task
from scalefl.coords import extract
from scalefl.costs import step_cost
from scalefl.engines.local import LocalEngine
from scalefl.measure import MARGIN_BYTES, MARGIN_SHARE
from scalefl.methods.common import initial_params, make_plan
from scalefl.methods.fedavg import FedAvg
from scalefl.models.spec import ModelSpec
from scalefl.objectives import TaskLoss
from scalefl.parts import first_convolutions
from scalefl.problem import Classification, Column
from scalefl.steps import full_step, span_step
from scalefl.types import Choice, ClientTask, ClientUpdate, LocalWork, Means, ServerState, Step
from support import Clients, MadeData, identical

PROBLEM = Classification(10, (Column("image", (3, 32, 32), "uint8"),))
WORK = LocalWork(batch_size=8, lr=0.02, epochs=2, memory_format="channels_last")
MODELS = {
    "cnn": ModelSpec.of("scalefl.models.cnn:cnn", width=0.5),
    "resnet10": ModelSpec.of("scalefl.models.resnet:resnet10", width=0.25),
    "group": ModelSpec.of("scalefl.models.resnet:resnet10", width=0.25, norm="group"),
    "vgg": ModelSpec.of("scalefl.models.vgg:vgg11_bn", width=0.25),
    "squeezenet": ModelSpec.of("scalefl.models.squeezenet:squeezenet", width=0.5),
}


def examples(count: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=draw)
    return {"image": pixels, "label": torch.randint(0, 10, (count,), generator=draw)}


def trained(step: Step, count: int = 24) -> dict[str, Tensor]:
    params = initial_params(step.part.model, 0)
    own = {n: t.clone() if n in step.moving else t for n, t in params.items()}
    task = ClientTask(0, 0, (step,), 1)
    return dict(run_task(FedAvg(), PROBLEM, Residents(), task, own, examples(count)).params)


@pytest.mark.parametrize("name", MODELS)
def test_the_same_but_for_rounding(name):
    work = replace(WORK, epochs=1, lr=0.001)
    found = trained(full_step(MODELS[name], PROBLEM, work), count=8)
    wanted = trained(full_step(MODELS[name], PROBLEM, replace(work, memory_format="contiguous")), count=8)
    assert found.keys() == wanted.keys() and not identical(found, wanted), "other kernels ran"
    for key, tensor in wanted.items():
        assert torch.allclose(found[key], tensor, rtol=0.01, atol=1e-4), key


class Noting(nn.Module):
    """Notes how what passes it lies in memory."""

    seen: list[bool] = []  # noqa: RUF012  (of the class: a skeleton is built anew)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous())
        return x


def noting(channels: int = 16) -> nn.Module:
    layers = [nn.Conv2d(3, channels, 3), Noting(), nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 8, 3)]
    return nn.Sequential(*layers, Noting(), nn.Flatten(), nn.Linear(8 * 28 * 28, 10))


@pytest.mark.parametrize(
    ("channels", "memory_format", "wanted"),
    [(16, "channels_last", True), (16, "contiguous", False), (4, "channels_last", False)],
)
def test_it_lies_so_behind_the_first_convolution(channels, memory_format, wanted):
    model = ModelSpec.of("test_memory_format:noting", channels=channels)
    step = full_step(model, PROBLEM, replace(WORK, memory_format=memory_format))
    Noting.seen.clear()
    trained(step)
    assert set(Noting.seen) == {wanted}


def blocks() -> Blocks:
    return blocks_by_count(MODELS["resnet10"], PROBLEM, 4)


@cache
def resident_bits() -> dict[str, Tensor]:
    return trained(span_step(blocks(), Span(2, 3), None, WORK))


MEANS = [
    Means(prefix="chunked"),
    Means(prefix="streamed"),
    Means(prefix="cached"),
    Means(recompute=True),
    Means(prefix="cached", recompute=True, free_gradients=True),
]


@pytest.mark.parametrize("means", MEANS, ids=str)
def test_means_change_no_bit(means):
    step = span_step(blocks(), Span(2, 3), None, WORK)
    assert step.part.channels_last and step.part.entry is not None
    assert identical(trained(replace(step, means=means)), resident_bits())


@pytest.mark.parametrize("means", [Means(), Means(micro_batch_size=8), Means(prefix="cached")], ids=str)
@pytest.mark.parametrize("name", ["resnet10", "group", "vgg", "squeezenet"])
def test_a_peak_is_as_predicted(name, means, engine):
    work = replace(WORK, batch_size=32, epochs=1)
    found = blocks_by_count(MODELS[name], PROBLEM, 3)
    step = replace(span_step(found, Span(1, 2), None, work), means=means)
    cost = step_cost(step, PROBLEM, TaskLoss())
    state = ServerState(step.part.model, PROBLEM, initial_params(step.part.model, 0), round=0, seed=0)
    plan = make_plan(state, "step", [engine.population()[0]], {0: (Choice(step, cost, "step"),)}, work)
    (answer,) = engine.fit(FedAvg(), [(t, extract(state.params, plan.coords[0])) for t in plan.tasks])
    assert isinstance(answer, ClientUpdate), answer
    measured = answer.receipt.peak_bytes
    assert measured is not None
    assert measured <= cost.peak_bytes + max(MARGIN_SHARE * cost.peak_bytes, MARGIN_BYTES)
    assert measured >= 0.6 * cost.peak_bytes


class Images(MadeData):
    """One client with 96 images."""

    def __init__(self) -> None:
        super().__init__([96])
        self.problem = PROBLEM

    def examples(self, client: int) -> dict[str, Tensor]:
        return examples(96)


@pytest.fixture(scope="module")
def engine():
    with LocalEngine(Images(), Clients(Images(), (10**12,)), workers=1, cap="measured") as beside:
        yield beside


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_narrow_models_are_left_alone(channels):
    narrow = nn.Sequential(nn.Conv2d(3, channels, 3), nn.Conv2d(channels, 16, 3))
    assert first_convolutions(narrow) == []
    late = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, channels, 3))
    assert first_convolutions(late) == []


def test_what_is_turned_does_not_corrupt_memory():
    """Tried in a process of its own: what goes wrong there ends it."""
    program = """
import torch
from torch import nn
from scalefl.parts import first_convolutions, _turn
torch.manual_seed(0)
for channels in (8, 9, 12, 16, 24):
    for image in (1, 2, 3, 4):
        for depthwise in (False, True):
            groups = channels if depthwise else 1
            model = nn.Sequential(
                nn.Conv2d(image, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(),
                nn.Conv2d(channels, channels, 3, padding=1, groups=groups), nn.MaxPool2d(2),
                nn.Conv2d(channels, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            )
            (first,) = first_convolutions(model)
            first.register_forward_hook(_turn)
            for batch in (1, 2, 5, 10):
                model(torch.randn(batch, image, 16, 16)).square().sum().backward()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
