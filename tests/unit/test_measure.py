"""The base of a worker: measured, and what a worker really holds."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest

import scalefl.measure
from scalefl.bookkeeping import base_bytes
from scalefl.engines.local import LocalEngine
from scalefl.measure import resident_bytes, warm_worker_bytes, worker_environment
from scalefl.models.spec import ModelSpec
from scalefl.types import ClientTask, Means
from support import PROBLEM, Clients, MadeData, children, full_bytes, make_method, play, spec


def test_the_base_is_what_a_worker_holds_after_its_first_task():
    base, data, before = base_bytes(), MadeData([8]), set(children())
    model = ModelSpec.of("scalefl.models.resnet:resnet10", num_classes=3, in_channels=1, width=0.0625)
    with LocalEngine(data, Clients(data, (10 * full_bytes(model),)), workers=1, cap="measured") as engine:
        play(make_method("fedavg"), engine, 1, model=model)
        (worker,) = set(children()) - before
        assert base == pytest.approx(resident_bytes(worker), rel=0.02)
    assert base_bytes() == base, "measured once"


def test_a_base_that_cannot_be_measured_is_none(monkeypatch):
    monkeypatch.setattr(scalefl.measure.sys, "executable", "/bin/false")
    assert warm_worker_bytes() is None


def test_the_memory_of_a_process():
    assert 20e6 < resident_bytes() < 1e11
    assert resident_bytes(os.getpid()) == pytest.approx(resident_bytes(), rel=0.05)


FAULTS = """
import resource, sys
import torch
from scalefl.measure import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1:] == ["kept"]:
    keep_freed_memory()

def step():
    held = [torch.ones(2**20) for _ in range(6)]  # 24 MiB, as a step's activations

for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(*arguments: str, **environment: str) -> int:
    command = [sys.executable, "-c", FAULTS, *arguments]
    return int(subprocess.run(command, env={**os.environ, **environment}, capture_output=True, check=True).stdout)


def test_memory_that_is_kept_is_not_cleared_again():
    pages = 10 * 24 * 2**20 // 4096
    assert page_faults("kept") < pages / 100
    assert page_faults(**worker_environment(measured=False)) < pages / 100
    assert page_faults(**worker_environment()) > pages / 4, "what is measured gives memory back"


def test_workers_ask_for_huge_pages_beside_what_the_user_has_set(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert worker_environment(measured=False)["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    assert worker_environment(measured=False)["GLIBC_TUNABLES"] == "glibc.malloc.check=0:glibc.malloc.hugetlb=1"
    assert worker_environment()["GLIBC_TUNABLES"] == "glibc.malloc.check=0", "what is measured is as small as can be"


LIGHT = """
import pickle, sys
import torch
from scalefl.client import Residents, run_task
from scalefl.engines.worker import warm_up
warm_up(1)
method, problem, task, examples = pickle.load(sys.stdin.buffer)
for model in ("resnet:resnet18", "cnn:cnn", "vgg:vgg11_bn", "squeezenet:squeezenet", "vit:vit"):
    ModelSpec = type(task.steps[0].part.model)
    ModelSpec.of(f"scalefl.models.{model}").skeleton()
residents = Residents()
for step in task.steps:
    empty = residents[step.part.model].empty(step.part)
    params = {name: torch.ones(t.shape, dtype=t.dtype) for name, t in empty.items()}
    run_task(method, problem, residents, type(task)(0, 0, (step,), 0), params, examples)
loaded = [name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules]
sys.exit(", ".join(loaded) if loaded else 0)
"""


def test_training_does_not_load_torchs_compiler() -> None:
    """It takes some 60 MiB, in every worker: more than many a budget."""
    method = make_method("scalefl", blocks=["0", "1"])
    state = method.init(spec(), PROBLEM, seed=0, smallest_memory_bytes=0)
    plain = method.menu(state)[1].step
    means = (Means(), Means(recompute=True, free_gradients=True), Means(4, True, "streamed"), Means(prefix="cached"))
    steps = tuple(replace(plain, means=m) for m in (*means, Means(frozen_statistics=True), Means(bfloat16=True)))
    content = pickle.dumps((method, PROBLEM, ClientTask(0, 0, steps, 0), MadeData([12]).examples(0)))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", LIGHT]
    done = subprocess.run(command, input=content, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr.decode()
