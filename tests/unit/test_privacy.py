"""Client-level differential privacy: what it adds up to, what nobody is told, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from typing import Any

import dp_accounting
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_experiment import settings
from test_nodes import HASTY, Lab
from typer.testing import CliRunner

from scalefl import privacy as privacy_module
from scalefl.cli import app
from scalefl.comparison import load_comparison
from scalefl.config import to_plain
from scalefl.coords import take
from scalefl.engines.local import LocalEngine
from scalefl.engines.messages import Failure, Offer, Update, unpack
from scalefl.engines.remote import RemoteEngine
from scalefl.errors import ConfigError, EmptyCohort
from scalefl.experiment import Experiment
from scalefl.loop import federate
from scalefl.methods import METHODS, PRESETS
from scalefl.privacy import Mechanism, NoisyTotal, Privacy, check_plan, check_private, epsilon, holders
from scalefl.record import PrivateRecord
from scalefl.report import read_run
from scalefl.report.comparison import read_results, tables, write
from scalefl.report.tables import comparison, summary_table
from scalefl.rng import NORMAL_LIMIT, normal, random_bytes
from scalefl.run_folder import RunFolder, read_json
from scalefl.runner import run, run_rounds
from scalefl.sampling import UniformSampler, everybody
from scalefl.terminal import _described
from scalefl.tracking import figures
from scalefl.types import UNTOLD, ClientInfo, Method, ServerState
from scalefl.units import privacy
from support import PROBLEM, WORK, Clients, MadeData, full_bytes, identical, make_method, play, spec

MODEL = spec(norm="group")
BLOCKS = ["0", "1"]
SIZES = [8, 20, 5, 9, 17, 1, 12, 30]
BUDGETS = tuple(int(share * full_bytes(MODEL)) for share in (1.3, 0.95, 1.3, 0.9))
CASES: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedavg adam": {"server": {"kind": "fedadam"}},
    "scalefl": {"blocks": BLOCKS},
    "scalefl elastic": {"blocks": BLOCKS, "spans": "elastic"},
    "scalefl-paper": {"blocks": BLOCKS, "means": "micro-batches"},
    "sbt": {"blocks": BLOCKS, "means": "micro-batches"},
    "fedepth": {"blocks": BLOCKS},
    "depthfl": {"blocks": BLOCKS},
    "profl": {"blocks": BLOCKS, "means": "micro-batches"},
    "slt": {"blocks": BLOCKS, "rounds": 3},
    "heterofl": {"own_classes": False},
    "fedrolex": {"own_classes": False},
    "fedrolex random": {"own_classes": False, "window": "random"},
}
each_case = pytest.mark.parametrize("case", CASES)


@cache
def method_of(case: str) -> Method:
    return make_method(case.split()[0], **CASES[case])


def mechanism(rate: float = 1.0, **changes: Any) -> Mechanism:
    return Mechanism(Privacy(**{"clip_norm": 0.05, "noise_multiplier": 1.0, "delta": 1e-3, "seed": 1, **changes}), rate)


class Watched:
    """A method that notes whom it plans for, and what it is given to aggregate."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.cohorts: list[list[ClientInfo]] = []
        self.plans: list[Any] = []
        self.totals: list[NoisyTotal] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def plan(self, state, cohort):
        self.cohorts.append(list(cohort))
        return self.method.plan(state, cohort)

    def aggregate(self, state, plan, total):
        self.plans.append(plan)
        self.totals.append(total)
        return self.method.aggregate(state, plan, total)


def start(method: Method, seed: int = 1) -> ServerState:
    return method.init(MODEL, PROBLEM, seed=seed, smallest_memory_bytes=min(BUDGETS))


def played(
    method: Any,
    privacy: Mechanism,
    *,
    data: MadeData | None = None,
    budgets: tuple[int, ...] = BUDGETS,
    rounds: int = 1,
    state: ServerState | None = None,
    engine: Any = None,
) -> tuple[list[ServerState], list[PrivateRecord]]:
    data = data or MadeData(SIZES)
    engine = engine or LocalEngine(data, Clients(data, budgets))
    states, records = [state or start(method)], []
    going = federate(method, engine, everybody, states[0], privacy=privacy)
    for _ in range(rounds):
        state, record = next(going)
        states.append(state)
        records.append(record)
    return states, records


def sums(total: NoisyTotal) -> dict[str, torch.Tensor]:
    return {name: value * total._grid for name, value in total._sums.items()}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return math.sqrt(sum(float((a[name] - b[name]).square().sum()) for name in a))


# Settings


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clip_norm": 0.0}, "clip_norm = 0"),
        ({"clip_norm": -1.0}, "privacy.clip_norm = -1"),
        ({"clip_norm": math.inf}, "finite"),
        ({"noise_multiplier": -0.1}, "privacy.noise_multiplier"),
        ({"noise_multiplier": math.nan}, "finite"),
        ({"delta": 0.0}, "privacy.delta = 0.0: expected more than 0"),
        ({"delta": 1.0}, "less than 1"),
        ({"delta": 1.5}, "privacy.delta"),
    ],
)
def test_bad_values_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        settings("200%", privacy={"clip_norm": 1.0, "noise_multiplier": 1.0, "delta": 1e-3, **changes})


def test_settings_that_lack_or_exceed_are_named():
    with pytest.raises(ConfigError, match="delta"):
        settings("200%", privacy={"clip_norm": 1.0, "noise_multiplier": 1.0})
    with pytest.raises(ConfigError, match=r"unknown key 'privacy.noise'.*noise_multiplier"):
        settings("200%", privacy={"clip_norm": 1.0, "noise": 1.0, "delta": 1e-3})


def test_a_delta_that_allows_to_give_a_client_away_is_refused():
    with pytest.raises(ConfigError, match="one in the number of clients"):
        mechanism(delta=0.02).privacy.for_clients(50, 5)
    assert mechanism(delta=0.019).privacy.for_clients(50, 5).rate == 0.1
    assert mechanism().privacy.for_clients(5, 8).rate == 1.0


def test_a_missing_accountant_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(privacy_module, "find_spec", lambda name: None)
    config = settings("200%", privacy={"clip_norm": 1.0, "noise_multiplier": 1.0, "delta": 1e-3})
    with pytest.raises(ConfigError, match=r'pip install "scalefl\[privacy\]"'):
        Experiment(config)
    with pytest.raises(ConfigError, match=r"variant 'private': \[privacy\] needs a package"):
        both(tmp_path)


# Randomness


def test_normal_numbers_are_normal():
    for seed in (3, None):
        x = normal((1000, 501), seed, "test")
        assert x.shape == (1000, 501) and x.dtype == torch.float64
        n = x.numel()
        assert float(x.abs().max()) < NORMAL_LIMIT
        for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
            assert abs(float(x.pow(power).mean()) - expected) < 5 * math.sqrt(variance / n)
        for limit in (0.5, 1, 2, 3):
            inside = math.erf(limit / math.sqrt(2))
            assert abs(float((x.abs() < limit).double().mean()) - inside) < 5 * math.sqrt(inside * (1 - inside) / n)
        flat = x.flatten()
        for lag in (1, 2**15, 2**16):  # neighbours, the two numbers of a pair, pieces
            assert abs(float((flat[:-lag] * flat[lag:]).mean())) < 5 / math.sqrt(n - lag)


def test_without_a_seed_nothing_comes_twice():
    assert random_bytes(32, None, "a") != random_bytes(32, None, "a")
    assert random_bytes(32, 1, "a") == random_bytes(32, 1, "a") != random_bytes(32, 1, "b")
    assert normal((), 1, "a").shape == () and normal((0, 2), 1, "a").shape == (0, 2)
    method = method_of("fedavg")
    runs = [played(method, mechanism(seed=None))[0][-1] for _ in range(2)]
    assert not identical(runs[0].params, runs[1].params)


def test_each_client_takes_part_by_a_toss_of_its_own():
    data = MadeData([4] * 60)
    clients, method = Clients(data, (2 * full_bytes(MODEL),)), method_of("fedavg")
    state = start(method)
    plan = method.plan(state, [clients[i].untold for i in range(60)])
    counts = []
    for seed in (None, 5):
        drawn = [
            {task.client_id for task in mechanism(0.3, seed=seed).drawn(replace(state, round=round), plan)}
            for round in range(200)
        ]
        counts = [len(ids) for ids in drawn]
        assert abs(sum(counts) - 200 * 18) < 5 * math.sqrt(200 * 60 * 0.3 * 0.7)
        variance = sum((count - 18) ** 2 for count in counts) / 200
        assert 60 * 0.3 * 0.7 * 0.6 < variance < 60 * 0.3 * 0.7 * 1.5, "not a fixed number of clients"
        assert all(abs(sum(i in ids for ids in drawn) - 60) < 5 * math.sqrt(200 * 0.3 * 0.7) for i in range(60))
    assert all(task.is_private for task in mechanism(1.0).drawn(state, plan))


# The sum


@hypothesis_settings(deadline=None)
@given(
    st.floats(1e-4, 1e3),
    st.floats(1e-3, 10.0),
    st.integers(0, 2**31),
    st.sampled_from(["fedavg", "heterofl", "scalefl"]),
)
def test_no_client_adds_more_than_the_clip_norm(scale, clip_norm, seed, case):
    """And what is shorter is left alone."""
    method = method_of(case)
    state = start(method)
    plan = method.plan(state, [ClientInfo(i, UNTOLD, BUDGETS[i]) for i in range(4)])
    task = plan.tasks[seed % len(plan.tasks)]
    draw = torch.Generator().manual_seed(seed)
    total = mechanism(clip_norm=clip_norm, noise_multiplier=0.0).total(state, plan)
    coords = plan.coords[task.client_id]
    before = {name: take(state.params[name], coords[name]) for name in task.moving}
    params = {n: t + scale * torch.randn(t.shape, generator=draw) for n, t in before.items()}
    total.add(params, 1, coords, {})
    norm = math.sqrt(sum(float((params[n].double() - t.double()).square().sum()) for n, t in before.items()))
    added = math.sqrt(sum(float(value.square().sum()) for value in sums(total).values()))
    assert added <= clip_norm * (1 + 1e-12)
    assert added == pytest.approx(min(norm, clip_norm), rel=1e-6)


@each_case
def test_without_clipping_and_noise_it_is_the_mean_of_all(case):
    data = MadeData([8] * 4)
    method = method_of(case)
    with LocalEngine(data, Clients(data, BUDGETS)) as engine:
        plain, _ = play(method, engine, 2, model=MODEL)
        private, _ = played(method, mechanism(clip_norm=100.0, noise_multiplier=0.0), data=data, rounds=2)
    assert plain[-1].params.keys() == private[-1].params.keys()
    for name, tensor in plain[-1].params.items():
        torch.testing.assert_close(private[-1].params[name], tensor, rtol=1e-5, atol=2e-6)


@each_case
def test_noise_is_as_large_as_it_has_to_be(case):
    """Each coordinate that somebody eligible could train has z·C over its denominator; the others keep their bits."""
    method = Watched(method_of(case))
    privacy = mechanism(1e-9, noise_multiplier=3.0)
    states, (record,) = played(method, privacy)
    (total,), (plan,) = method.totals, method.plans
    assert {task.client_id for task in plan.tasks} == {client.id for client in method.cohorts[-1]}
    mean, scores = total.mean(states[0].params), []
    for name, tensor in states[0].params.items():
        if name not in mean:
            assert identical({name: tensor}, {name: states[1].params[name]})
            continue
        held = total.held(name)
        held = torch.ones(tensor.shape, dtype=torch.bool) if held is None else held
        moved = mean[name].double() - tensor.double()
        assert bool((moved[~held] == 0).all())
        scores.append(moved[held] / (3.0 * 0.05))  # the rate is so small that every denominator is 1
    all_scores = torch.cat(scores)
    n = len(all_scores)
    assert n > 100 and abs(float(all_scores.mean())) < 5 / math.sqrt(n)
    assert abs(float(all_scores.square().mean()) - 1) < 5 * math.sqrt(2 / n)
    assert record.privacy["releases"] == 1


@each_case
def test_denominators_count_everybody_who_may_take_part(case):
    """As counting one coordinate after another does; so they do not depend on who was drawn."""
    method = method_of(case)
    state = start(method)
    plan = method.plan(state, [ClientInfo(i, UNTOLD, BUDGETS[i % 4]) for i in range(8)])
    expected: dict[str, torch.Tensor] = {}
    for task in plan.tasks:
        for name in task.moving:
            count = expected.setdefault(name, torch.zeros(state.params[name].shape, dtype=torch.int64))
            window = plan.coords[task.client_id][name]
            rows = [torch.arange(n) if i is None else i for n, i in zip(count.shape, window or (), strict=bool(window))]
            count[torch.meshgrid(*rows, indexing="ij") if window else ...] += 1
    found = holders(state.params, plan)
    assert found.keys() == expected.keys()
    for name, count in expected.items():
        assert torch.equal(torch.as_tensor(found[name]).expand(count.shape), count)
    rate = 0.6
    total = mechanism(rate, noise_multiplier=0.0).total(state, plan)
    for value in total._sums.values():
        value.fill_(1 / total._grid)
    for name, tensor in total.mean({n: torch.zeros_like(t) for n, t in state.params.items()}).items():
        wanted = torch.where(expected[name] > 0, 1 / (rate * expected[name]).clamp(min=1), 0.0)
        torch.testing.assert_close(tensor, wanted.to(tensor.dtype))


@each_case
@pytest.mark.parametrize("client", [0, 3, 7])
def test_one_clients_data_changes_the_sum_by_the_clip_norm_at_most(case, client):
    """Without it, all else is as before to the bit: plans, cohorts, what others add, and the noise."""
    runs = []
    for gone in (False, True):
        sizes = [0 if gone and i == client else n for i, n in enumerate(SIZES)]
        method = Watched(method_of(case))
        state = replace(start(method), round=1)
        played(method, mechanism(0.9), data=MadeData(sizes), state=state)
        runs.append(method)
    (a,), (b,) = (run.totals for run in runs)
    assert runs[0].cohorts == runs[1].cohorts
    assert all(client.num_examples == UNTOLD and client.classes is None for client in runs[0].cohorts[-1])
    moved = distance(sums(a), sums(b))
    took_part = any(task.client_id == client for task in mechanism(0.9).drawn(state, runs[0].plans[0]))
    assert moved <= 0.05 * (1 + 1e-9)
    assert moved == 0.0 or took_part


class Broken(MadeData):
    """Data of which that of some clients cannot be read."""

    broken: tuple[int, ...] = ()

    def examples(self, client: int):
        if client in self.broken:
            raise OSError("the disk of Ms Miller has gone")
        return super().examples(client)

    def label_counts(self, client: int):
        return MadeData(self.sizes).label_counts(client)


def test_clients_without_data_move_nothing():
    """Not even by weight decay: else what they add would differ from nothing by more than the clip norm allows."""
    method = make_method("fedavg", work=replace(WORK, weight_decay=0.5))
    states, _ = played(method, mechanism(noise_multiplier=0.0), data=MadeData([0] * len(SIZES)))
    assert identical(states[0].params, states[1].params)


def test_a_lost_client_changes_nothing_but_its_own_part(caplog):
    method, data = method_of("scalefl"), Broken(SIZES)
    data.broken = (2,)
    lost, _ = played(method, mechanism(), data=data, rounds=2)
    without, _ = played(method, mechanism(), data=MadeData([0 if i == 2 else n for i, n in enumerate(SIZES)]), rounds=2)
    assert identical(lost[-1].params, without[-1].params)
    assert lost[-1].tightened == {} and "lost" not in caplog.text


def test_clients_that_diverge_are_left_out():
    method = make_method("fedavg", work=replace(WORK, lr=1e30))
    states, _ = played(method, mechanism())
    without, _ = played(method, mechanism(), data=MadeData([0] * len(SIZES)))
    assert identical(states[1].params, without[1].params)


def test_a_round_of_which_all_are_lost_is_noise_and_counts(caplog):
    method, data = method_of("fedavg"), Broken(SIZES)
    data.broken = tuple(range(len(SIZES)))
    states, records = played(method, mechanism(), data=data, rounds=2)
    empty, _ = played(method, mechanism(), data=MadeData([0] * len(SIZES)), rounds=2)
    assert identical(states[-1].params, empty[-1].params)
    assert "round 1: all clients that took part were lost: OSError" in caplog.text
    assert [record.privacy["releases"] for record in records] == [1, 2]


def test_rounds_without_anybody_happen():
    states, records = played(method_of("scalefl"), mechanism(1e-12), rounds=3)
    assert [state.round for state in states] == [0, 1, 2, 3]
    assert not identical(states[1].params, states[2].params)
    assert [record.privacy["releases"] for record in records] == [1, 2, 3]


def test_where_nobody_is_eligible_the_run_ends():
    with pytest.raises(EmptyCohort, match="taking part needs"):
        played(method_of("fedavg"), mechanism(), budgets=(1000,))


@pytest.mark.parametrize("case", ["scalefl", "fedrolex random"])
def test_workers_nodes_and_resumptions_change_nothing(case, tmp_path):
    method, data = method_of(case), MadeData(SIZES)
    expected, records = played(method, mechanism(0.7), rounds=3)
    with LocalEngine(data, Clients(data, BUDGETS), workers=2) as apart:
        others, told = played(method, mechanism(0.7), rounds=3, engine=apart)
    assert told == records
    lab = Lab(tmp_path, data, LocalEngine(data, Clients(data, BUDGETS)), present=[100 + i for i in range(8)])
    remote, told = played(method, mechanism(0.7), rounds=3, engine=RemoteEngine(lab, PROBLEM, HASTY, is_private=True))
    assert told == records
    again, _ = played(method, mechanism(0.7), rounds=2, state=expected[1])
    for a, b, c, d in zip(expected, others, remote, [expected[0], *again], strict=True):
        assert identical(a.params, b.params) and identical(a.params, c.params) and identical(a.params, d.params)
    other_seed, _ = played(method, mechanism(0.7, seed=2))
    other_run, _ = played(method, mechanism(0.7), state=replace(expected[0], seed=9))
    assert not identical(other_seed[1].params, expected[1].params)
    assert not identical(other_run[1].params, expected[1].params)


# What nobody is told


def test_nothing_but_moves_crosses_to_the_server(tmp_path):
    data = Broken([8, 20, 9, 17])
    data.broken = (3,)
    clients = Clients(data, (2 * full_bytes(MODEL),))
    lab = Lab(tmp_path, data, LocalEngine(data, clients))
    said = []
    pull = lab.pull

    def listen(messages):
        found = pull(messages)
        said.extend(answer.parcel for answer in found)
        return found

    lab.pull = listen
    method = method_of("fedavg")
    played(method, mechanism(), engine=RemoteEngine(lab, PROBLEM, HASTY, is_private=True))
    headers = [unpack(parcel, Offer | Update | Failure) for parcel in said]
    offers = [header for header in headers if isinstance(header, Offer)]
    assert [offer.client for offer in offers] == [clients[i].untold for i in range(4)]
    updates = [header for header in headers if isinstance(header, Update)]
    told = [(u.num_examples, u.metrics, u.seconds, u.peak_bytes, u.scales, u.client) for u in updates]
    assert told == [(1, {}, 0.0, None, {}, None)] * 3
    (failure,) = [header for header in headers if isinstance(header, Failure)]
    assert failure == Failure("it failed; its node knows why")
    assert not any(b"Miller" in parcel.header for parcel in said)
    moving = {name for name, _ in MODEL.build(0).named_parameters()}
    assert all(parcel.tensors.keys() in (set(), moving) for parcel in said)


def test_records_journals_and_summaries_tell_nothing_of_who_took_part(tmp_path):
    config = private(evaluation={"every": 2})
    summary = run(config, tmp_path / "run")
    assert summary.keys() == {
        "name",
        "rounds",
        "test",
        "validation",
        "full_training_peak_bytes",
        "mean_budget",
        "predicted_peak_bytes",
        "num_clients",
        "privacy",
    }
    first, *rounds = RunFolder(tmp_path / "run").read_journal()
    assert "privacy" not in first
    known = {"round", "stage", "predicted_peak_bytes", "privacy", "validation", "plane"}
    assert all(line.keys() <= known for line in rounds)
    epsilons = [line["privacy"]["epsilon"] for line in rounds]
    assert epsilons == sorted(set(epsilons)) and summary["privacy"] == rounds[-1]["privacy"]
    assert summary["privacy"] == {"epsilon": epsilon(0.5, 1.0, 1e-3, 3), "delta": 1e-3, "releases": 3}


# What is refused


def tried(method: Method, model=MODEL) -> str:
    """Why a method is refused; nothing if a round of it works."""
    state = method.init(model, PROBLEM, seed=1, smallest_memory_bytes=min(BUDGETS))
    try:
        _, (record,) = played(method, mechanism(), state=state)
    except ConfigError as error:
        with pytest.raises(ConfigError):
            check_private(method, state)
        return str(error)
    check_private(method, state)
    assert record.privacy["epsilon"] > 0
    return ""


@pytest.mark.parametrize("name", [*METHODS, *PRESETS])
def test_every_method_runs_or_is_refused_clearly(name):
    more = {"rounds": 4} if name == "slt" else {}
    means = {} if name in ("scalefl", "fedavg") else {"means": "micro-batches"}
    blocks = {} if name in ("fedavg", "heterofl", "fedrolex") else {"blocks": BLOCKS}
    why = tried(make_method(name, **more, **means, **blocks))
    assert why.startswith("[privacy]: the method leaves out") == (name in ("heterofl", "fedrolex"))
    assert bool(why) == (name in ("heterofl", "fedrolex")), why
    assert 'norm = "group"' in tried(make_method(name, **more, **means, **blocks), spec())


def test_tensors_of_a_clients_own_are_refused():
    assert "method.feddyn" in tried(make_method("depthfl", blocks=BLOCKS, feddyn={"clients": 8, "alpha": 0.3}))


def test_tensors_of_a_clients_own_are_refused_in_any_plan():
    method = method_of("fedavg")
    plan = method.plan(state := start(method), [ClientInfo(0, UNTOLD, BUDGETS[0])])
    with pytest.raises(ConfigError, match="tensors of their own"):
        check_plan(replace(plan, own={0: {"drift": torch.zeros(2)}}), state)


def test_statistics_that_are_collected_later_are_refused():
    assert "running statistics" in tried(make_method("heterofl", own_classes=False), spec())
    assert "running statistics" in tried(make_method("heterofl", own_classes=False, statistics="running"), spec())


def test_what_is_refused_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match="running statistics"):
        run(private(model_arguments={}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# The accountant


@pytest.mark.parametrize("rate", [0.01, 0.2, 1.0])
@pytest.mark.parametrize("noise", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("rounds", [1, 30])
def test_epsilon_is_the_librarys(rate, noise, rounds):
    accountant = PLDAccountant()
    accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise)), rounds)
    assert epsilon(rate, noise, 1e-5, rounds) == pytest.approx(accountant.get_epsilon(1e-5), rel=0.01, abs=1e-3)


def test_epsilon_of_one_gaussian_is_that_of_theory():
    """δ = Φ(1/2z − εz) − e^ε·Φ(−1/2z − εz): Balle and Wang, ICML 2018, theorem 8."""

    def phi(t: float) -> float:
        return (1 + math.erf(t / math.sqrt(2))) / 2

    for noise in (0.3, 1.0, 5.0):
        found = epsilon(1.0, noise, 1e-4, 1)
        exact = phi(1 / (2 * noise) - found * noise) - math.exp(found) * phi(-1 / (2 * noise) - found * noise)
        assert exact <= 1e-4 * (1 + 1e-9), "an upper bound"
        assert exact == pytest.approx(1e-4, rel=0.01)


def test_epsilon_grows_with_rounds_and_rate_and_falls_with_noise():
    found = [epsilon(0.1, 1.0, 1e-4, n) for n in (0, 1, 2, 10, 100)]
    assert found[0] == 0 and found == sorted(set(found))
    assert epsilon(0.1, 1.0, 1e-4, 10) < epsilon(0.2, 1.0, 1e-4, 10)
    assert epsilon(0.1, 1.0, 1e-4, 10) > epsilon(0.1, 1.1, 1e-4, 10) > epsilon(0.1, 1.1, 1e-3, 10)
    assert epsilon(0.1, 0.02, 1e-4, 10) > 1000


def test_without_noise_there_is_no_guarantee():
    assert mechanism(noise_multiplier=0.0).spent(3) == {"epsilon": None, "delta": 1e-3, "releases": 3}


# Runs


def private(**changes: Any):
    plain = {
        "model_arguments": {"norm": "group"},
        "rounds": 3,
        "privacy": {"clip_norm": 0.5, "noise_multiplier": 1.0, "delta": 1e-3, "seed": 3},
    }
    return settings("200%", **{**plain, **changes})


def test_resuming_equals_going_on(tmp_path):
    config = private(save_every=2)
    whole = run(config, tmp_path / "whole")
    rounds = run_rounds(Experiment(config), tmp_path / "killed")
    next(rounds)
    rounds.close()
    assert run(config, tmp_path / "killed", resume=True) == whole
    for name in ("state.safetensors", "journal.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


def test_rounds_that_are_done_again_with_other_noise_count_again(tmp_path):
    config = private(save_every=3, privacy={"clip_norm": 0.5, "noise_multiplier": 1.0, "delta": 1e-3})
    files = RunFolder(tmp_path / "run")
    for _ in range(2):  # killed after the second round, twice; before the first save there is the state of round 0
        rounds = run_rounds(Experiment(config), files.path, resume=files.config.exists())
        next(rounds)
        next(rounds)
        rounds.close()
    assert [line.get("privacy", {}).get("releases") for line in files.read_journal()] == [None, 3, 4]
    with files.journal.open("a") as file:  # and a third time, in the middle of a line
        file.write('{"round": 3, "validation": {"acc')
    assert run(config, files.path, resume=True)["privacy"]["releases"] == 8
    assert [line["privacy"]["releases"] for line in files.read_journal()[1:]] == [6, 7, 8]
    assert run(config, files.path, resume=True)["privacy"]["releases"] == 8


def test_clients_elsewhere_are_asked_for_no_more_and_keep_the_rate_of_the_start(tmp_path):
    data = MadeData([8, 20, 9, 17])
    lab = Lab(tmp_path, data, LocalEngine(data, Clients(data, (2 * full_bytes(MODEL),))))
    config = private(save_every=1)

    def begun():
        experiment = Experiment(config, lambda problem: RemoteEngine(lab, problem, HASTY, is_private=True))
        return run_rounds(experiment, tmp_path / "run", resume=(tmp_path / "run").exists())

    rounds = begun()
    next(rounds)
    rounds.close()  # the second round was under way, and is kept
    assert all(client["num_examples"] is None for client in read_json(RunFolder(tmp_path / "run").clients)["clients"])
    lab.present = [100, 101]
    assert [progress.line["round"] for progress in begun()] == [3]
    spent = [line["privacy"]["epsilon"] for line in RunFolder(tmp_path / "run").read_journal()[1:]]
    assert spent == [epsilon(0.5, 1.0, 1e-3, n) for n in (1, 2, 3)]
    summary = read_json(RunFolder(tmp_path / "run").summary)
    assert summary["privacy"]["releases"] == 3 and "num_clients_seen" not in summary


def test_clients_on_nodes_give_the_same_run(tmp_path):
    here = run(private(), tmp_path / "here")
    there = run(private(engine={"name": "flower"}), tmp_path / "there")
    assert here == there
    states = [(tmp_path / name / "state.safetensors").read_bytes() for name in ("here", "there")]
    assert states[0] == states[1]


def test_reports_and_progress_tell_epsilon(tmp_path):
    runs = run_rounds(Experiment(private(name="private")), tmp_path / "private")
    words = [words["privacy"] for _, words in _described(runs, tmp_path / "private")]
    assert words[0].startswith("ε = ") and words[0].endswith(" at δ = 0.001") and len(set(words)) == 3
    line = RunFolder(tmp_path / "private").read_journal()[-1]
    told = {"predicted_peak_bytes", "privacy/epsilon", "privacy/delta", "privacy/releases"}
    assert told == {name for name in figures(line) if not name.startswith(("validation/", "plane/"))}
    run(settings("200%", name="plain"), tmp_path / "plain")
    secret, plain = (read_run(tmp_path / name) for name in ("private", "plain"))
    assert ("privacy", words[-1]) in summary_table(secret).rows
    assert all(name != "privacy" for name, _ in summary_table(plain).rows)
    table = comparison([secret, plain])
    column = table.header.index("privacy")
    assert [row[column] for row in table.rows] == [words[-1], "–"]
    assert "privacy" not in comparison([plain]).header


def test_plans_tell_what_the_run_will_come_to(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"config": to_plain(private())}))
    expected = privacy(mechanism(0.5).spent(3))
    said = CliRunner().invoke(app, ["plan", str(path)])
    assert said.exit_code == 0 and f"Privacy after 3 rounds: {expected}" in said.stdout
    found = json.loads(CliRunner().invoke(app, ["plan", str(path), "--json"]).stdout)
    assert found["privacy"]["epsilon"] == epsilon(0.5, 1.0, 1e-3, 3)


def test_a_bound_is_rounded_up():
    assert privacy({"epsilon": 1.2301, "delta": 1e-5}) == "ε = 1.24 at δ = 1e-05"
    assert privacy({"epsilon": 0.0, "delta": 1e-3}) == "ε = 0.00 at δ = 0.001"
    assert privacy({"epsilon": None, "delta": 1e-3}) == "no privacy (no noise)"


def both(tmp_path):
    """A comparison of a private variant with a plain one."""
    config = {
        "name": "both",
        "model": "support:tiny",
        "model_arguments": {"norm": "group"},
        "rounds": 2,
        "clients_per_round": 2,
        "data": {"source": {"name": "test_experiment:make_data"}},
        "devices": {"classes": "mixed"},
        "work": {"batch_size": 8},
        "compare": {"seeds": [0]},
        "variants": {
            "plain": {"method": {"name": "fedavg", "population": "all"}},
            "private": {
                "method": {"name": "fedavg", "population": "all"},
                "privacy": {"clip_norm": 0.5, "noise_multiplier": 1.0, "delta": 1e-3},
            },
        },
    }
    (tmp_path / "both.json").write_text(json.dumps({"config": config}))
    return load_comparison(tmp_path / "both.json", runs=tmp_path / "runs")


def test_comparisons_hold_private_runs_beside_others(tmp_path):
    found = both(tmp_path)
    found.describe()
    for job in found.jobs:
        run(job.config, job.folder)
    results = read_results(found.path)
    accuracy, cost = tables(results, "")
    column = accuracy.header.index("ε")
    assert accuracy.rows[0][column] == "–" != accuracy.rows[1][column]
    assert cost.rows[1][cost.header.index("FLOPs\ntera")] == "–"
    assert all(path.exists() for path in write(results, tmp_path / "out"))


def test_a_cohort_of_others_choice_may_be_drawn_from():
    """Whoever the sampler returns may take part: denominators are of these."""
    data, method = MadeData(SIZES), Watched(method_of("fedavg"))
    engine = LocalEngine(data, Clients(data, (2 * full_bytes(MODEL),)))
    next(federate(method, engine, UniformSampler(3), start(method), privacy=mechanism()))
    assert set(method.totals[0]._holders.values()) == {3}
