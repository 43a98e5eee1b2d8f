"""The server optimizers against the papers' formulas, and what must not go through them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from scalefl.engines.local import LocalEngine
from scalefl.server_optimizers import Average, FedAdam, FedAvgM, apply_mean
from scalefl.types import Aux, ClientTask, LocalWork, RoundPlan, ServerState, Step
from support import PROBLEM, Clients, MadeData, full_bytes, identical, make_method, play, spec

W0 = torch.tensor([1.0, -2.0, 0.0])
MEANS = [torch.tensor(m) for m in ([1.5, -2.0, 0.1], [1.4, -1.0, 0.1], [2.0, -1.5, -0.3], [2.0, -1.5, 5.0])]


class Known:
    """A total whose mean is given."""

    def __init__(self, mean: dict[str, Tensor]) -> None:
        self._mean = mean

    def mean(self, base: object) -> dict[str, Tensor]:
        return self._mean

    def held(self, name: str) -> None:
        return None


def plan_of(*trainable: str) -> RoundPlan:
    step = Step(None, frozenset(trainable), frozenset(trainable), (), LocalWork())  # type: ignore[arg-type]
    return RoundPlan("all", (ClientTask(0, 0, (step,), 0),), {}, {}, {}, {})


def walk(optimizer, means: list[dict[str, Tensor]], params: dict[str, Tensor], *trainable: str) -> list[ServerState]:
    states = [ServerState(spec(), PROBLEM, params, 0, 0)]
    for mean in means:
        new, history = apply_mean(optimizer, states[-1], plan_of(*trainable), Known(mean))
        states.append(replace(states[-1], params=new, aux=Aux(history)))
    return states


def test_average_takes_the_mean():
    for state, mean in zip(walk(Average(), [{"w": m} for m in MEANS], {"w": W0}, "w")[1:], MEANS, strict=True):
        assert torch.equal(state.params["w"], mean)
        assert state.aux.tensors == {}


def test_fedavgm_is_server_momentum():
    """Hsu et al. (2019), section 4.3: v ← βv + Δw, w ← w − v with Δw = Σ nₖ/n (w − wₖ); here with a rate."""
    states = walk(FedAvgM(lr=0.7, momentum=0.8), [{"w": m} for m in MEANS], {"w": W0}, "w")
    w, v = W0.double(), torch.zeros(3).double()
    for state, mean in zip(states[1:], MEANS, strict=True):
        v = 0.8 * v + (w - mean.double())
        w = w - 0.7 * v
        torch.testing.assert_close(state.params["w"].double(), w, rtol=1e-5, atol=1e-6)


def test_fedavgm_without_momentum_is_the_average():
    for state, mean in zip(
        walk(FedAvgM(momentum=0.0), [{"w": m} for m in MEANS], {"w": W0}, "w")[1:], MEANS, strict=True
    ):
        torch.testing.assert_close(state.params["w"], mean, rtol=1e-6, atol=1e-7)


def test_fedadam_is_algorithm_2():
    """Reddi et al. (ICLR 2021), algorithm 2: v₋₁ = τ² (the least it allows), no bias correction."""
    lr, b1, b2, tau = 0.3, 0.6, 0.9, 0.05
    states = walk(FedAdam(lr=lr, beta1=b1, beta2=b2, tau=tau), [{"w": m} for m in MEANS], {"w": W0}, "w")
    x, m, v = W0.double(), torch.zeros(3).double(), torch.full((3,), tau**2).double()
    for state, mean in zip(states[1:], MEANS, strict=True):
        delta = mean.double() - x
        m = b1 * m + (1 - b1) * delta
        v = b2 * v + (1 - b2) * delta**2
        x = x + lr * m / (v.sqrt() + tau)
        torch.testing.assert_close(state.params["w"].double(), x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", [Average(), FedAvgM(), FedAdam()])
def test_statistics_and_counters_are_means(optimizer):
    """Running statistics and counters are no gradients: with momentum a variance could turn negative."""
    params = {"w": W0, "var": torch.ones(3), "count": torch.tensor(10)}
    means = [{"w": m, "var": torch.full((3,), 0.1), "count": torch.tensor(17 + i)} for i, m in enumerate(MEANS)]
    states = walk(optimizer, means, params, "w")
    for state, mean in zip(states[1:], means, strict=True):
        assert identical({"v": state.params["var"], "c": state.params["count"]}, {"v": mean["var"], "c": mean["count"]})
    assert all(key.endswith(".w") for key in states[-1].aux.tensors)


@pytest.mark.parametrize("optimizer", [FedAvgM(), FedAdam()])
def test_momentum_survives_rounds_in_which_a_block_does_not_train(optimizer):
    params = {"a": W0, "b": W0}
    means = [{"a": MEANS[0]}, {"b": MEANS[1]}, {"b": MEANS[2]}, {"a": MEANS[1]}]
    states = walk(optimizer, means, params, "a", "b")
    alone = walk(optimizer, [{"a": MEANS[0]}, {"a": MEANS[1]}], {"a": W0}, "a")
    assert identical({"a": states[-1].params["a"]}, {"a": alone[-1].params["a"]})
    for name in ("momentum", "first", "second"):
        key = f"server.{name}.a"
        assert all((key in s.aux.tensors) == (key in alone[1].aux.tensors) for s in states[1:])
        assert all(
            torch.equal(s.aux.tensors[key], alone[1].aux.tensors[key]) for s in states[1:4] if key in s.aux.tensors
        )
    # What did not train in a round keeps its bits and is not pushed on by its momentum.
    assert torch.equal(states[2].params["a"], states[1].params["a"])


def test_old_states_are_not_touched():
    states = walk(FedAdam(), [{"w": m} for m in MEANS], {"w": W0}, "w")
    before = [
        ({n: t.clone() for n, t in s.params.items()}, {n: t.clone() for n, t in s.aux.tensors.items()}) for s in states
    ]
    apply_mean(FedAdam(), states[-1], plan_of("w"), Known({"w": W0}))
    assert all(identical(s.params, p) and identical(s.aux.tensors, a) for s, (p, a) in zip(states, before, strict=True))


@pytest.mark.parametrize("optimizer", ["average", "fedavgm", "fedadam"])
def test_in_real_rounds_statistics_stay_what_clients_measured(optimizer):
    """Two equal first rounds but for the server: parameters differ, statistics and counters do not."""
    data = MadeData([9, 12, 10, 8])
    with LocalEngine(data, Clients(data, (2 * full_bytes(),))) as engine:
        plain, _ = play(make_method("fedavg"), engine, 1)
        other, _ = play(make_method("fedavg", server={"kind": optimizer}), engine, 1)
    mine, theirs = plain[-1].params, other[-1].params
    running = {n for n in mine if ".running_" in n or n.endswith("num_batches_tracked")}
    assert running and identical({n: mine[n] for n in running}, {n: theirs[n] for n in running})
    counters = [t for n, t in theirs.items() if n.endswith("num_batches_tracked")]
    assert all(t.dtype == torch.int64 and t.shape == () for t in counters)
    # 9, 12, 10 and 8 rows in batches of 8, single leftovers skipped: 1, 2, 2 and 1 batches; weighted mean 1.56.
    assert {int(t) for t in counters} == {2}
