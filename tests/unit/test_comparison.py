"""Comparisons: many runs from one file, side by side, in one table."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from made_up import write_comparison
from scalefl.cli import app
from scalefl.comparison import Comparison, load_comparison
from scalefl.errors import ConfigError
from scalefl.report.comparison import (
    all_figures,
    budget_curves,
    budgets_picture,
    curves_picture,
    figures,
    mean_curves,
    read_results,
    tables,
    target_of,
    write,
)
from scalefl.report.tables import NOTHING
from scalefl.run_folder import RunFolder

CLASS = '{{ name = "all", share = 1.0, memory = "{}", flops_per_second = 1e9, bandwidth_bytes_per_second = 1e6 }}'
BASE = f"""
name = "both"
model = "support:tiny"
rounds = 2
clients_per_round = 2
data = {{ source = {{ name = "test_experiment:make_data" }} }}
devices = {{ classes = [{CLASS.format("200%")}] }}
work = {{ batch_size = 8 }}

[compare]
seeds = [3, 5]

[variants.fedavg]
method = {{ name = "fedavg" }}

[variants.own-blocks]
method = {{ name = "fedepth", blocks = 2 }}
"""
SCENARIOS = f"""
[scenarios.generous]
[scenarios.tight]
devices = {{ classes = [{CLASS.format("105%")}] }}
"""
EVERYBODY = """
[variants.everybody]
method = { name = "fedavg", population = "all" }
run_once_in = "tight"
"""
OTHER_DATA = """
[scenarios.skewed]
data = { source = { name = "test_experiment:make_data" }, validation = 0.2 }
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "both.toml"
    path.write_text(text)
    return path


def loaded(folder: Path, text: str = BASE, *overrides: str) -> Comparison:
    return load_comparison(written(folder, text), overrides, runs=folder / "runs")


def test_every_variant_runs_with_every_seed_in_every_scenario(tmp_path):
    comparison = loaded(tmp_path, BASE + SCENARIOS)
    jobs = [(job.seed, job.scenario, job.variant) for job in comparison.jobs]
    assert jobs == [
        (seed, scenario, variant)
        for seed in (3, 5)
        for scenario in ("generous", "tight")
        for variant in ("fedavg", "own-blocks")
    ]
    for job in comparison.jobs:
        assert job.config.seed == job.seed
        assert job.config.name == f"{job.variant}-{job.seed}"
        assert job.folder == tmp_path / "runs" / "both" / job.scenario / job.config.name
        assert job.config.method["name"] == {"fedavg": "fedavg", "own-blocks": "fedepth"}[job.variant]
        assert job.config.devices.classes[0].memory == {"generous": "200%", "tight": "105%"}[job.scenario]
    assert {job.scenario for job in loaded(tmp_path).jobs} == {""}
    assert [job.config.rounds for job in loaded(tmp_path, BASE, "rounds=7").jobs] == [7] * 4
    assert len(loaded(tmp_path, BASE, "compare.seeds=[1]").jobs) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BASE.partition("[variants")[0], "a comparison needs variants"),
        (BASE.replace("blocks = 2", "blokcs = 2"), r"variant 'own-blocks': unknown key 'method.blokcs': did you mean"),
        (BASE + SCENARIOS.replace("105%", "90 parsecs"), "variant 'fedavg' in scenario 'tight': .*90 parsecs"),
        (BASE.replace("[variants.own-blocks]", '[variants."../up"]'), r"variants.'../up': expected a name"),
        (BASE.replace("seeds = [3, 5]", "seeds = [3, 3]"), "expected different numbers"),
        (BASE.replace("seeds = [3, 5]", "seeds = []"), "one at least"),
        (BASE.replace("seeds", "sedes"), "unknown key 'compare.sedes': did you mean 'seeds'"),
        (BASE.replace("seeds = [3, 5]", "target_accuracy = nan"), "compare.target_accuracy = nan"),
        (
            BASE + SCENARIOS + EVERYBODY.replace("tight", "tigth"),
            "everybody.run_once_in = 'tigth': did you mean 'tight'",
        ),
        (BASE + SCENARIOS + EVERYBODY.replace('"tight"', "3"), "run_once_in = 3; known: generous, tight"),
        (BASE + EVERYBODY, "variants.everybody.run_once_in = 'tight'; there are no scenarios"),
        (BASE + SCENARIOS + OTHER_DATA + EVERYBODY, "scenario 'skewed' differs from it in data, not in devices alone"),
        ("variants = 3\n" + BASE.partition("[variants")[0], "variants: expected tables"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(tmp_path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path, text)
    assert not (tmp_path / "runs").exists()


def test_finished_runs_are_not_run_again_and_broken_ones_go_on(tmp_path):
    comparison = loaded(tmp_path)
    comparison.describe()
    ended = list(comparison.run(2))
    assert {end.job.folder for end in ended} == {job.folder for job in comparison.jobs}
    assert not any(end.error for end in ended)
    assert sorted(path.name for path in comparison.path.iterdir()) == [
        "comparison.json",
        *(f"{variant}-{seed}" for variant in ("fedavg", "own-blocks") for seed in (3, 5)),
    ]
    states = {job.folder: (job.folder / "state.safetensors").read_bytes() for job in comparison.jobs}

    broken = RunFolder(comparison.jobs[1].folder)
    broken.summary.unlink()
    kept = RunFolder(comparison.jobs[0].folder).summary
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "mark": 1}))
    again = list(comparison.run())
    assert not any(end.error for end in again)
    assert [end.job.folder for end in again if not end.before] == [broken.path]
    assert "mark" in json.loads(kept.read_text())
    assert broken.summary.exists()
    assert {job.folder: (job.folder / "state.safetensors").read_bytes() for job in comparison.jobs} == states


def test_a_finished_run_of_another_config_is_not_taken_for_this_one(tmp_path):
    first = loaded(tmp_path, BASE, "compare.seeds=[3]")
    assert not any(end.error for end in first.run())
    changed = loaded(tmp_path, BASE, "compare.seeds=[3]", "work.lr=0.2")
    ended = list(changed.run())
    assert all("holds a run whose work differ" in end.error for end in ended)
    assert not any(end.error for end in loaded(tmp_path, BASE, "compare.seeds=[3]", "engine.workers=1").run())


def test_a_variant_can_run_in_one_scenario_for_all(tmp_path):
    text, one_seed = BASE + SCENARIOS + EVERYBODY, "compare.seeds=[3]"
    comparison = loaded(tmp_path, text, one_seed)
    assert [(job.scenario, job.variant) for job in comparison.jobs] == [
        ("generous", "fedavg"),
        ("generous", "own-blocks"),
        ("tight", "fedavg"),
        ("tight", "own-blocks"),
        ("tight", "everybody"),
    ]
    comparison.describe()
    assert not any(end.error for end in comparison.run(2))
    assert not (comparison.path / "generous" / "everybody-3").exists()
    assert all(end.before and not end.error for end in loaded(tmp_path, text, one_seed).run())

    done = CliRunner().invoke(app, ["report", str(comparison.path), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.stderr
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert page.count("| everybody | 1 |") == 4
    assert page.count("Run in tight alone, and the same in each scenario: everybody.") == 2
    with (tmp_path / "out" / "comparison.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["variant"] == "everybody"]
    assert [row["scenario"] for row in rows] == ["generous", "tight"]
    assert rows[0]["test"] == rows[1]["test"] != ""
    results = read_results(comparison.path)
    assert mean_curves(results, "generous")["everybody"] == mean_curves(results, "tight")["everybody"]

    # What it stands for: without the key it runs there, to the same result; with it again, that run is let alone.
    everywhere = text.replace('run_once_in = "tight"', "")
    ended = list(loaded(tmp_path, everywhere, one_seed).run())
    (own,) = [end.job for end in ended if not end.before]
    assert own.folder == comparison.path / "generous" / "everybody-3"
    states = [(comparison.path / s / "everybody-3" / "state.safetensors").read_bytes() for s in ("generous", "tight")]
    assert states[0] == states[1]
    assert all(end.before and not end.error for end in loaded(tmp_path, text, one_seed).run())


def test_a_run_that_stands_in_all_scenarios_has_the_budget_of_each(tmp_path):
    scenarios = ["generous", "tight", "new"]
    missing = [("tight", "fedavg", seed) for seed in (0, 1, 2)]
    missing += [("new", variant, seed) for variant in ("fedavg", "scalefl") for seed in (0, 1, 2)]
    folder = write_comparison(tmp_path / "grid", scenarios=scenarios, unfinished=[*missing, ("generous", "fedavg", 2)])
    head = RunFolder(folder).comparison
    assert read_results(folder).num_missing == 10  # as an earlier version has left it
    assert [point.scenario for point in budget_curves(read_results(folder))["fedavg"]] == ["generous"]

    head.write_text(json.dumps({**json.loads(head.read_text()), "run_once": {"fedavg": "generous"}}))
    results = read_results(folder)
    assert (results.num_runs, results.num_missing) == (12, 4)
    curves = budget_curves(results)
    budgets = {variant: [(point.scenario, point.budget) for point in points] for variant, points in curves.items()}
    assert budgets["scalefl"] == [("tight", pytest.approx(60)), ("generous", pytest.approx(90))]
    assert budgets["fedavg"] == budgets["scalefl"]  # nothing tells the budget of `new` yet
    assert len({point.mean for point in curves["fedavg"]}) == 1
    assert {point.num_seeds for point in curves["fedavg"]} == {2}
    assert "8 of 12 finished" in write(results, tmp_path / "out")[-1].read_text()


def test_what_runs_warn_of_is_shown(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://")
    path = written(tmp_path, BASE.replace("seeds = [3, 5]", "seeds = [3]").partition("[variants.own-blocks]")[0])
    command = ["compare", str(path), "--runs", str(tmp_path / "runs"), "--set", 'tracking=["mlflow"]']
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "  warning: tracking: cannot write to mlflow (" in done.stdout
    assert f"lacks some of {tmp_path / 'runs' / 'both' / 'fedavg-3'}" in done.stdout


@pytest.fixture
def two_cores() -> Iterator[None]:
    """Programs that are started have two cores at most."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:2])
    yield
    os.sched_setaffinity(0, cores)


@pytest.mark.usefixtures("two_cores")
def test_too_many_workers_are_a_warning_which_is_no_part_of_an_error(tmp_path):
    impossible = f"[variants.impossible]\ndevices = {{ classes = [{CLASS.format('1KiB')}] }}\n"
    text = BASE.partition("[variants.own-blocks]")[0] + impossible
    asked = loaded(tmp_path, text, "compare.seeds=[3]", "engine.workers=5000")
    good, bad = asked.jobs
    ended = {end.job.folder: end for end in asked.run()}
    assert not ended[good.folder].error and ended[bad.folder].error.startswith("error: ")
    assert "the largest budget on offer" in ended[bad.folder].error
    for end in ended.values():
        (warning,) = end.warnings
        assert warning.startswith("warning: 5000 workers were asked for, and there is room for ")


def test_a_run_that_fails_stops_no_other(tmp_path):
    impossible = f"[variants.impossible]\ndevices = {{ classes = [{CLASS.format('1KiB')}] }}\n"
    path = written(tmp_path, BASE.replace("seeds = [3, 5]", "seeds = [3]") + impossible)
    done = CliRunner().invoke(app, ["compare", str(path), "--runs", str(tmp_path / "runs")])
    assert done.exit_code == 1
    assert "1 of 3 runs failed" in done.stderr
    assert "impossible-3: " in done.stderr and "the largest budget on offer is" in done.stderr
    assert "1 runs of the comparison are not finished" in done.stdout
    (row,) = [line for line in (tmp_path / "runs/both/comparison.md").read_text().splitlines() if "impossible" in line][
        :1
    ]
    assert set(row.replace("impossible", "").replace(" ", "")) <= {"|", "0", NOTHING}


def test_an_interruption_stops_the_runs_and_loses_nothing(tmp_path):
    path = written(tmp_path, BASE)
    # With SIGINT as a terminal has it: a shell's background jobs ignore it, and so do their children.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\nfrom scalefl.cli import main; main()"
    )
    command = [sys.executable, "-c", program, "compare", str(path), "--runs", str(tmp_path / "runs")]
    command += ["--parallel", "1", "--set", "rounds=100000"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    journal = tmp_path / "runs" / "both" / "fedavg-3" / "journal.jsonl"
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 120
        while not (journal.exists() and len(journal.read_text().splitlines()) > 3):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in said
    with RunFolder(journal.parent).locked():  # whoever ran there is gone
        rounds = len(RunFolder(journal.parent).read_journal())
    assert rounds > 3
    assert not (journal.parent / "summary.json").exists()


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    comparison = loaded(folder, BASE + SCENARIOS)
    comparison.describe()
    assert not any(end.error for end in comparison.run(2))
    return comparison.path


def test_the_figures_are_those_of_the_runs(done: Path) -> None:
    results = read_results(done)
    assert results.num_missing == 0
    run = results.runs["tight"]["fedavg"][5]
    summary: dict[str, Any] = json.loads((done / "tight" / "fedavg-5" / "summary.json").read_text())
    journal = RunFolder(done / "tight" / "fedavg-5").read_journal()
    accuracies = [line["validation"]["accuracy"] for line in journal]
    seconds = [0.0, journal[1]["simulated_seconds"], journal[1]["simulated_seconds"] + journal[2]["simulated_seconds"]]

    found = figures(run, accuracies[2], journal[1]["flops"])
    assert found["test"] == summary["test"]["accuracy"]
    assert found["p10"] == summary["client_test"]["accuracy_p10"]
    assert found["seconds_to_target"] == next(s for s, a in zip(seconds, accuracies, strict=True) if a >= accuracies[2])
    assert found["at_equal_flops"] == max(accuracies[:2])
    here = list(accumulate(line.get("seconds", 0.0) for line in run.journal))
    assert found["here_to_target"] == next(s for s, a in zip(here, accuracies, strict=True) if a >= accuracies[2])
    missed = figures(run, 2.0, 0.0)
    assert missed["seconds_to_target"] is missed["here_to_target"] is None
    assert figures(run, None, -1.0)["at_equal_flops"] is None

    best = [
        max(line["validation"]["accuracy"] for line in RunFolder(done / "tight" / f"{v}-{s}").read_journal())
        for v in ("fedavg", "own-blocks")
        for s in (3, 5)
    ]
    assert target_of(results, "tight") == min(best)
    assert set(all_figures(results, "tight")) == {"fedavg", "own-blocks"}


def test_tables_and_pictures_come_from_the_folders_alone(done: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(done), "--out", str(tmp_path)])
    assert result.exit_code == 0, result.stderr
    names = [
        "accuracy-generous.png",
        "accuracy-tight.png",
        "budgets.png",
        "comparison.csv",
        "comparison.md",
        "report.html",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    with (tmp_path / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert {row["seed"] for row in rows} == {"3", "5"}
    first = json.loads((done / "generous" / "fedavg-3" / "summary.json").read_text())
    assert float(rows[0]["test"]) == pytest.approx(first["test"]["accuracy"], rel=1e-5)
    page = (tmp_path / "comparison.md").read_text()
    assert page.count("## both: ") == 4
    for scenario in ("generous", "tight"):
        assert f"## both: {scenario}: accuracy" in page and f"## both: {scenario}: cost" in page


def test_choices_that_must_not_see_test_data_do_not(done: Path, tmp_path: Path) -> None:
    results = read_results(done)
    hidden = type(results)(results.name, results.path, {**results.settings, "validation_only": True}, results.runs)
    for scenario in hidden.runs:
        headers = {name.partition("\n")[0] for table in tables(hidden, scenario) for name in table.header}
        assert not headers & {"accuracy", "low-mem.", "10th pct."}
        assert "validation" in headers
    assert "test" not in write(hidden, tmp_path)[1].read_text().splitlines()[0].split(",")
    picture = budgets_picture(hidden)
    assert picture is not None and "validation" in picture.axes[0].get_ylabel()


def test_what_has_not_run_has_no_picture(tmp_path: Path) -> None:
    comparison = loaded(tmp_path)
    comparison.describe()
    results = read_results(comparison.path)
    assert results.num_missing == 4
    assert curves_picture(mean_curves(results, ""), "") is None
    assert budgets_picture(results) is None
    assert [path.name for path in write(results, tmp_path)] == ["comparison.md", "comparison.csv", "report.html"]
    assert [row[1] for row in tables(results, "")[0].rows] == ["0", "0"]
