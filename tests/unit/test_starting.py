"""Runs that start in the middle of a model give what a run from its input gives; where they can't, none is offered."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import BUILT_IN_CASES, CASES, NUM_CLASSES, Case, SharedNorm, built_in, case, images, tokens, vectors
from scalefl.blocks import Blocks, Span, blocks_by_count, blocks_by_hand
from scalefl.client import Residents, run_task
from scalefl.errors import UncuttableModel
from scalefl.methods.common import initial_params
from scalefl.methods.fedavg import FedAvg
from scalefl.models.skeleton import tensors
from scalefl.models.spec import ModelSpec
from scalefl.models.stand_ins import NoTemplate, StandIns, blanks, floating, template_of
from scalefl.partition import Entry, partition
from scalefl.parts import Resident
from scalefl.problem import Batch, Classification, Column, Problem
from scalefl.rng import seeded
from scalefl.starting import NUM_EXAMPLES, proven, skipping
from scalefl.steps import span_step
from scalefl.types import ClientTask, ClientUpdate, LocalWork, Means
from support import copied, identical


def entries_of(c: Case, cuts: tuple[str, ...] | None = None) -> tuple[Entry | None, ...]:
    return proven(c.model, c.problem, partition(c.model, c.problem, cuts).entries).entries


def which(c: Case, *cuts: str) -> list[bool]:
    """Which of the cuts by hand a run may start at."""
    return [entry is not None for entry in entries_of(c, cuts)]


def logits_of(module: nn.Module, batch: Batch, problem: Problem) -> Tensor:
    args, kwargs = problem.inputs(batch)
    return problem.output(module(*args, **kwargs))


def watched_run(module: nn.Module, batch: Batch, problem: Problem, entry: Entry) -> tuple[Tensor, Tensor]:
    """The tensor at a cut and the logits of a whole run."""
    kept: list[Tensor] = []
    child = module.get_submodule(entry.cut.module)
    handle = child.register_forward_hook(lambda _m, _i, out: kept.append(floating(out)[entry.cut.position].clone()))
    logits = logits_of(module, batch, problem)
    handle.remove()
    return kept[0], logits


# Which cuts

# In eval mode and without a gradient, torch's encoder layer runs as one operation that calls none of its modules.
FUSED = {"tokens": {f"layers.{i}.norm1" for i in range(3)}}
# What these norms return lies permuted in memory, what is kept of it in order: on processors without AVX-512 the
# convolution after it gives other last bits then, so that a run from there is refused.
PERMUTED = {"hf_convnext": {f"convnext.encoder.stages.{i}.downsampling_layer.0" for i in (1, 2)}}


@pytest.mark.parametrize("name", CASES)
def test_a_run_can_start_at_every_cut(name: str) -> None:
    c = case(name)
    cuts = partition(c.model, c.problem).cuts
    refused = {cut.module for cut, entry in zip(cuts, entries_of(c), strict=True) if entry is None}
    assert refused - PERMUTED.get(name, set()) == FUSED.get(name, set())


@pytest.mark.parametrize("norm", ["group", "none"])
@pytest.mark.parametrize("name", ["cnn", "resnet10", "squeezenet"])
def test_other_norms_change_nothing(name: str, norm: str) -> None:
    assert all(entries_of(built_in(name, norm=norm)))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_are_those_of_the_whole_run(name: str) -> None:
    """Bit for bit, at batch sizes that no proof has seen, with other weights and other data."""
    c = case(name)
    module = c.model.build(7).eval()
    for entry in entries_of(c):
        if entry is None:
            continue
        for rows in (1, 2, 7):
            batch = c.batch(rows, seed=rows)
            given, logits = watched_run(module, batch, c.problem, entry)
            with skipping(module, entry, [given]):
                assert torch.equal(logits_of(module, batch, c.problem), logits), (entry.cut.module, rows)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_only_what_a_part_owns_is_needed(name: str) -> None:
    """Everything else lies on the meta device: to read it would fail."""
    c = case(name)
    blocks = blocks_by_count(c.model, c.problem, partition(c.model, c.problem).num_units)
    params = dict(tensors(c.model.build(3)))
    batch = c.batch(5)
    for first in range(1, len(blocks), 1 + len(blocks) // 8):
        part = replace(blocks.part(Span(first, len(blocks) - 1), None), active=(), straddling=())
        if part.entry is None:
            continue
        own = {n: params[n] for n in part.own}
        assert set(own) < set(part.held)
        with Resident(c.model).holding(part, params) as (runner, _):
            features, logits = runner.prefix_features(batch, c.problem), runner(batch, c.problem).logits
        with Resident(c.model).holding(part, own, without_prefix=True) as (runner, _):
            assert torch.equal(runner(batch, c.problem, partial(lambda found: found, features)).logits, logits)


# Where something else passes the cut


class Stage(nn.Module):
    """A linear layer that hands on whatever it gets beside its tensor."""

    def __init__(self, inputs: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, 8)

    def forward(self, x: Tensor, *others: Any) -> Any:
        x = F.relu(self.linear(x))
        return (x, *others) if others else x


class MaskInPrefix(nn.Module):
    """A module computes a mask, which later modules read; it has no gradient."""

    pad = 0

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mask = nn.Embedding(50, 8), Mask(self.pad)
        self.first, self.second, self.head = Stage(), Stage(), nn.Linear(8, NUM_CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = self.mask(input_ids)
        x = self.second(self.first(self.embedding(input_ids)))
        return self.head((x * mask.unsqueeze(-1)).mean(1))


class RareMask(MaskInPrefix):
    """A token that random data need not have: then the mask is all ones, or all zeros where it says what counts not."""

    pad = 49


class Mask(nn.Module):
    def __init__(self, pad: int) -> None:
        super().__init__()
        self.pad = pad

    def forward(self, input_ids: Tensor) -> Tensor:
        return (input_ids != self.pad).float()


class Padding(Mask):
    """As bool, and true for what does not count."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids == self.pad


class RarePadding(MaskInPrefix):
    def __init__(self) -> None:
        super().__init__()
        self.mask = Padding(49)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        padding = self.mask(input_ids)
        x = self.second(self.first(self.embedding(input_ids)))
        return self.head(x.masked_fill(padding.unsqueeze(-1), 0.0).mean(1))


class HandedOn(nn.Module):
    """The scale of each example travels beside the tensor, in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = Stage(6), Stage(), nn.Linear(8, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x, scale = self.second(*self.first(x, x.detach().abs().mean(1, keepdim=True)))
        return self.head(x * scale)


class Writes(nn.Module):
    """A ReLU writes into the tensor at the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x), inplace=True)
        return self.head(F.relu(self.second(x), inplace=True))


class DropsInPlace(nn.Module):
    """A dropout writes into the tensor at the cut, but in train mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, NUM_CLASSES)
        self.dropout = nn.Dropout(0.5, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(self.dropout(self.first(x)))))


class Odd(NamedTuple):
    features: Tensor
    note: str


class OddObject(nn.Module):
    """A module returns what no stand-in is known for."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = Noted(), nn.Linear(8, 8), nn.Linear(8, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(self.first(x).features)))


class Noted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Odd:
        return Odd(F.relu(self.linear(x)), "hello")


class TrainOnly(nn.Module):
    """A statistic of the input reaches the head in train mode alone."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = Scale()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale(x)
        x = F.relu(self.second(F.relu(self.first(x))))
        return self.head(x * scale if self.training else x)


class Scale(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach().abs().mean(1, keepdim=True)


class ReadsWeights(nn.Module):
    """The head is the embedding of the inputs, read from another module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)
        self.bias = nn.Linear(6, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(x))))
        return self.bias(x + F.linear(x, self.first.weight)[:, :6])


class ReadsBuffer(nn.Module):
    """A later layer reads a table that an earlier module owns."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = Shifted(), nn.Linear(8, 8), nn.Linear(8, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(self.first(x))) + self.first.shift)


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 8)
        self.register_buffer("shift", torch.linspace(1, 2, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.linear(x) + self.shift)


class Shared(nn.Module):
    """One layer runs on both sides of the second cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.shared = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.shared(F.relu(self.first(x))))
        return self.head(self.shared(F.relu(self.second(x))))


class Tied(nn.Module):
    """The embedding is the head's weight; the bias is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_CLASSES, 8)
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, NUM_CLASSES)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids).mean(1)
        return self.head(F.relu(self.second(F.relu(self.first(x)))))


class Shortcut(nn.Module):
    """A shortcut runs past the second cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        return self.head(x + F.relu(self.second(x)))


class SequenceFirst(nn.Module):
    """The tensors at the cuts count examples in their second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.transpose(0, 1))
        return self.head(F.relu(self.second(F.relu(x))).mean(0))


class SharedDropout(nn.Module):
    """One dropout module, and the model's own functional dropout, after every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, NUM_CLASSES)
        self.dropout, self.relu = nn.Dropout(0.5), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.dropout(self.relu(self.first(x))), 0.5, self.training)
        x = F.dropout(self.dropout(self.relu(self.second(x))), 0.5, self.training)
        return self.head(x)


class Coupled(nn.Module):
    """Its norm has no running statistics, so it normalises by the batch in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, NUM_CLASSES)
        self.norm = nn.BatchNorm1d(8, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.norm(self.first(x))))))


CPU = torch.device("cpu")
IDS = Classification(NUM_CLASSES, (Column("input_ids", (6,), "int64"),))
SEQUENCES = Classification(NUM_CLASSES, (Column("x", (2, 4), "float32"),))
CUTS = ("first", "second")

# model, problem, whether a run may start after `first` and after `second`
HOSTILE: dict[str, tuple[type[nn.Module], Classification, list[bool]]] = {
    "a mask computed in the prefix": (MaskInPrefix, tokens(), [False, False]),
    "a mask of a rare token": (RareMask, tokens(), [False, False]),
    "padding of a rare token": (RarePadding, tokens(), [False, False]),
    "a second tensor in a tuple": (HandedOn, vectors(6), [False, False]),
    "a ReLU in place after the cut": (Writes, vectors(6), [False, False]),
    "a dropout in place after the first cut": (DropsInPlace, vectors(6), [False, True]),
    "an odd object": (OddObject, vectors(6), [False, False]),
    "a second tensor in train mode": (TrainOnly, vectors(6), [False, False]),
    "weights read from another module": (ReadsWeights, vectors(6), [False, False]),
    "a buffer read from another module": (ReadsBuffer, vectors(6), [False, False]),
    "a layer on both sides": (Shared, vectors(6), [True, False]),
    "tied weights": (Tied, IDS, [False, False]),
    "a shortcut past the second cut": (Shortcut, vectors(6), [True, False]),
    "a dropout on both sides": (SharedDropout, vectors(6), [True, True]),
    "examples normalised together": (Coupled, vectors(6), [True, False]),
    "a norm on both sides of the first cut": (SharedNorm, vectors(8), [False, True]),
}


def hostile(name: str) -> tuple[Case, list[bool]]:
    made, problem, expected = HOSTILE[name]
    return Case(ModelSpec.of(made), problem, vocabulary=NUM_CLASSES), expected


def test_a_model_is_not_cut_where_examples_are_in_the_second_dimension() -> None:
    """What is kept of them is cut into pieces by example, and an output module stands for each."""
    with pytest.raises(UncuttableModel, match=r"returns \[\d+, 5, 8\] with a gradient for 5 examples.*examples first"):
        partition(ModelSpec.of(SequenceFirst), SEQUENCES, ("first",))


@pytest.mark.parametrize("name", HOSTILE)
def test_what_else_passes_a_cut_is_found(name: str) -> None:
    c, expected = hostile(name)
    assert which(c, *CUTS) == expected


def train(c: Case, blocks: Blocks, span: Span, means: Means, coadapted_layers: int = 0) -> ClientUpdate:
    step = span_step(blocks, span, None, LocalWork(epochs=2, batch_size=8, lr=0.1), coadapted_layers=coadapted_layers)
    step = replace(step, means=means)
    task = ClientTask(0, 0, (step,), 5)
    return run_task(FedAvg(), c.problem, Residents(), task, copied(initial_params(c.model, 1)), c.batch(20))


@pytest.mark.parametrize("means", [Means(prefix="streamed"), Means(prefix="cached"), Means(recompute=True)], ids=str)
@pytest.mark.parametrize("span", [Span(0, 2), Span(1, 2), Span(2, 2)], ids=str)
@pytest.mark.parametrize("name", HOSTILE)
def test_they_train_as_they_do_without_means(name: str, span: Span, means: Means) -> None:
    c, _ = hostile(name)
    blocks = blocks_by_hand(c.model, c.problem, CUTS)
    plain, other = train(c, blocks, span, Means()), train(c, blocks, span, means)
    assert plain.params.keys() == other.params.keys()
    for n, t in plain.params.items():
        # Matrices of other sizes are multiplied in another order.
        torch.testing.assert_close(other.params[n], t, rtol=0, atol=0 if means.recompute else 1e-5)


def test_tied_weights_with_gradients_freed_and_units_recomputed() -> None:
    """Half of a gradient must not be applied on its own."""
    for name in ("tied weights", "a layer on both sides", "weights read from another module"):
        c, _ = hostile(name)
        blocks = blocks_by_hand(c.model, c.problem, CUTS)
        plain = train(c, blocks, blocks.whole, Means())
        assert identical(
            plain.params, train(c, blocks, blocks.whole, Means(recompute=True, free_gradients=True)).params
        )


class OnlyRealData(nn.Module):
    """Refuses what no real example looks like."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == NUM_EXAMPLES:
            raise ValueError("not these")
        return self.head(F.relu(self.second(F.relu(self.first(x)))))


def test_a_model_that_refuses_the_proof_runs_from_its_input() -> None:
    c = Case(ModelSpec.of(OnlyRealData), vectors(6))
    assert which(c, *CUTS) == [False, False]
    blocks = blocks_by_hand(c.model, c.problem, CUTS)
    part = blocks.part(Span(2, 2), None)
    assert part.entry is None
    assert part.prefix == part.inner == ()
    assert part.own == part.held
    assert identical(*(train(c, blocks, Span(2, 2), m).params for m in (Means(), Means(prefix="cached"))))


def test_an_unproven_cut_is_passed_over() -> None:
    """Stretches of a prefix, and what is recomputed, then reach over it."""
    c = case("tokens")
    count = partition(c.model, c.problem).num_units
    part = blocks_by_count(c.model, c.problem, count).part(Span(count - 1, count - 1), None)
    stops = [stretch.stop.module for stretch in part.prefix]
    assert not set(stops) & FUSED["tokens"]
    assert [s.entry.cut if s.entry else None for s in part.prefix[1:]] == [s.stop for s in part.prefix[:-1]]
    assert part.prefix[0].entry is None
    assert part.prefix[-1].stop == part.entry.cut
    # Every tensor of the prefix is in some stretch; none but the last needs what trains.
    assert {n for s in part.prefix for n in s.held} | set(part.own) == set(part.held)


# Nothing is left behind


def forwards(module: nn.Module) -> list[Any]:
    return [vars(child).get("forward") for child in module.modules()]


def modes(module: nn.Module) -> list[bool]:
    return [child.training for child in module.modules()]


@pytest.mark.parametrize("name", ["residual", "hf_bert", "vit"])
@pytest.mark.parametrize("fails", [False, True])
def test_forwards_and_modes_are_as_before(name: str, fails: bool) -> None:
    c = case(name)
    module = c.model.build(0)
    own = nn.Identity.forward.__get__(module)  # a forward that a user has put on a module stays on it
    vars(module)["forward"] = own
    entry = entries_of(c)[-1]
    skipped = module.get_submodule(entry.skipped[0][0])
    vars(skipped)["forward"] = replaced = skipped.forward
    module.train()
    next(module.children()).eval()
    before, modes_before = forwards(module), modes(module)
    with contextlib.ExitStack() as caught:
        if fails:
            caught.enter_context(pytest.raises(ZeroDivisionError))
        with skipping(module, entry, [entry.blank.zeros(4)]):
            assert forwards(module) != before
            if fails:
                raise ZeroDivisionError
    assert forwards(module) == before
    assert vars(skipped)["forward"] is replaced
    assert modes(module) == modes_before


def test_a_run_that_fails_after_its_entry_leaves_nothing() -> None:
    c = case("hf_bert")
    blocks = blocks_by_count(c.model, c.problem, 3)
    step = span_step(blocks, Span(2, 2), None, LocalWork(), coadapted_layers=0)
    resident, params = Resident(c.model), initial_params(c.model, 0)
    before = forwards(resident._module)
    with resident.holding(step.part, params, step.trainable, step.moving) as (runner, _):
        features = runner.prefix_features(c.batch(4), c.problem)
        was = modes(resident._module)
        with pytest.raises(RuntimeError):
            runner(c.batch(4), c.problem, lambda: features._replace(z=features.z[..., :3]))
        assert forwards(resident._module) == before
        assert sum(len(m._forward_hooks) for m in resident._module.modules()) == 0
        assert {a and not b for a, b in zip(was, modes(resident._module), strict=True)} == {False}
        assert runner(c.batch(4), c.problem, lambda: features).logits.isfinite().all()


def test_modules_around_a_cut_draw_nothing_before_it() -> None:
    """From the same generator, a run from the cut has the same dropout as a whole run, and the same statistics."""
    for made, problem in ((SharedDropout, vectors(6)), (SharedNorm, vectors(8))):
        c = Case(ModelSpec.of(made), problem)
        entry = entries_of(c, CUTS)[1]
        batch = c.batch(6)
        one, other = c.model.build(0).train(), c.model.build(0).train()
        states: list[Tensor] = []  # of torch's generator
        handle = one.get_submodule("second").register_forward_hook(lambda *_, s=states: s.append(torch.get_rng_state()))
        with seeded(3):
            given, logits = watched_run(one, batch, c.problem, entry)
            handle.remove()
            torch.set_rng_state(states[0])
            with skipping(other, entry, [given]):
                assert torch.equal(logits_of(other, batch, c.problem), logits)
        assert identical(dict(other.named_buffers()), dict(c.model.build(0).named_buffers()))
        assert all(modes(other))


# Stand-ins


def test_stand_ins_take_the_memory_of_one_element() -> None:
    template = template_of({"a": torch.randn(2, 3, 4), "b": (torch.ones(2, 5, dtype=torch.int64), None)}, 2)
    made = StandIns(7, CPU)(template)
    assert made["a"].shape == (7, 3, 4)
    assert made["a"].untyped_storage().nbytes() == 4
    assert made["b"][0].shape == (7, 5)
    assert made["b"][0].dtype == torch.int64
    assert made["b"][1] is None
    assert [blank.shape for blank in blanks(template)] == [(3, 4), (5,)]


def test_the_given_tensor_has_its_place() -> None:
    """Whole numbers are not counted; a tensor without examples keeps its shape."""
    output = [torch.ones(2, 1, dtype=torch.int64), torch.randn(1, 4), (torch.randn(2, 6),)]
    template = template_of(output, 2)
    given = torch.randn(5, 6)
    made = StandIns(5, CPU)(template, 1, given)
    assert made[2][0] is given
    assert made[1].shape == (1, 4)
    assert made[0].tolist() == [[0]] * 5


def test_wrong_stand_ins_show() -> None:
    made = StandIns(4, CPU, wrong=True)(template_of((torch.randn(2, 3), torch.zeros(2, dtype=torch.bool)), 2))
    assert made[0].isnan().all()
    assert made[1].all()


def test_stand_ins_of_one_kind_are_one_tensor_which_a_model_may_not_reshape() -> None:
    make, template = StandIns(4, CPU), template_of(torch.randn(2, 1), 2)
    first = make(template)
    assert make(template) is first
    first.squeeze_()
    assert make(template).shape == (4, 1)
    with pytest.raises(RuntimeError, match="single memory location"):
        make(template).add_(1)
    number = template_of(torch.tensor(1.0), 2)
    make(number).add_(1)
    assert make(number) == 0


def test_what_has_no_stand_in() -> None:
    for odd in (Odd(torch.ones(2), "x"), "x", 3, object(), [torch.ones(2), 1.5]):
        with pytest.raises(NoTemplate):
            template_of(odd, 2)


def test_models_that_cannot_be_cut_have_no_entries() -> None:
    with pytest.raises(UncuttableModel):
        partition(ModelSpec.of(nn.Linear, in_features=6, out_features=NUM_CLASSES), vectors(6))
    whole = blocks_by_hand(ModelSpec.of(nn.Linear, in_features=6, out_features=NUM_CLASSES), vectors(6), ())
    part = whole.part(whole.whole, None)
    assert (part.entry, part.inner, part.prefix) == (None, (), ())


def test_every_built_in_model_was_tried() -> None:
    from scalefl.models import BUILT_IN

    assert BUILT_IN_CASES.keys() == BUILT_IN.keys()
    assert images().columns[0].shape == (3, 32, 32)
