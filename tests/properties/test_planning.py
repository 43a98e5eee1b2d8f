"""Laws of cutting and planning on random nets, and a short table of numbers under a fixed seed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import support
from scalefl.blocks import Span, blocks_by_count
from scalefl.engines.local import LocalEngine
from scalefl.harmonizer import Progress
from scalefl.loop import federate
from scalefl.methods.scalefl import ScaleFL
from scalefl.models.spec import ModelSpec
from scalefl.partition import partition
from scalefl.planner import least
from scalefl.sampling import UniformSampler
from scalefl.types import ClientInfo

NETS = st.lists(st.integers(2, 8), min_size=2, max_size=3).map(tuple)
MODEST = settings(max_examples=5, deadline=None)


def net(channels: tuple[int, ...]) -> nn.Module:
    """Convolutions of the given channel counts, and a classifier."""
    layers: list[nn.Module] = []
    for a, b in zip((1, *channels), channels, strict=False):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], 3))


def spec_of(channels: tuple[int, ...]) -> ModelSpec:
    return ModelSpec.of(net, channels=channels)


@MODEST
@given(NETS, st.data())
def test_every_unit_and_parameter_is_in_exactly_one_block(channels, data):
    found = partition(spec_of(channels), support.PROBLEM)
    assert found.num_units == len(channels) + 1
    count = data.draw(st.integers(1, found.num_units))
    blocks = blocks_by_count(spec_of(channels), support.PROBLEM, count)
    units = [unit for block in range(count) for unit in blocks.units(Span(block, block))]
    assert units == list(range(found.num_units))
    parts = [blocks.trainable(Span(block, block)) for block in range(count)]
    assert sum(map(len, parts)) == len(frozenset().union(*parts)) == len(found.parameters)


@MODEST
@given(
    NETS,
    st.integers(0, 3),
    st.lists(st.floats(0.2, 1.5), min_size=2, max_size=3),
    st.sampled_from(["micro-batches", "auto"]),
    st.sampled_from(["elastic", "all"]),
    st.booleans(),
)
def test_no_plan_is_over_budget_and_more_budget_never_means_less_model(channels, turn, shares, means, spans, tails):
    method = ScaleFL(
        work=support.WORK, blocks=len(channels) + 1, means=means, coadapted_layers=1, spans=spans, tails=tails
    )
    state = method.init(spec_of(channels), support.PROBLEM, seed=0, smallest_memory_bytes=0)
    full = max(peaks_of(method, state).values())
    own = blocks_by_count(spec_of(channels), support.PROBLEM, len(channels) + 1)
    in_turn = turn % len(own)
    found: list[tuple[float, ...]] = []
    for share in sorted(shares):
        budget = int(share * full)
        # One id: all stand at the same place in the rotation.
        plan = method.plan(state, [ClientInfo(turn, 8, budget)])
        assert all(cost.peak_bytes <= budget for cost in plan.costs.values())
        steps = [step for task in plan.tasks for step in task.steps]
        trained = frozenset().union(*(step.trainable for step in steps))
        if spans == "all":
            found.append((_blocks_trained(own, trained),))
        else:  # the block in turn comes before a longer span, and so does the model's own loss
            touched = [b for b in range(len(own)) if own.trainable(Span(b, b)) & trained]
            distance = min((abs(b - in_turn) for b in touched), default=len(own))
            longest = max((_blocks_trained(own, step.trainable) for step in steps), default=0)
            own_loss = tails and any(step.part.output is None for step in steps)
            found.append((-distance, longest > 0, own_loss, longest))
    assert found == sorted(found)


@settings(max_examples=10, deadline=None)
@given(NETS, st.integers(1, 2), st.booleans(), st.data())
def test_a_block_is_trained_part_by_part_where_parts_of_it_all_fit(channels, count, tails, data):
    """Where they do not all fit, those that train most."""
    method = ScaleFL(work=support.WORK, blocks=count, spans="single", means="auto", coadapted_layers=0, tails=tails)
    state = method.init(spec_of(channels), support.PROBLEM, seed=0, smallest_memory_bytes=0)
    blocks = blocks_by_count(spec_of(channels), support.PROBLEM, count)
    stage = data.draw(st.integers(0, count - 1))
    growth = Progress(stage=stage).to_json()
    state = replace(state, aux=replace(state.aux, values={**state.aux.values, "growth": growth}))
    names = {"full", f"block {stage + 1}", f"block {stage + 1} with tail"}
    ways = [[offer] for offer in method.menu(state) if offer.label in names] + method.tilings(state, stage)
    peaks = [[least(o, support.PROBLEM, method.objective).cost.peak_bytes for o in tiles] for tiles in ways]
    needed = min(max(tiles) for tiles in peaks)
    for budget in sorted({needed, *(peak + more for tiles in peaks for peak in tiles for more in (-1, 0))}):
        plan = method.plan(state, [ClientInfo(0, 8, budget)])
        steps = [step for task in plan.tasks for step in task.steps]
        trained = frozenset().union(*(step.trained for step in steps))
        assert all(cost.peak_bytes <= budget for cost in plan.costs.values())
        assert (blocks.trainable(Span(stage, stage)) <= trained) == (budget >= needed)
        if budget < needed:
            fitting = (
                [o for o, peak in zip(tiles, sizes, strict=True) if peak <= budget]
                for tiles, sizes in zip(ways, peaks, strict=True)
            )
            most = max(_size(state, frozenset().union(*(o.trained for o in offers))) for offers in fitting)
            assert _size(state, trained) == most


def _size(state, names) -> int:
    return sum(state.params[name].numel() for name in names)


def peaks_of(method, state) -> dict[str, int]:
    """What each item of the menu needs at the least."""
    return {offer.label: least(offer, state.problem, method.objective).cost.peak_bytes for offer in method.menu(state)}


def _blocks_trained(blocks, names) -> int:
    return sum(blocks.trainable(Span(block, block)) <= names for block in range(len(blocks)))


@settings(max_examples=8, deadline=None)
@given(NETS, st.floats(0.0, 1.0), st.sampled_from(["none", "auto"]))
def test_blocks_by_memory_fit_and_are_as_few_as_exact_dynamic_programming_finds(channels, share, means):
    method = ScaleFL(work=support.WORK, blocks="memory", coadapted_layers=0, means=means, parts=False)
    last = len(channels)
    costs = {
        (a, b): method._units(spec_of(channels), support.PROBLEM, a, b, last).cost.peak_bytes
        for a in range(last + 1)
        for b in range(a, last + 1)
    }
    singles = max(costs[unit, unit] for unit in range(last + 1))
    budget = int(singles + share * max(costs[0, last] - singles, 0)) + 1
    found = method.init(spec_of(channels), support.PROBLEM, seed=0, smallest_memory_bytes=budget)
    ends = found.aux.values["ends"]
    starts = [0, *(end + 1 for end in ends[:-1])]
    assert all(costs[pair] <= budget for pair in zip(starts, ends, strict=True))
    assert len(ends) == _fewest(costs, budget, last)


def _fewest(costs, budget, last) -> int:
    """Blocks at the least, over all cuts."""
    best = [0]
    for end in range(last + 1):
        best.append(min(best[start] + 1 for start in range(end + 1) if costs[start, end] <= budget))
    return best[-1]


GOLDEN = [("spans", 1.0493), ("spans", 1.0920), ("spans", 1.0794)]


def test_golden_numbers():
    """Training losses of three rounds. A change that should not alter numbers leaves these as they are."""
    data = support.MadeData([12, 12, 12, 12])
    method = ScaleFL(work=support.WORK, blocks=2)
    state = method.init(support.spec(), support.PROBLEM, seed=7, smallest_memory_bytes=0)
    clients = support.Clients(data, (10**9, 10**9))
    with LocalEngine(data, clients) as engine:
        rounds = federate(method, engine, UniformSampler(3), state)
        found = [next(rounds)[1] for _ in GOLDEN]
    assert [record.stage for record in found] == [stage for stage, _ in GOLDEN]
    assert [record.train["loss"] for record in found] == pytest.approx([loss for _, loss in GOLDEN], abs=2e-3)
