"""Where configs, modules, data and run folders may lie, and what users' modules may do."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_cli import CONFIG, MODULE, PROGRAM, failed, invoke, start

from scalefl import lookup
from scalefl.experiment import Experiment

QUICK = ("--set", "rounds=1", "--set", "engine={workers=0, threads=1}", "--set", "method={name='fedavg'}")

_numbers = itertools.count()


@pytest.fixture(autouse=True)
def as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a config's folder leaves behind goes with the test."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(lookup, "_folders", [])
    before = set(sys.modules)
    yield
    forget(before)


def forget(before: set[str]) -> None:
    for name in set(sys.modules) - before:
        if name.startswith("placed_"):
            del sys.modules[name]


@pytest.fixture
def module() -> str:
    """A name that no other test's module has."""
    return f"placed_{next(_numbers)}"


@pytest.fixture
def project(tmp_path: Path, module: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder above that of the config and its module; the command is given there, as main() has it on the path."""
    home = tmp_path / "project"
    (home / "conf").mkdir(parents=True)
    (home / "conf" / f"{module}.py").write_text(MODULE)
    (home / "conf" / "tiny.toml").write_text(CONFIG.format(module=module))
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(str(home))
    return home


def test_what_lies_beside_the_config_comes_before_what_lies_here(project: Path, module: str) -> None:
    """In worker processes too, whose own first place is the working directory."""
    (project / f"{module}.py").write_text("raise ValueError('the wrong one')")
    result = invoke("run", "conf/tiny.toml", *QUICK, "--set", "engine.workers=1", "--set", "engine.threads=1")
    assert result.exit_code == 0, result.output
    assert json.loads((project / "runs" / "tiny" / "summary.json").read_text())["num_clients_lost"] == 0


def test_what_lies_here_is_found_where_there_is_none_beside_the_config(project: Path, module: str) -> None:
    (project / "conf" / f"{module}.py").rename(project / f"{module}.py")
    result = invoke("plan", "conf/tiny.toml", *QUICK)
    assert result.exit_code == 0, result.output


def test_another_folder_can_be_named(project: Path, module: str) -> None:
    (project / "src").mkdir()
    (project / "conf" / f"{module}.py").rename(project / "src" / f"{module}.py")
    assert invoke("plan", "conf/tiny.toml", *QUICK).exit_code == 1
    assert invoke("plan", "conf/tiny.toml", *QUICK, "--set", "folder=src").exit_code == 0
    config = project / "conf" / "tiny.toml"
    config.write_text('folder = "../src"\n' + config.read_text())
    assert invoke("plan", "conf/tiny.toml", *QUICK).exit_code == 0
    said = failed("plan", "conf/tiny.toml", *QUICK, "--set", "folder=nowhere")
    assert "folder = 'nowhere': there is no such folder" in said


def test_data_beside_the_config(project: Path, module: str) -> None:
    import pyarrow
    import pyarrow.parquet

    folder = project / "conf" / "data" / "vectors"
    folder.mkdir(parents=True)
    labels = [i % 3 for i in range(90)]
    table = pyarrow.table({"x": [[float(label)] * 64 for label in labels], "label": labels})
    pyarrow.parquet.write_table(table, folder / "train.parquet")
    source = ("--set", "data.source={name='data/vectors', columns=['x']}", "--set", "data.clients=3")
    model = ("--set", "model=torch.nn:Linear", "--set", "model_arguments={in_features=64, out_features=3}")
    result = invoke(
        "run", "conf/tiny.toml", *QUICK, *source, *model, "--set", "method={name='fedavg',population='all'}"
    )
    assert result.exit_code == 0, result.output
    config = json.loads((project / "runs" / "tiny" / "config.json").read_text())["config"]
    assert config["data"]["source"]["name"] == "data/vectors", "not where it lay on this machine"
    source = ("--set", "data.source={name='./data/vectorz', columns=['x']}")
    said = failed("plan", "conf/tiny.toml", *QUICK, *source)
    assert "no folder data/vectorz" in said and f"nor is it beside the config, in {project / 'conf'}" in said


def test_a_run_is_found_its_module_from_elsewhere_and_when_all_has_been_moved(
    project: Path, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(sys.modules)
    assert invoke("run", "conf/tiny.toml", *QUICK, "--runs", project / "runs").exit_code == 0
    path = sys.path[:]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)

    def exported(run: Path) -> str:
        forget(before)
        sys.path[:] = [entry for entry in path if not entry.startswith(str(tmp_path))]
        lookup._folders.clear()
        result = invoke("export", run, "-o", "model.safetensors")
        assert result.exit_code == 0, result.output
        return str(Path(sys.modules[module].__file__ or "").parent)

    assert exported(project / "runs" / "tiny") == str(project / "conf")
    shutil.move(project / "runs" / "tiny", tmp_path / "kept")
    assert exported(tmp_path / "kept") == str(project / "conf")
    shutil.move(tmp_path / "kept", project / "runs" / "tiny")
    shutil.move(project, tmp_path / "moved")
    assert exported(tmp_path / "moved" / "runs" / "tiny") == str(tmp_path / "moved" / "conf")
    forget(before)
    result = invoke("run", tmp_path / "moved/runs/tiny/config.json", "--runs", tmp_path / "moved/runs", "--resume")
    assert result.exit_code == 0, result.output


def test_a_comparison_beside_its_module(project: Path) -> None:
    config = project / "conf" / "tiny.toml"
    config.write_text(config.read_text() + "\n[compare]\nseeds = [0]\n\n[variants.a]\nrounds = 1\n")
    result = invoke("compare", "conf/tiny.toml", "--set", "method={name='fedavg', population='all'}")
    assert result.exit_code == 0, result.output
    assert (project / "runs" / "tiny" / "a-0" / "summary.json").exists()
    assert "is a comparison: scalefl compare conf/tiny.toml" in failed("run", "conf/tiny.toml")


def test_a_config_of_one_run_is_no_comparison(project: Path) -> None:
    assert "is no comparison, as it has no [variants]: scalefl run conf/tiny.toml" in failed(
        "compare", "conf/tiny.toml"
    )


def test_a_module_that_is_nowhere(project: Path, module: str) -> None:
    said = failed("plan", "conf/tiny.toml", *QUICK, "--set", f"model={module[:-1]}:make_model")
    assert f"looked beside the config ({project / 'conf'}), in the working directory ({project}), among" in said
    assert f"did you mean '{module}'?" in said
    assert "did you mean 'make_model'?" in failed(
        "plan", "conf/tiny.toml", *QUICK, "--set", f"model={module}:make_modl"
    )


def test_a_module_whose_name_is_taken(project: Path) -> None:
    (project / "conf" / "statistics.py").write_text(MODULE)
    import statistics

    said = failed("plan", "conf/tiny.toml", *QUICK, "--set", "model=statistics:make_model")
    assert f"{project / 'conf' / 'statistics.py'} lies beside the config" in said
    assert f"{statistics.__file__} has been imported under that name: give yours another name" in said


def test_files_that_are_called_as_pythons_own_modules_are_no_matter(project: Path) -> None:
    for name in ("queue", "types", "random"):
        (project / "conf" / f"{name}.py").write_text("raise ValueError('the wrong one')")
        (project / f"{name}.py").write_text("raise ValueError('the wrong one')")
    result = invoke("run", "conf/tiny.toml", *QUICK, "--set", "engine.workers=1")
    assert result.exit_code == 0, result.output
    assert json.loads((project / "runs" / "tiny" / "summary.json").read_text())["num_clients_lost"] == 0


def test_a_config_of_the_same_name_elsewhere_is_not_mixed_up(project: Path, module: str) -> None:
    """One process, two projects whose modules have the same name: refused rather than taken for one another."""
    other = project / "other"
    shutil.copytree(project / "conf", other)
    assert invoke("plan", "conf/tiny.toml", *QUICK).exit_code == 0
    said = failed("plan", "other/tiny.toml", *QUICK)
    assert f"{other / module}.py lies beside the config, but {project / 'conf' / module}.py has been imported" in said


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("import sys; sys.exit(3)", "it ends the program (SystemExit: 3): put what parses arguments or runs under"),
        ("import not_there_at_all", "No module named 'not_there_at_all': it needs that one, which is not installed"),
        ("1 / 0", "ZeroDivisionError: division by zero ({module}.py, line 1)"),
        ("x = (", "SyntaxError: '(' was never closed"),
    ],
)
def test_a_module_that_fails_while_it_is_imported(project: Path, module: str, line: str, message: str) -> None:
    path = project / "conf" / f"{module}.py"
    path.write_text(f"{line}\n{MODULE}")
    said = failed("run", "conf/tiny.toml", *QUICK)
    assert f"cannot import '{module}' for '{module}:make_" in said and message.format(module=module) in said
    assert not (project / "runs").exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import not_there_at_all", "No module named 'not_there_at_all': it needs that one, which is not installed"),
        ("import sys; sys.exit('no GPU')", "it ends the program (SystemExit: no GPU)"),
        ("raise KeyError('width')", "KeyError: 'width' ({module}.py, line"),
        ("open('weights.bin')", "a relative path of your code is looked for in the working directory, {project}"),
        ("raise RuntimeError('bad\\nweights')", "RuntimeError: bad ({module}.py, line"),
    ],
)
def test_a_factory_that_fails_is_named(project: Path, module: str, body: str, message: str) -> None:
    """Not taken for a model that does not run, nor for a fault of the data."""
    path = project / "conf" / f"{module}.py"
    path.write_text(f"{MODULE}\ndef broken():\n    {body}\n")
    said = failed("plan", "conf/tiny.toml", *QUICK, "--set", f"model={module}:broken")
    assert said.startswith("error: model broken: its factory fails with ")
    assert message.format(module=module, project=project) in said


def test_a_module_that_reads_arguments_and_prints(project: Path, module: str) -> None:
    """It gets none, and what it says does not get into what programs read."""
    path = project / "conf" / f"{module}.py"
    path.write_text(
        "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument('--depth', default=2)\n"
        f"depth = parser.parse_args().depth\nprint('hello from', depth)\n{MODULE}"
    )
    arguments = ("bench", "conf/tiny.toml", *QUICK, "--set", "engine.workers=1", "--json", "--seconds", "0.1")
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["run"]["num_lost"] == 0
    assert "hello from 2" in done.stderr


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_config_as_other_editors_save_it(project: Path, encoding: str) -> None:
    config = project / "conf" / "tiny.toml"
    content = config.read_text().replace("rounds = 4", "rounds\t=\t4\t# größer").replace("\n", "\r\n")
    config.write_bytes(content.encode(encoding))
    result = invoke("plan", "conf/tiny.toml", *QUICK)
    assert result.exit_code == 0, result.output


def test_what_is_no_config(project: Path) -> None:
    assert f"conf is a folder: name the file, as {Path('conf/tiny.toml')}" in failed("plan", "conf")
    assert "did you mean 'conf/tiny.toml'?" in failed("plan", "conf/tinny.toml")
    (project / "latin.toml").write_bytes("name = 'Zürich'".encode("latin-1"))
    assert "save it as UTF-8" in failed("plan", "latin.toml")
    (project / "empty.toml").write_text("# nothing\n")
    assert "empty.toml is empty: a config has model, rounds, data and devices at least" in failed("plan", "empty.toml")


@pytest.mark.parametrize("target_exists", [True, False])
def test_a_run_folder_that_is_a_link(project: Path, tmp_path: Path, target_exists: bool) -> None:
    scratch, link = tmp_path / "scratch" / "tiny", project / "runs" / "tiny"
    link.parent.mkdir()
    link.symlink_to(scratch)
    if target_exists:
        scratch.mkdir(parents=True)
    for _ in range(2):
        result = invoke("run", "conf/tiny.toml", *QUICK, "--overwrite")
        assert result.exit_code == 0, result.output
        assert link.is_symlink() and (scratch / "summary.json").exists()


def test_a_run_that_nobody_watches_to_its_end_goes_on(project: Path) -> None:
    """As in `scalefl run … | head -1`."""
    settings = ("--set", "engine={workers=0, threads=1}")
    with start(project, "run", "conf/tiny.toml", *settings, NAP="0.05") as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith("tiny: ")
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 0 and not said
    assert json.loads((project / "runs" / "tiny" / "summary.json").read_text())["rounds"] == 4


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense"])
def test_a_notebooks_backend_is_no_matter(backend: str) -> None:
    program = "import os, scalefl.report.comparison; print(os.environ['MPLBACKEND'])"
    environment = {**os.environ, "MPLBACKEND": backend}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == backend, done.stderr


def test_a_folder_in_the_way_is_told_before_anything_is_planned(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "runs" / "tiny").mkdir(parents=True)
    (project / "runs" / "tiny" / "thesis.tex").touch()
    monkeypatch.setattr(Experiment, "__init__", None)
    assert "is not empty" in failed("run", "conf/tiny.toml")
    assert "more than a run" in failed("run", "conf/tiny.toml", "--overwrite")
    (project / "runs" / "tiny" / "thesis.tex").unlink()
    (project / "runs" / "tiny").rmdir()
    (project / "runs" / "tiny").touch()
    assert "Not a directory" in failed("run", "conf/tiny.toml")


def test_a_device_that_is_not_there_is_no_plan(project: Path) -> None:
    assert "expected 'cpu', 'cuda' or 'cuda:1'" in failed("plan", "conf/tiny.toml", "--set", "engine.device=gpu")


def test_what_is_under_way_is_shown_on_terminals(project: Path, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = project / "conf" / f"{module}.py"
    path.write_text(MODULE.replace("def make_data():", "def make_data():\n    time.sleep(0.6)"))
    monkeypatch.setenv("FORCE_COLOR", "1")
    result = invoke("plan", "conf/tiny.toml", *QUICK)
    assert result.exit_code == 0, result.output
    assert f"loading the data: {module}:make_data" in result.stderr


@pytest.mark.parametrize("name", ["model.pt", "new/model.PTH", "model.safetensors"])
def test_exports_are_what_their_names_say(project: Path, module: str, name: str) -> None:
    assert invoke("run", "conf/tiny.toml", *QUICK).exit_code == 0
    result = invoke("export", "runs/tiny", "-o", name)
    assert result.exit_code == 0, result.output
    read = load_file(name) if name.endswith("safetensors") else torch.load(name, weights_only=True)
    sys.modules[module].make_model().load_state_dict(read, strict=True)
    state = load_file(project / "runs" / "tiny" / "state.safetensors")
    assert read["2.0.weight"].equal(state["params/2.0.weight"])


@pytest.mark.parametrize("name", ["model.onnx", "model"])
def test_exports_of_another_kind_are_refused_at_once(project: Path, name: str) -> None:
    assert "name a file that ends in .safetensors, .pt, .pth" in failed("export", "runs/none", "-o", name)
