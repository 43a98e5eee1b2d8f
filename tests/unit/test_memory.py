from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models import Case, built_in, case, images, vectors
from scalefl.blocks import Span, blocks_by_count, blocks_by_hand
from scalefl.costs import in_turn, step_cost
from scalefl.memory import Cost, Ledger, predict
from scalefl.mentor import Mentor, MentorLoss
from scalefl.models import resolve
from scalefl.models.spec import ModelSpec
from scalefl.objectives import TaskLoss
from scalefl.params import is_attachment
from scalefl.parts import Resident
from scalefl.planner import budget_error, cheapest, fitting_means, output_module
from scalefl.problem import Batch, Classification, Column, Problem, Weighted
from scalefl.steps import full_step, span_step
from scalefl.types import AUTO, NO_MEANS, Choice, Ladder, LocalWork, Means, PrefixMode, Step
from scalefl.units import MIB, mib

WORK = LocalWork(batch_size=16)
NO_MOMENTUM = replace(WORK, momentum=0.0)


def cost_of(step: Step, problem: Problem) -> Cost:
    return step_cost(step, problem, TaskLoss())


def stage_step(c: Case, num_blocks: int, block: int, work: LocalWork, coadapted_layers: int = 0) -> Step:
    blocks = blocks_by_count(c.model, c.problem, num_blocks)
    output = output_module(blocks, block, c.problem, work, "none")
    return span_step(blocks, Span(block, block), output, work, coadapted_layers=coadapted_layers)


def bytes_of(tensors: dict[str, Tensor], names: object = None) -> int:
    return sum(t.numel() * t.element_size() for n, t in tensors.items() if names is None or n in names)


# By hand, to the byte


@dataclass(frozen=True)
class SumOfLogits(Classification):
    """A loss without tensors of its own but scalars, so that every tensor of a step can be counted by hand."""

    def loss(self, output: Tensor, batch: Batch) -> Weighted:
        return output.sum(), len(output)

    def metrics(self, output: Tensor, batch: Batch) -> dict[str, Weighted]:
        return {}


D, H, K = 300, 200, 100
# The sum and the mean of the loss, and the mean's gradient; the sum's only while the last layer needs it.
SCALARS, FEW_SCALARS = 3 * 4, 16


def chain() -> nn.Module:
    return nn.Sequential(nn.Linear(D, H, bias=False), nn.Linear(H, K, bias=False))


def by_hand(rows: int) -> SumOfLogits:
    return SumOfLogits(K, (Column("x", (D,), "float32"),))


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_full_training_by_hand(rows: int, momentum: float) -> None:
    work = LocalWork(batch_size=rows, momentum=momentum)
    problem = by_hand(rows)
    terms = dict(cost_of(full_step(ModelSpec.of(chain), problem, work), problem).terms)
    weights = 4 * (D * H + H * K)
    # At the first layer's weight gradient, the last thing of backward: the batch (features, labels, row numbers), the
    # hidden feature and the logits, both held as taps, and the hidden feature's gradient.
    passing = rows * (4 * D + 16 + 4 * H + 4 * K + 4 * H) + SCALARS
    assert passing_of(terms) == pytest.approx(passing, abs=FEW_SCALARS)
    assert terms["weights"] == terms["gradients"] == weights
    assert terms["optimizer"] == (weights if momentum else 0)
    assert terms["copies"] == terms["output_module"] == terms["mentor"] == 0


def passing_of(terms: dict[str, int]) -> int:
    """What does not outlive the step."""
    return terms["activations"] + terms["transients"]


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_a_frozen_prefix_by_hand(rows: int) -> None:
    problem = by_hand(rows)
    blocks = blocks_by_hand(ModelSpec.of(chain), problem, ("0",))
    step = span_step(blocks, Span(1, 1), None, LocalWork(batch_size=rows))
    terms = dict(cost_of(step, problem).terms)
    # No gradient for the prefix's weights and none for the hidden feature.
    assert passing_of(terms) == pytest.approx(rows * (4 * D + 16 + 4 * H + 4 * K) + SCALARS, abs=FEW_SCALARS)
    assert terms["weights"] == 4 * (D * H + H * K)
    assert terms["gradients"] == terms["optimizer"] == 4 * H * K


@pytest.mark.parametrize(("rows", "micro"), [(64, 16), (64, 8), (1024, 1)])
def test_micro_batches_by_hand(rows: int, micro: int) -> None:
    problem = by_hand(rows)
    step = full_step(ModelSpec.of(chain), problem, LocalWork(batch_size=rows))
    cost = cost_of(replace(step, means=Means(micro_batch_size=micro)), problem)
    terms = dict(cost.terms)
    weights = 4 * (D * H + H * K)
    # The whole batch waits; the rest is there for one micro-batch at a time. From the second on, all gradients
    # are there from the start, and the first layer's is made beside them before it is added.
    assert terms["weights"] == terms["optimizer"] == weights
    assert terms["gradients"] == weights
    fresh = 4 * D * H
    passing = rows * (4 * D + 16) + micro * (4 * H + 4 * K + 4 * H) + SCALARS + fresh
    assert passing_of(terms) == pytest.approx(passing, abs=FEW_SCALARS)
    assert cost.num_examples == rows


def test_the_ledger_follows_storages_not_tensors() -> None:
    def step(ledger: Ledger) -> None:
        with ledger.counting_as("weights"):
            a = torch.zeros(100)
        b = a.view(10, 10).t()  # no storage of its own
        c = b + 1
        del c
        d = torch.zeros(50)
        ledger.file([d], "optimizer")
        ledger.file([a, b], "gradients")

    cost = predict(step, 1)
    assert cost.peak_bytes == 800
    # At the peak `d` was not there yet; `a`, filed anew, was.
    assert {term: size for term, size in cost.terms if size} == {"gradients": 400, "transients": 400}
    with_d = predict(lambda ledger: ledger.file([torch.zeros(50)], "gradients") or torch.zeros(1), 1)
    assert dict(with_d.terms)["gradients"] == 200


def test_a_convolution_needs_scratch() -> None:
    """oneDNN reorders: max(x, y) + w beside the tensors themselves."""

    def step(ledger: Ledger) -> None:
        x, w = torch.zeros(2, 3, 8, 8), torch.zeros(5, 3, 3, 3)
        torch.nn.functional.conv2d(x, w, padding=1)

    x, w, y = 4 * 2 * 3 * 64, 4 * 5 * 27, 4 * 2 * 5 * 64
    assert predict(step, 2).peak_bytes == x + w + y + max(x, y) + w


# Terms


@pytest.mark.parametrize("name", ["cnn", "resnet10", "squeezenet"])
def test_terms(name: str) -> None:
    c = case(name)
    steps = [full_step(c.model, c.problem, WORK), *(stage_step(c, 2, b, WORK, coadapted_layers=1) for b in range(2))]
    for step in steps:
        empty = Resident(c.model).empty(step.part)
        cost = cost_of(step, c.problem)
        terms = dict(cost.terms)
        own = {name for name in step.trainable if not is_attachment(name)}
        output = bytes_of(empty, step.trainable - own)
        trained = bytes_of(empty, own)
        assert sum(terms.values()) == cost.peak_bytes
        assert terms["weights"] == bytes_of(empty) - output
        assert terms["optimizer"] == trained
        assert 0 <= terms["gradients"] <= trained
        assert terms["output_module"] >= 2 * output
        assert terms["activations"] >= bytes_of(c.batch(WORK.batch_size))
        plain = dict(cost_of(replace(step, work=NO_MOMENTUM), c.problem).terms)
        assert plain["optimizer"] == plain["copies"] == 0
        pulled = dict(cost_of(replace(step, work=replace(NO_MOMENTUM, prox=0.1)), c.problem).terms)
        assert pulled["copies"] == trained
        # From the second micro-batch on all gradients are there.
        split = cost_of(replace(step, means=Means(micro_batch_size=4)), c.problem)
        assert dict(split.terms)["gradients"] == trained


# Laws


@pytest.mark.parametrize("name", ["cnn", "resnet10", "hf_bert", "branching"])
@pytest.mark.parametrize("block", [None, 0, 1])
def test_more_examples_never_take_less(name: str, block: int | None) -> None:
    c = case(name)
    step = full_step(c.model, c.problem, WORK) if block is None else stage_step(c, 2, block, WORK)
    costs = [cost_of(replace(step, work=replace(WORK, batch_size=n)), c.problem) for n in (2, 3, 8, 32)]
    peaks, flops = [x.peak_bytes for x in costs], [x.flops for x in costs]
    assert peaks == sorted(set(peaks))
    assert flops == sorted(set(flops))


@pytest.mark.parametrize("name", ["cnn", "resnet10", "vgg11_bn"])
def test_smaller_micro_batches_never_take_more(name: str) -> None:
    c = case(name)
    step = full_step(c.model, c.problem, replace(WORK, batch_size=32))
    whole = cost_of(step, c.problem)
    split = [cost_of(replace(step, means=Means(micro_batch_size=size)), c.problem) for size in (8, 4, 2)]
    assert whole.peak_bytes > split[0].peak_bytes > split[1].peak_bytes > split[2].peak_bytes
    assert all(x.flops == whole.flops for x in split)
    assert cost_of(replace(step, means=Means(micro_batch_size=99)), c.problem) == whole


@pytest.mark.parametrize("name", ["resnet10", "resnet18", "resnet34"])
def test_a_stage_takes_less_than_full_training(name: str) -> None:
    c, work = built_in(name, 0.5), LocalWork(batch_size=32)
    full = cost_of(full_step(c.model, c.problem, work), c.problem)
    for block in range(4):
        stage = cost_of(stage_step(c, 4, block, work, coadapted_layers=1), c.problem)
        assert stage.peak_bytes < 0.9 * full.peak_bytes
        assert stage.flops < 0.7 * full.flops


def test_coadaptation_and_mentor_count() -> None:
    c = case("resnet18")
    bare = cost_of(stage_step(c, 4, 2, WORK), c.problem)
    more = cost_of(stage_step(c, 4, 2, WORK, coadapted_layers=1), c.problem)
    assert more.peak_bytes > bare.peak_bytes
    assert more.flops > bare.flops
    step = stage_step(c, 4, 2, WORK)
    mentored = step_cost(step, c.problem, MentorLoss(Mentor(), 1.0, 1.0))
    assert mentored.flops > bare.flops
    assert mentored.peak_bytes >= bare.peak_bytes


# FLOPs


@pytest.mark.parametrize("prefix", ["resident", "streamed"])
def test_steps_that_run_in_turn_do_not_hold_each_others_tensors(prefix: PrefixMode) -> None:
    """Nor what they have moved: it is sent tensor by tensor."""
    c, work = built_in("resnet10", 0.25), LocalWork(batch_size=2)
    steps = [replace(stage_step(c, 3, block, work), means=Means(prefix=prefix)) for block in range(3)]
    costs = [cost_of(step, c.problem) for step in steps]
    found = in_turn(costs)
    assert found.peak_bytes == max(cost.peak_bytes for cost in costs) == sum(size for _, size in found.terms)
    assert found.flops == sum(cost.flops for cost in costs)
    assert in_turn(costs[:1]) == costs[0]


def test_flops_of_linear_layers() -> None:
    """Forward 2 a multiply-add; backward as much for the weights, and again for an input that needs a gradient."""
    rows, problem = 10, by_hand(10)
    work = LocalWork(batch_size=rows)
    full = cost_of(full_step(ModelSpec.of(chain), problem, work), problem)
    assert full.flops == 2 * rows * (2 * D * H + 3 * H * K)
    assert full.flops_per_example == full.flops / rows
    blocks = blocks_by_hand(ModelSpec.of(chain), problem, ("0",))
    last = cost_of(span_step(blocks, Span(1, 1), None, work), problem)
    assert last.flops == 2 * rows * (D * H + 2 * H * K)


def test_flops_of_convolutions() -> None:
    c = Case(ModelSpec.of(convolutions), images(16))
    work = LocalWork(batch_size=4)
    first, second, head = 8 * 3 * 9 * 16 * 16, 12 * 8 * 9 * 8 * 8, 12 * 5
    full = cost_of(full_step(c.model, c.problem, work), c.problem)
    assert full.flops == 2 * 4 * (2 * first + 3 * second + 3 * head)
    micro = replace(full_step(c.model, c.problem, work), means=Means(micro_batch_size=1))
    assert cost_of(micro, c.problem).flops == full.flops


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )


# Means and budgets


def test_the_largest_micro_batch_that_fits() -> None:
    c = case("resnet10")
    step = full_step(c.model, c.problem, WORK)
    costs = {n: cost_of(replace(step, means=Means(micro_batch_size=n)), c.problem).peak_bytes for n in (16, 8, 4, 2)}
    fit = partial(fitting_means, step, c.problem, TaskLoss())
    down_to_2 = Ladder(micro_batch_size="auto", smallest_micro_batch=2)
    for size, peak in costs.items():
        found = fit(peak, down_to_2)
        assert found is not None
        assert found[0].means.micro_batch_size == size
        assert found[1].peak_bytes == peak
    assert fit(costs[2] - 1, down_to_2) is None
    assert fit(costs[16] - 1, NO_MEANS) is None
    assert cheapest(step, c.problem, TaskLoss(), down_to_2)[1].peak_bytes == costs[2]
    down_to_3 = replace(down_to_2, smallest_micro_batch=3)
    assert cheapest(step, c.problem, TaskLoss(), down_to_3)[0].means.micro_batch_size == 3


def test_a_budget_error_says_what_is_needed_and_what_would_lower_it() -> None:
    c = case("resnet10")
    step = full_step(c.model, c.problem, WORK)
    cost = cost_of(step, c.problem)
    error = str(budget_error("block 1", Choice(step, cost, "block 1"), c.problem, TaskLoss(), MIB))
    for text in (f"{mib(cost.peak_bytes)} MiB", "weights", "gradients", "optimizer", "activations", "1.00 MiB"):
        assert text in error
    for words, changed in (
        ("momentum = 0", full_step(c.model, c.problem, NO_MOMENTUM)),
        ("batch_size = 8", full_step(c.model, c.problem, replace(WORK, batch_size=8))),
        ('means = "auto"', cheapest(step, c.problem, TaskLoss(), AUTO)[0]),
    ):
        assert f"{words} ({mib(cost_of(changed, c.problem).peak_bytes)} MiB)" in error
    least = cheapest(full_step(c.model, c.problem, replace(NO_MOMENTUM, batch_size=8)), c.problem, TaskLoss(), AUTO)[0]
    least = replace(least, means=replace(least.means, bfloat16=True))
    assert f"all of these ({mib(cost_of(least, c.problem).peak_bytes)} MiB)" in error
    assert "training in (more) blocks" in error
    without = full_step(c.model, c.problem, NO_MOMENTUM)
    choice = Choice(without, cost_of(without, c.problem), "block 1")
    assert "momentum" not in str(budget_error("block 1", choice, c.problem, TaskLoss(), MIB)), "that changes nothing"


# Against what was measured


def test_resnet18_as_measured() -> None:
    """The prototype's figures (batch 128, 32×32): full 695 MiB with oneDNN's scratch, stage 1 > 2 > 3, 4."""
    c = Case(ModelSpec.of(resolve("resnet18")), images(num_classes=10))
    work = LocalWork(batch_size=128)
    full = cost_of(full_step(c.model, c.problem, work), c.problem).peak_bytes
    assert full == pytest.approx(695 * MIB, rel=0.05)
    stages = [cost_of(stage_step(c, 4, b, work, coadapted_layers=1), c.problem).peak_bytes for b in range(4)]
    assert stages[0] > stages[1] > max(stages[2:])
    assert stages[2] < 0.3 * full


MEASURE = """
import gc, json, sys, warnings
warnings.simplefilter("error")
import torch
torch.set_num_threads(1)
from models import built_in
from scalefl.blocks import Span, blocks_by_hand
from scalefl.client import train_batch
from scalefl.models.skeleton import tensors
from scalefl.objectives import TaskLoss
from scalefl.params import is_attachment
from scalefl.parts import Resident
from scalefl.costs import in_turn, step_cost
from scalefl.planner import output_module
from scalefl.steps import full_step, span_step
from scalefl.sgd import SGD
from scalefl.types import LocalWork

def status():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {key: int(lines[key].split()[0]) * 1024 for key in ("VmHWM", "VmRSS", "RssAnon", "RssFile", "RssShmem")}

c, work = built_in(sys.argv[1], 0.5), LocalWork(batch_size=64)
if sys.argv[2] == "full":
    step = full_step(c.model, c.problem, work)
else:
    blocks, block = blocks_by_hand(c.model, c.problem, ("layer1.1", "layer2.1", "layer3.1")), int(sys.argv[2])
    output = output_module(blocks, block, c.problem, work, "none")
    step = span_step(blocks, Span(block, block), output, work, coadapted_layers=1)
predicted = step_cost(step, c.problem, TaskLoss()).peak_bytes
resident = Resident(c.model)

def one_step(rows):
    params = {name: torch.ones(t.shape, dtype=t.dtype)
              for name, t in resident.empty(step.part).items()}
    with resident.holding(step.part, params, step.trainable, step.moving) as (runner, trained):
        optimizer = SGD(trained, work)
        train_batch(runner, optimizer, c.batch(rows), c.problem, TaskLoss(), step.means)

one_step(64)
gc.collect()
before = status()
open("/proc/self/clear_refs", "w").write("5")
one_step(64)
after = status()
growth = after["VmHWM"] - before["VmRSS"] - max(0, after["RssFile"] - before["RssFile"])
print(json.dumps({"predicted": predicted, "measured": growth, "base": before["VmRSS"]}))
"""

# glibc's defaults keep freed memory and would show 40 to 60 % more than a step needs.
MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's high-water mark of memory")
@pytest.mark.parametrize("what", ["full", "0", "1", "2", "3"])
def test_a_fresh_process_grows_as_predicted(what: str) -> None:
    tests = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, "resnet18", what],
        env={**os.environ, **MALLOC, "PYTHONPATH": tests},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print({key: round(size / MIB, 1) for key, size in found.items()})
    assert found["measured"] == pytest.approx(found["predicted"], rel=0.10)


def test_unused_vectors() -> None:
    """The smallest problem there is: one feature, one example."""
    problem = vectors(1)
    model = ModelSpec.of(nn.Linear, in_features=1, out_features=5)
    assert cost_of(full_step(model, problem, LocalWork(batch_size=1)), problem).peak_bytes > 4 * 10 * 3
