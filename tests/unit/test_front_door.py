"""Models and losses as people bring them, through `run()`: trained right, or refused before the first round."""

from __future__ import annotations

import importlib
import json
import logging
import math
import random
import sys
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scalefl.config import make_config
from scalefl.data import Dataset
from scalefl.errors import ConfigError, DataError, EmptyCohort
from scalefl.experiment import Experiment
from scalefl.models.spec import ModelSpec
from scalefl.problem import Classification, Column
from scalefl.run_folder import RunFolder
from scalefl.runner import run
from scalefl.sampling import UniformSampler
from scalefl.types import ClientInfo, ServerState

K = 4


def images(problem: Classification | None = None, count: int = 96, peak: float = 0.0) -> Dataset:
    """Gray 8×8 images, one quarter of which is bright, by class; `peak` is one pixel of the last training image."""
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(count) % K
    x = torch.randn(count, 1, 8, 8, generator=draw) * 0.5
    for k in range(K):
        row, column = divmod(k, 2)
        x[y == k, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1.5
    cut = count * 3 // 4
    x[:cut, 0, 0, 0] += peak
    rows = {"image": x, "label": y}
    problem = problem or Classification(K, (Column("image", (1, 8, 8), "float32"),))
    return Dataset(problem, {n: t[:cut] for n, t in rows.items()}, {n: t[cut:] for n, t in rows.items()})


def peaked_images() -> Dataset:
    return images(peak=1000.0)


def tokens(vocabulary: int = 20, count: int = 96, wrong: int | None = None) -> Dataset:
    """Token ids, most of them from a fifth of the vocabulary, by class; `wrong` is one id in the training data."""
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(count) % K
    own = torch.randint(0, vocabulary // K, (count, 8), generator=draw) + vocabulary // K * y[:, None]
    ids = torch.where(
        torch.rand(count, 8, generator=draw) < 0.8, own, torch.randint(0, vocabulary, own.shape, generator=draw)
    )
    if wrong is not None:
        ids[17, 5] = wrong
    cut = count * 3 // 4
    rows = {"ids": ids, "label": y}
    problem = Classification(K, (Column("ids", (8,), "int64"),))
    return Dataset(problem, {n: t[:cut] for n, t in rows.items()}, {n: t[cut:] for n, t in rows.items()})


def config(model: str, method: str = "fedavg", data: str = "images", memory: tuple[str, ...] = ("50%", "200%"), **more):
    classes = [
        {
            "name": f"class {i}",
            "share": 1 / len(memory),
            "memory": text,
            "flops_per_second": 1e9,
            "bandwidth_bytes_per_second": 1e6,
        }
        for i, text in enumerate(memory)
    ]
    settings = {"population": "all"} if method == "fedavg" else {}
    plain = {
        "model": f"test_front_door:{model}" if ":" not in model else model,
        "rounds": 2,
        "clients_per_round": 4,
        "data": {
            "source": {"name": f"test_front_door:{data}", "arguments": more.pop("arguments", {})},
            "clients": 4,
            "validation": 0.2,
        },
        "devices": {"classes": classes},
        "method": {"name": method, **settings, **more.pop("settings", {})},
        "work": {"batch_size": 8, "lr": 0.05, **more.pop("work", {})},
        "engine": {"workers": 0, "threads": 1, "clients_at_once": 1, **more.pop("engine", {})},
        "evaluation": {"plane_samples": 12, "plane_cuts": 2},
    }
    return make_config({**plain, **more})


def trained(folder, *args, **more) -> dict[str, Tensor]:
    """The tensors of the model after a run."""
    run(config(*args, **more), folder)
    return tensors_of(folder)


def tensors_of(folder) -> dict[str, Tensor]:
    state = load_file(RunFolder(folder).state)
    return {name.removeprefix("params/"): t for name, t in state.items() if name.startswith("params/")}


def rungs(folder) -> set[str]:
    return {rung for line in RunFolder(folder).read_journal() if line["round"] for rung in line["rungs"]}


class Net(nn.Module):
    """Two convolutions and a head; what is in the middle, and how the middle is run, differ from test to test."""

    def __init__(self, middle: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.middle = middle or nn.Identity()
        self.head = nn.Linear(6 * 4, K)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.middle(self.a(x))), 2)
        return self.head(F.max_pool2d(torch.relu(self.b(x)), 2).flatten(1))


# What a forward pass writes


class OwnNorm(nn.Module):
    """`nn.BatchNorm2d` written by hand; `assigns` its buffers instead of writing into them."""

    def __init__(self, channels: int, assigns: bool) -> None:
        super().__init__()
        self.assigns = assigns
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.mean, self.var
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
            with torch.no_grad():
                unbiased = x.var((0, 2, 3))
                if self.assigns:
                    self.mean, self.var = 0.9 * self.mean + 0.1 * mean, 0.9 * self.var + 0.1 * unbiased
                else:
                    self.mean.mul_(0.9).add_(mean, alpha=0.1)
                    self.var.data.mul_(0.9).add_(unbiased, alpha=0.1)
        x = (x - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + 1e-5).sqrt()
        return x * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


def torchs_norm() -> nn.Module:
    return Net(nn.BatchNorm2d(6))


def written_norm() -> nn.Module:
    return Net(OwnNorm(6, assigns=False))


def assigned_norm() -> nn.Module:
    return Net(OwnNorm(6, assigns=True))


@pytest.mark.parametrize("model", ["written_norm", "assigned_norm"])
@pytest.mark.parametrize("method", ["fedavg", "scalefl"])
def test_statistics_of_a_norm_written_by_hand_move_as_those_of_torch(tmp_path, model, method):
    ours = trained(tmp_path / "ours", model, method)
    torchs = trained(tmp_path / "torchs", "torchs_norm", method)
    assert torchs["middle.running_mean"].abs().max() > 0.01
    assert torch.allclose(ours["middle.mean"], torchs["middle.running_mean"], atol=1e-4)
    assert torch.allclose(ours["middle.var"], torchs["middle.running_var"], atol=1e-4)
    assert torch.allclose(ours["a.weight"], torchs["a.weight"], atol=1e-4)


def test_clients_at_once_keep_what_a_norm_assigns(tmp_path):
    one = trained(tmp_path / "one", "assigned_norm", memory=("200%",))
    all_ = trained(tmp_path / "all", "assigned_norm", memory=("200%",), engine={"clients_at_once": 4})
    assert torch.allclose(one["middle.mean"], all_["middle.mean"], atol=1e-5)
    assert one["middle.mean"].abs().max() > 0.01


class Counter(nn.Module):
    """Counts its batches, and says by a boolean whether it ever trained."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("trained", torch.zeros(2, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
            self.trained[0] = True
        return x


def counting() -> nn.Module:
    return Net(Counter())


def test_a_counter_goes_on_over_rounds(tmp_path):
    state = trained(tmp_path / "run", "counting", memory=("200%",))
    sizes = [14, 14, 14, 15]  # 57 of 72 training rows on 4 clients: two batches of 8 each
    assert all(math.ceil(size / 8) == 2 for size in sizes)
    assert state["middle.steps"] == 2 * 2
    assert state["middle.trained"].tolist() == [True, False]


class WritesFrozen(nn.Module):
    """A codebook as they are written: a parameter without a gradient, moved through `.data`."""

    def __init__(self, in_evaluation: bool) -> None:
        super().__init__()
        self.in_evaluation = in_evaluation
        self.book = nn.Parameter(torch.ones(6), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.in_evaluation:
            self.book.data.mul_(0.5)
        return x + self.book.detach().view(1, -1, 1, 1)


def codebook() -> nn.Module:
    return Net(WritesFrozen(in_evaluation=False))


def spoiling() -> nn.Module:
    return Net(WritesFrozen(in_evaluation=True))


def test_a_frozen_tensor_that_forward_writes_moves_by_average(tmp_path):
    state = trained(tmp_path / "run", "codebook", memory=("200%",))
    assert torch.equal(state["middle.book"], torch.full((6,), 0.5**4))  # two rounds of two batches, for all clients


@pytest.mark.parametrize("method", ["fedavg", "scalefl"])
@pytest.mark.parametrize("model", ["codebook", "spoiling"])
def test_writes_into_frozen_tensors_reach_nobody_else(tmp_path, model, method):
    here = trained(tmp_path / "here", model, method)
    beside = trained(tmp_path / "beside", model, method, engine={"workers": 2})
    assert here.keys() == beside.keys()
    assert all(torch.equal(here[name], beside[name]) for name in here)


class WritesSeldom(nn.Module):
    """Writes for data that random examples do not show."""

    def __init__(self, buffer: bool) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(6))
        self.book = nn.Parameter(torch.ones(6), requires_grad=False)
        self.buffer = buffer

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.detach().abs().max() > 50:
            (self.seen if self.buffer else self.book.detach()).add_(1)
        return x + self.book.view(1, -1, 1, 1)


def seldom_frozen() -> nn.Module:
    return Net(WritesSeldom(buffer=False))


def seldom_buffer() -> nn.Module:
    return Net(WritesSeldom(buffer=True))


@pytest.mark.parametrize(("model", "name"), [("seldom_frozen", "middle.book"), ("seldom_buffer", "middle.seen")])
def test_writes_that_only_real_data_shows_are_refused_before_the_first_round(tmp_path, model, name):
    with pytest.raises(ConfigError, match=rf"forward writes into {name}"):
        run(config(model, data="peaked_images"), tmp_path / "run")
    assert not RunFolder(tmp_path / "run").journal.exists()


class Growing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.queue = torch.cat([self.queue, x.detach().mean((1, 2, 3))])
        return x


def growing() -> nn.Module:
    return Net(Growing())


class SparseBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("graph", torch.eye(6).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sparse.sum(self.graph) * 0


def sparse_buffer() -> nn.Module:
    return Net(SparseBuffer())


class Merging(nn.Module):
    """Merges its adapter in eval mode, as some libraries do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.adapter, self.merged = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(6)), False

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += -self.adapter.data if mode else self.adapter.data
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.weight if self.merged else self.weight + self.adapter).view(1, -1, 1, 1)


def merging() -> nn.Module:
    return Net(Merging())


def lazy() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, K))


def all_frozen() -> nn.Module:
    return Net().requires_grad_(False)


class Auxiliary(Net):
    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        said = super().forward(x)
        return (said, said) if self.training else said


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("growing", r"forward makes middle.queue from torch.float32 \[0\] to torch.float32 \[\d+\]"),
        ("sparse_buffer", r"middle.graph is a sparse tensor .*\.to_dense\(\)"),
        ("merging", r"the model.s eval\(\) changes middle.weight"),
        ("lazy", r"1.weight has no shape yet \(a lazy module\): run the model once"),
        ("all_frozen", r"every parameter of the model is frozen"),
        ("Auxiliary", r"while training, the model returned a tuple of 2: .* `output`"),
    ],
)
@pytest.mark.parametrize("method", ["fedavg", "scalefl"])
def test_what_cannot_be_trained_is_refused_by_name(tmp_path, model, words, method):
    with pytest.raises(ConfigError, match=words):
        run(config(model, method), tmp_path / "run")


class KeepsNormFrozen(Net):
    """The usual way to freeze a pretrained norm."""

    def __init__(self) -> None:
        super().__init__(nn.BatchNorm2d(6))
        self.middle.running_mean.fill_(0.3)

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.middle.eval()
        return self


@pytest.mark.parametrize("method", ["fedavg", "scalefl", "scalefl-paper"])
def test_a_norm_that_train_leaves_in_eval_mode_stays_there(tmp_path, method):
    state = trained(tmp_path / "run", "KeepsNormFrozen", method)
    assert torch.equal(state["middle.running_mean"], torch.full((6,), 0.3))
    assert state["middle.num_batches_tracked"] == 0
    assert not torch.equal(state["middle.weight"], torch.ones(6))


# What a forward pass does with its input, and with itself


class WritesInput(Net):
    def forward(self, x: Tensor) -> Tensor:
        x -= 0.5
        x *= 2
        return super().forward(x)


class ComputesInput(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x - 0.5) * 2)


@pytest.mark.parametrize("method", ["fedavg", "scalefl"])
def test_writing_into_the_input_is_as_good_as_computing_from_it(tmp_path, method):
    settings = {"means": "micro-batches"}  # their first pass, too, is to see the data as they are
    written = trained(tmp_path / "written", "WritesInput", method, settings=settings, work={"epochs": 2})
    computed = trained(tmp_path / "computed", "ComputesInput", method, settings=settings, work={"epochs": 2})
    assert all(torch.equal(written[name], computed[name]) for name in computed)
    summaries = [json.loads((tmp_path / n / "summary.json").read_text()) for n in ("written", "computed")]
    assert summaries[0]["test"] == summaries[1]["test"]


class Checkpointed(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.middle(self.a(x))), 2)
        x = checkpoint(lambda t: torch.relu(self.b(t)), x, use_reentrant=False)
        return self.head(F.max_pool2d(x, 2).flatten(1))


def test_a_model_that_recomputes_itself_gives_the_same_numbers(tmp_path):
    plain, own = (trained(tmp_path / model, model) for model in ("Net", "Checkpointed"))
    assert all(torch.equal(plain[name], own[name]) for name in plain)
    by_blocks = trained(tmp_path / "blocks", "Checkpointed", "scalefl")
    assert not torch.equal(by_blocks["b.weight"], own["b.weight"])


class RandomDepth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(64, 8), nn.Linear(8, K)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x.flatten(1)))
        for layer in self.layers:
            if not self.training or random.random() < 0.5:
                x = x + torch.relu(layer(x))
        return self.head(x)


class Routed(RandomDepth):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x.flatten(1)))
        x = self.layers[0](x) if x[0, 0] > x[0, 1] else self.layers[1](x)
        return self.head(torch.relu(self.layers[2](x)))


@pytest.mark.parametrize("model", ["RandomDepth", "Routed"])
def test_a_model_of_which_chance_or_data_decide_what_runs_trains_whole(tmp_path, caplog, model):
    with caplog.at_level(logging.WARNING, "scalefl"):
        run(config(model, "scalefl", memory=("200%",)), tmp_path / "run")
    assert rungs(tmp_path / "run") == {"full"}
    assert "can't be cut, and trains as one block: whether 'layers" in caplog.text


def test_fewer_units_than_blocks_are_so_many_blocks_and_a_note(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "scalefl"):
        run(config("Net", "scalefl", settings={"blocks": 7}), tmp_path / "run")
    assert "has 3 units: it is cut into 3 blocks, not 7" in caplog.text


class ReturnsDict(Net):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"features": x, "logits": super().forward(x)}


class Spectral(nn.Module):
    """Complex weights, as in neural operators."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.w = nn.Parameter(torch.randn(6, 8, 5, dtype=torch.cfloat, generator=draw) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.fft.irfft2(torch.fft.rfft2(x) * self.w, s=x.shape[-2:])


def spectral() -> nn.Module:
    return Net(Spectral())


def test_complex_weights_are_averaged_in_both_parts(tmp_path):
    here = trained(tmp_path / "here", "spectral", "scalefl")
    beside = trained(tmp_path / "beside", "spectral", "scalefl", engine={"workers": 2})
    start = Spectral().w.detach()
    assert (here["middle.w"] - start).imag.abs().max() > 1e-4
    assert (here["middle.w"] - start).real.abs().max() > 1e-4
    assert all(torch.equal(here[name], beside[name]) for name in here)


def test_operators_of_unknown_cost_are_named(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "scalefl"):
        run(config("spectral"), tmp_path / "run")
    assert "FLOPs leave out aten::_fft" in caplog.text
    lines = [line for line in RunFolder(tmp_path / "run").read_journal() if line["round"]]
    assert all("aten::_fft_r2c" in line["uncounted_operators"] for line in lines)
    plan = json.loads(RunFolder(tmp_path / "run").plan.read_text())
    assert "aten::_fft_r2c" in plan["full"]["uncounted_operators"]


def test_a_dict_with_logits_is_a_prediction(tmp_path):
    plain, in_dict = (trained(tmp_path / model, model, "scalefl") for model in ("Net", "ReturnsDict"))
    assert all(torch.equal(plain[name], in_dict[name]) for name in plain)


# What trains


def head_alone() -> nn.Module:
    model = Net(nn.BatchNorm2d(6)).requires_grad_(False)
    model.head.requires_grad_(True)
    return model


def first_half_frozen() -> nn.Module:
    model = Net()
    model.a.requires_grad_(False)
    return model


@pytest.mark.parametrize("method", ["fedavg", "scalefl", "scalefl-paper", "sbt", "fedepth", "depthfl", "profl"])
@pytest.mark.parametrize(
    ("model", "frozen"), [("head_alone", ("a.", "b.", "middle.w")), ("first_half_frozen", ("a.",))]
)
def test_what_is_frozen_keeps_its_bits_and_all_clients_train_the_rest(tmp_path, model, frozen, method):
    made = config(model, method, settings={"means": "auto"}, memory=("130%", "200%"))
    start = Experiment(made).initial_state().params
    run(made, tmp_path / "run")
    state = tensors_of(tmp_path / "run")
    names = [name for name in start if name.endswith(("weight", "bias")) and "@" not in name]
    moved = {name for name in names if not torch.equal(state[name], start[name])}
    assert moved
    assert not any(name.startswith(frozen) for name in moved)
    lines = [line for line in RunFolder(tmp_path / "run").read_journal() if line["round"]]
    assert {client for line in lines for ids in line["rungs"].values() for client in ids} == {0, 1, 2, 3}
    assert all(line["bytes_up"] < sum(t.nbytes for t in state.values()) * 4 for line in lines)


def test_a_frozen_backbone_is_streamed_and_costs_no_gradient(tmp_path):
    experiment = Experiment(config("head_alone", "scalefl"))
    (offer,) = experiment.method.menu(experiment.initial_state())
    assert {name.rpartition(".")[0] for name in offer.trained} == {"head"}
    plan = experiment.plan().to_json()
    assert plan["full"]["gradients_bytes"] < 2 * 4 * (6 * 4 * K + K)
    assert plan["full"]["optimizer_bytes"] == 4 * (6 * 4 * K + K)


# Losses


@dataclass(frozen=True)
class ByClass(Classification):
    """Cross-entropy with class weights: a weighted mean."""

    weights: tuple[float, ...] = ()
    as_tensor: bool = False

    def loss(self, output, batch):
        w = torch.tensor(self.weights)[batch["label"]]
        loss = (F.cross_entropy(output, batch["label"], reduction="none") * w).sum()
        return loss, w.sum() if self.as_tensor else float(w.sum())


def weighted(scale: float, as_tensor: bool = False) -> Dataset:
    columns = (Column("image", (1, 8, 8), "float32"),)
    return images(ByClass(K, columns, weights=tuple(scale * w for w in (1, 2, 2, 5)), as_tensor=as_tensor))


@pytest.mark.parametrize("method", ["fedavg", "scalefl", "depthfl"])
def test_a_common_factor_of_class_weights_does_not_matter(tmp_path, method):
    settings = {} if method == "depthfl" else {"means": "micro-batches"}
    found = {}
    for scale in (1.0, 0.001):
        made = config("Net", method, data="weighted", arguments={"scale": scale}, settings=settings, work={"lr": 0.1})
        found[scale] = run(made, tmp_path / f"{scale}")["test"]
    assert found[1.0]["loss"] == pytest.approx(found[0.001]["loss"], rel=1e-3)
    assert found[1.0]["accuracy"] == found[0.001]["accuracy"]
    assert found[1.0]["loss"] < 0.95 * math.log(K)


def test_weights_may_be_tensors_and_are_predicted_without_real_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("scalefl.costs._cost_for_real", lambda *_: pytest.fail("it was run for real"))
    losses = []
    for at_once in (1, 4):
        made = config(
            "Net", data="weighted", arguments={"scale": 1.0, "as_tensor": True}, engine={"clients_at_once": at_once}
        )
        losses.append(run(made, tmp_path / f"{at_once}")["test"]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@dataclass(frozen=True)
class Contrastive(Classification):
    """Every example is compared with all others of its batch."""

    def loss(self, output, batch):
        z = F.normalize(output, dim=1)
        s = z @ z.T / 0.2 - torch.eye(len(z)) * 1e9
        same = (batch["label"][:, None] == batch["label"]) & ~torch.eye(len(z), dtype=torch.bool)
        return -(s.log_softmax(1) * same).sum(1).div(same.sum(1).clamp(min=1)).sum(), len(z)

    def metrics(self, output, batch):
        return {"loss": self.loss(output, batch)}


def contrastive() -> Dataset:
    return images(Contrastive(K, (Column("image", (1, 8, 8), "float32"),)))


def test_a_loss_that_compares_examples_keeps_whole_batches(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "scalefl"):
        run(config("Net", "scalefl", data="contrastive", memory=("90%", "200%")), tmp_path / "run")
    assert "compares the examples of a batch" in caplog.text
    assert not any("micro-batch" in rung for rung in rungs(tmp_path / "run"))


class OwnContrastive:
    """A problem of its own, without a word on coupling."""

    def __init__(self, inner: Contrastive) -> None:
        self.inner = inner

    def __getattr__(self, name):
        if name == "couples_examples":
            raise AttributeError(name)
        return getattr(self.inner, name)


def own_contrastive() -> Dataset:
    data = contrastive()
    return Dataset(OwnContrastive(data.problem), data.train, data.test)


def test_a_problem_that_cannot_say_that_its_loss_couples_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"is no sum over examples.*couples_examples = True"):
        Experiment(config("Net", data="own_contrastive"))


@dataclass(frozen=True)
class Broken(Classification):
    def loss(self, output, batch):
        return F.cross_entropy(output, batch["label"].float(), reduction="sum"), len(output)


def broken() -> Dataset:
    return images(Broken(K, (Column("image", (1, 8, 8), "float32"),)))


def test_a_loss_that_fails_is_told_with_its_cause(tmp_path):
    with pytest.raises(ConfigError, match=r"and its loss do not run on .* examples of the data: "):
        run(config("Net", data="broken"), tmp_path / "run")


# Tokens, and outputs for each of them


class Recurrent(nn.Module):
    def __init__(self, state: bool = False) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(20, 8), nn.LSTM(8, 12, batch_first=True)
        self.state, self.head = state, nn.Linear(12, K)

    def forward(self, ids: Tensor) -> Tensor:
        out, (h, _) = self.lstm(self.embed(ids))
        return self.head(h[-1] if self.state else out.mean(1))


def by_state() -> nn.Module:
    return Recurrent(state=True)


@pytest.mark.parametrize("model", ["Recurrent", "by_state"])
@pytest.mark.parametrize("method", ["fedavg", "scalefl"])
def test_recurrent_layers_on_tokens_learn(tmp_path, model, method):
    made = config(
        model, method, data="tokens", rounds=12, work={"lr": 0.5}, settings={"blocks": 2} if method == "scalefl" else {}
    )
    assert run(made, tmp_path / "run")["test"]["accuracy"] > 0.6


def sparse_embedding() -> nn.Module:
    return nn.Sequential(nn.EmbeddingBag(20, 8, sparse=True), nn.Linear(8, K))


class Embeds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(20, 8, sparse=True), nn.Linear(8, K)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.bag(ids))


def test_sparse_gradients_of_embeddings_train(tmp_path):
    made = config("Embeds", "scalefl", data="tokens", rounds=6, work={"lr": 0.5})
    assert run(made, tmp_path / "run")["test"]["accuracy"] > 0.6


def out_of_vocabulary() -> Dataset:
    return tokens(wrong=20)


def test_a_token_without_an_embedding_is_named(tmp_path):
    with pytest.raises(
        DataError, match=r"column 'ids': .* row \d+ holds 20 at position 5; .* has 20 rows, for ids from 0 to 19"
    ):
        run(config("Recurrent", data="out_of_vocabulary"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@dataclass(frozen=True)
class EachToken(Classification):
    """The label of the example, told at each token."""

    def loss(self, output, batch):
        labels = batch[self.label][:, None].expand(-1, output.shape[1])
        return F.cross_entropy(output.mT, labels, reduction="sum"), labels.numel()

    def metrics(self, output, batch):
        right = output.argmax(-1) == batch[self.label][:, None]
        return {"loss": self.loss(output, batch), "accuracy": (right.sum(), right.numel())}


def each_token() -> Dataset:
    data = tokens()
    return Dataset(EachToken(K, data.problem.columns), data.train, data.test)


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.one, self.two = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, K)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.relu(self.two(torch.relu(self.one(self.embed(ids))))))


def test_outputs_for_each_token_train_with_tails(tmp_path):
    made = config("Tagger", "scalefl", data="each_token", rounds=12, work={"lr": 0.5})
    assert run(made, tmp_path / "run")["test"]["accuracy"] > 0.6


@pytest.mark.parametrize("method", ["scalefl-paper", "fedepth", "depthfl", "profl"])
def test_outputs_for_each_token_are_refused_where_output_modules_stand_in(tmp_path, method):
    with pytest.raises(ConfigError, match=r"returns \[B, 8, 4\], and an output module \[B, K\]"):
        run(config("Tagger", method, data="each_token"), tmp_path / "run")


# What it costs, and why nobody can pay


def test_an_lstm_is_predicted_and_counted():
    experiment = Experiment(config("Recurrent", data="tokens"))
    flops = experiment.full_cost.flops_per_example
    forward = 2 * 8 * 4 * 12 * (8 + 12) + 2 * 12 * K
    assert 2.9 * forward < flops < 3.1 * forward


class Attends(nn.Module):
    """Each token looks at the others of its example: tokens [B, 8] -> [B, K]."""

    def __init__(self):
        super().__init__()
        self.embed, self.qkv, self.head = nn.Embedding(20, 8), nn.Linear(8, 24), nn.Linear(8, K)

    def forward(self, ids):
        q, k, v = self.qkv(self.embed(ids)).unsqueeze(1).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v).squeeze(1).mean(1))


def test_attention_is_counted():
    """Two products forward; backward five, as the scores are made again."""
    cost = Experiment(config("Attends", data="tokens")).full_cost
    product, linear = 2 * 8 * 8 * 8, 2 * 8 * 8 * 24 + 2 * 8 * K
    assert cost.unknown == ()
    assert cost.flops_per_example == 7 * product + 3 * linear


def test_a_gate_that_caps_have_closed_says_so():
    @dataclass(frozen=True)
    class Four:
        smallest_memory_bytes: int = 1
        largest_memory_bytes: int = 40 * 2**20

        def __len__(self):
            return 4

        def __getitem__(self, i):
            return ClientInfo(i, 10, 7 * 2**20)

    state = ServerState(ModelSpec.of(Net), None, {}, 3, 0, tightened=dict.fromkeys(range(4), 7 * 2**20))
    with pytest.raises(EmptyCohort, match=r"4 of 4 clients with data have hit their memory caps"):
        UniformSampler(2)(Four(), 8 * 2**20, state)


# Notebooks


def test_a_model_that_was_edited_and_reloaded_is_planned_anew(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    text = "from torch import nn\ndef make():\n    return nn.Sequential(nn.Conv2d(1, 4, 3, stride={}), nn.ReLU(), "
    text += "nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))\n"
    peaks = []
    for stride in (4, 1):
        (tmp_path / "edited_model.py").write_text(text.format(stride))
        importlib.invalidate_caches()
        importlib.reload(importlib.import_module("edited_model"))
        peaks.append(Experiment(config("edited_model:make")).full_cost.peak_bytes)
    sys.modules.pop("edited_model")
    assert peaks[1] > 2 * peaks[0]
