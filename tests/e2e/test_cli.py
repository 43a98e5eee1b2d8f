from __future__ import annotations

import importlib
import itertools
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from scalefl import bench
from scalefl.checkpoint import load_deployed, load_state, save_state
from scalefl.cli import app
from scalefl.config import load_config
from scalefl.experiment import Experiment
from scalefl.export import state_dict
from scalefl.models.cnn import cnn
from scalefl.models.skeleton import tensors
from scalefl.models.spec import ModelSpec
from scalefl.problem import Classification, Column
from scalefl.runner import run_rounds
from scalefl.types import ServerState
from support import has_all, identical, in_mlflow, in_tensorboard, shared_fields

# Three classes of 8×8 pictures on six clients. NAP makes clients slow enough to be stopped in their work.
MODULE = """
import os, time
import torch
from torch import nn
from scalefl.data import Dataset, PartitionedData
from scalefl.problem import Classification, Column


class Clients(PartitionedData):
    def examples(self, client):
        time.sleep(float(os.environ.get("NAP", "0")))
        return super().examples(client)


def make_data():
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(120) % 3
    x = torch.randn(120, 1, 8, 8, generator=draw) + y[:, None, None, None]
    rows = lambda s: {"x": x[s], "label": y[s]}
    problem = Classification(3, (Column("x", (1, 8, 8), "float32"),))
    data = Dataset(problem, rows(slice(0, 90)), rows(slice(90, 120)))
    return Clients(data, list(torch.arange(72).split(12)), torch.arange(72, 90))


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.ones(1), persistent=False)

    def forward(self, x):
        return x * self.factor


def make_model(width=4):
    def unit(a, b):
        return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))
    return nn.Sequential(Scale(), unit(1, width), unit(width, width), head)


class Moody(nn.Flatten):
    def forward(self, x):
        if self.training and float(x.abs().max()) > 0:
            raise ArithmeticError("not today")
        return super().forward(x)


def moody():
    return nn.Sequential(Moody(), nn.Linear(64, 3))


def broken_data():
    raise ZeroDivisionError("my own\\nmistake")
"""

PAIR = Classification(2, (Column("x", (8,), "float32"),))

CONFIG = """
name = "tiny"
model = "{module}:make_model"
rounds = 4
clients_per_round = 3
data = {{ source = {{ name = "{module}:make_data" }} }}
method = {{ name = "scalefl", blocks = 2 }}
work = {{ batch_size = 4, lr = 0.1 }}
evaluation = {{ plane_cuts = 2, plane_samples = 18 }}

[[devices.classes]]
name = "weak"
share = 0.5
memory = "95%"
flops_per_second = 1e9
bandwidth_bytes_per_second = 1e6

[[devices.classes]]
name = "strong"
share = 0.5
memory = "120%"
flops_per_second = 2e9
bandwidth_bytes_per_second = 1e6
"""

# Runs the command line in a process of its own, with SIGINT as a terminal has it and files of limited size.
PROGRAM = """
import os, resource, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = int(os.environ.get("FILE_BYTES", "0"))
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from scalefl.cli import main
main()
"""

FILES = {"config.json", "environment.json", "journal.jsonl", "plan.json", "state.safetensors", "summary.json"}
PICTURES = {"accuracy.png", "memory.png", "nhsic.png", "report.html"}

MODULE_NAME = "edge_module"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user's folder: a module, a config, and a finished run in runs/tiny."""
    folder = tmp_path_factory.mktemp("home")
    (folder / f"{MODULE_NAME}.py").write_text(MODULE)
    (folder / "tiny.toml").write_text(CONFIG.format(module=MODULE_NAME))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        result = invoke("run", folder / "tiny.toml", "--runs", folder / "runs")
        assert result.exit_code == 0, result.output
        (folder / "output.txt").write_text(result.stdout)
        yield folder
    sys.modules.pop(MODULE_NAME, None)


@pytest.fixture
def module(home: Path) -> ModuleType:
    return importlib.import_module(MODULE_NAME)


@pytest.fixture
def begun(home: Path, tmp_path: Path) -> Path:
    """The runs folder of a run that was stopped after two of its four rounds."""
    experiment = Experiment(load_config(home / "tiny.toml"))
    for _ in itertools.islice(run_rounds(experiment, tmp_path / "tiny"), 2):
        pass
    return tmp_path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def failed(*arguments: object, status: int = 1) -> str:
    """What a command that has to fail says."""
    result = invoke(*arguments)
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


def start(home: Path, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        cwd=home,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_rounds(journal: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while not journal.exists() or len(journal.read_text().splitlines()) < 1 + count:
        assert time.monotonic() < deadline, "the run did not get that far"
        time.sleep(0.02)


def assert_same_run(one: Path, other: Path) -> None:
    states = [folder / "state.safetensors" for folder in (one, other)]
    assert states[0].read_bytes() == states[1].read_bytes()
    journals = [(folder / "journal.jsonl").read_text().splitlines() for folder in (one, other)]
    lines = [[shared_fields(json.loads(line)) for line in journal] for journal in journals]
    assert lines[0] == lines[1]
    summaries = [shared_fields(json.loads((folder / "summary.json").read_text())) for folder in (one, other)]
    assert summaries[0] == summaries[1]


def test_a_mistyped_command_is_guessed_once() -> None:
    assert failed("paln", status=2).count("'plan'") == 1


def test_version_and_help() -> None:
    assert invoke("--version").stdout.startswith("scalefl ")
    assert all(command in invoke("--help").stdout for command in ("run", "plan", "bench", "report", "export"))


def test_help_comes_without_torch() -> None:
    program = "import sys, scalefl.cli; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_run_tells_what_it_did(home: Path) -> None:
    output = (home / "output.txt").read_text()
    first, *rest = output.splitlines()
    assert first == f"tiny: {MODULE_NAME}:make_model() by scalefl, 4 rounds"
    assert [line.split(",")[0] for line in rest if line.startswith("round ")] == [f"round {i}/4" for i in range(1, 5)]
    assert "\x1b" not in output
    assert "low-memory clients' data" in output
    base = json.loads((home / "runs" / "tiny" / "environment.json").read_text())["base_bytes"]
    assert base is None or re.search(rf"predicted peak of a client +base {base / 2**20:.0f} MiB \+ [0-9.]+ MiB", output)
    written = {path.name for path in (home / "runs" / "tiny").iterdir()}
    assert written == FILES | PICTURES
    assert all(str(home / "runs" / "tiny" / name) in output for name in written)


def test_the_engine_is_told_and_too_many_workers_are_a_warning(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scalefl.engines.trial.num_cores", lambda: 2)
    monkeypatch.setattr("scalefl.engines.trial.spare_bytes", lambda: 2**40)
    settings = ("--set", "rounds=1", "--set", "engine.threads=1")
    result = invoke("run", home / "tiny.toml", "--runs", tmp_path / "few", *settings)
    assert result.exit_code == 0 and not result.stderr, result.output
    assert "\nEngine: this process, 1 thread: the longest task takes " in result.stdout
    result = invoke("run", home / "tiny.toml", "--runs", tmp_path / "many", *settings, "--set", "engine.workers=5000")
    assert result.exit_code == 0, result.output
    reason = "5000 workers were asked for, and there is room for 2"
    assert result.stderr == f"warning: {reason}\n" and reason in result.stdout


def test_settings_from_the_command_line(home: Path, tmp_path: Path) -> None:
    settings = [word for text in ("rounds=1", "name=other", "method.name=sbt") for word in ("--set", text)]
    result = invoke("run", home / "tiny.toml", "--runs", tmp_path, *settings)
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "other" / "config.json").read_text())["config"]
    assert (config["rounds"], config["method"]["name"], config["seed"]) == (1, "sbt", 0)


def test_plan(home: Path) -> None:
    result = invoke("plan", home / "tiny.toml")
    assert result.exit_code == 0, result.output
    assert all(text in result.stdout for text in ("full training", "block 1", "block 2", "weak", "base"))


def test_plan_as_json(home: Path) -> None:
    found = json.loads(invoke("plan", home / "tiny.toml", "--json").stdout)
    assert [row["label"] for row in found["rows"]] == ["block 1 with tail", "block 2", "full"]
    assert [member["name"] for member in found["classes"]] == ["weak", "strong"]
    assert found["classes"][0]["budget_bytes"] == int(0.95 * found["full"]["peak_bytes"])
    assert found["base_bytes"] is None or 50e6 < found["base_bytes"] < 5e9


def test_plan_as_a_picture(home: Path, tmp_path: Path) -> None:
    for name, start in (("plan.png", b"\x89PNG"), ("new/plan.svg", b"<?xml")):
        result = invoke("plan", home / "tiny.toml", "--picture", tmp_path / name)
        assert result.exit_code == 0, result.output
        assert (tmp_path / name).read_bytes().startswith(start)
        assert "block 1" in result.stdout
    assert "name a file that ends in" in failed("plan", home / "tiny.toml", "--picture", tmp_path)
    assert "'doc' is not supported" in failed("plan", home / "tiny.toml", "--picture", tmp_path / "plan.doc")


def test_bench_of_a_run(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ("bench", home / "tiny.toml", "--set", "rounds=40", "--seconds", "0.1")
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    assert not result.stderr
    found = json.loads(result.stdout)
    run, forecast = found["run"], found["run"]["forecast"]
    assert run["name"] == "tiny" and run["round_seconds"]["rounds"] >= 2 and run["num_lost"] == 0
    assert found["environment"]["packages"]["torch"] and found["environment"]["cores"] >= 1
    assert forecast["rounds"] == 40 and forecast["evaluations"] == 41
    assert forecast["hours"] * 3600 >= 40 * forecast["round_seconds"] > 0
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert all(
        text in result.stdout for text in ("the whole run, predicted", "40 rounds", "41 evaluations", "Engine: ")
    )
    assert not list(tmp_path.iterdir())


def test_bench_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    one = replace(bench.WORKLOADS[0], examples=10, cohort=2)
    small = [one, replace(one, name="another", about="no loop does the same", compared=0)]
    monkeypatch.setattr(bench, "WORKLOADS", small)
    result = invoke("bench", "--seconds", "0.1", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [one["name"] for one in found["workloads"]] == [workload.name for workload in small]
    assert [one["overhead"] is None for one in found["workloads"]] == [False, True]
    assert all(one["samples_per_second"] > 0 for one in found["workloads"])
    result = invoke("bench", "--seconds", "0.1")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("This machine: ") and all(workload.about in _line(result) for workload in small)


def _line(result: Result) -> str:
    return " ".join(result.stdout.split())


def runs(process: str) -> bool:
    """Whether a process is there, and not only its entry, which waits for somebody to ask how it ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_ctrl_c_while_benching(home: Path) -> None:
    settings = ("engine.workers=1", "engine.threads=1")
    process = start(home, "bench", "tiny.toml", *(w for s in settings for w in ("--set", s)), "--json", NAP="0.5")
    children, deadline = Path(f"/proc/{process.pid}/task/{process.pid}/children"), time.monotonic() + 60
    while not (workers := children.read_text().split()):
        assert time.monotonic() < deadline, "no worker was started"
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    printed, said = process.communicate()
    assert process.returncode == 130
    assert said == "error: interrupted\n" and not printed
    # One that was just being started sees that nobody is there once it has imported torch.
    while any(map(runs, workers)):
        assert time.monotonic() < deadline, "a worker was left behind"
        time.sleep(0.02)


def test_report_of_one_run(home: Path, tmp_path: Path) -> None:
    result = invoke("report", home / "runs" / "tiny", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == PICTURES
    assert "test accuracy" in result.stdout


def test_report_of_several_runs(home: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(home / "runs" / "tiny", tmp_path / name)
    result = invoke("report", tmp_path / "a", tmp_path / "b")
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"comparison.md", "accuracy.png", "report.html"}


def test_export_loads_into_the_users_module(home: Path, module: ModuleType, tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    result = invoke("export", home / "runs" / "tiny", "-o", target)
    assert result.exit_code == 0, result.output
    model, content = module.make_model(), load_file(target)
    model.load_state_dict(content, strict=True)
    assert content.keys() == model.state_dict().keys()
    state = load_file(home / "runs" / "tiny" / "state.safetensors")
    assert content["2.0.weight"].equal(state["params/2.0.weight"])


def test_export_needs_no_data(home: Path, module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(module, "make_data")
    result = invoke("export", home / "runs" / "tiny", "-o", tmp_path / "model.safetensors")
    assert result.exit_code == 0, result.output
    module.make_model().load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)


def test_export_of_a_model_that_is_not_the_configured_one(
    home: Path, module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data say the classes and channels, the weakest client the width; the folder has kept both."""
    settings = ("rounds=1", "model=cnn", "evaluation.plane_cuts=1", "method={name='fedavg', population='all_small'}")
    options = [word for text in settings for word in ("--set", text)]
    result = invoke("run", home / "tiny.toml", "--runs", tmp_path, *options)
    assert result.exit_code == 0, result.output
    monkeypatch.delattr(module, "make_data")
    result = invoke("export", tmp_path / "tiny", "-o", tmp_path / "model.safetensors")
    assert result.exit_code == 0, result.output
    arguments = {name: float(value) for name, value in re.findall(r"(\w+)=([0-9.]+)", result.stdout)}
    width = arguments.pop("width")
    assert width < 1 and arguments == {"image_size": 8, "in_channels": 1, "num_classes": 3}
    user = cnn(num_classes=3, in_channels=1, image_size=8, width=width)
    user.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)


@pytest.mark.parametrize("spec", [ModelSpec.of(nn.ReLU), ModelSpec.of("torch.nn:Sequential", layers=nn.ReLU)])
def test_a_model_that_is_a_python_object_cannot_be_exported_from_a_folder(
    home: Path, tmp_path: Path, spec: ModelSpec
) -> None:
    shutil.copytree(home / "runs" / "tiny", tmp_path / "tiny")
    state = ServerState(spec, PAIR, {}, round=0, seed=0)
    save_state(tmp_path / "tiny" / "state.safetensors", state, (spec, {}))
    said = failed("export", tmp_path / "tiny", "-o", tmp_path / "model.safetensors")
    assert f"cannot say how to build {spec.name}" in said and "package.module:factory" in said


def test_deployed_tensors_that_are_not_the_states_own(tmp_path: Path) -> None:
    """As of a method that deploys an average over rounds: the folder keeps them beside the state's."""
    spec, weight = (
        ModelSpec.of("torch.nn:Linear", in_features=2, out_features=2),
        torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    )
    params = {"weight": weight, "bias": torch.ones(2), "@exit": torch.ones(1)}
    state = ServerState(spec, PAIR, params, round=1, seed=0)
    save_state(tmp_path / "state", state, (spec, {"weight": weight.T, "bias": params["bias"]}))
    model, deployed = load_deployed(tmp_path / "state")
    assert model == spec
    assert deployed.keys() == {"weight", "bias"} and deployed["weight"].equal(weight.T)
    assert identical(load_state(tmp_path / "state", spec, state.problem).params, params)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight


@pytest.mark.parametrize("model", [Tied, Tied()])
def test_export_has_every_name_of_a_tied_tensor(model: Any) -> None:
    spec = ModelSpec.of(model)
    content = state_dict(spec, tensors(spec.build(0)))
    Tied().load_state_dict(content, strict=True)
    assert content["a.weight"].equal(content["b.weight"])
    assert content["a.weight"].data_ptr() != content["b.weight"].data_ptr()


def test_a_killed_run_goes_on_exactly(home: Path, tmp_path: Path) -> None:
    command = ("run", "tiny.toml", "--runs", tmp_path)
    process = start(home, *command, NAP="0.1")
    wait_for_rounds(tmp_path / "tiny" / "journal.jsonl", 2)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "tiny" / "summary.json").exists()
    result = invoke("run", home / "tiny.toml", "--runs", tmp_path, "--resume")
    assert result.exit_code == 0, result.output
    assert_same_run(tmp_path / "tiny", home / "runs" / "tiny")


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")
def test_a_killed_run_goes_on_exactly_where_it_is_tracked(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tensorboard", "mlflow", "sqlalchemy", "alembic"):
        pytest.importorskip(name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    settings = ("rounds=7", "save_every=3", 'tracking=["tensorboard", "mlflow"]')
    command = ("run", home / "tiny.toml", "--runs", tmp_path, *(word for text in settings for word in ("--set", text)))
    folder = tmp_path / "tiny"
    process = start(home, *command, NAP="0.1")
    wait_for_rounds(folder / "journal.jsonl", 5)  # of which two are lost
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert {step for step, _ in in_tensorboard(folder)["flops"]} >= {1, 2, 3, 4}
    result = invoke(*command, "--resume")
    assert result.exit_code == 0, result.output
    assert "warning" not in result.stderr
    assert has_all(in_tensorboard(folder), folder)
    copy = in_mlflow(folder)
    assert [step for step, _ in copy["flops"]] == [1, 2, 3, 4, 5, 6, 7]
    done_twice = {"seconds"}  # and each time took other times
    assert has_all({**copy, **{name: in_tensorboard(folder)[name] for name in done_twice}}, folder)


def test_ctrl_c_tells_how_to_go_on(home: Path, tmp_path: Path) -> None:
    process = start(home, "run", "tiny.toml", "--set", "work.lr=0.1", "--runs", tmp_path, NAP="0.1")
    wait_for_rounds(tmp_path / "tiny" / "journal.jsonl", 2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in said
    assert f"finished rounds are saved in {tmp_path / 'tiny'}" in said
    assert said.splitlines()[-1].strip() == f"scalefl run tiny.toml --set work.lr=0.1 --runs {tmp_path} --resume"
    result = invoke("run", home / "tiny.toml", "--runs", tmp_path, "--resume")
    assert result.exit_code == 0, result.output
    assert_same_run(tmp_path / "tiny", home / "runs" / "tiny")


def test_a_full_disk_leaves_the_earlier_state(home: Path, begun: Path) -> None:
    state = begun / "tiny" / "state.safetensors"
    before = state.read_bytes()
    process = start(home, "run", "tiny.toml", "--runs", begun, "--resume", FILE_BYTES=str(len(before) - 1))
    _, said = process.communicate()
    assert process.returncode == 1, said
    assert said.startswith("error: cannot write")
    assert "what was saved before is intact" in said
    assert state.read_bytes() == before
    assert invoke("run", home / "tiny.toml", "--runs", begun, "--resume").exit_code == 0
    assert_same_run(begun / "tiny", home / "runs" / "tiny")


def test_the_installed_command_finds_modules_where_it_is_run(home: Path, tmp_path: Path) -> None:
    command = Path(sysconfig.get_path("scripts")) / "scalefl"
    done = subprocess.run(
        [command, "plan", "tiny.toml", "--set", "model_arguments.depth=3"], cwd=home, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == "error: model make_model: got an unexpected keyword argument 'depth'\n"


def test_a_finished_run_is_not_run_again(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "runs" / "tiny", tmp_path / "tiny")
    result = invoke("run", home / "tiny.toml", "--runs", tmp_path, "--resume")
    assert result.exit_code == 0, result.output
    assert "round " not in result.stdout.splitlines()[1]
    assert_same_run(tmp_path / "tiny", home / "runs" / "tiny")


def test_an_earlier_run_is_in_the_way(home: Path, begun: Path) -> None:
    assert "is not empty" in failed("run", home / "tiny.toml", "--runs", begun)
    result = invoke("run", home / "tiny.toml", "--runs", begun, "--overwrite")
    assert result.exit_code == 0, result.output
    assert_same_run(begun / "tiny", home / "runs" / "tiny")


def test_overwrite_removes_nothing_but_runs(home: Path, tmp_path: Path) -> None:
    thesis = tmp_path / "tiny" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.touch()
    assert "more than a run" in failed("run", home / "tiny.toml", "--runs", tmp_path, "--overwrite")
    assert thesis.exists()


def test_overwrite_with_a_bad_config_keeps_the_earlier_run(
    home: Path, begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed("run", home / "tiny.toml", "--runs", begun, "--overwrite", "--set", "model=nowhere:model")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    said = failed("run", home / "tiny.toml", "--runs", begun, "--overwrite", "--set", 'tracking=["mlflow"]')
    assert 'pip install "scalefl[mlflow]"' in said
    assert (begun / "tiny" / "state.safetensors").exists()


def test_another_runs_folder_cannot_be_resumed(home: Path, begun: Path) -> None:
    said = failed("run", home / "tiny.toml", "--runs", begun, "--resume", "--set", "seed=7")
    assert "seed" in said and "resume with its own config" in said


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("work.epoch=3", "unknown key 'work.epoch': did you mean 'epochs'?"),
        ("work.lr=fast", "work.lr"),
        ("rounds=0", "rounds = 0: expected at least 1"),
        ("model=nowhere:model", "cannot import 'nowhere'"),
        ("method.name=fedavgg", "did you mean 'fedavg'?"),
        ("nonsense", "expected key=value"),
        ("work..lr=1", "expected key=value"),
        ("method.name=fedprox", "no method 'fedprox': it is a setting of all methods, work.prox = μ"),
        ("method.name=FedAdam", 'server = { kind = "fedadam" }'),
        ("method.name=fedyogi", "it is not there; server optimizers here are method.server.kind ="),
        ("method.name=SCAFFOLD", "it is not there"),
        ("method.name=FedAVG", "did you mean 'fedavg'?"),
        ("method.server=fedadam", "method.server = 'fedadam': expected a table, as server = { kind = \"fedadam\" }"),
        ("work.optimizer=adam", "unknown key 'work.optimizer': clients train by SGD with momentum"),
        ("work.mu=0.1", "unknown key 'work.mu': it is work.prox"),
        ("epochs=3", "unknown key 'epochs': did you mean 'work.epochs'?"),
        ("model_arguments={width=inf}", "model_arguments.width = inf: expected a finite number"),
    ],
)
def test_bad_settings(home: Path, tmp_path: Path, setting: str, message: str) -> None:
    assert message in failed("run", home / "tiny.toml", "--runs", tmp_path, "--set", setting)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        ("", (), "{file} is empty: a config has model, rounds, data and devices at least"),
        ("seed = 1", ("rounds=3",), "{file}: Object missing required field `model`"),
        ("epoch = 1", (), "{file}: unknown key 'epoch'"),
        ("rounds = ", (), "{file}: Invalid value"),
        (CONFIG, ("rounds=3", "work.epoch=3", "seed=2"), "--set 'work.epoch=3': unknown key 'work.epoch'"),
        (CONFIG, ("rounds=0",), "--set 'rounds=0': rounds = 0: expected at least 1"),
        (CONFIG, ("rounds=0", "rounds=3", "seed=x"), "--set 'seed=x': Expected `int`"),
        (CONFIG, ("rounds=5", "name=a", "work.lr_rounds=4"), "--set 'work.lr_rounds=4': work.lr_rounds = 4 is shorter"),
        (CONFIG, ("rounds.x=5",), "--set 'rounds.x=5': rounds is not a table"),
    ],
)
def test_errors_say_whether_the_file_or_a_setting_is_wrong(
    tmp_path: Path, content: str, settings: tuple[str, ...], message: str
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(content.format(module=MODULE_NAME))
    said = failed("plan", file, *(word for text in settings for word in ("--set", text)))
    assert said.startswith("error: " + message.format(file=file))


def test_a_setting_of_another_version_names_the_runs_file(home: Path, begun: Path) -> None:
    file = begun / "tiny" / "config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "config": {**content["config"], "epochs": 3}}))
    assert f"{file}: unknown key 'epochs'" in failed("run", home / "tiny.toml", "--runs", begun, "--resume")


@pytest.mark.parametrize("command", ["run", "plan", "bench"])
def test_a_missing_config(command: str, tmp_path: Path) -> None:
    assert (
        failed(command, tmp_path / "none.toml")
        == f"error: cannot read {tmp_path / 'none.toml'}: No such file or directory"
    )


def test_what_is_no_run(tmp_path: Path) -> None:
    for command in ("export", "report"):
        assert "not the folder of a run" in failed(command, tmp_path / "none")


def test_a_damaged_state(home: Path, begun: Path) -> None:
    state = begun / "tiny" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    assert "truncated" in failed("run", home / "tiny.toml", "--runs", begun, "--resume")
    assert "truncated" in failed("export", begun / "tiny", "-o", begun / "model.safetensors")
    assert not (begun / "model.safetensors").exists()


def test_a_newer_format(home: Path, begun: Path) -> None:
    file = begun / "tiny" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 99}))
    for arguments in (("run", home / "tiny.toml", "--runs", begun, "--resume"), ("report", begun / "tiny")):
        assert "format version 99" in failed(*arguments)


def test_an_unwritable_place(home: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "Not a directory" in failed("run", home / "tiny.toml", "--runs", tmp_path / "file")
    assert "Not a directory" in failed("report", home / "runs" / "tiny", "--out", tmp_path / "file" / "out")


def test_a_bug_in_a_users_data_is_one_line_unless_debugging(home: Path) -> None:
    arguments = ("plan", home / "tiny.toml", "--set", f"data.source.name={MODULE_NAME}:broken_data")
    assert "broken_data: the function fails with ZeroDivisionError: my own (edge_module.py, line" in failed(*arguments)
    result = invoke("--debug", *arguments)
    assert result.exit_code == 1
    assert "Traceback" in result.stderr


def test_a_model_that_does_not_train_is_told_before_the_first_round_and_debugging_shows_where(
    home: Path, tmp_path: Path
) -> None:
    settings = (f"model={MODULE_NAME}:moody", "method={name='fedavg', population='all'}")
    arguments = ("run", home / "tiny.toml", *(word for text in settings for word in ("--set", text)))
    said = failed(*arguments, "--runs", tmp_path / "quiet")
    assert "model moody does not run on an example batch of the data: ArithmeticError: not today" in said
    result = invoke("--debug", *arguments, "--runs", tmp_path / "debug")
    assert result.exit_code == 1
    assert f'{MODULE_NAME}.py", line' in result.stderr and 'raise ArithmeticError("not today")' in result.stderr
    assert not list(tmp_path.rglob("journal.jsonl"))
    assert not logging.getLogger("scalefl").handlers


@pytest.mark.parametrize(
    "arguments",
    [
        ("walk",),
        ("run",),
        ("run", "a.toml", "--rounds", "3"),
        ("run", "a.toml", "--resume", "--overwrite"),
        ("bench", "--seconds", "0"),
        ("bench", "--seconds", "nan"),
        ("bench", "--seconds", "inf"),
        ("bench", "--set", "rounds=3"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    failed(*arguments, status=2)
