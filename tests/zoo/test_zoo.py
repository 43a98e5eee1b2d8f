"""Every method on every kind of model: a slice of the zoo in `make test`, all of it in `make test-full`."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from scalefl import disk_cache
from scalefl.cli import app
from scalefl.config import load_config
from scalefl.run_folder import RunFolder
from scalefl.runner import run
from zoo import page
from zoo.cells import CELLS, METHODS, PASSES, WRONG, Cell, Result, refusal
from zoo.models import VARIANTS, ZOO
from zoo.play import Wrong, check_same, play
from zoo.standing import standing_server

PAGE = Path(__file__).parents[2] / "docs" / "what-works.md"

SLICE = [
    Cell("plain", "as is", "scalefl-paper"),
    Cell("mlp", "half frozen", "scalefl"),
    Cell("spectral", "as is", "fedavg"),
    Cell("all_to_all", "as is", "fedepth"),
    Cell("lstm", "as is", "fedepth"),
    Cell("conv3d", "adapters", "depthfl"),
    Cell("embeddings", "half frozen", "fedepth"),
    Cell("two_inputs", "as is", "depthfl"),
    Cell("unet", "as is", "fedavg"),
    Cell("unet", "as is", "depthfl"),
    Cell("bert", "as is", "fedepth"),
    Cell("bert", "adapters", "fedavg"),
]
"""One of each cause of trouble that we have met, and each method."""

KILLED = [
    Cell("residual", "as is", "scalefl"),
    Cell("lstm", "as is", "fedavg"),
    Cell("bert", "half frozen", "fedepth"),
    Cell("vit", "adapters", "depthfl"),
]

# A run by the command line, whose clients take their time over their data.
SLOWLY = """
import time
from scalefl.cli import main
from scalefl.data import PartitionedData

at_once = PartitionedData.examples

def examples(self, client):
    time.sleep(0.3)
    return at_once(self, client)

PartitionedData.examples = examples
main()
"""


@pytest.fixture(scope="module", autouse=True)
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what is found out about a model for its other cells, and the processes that have imported torch."""
    with pytest.MonkeyPatch.context() as patch, standing_server():
        patch.setenv(disk_cache.VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield


def check(cell: Cell, folder: Path) -> None:
    """Play a cell, keep what it came to, and hold that against what is expected."""
    try:
        result = play(cell, folder)
    except Wrong:
        page.keep(cell, Result(WRONG, 0))
        raise
    page.keep(cell, result)
    wanted = refusal(cell)
    if wanted is None:
        assert result.said == PASSES
    else:
        assert re.search(wanted, result.said), result.said


@pytest.mark.parametrize("cell", SLICE, ids=str)
def test_a_slice_of_the_zoo(cell: Cell, tmp_path: Path) -> None:
    check(cell, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_the_whole_zoo(cell: Cell, tmp_path: Path) -> None:
    check(cell, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("cell", KILLED, ids=str)
def test_a_run_killed_in_the_middle_of_a_round_ends_with_the_same_bytes(cell: Cell, tmp_path: Path) -> None:
    path = cell.config(tmp_path, rounds=4)
    whole = run(load_config(path), tmp_path / "whole")
    files = RunFolder(tmp_path / "runs" / "run")
    command = [sys.executable, "-c", SLOWLY, "run", str(path), "--runs", str(tmp_path / "runs")]
    paths = os.pathsep.join(entry for entry in sys.path if entry)
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.DEVNULL)
    give_up = time.monotonic() + 120
    while not files.journal.exists() or len(files.journal.read_text().splitlines()) < 3:  # two rounds are done
        assert time.monotonic() < give_up and process.poll() is None
        time.sleep(0.02)
    time.sleep(0.4)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not files.summary.exists()
    assert run(load_config(path), files.path, resume=True)["test"] == whole["test"]
    check_same(tmp_path / "whole", files.path)


@pytest.mark.parametrize("cell", [SLICE[0], SLICE[9]], ids=str)
def test_the_commands_say_the_same(cell: Cell, tmp_path: Path) -> None:
    """`scalefl plan` and `scalefl run` pass, or refuse in one sentence, which is no traceback."""
    path = cell.config(tmp_path)
    for arguments in (["plan", path], ["run", path, "--runs", tmp_path / "runs"]):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        wanted = refusal(cell)
        if wanted is None:
            assert result.exit_code == 0, result.output
        else:
            assert result.exit_code == 1 and "Traceback" not in result.output
            assert re.search(wanted, " ".join(result.stderr.split())), result.stderr


def test_a_slice_has_each_method_and_each_variant() -> None:
    assert set(SLICE) < set(CELLS) and set(KILLED) < set(CELLS)
    assert {cell.method for cell in SLICE} == set(METHODS)
    assert {cell.variant for cell in SLICE} == set(VARIANTS)


def test_the_page_says_what_is_expected() -> None:
    found, notes = page.marks_of(PAGE.read_text())
    described = {entry.about: name for name, entry in ZOO.items()}
    seen = {Cell(described[about], *place): mark for (about, *place), mark in found.items() if about in described}
    assert {cell.model for cell in seen} <= set(ZOO)
    assert len(seen) > 1
    for cell, mark in seen.items():
        wanted = refusal(cell)
        if mark == page.NOT_RUN:
            continue
        if wanted is None:
            assert mark == "✓", cell
        else:
            assert mark.isdigit() and re.search(wanted, notes[int(mark) - 1]), cell


def test_a_page_has_what_results_say() -> None:
    places: Any = itertools.product(list(ZOO)[:2], VARIANTS, METHODS)
    results = {Cell(*place): Result(PASSES, 3) for place in places}
    first, second = list(results)[:2]
    results[first], results[second] = Result("no such\nthing", 3), Result("nor this", 3)
    text = page.page(results)
    found, notes = page.marks_of(text)
    assert notes == ["no such thing", "nor this"] and len(found) == len(results)
    abouts = {name: ZOO[name].about for name in ZOO}
    assert found[abouts[first.model], first.variant, first.method] == "1"
    assert found[abouts[second.model], second.variant, second.method] == "2"
    assert set(found.values()) == {"1", "2", "✓"}
