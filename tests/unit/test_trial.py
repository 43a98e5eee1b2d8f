"""Who trains, where nobody says: tried out, kept, and reduced to what the machine has room for."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import scalefl.engines.trial
from scalefl.comparison import load_comparison
from scalefl.config import make_config, to_plain
from scalefl.engines.local import LocalEngine
from scalefl.engines.trial import AtOnce, Crew, _Trial, by_trial, described, makespan, most_workers, room_for
from scalefl.errors import ConfigError
from scalefl.experiment import Experiment
from scalefl.loop import federate
from scalefl.methods.fedavg import FedAvg
from scalefl.runner import run
from scalefl.sampling import UniformSampler
from scalefl.steps import full_step
from scalefl.types import ClientTask, LocalWork
from support import PROBLEM, Clients, MadeData, full_bytes, spec

DEVICE = {
    "name": "all",
    "share": 1.0,
    "memory": "200%",
    "flops_per_second": 1e9,
    "bandwidth_bytes_per_second": 1e6,
}


def settings(**changes):
    content = {
        "model": "cnn",
        "model_arguments": {"width": 0.0625},
        "rounds": 2,
        "clients_per_round": 3,
        "data": {"source": {"name": "mnist5k"}, "clients": 200},
        "devices": {"classes": [DEVICE]},
        "method": {"name": "fedavg"},
        "evaluation": {"plane_samples": 32},
    }
    return make_config({**content, **changes})


@pytest.mark.parametrize(
    ("seconds", "workers", "wanted"),
    [([3, 1, 2], 1, 6), ([3, 1, 2], 2, 3), ([3, 1, 2], 5, 3), ([5, 4, 3, 3, 3], 2, 10), ([], 2, 0)],
)
def test_the_longest_first(seconds, workers, wanted):
    assert makespan(seconds, workers) == wanted


def trial(
    monkeypatch, milliseconds, *, rounds=100, cores=4, most=4, cohort=8, further=None, start=None, sizes=None, **settled
) -> Crew:
    """Who is chosen if the longest task takes so long, by threads, and each further client at once such a part.

    To start a step that they share takes what is left, as if one client took as long alone, or such a part.
    """
    data = MadeData(sizes or [12] * max(cohort, 8))
    method = FedAvg(work=LocalWork(batch_size=4))
    clients = Clients(data, (10 * full_bytes(),))
    state = method.init(spec(), PROBLEM, seed=0, smallest_memory_bytes=0)
    plan = method.plan(state, UniformSampler(cohort)(clients, 0, state))
    monkeypatch.setattr(scalefl.engines.trial, "num_cores", lambda: cores)
    monkeypatch.setattr(_Trial, "seconds", lambda *a: milliseconds[a[-1]] / 1000)
    found = None if further is None else AtOnce(1 - further if start is None else start, further)
    monkeypatch.setattr(_Trial, "at_once", lambda *a: found)
    return by_trial(method, state, plan, data.examples(0), rounds=rounds, most=most, **settled)


@pytest.mark.parametrize(
    ("milliseconds", "changes", "wanted"),
    [
        # Small clients: a thread each. Large ones that threads help: threads.
        ({1: 100, 2: 90, 4: 85}, {}, (4, 1)),
        ({1: 100, 2: 49, 4: 20}, {}, (0, 4)),
        # Threads help a little: not for that.
        ({1: 100, 2: 49, 4: 24}, {"rounds": 10_000}, (4, 1)),
        # Two long clients leave two of four cores idle.
        ({1: 1000, 2: 520, 4: 500}, {"cohort": 2}, (2, 2)),
        # Workers take longer to start than all rounds.
        ({1: 10, 2: 9.5, 4: 9.5}, {"rounds": 2}, (0, 1)),
        # No room for workers, but for threads.
        ({1: 100, 2: 60, 4: 40}, {"most": 1}, (0, 4)),
        ({1: 100}, {"cores": 1, "most": 1}, (0, 1)),
        # One of the two is settled: two workers leave two cores to each, three threads leave room for one worker.
        ({1: 100, 2: 50}, {"workers": 2}, (2, 2)),
        ({1: 100, 2: 98}, {"workers": 2}, (2, 1)),
        ({1: 100}, {"workers": 3}, (3, 1)),
        ({1: 100}, {"workers": 9}, (9, 1)),
        ({3: 50}, {"threads": 3}, (0, 3)),
        ({2: 50}, {"threads": 2}, (2, 2)),
    ],
)
def test_what_is_done_first_is_chosen(monkeypatch, milliseconds, changes, wanted):
    assert trial(monkeypatch, milliseconds, **changes)[:2] == wanted


@pytest.mark.parametrize(
    ("further", "changes", "wanted"),
    [
        # Two of eight for each of four workers, or all of them here: whoever is done first.
        (0.1, {}, (4, 1, 2)),
        (0.0, {"rounds": 10}, (0, 1, 8)),
        (0.1, {"most": 1}, (0, 1, 8)),
        # A fifth less, and two seconds of the whole run: else bits stay what they are.
        (0.65, {"cohort": 2, "most": 1, "cores": 1}, (0, 1, 1)),
        (0.55, {"cohort": 2, "most": 1, "cores": 1}, (0, 1, 2)),
        (0.1, {"rounds": 2}, (0, 1, 1)),
        (None, {}, (4, 1, 1)),
        (1.3, {}, (4, 1, 1)),
        # What is settled stays.
        (0.1, {"clients_at_once": 1}, (4, 1, 1)),
        (1.0, {"clients_at_once": 5}, (4, 1, 5)),
        (0.0, {"clients_at_once": 8, "rounds": 20}, (0, 1, 8)),
        (0.1, {"workers": 1}, (1, 1, 8)),
        # 40 are not done by 32 and 8, but by 20 and 20.
        (0.1, {"cohort": 40, "most": 1}, (0, 1, 20)),
    ],
)
def test_clients_at_once_where_that_is_faster(monkeypatch, further, changes, wanted):
    changes = {"cohort": 8, **changes}
    found = trial(monkeypatch, {1: 100, 2: 90, 4: 85}, further=further, **changes)
    assert (found.workers, found.threads, found.clients_at_once) == wanted


def test_uneven_clients_are_done_in_more_runs(monkeypatch):
    """Sixteen equal ones in a run for each of two workers; if some are much longer, not all of these in one run."""
    settled = {"further": 0.5, "workers": 2, "threads": 1, "cohort": 16}
    assert trial(monkeypatch, {1: 100}, **settled).clients_at_once == 8
    assert trial(monkeypatch, {1: 100}, sizes=[*[400] * 4, *[12] * 12], **settled).clients_at_once == 2


@pytest.mark.parametrize(("batch", "done"), [(0.1, [4, 12]), (0.6, [4, 4])])
def test_what_the_first_task_loads_is_not_measured(monkeypatch, batch, done):
    """Three batches of four, or one where that takes long; each thread count alike, whoever comes first."""
    seen: list[int] = []

    def alone(trial, task, examples) -> float:
        seen.append(len(examples["label"]))
        return batch * len(examples["label"]) / 4 + (2.0 if len(seen) == 1 else 0.0)

    monkeypatch.setattr(_Trial, "_alone", alone)
    data = MadeData([12] * 8)
    task = ClientTask(0, 0, (full_step(spec(), PROBLEM, LocalWork(batch_size=4)),), 0)
    found = [_Trial(None, None, None, None).seconds(task, data.examples(0), threads) for threads in (1, 2)]
    assert found == pytest.approx([3 * batch] * 2)
    assert seen[2:] == done


def test_runs_whose_start_takes_long_are_no_gain_for_uneven_clients(monkeypatch):
    """Sixteen share it; but where each has another number of batches, each run is shared by fewer."""
    settled = {"further": 0.5, "start": 1.5, "workers": 2, "threads": 1, "cohort": 16}
    assert trial(monkeypatch, {1: 100}, **settled).clients_at_once == 8
    uneven = [4 * count for count in range(1, 17)]
    assert trial(monkeypatch, {1: 100}, sizes=uneven, **{**settled, "start": 0.5}).clients_at_once > 1
    assert trial(monkeypatch, {1: 100}, sizes=uneven, **settled).clients_at_once == 1


def test_as_many_at_once_as_there_is_memory_for(monkeypatch):
    peak = full_bytes(work=LocalWork(batch_size=4))
    monkeypatch.setattr("scalefl.engines.trial.spare_bytes", lambda: int(3.5 * peak))
    assert trial(monkeypatch, {1: 100}, further=0.1, most=1, cores=1).clients_at_once == 3


def test_on_a_gpu_its_own_memory_is_the_room(monkeypatch):
    monkeypatch.setattr("scalefl.engines.trial.spare_bytes", lambda: 10**9)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (device.index * 100, 400))
    # A twentieth of all of it is left to others.
    assert [room_for(20, torch.device(name)) for name in ("cuda:1", "cuda:3", "cuda:0")] == [4, 14, 1]
    assert room_for(10**8) == 10


def softmax(num_classes: int, dropout: float = 0.0) -> nn.Module:
    """So small that twelve clients at once take a third of the time: no noise makes that look like none."""
    noise = [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(nn.Flatten(), *noise, nn.Linear(784, num_classes))


def test_a_real_trial_finds_out_who_can():
    small = {"model": "test_trial:softmax", "model_arguments": {}}
    experiment = Experiment(settings(**small, clients_per_round=12, rounds=10**4))
    crew = experiment.settle_engine()
    assert crew is not None and crew.clients_at_once == experiment.config.engine.clients_at_once > 1
    assert "clients at once:" in described(crew) and "% of that each" in described(crew)
    small["model_arguments"] = {"dropout": 0.5}
    crew = Experiment(settings(**small, clients_per_round=12, rounds=10**4)).settle_engine()
    assert crew is not None and crew.clients_at_once == 1 and "at once" not in described(crew)


def test_who_settles_threads_gets_the_same_bits_everywhere():
    experiment = Experiment(settings(engine={"threads": 1, "workers": 0}, rounds=10**4))
    assert experiment.settle_engine() is None and experiment.config.engine.clients_at_once == 1


def test_a_real_trial_says_why():
    experiment = Experiment(settings())
    crew = experiment.settle_engine()
    assert crew is not None and crew.workers == 0, "two rounds of tiny clients are not worth the start of a worker"
    assert "ms on 1 thread" in described(crew) and described(crew).startswith("this process, ")
    assert experiment.settle_engine() is None, "settled"


def test_the_choice_is_kept_and_a_resumption_does_not_try_again(tmp_path, monkeypatch):
    asked = settings(engine={"workers": "auto"})
    run(asked, tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "config.json").read_text())["config"]["engine"]
    assert saved["workers"] == 0 and saved["threads"] >= 1

    def refuse(*_arguments, **_options):
        raise AssertionError("tried again")

    monkeypatch.setattr("scalefl.experiment.by_trial", refuse)
    assert run(asked, tmp_path / "run", resume=True)["rounds"] == 2


def test_a_choice_changes_no_number(tmp_path):
    found = run(settings(engine={"threads": 1}), tmp_path / "auto")
    wanted = run(settings(engine={"workers": 0, "threads": 1}), tmp_path / "set")
    assert found["test"] == wanted["test"]


def test_more_workers_than_room_are_reduced(monkeypatch):
    monkeypatch.setattr("scalefl.engines.trial.num_cores", lambda: 3)
    monkeypatch.setattr("scalefl.engines.trial.spare_bytes", lambda: 2**40)
    experiment = Experiment(settings(engine={"workers": 50, "threads": 1}))
    crew = experiment.settle_engine()
    assert crew is not None and (crew.workers, crew.threads) == (3, 1)
    assert described(crew) == "3 workers of 1 thread each: 50 workers were asked for, and there is room for 3"
    assert experiment.config.engine.workers == 3


def test_who_runs_too_many_workers_is_warned_and_a_resumption_where_there_is_less_room_too(
    tmp_path, monkeypatch, caplog
):
    cores = [3, 1]
    monkeypatch.setattr("scalefl.engines.trial.num_cores", lambda: cores[0])
    monkeypatch.setattr("scalefl.engines.trial.spare_bytes", lambda: 2**40)
    asked = settings(engine={"workers": 50, "threads": 1}, rounds=1)
    with caplog.at_level("INFO", "scalefl"):
        run(asked, tmp_path / "run")
    warned = [(record.levelname, record.message) for record in caplog.records if "workers" in record.message]
    reason = "50 workers were asked for, and there is room for 3"
    assert warned == [("WARNING", reason), ("INFO", f"engine: 3 workers of 1 thread each: {reason}")]
    caplog.clear(), cores.pop(0)
    run(asked, tmp_path / "run", resume=True)
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warned == ["50 workers were asked for, and there is room for 1"]


def test_memory_is_room_too(monkeypatch):
    monkeypatch.setattr("scalefl.engines.trial.num_cores", lambda: 8)
    monkeypatch.setattr("scalefl.engines.trial.spare_bytes", lambda: 2**30)
    assert most_workers(0) == 2 and most_workers(2**29) == 1 and most_workers(2**40) == 1

    def untold() -> int:
        raise OSError("no /proc")

    monkeypatch.setattr("scalefl.engines.trial.spare_bytes", untold)
    assert most_workers(0) == 8


def test_a_trial_that_fails_is_no_matter(monkeypatch):
    def fail(*_arguments, **_options):
        raise RuntimeError("no")

    monkeypatch.setattr("scalefl.experiment.by_trial", fail)
    crew = Experiment(settings()).settle_engine()
    assert crew == Crew(0, 1, "the trial failed with RuntimeError")


@pytest.mark.parametrize(("cap", "workers"), [("none", 0), ("measured", 2)])
def test_without_a_trial(monkeypatch, cap, workers):
    monkeypatch.setattr("scalefl.engines.trial.num_cores", lambda: 2)
    config = settings(engine={"cap": cap})
    if cap == "none":
        config = replace(config, engine=replace(config.engine, name="flower"))
    experiment = Experiment(config)
    assert experiment.settle_engine() == Crew(workers, 1)


def test_who_has_most_to_do_comes_first():
    data = MadeData([8, 40, 16, 32])
    method, clients = FedAvg(work=LocalWork(batch_size=4)), Clients(data, (10 * full_bytes(),))
    state = method.init(spec(), PROBLEM, seed=0, smallest_memory_bytes=0)
    asked: list[int] = []

    class Noting(LocalEngine):
        def fit(self, method, orders):
            orders = list(orders)
            asked.extend(task.client_id for task, _ in orders)
            return super().fit(method, orders)

    with Noting(data, clients) as engine:
        next(federate(method, engine, UniformSampler(4), state))
    assert asked == [1, 3, 2, 0]


def test_a_word_that_is_no_number_is_answered_with_both():
    with pytest.raises(ConfigError, match=r"engine\.workers = 'many'; known: auto, a number"):
        settings(engine={"workers": "many"})


@pytest.mark.parametrize(
    "engine",
    [
        {"workers": -1},
        {"threads": 0},
        {"workers": "many"},
        {"workers": 1.5},
        {"clients_at_once": 0},
        {"clients_at_once": "all"},
        {"clients_at_once": 2, "cap": "hard", "workers": 1},
        {"clients_at_once": 2, "cap": "measured"},
        {"clients_at_once": 2, "name": "flower"},
    ],
)
def test_bad_numbers_are_refused(engine):
    with pytest.raises(ConfigError, match=r"workers|threads|clients_at_once"):
        settings(engine=engine)


def test_runs_of_a_comparison_take_a_core_each(tmp_path):
    path = tmp_path / "some.json"
    variants = {"a": {}, "b": {"engine": {"cap": "measured", "threads": 2}}}
    path.write_text(json.dumps({**to_plain(settings()), "variants": variants}))
    engines = [job.config.engine for job in load_comparison(path, runs=tmp_path).jobs[:2]]
    assert [(engine.workers, engine.threads) for engine in engines] == [(0, 1), (1, 2)]
