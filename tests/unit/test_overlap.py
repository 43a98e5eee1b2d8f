"""Measuring and writing a round while the next one is under way: the same files, and nothing lost."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_trial import settings

import scalefl.bookkeeping
from scalefl.engines.local import LocalEngine
from scalefl.errors import CheckpointError
from scalefl.experiment import Experiment
from scalefl.run_folder import RunFolder
from scalefl.runner import run, run_rounds

BESIDE = {"workers": 2, "threads": 1}


def lines(folder: Path) -> list[dict[str, Any]]:
    timed = ("seconds", "measured_peak_bytes")
    return [{k: v for k, v in line.items() if k not in timed} for line in RunFolder(folder).read_journal()]


def test_the_same_files_as_without(tmp_path):
    found = run(settings(rounds=3, engine=BESIDE), tmp_path / "beside")
    wanted = run(settings(rounds=3, engine={"workers": 0, "threads": 1}), tmp_path / "here")
    assert lines(tmp_path / "beside") == lines(tmp_path / "here")
    assert found["test"] == wanted["test"]
    state = "state.safetensors"
    assert (tmp_path / "beside" / state).read_bytes() == (tmp_path / "here" / state).read_bytes()


def test_the_next_round_is_trained_meanwhile(tmp_path, monkeypatch):
    """Who measures the first round waits for the second to begin: it never would, if it waited for the measuring."""
    begun, second = [], threading.Event()
    fit_into, append = LocalEngine.fit_into, scalefl.bookkeeping.append

    def fit(*arguments):
        begun.append(arguments)
        if len(begun) == 2:
            second.set()
        yield from fit_into(*arguments)

    def waits(path: Path, line: dict[str, Any]) -> None:
        if line["round"] == 1:
            assert second.wait(60), "nobody trains meanwhile"
        append(path, line)

    monkeypatch.setattr(LocalEngine, "fit_into", fit)
    monkeypatch.setattr(scalefl.bookkeeping, "append", waits)
    assert run(settings(rounds=2, engine=BESIDE), tmp_path / "run")["rounds"] == 2 == len(begun)


def test_each_round_is_told_once_and_in_order(tmp_path):
    rounds = run_rounds(Experiment(settings(rounds=3, engine=BESIDE)), tmp_path / "run")
    assert [progress.line["round"] for progress in rounds] == [1, 2, 3]


def test_what_was_trained_is_kept_when_the_caller_stops(tmp_path):
    rounds = run_rounds(Experiment(settings(rounds=5, engine=BESIDE)), tmp_path / "run")
    told = next(rounds)
    rounds.close()
    journal = lines(tmp_path / "run")
    assert told.line["round"] == 1 and [line["round"] for line in journal] == [0, 1, 2]
    assert all("validation" in line for line in journal)
    run(settings(rounds=5, engine=BESIDE), tmp_path / "run", resume=True)
    run(settings(rounds=5, engine=BESIDE), tmp_path / "whole")
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


@pytest.mark.parametrize("bad_round", [1, 3])
def test_a_disk_that_fills_ends_the_run_and_what_was_saved_is_whole(tmp_path, monkeypatch, bad_round):
    append: Callable[..., None] = scalefl.bookkeeping.append

    def fails(path: Path, line: dict[str, Any]) -> None:
        if line["round"] == bad_round:
            raise CheckpointError("cannot write: No space left on device")
        append(path, line)

    monkeypatch.setattr(scalefl.bookkeeping, "append", fails)
    with pytest.raises(CheckpointError, match="No space left"):
        run(settings(rounds=3, engine=BESIDE), tmp_path / "run")
    monkeypatch.setattr(scalefl.bookkeeping, "append", append)
    assert json.loads((tmp_path / "run" / "journal.jsonl").read_text().splitlines()[-1])["round"] == bad_round - 1
    run(settings(rounds=3, engine=BESIDE), tmp_path / "run", resume=True)
    run(settings(rounds=3, engine=BESIDE), tmp_path / "whole")
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
