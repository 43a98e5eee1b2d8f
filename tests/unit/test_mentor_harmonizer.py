"""Which weights the mentor gives each block, and which block the harmonizer lets train."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scalefl.costs import _profile, step_cost
from scalefl.harmonizer import Converged, Progress, RoundRobin, Sequential, relative_movement
from scalefl.hsic import Form, nhsic
from scalefl.mentor import Constant, Cosine, Linear, Mentor, MentorLoss
from scalefl.parts import Taps
from scalefl.types import ClientInfo
from support import PROBLEM, make_method, spec

X, Z, LATE, PROJECTED = (torch.randn(9, d, generator=torch.Generator().manual_seed(d)) for d in (8, 7, 6, 5))
LABELS = torch.arange(9) % 3
TAPS = Taps(logits=torch.zeros(9, 3), x=X, z=Z, late=LATE, projected=PROJECTED)
BATCH = {"x": X, "label": LABELS}


def weights(mentor: Mentor, end: int, num_blocks: int) -> tuple[float, float]:
    found = dict(mentor.coefficients(end, num_blocks))
    return found["lambda"], found["gamma"]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Linear(), [(2, 0), (1.5, 0.75), (1, 1.5), (0.5, 2.25), (0, 3)]),
        (Constant(), [(2, 3)] * 5),
        (
            Cosine(),
            [(2 * down, 3 * (1 - down)) for down in (1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0)],
        ),
    ],
)
def test_schedules_from_the_first_block_to_the_last(schedule, expected):
    mentor = Mentor(lambda_max=2, gamma_max=3, schedule=schedule)
    for end, pair in enumerate(expected):
        assert weights(mentor, end, 5) == pytest.approx(pair, abs=1e-12)


@pytest.mark.parametrize("schedule", [Linear(), Cosine()])
def test_the_ends_are_exact_zeros(schedule):
    """Rounding must not leave a term of weight 1e-17 to be computed."""
    mentor = Mentor(lambda_max=1.0, gamma_max=1.0, schedule=schedule)
    for num_blocks in (2, 3, 7, 10):
        assert weights(mentor, 0, num_blocks) == (1.0, 0.0)
        assert weights(mentor, num_blocks - 1, num_blocks) == (0.0, 1.0)


@pytest.mark.parametrize(("schedule", "pair"), [(Linear(), (0, 1)), (Cosine(), (0, 1)), (Constant(), (1, 1))])
def test_a_single_block_is_the_last(schedule, pair):
    assert weights(Mentor(lambda_max=1.0, gamma_max=1.0, schedule=schedule), 0, 1) == pair


@dataclass(frozen=True)
class Late:
    """A user's schedule: λ falls with the run's progress, γ waits for its second half."""

    start: float = 0.5

    def weights(self, position: float, progress: float) -> tuple[float, float]:
        return 1 - progress, float(progress >= self.start) * position


def test_a_schedule_that_moves_with_the_run():
    mentor = Mentor(lambda_max=2.0, gamma_max=1.0, schedule=Late(), schedule_rounds=4)
    found = [mentor.coefficients(1, 2, round) for round in range(6)]
    assert [dict(c)["lambda"] for c in found] == [2, 1.5, 1, 0.5, 0, 0]
    assert [dict(c)["gamma"] for c in found] == [0, 0, 1, 1, 1, 1]
    assert mentor.largest_coefficients(1, 2) == (("lambda", 2.0), ("gamma", 1.0))
    # A term that the block never gets stays uncounted; without the run's length a schedule stays at its start.
    assert mentor.largest_coefficients(0, 2) == (("lambda", 2.0), ("gamma", 0.0))
    assert replace(mentor, schedule_rounds=0).coefficients(1, 2, 3) == (("lambda", 2.0), ("gamma", 0.0))


def test_moving_coefficients_reach_the_clients_and_are_predicted_once():
    mentor = Mentor(lambda_max=2.0, gamma_max=1.0, schedule=Late(), schedule_rounds=4)
    method = make_method("scalefl", blocks=2, mentor=mentor)
    state = method.init(spec(), PROBLEM, seed=0, smallest_memory_bytes=0)
    plans = []
    for round in (0, 1, 3):
        misses = _profile.cache_info().misses
        plans.append(method.plan(replace(state, round=round), [ClientInfo(1, 9, memory_bytes=2**40)]))
        assert round == 0 or _profile.cache_info().misses == misses
    steps = [plan.tasks[0].steps[0] for plan in plans]
    assert [step.coefficients for step in steps] == [mentor.coefficients(1, 2, round) for round in (0, 1, 3)]
    # The label term has no weight in the first round, but is counted from the start: one prediction for all rounds.
    costs = [step_cost(step, PROBLEM, method.objective(step)) for step in steps]
    assert {plan.costs[1] for plan in plans} == {costs[2]}
    assert costs[0].flops < costs[2].flops


@pytest.mark.parametrize("form", ["cka", "cca"])
def test_the_terms(form):
    mentor = Mentor(form=form, sigma=2.0)
    y = F.one_hot(LABELS, 3).float()
    expected = -0.5 * nhsic(X, LATE, form, 2.0) - 0.25 * nhsic(y, PROJECTED, form, 2.0)
    torch.testing.assert_close(MentorLoss(mentor, 0.5, 0.25).batch_terms(TAPS, BATCH, PROBLEM), expected)


def test_the_tap_at_the_cut():
    y = F.one_hot(LABELS, 3).float()
    expected = -0.5 * nhsic(X, Z) - 0.25 * nhsic(y, Z)
    torch.testing.assert_close(MentorLoss(Mentor(tap="cut"), 0.5, 0.25).batch_terms(TAPS, BATCH, PROBLEM), expected)


@pytest.mark.parametrize("form", ["cka", "cca"])
def test_terms_of_the_same_features_have_the_gradients_of_both(form: Form) -> None:
    def gradient(*features: Tensor) -> Tensor:
        late, projected = features[0], features[-1]
        loss = MentorLoss(Mentor(form=form), 0.5, 0.25)
        terms = loss.batch_terms(Taps(TAPS.logits, X, Z, late, projected), BATCH, PROBLEM)
        assert terms is not None
        return torch.stack(torch.autograd.grad(terms, features)).sum(0)

    one, other, same = (LATE.clone().requires_grad_() for _ in range(3))
    torch.testing.assert_close(gradient(same), gradient(one, other))
    assert gradient(same).abs().max() > 0


def test_a_term_of_weight_zero_is_not_computed():
    """NaN features would spoil 0 · nHSIC: what isn't looked at can't."""
    nan = torch.full((9, 4), math.nan)
    mentor = Mentor()
    without_y = MentorLoss(mentor, 0.5, 0.0).batch_terms(
        Taps(TAPS.logits, X, Z, LATE, nan), {"x": X, "label": LABELS - 99}, PROBLEM
    )
    assert torch.equal(without_y, -0.5 * nhsic(X, LATE))
    without_x = MentorLoss(mentor, 0.0, 0.5).batch_terms(Taps(TAPS.logits, nan, nan, nan, PROJECTED), BATCH, PROBLEM)
    assert torch.equal(without_x, -0.5 * nhsic(F.one_hot(LABELS, 3).float(), PROJECTED))
    assert MentorLoss(mentor, 0.0, 0.0).batch_terms(Taps(TAPS.logits, nan, nan, nan, nan), {}, PROBLEM) is None


def test_the_label_term_takes_features_of_any_dtype():
    taps = Taps(TAPS.logits, X, Z, LATE, PROJECTED.bfloat16())
    assert bool(MentorLoss(Mentor(), 0.0, 1.0).batch_terms(taps, BATCH, PROBLEM).isfinite())


# Growth.


def stages(growth, num_blocks: int, movements: list[float]) -> list[int]:
    progress, found = Progress(), []
    for movement in movements:
        found.append(progress.stage)
        progress = Progress(**growth.advance(progress, num_blocks, movement).to_json())  # as a checkpoint keeps it
    return found


def test_round_robin():
    assert stages(RoundRobin(), 3, [0.0] * 8) == [0, 1, 2, 0, 1, 2, 0, 1]
    assert stages(RoundRobin(), 1, [0.0] * 3) == [0, 0, 0]


def test_sequential():
    assert stages(Sequential(rounds=3), 3, [0.0] * 11) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2]
    assert stages(Sequential(rounds=1), 3, [0.0] * 5) == [0, 1, 2, 2, 2]


def test_converged_waits_for_quiet_rounds_in_a_row():
    growth = Converged(threshold=0.1, patience=2, longest=50)
    #            quiet  loud  quiet  quiet→1  quiet  quiet→2  the last block keeps its turn
    movements = [0.05, 0.5, 0.01, 0.09, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert stages(growth, 3, movements) == [0, 0, 0, 0, 1, 1, 2, 2, 2]


def test_converged_at_the_threshold_is_not_quiet():
    assert stages(Converged(threshold=0.1, patience=1), 2, [0.1, 0.1, 0.0999, 0.0]) == [0, 0, 0, 1]


def test_converged_gives_up_after_the_longest_turn():
    growth = Converged(threshold=0.1, patience=2, longest=3)
    assert stages(growth, 3, [1.0] * 8) == [0, 0, 0, 1, 1, 1, 2, 2]
    # A quiet round just before the end of one turn does not count for the next.
    assert stages(growth, 3, [1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0]) == [0, 0, 0, 1, 1, 1, 2]


@pytest.mark.parametrize("growth", [Sequential(rounds=2), Converged(threshold=1, patience=1)])
def test_one_block_is_always_in_turn(growth):
    assert stages(growth, 1, [0.0] * 6) == [0] * 6


def test_relative_movement():
    before = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]]), "c": torch.tensor([100.0])}
    after = {"a": torch.tensor([3.0, 0.3]), "b": torch.tensor([[4.4]]), "c": torch.tensor([0.0])}
    assert relative_movement(before, after, frozenset("ab")) == pytest.approx(0.5 / 5, rel=1e-6)
    assert relative_movement(before, before, frozenset("abc")) == 0


def test_relative_movement_of_small_and_half_precision_tensors():
    before = {"a": torch.full((4096,), 1e-3, dtype=torch.float16)}
    after = {"a": torch.full((4096,), 2e-3, dtype=torch.float16)}
    assert relative_movement(before, after, frozenset("a")) == pytest.approx(1, rel=1e-2)


def test_relative_movement_from_zero_is_large_and_finite():
    moved = relative_movement({"a": torch.zeros(3)}, {"a": torch.ones(3)}, frozenset("a"))
    assert moved > 1e6 and math.isfinite(moved)
    assert relative_movement({"a": torch.zeros(3)}, {"a": torch.zeros(3)}, frozenset("a")) == 0
