"""Runs from configs: what is refused before it starts, what is measured, and what a resumption may change."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass

import pytest
import torch
from msgspec import to_builtins
from safetensors.torch import load_file, save_file
from torch import nn

import support
from scalefl.checkpoint import load_deployed
from scalefl.config import make_config, to_plain
from scalefl.engines.remote import Patience
from scalefl.errors import BudgetError, CheckpointError, ConfigError, DataError, RoundFailed
from scalefl.experiment import Experiment
from scalefl.export import export
from scalefl.models import resolve
from scalefl.planner import least
from scalefl.problem import Classification
from scalefl.report import draw, read_run
from scalefl.report.comparison import Results, target_of, write
from scalefl.run_folder import RunFolder
from scalefl.runner import read_config, run, run_rounds


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


def schedule(**settings):
    return {"method": {"name": "scalefl", "mentor": {"schedule": settings}}}


def test_a_model_that_cannot_be_cut_is_trained_whole_and_has_no_plane(tmp_path):
    summary = run(settings("200%", model="test_experiment:Dense"), tmp_path / "run")
    assert summary["rounds"] == 2
    assert all(line["plane"] == [] for line in RunFolder(tmp_path / "run").read_journal() if "plane" in line)


@pytest.mark.parametrize("cuts", [2, ["0", "1"]])
def test_the_plane_is_read_where_the_models_own_names_say(tmp_path, cuts):
    """What DepthFL deploys is made around the model, whose modules have other names there."""
    method = {"name": "depthfl", "blocks": ["0", "1"]}
    run(settings("200%", method=method, evaluation={"plane_cuts": cuts, "plane_samples": 16}), tmp_path / "run")
    planes = [line["plane"] for line in RunFolder(tmp_path / "run").read_journal() if "plane" in line]
    assert len(planes) == 2 and all(points and not points[0]["cut"].startswith("model.") for points in planes)


@pytest.mark.parametrize(
    ("method", "memory", "message"),
    [
        ({"name": "heterofl", "rates": [0.2]}, "22%", "collecting the norms' statistics of tiny needs"),
        ({"name": "slt", "blocks": ["0"], "rounds": 2}, "70%", "block 2 of tiny needs"),
    ],
)
def test_what_nobody_could_do_later_is_refused_at_once(tmp_path, method, memory, message):
    with pytest.raises(BudgetError, match=message):
        run(settings(memory, method=method), tmp_path / "run")


def test_a_plane_of_more_blocks_than_units_has_all_cuts():
    experiment = Experiment(settings("200%"))
    cuts, source = experiment.plane_cuts(experiment.model)
    assert [cut.module for cut in cuts] == ["0", "1", "2.3"]
    assert source is None


@pytest.mark.parametrize("method", [{"name": "fedavg"}, {"name": "scalefl", "blocks": 2}, {"name": "sbt", "blocks": 2}])
def test_an_impossible_budget_is_refused_before_anything_is_written(tmp_path, method):
    with pytest.raises(BudgetError, match=r"needs .* MiB \(weights .*\); the largest budget on offer is 0\.0"):
        run(settings("1KiB", "2KiB", method=method), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_output_modules_that_nobody_holds_are_no_matter_where_tails_fit(tmp_path):
    method = {"name": "scalefl", "blocks": ["0", "1"]}
    experiment = Experiment(settings("200%", method=method))
    state = experiment.initial_state()
    peaks = {
        offer.label: least(offer, state.problem, experiment.method.objective).cost.peak_bytes
        for offer in experiment.method.menu(state)
    }
    budget = peaks["block 2 with tail"]
    assert peaks["block 1"] <= budget < peaks["block 2"]
    assert run(settings(f"{budget}B", method=method, rounds=1), tmp_path / "run")["num_clients_lost"] == 0


def test_budgets_are_no_matter_to_the_reference_that_ignores_them(tmp_path):
    summary = run(settings("1KiB", method={"name": "fedavg", "population": "all"}), tmp_path / "run")
    assert summary["num_clients_lost"] == 0


def test_plainer_means_come_before_cuts(tmp_path):
    """Who holds the whole model by them trains it; who does not trains parts of it."""
    for memory, start in (("90%", "full, "), ("31.5%", "block")):
        config = settings(memory, method={"name": "scalefl", "blocks": 2}, work={"batch_size": 16})
        run(config, tmp_path / memory)
        rungs = {rung for line in RunFolder(tmp_path / memory).read_journal() for rung in line.get("rungs", ())}
        assert rungs and all(rung.startswith(start) for rung in rungs), rungs


@pytest.mark.parametrize(("memory", "low"), [(("50%", "300%"), {0}), (("200%", "300%"), {0}), (("200%",), {0})])
def test_low_memory_clients_are_those_below_full_training_or_the_weakest(memory, low):
    experiment = Experiment(settings(*memory, rounds=1))
    strengths = {experiment.population.device(i).strength for i in range(4)}
    assert strengths == set(range(len(memory)))
    wanted = torch.zeros(3, dtype=torch.int64)
    for i in range(4):
        if experiment.population.device(i).strength in low:
            wanted += experiment.data.label_counts(i)
    rows = experiment.low_memory_test
    assert rows is not None and len(rows) > 0
    found = torch.bincount(experiment.data.test["label"][rows], minlength=3)
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
    assert saved["engine"] == {
        "name": "local",
        "workers": 0,
        "threads": 1,
        "cap": "none",
        "device": "cpu",
        "clients_at_once": 1,
        "patience": to_builtins(asdict(Patience())),
        "precision": "exact",
    }
    assert saved["work"]["momentum"] == 0.9


def test_settings_that_a_factory_cannot_take_are_refused():
    with pytest.raises(ConfigError, match="depht"):
        Experiment(settings("200%", model_arguments={"depht": 3}))


# Schedules of one's own


@dataclass(frozen=True)
class Warm:
    floor: float = 0.5

    def weights(self, position, progress):
        return 1.0, max(self.floor, progress)


@dataclass(frozen=True)
class Backwards:
    def advance(self, progress, num_blocks, movement):
        return progress.next_stage((progress.stage - 1) % num_blocks)


@dataclass
class Melting:
    def weights(self, position, progress):
        return 1.0, 1.0


def test_own_schedules_by_path(tmp_path):
    mentor = {"schedule": {"kind": "test_experiment:Warm", "floor": 0.25}, "schedule_rounds": 2}
    growth = {"kind": "test_experiment:Backwards"}
    method = {"name": "scalefl-paper", "blocks": 2, "mentor": mentor, "growth": growth}
    for workers in (0, 1):
        config = settings("300%", method=method, rounds=3, engine={"workers": workers})
        made = config.make_method()
        assert (made.mentor.schedule, made.growth) == (Warm(0.25), Backwards())
        run(config, tmp_path / str(workers))
    lines = RunFolder(tmp_path / "1").read_journal()
    assert [line["stage"] for line in lines if line["round"]] == ["block 1", "block 2", "block 1"]
    assert make_config(RunFolder(tmp_path / "1").read_settings()).method == method
    states = [(tmp_path / str(workers) / "state.safetensors").read_bytes() for workers in (0, 1)]
    assert states[0] == states[1]


# Bad values


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": ".."}, "name = '..'"),
        ({"evaluation": {"every": 0}}, "every = 0: expected at least 1"),
        ({"evaluation": {"plane_samples": -5}}, "plane_samples = -5"),
        ({"evaluation": {"plane_every": -3}}, "plane_every = -3"),
        ({"engine": {"workers": -1}}, "workers = -1: expected at least 0"),
        ({"engine": {"threads": 0}}, "threads = 0"),
        ({"work": {"lr": float("nan")}}, "lr = nan: expected a finite number"),
        ({"work": {"momentum": -1}}, "momentum = -1"),
        ({"work": {"lr_schedule": "cosine", "lr_rounds": 1}}, "lr_rounds = 1 is shorter than the run"),
        ({"method": {"name": "fedavg", "means": {"smallest_micro_batch": 0}}}, "smallest_micro_batch = 0"),
        ({"method": {"name": "scalefl", "means": {"micro_batch_size": -1}}}, "micro_batch_size = -1"),
        ({"method": {"name": "scalefl", "blocks": 0}}, "blocks = 0"),
        ({"method": {"name": "scalefl", "growth": {"kind": "sequential"}}}, "needs spans = 'single'"),
        ({"method": {"name": "sbt", "growth": {"kind": "sequential", "rounds": -2}}}, "growth.rounds = -2"),
        ({"method": {"name": "scalefl", "mentor": {"lambda_max": float("nan")}}}, "mentor.lambda_max = nan"),
        ({"method": {"name": "scalefl", "mentor": {"sigma": 0}}}, "mentor.sigma = 0"),
        ({"method": {"name": "fedavg", "server": {"kind": "fedadam", "lr": float("inf")}}}, "server.lr = inf"),
        ({"method": {"name": "fedavg", "server": {"kind": "fedavgm", "momentum": 2}}}, "at most 1"),
        ({"method": {"name": "scalefl", "spans": "elastc"}}, "spans = 'elastc': did you mean 'elastic'"),
        ({"method": {"name": "sbt", "growth": {"kind": "sequental"}}}, "did you mean 'sequential'"),
        ({"method": {"name": "scalefl", "mentor": {"tap": "cutt"}}}, "did you mean 'cut'"),
        (schedule(kind="linaer"), "schedule.kind = 'linaer': did you mean 'linear'?; known: linear, cosine, constant"),
        (schedule(kind="linaer"), "or your own as 'package.module:Class'"),
        (schedule(kind="linear", floor=1), "unknown key 'method.mentor.schedule.floor'"),
        (schedule(), "missing required field `kind`"),
        (schedule(kind="test_experiment:Warm", flor=1), "'method.mentor.schedule.flor': did you mean 'floor'"),
        (schedule(kind="test_experiment:Warm", floor="a"), "`method.mentor.schedule.floor`"),
        (schedule(kind="test_experiment:Wram"), "has no attribute 'Wram'"),
        (schedule(kind="test_experiment:make_data"), "is not a dataclass"),
        (schedule(kind="test_experiment:Backwards"), "with the methods of scalefl.mentor.Schedule"),
        (schedule(kind="test_experiment:Melting"), "expected a frozen dataclass"),
        ({"method": {"name": "scalefl", "mentor": {"schedule": "linear"}}}, 'as schedule = { kind = "linear" }'),
        ({"method": {"name": "scalefl", "mentor": {"schedule_rounds": -1}}}, "mentor.schedule_rounds = -1"),
        ({"method": {"name": "scalefl", "growth": {"kind": "test_experiment:Backwards"}}}, "needs spans = 'single'"),
        ({"method": {"name": "fedavg", "server": {"kind": "averag"}}}, "did you mean 'average'?; known: average, fed"),
        ({"method": {"name": "support:tiny"}}, "is not a dataclass"),
        ({"model_arguments": {"norm": {"a": 1}}}, "tables are not supported"),
        ({"model": "support:binary"}, "2 outputs, the data 3 classes"),
        ({"model": "..foo:x"}, "cannot import"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_values_are_named(changes, said):
    with pytest.raises(ConfigError) as caught:
        Experiment(settings("200%", **changes))
    assert said in str(caught.value)


def test_a_block_that_no_client_can_hold_is_refused_at_the_start(tmp_path):
    """One block fits, another never will: better said before the first round than after."""
    method = {"name": "scalefl", "blocks": 2, "coadapted_layers": 0, "means": "none", "parts": False}
    experiment = Experiment(settings("100%", method=method))
    peaks = sorted(row.cost.peak_bytes for row in experiment.plan().rows)
    between = f"{(peaks[0] + peaks[1]) // 2}B"
    for spans in ("single", "elastic"):
        with pytest.raises(BudgetError, match=r"of tiny needs .* \(weights"):
            run(settings(between, method={**method, "spans": spans}), tmp_path / spans)


def test_a_server_step_out_of_range_keeps_the_state(tmp_path):
    method = {"name": "fedavg", "server": {"kind": "fedavgm", "lr": 1e38}}
    rounds = run_rounds(Experiment(settings("200%", method=method, rounds=4)), tmp_path / "run")
    with pytest.raises(RoundFailed):
        for _ in rounds:
            pass
    state = load_file(tmp_path / "run" / "state.safetensors")
    assert all(bool(t.isfinite().all()) for t in state.values())


def test_two_runs_in_one_folder(tmp_path):
    config = settings("200%", rounds=3)
    rounds = run_rounds(Experiment(config), tmp_path / "run")
    next(rounds)
    with pytest.raises(CheckpointError, match="in use by another process"):
        run(config, tmp_path / "run", resume=True)
    rounds.close()
    run(config, tmp_path / "run", resume=True)
    assert [line["round"] for line in RunFolder(tmp_path / "run").read_journal()] == [0, 1, 2, 3]


@pytest.mark.parametrize("change", ["seed", "model", "method"])
def test_a_state_of_another_run_is_refused(tmp_path, change):
    theirs = {
        "seed": {"seed": 5},
        "model": {"model_arguments": {"width": 2.0}},
        "method": {"method": {"name": "scalefl", "blocks": 2}},
    }[change]
    for name, changes in (("mine", {}), ("theirs", theirs)):
        run(settings("300%", **changes), tmp_path / name)
    (tmp_path / "mine" / "summary.json").unlink()
    (tmp_path / "mine" / "state.safetensors").write_bytes((tmp_path / "theirs" / "state.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="another run"):
        run(settings("300%"), tmp_path / "mine", resume=True)


def test_damaged_files_are_named(tmp_path):
    run(settings("200%"), tmp_path / "run")
    files = RunFolder(tmp_path / "run")
    for path, content in ((files.journal, "{}\n"), (files.config, '{"format": "scalefl-run", "version": "x"}')):
        before = path.read_text()
        path.write_text(content)
        with pytest.raises(CheckpointError, match="damaged"):
            run(settings("200%"), tmp_path / "run", resume=True)
        path.write_text(before)
    save_file({"params/x": torch.zeros(1)}, files.state, {"scalefl": '{"format": "scalefl-state"}'})
    with pytest.raises(CheckpointError, match="damaged"):
        run(settings("200%"), tmp_path / "run", resume=True)


def test_clients_are_compared_by_the_labels_that_they_hold(tmp_path):
    config = settings("200%")
    found = run(config, tmp_path / "run")["client_test"]
    data = Experiment(config).data
    model, params = load_deployed(tmp_path / "run" / "state.safetensors")
    module = model.build(0).eval()
    module.load_state_dict(dict(params))
    labels = data.test["label"]
    right = (module(data.test["x"]).argmax(1) == labels).double()
    of_label = {k: float(right[labels == k].mean()) for k in labels.unique().tolist()}
    held = [[k for k in data.examples(client)["label"].tolist() if k in of_label] for client in range(data.num_clients)]
    accuracies = torch.tensor([sum(of_label[k] for k in own) / len(own) for own in held], dtype=torch.float64)
    assert found["accuracy_p10"] == pytest.approx(float(accuracies.quantile(0.1)))
    assert found["accuracy_median"] == pytest.approx(float(accuracies.quantile(0.5)))


class WithoutAccuracy(Classification):
    """Measures its loss only."""

    def metrics(self, output, batch):
        return {"loss": self.loss(output, batch)}


def data_without_accuracy() -> support.MadeData:
    data = make_data()
    data.problem = WithoutAccuracy(3, support.PROBLEM.columns)
    return data


def test_a_problem_that_measures_no_accuracy_ends_all_the_same(tmp_path):
    data = {"source": {"name": "test_experiment:data_without_accuracy"}}
    summary = run(settings("200%", data=data), tmp_path / "run")
    assert "accuracy" not in summary["test"] and summary["client_test"] == {}
    results = Results(
        "one",
        tmp_path,
        {"seeds": [0], "target_accuracy": None, "validation_only": False},
        {"": {"a": {0: read_run(tmp_path / "run")}}},
    )
    assert [path.name for path in write(results, tmp_path / "out")] == [
        "comparison.md",
        "comparison.csv",
        "report.html",
    ]
    assert target_of(results, "") is None


# Python objects in the place of names


def given(**changes):
    """A config as from a program: objects where files have names, and no engine settings that decide for it."""
    base = {
        "rounds": 1,
        "clients_per_round": 2,
        "devices": {"classes": [{**to_builtins(settings("200%").devices.members[0])}]},
        "method": {"name": "fedavg"},
        "work": {"batch_size": 8},
    }
    return make_config({**base, "model": support.tiny, "data": make_data, **changes})


def test_what_can_be_imported_is_kept_by_its_path(tmp_path):
    config = given()
    assert (config.model, config.data.source.name) == ("support:tiny", "test_experiment:make_data")
    assert make_config(to_plain(config)) == config
    run(config, tmp_path / "run")
    assert export(tmp_path / "run", tmp_path / "model.pt")[0].name == "tiny"


@pytest.mark.parametrize("model", [lambda: support.tiny(), support.tiny()], ids=["function", "module"])
@pytest.mark.parametrize(
    "data",
    [make_data(), lambda: make_data(), {"source": make_data(), "clients": 4}, {"source": {"name": make_data()}}],
    ids=["federated", "function", "source", "name"],
)
def test_objects_are_trained_as_they_are_and_given_again_to_go_on(tmp_path, model, data):
    summary = run(given(), tmp_path / "named")
    found = run(given(model=model, data=data), tmp_path / "given")
    if not isinstance(model, nn.Module):
        assert found["test"] == summary["test"]
    saved = read_config(tmp_path / "given")
    assert saved.model.startswith("<") and saved.data.source.name.startswith("<")
    with pytest.raises(DataError, match=r"was given from Python, as <.*: give it again"):
        Experiment(saved)
    with pytest.raises(ConfigError, match=r"was given from Python, as <.*: give it again"):
        resolve(saved.model)
    assert run(given(model=model, data=data), tmp_path / "given", resume=True) == found
    with pytest.raises(ConfigError, match=r"whose data, model differ|whose model, data differ"):
        run(given(), tmp_path / "given", resume=True)
    with pytest.raises(CheckpointError, match="Give it again from Python, as the last argument"):
        export(tmp_path / "given", tmp_path / "model.pt")
    assert export(tmp_path / "given", tmp_path / "model.pt", model)[1] == len(support.tiny().state_dict())
    support.tiny().load_state_dict(torch.load(tmp_path / "model.pt"))


def test_a_module_that_was_made_already_is_what_training_starts_from(tmp_path):
    module = support.tiny()
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.fill_(0.01)
    run(given(model=module, work={"batch_size": 8, "lr": 0.0, "weight_decay": 0.0}), tmp_path / "run")
    state = load_file(tmp_path / "run" / "state.safetensors")
    assert all(bool((state[f"params/{name}"] == 0.01).all()) for name, _ in module.named_parameters())
    with pytest.raises(ConfigError, match="model_arguments are a factory's"):
        given(model=module, model_arguments={"width": 0.5})


def test_what_the_started_program_defines_stays_in_its_process(tmp_path, monkeypatch):
    def make() -> nn.Module:
        return support.tiny()

    make.__module__ = "__main__"
    experiment = Experiment(given(model=make))
    crew = experiment.settle_engine()
    assert crew is not None and crew.workers == 0
    with pytest.raises(ConfigError, match=r"cannot be sent to workers .*: define it at the top of a module"):
        run(given(model=make, engine={"workers": 1}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Metrics without weight, and numbers that are none


class Choosy(Classification):
    """Tells its accuracy by examples of class 0 alone, a number without end, and one that is never there."""

    def metrics(self, output, batch):
        own = batch["label"] == 0
        right = (output.argmax(1) == batch["label"])[own].sum()
        none = torch.tensor(0.0)
        return {
            **super().metrics(output, batch),
            "accuracy": (right, int(own.sum())),
            "endless": (none / 0, 1),
            "no": (none, 0),
        }


def choosy_data() -> support.MadeData:
    data = make_data()
    data.problem = Choosy(3, support.PROBLEM.columns)
    return data


def test_metrics_without_weight_are_left_out_and_files_are_json(tmp_path):
    def strict(text: str):
        return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))

    summary = run(settings("200%", data={"source": {"name": "test_experiment:choosy_data"}}), tmp_path / "run")
    assert 0 <= summary["test"]["accuracy"] <= 1 and "no" not in summary["test"]
    assert summary["test"]["endless"] is None and summary["validation"]["endless"] is None
    for path in (tmp_path / "run").glob("*.json"):
        strict(path.read_text())
    lines = [strict(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    assert all("loss" in line["validation"] and "no" not in line["validation"] for line in lines)
    assert draw(read_run(tmp_path / "run"), tmp_path / "out")


# Factories that load weights


def pretrained() -> nn.Module:
    module = support.tiny()
    module.load_state_dict({name: torch.full_like(t, 0.01, device="cpu") for name, t in module.state_dict().items()})
    return module


def test_a_factory_that_loads_weights_is_quiet_and_has_them(tmp_path):
    config = settings(
        "200%", model="test_experiment:pretrained", work={"batch_size": 8, "lr": 0.0, "weight_decay": 0.0}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(config, tmp_path / "run")
    state = load_file(tmp_path / "run" / "state.safetensors")
    assert all(bool((state[f"params/{name}"] == 0.01).all()) for name, _ in support.tiny().named_parameters())


def test_a_folder_in_the_way_is_refused_before_data_is_read(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        run(settings("200%", data={"source": {"name": "nowhere:make_data"}}), tmp_path)
    (tmp_path / "notes.txt").unlink()
    run(settings("200%"), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"whose data, rounds differ|whose rounds, data differ"):
        run(settings("200%", rounds=9, data={"source": {"name": "nowhere:make_data"}}), tmp_path / "run", resume=True)
