"""Copies of runs in TensorBoard and MLflow: what they hold, and that nothing that happens to them happens to runs."""

from __future__ import annotations

import json
import logging
import math
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch
from test_experiment import make_data, settings

from scalefl.comparison import load_comparison
from scalefl.config import to_plain
from scalefl.errors import ConfigError, RoundFailed
from scalefl.experiment import Experiment
from scalefl.problem import Classification
from scalefl.run_folder import RunFolder
from scalefl.runner import run, run_rounds
from scalefl.tracking import Destination, figures
from support import PROBLEM, MadeData, has_all, in_mlflow, in_tensorboard, mlflow_run

# MLflow's database layer says so of a newer SQLAlchemy.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")

TWO: tuple[Destination, ...] = ("tensorboard", "mlflow")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A local store of MLflow's, which takes seconds to make."""
    for name in ("tensorboard", "mlflow", "sqlalchemy", "alembic"):
        pytest.importorskip(name)
    with pytest.MonkeyPatch.context() as patch:
        uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        yield uri


class OddMetrics(Classification):
    def metrics(self, output, batch):
        found = super().metrics(output, batch)
        count = found["loss"][1]
        return {**found, "top@2": (torch.tensor(count), count), "nothing": (torch.tensor(math.nan), count)}


def data_with_odd_metrics() -> MadeData:
    data = make_data()
    data.problem = OddMetrics(3, PROBLEM.columns)
    return data


def stopped(folder: Path, done: int, **changes) -> None:
    """A run that is left after so many rounds."""
    rounds = run_rounds(Experiment(settings("200%", **changes)), folder)
    for _ in range(done):
        next(rounds)
    rounds.close()


def test_a_line_of_the_journal_in_figures():
    line = {
        "round": 3,
        "stage": "block 2",
        "rungs": {"full": [4, 7], "block 1": [5]},
        "lost": [{"client": 9, "predicted_peak_bytes": 1}],
        "train": {"loss": 0.5, "top-5": 0.75},
        "flops": 1e9,
        "peaks": [{"client": 4, "predicted_bytes": 10}],
        "predicted_peak_bytes": 10,
        "measured_peak_bytes": None,
        "validation": {"accuracy": 0.25},
        "plane": [{"cut": "layer1.0", "num_samples": 256, "x": 0.1, "y": 0.2}],
    }
    assert figures(line) == {
        "train/loss": 0.5,
        "train/top-5": 0.75,
        "flops": 1e9,
        "predicted_peak_bytes": 10,
        "validation/accuracy": 0.25,
        "num_clients_seen": 3,
        "num_clients_lost": 1,
        "plane/layer1.0/x": 0.1,
        "plane/layer1.0/y": 0.2,
    }
    assert figures({"round": 0, "validation": {"loss": 1.0}}) == {"validation/loss": 1.0}


def test_what_a_run_leaves_in_both(tmp_path, store):
    folder = tmp_path / "run"
    run(settings("200%", tracking=TWO, rounds=3), folder)
    events, metrics = in_tensorboard(folder), in_mlflow(folder)
    assert has_all(events, folder) and has_all(metrics, folder)
    assert events.keys() == metrics.keys()
    names = {"train/loss", "validation/accuracy", "bytes_up", "flops", "predicted_peak_bytes", "simulated_seconds"}
    assert names | {"num_clients_seen", "plane/2.3/x", "summary/test/accuracy", "summary/flops"} <= metrics.keys()
    info, data = mlflow_run(folder).info, mlflow_run(folder).data
    assert (info.run_name, info.status) == ("run", "FINISHED")
    assert data.params["work.lr"] == "0.05" and data.params["data.source.name"] == "test_experiment:make_data"
    assert '"memory": "200%"' in data.params["devices.classes"]
    assert data.tags["folder"] == str(folder) and "environment.packages.torch" in data.tags


def test_a_stopped_run_goes_on_in_both_without_gaps_or_repetitions(tmp_path, store):
    """Rounds that were not saved are done again."""
    folder, changes = tmp_path / "run", {"tracking": TWO, "rounds": 5, "save_every": 2}
    stopped(folder, 3, **changes)
    assert has_all(in_tensorboard(folder), folder) and has_all(in_mlflow(folder), folder)
    (first,), status = RunFolder(folder).event_files, mlflow_run(folder).info.status
    assert status == "KILLED"
    run(settings("200%", **changes), folder, resume=True)
    assert has_all(in_tensorboard(folder), folder)
    steps = {name: [step for step, _ in values] for name, values in in_mlflow(folder).items()}
    assert steps["train/loss"] == [1, 2, 3, 4, 5] and steps["validation/accuracy"] == [0, 1, 2, 3, 4, 5]
    assert not first.exists() and len(RunFolder(folder).event_files) == 1
    assert mlflow_run(folder).info.status == "FINISHED"
    run(settings("200%", **changes), folder, resume=True)  # a finished one
    assert has_all(in_tensorboard(folder), folder)
    assert {name: [step for step, _ in values] for name, values in in_mlflow(folder).items()} == steps


def test_tracking_may_begin_with_a_resumption(tmp_path, store):
    folder = tmp_path / "run"
    stopped(folder, 2, rounds=3)
    run(settings("200%", rounds=3, tracking=TWO), folder, resume=True)
    assert has_all(in_tensorboard(folder), folder) and has_all(in_mlflow(folder), folder)


def test_a_viewer_that_has_read_the_earlier_file_forgets_it(tmp_path, store):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, changes = tmp_path / "run", {"tracking": TWO[:1], "rounds": 4, "save_every": 3}
    stopped(folder, 2, **changes)
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    for _ in run_rounds(Experiment(settings("200%", **changes)), folder, resume=True):
        events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert len(RunFolder(folder).event_files) == 1


def test_the_result_does_not_depend_on_tracking(tmp_path, store):
    for name, destinations in (("with", TWO), ("without", ())):
        run(settings("200%", tracking=destinations), tmp_path / name)
    states = [(tmp_path / name / "state.safetensors").read_bytes() for name in ("with", "without")]
    assert states[0] == states[1]
    assert not {"tensorboard", "mlflow.json"} & {path.name for path in (tmp_path / "without").iterdir()}


def test_a_run_that_fails_has_failed_in_mlflow(tmp_path, store):
    method = {"name": "fedavg", "server": {"kind": "fedavgm", "lr": 1e38}}
    with pytest.raises(RoundFailed):
        run(settings("200%", method=method, rounds=4, tracking=TWO), tmp_path / "run")
    assert mlflow_run(tmp_path / "run").info.status == "FAILED"
    assert has_all(in_mlflow(tmp_path / "run"), tmp_path / "run")


def test_a_run_that_mlflow_has_lost_is_made_anew(tmp_path, store):
    from mlflow import MlflowClient

    stopped(tmp_path / "run", 2, rounds=3, tracking=TWO[1:])
    lost = mlflow_run(tmp_path / "run").info.run_id
    MlflowClient().delete_run(lost)
    run(settings("200%", rounds=3, tracking=TWO[1:]), tmp_path / "run", resume=True)
    assert mlflow_run(tmp_path / "run").info.run_id != lost
    assert has_all(in_mlflow(tmp_path / "run"), tmp_path / "run")
    RunFolder(tmp_path / "run").mlflow.write_text(json.dumps({"run_id": "0" * 32}))  # of another server
    run(settings("200%", rounds=3, tracking=TWO[1:]), tmp_path / "run", resume=True)
    assert has_all(in_mlflow(tmp_path / "run"), tmp_path / "run")


def test_runs_of_a_comparison_are_an_experiment(tmp_path, store):
    from mlflow import MlflowClient

    (tmp_path / "both" / "tight").mkdir(parents=True)
    (tmp_path / "both" / "comparison.json").touch()
    names = {}
    for folder in (tmp_path / "both" / "tight" / "a-0", tmp_path / "both" / "a-0", tmp_path / "alone"):
        run(settings("200%", rounds=1, tracking=TWO[1:]), folder)
        experiment = MlflowClient().get_experiment(mlflow_run(folder).info.experiment_id)
        names[folder.relative_to(tmp_path).as_posix()] = experiment.name
    assert names == {"both/tight/a-0": "both/tight", "both/a-0": "both", "alone": "scalefl"}


def test_the_experiment_may_be_named(tmp_path, store, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    run(settings("200%", rounds=1, tracking=TWO[1:]), tmp_path / "run")
    assert MlflowClient().get_experiment(mlflow_run(tmp_path / "run").info.experiment_id).name == "mine"


def test_overwriting_removes_event_files_and_nothing_else(tmp_path, store):
    run(settings("200%", tracking=TWO), tmp_path / "run")
    files = RunFolder(tmp_path / "run")
    note = files.tensorboard / "note.txt"
    note.touch()
    files.remove()
    assert list(files.tensorboard.iterdir()) == [note] and not files.mlflow.exists()
    note.unlink()
    files.remove()
    assert not files.tensorboard.exists()


# Failures


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for logger, level, text in caplog.record_tuples if logger == "scalefl" and level >= logging.WARNING]


def test_a_closed_port_costs_a_run_seconds_and_a_warning(tmp_path, store, monkeypatch, caplog):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{taken.getsockname()[1]}")
        begun = time.monotonic()
        run(settings("200%", rounds=4, tracking=TWO), tmp_path / "run")
    assert time.monotonic() - begun < 30
    first, last = warnings_of(caplog)
    assert first.startswith("tracking: cannot write to mlflow (MlflowException: ") and "refused" in first
    assert f"lacks some of {tmp_path / 'run'}" in last and last.endswith("--resume --set 'tracking=[\"mlflow\"]'")
    assert has_all(in_tensorboard(tmp_path / "run"), tmp_path / "run")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    run(settings("200%", rounds=4, tracking=TWO), tmp_path / "run", resume=True)
    assert has_all(in_mlflow(tmp_path / "run"), tmp_path / "run")


def test_a_server_that_does_not_answer_is_left_alone_for_a_while(tmp_path, store, monkeypatch, caplog):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        waits = []
        rounds = run_rounds(Experiment(settings("200%", rounds=6, tracking=TWO[1:])), tmp_path / "run")
        begun = time.monotonic()
        for progress in rounds:
            waits.append(time.monotonic() - begun - progress.line["seconds"])
            begun = time.monotonic()
    assert all(wait < 1 for wait in waits[1:])
    assert "timed out" in warnings_of(caplog)[0]


def test_what_was_written_in_part_is_completed(tmp_path, store, monkeypatch, caplog):
    from mlflow import MlflowClient

    log_batch, batches = MlflowClient.log_batch, iter(range(99))

    def unsteady(self, run_id, metrics=(), params=()):
        bad = next(batches) in (2, 4, 5)
        log_batch(self, run_id, metrics=metrics[::2] if bad else metrics, params=params)
        if bad:
            raise ConnectionError("gone\nfor good")

    monkeypatch.setattr(MlflowClient, "log_batch", unsteady)
    monkeypatch.setattr("scalefl.tracking.REST", 0)
    run(settings("200%", rounds=6, tracking=TWO[1:]), tmp_path / "run")
    assert has_all(in_mlflow(tmp_path / "run"), tmp_path / "run")
    assert mlflow_run(tmp_path / "run").info.status == "FINISHED"
    said = "tracking: cannot write to mlflow (ConnectionError: gone); the run itself is not affected"
    assert set(warnings_of(caplog)) == {said}


def test_event_files_that_cannot_be_written(tmp_path, store, caplog):
    config, folder = settings("200%", rounds=3, tracking=TWO[:1]), tmp_path / "run"
    stopped(folder, 1, rounds=3)
    (folder / "tensorboard").touch()
    rounds = run_rounds(Experiment(config), folder, resume=True)
    next(rounds)
    assert "File exists" in warnings_of(caplog)[0] or "Not a directory" in warnings_of(caplog)[0]
    (folder / "tensorboard").unlink()
    for _ in rounds:
        pass
    assert has_all(in_tensorboard(folder), folder)
    assert len(warnings_of(caplog)) == 1


def test_metrics_of_ones_own(tmp_path, store):
    """MLflow refuses some signs, and a metric may be no number."""
    data = {"source": {"name": "test_tracking:data_with_odd_metrics"}}
    run(settings("200%", data=data, tracking=TWO), tmp_path / "run")
    found = in_mlflow(tmp_path / "run")
    assert found["validation/top_2"] == [(0, 1.0), (1, 1.0), (2, 1.0)]
    assert "validation/nothing" not in found
    events = in_tensorboard(tmp_path / "run")
    assert has_all(events, tmp_path / "run") and "validation/top@2" in events


@pytest.mark.parametrize("name", TWO)
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    said = rf'tracking = \["{name}"\] needs a package that is missing: pip install "scalefl\[{name}\]"'
    with pytest.raises(ConfigError, match=said):
        run(settings("200%", tracking=(name,)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    path = tmp_path / "both.json"
    plain = to_plain(settings("200%", tracking=(name,)))
    path.write_text(json.dumps({**plain, "variants": {"a": {}}}))
    with pytest.raises(ConfigError, match=f"variant 'a': {said}"):
        load_comparison(path, runs=tmp_path / "runs")


def test_every_destination_has_an_extra():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert set(TWO) == set(get_args(Destination)) <= project["optional-dependencies"].keys()


def test_a_folder_of_the_packages_name_is_not_the_package(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (tmp_path / "mlflow").mkdir()
    with pytest.raises(ConfigError, match="is missing"):
        Experiment(settings("200%", tracking=TWO[1:]))


def test_an_unknown_destination_is_named():
    with pytest.raises(ConfigError, match=r"tracking\[0\] = 'mlfow': did you mean 'mlflow'\?"):
        settings("200%", tracking=["mlfow"])


def test_nothing_is_imported_where_nothing_is_tracked(tmp_path):
    code = (
        "import sys; from test_experiment import settings; from scalefl.runner import run;"
        f"run(settings('200%', rounds=1), {str(tmp_path / 'run')!r});"
        "sys.exit(len({'tensorboard', 'mlflow', 'torch.utils.tensorboard'} & sys.modules.keys()))"
    )
    path = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    code = f"import sys; sys.path[:0] = {path!r}; {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
