"""What `scalefl bench` measures: rounds beside a bare loop that does the same, and what a run will take."""

from __future__ import annotations

import itertools
import json
import time
from contextlib import closing
from dataclasses import replace
from io import StringIO

import pytest
import torch
from rich.console import Console
from test_experiment import settings

from scalefl.bench import (
    LEAST_ROUNDS,
    WORKLOADS,
    Federation,
    Forecast,
    Overhead,
    Planned,
    Spread,
    Workload,
    drawn,
    foreseen,
    preview,
    throughput,
    timed,
)
from scalefl.engines.trial import Crew
from scalefl.errors import BudgetError, ConfigError
from scalefl.methods.fedavg import FedAvg
from scalefl.models.spec import ModelSpec
from scalefl.report.bench import machine_table, preview_table
from scalefl.report.tables import NOTHING, show
from scalefl.types import LocalWork
from support import MadeData, children, global_rng

SMALL = Workload(
    name="small",
    about="a few weights",
    model=ModelSpec.of("scalefl.models.cnn:cnn", width=0.0625),
    method=FedAvg(work=LocalWork(epochs=2, batch_size=6, lr=0.1, weight_decay=0)),
    clients=4,
    examples=6,
    cohort=3,
    compared=2,
)
ENVIRONMENT = {"cores": 2, "packages": {"torch": "2.8"}, "torch_cpu": "AVX2"}


def printed(table, width: int) -> str:
    file = StringIO()
    show(Console(file=file, width=width), table)
    return file.getvalue()


def test_the_figures_of_a_workload_agree():
    before, threads, rng = children(), torch.get_num_threads(), global_rng()
    found = throughput(SMALL, seconds=0.01).to_json()
    assert children() == before and torch.get_num_threads() == threads and global_rng() == rng
    assert json.loads(json.dumps(found)) == found
    seconds, overhead = found["round_seconds"], found["overhead"]
    assert found["samples_per_round"] == 3 * 6 * 2
    assert seconds["rounds"] == overhead["pairs"] == LEAST_ROUNDS
    assert 0 < seconds["least"] <= seconds["median"] <= seconds["most"]
    assert found["rounds_per_second"] == pytest.approx(1 / seconds["median"])
    assert found["samples_per_second"] == pytest.approx(36 * found["rounds_per_second"])
    assert overhead["ratio"] == pytest.approx(overhead["seconds"] / overhead["bare_seconds"])
    assert overhead["least"] <= overhead["ratio"] <= overhead["most"]
    assert found["crew"]["why"].startswith("the longest task takes")


def test_what_no_bare_loop_does_is_not_compared():
    assert throughput(replace(SMALL, compared=0), seconds=0.01).overhead is None


def test_more_seconds_are_more_rounds():
    assert throughput(replace(SMALL, compared=0), seconds=5.0).seconds.rounds > LEAST_ROUNDS


@pytest.mark.parametrize(
    "workload", [replace(SMALL, clients=3), *(replace(w, clients=3, examples=6) for w in WORKLOADS if w.compared)]
)
def test_the_bare_loop_does_the_same(workload):
    """All clients, and one batch of all that each has: then the order of neither changes more than the last bits."""
    federation = Federation(workload)
    before = federation.state.params
    crew = Crew(0, 1)
    with closing(federation.rounds(3, crew)) as ours, closing(federation.bare_rounds(3)) as bare:
        for after, wanted in itertools.islice(zip(ours, bare, strict=True), 2):
            assert after.keys() == wanted.keys() == before.keys()
            for name in after:
                torch.testing.assert_close(
                    after[name] - before[name], wanted[name] - before[name], rtol=1e-3, atol=1e-5
                )
            assert any((after[name] - before[name]).abs().max() > 1e-3 for name in after)


def test_the_standard_workloads_are_what_they_are_called():
    rungs = []
    for workload in WORKLOADS:
        federation = Federation(replace(workload, clients=1, examples=4))
        plan = workload.method.plan(federation.state, [federation.clients[0]])
        rungs += plan.rungs.values()
    assert rungs == ["full", "full", "block 1"]


def test_the_time_of_whoever_asks_does_not_count():
    def values():
        for value in range(3):
            time.sleep(0.02)
            yield value

    found = []
    for seconds, value in timed(values()):
        time.sleep(0.2)
        found.append((value, 0.02 <= seconds < 0.2))
    assert found == [(0, True), (1, True), (2, True)]


def test_how_many_are_drawn():
    assert drawn(itertools.count(), 0.0, least=3) == [0, 1, 2]
    assert drawn(itertools.count(), 60.0, least=1, most=4) == [0, 1, 2, 3]
    slow = (time.sleep(0.01) or i for i in itertools.count())
    assert 2 < len(drawn(slow, 0.2, least=1)) <= 20


def test_medians_and_ranges():
    assert Spread.of([3.0, 1.0, 2.0, 9.0]) == (2.5, 1.0, 9.0, 4)
    assert Overhead.of([(2.0, 1.0), (3.0, 2.0), (4.0, 4.0)]) == (1.5, 1.0, 2.0, 3, 3.0, 2.0)


def test_rounds_to_come_are_foreseen_by_their_flops():
    measured = [Planned("block 1", 10.0), Planned("block 1", 30.0)]
    later = [Planned("block 1", 20.0), Planned("block 2", 60.0)]
    seconds, assumes = foreseen([1.0, 3.0], ["block 1", "block 1"], measured, later)
    assert seconds == pytest.approx(0.1 * 40.0)
    assert "FLOPs" in assumes and "2 rounds of the run (block 1, block 2)" in assumes


@pytest.mark.parametrize(
    ("planned", "later"),
    [
        ([Planned("block 1", 10.0)] * 2, [Planned("block 1", 90.0)]),  # which block it is depends on the rounds before
        ([Planned("block 1", 10.0)], [Planned("block 1", 90.0)]),  # nobody could take part in a round
        ([Planned("block 1", 0.0), Planned("block 2", 0.0)], [Planned("block 1", 90.0)]),  # nobody has examples
        ([Planned("block 1", 1.0), Planned("block 2", 1.0)], []),
    ],
)
def test_where_plans_do_not_tell_rounds_to_come_are_as_those_measured(planned, later):
    seconds, assumes = foreseen([1.0, 4.0], ["block 1", "block 2"], planned, later)
    assert seconds == 2.5
    assert "depends on the rounds before" in assumes and "(block 1, block 2)" in assumes


def test_a_forecast_is_the_sum_of_its_parts():
    found = Forecast(100, 2.0, 11, 10.0, 90.0, "that").to_json()
    assert found["seconds"] == 90 + 200 + 110 and found["hours"] == pytest.approx(400 / 3600)


CONFIGS = {
    "fedavg": {},
    "seldom evaluated": {"evaluation": {"every": 3}, "rounds": 8},
    "epochs": {"work": {"epochs": 3}},
    "one round": {"rounds": 1},
    "worker": {"engine": {"workers": 1, "threads": 1}},
    "blocks": {"method": {"name": "scalefl-paper", "blocks": 2}, "rounds": 9},
    "collects": {"method": {"name": "heterofl"}},
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_a_run_is_foreseen(tmp_path, monkeypatch, changes):
    monkeypatch.chdir(tmp_path)
    plain = {"engine": {"threads": 1}, "clients_per_round": 4}
    config, before = settings("200%", **{**plain, **changes}), children()
    found = preview(config, seconds=0.01).to_json()
    assert not list(tmp_path.iterdir()) and children() == before
    assert json.loads(json.dumps(found)) == found
    seconds, forecast = found["round_seconds"], found["forecast"]
    assert seconds["rounds"] == min(2, config.rounds)  # so the median is the mean
    assert found["samples_per_second"] * seconds["median"] == pytest.approx((9 + 12 + 10 + 8) * config.work.epochs)
    assert 0 < found["idle_share"] < 1 and found["num_lost"] == 0
    assert forecast["rounds"] == config.rounds
    every = config.evaluation.every
    assert forecast["evaluations"] == len({0, config.rounds, *range(0, config.rounds + 1, every)})
    # All clients take part in each round, and rounds are alike.
    assert forecast["round_seconds"] == pytest.approx(seconds["median"])
    assert forecast["start_seconds"] > 0 and forecast["evaluation_seconds"] > 0
    total = sum(forecast[f"{kind}s"] * forecast[f"{kind}_seconds"] for kind in ("round", "evaluation"))
    assert forecast["seconds"] == pytest.approx(forecast["start_seconds"] + total)


NAP_SECONDS = 0.02


class Slow(MadeData):
    """Each client's rows take a moment to be had."""

    def examples(self, client):
        time.sleep(NAP_SECONDS)
        return super().examples(client)


def make_slow_data():
    return Slow([9, 12, 10, 8])


def test_what_is_not_training_is_told_apart():
    data = {"source": {"name": "test_bench:make_slow_data"}}
    config = settings("200%", data=data, rounds=50, clients_per_round=4, engine={"workers": 0, "threads": 1})
    found = preview(config, seconds=0.01)
    assert found.seconds.least >= 4 * NAP_SECONDS
    assert found.idle_share >= 4 * NAP_SECONDS / found.seconds.most
    assert found.forecast.seconds >= 50 * 4 * NAP_SECONDS


def test_stages_that_go_by_the_round_are_planned():
    """SLT trains the whole model from some round on."""
    config = settings("70%", "120%", method={"name": "slt", "blocks": ["0"], "rounds": 40}, rounds=40)
    assumes = preview(config, seconds=0.01).forecast.assumes
    assert "planned for 8 rounds of the run (block 1" in assumes and "block 2)" in assumes


def test_stages_that_go_by_what_came_before_are_not():
    config = settings("200%", method={"name": "scalefl-paper", "blocks": 2}, rounds=40)
    assert "(block 1, block 2): what they will train depends" in preview(config, seconds=0.01).forecast.assumes


def test_a_private_run_tells_no_more_than_times():
    pytest.importorskip("dp_accounting")
    privacy = {"clip_norm": 1.0, "noise_multiplier": 1.0, "delta": 1e-3}
    config = settings("200%", privacy=privacy, model_arguments={"norm": "group"})
    found = preview(config, seconds=0.01).to_json()
    assert found["samples_per_second"] is None and found["idle_share"] is None
    assert found["forecast"]["seconds"] > 0
    text = printed(preview_table({"run": found}, "this process"), 200)
    assert "tell neither their examples" in text and NOTHING in text


def test_nodes_in_this_process():
    pytest.importorskip("flwr")
    found = preview(settings("200%", engine={"name": "flower"}), seconds=0.01).to_json()
    assert found["engine"] == "flower" and found["num_lost"] == 0
    assert 0 < found["idle_share"] < 1


def test_what_cannot_run_is_refused_as_by_a_run():
    with pytest.raises(BudgetError, match="the largest budget on offer"):
        preview(settings("1KiB"), seconds=0.01)
    with pytest.raises(ConfigError, match="cannot import 'nowhere'"):
        preview(settings("200%", model="nowhere:model"), seconds=0.01)


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit(width):
    machine = {"environment": ENVIRONMENT, "workloads": [throughput(SMALL, seconds=0.01).to_json()]}
    long = {**machine["workloads"][0], "name": max((w.name for w in WORKLOADS), key=len), "overhead": None}
    machine["workloads"].append(long)
    run = {"run": preview(settings("200%"), seconds=0.01).to_json()}
    for table in (machine_table(machine), preview_table(run, "this process, 1 thread")):
        text = printed(table, width)
        assert all(len(line.rstrip()) <= width for line in text.splitlines()) and "…" not in text
        for row in table.rows:
            assert all(cell in text for cell in row), row
