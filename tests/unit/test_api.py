"""The public names, and the example that uses them."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import scalefl
from scalefl.errors import BudgetError, ConfigError, ScaleFLError

ROOT = Path(__file__).parents[2]


def test_every_public_name_is_there_and_is_loaded_from_where_it_lives():
    for name in scalefl.__all__:
        assert getattr(scalefl, name).__name__ == name
    assert dir(scalefl) == sorted(scalefl.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        scalefl.nonsense  # noqa: B018


def test_importing_the_package_does_not_import_torch():
    code = "import sys, scalefl; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 144, 7)
    )


@pytest.mark.parametrize("model", ["resnet10", small, "test_api:small", small()])
def test_plan_takes_names_factories_paths_and_modules(model):
    found = scalefl.plan(model, torch.zeros(2, 3, 16, 16), budget="1GiB", blocks=2, batch_size=8)
    assert all(row.fits["budget"].means == "" for row in found.rows)
    assert [row.label for row in found.rows] == ["block 1 with tail", "block 2", "full"]
    assert all(found.fitting(row) == ["budget"] for row in found.rows)
    assert found.rows[-1].cost.peak_bytes >= max(row.cost.peak_bytes for row in found.rows[:-1])
    assert "block 1" in str(found)
    assert found.to_json()["full"]["peak_bytes"] == found.full.cost.peak_bytes


def test_plan_of_an_impossible_budget_says_what_the_cheapest_part_needs():
    with pytest.raises(
        BudgetError, match=r"of block \d.*MiB \(weights .*activations .*on offer is 0\.00 MiB.*batch_size = 16 \("
    ):
        scalefl.plan(small, torch.zeros(2, 3, 16, 16), budget="1KiB", blocks=2)


@pytest.mark.parametrize("budget", ["0", "-1GB", "12 parsecs", "nan", "NaNMiB", 0, -5, float("nan")])
def test_budgets_that_are_none(budget):
    with pytest.raises(ConfigError):
        scalefl.plan(small, torch.zeros(2, 3, 16, 16), budget=budget, blocks=2)


def test_a_smaller_micro_batch_lowers_the_plan():
    example = torch.zeros(2, 3, 16, 16)
    whole = scalefl.plan(small, example, blocks=2, means="none")
    split = scalefl.plan(small, example, blocks=2, means="micro-batches")
    for a, b in zip(whole.rows, split.rows, strict=True):
        assert a.cost == b.cost
        assert b.least.peak_bytes < a.least.peak_bytes <= a.cost.peak_bytes
    assert split.rows[0].least.means == "micro-batch 4" and split.rows[1].least.means.endswith("micro-batch 4")


def test_all_errors_are_of_one_tree():
    import scalefl.errors as errors

    found = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert len(found) > 8
    assert all(issubclass(e, ScaleFLError) for e in found)
    assert all(e.__name__ in (errors.__doc__ or "") for e in found)


@pytest.mark.slow
def test_the_example_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    runpy.run_path("examples/python_api.py", run_name="__main__")
    told = capsys.readouterr().out
    assert "block 3" in told
    assert float(told.split()[-1]) > 0.9  # test accuracy
