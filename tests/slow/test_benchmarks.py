"""Every `make bench-…` in its quick form: figures mean nothing, but that they can be made again is seen."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
COMPARISONS = sorted(path.stem for path in BENCHMARKS.glob("*.toml") if "[variants." in path.read_text())
MEMORY = ("planning", "prediction", "models", "tenth", "floors", "rungs", "federation")
FLOWER = ("rounds", "bytes", "scale", "precision")
SPEED = ("stages", "stages-last", "formats", "at-once", "tried", "profile", "scaling")
BESIDE_PEERS = ("peers", "whole", "small")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def quickly(*words: str, out: Path) -> str:
    command = [sys.executable, str(BENCHMARKS / words[0]), *words[1:], "--out", str(out)]
    about = {**os.environ, "SCALEFL_CACHE": str(out / "cache")}
    done = subprocess.run(command, cwd=ROOT, env=about, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        found = list(csv.DictReader(file))
    assert found, f"{path} has no rows"
    return found


def has_a_table(path: Path) -> bool:
    """With a row below its head."""
    return re.search(r"^\|[ :|-]+\|\n\|.*\d", path.read_text(), re.MULTILINE) is not None


def test_what_make_runs_is_what_is_tested_here():
    text = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE).group(1).split())
    names = {target.removeprefix("bench-") for target in targets if target.startswith("bench-")}
    assert names == {*COMPARISONS, "memory", "engine", "flower", "speed"}
    parts = {script: tuple(what.split()) for what, script in re.findall(r"for what in ([^;]*);.*?/(\w+)\.py", text)}
    assert parts == {"memory": MEMORY, "flower": FLOWER, "speed": (*BESIDE_PEERS, *SPEED)}


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons(tmp_path, name):
    quickly("quick.py", name, out=tmp_path)
    rows = rows_of(tmp_path / name / "comparison.csv")
    assert len(rows) == len({row["variant"] for row in rows}) >= 2
    assert all(0 <= float(row["test"]) <= 1 for row in rows)
    assert has_a_table(tmp_path / name / "comparison.md")
    assert (tmp_path / name / "report.html").stat().st_size and list((tmp_path / name).glob("*.png"))


@pytest.mark.parametrize("what", MEMORY)
def test_memory(tmp_path, what):
    quickly("memory.py", what, "--quick", out=tmp_path)
    rows_of(tmp_path / "memory" / f"{what}.csv")
    assert has_a_table(tmp_path / "memory" / f"{what}.md")
    text = (tmp_path / "memory.md").read_text()
    assert "Quick form" in text and (tmp_path / "memory" / f"{what}.md").read_text() in text


def test_engine(tmp_path):
    quickly("engine.py", "--quick", out=tmp_path / "engine")
    assert has_a_table(tmp_path / "engine.md") and "Quick form" in (tmp_path / "engine.md").read_text()


@pytest.mark.parametrize("what", FLOWER)
def test_flower(tmp_path, what):
    if what == "precision":
        quickly("quick.py", "precision", out=tmp_path)
    quickly("flower.py", what, "--quick", out=tmp_path)
    rows_of(tmp_path / "flower" / f"{what}.csv")
    assert has_a_table(tmp_path / "flower" / f"{what}.md") and "Quick form" in (tmp_path / "flower.md").read_text()


@pytest.mark.parametrize("what", SPEED)
def test_speed(tmp_path, what):
    quickly("speed.py", what, "--quick", out=tmp_path)
    rows_of(tmp_path / "speed" / f"{what}.csv")
    assert has_a_table(tmp_path / "speed" / f"{what}.md") and "Quick form" in (tmp_path / "speed.md").read_text()
    if what == "scaling":
        assert (tmp_path / "speed" / "scaling.png").stat().st_size


@pytest.mark.parametrize("what", BESIDE_PEERS)
def test_speed_beside_peers_is_left_out_in_words(tmp_path, what):
    assert f"{what}: left out in quick form" in quickly("speed.py", what, "--quick", out=tmp_path)
