"""By every means the same update: what is exact to the bit, what to rounding, and what changes with batch norm."""

from __future__ import annotations

import gc
import itertools
import resource
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import NUM_CLASSES, Case, SharedNorm, case, hf_bert, hf_gpt2, images, tokens, vectors
from scalefl.blocks import Blocks, Span, blocks_by_count, blocks_by_hand
from scalefl.client import Residents, holding, make_optimizer, run_task, train_batch
from scalefl.errors import ConfigError
from scalefl.mentor import Mentor, MentorLoss
from scalefl.methods.common import initial_params
from scalefl.models import resolve
from scalefl.models.output import OutputSpec, light_targets
from scalefl.models.spec import ModelSpec, load_object
from scalefl.objectives import TaskLoss
from scalefl.params import is_attachment
from scalefl.partition import partition
from scalefl.parts import Taps
from scalefl.prefix import CHUNK, _Cache, prefix_of
from scalefl.problem import Batch, Classification, Column, Problem, Weighted, num_rows
from scalefl.rng import seeded
from scalefl.sgd import SGD
from scalefl.steps import span_step
from scalefl.types import ClientTask, ClientUpdate, LocalWork, Means, Objective, Step
from support import copied, global_rng, identical, tiny

PLAIN = Means()
EXACT = 1e-9
"""Of a step's length, in float64."""
WORK = LocalWork(epochs=2, batch_size=8, lr=0.1, momentum=0.9, weight_decay=1e-3)


# Models in float64, where rounding can't be taken for something else


def precise_tiny(norm: str = "group", dropout: float = 0.0) -> nn.Module:
    return tiny(norm=norm, dropout=dropout).double()


def precise_built_in(name: str, **arguments: Any) -> nn.Module:
    return load_object(resolve(name))(num_classes=NUM_CLASSES, width=0.125, **arguments).double()


def precise_tokens(make: Any, dropout: float = 0.0) -> nn.Module:
    module = make()
    for child in module.modules():
        if isinstance(child, nn.Dropout):
            child.p = dropout
    return module.double()


def exactly(problem: Classification) -> Classification:
    columns = (replace(c, dtype="float64") if c.dtype == "float32" else c for c in problem.columns)
    return replace(problem, columns=tuple(columns))


GREY = Classification(3, (Column("x", (1, 8, 8), "float32"),))
PRECISE: dict[str, Case] = {
    "tiny": Case(ModelSpec.of(precise_tiny), exactly(GREY)),
    "no norm": Case(ModelSpec.of(precise_tiny, norm="none"), exactly(GREY)),
    "dropout": Case(ModelSpec.of(precise_tiny, dropout=0.5), exactly(GREY)),
    "batch norm": Case(ModelSpec.of(precise_tiny, norm="batch"), exactly(GREY)),
    "resnet10": Case(ModelSpec.of(precise_built_in, name="resnet10", norm="group"), exactly(images())),
    "vit": Case(ModelSpec.of(precise_built_in, name="vit", depth=3), exactly(images())),
    "bert": Case(ModelSpec.of(partial(precise_tokens, hf_bert)), tokens()),
    "bert, dropout": Case(ModelSpec.of(partial(precise_tokens, hf_bert, 0.3)), tokens()),
    "gpt2": Case(ModelSpec.of(partial(precise_tokens, hf_gpt2)), tokens()),
}


# Jobs: something to train, and what it is compared by


@dataclass(frozen=True)
class Only:
    """The part of a method that a client asks for."""

    only: Objective

    def objective(self, step: Step) -> Objective:
        return self.only


@dataclass(frozen=True)
class Job:
    """A step on a case: a span of its blocks."""

    c: Case
    step: Step
    objective: Objective = field(default_factory=TaskLoss)

    def params(self) -> dict[str, Tensor]:
        own = initial_params(self.c.model, 1)
        params = {n: own[n] for n in self.step.part.held}
        if self.step.part.output is not None:
            dtype = next(t.dtype for t in own.values() if t.is_floating_point())
            params |= {n: t.to(dtype) for n, t in self.step.part.output.initial(1).items()}
        return copied(params)

    def batch(self, num_examples: int) -> dict[str, Tensor]:
        batch = self.c.batch(num_examples)
        dtypes = {c.name: getattr(torch, c.dtype) for c in self.c.problem.columns}
        return {n: t.to(dtypes.get(n, t.dtype)) for n, t in batch.items()}

    def run(self, means: Means = PLAIN, num_examples: int = 20, seed: int = 5) -> ClientUpdate:
        """A whole task."""
        moving = self.step.moving - (self.step.statistics if means.frozen_statistics else frozenset())
        task = ClientTask(0, 0, (replace(self.step, means=means, moving=moving),), seed)
        method: Any = Only(self.objective)
        return run_task(method, self.c.problem, Residents(), task, self.params(), self.batch(num_examples))

    def gap(self, one: ClientUpdate, other: ClientUpdate) -> float:
        """How far apart two updates are, as a share of how far the first went."""
        assert one.params.keys() == other.params.keys()
        start, names = self.params(), [n for n, t in one.params.items() if t.is_floating_point()]

        def flat(params: Mapping[str, Tensor]) -> Tensor:
            return torch.cat([params[n].flatten().double() for n in names])

        moved = (flat(one.params) - flat(start)).norm()
        assert moved > 0
        return float((flat(one.params) - flat(other.params)).norm() / moved)


def job(
    c: Case,
    first: int = 0,
    last: int | None = None,
    *,
    blocks: Blocks | None = None,
    num_blocks: int = 3,
    coadapted: int = 0,
    objective: Objective | None = None,
    projection: Any = "none",
    work: LocalWork = WORK,
    tail: bool = False,
) -> Job:
    """Blocks `first` … `last`, where that is not the last with their tail, or a full output module."""
    blocks = blocks or blocks_by_count(c.model, c.problem, num_blocks)
    last = len(blocks) - 1 if last is None else last
    output, cut = None, blocks.cut(last)
    if cut is not None and not tail:
        later = blocks.partition.shapes_after(blocks.ends[last])
        targets = light_targets(cut.shape, later)
        output = OutputSpec(cut.module, cut.shape, targets, c.problem.num_classes, "full", projection)
    step = span_step(blocks, Span(first, last), output, work, coadapted_layers=coadapted, tail=tail)
    return Job(c, step, objective or TaskLoss())


def mentor(**settings: Any) -> MentorLoss:
    return MentorLoss(Mentor(**settings), 3.0, 2.0)


def one_step(work: LocalWork = WORK) -> LocalWork:
    return replace(work, epochs=1)


# Micro-batches and terms that couple the samples of a batch


@pytest.mark.parametrize("projection", ["none", "linear", "mlp"])
@pytest.mark.parametrize("tap", ["output", "cut"])
@pytest.mark.parametrize("form", ["cka", "cca"])
def test_two_passes_equal_the_whole_batch(form: str, tap: str, projection: str) -> None:
    """One optimizer step and a whole task, with uneven micro-batches and single examples."""
    for work, rows in ((one_step(), 8), (WORK, 21)):
        objective = mentor(form=form, tap=tap, projection=projection)
        j = job(PRECISE["tiny"], 0, 0, projection=projection, objective=objective, work=work)
        whole = j.run(num_examples=rows)
        without = job(PRECISE["tiny"], 0, 0, projection=projection, work=work).run(num_examples=rows)
        assert j.gap(whole, without) > 1e-3  # the terms matter
        for micro in (1, 3):
            split = j.run(Means(micro), rows)
            assert j.gap(whole, split) < EXACT
            assert split.metrics["loss"] == (pytest.approx(whole.metrics["loss"][0]), whole.metrics["loss"][1])


@pytest.mark.parametrize(("tap", "form"), [("output", "cka"), ("cut", "cca")])
@pytest.mark.parametrize("name", ["no norm", "resnet10", "vit", "bert", "gpt2"])
@pytest.mark.parametrize(("first", "last", "coadapted"), [(0, 1, 0), (1, 1, 1), (2, 2, 0), (0, 2, 0)])
def test_two_passes_of_other_models_and_spans(
    name: str, first: int, last: int, coadapted: int, tap: str, form: str
) -> None:
    """Token models with masks, spans that end in the model's own head, co-adapted layers."""
    objective = mentor(form=form, tap=tap)
    j = job(PRECISE[name], first, last, coadapted=coadapted, objective=objective, work=one_step())
    assert j.gap(j.run(num_examples=7), j.run(Means(3), 7)) < EXACT


def in_one_graph(j: Job, micro: int, batch: Batch, seed: int) -> dict[str, Tensor]:
    """One step that keeps the graphs of all micro-batches, and differentiates the batch's loss by plain autograd."""
    params, problem = j.params(), j.c.problem
    runs: list[Taps] = []
    with seeded(seed), holding(Residents()[j.c.model], j.step, params) as (runner, trained):
        optimizer = SGD(trained, j.step.work)
        loss, weight = torch.zeros((), dtype=torch.float64), 0
        for pieces in zip(*(t.tensor_split(-(-num_rows(batch) // micro)) for t in batch.values()), strict=True):
            small = dict(zip(batch, pieces, strict=True))
            runs.append(runner(small, problem))
            term, count = j.objective.sample_terms(runs[-1], small, problem)
            loss, weight = loss + term, weight + count
        taps = Taps(*(torch.cat([getattr(t, n) for t in runs]) for n in ("logits", "x", "z", "late", "projected")))
        coupled = j.objective.batch_terms(taps, batch, problem)
        assert coupled is not None
        (loss / weight + coupled).backward()
        optimizer.step()
    return params


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("tap", ["output", "cut"])
@pytest.mark.parametrize(
    ("name", "first", "last"), [("dropout", 1, 2), ("bert, dropout", 0, 1), ("bert, dropout", 1, 2)]
)
def test_dropout_is_the_same_in_both_passes(name: str, first: int, last: int, tap: str, recompute: bool) -> None:
    """As if all micro-batches had gone through one graph; another draw would show."""
    j = job(PRECISE[name], first, last, objective=mentor(tap=tap), work=one_step())
    batch, params = j.batch(7), j.params()
    step = replace(j.step, means=Means(3, recompute=recompute))
    with seeded(4), holding(Residents()[j.c.model], step, params) as (runner, trained):
        train_batch(runner, make_optimizer(trained, step, {}), batch, j.c.problem, j.objective, step.means)
    reference, other = in_one_graph(j, 3, batch, 4), in_one_graph(j, 3, batch, 9)
    ours, wanted, another = (
        ClientUpdate(0, {n: p[n] for n in j.step.moving}, 7, {}, None) for p in (params, reference, other)
    )  # type: ignore[arg-type]
    assert j.gap(wanted, ours) < EXACT
    assert j.gap(wanted, another) > 1e-3


@dataclass(frozen=True)
class Masked(Classification):
    """Rows with label 0 carry no loss: micro-batches weigh differently, or nothing."""

    def loss(self, output: Tensor, batch: Batch) -> Weighted:
        labels = batch[self.label]
        return F.cross_entropy(output, labels, reduction="sum", ignore_index=0), int((labels > 0).sum())


@pytest.mark.parametrize("labels", [[0, 0, 0, 1, 2, 1, 2], [1, 0, 2, 0, 0, 0, 0], [0] * 7])
def test_two_passes_over_micro_batches_of_unequal_weight(labels: list[int]) -> None:
    c = PRECISE["tiny"]
    c = replace(c, problem=Masked(3, c.problem.columns))
    for objective in (mentor(), TaskLoss()):
        j = job(c, 0, 0, objective=objective, work=one_step())
        batch = {**j.batch(7), "label": torch.tensor(labels)}
        found = []
        for means in (PLAIN, Means(3), Means(1), Means(3, recompute=True)):
            step, params = replace(j.step, means=means), j.params()
            with holding(Residents()[c.model], step, params) as (runner, trained):
                train_batch(runner, make_optimizer(trained, step, {}), batch, c.problem, objective, means)
            found.append(params)
        for params in found[1:]:
            assert all(torch.allclose(params[n], found[0][n], rtol=0, atol=1e-12) for n in params)


# Batch norm: micro-batches have statistics of their own


@dataclass(frozen=True)
class Recording:
    """The mentor's loss; keeps what each pass showed, and torch's statistics at the time."""

    inner: MentorLoss
    statistics: tuple[Tensor, ...] = field(compare=False)
    seen: dict[bool, list[Tensor]] = field(default_factory=lambda: {False: [], True: []}, compare=False)

    @property
    def coupled(self) -> tuple[str, ...]:
        return self.inner.coupled

    def sample_terms(self, taps: Taps, batch: Batch, problem: Problem) -> Weighted:
        self.seen[torch.is_grad_enabled()].append(taps.z.detach().clone())
        return self.inner.sample_terms(taps, batch, problem)

    def batch_terms(self, taps: Taps, batch: Batch, problem: Problem) -> Tensor | None:
        return self.inner.batch_terms(taps, batch, problem)


@pytest.mark.parametrize("recompute", [False, True])
def test_both_passes_normalise_alike_and_count_once(recompute: bool) -> None:
    j = job(PRECISE["batch norm"], 0, 1, num_blocks=3)
    batch, found = j.batch(12), []
    for means in (PLAIN, Means(4, recompute=recompute)):
        step, params = replace(j.step, means=means), j.params()
        objective = Recording(mentor(), ())
        with holding(Residents()[j.c.model], step, params) as (runner, trained):
            train_batch(runner, make_optimizer(trained, step, {}), batch, j.c.problem, objective, means)
        found.append((objective.seen, params))
    (_, whole), (seen, split) = found
    assert len(seen[False]) == len(seen[True]) == 3
    assert all(torch.equal(a, b) for a, b in zip(seen[False], seen[True], strict=True))
    # One update of the statistics for each micro-batch, where the whole batch makes one.
    assert int(whole["0.1.num_batches_tracked"]) == 1
    assert int(split["0.1.num_batches_tracked"]) == 3
    module = j.c.model.build(0)
    module.load_state_dict({**module.state_dict(), **{n: t for n, t in j.params().items() if not is_attachment(n)}})
    for piece in batch["x"].tensor_split(3):
        module.train()(piece)
    names = [n for n in step.statistics if n.startswith(("0.1", "1.1"))]
    assert len(names) == 6
    for n in names:
        torch.testing.assert_close(split[n], dict(module.named_buffers())[n])
        assert not torch.equal(split[n], whole[n])


def test_micro_batches_change_the_update_under_batch_norm_and_frozen_statistics_do_not() -> None:
    j = job(PRECISE["batch norm"], 0, 2, objective=mentor(), work=one_step())
    assert j.gap(j.run(num_examples=8), j.run(Means(4), 8)) > 1e-3
    frozen = j.run(Means(frozen_statistics=True), 8)
    assert j.gap(frozen, j.run(Means(3, frozen_statistics=True), 8)) < EXACT


# Recomputation


SPANS = [(0, 2, 0), (1, 2, 1)]
RECOMPUTED = [
    *itertools.product(["resnet10", "residual", "sequential", "tokens", "vit", "hf_bert"], SPANS),
    *itertools.product(["squeezenet", "owner", "hf_gpt2", "resnet10"], [(0, 1, 0)]),
]


@pytest.mark.parametrize(("name", "span"), RECOMPUTED, ids=str)
def test_recomputation_gives_the_same_bits(name: str, span: tuple[int, int, int]) -> None:
    """Parameters, running statistics and their counts, with dropout, masks and modules around the span's start."""
    c, (first, last, coadapted) = case(name), span
    j = job(c, first, last, coadapted=coadapted, objective=mentor())
    assert j.step.part.inner
    assert identical(j.run().params, j.run(Means(recompute=True)).params)


def test_recomputation_draws_no_more_than_the_plain_run() -> None:
    """The second batch has the dropout that it would have had."""
    j = job(case("hf_bert"))
    assert "dropout" in str(j.c.model.build(0)).lower()
    for examples in (8, 16, 20):
        assert identical(j.run(num_examples=examples).params, j.run(Means(recompute=True), examples).params)


class Momentless(nn.Module):
    """Norms that average over all batches, and one that counts for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = Normed(6), Normed(8), nn.Linear(8, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)))


class Normed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(width, 8), nn.BatchNorm1d(8, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.linear(x)))


def test_cumulative_averages_count_each_batch_once() -> None:
    j = job(Case(ModelSpec.of(Momentless), vectors(6)))
    plain, again = j.run(), j.run(Means(recompute=True))
    assert int(again.params["first.norm.num_batches_tracked"]) == 6
    assert identical(plain.params, again.params)


def test_recomputation_where_only_the_end_trains() -> None:
    """Units before the first parameter that trains have nothing to take a gradient to."""
    j = job(case("resnet10"))
    few = frozenset(n for n in j.step.trainable if n.startswith(("layer4", "fc")))
    j = replace(j, step=replace(j.step, trainable=few, moving=few | j.step.statistics))
    assert identical(j.run().params, j.run(Means(recompute=True)).params)


@pytest.mark.parametrize("name", ["resnet10", "vit", "bert", "gpt2"])
def test_recomputation_of_micro_batches(name: str) -> None:
    for first in (0, 1):
        j = job(PRECISE[name], first, objective=mentor(tap="cut"), work=one_step())
        assert j.gap(j.run(num_examples=7), j.run(Means(3, recompute=True), 7)) < EXACT


# What comes and goes with its stretch


STREAMED = [
    *itertools.product(["resnet10", "squeezenet", "tokens", "vit", "hf_bert"], [(0, 0, 0), (1, 1, 1)]),
    *itertools.product(["residual", "hf_gpt2", "owner"], [(0, 0, 0)]),
    ("owner", (1, 1, 0)),  # its tail needs tensors that its prefix holds
]


@pytest.mark.parametrize(("name", "span"), STREAMED, ids=str)
def test_streaming_frozen_tensors_gives_the_same_bits(name: str, span: tuple[int, int, int]) -> None:
    """With whole batches, and where the batch's terms take a pass of their own."""
    c, (first, last, coadapted) = case(name), span
    j = job(c, first, last, coadapted=coadapted, objective=mentor(), tail=True)
    assert any(j.step.frozen)
    for micro in (None, 4):
        plain = j.run(Means(micro, recompute=True))
        assert identical(plain.params, j.run(Means(micro, recompute=True, stream_frozen=True)).params)


def test_frozen_layers_among_those_that_train_are_streamed() -> None:
    c = case("resnet10")
    blocks = blocks_by_count(c.model, c.problem, 3)
    layers = blocks.layer_groups(Span(1, 1))[-1]
    step = span_step(blocks, Span(1, 1), None, WORK, layers=layers, tail=True)
    assert step.trainable == blocks.trainable_of(layers)
    j = Job(c, step)
    assert not blocks.trainable(Span(1, 1)).isdisjoint(frozenset().union(*step.frozen))
    assert identical(j.run(Means(recompute=True)).params, j.run(Means(recompute=True, stream_frozen=True)).params)


def test_of_frozen_tensors_those_of_one_stretch_are_laid_out() -> None:
    j = job(case("resnet10"), 0, 0, tail=True)
    step, resident = replace(j.step, means=Means(recompute=True, stream_frozen=True)), Residents()[j.c.model]
    seen: list[set[str]] = []
    with holding(resident, step, params := j.params()) as (runner, trained):
        module = resident._module

        def note(*_: Any) -> None:
            seen.append({n for n, t in [*module.named_parameters(), *module.named_buffers()] if not t.is_meta})

        handles = [child.register_forward_hook(note) for child in module.modules()]
        optimizer = make_optimizer(trained, step, params)
        train_batch(runner, optimizer, j.batch(4), j.c.problem, TaskLoss(), step.means)
        note()
        for handle in handles:
            handle.remove()
    held = set(j.step.part.own).difference(*step.frozen)
    assert held == step.moving < set().union(*seen)
    assert seen[-1] == held
    assert all(any(held <= laid <= held | names for names in step.frozen) for laid in seen)


def test_nothing_is_streamed_without_recomputation_or_cuts_inside() -> None:
    j = job(case("resnet10"), 0, 0, tail=True)
    assert replace(j.step, means=Means(stream_frozen=True)).passing == j.step.frozen != ()
    assert replace(j.step, part=replace(j.step.part, inner=()), means=Means(stream_frozen=True)).passing == ()
    assert j.step.passing == ()


# The frozen prefix

MODES = ["chunked", "streamed", "cached"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "coadapted"), [("tiny", 0), ("tiny", 1), ("batch norm", 0), ("resnet10", 1), ("bert", 0), ("gpt2", 1)]
)
def test_the_prefix_gives_the_same_features(name: str, mode: Any, coadapted: int) -> None:
    """More examples than a chunk holds, two epochs, batches and micro-batches of other sizes."""
    for first, last in ((1, 1), (2, 2))[coadapted:]:
        j = job(
            PRECISE[name],
            first,
            last,
            coadapted=coadapted,
            objective=mentor(),
            work=replace(WORK, batch_size=CHUNK + 3),
        )
        assert j.step.part.entry is not None
        plain = j.run(num_examples=2 * CHUNK + 4)
        assert j.gap(plain, j.run(Means(prefix=mode), 2 * CHUNK + 4)) < EXACT


@pytest.mark.parametrize(
    "name", ["residual", "squeezenet", "owner", "sequential", "hf_bert", "hf_gpt2", "hf_convnext", "tokens"]
)
def test_a_streamed_prefix_gives_the_same_bits(name: str) -> None:
    """Where batches are no larger than a chunk: the same operations on the same numbers."""
    j = job(case(name), 2)
    plain, streamed = j.run(num_examples=16), j.run(Means(prefix="streamed"), 16)
    if name in ("tokens", "hf_convnext"):
        # Torch's fused encoder layer gives way to its modules where a run ends between two layers; and convolutions
        # take another way where features have another order in memory.
        assert j.gap(plain, streamed) < 1e-5
    else:
        assert identical(plain.params, streamed.params)


class Turned(nn.Module):
    """Its prefix leaves a tensor that is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.turn = nn.Linear(6, 8), Turn()
        self.second, self.head = nn.Linear(6, 8), nn.Linear(64, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.turn(self.first(x))
        return self.head(F.relu(self.second(x)).flatten(1))


class Turn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mT


@pytest.mark.parametrize("means", [*(Means(prefix=m) for m in MODES), Means(recompute=True)], ids=str)
def test_features_in_another_order_of_memory(means: Means) -> None:
    c = Case(ModelSpec.of(Turned), Classification(NUM_CLASSES, (Column("x", (6, 6), "float32"),)))
    blocks = blocks_by_hand(c.model, c.problem, ("turn",))
    for first in (0, 1):
        j = job(c, first, blocks=blocks)
        assert j.gap(j.run(), j.run(means)) < 1e-5


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@contextmanager
def a_cache(j: Job, rows: int) -> Iterator[tuple[_Cache, Any]]:
    step = replace(j.step, means=Means(prefix="cached"))
    params, examples = j.params(), j.batch(rows)
    with holding(Residents()[j.c.model], step, params) as (runner, _):
        run = partial(runner.streamed_features, problem=j.c.problem)
        with _Cache(run, examples, CHUNK) as cache:
            yield cache, run(examples)


@pytest.mark.parametrize("name", ["resnet10", "bert", "gpt2"])
def test_a_cache_reads_what_it_wrote(name: str) -> None:
    """In any order, one row or all, any row twice; with the first embedding's output where that stands for x."""
    j = job(PRECISE[name], 2)
    draw = torch.Generator().manual_seed(0)
    with a_cache(j, 2 * CHUNK + 5) as (cache, whole):
        assert (whole.x is None) == (name == "resnet10")
        for rows in (torch.arange(37), torch.randperm(37, generator=draw), torch.tensor([36]), torch.tensor([3, 3, 0])):
            found = cache.read(rows)
            torch.testing.assert_close(found.z, whole.z[rows], rtol=1e-12, atol=1e-12)
            if whole.x is not None:
                assert torch.equal(found.x, whole.x[rows])


def test_a_cache_has_no_name_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    j = job(PRECISE["bert"], 2)
    before = open_files()
    with a_cache(j, 20):
        assert open_files() == before + 2
        assert not list(tmp_path.iterdir())
    assert open_files() == before
    with pytest.raises(ZeroDivisionError), a_cache(j, 20):
        raise ZeroDivisionError
    assert open_files() == before
    j.run(Means(prefix="cached"))
    assert open_files() == before
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error_that_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-way through the second chunk."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    j = job(PRECISE["resnet10"], 2)
    before, limits = open_files(), resource.getrlimit(resource.RLIMIT_FSIZE)
    with a_cache(j, 1) as (_, features):
        row = features.z.nbytes
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(row * CHUNK * 1.5), limits[1]))
    try:
        with pytest.raises(OSError):
            j.run(Means(prefix="cached"), 3 * CHUNK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert open_files() == before
    assert not list(tmp_path.iterdir())
    # Room for the first chunk is room for a client that has no more.
    j.run(Means(prefix="cached"), CHUNK)


def test_a_cache_runs_the_prefix_once_for_each_example(monkeypatch: pytest.MonkeyPatch) -> None:
    j = job(case("resnet10"), 2, work=replace(WORK, epochs=3))
    runs: list[int] = []
    original = j.c.model.build(0).stem.__class__.forward

    def counting(self: nn.Module, x: Tensor) -> Tensor:
        runs.append(len(x) if x.shape[1] == 3 else 0)
        return original(self, x)

    monkeypatch.setattr(j.c.model.build(0).stem.__class__, "forward", counting)
    j.run(Means(prefix="streamed"))
    assert sum(runs) == 3 * 20
    runs.clear()
    j.run(Means(prefix="cached"))
    assert sum(runs) == 20


def test_a_part_without_a_prefix_takes_no_notice() -> None:
    j = job(case("resnet10"), 0, 1)
    for mode in MODES:
        with holding(Residents()[j.c.model], j.step, j.params()) as (runner, _):
            step = replace(j.step, means=Means(prefix=mode))
            with prefix_of(step, runner, j.batch(4), j.c.problem) as prefix:
                assert prefix(j.batch(4), torch.arange(4)) is None
        assert identical(j.run().params, j.run(Means(prefix=mode)).params)


def test_what_trains_alone_is_laid_out_while_a_prefix_is_streamed() -> None:
    """And at most one stretch beside it."""
    j = job(case("resnet10"), 2)
    params, resident = j.params(), Residents()[j.c.model]
    largest: list[set[str]] = []
    with holding(resident, replace(j.step, means=Means(prefix="streamed")), params) as (runner, _):
        module = resident._module

        def note(*_: Any) -> None:
            largest.append({n for n, t in [*module.named_parameters(), *module.named_buffers()] if not t.is_meta})

        handles = [child.register_forward_hook(note) for child in module.modules()]
        note()
        runner.streamed_features(j.batch(4), j.c.problem)
        note()
        for handle in handles:
            handle.remove()
    own = set(j.step.part.own)
    assert largest[0] == largest[-1] == own
    stretches = [set(s.held) for s in j.step.part.prefix]
    assert len(stretches) == partition(j.c.model, j.c.problem).num_units - len(j.step.part.inner) - 1
    assert all(any(held <= own | s for s in stretches) for held in largest)


WAITING = [(0, Means(3)), (0, Means(recompute=True)), (2, Means(3, True, "streamed")), (2, Means(prefix="cached"))]


@pytest.mark.parametrize(("first", "means"), WAITING, ids=str)
def test_no_tensor_waits_for_the_collector(first: int, means: Means) -> None:
    """A cycle of references would hold features and activations for some batches more."""
    j = job(PRECISE["bert"], first, objective=mentor())
    step, params, batch = replace(j.step, means=means), j.params(), j.batch(8)
    with (
        holding(Residents()[j.c.model], step, params) as (runner, trained),
        prefix_of(step, runner, batch, j.c.problem) as prefix,
    ):
        optimizer = make_optimizer(trained, step, {})
        with collector_off():
            train_batch(runner, optimizer, batch, j.c.problem, j.objective, means, prefix)
            left = num_tensors()
            gc.collect()
            assert num_tensors() == left


@contextmanager
def collector_off() -> Iterator[None]:
    """Inside the block cycles stay, and only what was made there is seen."""
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def num_tensors() -> int:
    return sum(type(o) in (Tensor, nn.Parameter) for o in gc.get_objects())


# Gradients that are freed


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, NUM_CLASSES)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(F.relu(self.a(x)))))


FREED_WORK = [
    LocalWork(epochs=2, batch_size=8, lr=0.1, momentum=m, weight_decay=w, prox=p)
    for m, w, p in itertools.product((0.0, 0.9), (0.0, 1e-3), (0.0, 0.5))
]


@pytest.mark.parametrize("work", FREED_WORK, ids=lambda w: f"{w.momentum}-{w.weight_decay}-{w.prox}")
def test_freed_gradients_give_the_same_bits(work: LocalWork) -> None:
    tied = Case(ModelSpec.of(Tied), vectors(6))
    jobs = [
        job(tied, blocks=blocks_by_hand(tied.model, tied.problem, ()), work=work),
        job(PRECISE["dropout"], 0, 1, objective=mentor(projection="linear"), projection="linear", work=work),
        *([job(case("resnet10"), 1, 2, coadapted=1, work=work)] if work == FREED_WORK[-1] else []),
    ]
    for j in jobs:
        plain = j.run()
        for recompute in (False, True):
            assert identical(plain.params, j.run(Means(free_gradients=True, recompute=recompute)).params)


def test_a_gradient_is_gone_before_the_next_is_there() -> None:
    j = job(case("vit"))
    step = replace(j.step, means=Means(free_gradients=True))
    with holding(Residents()[j.c.model], step, j.params()) as (runner, trained):
        optimizer = make_optimizer(trained, step, {})
        alive: list[int] = []
        for p in trained.values():
            p.register_post_accumulate_grad_hook(
                lambda _p: alive.append(sum(q.grad is not None for q in trained.values()))
            )
        train_batch(runner, optimizer, j.batch(4), j.c.problem, TaskLoss(), step.means)
    assert set(alive) == {0}
    assert len(alive) == len(trained)


def test_accumulated_gradients_are_not_freed() -> None:
    """They are needed together: the means then change nothing."""
    j = job(PRECISE["tiny"], objective=mentor())
    assert identical(j.run(Means(3)).params, j.run(Means(3, free_gradients=True)).params)


def test_freed_gradients_and_clipping_do_not_go_together() -> None:
    j = job(PRECISE["tiny"], work=replace(WORK, clip_norm=1.0))
    with pytest.raises(ConfigError, match="clip_norm"):
        j.run(Means(free_gradients=True))
    j.run(Means(3, free_gradients=True))  # nothing is applied in backward here


# Approximations


@pytest.mark.parametrize("name", ["resnet10", "residual", "sequential"])
def test_frozen_statistics_stay_and_are_used(name: str) -> None:
    c = case(name)
    for first, coadapted in ((0, 0), (1, 0), (1, 1)):
        j = job(c, first, coadapted=coadapted)
        assert j.step.statistics
        update = j.run(Means(frozen_statistics=True))
        assert update.params.keys() == j.step.trainable
        step, params = replace(j.step, means=Means(frozen_statistics=True)), j.params()
        with seeded(3), holding(Residents()[c.model], step, params) as (runner, _), torch.no_grad():
            logits = runner(j.batch(6), c.problem).logits
        assert identical({n: params[n] for n in step.statistics}, {n: j.params()[n] for n in step.statistics})
        # Each example is normalised by what is known, not by its neighbours; dropout is still on.
        module = c.model.build(0)
        module.load_state_dict({**module.state_dict(), **{n: t for n, t in params.items() if not is_attachment(n)}})
        module.eval()
        for path, child in module.named_modules():
            if isinstance(child, nn.Dropout) and path in j.step.part.active:
                child.train()
        args, kwargs = c.problem.inputs(j.batch(6))
        with seeded(3), torch.no_grad():
            torch.testing.assert_close(logits, c.problem.output(module(*args, **kwargs)))


def test_frozen_statistics_of_a_norm_around_the_start() -> None:
    c = Case(ModelSpec.of(SharedNorm), vectors(8))
    j = job(c, 1, blocks=blocks_by_hand(c.model, c.problem, ("first",)))
    assert j.step.part.straddling == ("", "norm")
    params, step = j.params(), replace(j.step, means=Means(frozen_statistics=True))
    with holding(Residents()[c.model], step, params) as (runner, _):
        one = torch.cat([runner({n: t[i : i + 1] for n, t in j.batch(4).items()}, c.problem).logits for i in range(4)])
        torch.testing.assert_close(one, runner(j.batch(4), c.problem).logits)
    assert int(params["norm.num_batches_tracked"]) == 0


@pytest.mark.parametrize(
    "means", [Means(), Means(4), Means(recompute=True), Means(prefix="cached"), Means(prefix="chunked")], ids=str
)
def test_bfloat16_is_close_over_many_steps(means: Means) -> None:
    """Weights stay in float32, and each step sees those that the last one left."""
    c = Case(ModelSpec.of(tiny, norm="group"), GREY)
    j = job(c, 1 if means.prefix != "resident" else 0, work=replace(WORK, epochs=6))
    plain, half = j.run(means, 40), j.run(replace(means, bfloat16=True), 40)
    assert all(t.dtype == plain.params[n].dtype for n, t in half.params.items())
    assert 1e-6 < j.gap(plain, half) < 0.3
    assert half.metrics["loss"][0] == pytest.approx(plain.metrics["loss"][0], rel=0.02)


def test_bfloat16_of_token_models_with_the_mentor() -> None:
    j = job(case("hf_bert"), 1, 1, objective=mentor())
    update = j.run(Means(3, recompute=True, prefix="cached", bfloat16=True))
    assert all(t.isfinite().all() for t in update.params.values())
    assert not torch.is_autocast_enabled("cpu")
    assert torch.is_autocast_cache_enabled()


# All together


@pytest.mark.parametrize("micro", [None, 3])
@pytest.mark.parametrize(("name", "prefix"), [*(("tiny", m) for m in ["resident", *MODES]), ("gpt2", "cached")])
def test_combinations_of_exact_means(name: str, prefix: Any, micro: int | None) -> None:
    """Whole tasks; the global generators are as before, and what is uploaded is what the task says."""
    j = job(PRECISE[name], 1, 2, coadapted=0, num_blocks=4 if name == "gpt2" else 3, objective=mentor())
    plain, before = j.run(), global_rng()
    for recompute, free in itertools.product((False, True), repeat=2):
        update = j.run(Means(micro, recompute, prefix, free))
        assert j.gap(plain, update) < EXACT
        assert update.params.keys() == j.step.moving
        assert update.receipt.bytes_up == plain.receipt.bytes_up
    assert global_rng() == before


@pytest.mark.parametrize("first", [0, 1, 2])
def test_all_means_at_once_under_batch_norm(first: int) -> None:
    """With running statistics in use nothing couples the samples: all means together are exact once more."""
    j = job(PRECISE["batch norm"], first, objective=mentor())
    plain, before = j.run(Means(frozen_statistics=True)), global_rng()
    update = j.run(Means(3, True, "cached", True, frozen_statistics=True))
    assert j.gap(plain, update) < EXACT
    assert update.params.keys() == j.step.trainable
    assert global_rng() == before


def test_the_generators_are_as_before_when_a_task_fails() -> None:
    j = job(case("hf_bert"), 1)
    before = global_rng()
    for means in (Means(3), Means(recompute=True), Means(prefix="cached"), Means(bfloat16=True)):
        bad = replace(j.c, problem=replace(j.c.problem, num_classes=9))
        with pytest.raises(IndexError):
            replace(j, c=bad).run(means, 20)
        assert global_rng() == before
