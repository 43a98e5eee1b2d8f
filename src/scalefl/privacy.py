"""Client-level differential privacy: each client's move is clipped, their sum noised, and what is told counted as ε.

Paper: McMahan, Ramage, Talwar, Zhang, "Learning Differentially Private Recurrent Language Models", ICLR 2018 (arXiv
1710.06963), algorithm 1 with the estimator f̃_f: each client takes part by a toss of its own, its move is clipped as a
whole, weights are uniform, and the sum is divided by what is expected, not by what came. Deviation: clients may train
different coordinates, so each coordinate has a denominator of its own; and none is below 1, since a client that few are
like would else move the model further than it moved itself. docs/privacy.md says what all this covers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor

from scalefl.caches import remembered
from scalefl.coords import add, take, within
from scalefl.errors import ConfigError, check_range
from scalefl.params import Params
from scalefl.rng import NORMAL_LIMIT, normal, random_bytes
from scalefl.types import (
    ClientInfo,
    ClientTask,
    Collects,
    Coords,
    Method,
    RoundPlan,
    ServerState,
    Step,
)


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """What a client's data is protected by.

    Args:
        clip_norm: C, the largest L2 norm of what a client moves in a round, over all its coordinates together.
        noise_multiplier: z; each coordinate of the sum gets Gaussian noise of standard deviation z·C. 0: clipping
            alone, and no guarantee.
        delta: δ, the chance with which the guarantee may fail; well below one in the number of clients.
        seed: None: noise and cohorts come from the operating system. A number repeats a run, for research; towards
            whoever knows it there is no guarantee.
    """

    clip_norm: float
    noise_multiplier: float
    delta: float
    seed: int | None = None

    def __post_init__(self) -> None:
        check_range("privacy.clip_norm", self.clip_norm, 0.0)
        check_range("privacy.noise_multiplier", self.noise_multiplier, 0.0)
        check_range("privacy.delta", self.delta, 0.0, 1.0)
        if not self.clip_norm:
            raise ConfigError("privacy.clip_norm = 0: nothing would move; expected more")
        if self.delta in (0.0, 1.0):
            raise ConfigError(f"privacy.delta = {self.delta}: expected more than 0 and less than 1")

    def for_clients(self, num_clients: int, clients_per_round: int) -> Mechanism:
        """The mechanism by which so many of all clients take part in a round on average, if all are eligible.

        Raises:
            ConfigError: δ allows to give one client away; or the accountant's package is missing.
        """
        if self.delta * num_clients >= 1:
            raise ConfigError(
                f"privacy.delta = {self.delta:g}: expected much less than {1 / num_clients:g}, one in the number of "
                "clients: with more, even giving one client's data away would do"
            )
        check_accountant()
        return Mechanism(self, min(clients_per_round / num_clients, 1.0))


def check_accountant() -> None:
    """Refuse to go on without an accountant.

    Raises:
        ConfigError: names the extra to install.
    """
    if getattr(find_spec("dp_accounting"), "origin", None) is None:
        raise ConfigError('[privacy] needs a package that is missing: pip install "scalefl[privacy]"')


@dataclass(frozen=True)
class Mechanism:
    """Who takes part in a round, what is made known of it, and what is known of a client in the end.

    Args:
        privacy: the settings.
        rate: q, with which each eligible client takes part in a round, whoever else does.
    """

    privacy: Privacy
    rate: float

    def drawn(self, state: ServerState, plan: RoundPlan) -> tuple[ClientTask, ...]:
        """The tasks of those that take part, of all that may; can be none. A client is told to tell nothing else."""
        return tuple(replace(task, is_private=True) for task in plan.tasks if self._takes_part(state, task.client_id))

    def total(self, state: ServerState, plan: RoundPlan) -> NoisyTotal:
        """The sum of a round of which `plan` has all that may take part: so far, noise alone."""
        return NoisyTotal(self, state, plan)

    def noise(self, shape: torch.Size, state: ServerState, name: str) -> Tensor:
        """Gaussian noise for the sum of a tensor's moves, in float64."""
        scale = self.privacy.noise_multiplier * self.privacy.clip_norm
        return normal(shape, self.privacy.seed, "noise", state.seed, state.round, name).mul_(scale)

    def spent(self, releases: int) -> dict[str, float | None]:
        """The privacy loss of a client that was eligible in so many rounds, as journalled; ε is None if it is infinite.

        Paper: Doroshenko et al., "Connect the Dots: Tighter Discrete Approximations of Privacy Loss Distributions",
        PoPETs 2022, as dp-accounting has it: ε is an upper bound, for data with and without one client.
        """
        found = epsilon(self.rate, self.privacy.noise_multiplier, self.privacy.delta, releases)
        return {"epsilon": found if math.isfinite(found) else None, "delta": self.privacy.delta, "releases": releases}

    def _takes_part(self, state: ServerState, client_id: int) -> bool:
        drawn = random_bytes(8, self.privacy.seed, "takes part", state.seed, state.round, client_id)
        return int.from_bytes(drawn, "big") < self.rate * 2.0**64


@remembered(64)
def epsilon(rate: float, noise_multiplier: float, delta: float, releases: int) -> float:
    """ε of so many Gaussian mechanisms on Poisson samples, by the privacy loss distribution."""
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    if not noise_multiplier or not releases:
        return math.inf if releases else 0.0
    # Losses go with 1/z²: as many points for each z. At z = 1, q = 0.1 and 100 rounds, 50 ms and 5 digits.
    accountant = PLDAccountant(value_discretization_interval=min(max(1e-3 / noise_multiplier**2, 1e-6), 1.0))
    accountant.compose(
        dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise_multiplier)), releases
    )
    return float(accountant.get_epsilon(delta))


class NoisyTotal:
    """Σ over clients of their clipped moves, and noise on every coordinate that any eligible client could have moved.

    **Sensitivity.** A client's term depends on its own data, and otherwise on what is public or was made known before:
    the state, budgets, the plan for all that are eligible. Its norm is at most C, or it is 0: for a client without
    data, one that was not drawn, was lost, or sent what must not enter. So two data sets that differ in one client's
    data, all of it or none, give sums at most C apart. Which coordinates are noised, and by what they are divided,
    follows from the plan alone, not from who was drawn; all that comes after the sum only computes with it.

    Terms and noise are whole numbers on a grid of at most 2⁻⁴⁸ of the largest possible sum. So the order of clients
    does not change a bit; and the low bits of floating-point noise do not tell what was added to it (Mironov, CCS
    2012), as the sum is what rounding would make of one in real numbers. Terms are rounded towards 0: norms never grow.

    It answers as `scalefl.types.Totals`: `mean` has the base plus the sum over the denominator.

    Args:
        mechanism: of the run.
        state: before the round.
        plan: of everybody who may take part.
    """

    def __init__(self, mechanism: Mechanism, state: ServerState, plan: RoundPlan) -> None:
        self._clip_norm, self._rate = mechanism.privacy.clip_norm, mechanism.rate
        self._before = state.params
        self._holders = holders(state.params, plan)
        most = self._clip_norm * (len(plan.tasks) + NORMAL_LIMIT * mechanism.privacy.noise_multiplier)
        self._grid = 2.0 ** (math.ceil(math.log2(most)) - 48)
        self._sums = {
            name: mechanism.noise(state.params[name].shape, state, name).div_(self._grid).round_()
            for name in self._holders
        }
        self.own: Mapping[int, Params] = {}

    def add(self, params: Params, weight: int, coords: Coords, largest: Mapping[str, float]) -> None:
        """Add what a client has moved, clipped; its weight is that of all. As `scalefl.aggregate.Total.add`."""
        norm = math.sqrt(math.fsum(float(move.square_().sum()) for _, move in self._moves(params, coords)))
        factor = min(1.0, self._clip_norm / norm) if norm else 1.0
        for name, move in self._moves(params, coords):
            add(self._sums[name], coords[name], move.mul_(factor / self._grid).trunc_())

    def mean(self, base: Params) -> dict[str, Tensor]:
        """What the round makes of every tensor that could have moved; coordinates that nobody could keep their bits."""
        return {name: self._mean(base[name], name) for name in self._holders}

    def held(self, name: str) -> Tensor | None:
        """Which coordinates of a tensor could have moved, as booleans of its shape; None where all could."""
        count = self._holders[name]
        return count > 0 if isinstance(count, Tensor) else None

    def _moves(self, params: Params, coords: Coords) -> Iterator[tuple[str, Tensor]]:
        """Each tensor's move in float64, in one order: so that the norm's last bits do not depend on the engine."""
        for name in sorted(params):
            yield name, params[name].double() - take(self._before[name], coords[name]).double()

    def _mean(self, base: Tensor, name: str) -> Tensor:
        held, count = self.held(name), torch.as_tensor(self._holders[name], dtype=torch.float64)
        denominator = (count * self._rate).clamp_(min=1)
        moved = (base.double() + self._sums[name] * self._grid / denominator).to(base.dtype)
        return moved if held is None else torch.where(held, moved, base)


def holders(params: Params, plan: RoundPlan) -> dict[str, int | Tensor]:
    """By how many clients of a plan each coordinate is moved: a number for tensors that all of them hold whole."""
    whole: Counter[str] = Counter()
    parts: dict[str, Tensor] = {}
    for task, count in _alike(plan):
        coords, counting = plan.coords[task.client_id], plan.counting.get(task.client_id, {})
        for name in task.moving:
            window, counted = coords[name], counting.get(name)
            window = within(window, counted) if counted is not None else window
            if window is None:
                whole[name] += count
            else:
                add(parts.setdefault(name, torch.zeros(params[name].shape, dtype=torch.int64)), window, count)
    return {**whole, **{name: held + whole[name] for name, held in parts.items()}}


def _alike(plan: RoundPlan) -> Iterable[tuple[ClientTask, int]]:
    """Tasks of a plan, and how many others have the very same steps and places."""
    tasks: dict[tuple[int, ...], ClientTask] = {}
    counts: Counter[tuple[int, ...]] = Counter()
    for task in plan.tasks:
        key = (id(task.steps), id(plan.coords[task.client_id]), id(plan.counting.get(task.client_id)))
        tasks.setdefault(key, task)
        counts[key] += 1
    return [(tasks[key], count) for key, count in counts.items()]


_ANYBODY = ClientInfo(0, num_examples=1, memory_bytes=2**62, classes=(0,))
"""A client that holds everything, and tells its labels to a method that reads them."""


def check_private(method: Method, state: ServerState) -> None:
    """Refuse a method that needs more of clients than their moves, before anything is trained.

    Raises:
        ConfigError: says what it needs, and how to do without.
    """
    if isinstance(method, Collects) and method.collection_floor_bytes(state) is not None:
        raise ConfigError(_statistics(state))
    plan = method.plan(state, [_ANYBODY])
    steps = [step for offer in method.menu(state) for _, step in offer.ways]
    check_plan(replace(plan, tasks=(*plan.tasks, ClientTask(0, 0, tuple(steps), 0))), state)


def check_plan(plan: RoundPlan, state: ServerState) -> None:
    """Refuse a plan by which clients would tell more than their moves.

    Raises:
        ConfigError: as `check_private`.
    """
    for step in {id(step): step for task in plan.tasks for step in task.steps}.values():
        _check_step(step, state)
    if plan.own:
        raise ConfigError(_OWN_TENSORS)


def _check_step(step: Step, state: ServerState) -> None:
    if step.statistics or step.part.couples:
        raise ConfigError(_statistics(state, min(step.statistics, default="")))
    for name in sorted(step.trained):
        if state.params[name].is_complex():
            raise ConfigError(f"[privacy]: {name} is complex, and noise is made for real numbers only")
    if step.own:
        raise ConfigError(_OWN_TENSORS)
    if step.classes is not None:
        raise ConfigError(
            "[privacy]: the method leaves out of a client's loss the labels that it says it does not have, and clients "
            "tell no labels in private runs: method.own_classes = false, in heterofl and fedrolex"
        )


_OWN_TENSORS = (
    "[privacy]: the method has clients send tensors of their own, which no noise covers: leave method.feddyn out"
)


def _statistics(state: ServerState, name: str = "") -> str:
    which = f" ({name})" if name else ""
    return (
        f"[privacy]: norms of {state.model.name} have running statistics{which}, which tell of clients' data and "
        'which no noise covers: take norms without (model_arguments.norm = "group" in the built-in models)'
    )
