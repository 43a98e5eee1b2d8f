"""The nHSIC plane: its values, its baseline, and what they were measured on."""

from __future__ import annotations

import statistics

import pytest
import torch

import support
from scalefl.client import Residents
from scalefl.evaluate import EVALUATION_BATCH, PERMUTATIONS, evaluate, evaluate_groups, nhsic_plane
from scalefl.hsic import nhsic
from scalefl.models.skeleton import tensors
from scalefl.partition import partition
from scalefl.parts import PartRunner
from scalefl.problem import take


def plane(num_samples: int, seed: int = 0) -> list[dict[str, float | str]]:
    model, probe = support.spec(), support.examples_of(3, num_samples)
    cuts = partition(model, support.PROBLEM).cuts
    return nhsic_plane(
        Residents(), model, tensors(model.build(0)), support.PROBLEM, probe, cuts, source=None, seed=seed
    )


@pytest.mark.parametrize("num_samples", [20, 150])  # one slice of the probe, and two
def test_points_are_nhsic_of_the_features(num_samples):
    probe, model = support.examples_of(3, num_samples), support.spec().build(0).eval()
    y = torch.nn.functional.one_hot(probe["label"], support.NUM_CLASSES).float()
    points = plane(num_samples)
    assert [point["cut"] for point in points] == ["0", "1", "2.3"]
    assert {point["num_samples"] for point in points} == {num_samples}
    with torch.no_grad():
        z = model[1](model[0](probe["x"]))
        assert points[1]["x"] == pytest.approx(float(nhsic(probe["x"], z)), rel=1e-5)
        assert points[1]["y"] == pytest.approx(float(nhsic(y, z)), rel=1e-5)


def test_the_baseline_is_a_mean_of_permutations():
    """So it moves less from seed to seed than one permutation does, and the values not at all."""
    found = [plane(20, seed)[1] for seed in range(12)]
    assert {(point["x"], point["y"]) for point in found} == {(found[0]["x"], found[0]["y"])}
    assert found[0] == plane(20, 0)[1]
    probe, model = support.examples_of(3, 20), support.spec().build(0).eval()
    y = torch.nn.functional.one_hot(probe["label"], support.NUM_CLASSES).float()
    with torch.no_grad():
        z = model[1](model[0](probe["x"]))
    draw = torch.Generator().manual_seed(0)
    single = [float(nhsic(y[torch.randperm(20, generator=draw)], z)) for _ in range(400)]
    baselines = [point["y_permuted"] for point in found]
    assert statistics.fmean(baselines) == pytest.approx(statistics.fmean(single), abs=0.02)
    spread = statistics.stdev(single) / PERMUTATIONS**0.5
    assert statistics.stdev(baselines) == pytest.approx(spread, rel=0.6)


def test_groups_of_examples_are_measured_in_one_pass(monkeypatch):
    model, count = support.spec(), 2 * EVALUATION_BATCH + 7
    params, examples = tensors(model.build(0)), support.examples_of(3, count)
    labels = examples["label"]
    groups = [torch.arange(count), torch.tensor([0, 130, count - 1]), (labels == 1).nonzero().flatten()]
    wanted = [evaluate(Residents(), model, params, support.PROBLEM, take(examples, rows)) for rows in groups]
    seen, call = [], PartRunner.__call__

    def counted(self, batch, *rest, **more):
        seen.append(len(batch["label"]))
        return call(self, batch, *rest, **more)

    monkeypatch.setattr(PartRunner, "__call__", counted)
    found = evaluate_groups(
        Residents(), model, params, support.PROBLEM, examples, [*groups, torch.tensor([], dtype=int)]
    )
    assert seen == [EVALUATION_BATCH, EVALUATION_BATCH, 7]
    assert found[:3] == [pytest.approx(metrics, rel=1e-5) for metrics in wanted]
    assert found[3] == {}, "nothing was measured"
