"""What a run tells while it is under way."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import pytest
from rich.console import Console

import scalefl.terminal
from scalefl.bookkeeping import RunProgress
from scalefl.terminal import follow

BYTES = {"bytes_down": 3 * 2**20, "bytes_up": 2**20}
EPSILON = {"epsilon": 1.5, "delta": 0.001, "releases": 3}


def line(number, *, examples=50, seconds=2.0, **more):
    told = {"num_examples": examples, **BYTES, "train": {"loss": 1.25}, "validation": {"accuracy": 0.5}}
    return {"round": number, "stage": "blocks 1-4", "seconds": seconds, **(more or told)}


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time, which stands still unless somebody moves it."""
    now = [100.0]
    monkeypatch.setattr(scalefl.terminal, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def told(folder, lines, *, rounds, clock=None, takes=0.0, first=1, epochs=2, written_ahead=False, **console) -> str:
    """What is printed of rounds that take so long each; those before `first` were done before a resumption."""
    output = io.StringIO()

    def write(each):
        with (folder / "journal.jsonl").open("a") as journal:
            print(json.dumps(each), file=journal)

    def done():
        for each in lines:
            if not written_ahead:
                write(each)
            if each["round"] >= first:
                if clock:
                    clock[0] += takes
                yield RunProgress(each, rounds, epochs)

    for each in lines if written_ahead else ():
        write(each)
    follow(Console(file=output, **{"width": 120, **console}), done(), folder)
    return output.getvalue()


def test_samples_a_second_of_all_epochs_since_it_was_started(tmp_path):
    """A resumed run's rounds from before count in what has moved, not in the speed."""
    lines = [line(1, examples=10**6), line(2, examples=50, seconds=2.0), line(3, examples=550, seconds=4.0)]
    printed = told(tmp_path, lines, rounds=3, first=2).splitlines()
    assert printed[0] == "round 2/3, blocks 1-4, loss 1.250, val. acc. 50.0 %, 8.00 MiB moved, 50 samples/s"
    assert printed[1].endswith("12.0 MiB moved, 200 samples/s, 0 s left")


def test_rounds_that_are_journalled_before_they_are_told_count_once(tmp_path):
    """As when a round is written down while the one before is shown, or a server has got ahead."""
    printed = told(tmp_path, [line(i) for i in range(1, 4)], rounds=3, written_ahead=True).splitlines()
    assert [text.split(", ")[4] for text in printed] == ["4.00 MiB moved", "8.00 MiB moved", "12.0 MiB moved"]


def test_private_runs_tell_no_speed(tmp_path):
    printed = told(tmp_path, [line(1, privacy=EPSILON, predicted_peak_bytes=1)], rounds=1)
    assert "samples/s" not in printed and "moved" not in printed and "ε = 1.5" in printed


def test_the_time_left_is_that_of_rounds_and_of_nothing_before(tmp_path, clock):
    """By the mean of the rounds after the first one here, in which all is still made ready."""
    printed = told(tmp_path, [line(i) for i in range(1, 11)], rounds=10, clock=clock, takes=3.0, first=5).splitlines()
    assert "left" not in printed[0]
    assert [text.rsplit(", ", 1)[1] for text in printed[1:]] == [f"{3 * left} s left" for left in (4, 3, 2, 1, 0)]


def test_few_lines_of_many_quick_rounds(tmp_path, clock):
    lines = [line(i) for i in range(1, 1001)]
    assert len(told(tmp_path, lines, rounds=1000, clock=clock, takes=0.01).splitlines()) == 11
    slow = told(tmp_path, lines[:5], rounds=1000, clock=clock, takes=31.0).splitlines()
    assert [text.split("/")[0] for text in slow] == [f"round {i}" for i in range(1, 6)]


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_bar_has_room_for_what_counts(tmp_path, width):
    printed = told(tmp_path, [line(i) for i in range(1, 4)], rounds=48, width=width, force_terminal=True)
    last = next(text for text in reversed(printed.splitlines()) if "blocks" in text)
    assert "3/48" in last and "loss 1.250" in last and "val. acc. 50.0 %" in last and "50 samples/s" in last
    assert ("12.0 MiB moved" in last) == (width >= 100) and "…" not in last
