from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import (
    CASES,
    NUM_CLASSES,
    Bottleneck,
    Branching,
    Case,
    Coupled,
    Dense,
    Frozen,
    FrozenHead,
    LooksAtItsWeights,
    Residual,
    Tied,
    TwoTensors,
    TwoTowers,
    case,
    hf_gpt2,
    images,
    sequential,
    tokens,
    vectors,
)
from scalefl.blocks import Span, blocks_by_count, blocks_by_hand, blocks_from_ends
from scalefl.costs import step_cost
from scalefl.errors import ModelDoesNotRun, UncuttableModel
from scalefl.models.output import OutputSpec
from scalefl.models.resnet import BasicBlock
from scalefl.models.skeleton import tensors
from scalefl.models.spec import ModelSpec
from scalefl.models.stand_ins import floating
from scalefl.models.vit import Block
from scalefl.objectives import TaskLoss
from scalefl.partition import Cut, Partition, partition
from scalefl.parts import Part, Resident
from scalefl.planner import output_module
from scalefl.problem import Classification, Column
from scalefl.steps import full_step, span_step
from scalefl.torch_private import FakeTensorMode
from scalefl.tracing import output_shape
from scalefl.types import LocalWork

IDS = Classification(NUM_CLASSES, (Column("input_ids", (6,), "int64"),))
ALL = pytest.mark.parametrize("name", CASES)


def cut_names(found: Partition) -> list[str]:
    return [cut.module for cut in found.cuts]


def bare(cut: Cut) -> OutputSpec:
    return OutputSpec(cut.module, cut.shape, (), NUM_CLASSES)


def built(c: Case) -> nn.Module:
    return c.model.build(0).eval()


@contextlib.contextmanager
def hooked(module: nn.Module, path: str, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.get_submodule(path).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def outputs_at(c: Case, module: nn.Module, cut: Cut, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The tensor at the cut and the logits of the full model."""
    seen = []

    def note(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.append(floating(output)[cut.position].detach().clone())

    args, kwargs = c.problem.inputs(batch)
    with hooked(module, cut.module, note), torch.no_grad():
        logits = c.problem.output(module(*args, **kwargs))
    return seen[0], logits


def swapped(output: Any, position: int, value: Tensor) -> Any:
    """The output with one of its floating-point tensors replaced."""
    if isinstance(output, Tensor):
        return value
    if isinstance(output, tuple):
        return tuple(value if i == position else item for i, item in enumerate(output))
    name = [key for key, item in output.items() if floating(item)][position]
    return dataclasses.replace(output, **{name: value})


@ALL
def test_nothing_but_the_cut_tensor_carries_the_input(name: str) -> None:
    """With its tensor at a cut taken from another batch, a model answers as it does for that other batch."""
    c = case(name)
    module = built(c)
    batch, other = c.batch(3, seed=0), c.batch(3, seed=1)
    other = {key: batch[key] if key == "attention_mask" else column for key, column in other.items()}
    for cut in partition(c.model, c.problem).cuts:
        _, own = outputs_at(c, module, cut, batch)
        tensor, wanted = outputs_at(c, module, cut, other)

        def swap(_module: nn.Module, _args: Any, output: Any, cut: Cut = cut, tensor: Tensor = tensor) -> Any:
            return swapped(output, cut.position, tensor.clone())

        args, kwargs = c.problem.inputs(batch)
        with hooked(module, cut.module, swap), torch.no_grad():
            logits = c.problem.output(module(*args, **kwargs))
        assert torch.equal(logits, wanted), cut.module
        assert not torch.equal(logits, own), cut.module


@ALL
def test_a_part_alone_gives_the_full_models_tensor(name: str) -> None:
    """Bit for bit, on a fresh skeleton that holds no tensor of a later part."""
    c = case(name)
    module = built(c)
    own, batch = tensors(module), c.batch(3)
    found = partition(c.model, c.problem)
    blocks = blocks_from_ends(c.model, c.problem, tuple(range(found.num_units)))
    for unit, cut in enumerate(found.cuts):
        wanted, _ = outputs_at(c, module, cut, batch)
        part = replace(blocks.part(Span(unit, unit), bare(cut)), active=())
        assert len(part.held) < len(own)
        resident = Resident(c.model)
        params = {n: own[n] for n in part.held} | part.output.initial(0)
        with resident.holding(part, params) as (runner, trained), torch.no_grad():
            taps = runner(batch, c.problem)
            laid = {n for n, t in tensors(resident._module).items() if not t.is_meta}
        assert laid == set(part.held)
        assert trained == {}
        assert torch.equal(taps.z, wanted), cut.module
        assert taps.z.shape == (3, *cut.shape)


@ALL
def test_the_whole_model_as_one_part(name: str) -> None:
    c = case(name)
    module, batch = built(c), c.batch(3)
    blocks = blocks_by_hand(c.model, c.problem, ())
    part = replace(blocks.part(blocks.whole, None), active=())
    args, kwargs = c.problem.inputs(batch)
    with torch.no_grad():
        wanted = c.problem.output(module(*args, **kwargs))
        with Resident(c.model).holding(part, tensors(module)) as (runner, _):
            assert torch.equal(runner(batch, c.problem).logits, wanted)
            cuts = partition(c.model, c.problem).cuts
            x, features = runner.features(batch, c.problem, cuts)
    assert [f.shape for f in features] == [(3, *cut.shape) for cut in cuts]
    assert all(torch.equal(f, outputs_at(c, module, cut, batch)[0]) for f, cut in zip(features, cuts, strict=True))
    assert x.is_floating_point()
    assert len(x) == 3


@ALL
def test_every_tensor_is_in_one_unit_and_every_unit_trains(name: str) -> None:
    c = case(name)
    found = partition(c.model, c.problem)
    assert set(found.unit_of) == set(tensors(c.model.skeleton()))
    assert set(found.unit_of.values()) <= set(range(found.num_units))
    trained = {found.unit_of[n] for n in found.parameters}
    starts = [0, *(end + 1 for end in found.block_ends[:-1])]
    assert all(trained & set(range(a, b + 1)) for a, b in zip(starts, found.block_ends, strict=True))
    assert found.block_ends[-1] == found.num_units - 1


@ALL
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_blocks_share_out_the_units(name: str, count: int) -> None:
    c = case(name)
    found = partition(c.model, c.problem)
    blocks = blocks_by_count(c.model, c.problem, count)
    count = min(count, len(found.block_ends))  # so many as there are to train
    spans = [Span(i, i) for i in range(len(blocks))]
    assert len(blocks) == count
    assert [u for span in spans for u in blocks.units(span)] == list(range(found.num_units))
    trainable = [blocks.trainable(span) for span in spans]
    assert sum(map(len, trainable)) == len(found.parameters)
    assert frozenset().union(*trainable) == found.parameters == blocks.trainable(blocks.whole)
    assert all(trainable)
    # A block's span needs what its prefix needs, and the last one needs everything.
    held = [set(blocks.held(span)) for span in spans]
    assert all(a < b for a, b in itertools.pairwise(held))
    assert held[-1] == set(found.unit_of)
    assert all(t <= h for t, h in zip(trainable, held, strict=True))
    # An inner cut of the model ends one block and no other.
    ends = [blocks.cut(i) for i in range(count)]
    assert ends[-1] is None
    assert len(set(ends)) == count


UNITS = {
    "resnet10": BasicBlock,
    "resnet18": BasicBlock,
    "resnet34": BasicBlock,
    "vit": Block,
    "residual": Bottleneck,
    "hf_vit": "ViTLayer",
    "hf_convnext": "ConvNextLayer",
    "hf_bert": "BertAttention",
    "hf_gpt2": "GPT2Block",
}


@pytest.mark.parametrize("name", UNITS)
def test_residual_units_stay_whole(name: str) -> None:
    c = case(name)
    wanted = UNITS[name]
    found = partition(c.model, c.problem)
    units = {
        path: module
        for path, module in c.model.skeleton().named_modules()
        if (type(module).__name__ if isinstance(wanted, str) else type(module)) == wanted
    }
    assert units
    assert [cut for cut in cut_names(found) if any(cut.startswith(f"{path}.") for path in units)] == []
    for path in units:
        inside = {found.unit_of[n] for n in found.unit_of if n.startswith(f"{path}.")}
        assert len(inside) == 1, path


@pytest.mark.parametrize(
    ("name", "cuts"),
    [
        ("cnn", ["conv1", "conv2", "hidden"]),
        ("resnet10", ["stem", "layer1.0", "layer2.0", "layer3.0", "layer4.0"]),
        ("vgg11_bn", [f"features.{i}" for i in range(8)]),
        ("squeezenet", ["stem", *(f"fires.{i}{at}" for i in range(8) for at in (".squeeze", ""))]),
        ("vit", ["patches", "blocks.0", "blocks.1", "blocks.2", "norm"]),
        # In eval mode dropout returns its input, so that it is no place of its own.
        ("sequential", ["3", "8", "10"]),
        ("residual", ["body.stem", "body.stage1.0", "body.stage1", "body.stage2.0", "dropout"]),
        ("branching", ["first", "second"]),
        ("looks_at_its_weights", ["first", "second"]),
        ("two_inputs", ["joined", "second"]),
        ("owner", ["body.first", "body.second", "body"]),
        ("tokens", ["embed", *(f"layers.{i}{at}" for i in range(3) for at in (".norm1", ""))]),
        ("hf_vit", ["vit.embeddings", "vit.layers.0", "vit.layers.1", "vit"]),
        ("hf_gpt2", ["transformer.drop", "transformer.h.0", "transformer.h.1", "transformer.ln_f"]),
    ],
)
def test_where_the_cuts_are(name: str, cuts: list[str]) -> None:
    c = case(name)
    assert cut_names(partition(c.model, c.problem)) == cuts


def test_bert_and_convnext_are_cut_between_their_layers() -> None:
    bert = cut_names(partition(case("hf_bert").model, case("hf_bert").problem))
    layers = [f"bert.encoder.layer.{i}" for i in range(3)]
    assert {"bert.embeddings", *layers[:2], "bert.encoder", *(f"{p}.attention" for p in layers)} <= set(bert)
    convnext = partition(case("hf_convnext").model, case("hf_convnext").problem)
    assert convnext.num_units == 8
    assert "convnext.encoder.stages.1.layers.0" in cut_names(convnext)


@pytest.mark.parametrize("name", ["resnet10", "squeezenet", "sequential", "hf_convnext"])
def test_shapes_after_a_unit_are_those_of_the_run(name: str) -> None:
    c = case(name)
    found = partition(c.model, c.problem)
    batch, module = c.batch(2), built(c)
    for unit, cut in enumerate(found.cuts):
        tensor, _ = outputs_at(c, module, cut, batch)
        assert tuple(tensor.shape[1:]) == cut.shape
        assert [s for where, s in found.path if where == unit][-1] == cut.shape
        assert found.shapes_after(unit) == [s for where, s in found.path if where > unit]


@pytest.mark.parametrize(
    ("name", "feature"),
    [("resnet10", "layer4.0"), ("vit", "norm"), ("cnn", "hidden"), ("frozen_head", "second"), ("hf_vit", "vit")],
)
def test_the_last_feature_is_before_the_head(name: str, feature: str) -> None:
    found = partition(case(name).model, case(name).problem)
    assert found.feature is not None
    assert found.feature.module == feature


# Kinds of models


def test_token_ids_start_at_the_first_embedding() -> None:
    assert partition(case("hf_bert").model, tokens()).source == "bert.embeddings.word_embeddings"
    assert partition(case("hf_gpt2").model, tokens()).source == "transformer.wte"
    assert partition(case("hf_vit").model, images()).source is None


def test_control_flow_that_depends_on_data_is_probed_for_real() -> None:
    with FakeTensorMode():
        module = Branching()
        with pytest.raises(Exception, match="_local_scalar_dense"):
            module(torch.zeros(2, 6))
    c = case("branching")
    blocks = blocks_by_count(c.model, c.problem, 3)
    work = LocalWork(batch_size=4)
    for block in range(3):
        output = output_module(blocks, block, c.problem, work, "none")
        assert step_cost(span_step(blocks, Span(block, block), output, work), c.problem, TaskLoss()).peak_bytes > 0


def test_a_factory_that_reads_its_weights_still_has_a_skeleton() -> None:
    with pytest.raises(RuntimeError), torch.device("meta"):
        LooksAtItsWeights()
    assert all(t.is_meta for t in tensors(case("looks_at_its_weights").model.skeleton()).values())


def test_buffers_that_no_state_holds_are_sent() -> None:
    found = partition(case("tokens").model, images())
    assert "wave" not in case("tokens").model.skeleton().state_dict()
    assert found.unit_of["wave"] == 0
    bert = partition(case("hf_bert").model, tokens())
    assert bert.unit_of["bert.embeddings.position_ids"] == 0


def test_parameters_of_containers() -> None:
    found = partition(case("tokens").model, images())
    assert found.unit_of["embed.weight"] == 0
    assert found.unit_of["class_token"] == found.unit_of["positions"] == 1
    assert found.unit_of["gain"] == found.unit_of["head.weight"] == found.num_units - 1
    owner = partition(case("owner").model, vectors(6)).unit_of
    assert [owner[f"body.{n}"] for n in ("token", "table.gain", "gain")] == [0, 1, 2]
    assert owner["body.table.shift"] <= 1


def test_the_users_frozen_parameters_do_not_train() -> None:
    found = partition(case("partly_frozen").model, vectors(6))
    assert found.parameters == {"second.weight", "head.weight", "head.bias"}
    assert set(found.unit_of) > {"first.weight", "first.bias", "second.bias"}
    # A block of the user's frozen layers alone would have nothing to train.
    assert cut_names(found) == ["first", "second"]
    assert found.block_ends == (1, 2)
    head = partition(ModelSpec.of(FrozenHead), vectors(6))
    assert cut_names(head) == ["first", "second"]
    assert head.block_ends == (0, 2)


def test_a_backbone_without_a_gradient_is_held_from_the_start() -> None:
    found = partition(ModelSpec.of(Frozen), vectors(6), ("first",))
    assert found.unit_of["backbone.weight"] == 0
    assert found.unit_of["second.weight"] == 1


def test_output_shape() -> None:
    assert output_shape(ModelSpec.of(sequential), images(num_classes=2)) == (NUM_CLASSES,)
    assert output_shape(ModelSpec.of(hf_gpt2), tokens()) == (NUM_CLASSES,)


def test_a_module_instead_of_a_factory() -> None:
    spec = ModelSpec.of(Residual())
    assert cut_names(partition(spec, images())) == cut_names(partition(case("residual").model, images()))


def test_finding_cuts_leaves_no_trace() -> None:
    """The user's module keeps its mode, its flags and its hooks, and the generator its state."""
    module = sequential().train()
    module[0].requires_grad_(False)
    before = torch.random.get_rng_state()
    partition(ModelSpec.of(module), images())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert module.training
    assert [p.requires_grad for p in module[0].parameters()] == [False, False]
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in module.modules())
    assert all(p.grad is None for p in module.parameters())


def test_the_probe_costs_no_memory() -> None:
    """On fake tensors: a model of 4 TiB is cut, and its training costed."""
    wide, problem = ModelSpec.of(wide_model), vectors(6)
    assert cut_names(partition(wide, problem)) == ["1", "2"]
    assert step_cost(full_step(wide, problem, LocalWork(batch_size=4)), problem, TaskLoss()).peak_bytes > 2**43


@pytest.mark.parametrize("name", sorted(set(CASES) - {"branching", "looks_at_its_weights", "plain_tensor"}))
def test_a_model_is_cut_without_being_built(name: str) -> None:
    made = Makes(case(name).model)
    spec = ModelSpec.of(made)
    assert cut_names(partition(spec, case(name).problem)) == cut_names(partition(case(name).model, case(name).problem))
    assert made.devices == {"meta"}


class Makes:
    """A factory that remembers the devices on which it has built its model."""

    def __init__(self, model: ModelSpec) -> None:
        self.model, self.devices = model, set()

    def __call__(self) -> nn.Module:
        module = self.model.make()
        self.devices |= {p.device.type for p in module.parameters()}
        return module


def wide_model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 2**20), nn.ReLU(), nn.Linear(2**20, 2**20), nn.Linear(2**20, NUM_CLASSES))


# What cannot be cut


@pytest.mark.parametrize("model", [Dense, TwoTensors])
def test_no_place_to_cut(model: type[nn.Module]) -> None:
    with pytest.raises(UncuttableModel, match=r"carries everything forward.*by hand, as module paths: blocks = \["):
        partition(ModelSpec.of(model), vectors(6))


def test_tied_weights_are_refused_by_name() -> None:
    with pytest.raises(UncuttableModel, match=r"parameter embedding\.weight .*both sides.*untie.*by hand"):
        partition(ModelSpec.of(Tied), IDS)
    # By hand it is the user's word: the weight belongs to the block that needs it first.
    by_hand = partition(ModelSpec.of(Tied), IDS, ("first",))
    assert by_hand.unit_of["embedding.weight"] == 0


def test_a_model_that_does_not_take_the_data(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModelDoesNotRun, match=r"Dense does not run on an example batch.*7.*6"):
        partition(ModelSpec.of(Dense), vectors(7))
    assert capfd.readouterr().err == ""


def test_a_constant_model() -> None:
    with pytest.raises(ModelDoesNotRun, match="does not depend on its input"):
        partition(ModelSpec.of(Constant), vectors(6))


class Constant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x), NUM_CLASSES)


def test_one_layer_is_one_unit() -> None:
    """Nothing to cut is no reason to speak of skip connections."""
    with pytest.raises(UncuttableModel, match="skip") as raised:
        partition(ModelSpec.of(Dense), vectors(6))
    with pytest.raises(UncuttableModel) as alone:
        partition(ModelSpec.of(nn.Linear, in_features=6, out_features=NUM_CLASSES), vectors(6))
    assert str(alone.value) != str(raised.value)


# By hand


def test_cuts_by_hand() -> None:
    spec = case("residual").model
    found = partition(spec, images(), ("body.stage1", "body.stem"))
    assert cut_names(found) == ["body.stem", "body.stage1"]
    assert {n.split(".")[1] for n, unit in found.unit_of.items() if unit == 1} == {"stage1"}
    assert partition(spec, images(), ()).num_units == 1


@pytest.mark.parametrize("model", [Dense, TwoTensors, Residual, TwoTowers])
def test_a_cut_by_hand_may_lie_where_no_single_tensor_flows(model: type[nn.Module]) -> None:
    """What leads to the module's output is the first block; the rest is the second, and both train."""
    path = {
        Dense: "layers.1",
        TwoTensors: "layers.1.left",
        Residual: "body.stage1.0.conv2",
        TwoTowers: "left",
    }[model]
    problem = images() if model is Residual else vectors(6)
    spec = ModelSpec.of(model)
    blocks = blocks_by_hand(spec, problem, (path,))
    c = Case(spec, problem)
    module, batch = built(c), c.batch(3)
    cut = blocks.cut(0)
    assert cut is not None
    wanted, logits = outputs_at(c, module, cut, batch)
    part = replace(blocks.part(Span(0, 0), bare(cut)), active=())
    params = {n: tensors(module)[n] for n in part.held} | part.output.initial(0)
    with Resident(spec).holding(part, params) as (runner, _), torch.no_grad():
        assert torch.equal(runner(batch, problem).z, wanted)
    last = replace(blocks.part(Span(1, 1), None), active=())
    with Resident(spec).holding(last, tensors(module)) as (runner, _), torch.no_grad():
        assert torch.equal(runner(batch, problem).logits, logits)
    assert blocks.trainable(Span(0, 0)) | blocks.trainable(Span(1, 1)) == blocks.partition.parameters
    assert not blocks.trainable(Span(0, 0)) & blocks.trainable(Span(1, 1))


@pytest.mark.parametrize(
    ("model", "paths", "message"),
    [
        (Residual, ("body.stage1.0.conv4",), r"'body\.stage1\.0\.conv4' names no module.*did you mean.*conv"),
        (Residual, ("body.stage1.0.relu",), r"'body\.stage1\.0\.relu' runs 3 times"),
        (Residual, ("head",), r"'head' is the model's own output"),
        (Residual, ("body",), r"'body' names no module that runs"),
        (Residual, ("body.stem", "body.stem"), "twice"),
        (TwoTensors, ("layers.1",), r"'layers\.1' runs once and returns \[5, 6\], \[5, 6\] with a gradient"),
        # Its tensor is that of body.stem, but when it runs the unit's own weights have been used.
        (Residual, ("body.stage1.0.shortcut",), r"'body\.stage1\.0\.shortcut' .*'body\.stage1\.0\.conv1'"),
        (TwoTowers, ("right",), r"'right' .*'left'"),
        # Nothing would train between them, or after.
        (Residual, ("body.stage1", "body.stage1.1"), r"'body\.stage1(\.1)?' .*'body\.stage1(\.1)?'"),
        (FrozenHead, ("first", "head"), r"'head'"),
    ],
)
def test_bad_cuts_by_hand(model: type[nn.Module], paths: tuple[str, ...], message: str) -> None:
    problem = images() if model is Residual else vectors(6)
    with pytest.raises(UncuttableModel) as raised:
        partition(ModelSpec.of(model), problem, paths)
    assert re.search(message, str(raised.value)), str(raised.value)


def test_two_branches_can_each_end_a_block() -> None:
    found = partition(ModelSpec.of(TwoTowers), vectors(6), ("left", "right"))
    assert [found.unit_of[f"{n}.weight"] for n in ("trunk", "left", "right", "head")] == [0, 0, 1, 2]


def test_coupled_is_what_it_says() -> None:
    assert len(Coupled()(torch.zeros(1, 6), torch.zeros(1, 6))) == 2


def test_part_is_hashable() -> None:
    """Steps are keys of the cost cache."""
    blocks = blocks_by_count(case("resnet10").model, images(), 2)
    part: Part = blocks.part(Span(0, 0), None)
    assert hash(part) == hash(blocks.part(Span(0, 0), None))
