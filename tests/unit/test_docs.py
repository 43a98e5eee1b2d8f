"""What the documents show works, what they name exists."""

from __future__ import annotations

import csv
import json
import re
import statistics
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
from test_experiment import settings
from typer.testing import CliRunner

from scalefl.cli import app
from scalefl.comparison import Compare, load_comparison
from scalefl.config import Config, load_config, make_config
from scalefl.conversion import convert
from scalefl.methods import METHODS, PRESETS
from scalefl.models import BUILT_IN
from scalefl.runner import run

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


def test_the_method_in_the_guide_runs(tmp_path, monkeypatch):
    (code,) = blocks("docs/adding-a-method.md", "python")
    (tmp_path / "head_first.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    method = {"name": "head_first:HeadFirst", "blocks": 2, "every": 2}
    for workers in (0, 1):
        config = settings("200%", method=method, rounds=3, engine={"workers": workers, "threads": 1})
        summary = run(config, tmp_path / f"run-{workers}")
        assert summary["num_clients_lost"] == 0
    states = [(tmp_path / f"run-{workers}" / "state.safetensors").read_bytes() for workers in (0, 1)]
    assert states[0] == states[1]
    sys.modules.pop("head_first")


def test_the_schedule_in_the_config_page_works(tmp_path, monkeypatch):
    (code,), (text, _) = blocks("docs/config.md", "python"), blocks("docs/config.md", "toml")
    (tmp_path / "handover.py").write_text(f"from dataclasses import dataclass\n\n{code}")
    monkeypatch.syspath_prepend(tmp_path)
    method = tomllib.loads(text.replace("my_package.schedules", "handover"))["method"]
    mentor = settings("200%", method={"name": "scalefl", **method}).make_method().mentor
    assert mentor.coefficients(0, 4, round=40) == (("lambda", 3 * 0.75), ("gamma", 3 * 0.25))
    sys.modules.pop("handover")


def test_the_readme_config_is_valid(monkeypatch):
    (text,) = blocks("README.md", "toml")
    config = make_config(tomllib.loads(text))
    assert config.make_method().means == "auto"


@pytest.mark.parametrize("path", [*ROOT.glob("examples/*.toml"), *ROOT.glob("benchmarks/*.toml")], ids=lambda p: p.name)
def test_every_config_is_valid(path, tmp_path):
    if "variants" in tomllib.loads(path.read_text()):
        assert load_comparison(path, runs=tmp_path).jobs
    else:
        load_config(path)


def test_the_comparison_in_the_config_page_is_valid(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(blocks("docs/config.md", "toml")[1])
    comparison = load_comparison(path, runs=tmp_path)
    assert len(comparison.jobs) == 2 * 2 * 3
    keys = Compare.__dataclass_fields__
    assert all(f"| `{key}` |" in (ROOT / "docs" / "config.md").read_text() for key in keys)


def test_the_config_page_names_every_key_and_every_name():
    page = (ROOT / "docs" / "config.md").read_text()
    plain = convert(
        {"model": "cnn", "rounds": 1, "data": {"source": {"name": "x"}}, "devices": {"classes": "mixed"}}, Config, ""
    )
    fields = {
        *Config.__dataclass_fields__,
        *type(plain.data).__dataclass_fields__,
        *type(plain.work).__dataclass_fields__,
    }
    for part in (plain.engine, plain.evaluation, plain.data.source, *(plain.make_method(),)):
        fields |= set(getattr(part, "__dataclass_fields__", None) or part.__struct_fields__)
    # Tables have headings of their own.
    for name in fields - {"work", "engine", "evaluation", "devices", "data", "source", "method", "partition", "name"}:
        assert re.search(rf"[`.\[]{name}[`\].]", page), name
    for name in (*METHODS, *PRESETS, *BUILT_IN):
        assert f"`{name}`" in page, name


def fidelity_rows() -> list[list[str]]:
    """Claim, where, code, test, deviation: the first table of the page."""
    table = (ROOT / "docs" / "fidelity.md").read_text().split("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) > 15 and all(len(row) == 5 for row in rows)
    return rows[1:]


def code_files(cell: str) -> list[Path]:
    """The source files that a cell names, as `models/output.py` or as `hsic.nhsic`."""
    names = [
        name.removesuffix(".py") if "/" in name else name.split(".")[0] for name in re.findall(r"`([\w/.]+)`", cell)
    ]
    paths = [ROOT / "src" / "scalefl" / f"{name}.py" for name in names]
    return [path for path in paths if path.exists()]


@pytest.mark.parametrize("row", fidelity_rows(), ids=lambda row: row[0][:40])
def test_code_that_the_fidelity_page_names_is_tagged(row):
    _, _, code, _, deviation = row
    files = code_files(code)
    assert files, f"{code} names no source file"
    if deviation:
        assert any(re.search(r"\b(Paper|Deviation):", path.read_text()) for path in files)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def test_files_that_the_documents_name_exist():
    sources = {path.name for path in ROOT.glob("src/scalefl/**/*.py")} | {p.name for p in ROOT.glob("tests/**/*.py")}
    for document in DOCUMENTS:
        for name in re.findall(r"`(?:\w+/)*(\w+\.py)`", document.read_text()):
            assert name in sources | {"head_first.py"}, (document.name, name)


DATA_PAGE = dict(re.findall(r"```\w+\n# ([\w.]+)\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.DOTALL))


@pytest.mark.parametrize("name", [name for name in DATA_PAGE if name.endswith(".toml") and name != "rest.toml"])
def test_each_kind_of_data_in_the_data_page_is_learned_from(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    kind = name.removesuffix(".toml")
    if f"write_{kind}.py" in DATA_PAGE:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(DATA_PAGE[f"write_{kind}.py"], {})
    if f"my_{kind}.py" in DATA_PAGE:
        Path(f"my_{kind}.py").write_text(DATA_PAGE[f"my_{kind}.py"])
    config = make_config({**tomllib.loads(DATA_PAGE["rest.toml"]), **tomllib.loads(DATA_PAGE[name])})
    summary = run(config, tmp_path / "run")
    sys.modules.pop(f"my_{kind}", None)
    assert summary["num_clients_lost"] == 0 and summary["test"]["accuracy"] > 0.65
    clients = {"signals": 7, "pictures": 5, "ratings": 8, "sensors": 10**6}
    assert summary["num_clients"] == clients.get(kind, 6)


def test_extras_that_the_documents_name_are_there():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {name for path in DOCUMENTS for name in re.findall(r"scalefl\[(\w+)\]", path.read_text())}
    assert {"flower", "mlflow", "tensorboard"} <= named <= extras.keys()


def test_the_plan_of_the_demo_is_as_the_readme_says():
    """In the words below its picture."""
    done = CliRunner().invoke(app, ["plan", str(ROOT / "examples" / "demo.toml"), "--json"])
    assert done.exit_code == 0, done.output
    fits = {row["label"]: row["fits"] for row in json.loads(done.stdout)["rows"]}
    assert {name: fit["means"] for name, fit in fits["full"].items()} == {
        "medium": "micro-batch 4 (own norms)",
        "large": "",
    }
    everybody = {"tiny", "small", "medium", "large"}
    for part in ("block 1", "block 2 with tail", "block 3 with tail", "part 1/2 of block 4"):
        assert fits[part].keys() == everybody, part
    assert fits["block 1 with tail"].keys() == fits["block 4"].keys() == everybody - {"tiny"}


# Figures in README, against the committed ones.

NAMES = {
    "FedAvg, clients that hold full training": "exclusive",
    "FedAvg with micro-batches": "fedavg-micro",
    "FedAvg, a smaller model for everybody": "all-small",
    "ScaleFL, the paper's mode": "scalefl-paper",
    "FedAvg without memory limits": "unlimited",
}
ROUNDED = 0.06
"""Numbers with one digit after the point; some were rounded twice."""
SCENARIOS = ("generous", "tight", "starved")
README = " ".join((ROOT / "README.md").read_text().split())


def figures(*path: str) -> list[dict[str, str]]:
    with ROOT.joinpath("docs", "benchmarks", *path).open() as file:
        return list(csv.DictReader(file))


def by_seed(name: str) -> dict[tuple[str, str], dict[str, dict[str, float]]]:
    """What each run came to by scenario and variant, and by seed; a variant that ran in one stands in all."""
    rows = figures(name, "comparison.csv")
    found: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for row in rows:
        numbers = {key: float(row[key]) for key in ("test", "flops", "at_equal_flops")}
        alone = len({r["scenario"] for r in rows if r["variant"] == row["variant"]}) == 1
        for scenario in SCENARIOS if alone else [row["scenario"]]:
            found.setdefault((scenario, row["variant"]), {})[row["seed"]] = numbers
    return found


def mean(runs: dict[str, dict[str, float]], key: str = "test") -> float:
    return statistics.fmean(run[key] for run in runs.values())


def test_the_accuracies_in_the_readme_are_those_of_the_core_grid():
    runs, rows = by_seed("core"), 0
    for line in (ROOT / "README.md").read_text().splitlines():
        name, *cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        if len(cells) != 4 or "±" not in line:
            continue
        variant, rows = NAMES.get(name, name.lower()), rows + 1
        for scenario, cell in zip(SCENARIOS, cells, strict=False):
            percent = [100 * run["test"] for run in runs[scenario, variant].values()]
            told = [float(number) for number in cell.split(" ± ")]
            wanted = [statistics.fmean(percent), statistics.stdev(percent)]
            assert told == pytest.approx(wanted, abs=ROUNDED), (name, scenario)
        assert float(cells[3]) == pytest.approx(mean(runs["tight", variant], "flops") / 1e12, abs=ROUNDED), name
    assert rows == len({variant for _, variant in runs})


def test_scalefl_is_ahead_on_each_seed_and_pays_as_the_readme_says():
    runs = by_seed("core")
    for (scenario, variant), found in runs.items():
        own = runs[scenario, "scalefl"]
        assert found.keys() == own.keys() and len(own) == 3
        if variant == "unlimited":
            assert abs(mean(own) - mean(found)) < 0.025, "level: less than the seeds differ"
        elif variant != "scalefl":
            assert all(own[seed]["test"] > run["test"] for seed, run in found.items()), (scenario, variant)
    tight = {variant: found for (scenario, variant), found in runs.items() if scenario == "tight"}
    ratio = mean(tight["scalefl"], "flops") / mean(tight["unlimited"], "flops")
    (told,) = re.findall(r"here ([\d.]+) times those of FedAvg", README)
    assert float(told) == pytest.approx(ratio, abs=ROUNDED)
    small, ours = (100 * mean(tight[name], "at_equal_flops") for name in ("all-small", "scalefl"))
    spent = mean(tight["all-small"], "flops") / 1e12
    assert f"({small:.1f} against {ours:.1f} % of validation accuracy after {spent:.1f} TFLOP)" in README
    clipped = by_seed("unclipped")
    (words,) = re.findall(r"without that they have ([\d., and]+)\. ", README.replace("*", ""))
    wanted = [100 * mean(clipped[s, f"{name}-unclipped"]) for name in ("heterofl", "fedrolex") for s in SCENARIOS]
    assert [float(number) for number in re.findall(r"\d+\.\d", words)] == pytest.approx(wanted, abs=ROUNDED)


def test_the_core_grid_is_as_the_readme_says():
    grid = tomllib.loads((ROOT / "benchmarks" / "core.toml").read_text())
    weakest = [scenario["devices"]["classes"][0] for scenario in grid["scenarios"].values()]
    assert [grid["model"], grid["data"]["clients"], grid["rounds"]] == ["resnet10", 80, 80]
    assert [(one["share"], one["memory"]) for one in weakest] == [(0.3, "55%"), (0.3, "27%"), (0.3, "22%")]
    methods = {name: variant["method"] for name, variant in grid["variants"].items()}
    plain = {name for name, method in methods.items() if method.get("means") != "auto"}
    assert plain == {"unlimited", "exclusive", "scalefl"}, "the first two are references, and the last has them anyway"
    assert make_config(tomllib.loads(blocks("README.md", "toml")[0])).make_method().means == "auto"


def test_the_speed_in_the_readme_is_the_measured_one():
    """Of models with more than a few channels: A, B, C and F of the page on speed."""
    ratios = []
    found = [*figures("speed", "peers_summary.csv"), *figures("speed", "small_summary.csv")]
    for work in sorted({row["work"] for row in found}):
        pfl, ours = (next(r for r in found if (r["work"], r["program"]) == (work, p)) for p in ("pfl", "scalefl"))
        if work in "ABCF":
            ratios.append(1 / float(pfl["ratio"]))
        memory, start = (float(ours[key]) / float(pfl[key]) for key in ("peak_pss_mib", "first_round_cpu_seconds"))
        assert 0.25 < memory < 0.36 and 0.4 < start < 0.55, work
    assert (round(min(ratios), 1), round(max(ratios), 1)) == (0.8, 1.0)
    for words in ("from 0.8 of pfl-research's time to as long", "a third of its memory and half of its start-up"):
        assert words in README
