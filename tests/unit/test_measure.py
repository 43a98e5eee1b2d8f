"""The base of a worker: measured, and what a worker really holds."""

from __future__ import annotations

import os

import pytest

import scalefl.measure
from scalefl.engines.local import LocalEngine
from scalefl.measure import base_bytes, resident_bytes
from scalefl.models.spec import ModelSpec
from support import Clients, MadeData, children, full_bytes, make_method, play


def test_the_base_is_what_a_worker_holds_after_its_first_task():
    base, data, before = base_bytes(), MadeData([8]), set(children())
    model = ModelSpec.of("scalefl.models.resnet:resnet10", num_classes=3, in_channels=1, width=0.0625)
    with LocalEngine(data, Clients(data, (10 * full_bytes(model),)), workers=1) as engine:
        play(make_method("fedavg"), engine, 1, model=model)
        (worker,) = set(children()) - before
        assert base == pytest.approx(resident_bytes(worker), rel=0.02)
    assert base_bytes() == base, "measured once"


def test_a_base_that_cannot_be_measured_is_none(monkeypatch):
    monkeypatch.setattr(scalefl.measure.sys, "executable", "/bin/false")
    assert base_bytes.__wrapped__() is None


def test_the_memory_of_a_process():
    assert 20e6 < resident_bytes() < 1e11
    assert resident_bytes(os.getpid()) == pytest.approx(resident_bytes(), rel=0.05)
