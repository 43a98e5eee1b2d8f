"""What a run on real nodes survives. Every process here is real, and really killed."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from deployed import Field, deployed, eventually, is_alive
from gate import Gate
from liar import LIES
from scalefl.deployment.programs import descendants
from scalefl.run_folder import RunFolder
from support import identical

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CONFIG = """
model = "cnn"
model_arguments = {{ width = 0.5, norm = "group" }}
rounds = {rounds}
clients_per_round = {clients}
data = {{ source = {{ name = "mnist5k" }} }}
work = {{ batch_size = 16, lr = 0.02, epochs = {epochs} }}
method = {{ name = "fedavg" }}
evaluation = {{ plane_samples = 64 }}

[engine]
name = "flower"
patience = {{ min_clients = {clients}, {patience} }}
"""


LONG = "absence_seconds = 240, doubt_seconds = 10"


def config(
    *, rounds: int = 5, clients: int = 2, epochs: int = 8, patience: str = "absence_seconds = 5, doubt_seconds = 10"
) -> str:
    return CONFIG.format(rounds=rounds, clients=clients, epochs=epochs, patience=patience)


@pytest.fixture
def area(tmp_path) -> Iterator[Field]:
    with deployed(tmp_path / "here", nodes=3) as found:
        yield found


def start_nodes(area: Field, count: int) -> None:
    for i in range(count):
        area.start_node(f"node-{i}", "32MiB", f"{i}/8")
    area.wait_until_there(*(f"node-{i}" for i in range(count)))


def wait_for_round(area: Field, name: str, count: int, seconds: float = 200.0) -> list[dict[str, Any]]:
    return eventually(
        lambda: lines if len(lines := area.journal(name)) >= count else None, seconds, why=area.everything
    )


def in_the_middle_of(area: Field, node: str, round: int) -> None:
    """Wait until a node has got its task of a round (from 1), and works on it."""
    sign = f"ROUND {round - 1}]"
    eventually(lambda: sign in area.flower_said(node), 200.0, why=area.everything)
    eventually(lambda: "Received successfully" in area.flower_said(node).rpartition(sign)[2])
    eventually(lambda: trains(worker_of(area, node)))


def trains(pid: int) -> bool:
    """Whether a process has been busy over a moment."""
    before = cpu_seconds(pid)
    time.sleep(0.3)
    return cpu_seconds(pid) - before > 0.1


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def takes_part(line: dict[str, Any], client: int) -> bool:
    return client in [i for ids in line["rungs"].values() for i in ids]


def losses(lines: list[dict[str, Any]], client: int) -> list[tuple[int, str]]:
    return [(line["round"], lost["cause"]) for line in lines for lost in line["lost"] if lost["client"] == client]


def state_of(area: Field, name: str) -> dict[str, Any]:
    return load_file(RunFolder(area.deployment.runs / name).state)


def worker_of(area: Field, node: str) -> int:
    """The process that trains."""
    for pid in descendants(area.processes[node].pid):
        if b"scalefl.engines.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    raise AssertionError(f"{node} has no worker")


def test_a_node_that_is_killed_in_the_middle_of_a_round_is_lost_and_may_come_back(area):
    start_nodes(area, 2)
    area.submit(area.write_config("killed", config(rounds=6, clients=2).replace("min_clients = 2", "min_clients = 1")))
    in_the_middle_of(area, "node-1", 2)
    family = area.family("node-1")
    area.stop("node-1", signal.SIGKILL)
    eventually(lambda: not any(map(is_alive, family)), 20.0)
    lines = eventually(lambda: losses(area.journal("killed"), 1), 200.0, why=area.everything)
    assert lines[0][0] == 2 and "Flower's error" in lines[0][1], lines
    start_nodes_again = time.monotonic()
    area.start_node("node-1", "32MiB", "1/8")
    area.finish("killed", 400.0)
    rounds = area.journal("killed")
    assert len(rounds) == 6 and all(takes_part(line, 0) for line in rounds)
    assert takes_part(rounds[-1], 1) or time.monotonic() - start_nodes_again < 90, "back, unless the run was faster"


def test_a_worker_that_is_killed_as_for_memory_costs_one_task(area):
    """At once: the node lives, says what became of its worker, and takes part in the next round."""
    start_nodes(area, 2)
    area.submit(area.write_config("worker", config(rounds=4)))
    in_the_middle_of(area, "node-1", 2)
    os.kill(worker_of(area, "node-1"), signal.SIGKILL)
    area.finish("worker")
    rounds = area.journal("worker")
    assert losses(rounds, 1) == [(2, "its worker died: signal 9 (SIGKILL)")] and losses(rounds, 0) == []
    assert [takes_part(line, 1) for line in rounds] == [True, False, True, True]
    assert rounds[1]["seconds"] < 60


def test_a_node_that_never_answers_is_lost(area):
    """It is lost by the deadline."""
    start_nodes(area, 3)
    few = "absence_seconds = 5, deadline_seconds = 30"
    area.submit(area.write_config("deadline", config(rounds=2, clients=3, epochs=2, patience=few)))
    in_the_middle_of(area, "node-2", 1)
    wait_for_round(area, "deadline", 1)
    frozen = area.family("node-2")
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    try:
        area.finish("deadline")
        rounds = area.journal("deadline")
        assert losses(rounds, 2) == [(2, "no answer by the deadline")] and rounds[1]["seconds"] < 60
    finally:
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)


def test_enough_answers_end_a_round(area):
    """Over-selection: of three clients two are enough; the third, which never answers, costs no time."""
    start_nodes(area, 3)
    area.submit(area.write_config("quorum", config(rounds=2, clients=3, patience="quorum = 0.6")))
    in_the_middle_of(area, "node-2", 1)
    frozen = area.family("node-2")
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    try:
        wait_for_round(area, "quorum", 1)
        assert losses(area.journal("quorum"), 2) == [(1, "not waited for: enough others answered")]
    finally:
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("lie", LIES)
def test_a_node_that_lies_is_named_and_its_answer_is_not_used(area, lie):
    """The others' round is as if it had not been there."""
    causes = {
        "nan": "NaN",
        "shape": "not torch",
        "foreign": "not asked for",
        "old": "answered something else",
        "huge": "num_examples",
    }
    start_nodes(area, 1)
    folder = area.deployment.node("node-1").path
    area.start_program("node-1", sys.executable, "-m", "liar", lie, str(folder), "mnist5k", "1/8")
    area.wait_until_there("node-1")
    area.submit(area.write_config("lies", config(rounds=2, epochs=1)))
    area.finish("lies")
    rounds = area.journal("lies")
    found = losses(rounds, 1)
    assert [round for round, _ in found] == ([2] if lie == "old" else [1, 2])
    assert all(causes[lie] in cause for _, cause in found), found
    assert all(takes_part(line, 0) for line in rounds)


def test_a_server_that_is_killed_goes_on_with_one_command_and_nothing_is_lost(area):
    """To the bit: the run that was cut off and resumed ends as one that was left alone."""
    start_nodes(area, 2)
    area.submit(area.write_config("alone", config(rounds=4, epochs=4, patience=LONG)))
    area.finish("alone")
    cut = area.write_config("cut", config(rounds=4, epochs=4, patience=LONG))
    submitted = area.submit(cut)
    wait_for_round(area, "cut", 2)
    link = next(
        pid
        for pid in descendants(area.processes["server"].pid)
        if b"flower-superlink" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    family = area.family("server")
    os.kill(link, signal.SIGKILL)
    assert area.processes["server"].wait(60) == 1
    assert "the SuperLink ended with status -9" in re.sub(r"\s+", " ", area.said("server"))
    eventually(lambda: not any(map(is_alive, family)), 30.0)
    assert submitted.wait(90) == 1, area.everything()
    assert "once the server is back, --resume goes on" in re.sub(r"\s+", " ", area.said("submit-cut"))
    area.processes.pop("server")
    area.log("server").unlink()
    area.start_server()
    area.submit(cut, "--resume")
    area.finish("cut")
    assert [line["round"] for line in area.journal("cut")] == [1, 2, 3, 4]
    assert identical(state_of(area, "cut"), state_of(area, "alone"))


def test_a_network_that_is_cut_for_a_minute_costs_nothing(area):
    """Nobody's task is lost, whoever noticed what: it is done, or sent again, when the way is open."""
    settings = area.deployment.settings()
    with Gate(settings.port) as gate:
        for i in range(2):
            file = area.deployment.node(f"node-{i}").settings_file
            file.write_text(file.read_text().replace(f":{settings.port}", f":{gate.port}"))
        start_nodes(area, 2)
        area.submit(area.write_config("alone", config(rounds=3, epochs=4, patience=LONG)))
        area.finish("alone")
        area.submit(area.write_config("cut", config(rounds=3, epochs=4, patience=LONG)))
        wait_for_round(area, "cut", 1)
        gate.shut()
        time.sleep(60)
        gate.open()
        area.finish("cut", 400.0)
    rounds = area.journal("cut")
    assert [line["round"] for line in rounds] == [1, 2, 3] and all(line["lost"] == [] for line in rounds)
    assert identical(state_of(area, "cut"), state_of(area, "alone"))


def test_a_budget_that_changes_between_rounds_is_planned_with(area):
    """A node that is stopped and started again with less memory goes on, within that."""
    start_nodes(area, 2)
    area.submit(area.write_config("budget", config(rounds=6, epochs=4, patience=LONG).replace('"fedavg"', '"scalefl"')))
    wait_for_round(area, "budget", 1)
    area.stop("node-1")
    area.start_node("node-1", "9MiB", "1/8")
    area.finish("budget", 400.0)
    rounds = area.journal("budget")
    peaks = [p for line in rounds for p in line["peaks"] if p["client"] == 1]
    assert peaks[0]["predicted_bytes"] > 5 * 2**20 >= peaks[-1]["predicted_bytes"]
    assert peaks[-1]["measured_bytes"] <= 9 * 2**20
