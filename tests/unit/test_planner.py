"""Which means a client gets: what it loses least by, and nothing that its data or the user forbids."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import nn

from models import Case, built_in
from scalefl.blocks import Span, blocks_by_count
from scalefl.costs import NEAR, estimate, step_cost
from scalefl.mentor import Mentor, MentorLoss
from scalefl.methods.scalefl import ScaleFL
from scalefl.models.spec import ModelSpec
from scalefl.objectives import TaskLoss
from scalefl.planner import _variants, cheapest, fitting_means
from scalefl.steps import full_step, span_step
from scalefl.types import AUTO, Ladder, LocalWork, Means, Step, described

WORK = LocalWork(epochs=3, batch_size=16)
EXAMPLES = 50


def last_block(c: Case) -> Step:
    blocks = blocks_by_count(c.model, c.problem, 2)
    return span_step(blocks, Span(1, 1), None, WORK)


def means_of(step: Step, c: Case, ladder: Ladder, budget_bytes: int = 2**40, **known: int) -> Means | None:
    found = fitting_means(step, c.problem, TaskLoss(), budget_bytes, ladder, **known)
    return found and found[0].means


def test_features_are_cached_where_that_saves_work_and_nothing_forbids_it() -> None:
    c = built_in("resnet10", 0.25)
    step = last_block(c)
    assert means_of(step, c, AUTO, num_examples=EXAMPLES) == Means(16, prefix="cached")
    assert means_of(step, c, replace(AUTO, cache_bytes=1000), num_examples=EXAMPLES) == Means(16)
    augmented = Case(c.model, replace(c.problem, augmentation=("flip",)))
    assert means_of(last_block(augmented), augmented, AUTO, num_examples=EXAMPLES) == Means(16)


@pytest.mark.parametrize("forbids", ["augmentation", "disk"])
def test_a_cache_that_is_asked_for_is_streamed_where_it_cannot_be(forbids: str) -> None:
    c = built_in("resnet10", 0.25)
    ladder = Ladder(prefix="cached", cache_bytes=1000 if forbids == "disk" else 2**30)
    if forbids == "augmentation":
        c = Case(c.model, replace(c.problem, augmentation=("flip",)))
    found = means_of(last_block(c), c, ladder, num_examples=EXAMPLES)
    assert found is not None and found.prefix == "streamed"


@pytest.mark.parametrize(("norm", "expected"), [("batch", Means(16, recompute=True)), ("group", Means(8))])
def test_batch_norm_keeps_whole_batches_as_long_as_they_fit(norm: str, expected: Means) -> None:
    """Recomputation costs a pass and changes nothing; micro-batches cost nothing, but batch norm sees them."""
    c = built_in("resnet34", norm=norm)
    step = full_step(c.model, c.problem, WORK)
    ladder = Ladder(micro_batch_size="auto", recompute="auto")
    budget = max(cost(replace(step, means=m), c) for m in (Means(16, recompute=True), Means(8)))
    assert budget < cost(replace(step, means=Means(16)), c)
    assert means_of(step, c, ladder, budget) == expected


def with_static_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 10),
    )


def test_static_norms_see_the_batch_too() -> None:
    """Batch norms without statistics, as of HeteroFL: nothing moves but what trains, and yet micro-batches matter."""
    c = built_in("cnn")
    model = ModelSpec.of(with_static_norm)
    step = full_step(model, c.problem, WORK)
    assert not step.statistics
    split = replace(step, means=Means(8))
    assert split.couples
    assert described(split) == ["micro-batch 8 (own norms)"]
    assert not replace(step, means=Means(16)).couples
    assert not replace(full_step(c.model, c.problem, WORK), means=Means(8)).couples


def cost(step: Step, c: Case) -> int:
    return step_cost(step, c.problem, TaskLoss()).peak_bytes


def test_approximations_are_taken_only_where_nothing_exact_fits_and_they_are_allowed() -> None:
    c = built_in("resnet10", 0.25)
    step = full_step(c.model, c.problem, WORK)
    exact = Ladder(micro_batch_size="auto")
    allowed = replace(exact, bfloat16="auto", frozen_statistics=5)
    least = cost(replace(step, means=Means(4)), c)
    assert means_of(step, c, allowed, least, round=5) == means_of(step, c, exact, least) == Means(4)
    assert means_of(step, c, exact, least - 1) is None
    found = means_of(step, c, allowed, least - 1)
    assert found is not None and found.bfloat16 and not found.frozen_statistics
    warm = fitting_means(step, c.problem, TaskLoss(), 2**40, Ladder(frozen_statistics=5), round=4)
    assert warm is not None and not warm[0].means.frozen_statistics


def test_the_mentor_in_micro_batches_costs_a_pass() -> None:
    c = built_in("cnn", 0.25)
    step = replace(full_step(c.model, c.problem, WORK), means=Means(4))
    mentor = MentorLoss(Mentor(), 1.0, 1.0)
    assert step_cost(step, c.problem, mentor).flops > 1.2 * step_cost(step, c.problem, TaskLoss()).flops


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("cnn", 3),
        ("vgg11_bn", 3),
        ("vgg11_bn", ("features.1.conv", "features.4.conv")),  # where the search would not cut
        *(pytest.param(n, 3, marks=pytest.mark.slow) for n in ("resnet18", "squeezenet", "vit")),
    ],
)
def test_no_estimate_rules_out_what_fits(name: str, blocks: int | tuple[str, ...]) -> None:
    """Means are not traced where their estimate is over the budget: so none may be over the truth."""
    c = built_in(name, **({"image_size": 32} if name == "vit" else {}))
    method = ScaleFL(work=replace(WORK, batch_size=32), blocks=blocks)
    state = method.init(c.model, c.problem, seed=0, smallest_memory_bytes=0)
    ladder = replace(AUTO, smallest_micro_batch=16)
    for offer in method.menu(state):
        for _, way in offer.ways:
            for step in _variants(way, c.problem, ladder, 0, 1):
                true = step_cost(step, c.problem, method.objective(step)).peak_bytes
                assert estimate(step, c.problem) <= NEAR * true, (offer.label, step.means)


def test_no_estimate_rules_out_the_head_alone() -> None:
    """In the whole model its input needs a gradient and stays for others; trained alone it takes half as much."""
    c = built_in("vit", 0.5, image_size=32, depth=2)
    method = ScaleFL(work=replace(WORK, batch_size=128), blocks=2)
    state = method.init(c.model, c.problem, seed=0, smallest_memory_bytes=0)
    head = replace(method.tilings(state, 1)[-1][-1].step, means=Means(prefix="cached"))
    true = step_cost(head, c.problem, method.objective(head)).peak_bytes
    assert estimate(head, c.problem) <= NEAR * true


def test_who_knows_no_client_yet_plans_as_if_features_fitted_on_disk() -> None:
    """A run whose budgets only a cached prefix meets must not be refused before it starts."""
    c = built_in("resnet10", 0.25)
    blocks = blocks_by_count(c.model, c.problem, 5)
    step = span_step(blocks, Span(4, 4), None, WORK)  # the prefix takes more than what trains
    floor = cheapest(step, c.problem, TaskLoss(), AUTO)[1].peak_bytes
    assert cheapest(step, c.problem, TaskLoss(), replace(AUTO, prefix="streamed"))[1].peak_bytes > floor
    found = means_of(step, c, AUTO, floor)
    assert found is not None and found.prefix == "cached"
    assert means_of(step, c, AUTO, floor, num_examples=10**9) is None
