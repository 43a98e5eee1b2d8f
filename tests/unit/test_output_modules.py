from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models import BUILT_IN_CASES, NUM_CLASSES, Case, built_in, case, vectors
from scalefl.blocks import Blocks, Span, blocks_by_count, blocks_by_hand
from scalefl.client import Residents
from scalefl.costs import step_cost
from scalefl.evaluate import nhsic_plane
from scalefl.memory import Cost
from scalefl.mentor import Mentor, MentorLoss
from scalefl.models.output import LAYERS, PROJECTIONS, Layers, OutputSpec, Projection, Shape, light_targets
from scalefl.models.skeleton import tensors
from scalefl.models.spec import ModelSpec
from scalefl.objectives import TaskLoss
from scalefl.partition import partition
from scalefl.parts import Resident, Taps
from scalefl.planner import output_module
from scalefl.problem import Batch, Classification, Column, Problem
from scalefl.steps import span_step
from scalefl.types import LocalWork, Step
from support import identical


def spec_of(shape: Shape, *later: Shape, layers: Layers = "full", projection: Projection = "none") -> OutputSpec:
    return OutputSpec("cut", shape, light_targets(shape, later), NUM_CLASSES, layers, projection)


# Light layers


@pytest.mark.parametrize(
    ("shape", "later", "targets"),
    [
        # One layer for each later resolution, to the last channel count there.
        ((64, 32, 32), [(64, 32, 32), (128, 16, 16), (256, 8, 8)], [(128, 16, 16), (256, 8, 8)]),
        ((8, 16, 16), [(4, 16, 16), (16, 16, 16), (6, 8, 8), (32, 8, 8)], [(32, 8, 8)]),
        # Changes of the channel count alone go into the next layer; at the last resolution they get one.
        ((8, 16, 16), [(16, 16, 16), (32, 8, 8)], [(32, 8, 8)]),
        ((8, 4, 4), [(2, 4, 4), (16, 4, 4)], [(16, 4, 4)]),
        ((8, 4, 4), [(2, 4, 4), (8, 4, 4)], []),
        ((8, 4, 4), [], []),
        # Not beyond the head's pooling, nor for what comes after it.
        ((8, 4, 4), [(16, 2, 2), (16,)], [(16, 2, 2)]),
        ((8, 4, 4), [(128,), (10,)], []),
        # Tokens: a change of width or of number.
        ((16, 48), [(16, 48), (16, 48)], []),
        ((16, 48), [(16, 48), (4, 96), (4, 96), (1, 192)], [(4, 96), (1, 192)]),
        ((16, 48), [(16, 48), (48,)], []),
        # Vectors.
        ((64,), [(64,), (32,), (32,), (16,)], [(32,), (16,)]),
        # Volumes have no light layer; pooling serves them.
        ((4, 8, 8, 8), [(8, 4, 4, 4)], []),
    ],
)
def test_light_targets(shape: Shape, later: list[Shape], targets: list[Shape]) -> None:
    assert light_targets(shape, later) == tuple(targets)


sizes = st.integers(1, 9)
shapes = st.one_of(st.tuples(sizes, sizes, sizes), st.tuples(sizes, sizes), st.tuples(sizes), st.tuples(*[sizes] * 4))


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    later=st.lists(shapes, max_size=4),
    layers=st.sampled_from(LAYERS),
    projection=st.sampled_from(get_args(Projection)),
)
def test_any_shapes_on_the_way(shape: Shape, later: list[Shape], layers: Layers, projection: Projection) -> None:
    """Whatever strides they ask for: the features have the last target's shape, and the logits K entries.

    Tokens are pooled where there are fewer later, and left as they are where there are more.
    """
    spec = spec_of(shape, *later, layers=layers, projection=projection)
    taps = spec.build()(torch.randn(2, *shape))
    last = shape if layers == "bare" or not spec.targets else spec.targets[-1]
    width = last[-1] if len(last) <= 2 else last[0]
    if len(last) == 2:
        assert taps.features.shape[2] == last[1]
        counts = [shape[0], *(target[0] for target in spec.targets)]
        assert min(counts) <= taps.features.shape[1] <= max(counts)
    else:
        assert taps.features.shape == (2, *last)
    assert taps.projected.shape == (2, width)
    assert taps.logits.shape == (2, NUM_CLASSES)


@pytest.mark.parametrize("name", BUILT_IN_CASES)
def test_every_cut_of_every_built_in_model(name: str) -> None:
    c = case(name)
    found = partition(c.model, c.problem)
    for unit, cut in enumerate(found.cuts):
        later = found.shapes_after(unit)
        for layers in LAYERS:
            spec = OutputSpec(cut.module, cut.shape, light_targets(cut.shape, later), NUM_CLASSES, layers)
            module = spec.build()
            taps = module(torch.randn(3, *cut.shape))
            assert taps.logits.shape == (3, NUM_CLASSES)
            assert taps.features.shape[1:] == (spec.targets[-1] if spec.targets and layers != "bare" else cut.shape)
            taps.logits.sum().backward()
            assert all(p.grad is not None for p in module.parameters())


def test_full_layers_are_those_of_the_paper() -> None:
    """3×3 convolutions at stride 2 without norm, bias or activation."""
    module = spec_of((64, 32, 32), (128, 16, 16), (256, 8, 8)).build()
    assert [(type(m), m.kernel_size, m.stride, m.padding, m.bias) for m in module.layers] == [
        (nn.Conv2d, (3, 3), (2, 2), (1, 1), None)
    ] * 2
    assert [(m.in_channels, m.out_channels) for m in module.layers] == [(64, 128), (128, 256)]
    assert module.classifier.in_features == 256


@pytest.mark.parametrize(
    ("source", "target"),
    [((3, 7, 7), (6, 3, 3)), ((3, 8, 6), (6, 4, 2)), ((3, 4, 4), (6, 8, 8)), ((3, 9, 9), (6, 2, 2))],
)
@pytest.mark.parametrize("layers", ["full", "separable"])
def test_strides_that_are_no_whole_number(source: Shape, target: Shape, layers: Layers) -> None:
    module = spec_of(source, target, layers=layers).build()
    assert module(torch.randn(2, *source)).features.shape == (2, *target)
    assert any(isinstance(m, nn.AdaptiveAvgPool2d) for m in module.modules())
    assert all(m.stride == (1, 1) for m in module.modules() if isinstance(m, nn.Conv2d))


def test_separable_layers_are_lighter() -> None:
    counts = [
        sum(p.numel() for p in spec_of((64, 8, 8), (128, 4, 4), layers=layers).build().layers.parameters())
        for layers in LAYERS
    ]
    assert counts == [64 * 128 * 9, 64 * 9 + 64 * 128, 0]


def test_projections() -> None:
    heads = {p: spec_of((8, 4, 4), projection=p).build().projection for p in get_args(Projection)}
    assert isinstance(heads["none"], nn.Identity)
    assert [heads["linear"].in_features, heads["linear"].out_features] == [8, 8]
    assert [m.out_features for m in heads["mlp"]] == [32, 16, 8]
    taps = spec_of((8, 4, 4)).build()(z := torch.randn(2, 8, 4, 4))
    torch.testing.assert_close(taps.projected, z.mean((2, 3)))


# Masks


def test_masked_tokens_do_not_count() -> None:
    module = spec_of((5, 4)).build()
    z = torch.randn(3, 5, 4)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    taps = module(z, mask)
    wanted = torch.stack([z[0, :3].mean(0), z[1].mean(0), torch.zeros(4)])
    torch.testing.assert_close(taps.projected, wanted)
    changed = z.clone()
    changed[0, 3:] = 1e3
    assert torch.equal(module(changed, mask).logits, taps.logits)
    assert not torch.equal(module(changed).logits, module(z).logits)


def test_a_part_passes_the_mask_to_its_output_module() -> None:
    c = case("hf_bert")
    blocks = blocks_by_count(c.model, c.problem, 2)
    output = output_module(blocks, 0, c.problem, LocalWork(), "none")
    assert output is not None
    step = span_step(blocks, Span(0, 0), output, LocalWork())
    own = dict(c.model.build(0).named_parameters()) | dict(c.model.build(0).named_buffers())
    params = {n: own[n].detach() for n in step.part.held} | output.initial(0)
    batch = c.batch(4)
    with Resident(c.model).holding(replace(step.part, active=()), params) as (runner, _), torch.no_grad():
        taps = runner(batch, c.problem)
    mask = batch["attention_mask"].unsqueeze(-1)
    assert (mask == 0).any()
    torch.testing.assert_close(taps.projected, (taps.z * mask).sum(1) / mask.sum(1))


def test_pooled_tokens_count_if_any_of_theirs_does() -> None:
    module = spec_of((6, 4), (3, 2)).build()
    (layer,) = module.layers
    z = torch.randn(3, 6, 4)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    taps = module(z, mask)
    y = layer.linear(z)
    wanted = torch.zeros(3, 3, 2)
    wanted[0, :2] = torch.stack([y[0, :2].mean(0), y[0, 2]])
    wanted[1] = y[1].view(3, 2, 2).mean(1)
    torch.testing.assert_close(taps.features, wanted)
    torch.testing.assert_close(taps.projected, torch.stack([wanted[0, :2].mean(0), wanted[1].mean(0), torch.zeros(2)]))
    torch.testing.assert_close(module(z, mask.bool()).logits, taps.logits)


@pytest.mark.parametrize(
    ("length", "later"), [(6, [(6, 5)]), (6, [(3, 5)]), (7, [(3, 5)]), (9, [(6, 5), (4, 5), (4, 7)])]
)
def test_what_padded_tokens_hold_does_not_matter(length: int, later: list[Shape]) -> None:
    """With uneven neighbourhoods, and through layers whose bias would fill empty places."""
    module = spec_of((length, 4), *later).build()
    mask = torch.arange(length) < torch.tensor([[2], [5], [length], [0]])
    z = torch.randn(4, length, 4)
    taps = module(z, mask)
    changed = module(torch.where(mask.unsqueeze(-1), z, torch.full_like(z, torch.nan)), mask)
    assert all(torch.equal(getattr(changed, f), getattr(taps, f)) for f in ("logits", "features", "projected"))
    assert bool(taps.logits.isfinite().all()) and bool((taps.features[3] == 0).all())


def test_a_mask_for_other_tokens_is_passed_over() -> None:
    module, z = spec_of((6, 4), (3, 2)).build(), torch.randn(2, 6, 4)
    for mask in (torch.zeros(2, 5), torch.zeros(2, 3), torch.zeros(2, 6, 6)):
        assert torch.equal(module(z, mask).logits, module(z).logits)
    images = spec_of((6, 4, 4)).build()
    assert torch.equal(images(x := torch.randn(2, 6, 4, 4), torch.zeros(2, 6)).logits, images(x).logits)


def padded_twice() -> tuple[Case, dict[str, Tensor], dict[str, Tensor]]:
    """Two batches that differ in nothing but what their padded tokens hold."""
    c = case("hf_bert")
    batch = c.batch(6)
    padded, ids = batch["attention_mask"] == 0, batch["input_ids"]
    assert padded.any()
    return c, batch, {**batch, "input_ids": torch.where(padded, (ids + 7) % c.vocabulary, ids)}


@pytest.mark.parametrize("tap", ["output", "cut"])
@pytest.mark.parametrize("block", [0, 1])
def test_padding_does_not_enter_nhsic(tap: str, block: int) -> None:
    c, batch, other = padded_twice()
    blocks = blocks_by_count(c.model, c.problem, 2)
    output = output_module(blocks, block, c.problem, LocalWork(), "none")
    step = span_step(blocks, Span(block, block), output, LocalWork())
    own = tensors(c.model.build(0))
    params = {n: own[n].detach() for n in step.part.held} | (output.initial(0) if output else {})
    loss = MentorLoss(Mentor(tap=tap), 1.0, 1.0)
    with Resident(c.model).holding(replace(step.part, active=()), params) as (runner, _), torch.no_grad():
        found = [(runner(rows, c.problem), rows) for rows in (batch, other)]
        values = [loss.batch_terms(taps, rows, c.problem) for taps, rows in found]
        unmasked = [loss.batch_terms(taps, {**rows, "attention_mask": None}, c.problem) for taps, rows in found]
    torch.testing.assert_close(values[0], values[1])
    assert not torch.isclose(unmasked[0], unmasked[1])


def test_padding_does_not_enter_the_plane() -> None:
    c, batch, other = padded_twice()
    found = partition(c.model, c.problem)
    planes = [
        nhsic_plane(Residents(), c.model, tensors(c.model.build(0)), c.problem, rows, found.cuts, found.source, seed=0)
        for rows in (batch, other)
    ]
    for one, two in zip(*planes, strict=True):
        assert [one[axis] for axis in "xy"] == pytest.approx([two[axis] for axis in "xy"], rel=1e-5)


# Costs


WORK = LocalWork(batch_size=16)


def cost_of(c: Case, step: Step) -> Cost:
    return step_cost(step, c.problem, TaskLoss())


def four_blocks(name: str) -> tuple[Case, Blocks]:
    c = built_in(name, 1.0, **({"depth": 4} if name == "vit" else {}))
    return c, blocks_by_count(c.model, c.problem, 4)


@dataclass(frozen=True)
class Everything(TaskLoss):
    """A gradient for the projection head too, as the mentor's label term gives it."""

    def batch_terms(self, taps: Taps, batch: Batch, problem: Problem) -> Tensor:
        return taps.projected.mean()


def fits(c: Case, blocks: Blocks, block: int, output: OutputSpec) -> bool:
    """Whether a stage costs no more than training through the part that its output module stands in for."""
    steps = (
        span_step(blocks, Span(block, block), output, WORK),
        span_step(blocks, Span(block, len(blocks) - 1), None, WORK),
    )
    stage, through = (step_cost(step, c.problem, Everything()) for step in steps)
    return stage.flops <= through.flops and stage.peak_bytes <= through.peak_bytes


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("name", BUILT_IN_CASES)
def test_a_stage_costs_no_more_than_what_it_stands_in_for(name: str, projection: Projection) -> None:
    c, blocks = four_blocks(name)
    order = [(p, layers) for p in PROJECTIONS for layers in LAYERS]
    assert output_module(blocks, 3, c.problem, WORK, projection) is None
    for block in range(3):
        output = output_module(blocks, block, c.problem, WORK, projection)
        assert output is not None
        assert fits(c, blocks, block, output)
        # And the closest stand-in that does: those before it, from the projection that was asked for, cost more.
        place = order.index((output.projection, output.layers))
        closer = order[order.index((projection, "full")) : place]
        assert not any(fits(c, blocks, block, replace(output, projection=p, layers=ls)) for p, ls in closer)


def test_compact_models_get_lighter_layers_and_narrower_projections() -> None:
    c, blocks = four_blocks("squeezenet")
    found = [output_module(blocks, b, c.problem, WORK, "none") for b in range(3)]
    assert found[-1].layers != "full"
    found = [output_module(blocks, b, c.problem, WORK, "mlp") for b in range(3)]
    assert (found[0].projection, found[-1].projection) == ("mlp", "linear")


class First(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1]


def funnel() -> nn.Module:
    """Nothing can stand in for the end: a classifier on one feature."""
    return nn.Sequential(nn.Linear(6, 64), nn.ReLU(), First(), nn.Linear(1, NUM_CLASSES))


def test_where_nothing_is_as_cheap_as_the_part_the_cheapest_stands_in_for_it() -> None:
    c = Case(ModelSpec.of(funnel), vectors(6))
    blocks = blocks_by_hand(c.model, c.problem, ("1",))
    output = output_module(blocks, 0, c.problem, WORK, "mlp")
    assert (output.layers, output.projection) == ("full", "none")  # 64 → 1 → K, not 64 → K
    assert not fits(c, blocks, 0, output)


def test_the_projection_head_counts() -> None:
    c, blocks = four_blocks("squeezenet")
    heads = [output_module(blocks, 0, c.problem, WORK, p) for p in get_args(Projection)]
    assert [h.projection for h in heads] == list(get_args(Projection))
    costs = [cost_of(c, span_step(blocks, Span(0, 0), replace(h, layers="full"), WORK)) for h in heads]
    weights = [dict(cost.terms)["output_module"] for cost in costs]
    assert weights == sorted(set(weights))


# First weights


def test_first_weights_are_a_function_of_seed_and_cut() -> None:
    spec = spec_of((8, 4, 4), (16, 2, 2), projection="linear")
    state = torch.random.get_rng_state()
    first = spec.initial(3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(5)
    assert identical(first, spec.initial(3))
    weight = spec.prefix + "layers.0.weight"
    assert not torch.equal(first[weight], spec.initial(4)[weight])
    elsewhere = replace(spec, cut="elsewhere")
    assert not torch.equal(first[weight], elsewhere.initial(3)[elsewhere.prefix + "layers.0.weight"])
    # The model around it does not matter: more blocks elsewhere leave them alone.
    assert identical(first, OutputSpec("cut", (8, 4, 4), ((16, 2, 2),), NUM_CLASSES, "full", "linear").initial(3))


def test_names() -> None:
    spec = spec_of((8, 4, 4), (16, 2, 2), layers="separable", projection="mlp")
    first = spec.initial(0)
    assert set(first) == set(spec.names())
    assert all(name.startswith("@output.cut.") for name in first)
    assert all(not t.requires_grad for t in first.values())


# A model of volumes


class Volumes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv3d(2, 4, 3, padding=1), nn.Conv3d(4, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3, 4)))


@pytest.mark.parametrize(
    ("model", "problem"),
    [(Volumes, Classification(NUM_CLASSES, (Column("x", (2, 6, 6, 6), "float32"),))), (nn.Linear, vectors(6))],
)
def test_models_beyond_images(model: type[nn.Module], problem: Classification) -> None:
    spec = ModelSpec.of(model, **({"in_features": 6, "out_features": 5} if model is nn.Linear else {}))
    if model is nn.Linear:
        spec = ModelSpec.of(perceptron)
    blocks = blocks_by_count(spec, problem, 2)
    output = output_module(blocks, 0, problem, LocalWork(batch_size=4), "none")
    step = span_step(blocks, Span(0, 0), output, LocalWork(batch_size=4))
    assert step_cost(step, problem, TaskLoss()).peak_bytes > 0


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, NUM_CLASSES))


@pytest.mark.parametrize(
    ("shape", "targets"), [((4, 8, 8), ((6, 4, 4), (8, 2, 2))), ((6, 4), ((3, 8),)), ((5,), ((7,), (9,)))], ids=str
)
def test_what_light_layers_make_is_normalised(shape: tuple[int, ...], targets: tuple[tuple[int, ...], ...]) -> None:
    """The size of their weights, which grows where training diverges, then does not show."""
    spec = OutputSpec("cut", shape, targets, 3)
    z = torch.randn(2, *shape)
    for normed in (True, False):
        module = replace(spec, normed=normed).build()
        before = module(z)
        features = before.features if len(shape) == 2 else before.features.flatten(1)
        assert normed == torch.allclose(features.var(-1, unbiased=False), torch.ones(()), atol=1e-2)
        with torch.no_grad():
            for p in module.layers.parameters():
                p.mul_(100)
        assert normed == torch.allclose(module(z).logits, before.logits, atol=1e-2)
