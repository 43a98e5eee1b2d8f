from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import NUM_CLASSES, Case, case, vectors
from scalefl.blocks import Blocks, Span, blocks_by_count, blocks_by_hand
from scalefl.client import Residents, run_task
from scalefl.methods.fedavg import FedAvg
from scalefl.models.skeleton import tensors
from scalefl.models.spec import ModelSpec
from scalefl.parts import PartRunner, Resident
from scalefl.planner import output_module
from scalefl.rng import seeded
from scalefl.steps import span_step
from scalefl.types import ClientTask, ClientUpdate, LocalWork, Step
from support import copied, identical

WORK = LocalWork(batch_size=4, lr=0.1)

# A cut by hand, and the modules that run after it.
LATE = {
    "resnet10": ("layer2.0", ["layer3", "layer4", "fc"]),
    "squeezenet": ("fires.5", ["fires.6", "fires.7", "classifier"]),
    "residual": ("body.stage1", ["body.stage2", "dropout", "head"]),
    "vit": ("blocks.1", ["blocks.2", "blocks.3", "norm", "classifier"]),
    "tokens": ("layers.0", ["layers.1", "layers.2", "head"]),
    "hf_convnext": (
        "convnext.encoder.stages.1.layers.0",
        ["convnext.encoder.stages.1.layers.1", "convnext.encoder.stages.2", "convnext.layernorm", "classifier"],
    ),
    "hf_bert": (
        "bert.encoder.layer.0",
        ["bert.encoder.layer.1", "bert.encoder.layer.2", "bert.pooler", "dropout", "classifier"],
    ),
    "hf_gpt2": ("transformer.h.0", ["transformer.h.1", "transformer.h.2", "transformer.ln_f", "score"]),
}


def step_of(c: Case, blocks: Blocks, block: int, coadapted_layers: int = 0) -> Step:
    output = output_module(blocks, block, c.problem, WORK, "none")
    return span_step(blocks, Span(block, block), output, WORK, coadapted_layers=coadapted_layers)


def params_of(c: Case, step: Step) -> dict[str, Tensor]:
    own = tensors(c.model.build(0))
    params = {name: own[name].clone() for name in step.part.held}
    return params | (step.part.output.initial(0) if step.part.output else {})


def train(c: Case, step: Step, params: dict[str, Tensor], num_examples: int = 8) -> ClientUpdate:
    """One task; it changes `params` in place."""
    task = ClientTask(client_id=0, round=0, steps=(step,), seed=3)
    return run_task(FedAvg(work=WORK), c.problem, Residents(), task, params, c.batch(num_examples))


def mean_loss(c: Case, runner: PartRunner, batch: dict[str, Tensor]) -> Tensor:
    loss, weight = c.problem.loss(runner(batch, c.problem).logits, batch)
    return loss / weight


# The step


@pytest.mark.parametrize("name", LATE)
def test_the_last_block_gets_the_full_models_gradients(name: str) -> None:
    """Those of the user's own model with its prefix frozen and in eval mode, and the same running statistics."""
    c, (cut, later) = case(name), LATE[name]
    step = step_of(c, blocks_by_hand(c.model, c.problem, (cut,)), 1)
    batch, params = c.batch(4), params_of(c, step)
    with Resident(c.model).holding(step.part, params, step.trainable, step.moving) as (runner, trained), seeded(7):
        mean_loss(c, runner, batch).backward()
    gradients = {n: p.grad for n, p in trained.items()}

    module = c.model.build(0).eval()
    for path in later:
        module.get_submodule(path).train()
    module.training = True  # a model with functional dropout looks here
    for n, p in module.named_parameters():
        p.requires_grad_(n in step.trainable)
    args, kwargs = c.problem.inputs(batch)
    with seeded(7):
        F.cross_entropy(c.problem.output(module(*args, **kwargs)), batch["label"]).backward()
    assert step.trainable
    # Everything after the cut trains, and only that.
    inside = {n for n, _ in module.named_parameters() if n.startswith(tuple(f"{path}." for path in later))}
    assert inside <= step.trainable
    assert {n for n, p in module.named_parameters() if p.grad is not None} == set(gradients)
    assert all(torch.equal(gradients[n], p.grad) for n, p in module.named_parameters() if p.grad is not None)
    assert identical({n: params[n] for n, _ in module.named_buffers()}, dict(module.named_buffers()))


@pytest.mark.parametrize("coadapted", [0, 1])
@pytest.mark.parametrize("block", range(3))
@pytest.mark.parametrize("name", ["resnet10", "residual", "tokens", "owner", "hf_bert", "hf_gpt2"])
def test_only_what_should_move_moves(name: str, block: int, coadapted: int) -> None:
    """After a task everything else has its bits; what moves is what was trained, and its norms' statistics."""
    c = case(name)
    step = step_of(c, blocks_by_count(c.model, c.problem, 3), block, coadapted)
    params = params_of(c, step)
    before = copied(params)
    update = train(c, step, params)
    still = params.keys() - step.moving
    assert identical({n: params[n] for n in still}, {n: before[n] for n in still})
    assert set(update.params) == step.moving
    assert {n for n in step.trainable if torch.equal(params[n], before[n])} <= without_gradient(c)
    assert all(update.params[n].data_ptr() == params[n].data_ptr() for n in step.moving)
    statistics = step.moving - step.trainable
    assert all(not torch.equal(params[n], before[n]) for n in statistics)
    assert update.metrics["loss"][1] == 8
    assert all(torch.isfinite(t).all() for t in update.params.values())


def without_gradient(c: Case) -> set[str]:
    """Parameters whose gradient is zero whatever the data: softmax does not see a key's bias."""
    return {n for n in tensors(c.model.skeleton()) if n.endswith("key.bias")}


def test_a_frozen_batch_norm_keeps_its_statistics() -> None:
    c = case("resnet10")
    blocks = blocks_by_hand(c.model, c.problem, ("layer1.0", "layer3.0"))
    step = step_of(c, blocks, 1)
    params = params_of(c, step)
    before = copied(params)
    train(c, step, params)
    moved = {n.rpartition(".")[0] for n, t in params.items() if "running" in n and not torch.equal(t, before[n])}
    assert moved == {
        f"{block}.{unit}.norm" for block in ("layer2.0", "layer3.0") for unit in ("first", "second", "shortcut")
    }
    assert all(params[f"{norm}.num_batches_tracked"] == 2 for norm in moved)
    assert params["stem.norm.num_batches_tracked"] == 0


def test_the_modes_of_norms_while_a_stage_trains() -> None:
    c = case("residual")
    step = step_of(c, blocks_by_hand(c.model, c.problem, ("body.stage1",)), 1)
    resident = Resident(c.model)
    with resident.holding(step.part, params_of(c, step), step.trainable, step.moving):
        norms = {p: m.training for p, m in resident._module.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert {p for p, training in norms.items() if training} == {p for p in norms if p.startswith("body.stage2")}


def test_the_users_frozen_parameters_stay() -> None:
    c = case("partly_frozen")
    step = step_of(c, blocks_by_hand(c.model, c.problem, ()), 0)
    params = params_of(c, step)
    before = copied(params)
    train(c, step, params)
    assert {n for n in params if not torch.equal(params[n], before[n])} == {"second.weight", "head.weight", "head.bias"}


# Memory


@contextmanager
def saved_bytes() -> Iterator[dict[int, int]]:
    """Bytes that autograd keeps for backward, by storage."""
    kept: dict[int, int] = {}
    hold = []

    def pack(t: Tensor) -> Tensor:
        hold.append(t)  # kept alive, so that no address is given twice
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield kept


def kept_by(c: Case, step: Step, border: str | None) -> tuple[int, int]:
    """Bytes that a step's forward saves, in all and before the module `border` has run; weights not counted."""
    params, resident = params_of(c, step), Resident(c.model)
    weights = {t.untyped_storage().data_ptr() for t in params.values()}
    early = []
    with resident.holding(step.part, params, step.trainable, step.moving) as (runner, _), saved_bytes() as kept:
        if border is not None:
            module = resident._module.get_submodule(border)
            handle = module.register_forward_hook(lambda *_: early.append(sum(kept.values())))
        runner(c.batch(8), c.problem)
        if border is not None:
            handle.remove()
    return sum(size for place, size in kept.items() if place not in weights), sum(early)


@pytest.mark.parametrize("name", LATE)
def test_a_frozen_prefix_keeps_nothing(name: str) -> None:
    c, (cut, _) = case(name), LATE[name]
    full = step_of(c, blocks_by_hand(c.model, c.problem, ()), 0)
    stage = step_of(c, blocks_by_hand(c.model, c.problem, (cut,)), 1)
    in_full, early_in_full = kept_by(c, full, cut)
    in_stage, early_in_stage = kept_by(c, stage, cut)
    assert early_in_stage == 0
    assert early_in_full > 0
    assert in_stage <= in_full - early_in_full / 2


def test_a_late_stage_keeps_a_fraction() -> None:
    c = case("resnet18")
    full, _ = kept_by(c, step_of(c, blocks_by_hand(c.model, c.problem, ()), 0), None)
    last = step_of(c, blocks_by_hand(c.model, c.problem, ("layer1.1", "layer2.1", "layer3.1")), 3)
    kept, early = kept_by(c, last, "layer3.1")
    assert early == 0
    assert kept < 0.1 * full


def test_coadaptation_keeps_its_own_layers_only() -> None:
    c = case("resnet18")
    blocks = blocks_by_hand(c.model, c.problem, ("layer1.1", "layer2.1", "layer3.1"))
    plain, _ = kept_by(c, step_of(c, blocks, 3), "layer3.1")
    one, before = kept_by(c, step_of(c, blocks, 3, coadapted_layers=1), "layer3.0")
    assert before == 0
    assert plain < one < 3 * plain


# Co-adaptation


@pytest.mark.parametrize(
    ("name", "cut", "count", "layers"),
    [
        ("resnet10", "layer1.0", 1, ["layer1.0.second.conv", "layer1.0.second.norm"]),
        ("resnet10", "layer1.0", 2, [f"layer1.0.{u}.{m}" for u in ("first", "second") for m in ("conv", "norm")]),
        # As many as the block before has.
        ("cnn", "conv1", 5, ["conv1.conv"]),
        ("residual", "body.stage1", 1, ["body.stage1.1.conv3", "body.stage1.1.bn3"]),
        # Here the shortcut's own convolution runs last.
        ("residual", "body.stage2.0", 1, ["body.stage2.0.shortcut.0", "body.stage2.0.shortcut.1"]),
        (
            "hf_bert",
            "bert.encoder.layer.0",
            1,
            ["bert.encoder.layer.0.output.dense", "bert.encoder.layer.0.output.LayerNorm"],
        ),
        ("hf_gpt2", "transformer.h.0", 1, ["transformer.h.0.mlp.c_proj"]),
        ("vit", "blocks.0", 2, ["blocks.0.mlp.0", "blocks.0.mlp.2"]),
    ],
)
def test_coadaptation_trains_the_named_layers(name: str, cut: str, count: int, layers: list[str]) -> None:
    c = case(name)
    blocks = blocks_by_hand(c.model, c.problem, (cut,))
    own, step = step_of(c, blocks, 1).trainable, step_of(c, blocks, 1, coadapted_layers=count)
    assert step.trainable - own == {n for n in parameters_of(c) if n.rpartition(".")[0] in layers}
    assert own < step.trainable
    params = params_of(c, step)
    resident = Resident(c.model)
    with resident.holding(step.part, params, step.trainable, step.moving) as (runner, trained):
        active = {p for p, m in resident._module.named_modules() if m.training}
        mean_loss(c, runner, c.batch(4)).backward()
        assert all(trained[n].grad.abs().sum() > 0 for n in step.trainable - own)
    assert set(layers) <= active


def test_a_container_coadapts_only_what_its_block_holds() -> None:
    """`body` owns a token of the first block and a gain of the last."""
    c = case("owner")
    blocks = blocks_by_hand(c.model, c.problem, ("body.first", "body.second"))
    step = step_of(c, blocks, 1, coadapted_layers=9)
    assert step.moving <= set(step.part.names())
    assert "body.token" in step.trainable
    assert "body.gain" not in step.trainable
    train(c, step, params_of(c, step))


def test_the_first_block_has_nothing_to_coadapt() -> None:
    c = case("resnet10")
    blocks = blocks_by_count(c.model, c.problem, 3)
    assert step_of(c, blocks, 0, coadapted_layers=2) == step_of(c, blocks, 0)


# The tail


@pytest.mark.parametrize("name", ["vit", "hf_bert", "residual", "resnet10"])
@pytest.mark.parametrize("block", [0, 1])
def test_a_span_with_its_tail_moves_as_it_moves_when_the_whole_model_trains(name: str, block: int) -> None:
    """In its first step, from the model's own loss: alone, or with the head along."""
    c = plain(name)
    blocks = blocks_by_count(c.model, c.problem, 3)
    whole = span_step(blocks, blocks.whole, None, WORK)
    head = blocks.trainable_of(blocks.head)
    assert span_step(blocks, Span(block, block), None, WORK, tail=True).trainable == blocks.trainable(
        Span(block, block)
    )
    tail = span_step(blocks, Span(block, block), None, WORK, tail=True, along=blocks.head)
    assert tail.trainable == blocks.trainable(Span(block, block)) | head and not head <= blocks.trainable(
        Span(block, block)
    )
    everything, own = params_of(c, whole), params_of(c, tail)
    before = copied(own)
    moved, expected = train(c, tail, own, 4).params, train(c, whole, everything, 4).params
    assert set(moved) == tail.moving
    for n in tail.trainable:
        assert torch.allclose(moved[n], expected[n], rtol=1e-4, atol=1e-6)
    assert all(not torch.equal(moved[n], before[n]) for n in head)
    assert all(torch.equal(own[n], before[n]) for n in own.keys() - tail.moving)


def plain(name: str) -> Case:
    """Without what differs between what trains and what is frozen: dropout, and norms with statistics."""
    found = case(name)
    return replace(found, model=ModelSpec.of(without_noise, name=name))


def without_noise(name: str) -> nn.Module:
    module = case(name).model.build(0)
    for path, child in list(module.named_modules()):
        if isinstance(child, nn.Dropout):
            child.p = 0.0
        if isinstance(child, nn.BatchNorm2d):
            parent, _, attribute = path.rpartition(".")
            setattr(module.get_submodule(parent), attribute, nn.GroupNorm(1, child.num_features))
    return module


def test_a_frozen_tail_keeps_its_statistics() -> None:
    c = case("resnet10")
    blocks = blocks_by_count(c.model, c.problem, 3)
    step = span_step(blocks, Span(0, 0), None, WORK, tail=True)
    units = blocks.units(Span(0, 0))
    assert step.statistics and {blocks.partition.unit_of[n] for n in step.statistics} <= set(units)
    params = params_of(c, step)
    before = copied(params)
    train(c, step, params)
    assert {n for n in params if not torch.equal(params[n], before[n])} == step.moving


def test_the_last_block_has_no_tail() -> None:
    c = case("resnet10")
    blocks = blocks_by_count(c.model, c.problem, 3)
    last = Span(2, 2)
    assert span_step(blocks, last, None, WORK, tail=True) == span_step(blocks, last, None, WORK)


# Dropout


def twice(c: Case, step: Step, border: str, params: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The tensor at the border and the logits, of two runs of one step."""
    seen: list[Tensor] = []
    resident = Resident(c.model)
    with seeded(5), resident.holding(step.part, params, step.trainable, step.moving) as (runner, _):
        module = resident._module.get_submodule(border)
        handle = module.register_forward_hook(lambda _m, _i, out: seen.append(out.detach().clone()))
        logits = [runner(c.batch(4), c.problem).logits.detach() for _ in range(2)]
        handle.remove()
    return seen, logits


@pytest.mark.parametrize(
    ("name", "border"),
    [("hf_bert", "bert.encoder.layer.0"), ("hf_gpt2", "transformer.h.0"), ("tokens", "layers.0")],
)
def test_dropout_is_off_in_the_prefix_and_on_in_the_span(name: str, border: str) -> None:
    c = case(name)
    blocks = blocks_by_hand(c.model, c.problem, (border,))
    step = step_of(c, blocks, 1)
    seen, logits = twice(c, step, border, params_of(c, step))
    assert torch.equal(*seen)
    assert not torch.equal(*logits)
    # In the first block it is on.
    first = step_of(c, blocks, 0)
    _, logits = twice(c, first, border, params_of(c, first))
    assert not torch.equal(*logits)


class SharedDropout(nn.Module):
    """One dropout module, and the model's own functional dropout, after every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, NUM_CLASSES)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.dropout(self.first(x)), 0.5, self.training)
        x = F.dropout(self.dropout(self.second(x)), 0.5, self.training)
        return self.head(x)


def test_a_dropout_that_runs_on_both_sides_is_off_in_the_prefix() -> None:
    c = Case(ModelSpec.of(SharedDropout), vectors(6))
    blocks = blocks_by_hand(c.model, c.problem, ("first", "second"))
    step = step_of(c, blocks, 2)
    seen, logits = twice(c, step, "second", params_of(c, step))
    assert torch.equal(*seen)
    assert not torch.equal(*logits)


# Taps


def test_taps_of_images() -> None:
    c = case("resnet10")
    blocks = blocks_by_count(c.model, c.problem, 2)
    batch = c.batch(3)
    for block in range(2):
        step = step_of(c, blocks, block)
        with Resident(c.model).holding(step.part, params_of(c, step), step.trainable, step.moving) as (runner, _):
            taps = runner(batch, c.problem)
        assert torch.equal(taps.x, batch["image"])
        assert not taps.x.requires_grad
        assert taps.z.shape[1:] == step.part.feature.shape
        assert taps.z.requires_grad
        assert taps.logits.shape == (3, NUM_CLASSES)
        late = step.part.output.targets[-1] if block == 0 else taps.z.shape[1:]
        assert taps.late.shape[1:] == late
    assert step.part.stop is None
    assert step.part.feature.module == "layer4.0"


def test_taps_of_tokens() -> None:
    """Token ids carry no gradient: the first embedding's output stands for them."""
    c = case("hf_bert")
    step = step_of(c, blocks_by_count(c.model, c.problem, 2), 1)
    params, batch = params_of(c, step), c.batch(3)
    with Resident(c.model).holding(step.part, params, step.trainable, step.moving) as (runner, _):
        taps = runner(batch, c.problem)
    wanted = F.embedding(batch["input_ids"], params["bert.embeddings.word_embeddings.weight"])
    assert torch.equal(taps.x, wanted)
    assert not taps.x.requires_grad


def test_features_are_copies() -> None:
    """A later in-place activation must not change what was noted at a cut."""
    c = case("residual")
    blocks = blocks_by_hand(c.model, c.problem, ("body.stage1.0.bn1",))
    part = replace(blocks.part(blocks.whole, None), active=())
    params = dict(tensors(c.model.build(0)))
    with Resident(c.model).holding(part, params) as (runner, _), torch.no_grad():
        _, (features,) = runner.features(c.batch(2), c.problem, blocks.partition.cuts)
    assert (features < 0).any()


# The resident skeleton


def parameters_of(c: Case) -> set[str]:
    return {n for n, _ in c.model.skeleton().named_parameters()}


def hooks_of(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def is_empty(resident: Resident) -> bool:
    modules = [resident._module, *(module for module, _ in resident._outputs.values())]
    return all(t.is_meta and t.grad is None for m in modules for t in (*m.parameters(), *m.buffers()))


@pytest.mark.parametrize("name", ["residual", "tokens", "hf_bert"])
def test_the_skeleton_is_empty_after_use(name: str) -> None:
    c = case(name)
    step = step_of(c, blocks_by_count(c.model, c.problem, 2), 0)
    resident, params = Resident(c.model), params_of(c, step)
    hooks = hooks_of(resident._module)
    assert is_empty(resident)
    with resident.holding(step.part, params, step.trainable, step.moving) as (runner, _):
        assert not is_empty(resident)
        assert hooks_of(resident._module) == hooks
        mean_loss(c, runner, c.batch(4)).backward()
    assert is_empty(resident)
    assert hooks_of(resident._module) == hooks


def test_the_skeleton_is_empty_after_errors() -> None:
    c = case("hf_bert")
    step = step_of(c, blocks_by_count(c.model, c.problem, 2), 0)
    resident, params = Resident(c.model), params_of(c, step)
    with pytest.raises(ZeroDivisionError), resident.holding(step.part, params, step.trainable, step.moving):
        raise ZeroDivisionError
    assert is_empty(resident)
    assert hooks_of(resident._module) == 0
    batch = c.batch(4)
    batch["input_ids"] += 1000  # outside the vocabulary: the model itself fails, half-way
    with (
        pytest.raises(IndexError),
        resident.holding(step.part, params, step.trainable, step.moving) as (runner, _),
    ):
        runner(batch, c.problem)
    assert is_empty(resident)
    assert hooks_of(resident._module) == 0
    with pytest.raises(KeyError), resident.holding(step.part, dict(list(params.items())[1:])):
        pass
    assert is_empty(resident)
    # And it serves the next task as if nothing had been.
    with resident.holding(step.part, params, step.trainable, step.moving) as (runner, _):
        assert runner(c.batch(4), c.problem).logits.isfinite().all()


def test_one_skeleton_serves_all_parts_in_turn() -> None:
    c = case("residual")
    blocks = blocks_by_count(c.model, c.problem, 3)
    shared = Resident(c.model)
    batch = c.batch(3)
    for block in (2, 0, 1, 0, 2):
        step = step_of(c, blocks, block)
        params = params_of(c, step)
        logits = []
        for resident in (shared, Resident(c.model)):
            with seeded(1), resident.holding(step.part, copied(params), step.trainable, step.moving) as (runner, _):
                logits.append(runner(batch, c.problem).logits.detach())
        assert torch.equal(*logits)


def test_tensors_are_laid_on_without_a_copy() -> None:
    c = case("resnet10")
    step = step_of(c, blocks_by_count(c.model, c.problem, 3), 1)
    resident, params = Resident(c.model), params_of(c, step)
    with resident.holding(step.part, params, step.trainable, step.moving) as (_, trained):
        laid = tensors(resident._module)
        assert {n for n, t in laid.items() if not t.is_meta} == set(step.part.held)
        shared = {n for n in step.part.held if laid[n].data_ptr() == params[n].data_ptr()}
        # But for buffers that are not to move: a user's forward may change them.
        assert shared == set(step.part.held) & {n for n in params if n in step.moving or n in parameters_of(c)}
        assert set(trained) == step.trainable
        assert all(p.requires_grad and p.data_ptr() == params[n].data_ptr() for n, p in trained.items())


@pytest.mark.parametrize("name", ["resnet10", "hf_gpt2", "tokens"])
def test_empty_says_what_a_part_needs(name: str) -> None:
    c = case(name)
    step = step_of(c, blocks_by_count(c.model, c.problem, 3), 1)
    empty, params = Resident(c.model).empty(step.part), params_of(c, step)
    assert {n: (t.shape, t.dtype) for n, t in empty.items()} == {n: (t.shape, t.dtype) for n, t in params.items()}
    assert set(empty) == set(step.part.names())
    assert all(t.is_meta for t in empty.values())
