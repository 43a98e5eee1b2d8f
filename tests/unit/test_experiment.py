"""Runs from configs: what is refused before it starts, what is measured, and what a resumption may change."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import support
from scalefl.config import make_config
from scalefl.errors import BudgetError, ConfigError, DataError
from scalefl.experiment import Experiment, run, run_rounds
from scalefl.run_folder import RunFolder


def make_data(validation: bool = True) -> support.MadeData:
    data = support.MadeData([9, 12, 10, 8])
    if not validation:
        data.validation = {name: column[:0] for name, column in data.validation.items()}
    return data


class Dense(nn.Module):
    """Nothing to cut: the input is used again at the very end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(128, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(1)
        return self.last(torch.cat([flat, torch.relu(self.first(flat))], 1))


def settings(*memory: str, **changes):
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
    plain = {
        "model": "support:tiny",
        "rounds": 2,
        "clients_per_round": 2,
        "data": {"source": {"name": "test_experiment:make_data"}},
        "devices": {"classes": classes},
        "method": {"name": "fedavg"},
        "work": {"batch_size": 8},
    }
    return make_config({**plain, **changes})


def test_a_model_that_cannot_be_cut_is_trained_whole_and_has_no_plane(tmp_path):
    summary = run(settings("200%", model="test_experiment:Dense"), tmp_path / "run")
    assert summary["rounds"] == 2
    assert all(line["plane"] == [] for line in RunFolder(tmp_path / "run").read_journal() if "plane" in line)


def test_a_plane_of_more_blocks_than_units_has_all_cuts():
    experiment = Experiment(settings("200%"))
    cuts, source = experiment.plane_cuts(experiment.model)
    assert [cut.module for cut in cuts] == ["0", "1", "2.3"]
    assert source is None


@pytest.mark.parametrize("method", [{"name": "fedavg"}, {"name": "scalefl", "blocks": 2}, {"name": "sbt", "blocks": 2}])
def test_an_impossible_budget_is_refused_before_anything_is_written(tmp_path, method):
    with pytest.raises(
        BudgetError, match=r"needs .* MiB \(weights .*gradients .*\); the largest budget on offer is 0\.0"
    ):
        run(settings("1KiB", "2KiB", method=method), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_budgets_are_no_matter_to_the_reference_that_ignores_them(tmp_path):
    summary = run(settings("1KiB", method={"name": "fedavg", "population": "all"}), tmp_path / "run")
    assert summary["num_clients_lost"] == 0


@pytest.mark.parametrize(("memory", "low"), [(("50%", "300%"), {0}), (("200%", "300%"), {0}), (("200%",), {0})])
def test_low_memory_clients_are_those_below_full_training_or_the_weakest(memory, low):
    experiment = Experiment(settings(*memory, rounds=1))
    strengths = {experiment.population.device(i).strength for i in range(4)}
    assert strengths == set(range(len(memory)))
    wanted = torch.zeros(3, dtype=torch.int64)
    for i in range(4):
        if experiment.population.device(i).strength in low:
            wanted += experiment.data.label_counts(i)
    found = torch.bincount(experiment.low_memory_test["label"], minlength=3)
    assert len(experiment.low_memory_test["label"]) > 0
    assert torch.allclose(found / found.sum(), wanted / wanted.sum(), atol=0.06)


def test_empty_validation_data_is_refused():
    data = {"source": {"name": "test_experiment:make_data", "arguments": {"validation": False}}}
    with pytest.raises(DataError, match="validation data is empty"):
        Experiment(settings("200%", data=data))


def test_a_resumption_may_change_the_workers_and_nothing_that_matters(tmp_path):
    config = settings("200%", rounds=3)
    whole = tmp_path / "whole"
    run(config, whole)
    rounds = run_rounds(Experiment(config), tmp_path / "half")
    next(rounds)
    rounds.close()
    for changes in ({"seed": 1}, {"engine": {"threads": 2}}, {"rounds": 4}):
        with pytest.raises(ConfigError, match=f"whose {next(iter(changes))} differ"):
            run(settings("200%", **{"rounds": 3, **changes}), tmp_path / "half", resume=True)
    run(settings("200%", rounds=3, engine={"workers": 1}), tmp_path / "half", resume=True)
    ends = [(folder / "state.safetensors").read_bytes() for folder in (whole, tmp_path / "half")]
    assert ends[0] == ends[1]


def test_the_resolved_config_spells_out_every_default(tmp_path):
    run(settings("200%", rounds=1), tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert saved["evaluation"]["plane_samples"] == 256
    assert saved["engine"] == {"workers": 0, "threads": 1}
    assert saved["work"]["momentum"] == 0.9


def test_settings_that_a_factory_cannot_take_are_refused():
    with pytest.raises(ConfigError, match="depht"):
        Experiment(settings("200%", model_arguments={"depht": 3}))
