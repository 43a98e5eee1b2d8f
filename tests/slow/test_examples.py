"""The examples on public data that one brings along, by the command line, far enough to be well above chance."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from scalefl.cli import app

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "data", "commonest"), [("motion", "hapt", 0.2), ("questions", "trec", 0.28)])
def test_an_example_learns_under_tight_budgets(name: str, data: str, commonest: float, tmp_path: Path) -> None:
    root = os.environ.get("SCALEFL_DATA")
    if not root or not (Path(root) / data).is_dir():
        pytest.skip(f"set SCALEFL_DATA to the folder that holds {data}")
    command = ["run", str(EXAMPLES / f"{name}.toml"), "--runs", str(tmp_path), "--set", "rounds=8"]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    summary = json.loads((tmp_path / name / "summary.json").read_text())
    assert summary["test"]["accuracy"] > 1.8 * commonest
    assert summary["num_clients_lost"] == 0
