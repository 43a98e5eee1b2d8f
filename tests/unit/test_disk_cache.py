"""What is kept on disk: the same figures without a trace, and never those of another model or another code."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from models import Case, built_in, images
from scalefl import costs, disk_cache, effects, starting, tracing
from scalefl.caches import forget_models
from scalefl.memory import Cost
from scalefl.mentor import Mentor, MentorLoss
from scalefl.models.spec import ModelSpec
from scalefl.objectives import TaskLoss
from scalefl.steps import full_step
from scalefl.types import LocalWork, Means, Objective

KEPT = 3
"""Of a model: what it does beside its output, where runs can start, and the profile of a step."""

MENTOR = MentorLoss(Mentor(), 1.0, 1.0)
NO_MEANS = Means()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(disk_cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def cost(c: Case, objective: Objective = MENTOR, means: Means = NO_MEANS) -> Cost:
    """As a new process finds it."""
    forget_models()
    step = replace(full_step(c.model, c.problem, LocalWork(batch_size=8)), means=means)
    return costs.step_cost(step, c.problem, objective)


def files(folder: Path) -> set[Path]:
    return set(folder.iterdir()) if folder.exists() else set()


def test_what_is_on_disk_is_not_traced_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c = built_in("cnn", 0.25)
    first = cost(c)
    assert len(files(folder)) == KEPT
    for module, name in ((costs, "profile"), (effects, "_effects"), (starting, "_proven")):
        monkeypatch.setattr(module, name, None)  # cannot be called
    assert cost(c) == first
    with pytest.raises(TypeError):
        cost(c, means=Means(micro_batch_size=4))


def test_nothing_is_kept_where_the_user_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(disk_cache.VARIABLE, "")
    assert disk_cache.folder() is None
    monkeypatch.delenv(disk_cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert disk_cache.folder() == tmp_path / "scalefl"


class Net(nn.Module):
    """Its activation is no module: nothing but what it does tells it from its twin."""

    activation = staticmethod(functional.relu)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.activation(self.b(self.activation(self.a(x)))).mean((2, 3)))


class Twin(Net):
    activation = staticmethod(functional.gelu)


def test_a_model_that_does_something_else_is_another_whatever_its_tensors_are_called(folder: Path) -> None:
    found = [cost(Case(ModelSpec.of(net), images(10))) for net in (Net, Twin)]
    assert len(files(folder)) == 2 * KEPT
    assert found[0] != found[1]


OWN = """
import torch
from torch import nn
from {folder}_helper import scaled

class Double(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return 2 * x

    @staticmethod
    def backward(context, gradient):
        return {backward}

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        return self.head(scaled(Double.apply(self.b(self.a(x).relu()).mean((2, 3)))))
"""


@pytest.mark.parametrize(
    ("backward", "helper"),
    [("gradient + gradient", "def scaled(x): return x"), ("2 * gradient", "def scaled(x): y = x; return y")],
)
def test_a_model_whose_code_has_changed_is_another_though_its_forward_pass_does_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backward: str, helper: str
) -> None:
    """A gradient by hand is no part of a forward pass; nor need a module that it uses show in its operations."""
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for code in (
        ("2 * gradient", "def scaled(x): return x"),
        ("2 * gradient", "def scaled(x): return x"),
        (backward, helper),
    ):
        (tmp_path / "own_net.py").write_text(OWN.format(folder="own_net", backward=code[0]))
        (tmp_path / "own_net_helper.py").write_text(f"{code[1]}\n")
        for name in ("own_net", "own_net_helper"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        found.append(tracing.fingerprint(ModelSpec.of(importlib.import_module("own_net").Net), images(10)))
    assert found[0] is not None
    assert found[0] == found[1] != found[2]


def test_other_code_traces_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c = built_in("cnn", 0.25)
    cost(c)
    monkeypatch.setattr(disk_cache, "_code", lambda: "another version")
    cost(c)
    assert len(files(folder)) == 2 * KEPT


@dataclass(frozen=True)
class OwnLoss(TaskLoss):
    """Its code may change without its name."""


def test_an_objective_of_the_users_own_is_not_kept(folder: Path) -> None:
    cost(built_in("cnn", 0.25), OwnLoss())
    assert len(files(folder)) == KEPT - 1


@pytest.mark.parametrize("content", [b"", b"not a profile", b"0" * 32 + b"{}"])
def test_a_file_that_is_not_whole_is_made_again(folder: Path, content: bytes) -> None:
    c = built_in("cnn", 0.25)
    first = cost(c)
    whole = {path: path.read_bytes() for path in files(folder)}
    for path in whole:
        path.write_bytes(content)
    assert cost(c) == first
    assert {path: path.read_bytes() for path in files(folder)} == whole


def test_a_folder_that_cannot_be_made_costs_nothing_but_time(folder: Path) -> None:
    folder.write_text("a file in its place")
    assert cost(built_in("cnn", 0.25)).peak_bytes > 0
    assert folder.read_text() == "a file in its place"


def test_a_full_disk_costs_nothing_but_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert cost(built_in("cnn", 0.25)).peak_bytes > 0
    assert not files(folder)


def test_fingerprints_are_the_same_in_every_process() -> None:
    """And do not depend on what the process has done before: neither on seeds nor on addresses."""
    c = built_in("resnet10", 0.25)
    found = []
    for seed in (0, 1):
        forget_models()
        torch.manual_seed(seed)
        found.append(tracing.fingerprint(c.model, c.problem))
    assert found[0] is not None
    assert found[0] == found[1]


FRESH = """
from models import built_in
from scalefl import costs
from scalefl.objectives import TaskLoss
from scalefl.blocks import Span, blocks_by_count
from scalefl.steps import span_step
from scalefl.types import LocalWork, Means
c = built_in("resnet10", 0.25)
blocks = blocks_by_count(c.model, c.problem, 3)
for span, tail in ((Span(0, 0), True), (Span(1, 2), False)):
    costs.step_cost(span_step(blocks, span, None, LocalWork(batch_size=8), tail=tail), c.problem, TaskLoss())
"""


def test_what_one_process_keeps_another_finds(folder: Path) -> None:
    """Python orders sets of names anew in every process."""
    kept = []
    for hash_seed in ("1", "2"):
        paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
        about = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": paths}
        subprocess.run([sys.executable, "-c", FRESH], env=about, check=True)
        kept.append(files(folder))
    assert len(kept[0]) == KEPT + 2  # two steps and a prefix
    assert kept[0] == kept[1]
