"""The nouns of a federated run, and the two seams: `Method` (what is trained) and `Engine` (where clients live)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from scalefl.errors import ConfigError, check_range
from scalefl.memory import Cost
from scalefl.models.spec import ModelSpec
from scalefl.params import ATTACHMENT, Params, is_attachment
from scalefl.parts import Part, Taps
from scalefl.problem import Batch, Problem, Weighted

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, kw_only=True)
class LocalWork:
    """What each selected client does in a round: a hyperparameter of the run, equal for all clients.

    Deviation: the defaults are lighter than what ScaleFL's authors train with (section 4: 5 epochs, batches of 64, lr
    0.01), for short runs; momentum and weight decay are theirs.

    Args:
        epochs: passes over the client's data.
        batch_size: examples in a step. A trailing batch of one example is skipped where the epoch has others,
            since batch norm cannot normalise it.
        lr, momentum, weight_decay: SGD.
        lr_schedule, lr_rounds: how the rate falls over the run's rounds, to zero at `lr_rounds`.
        clip_norm: largest norm of the gradient; 0 turns clipping off.
        prox: μ of the FedProx term μ/2·‖θ − θ⁽ʳ⁾‖² (Li et al., MLSys 2020, eq. 2); 0 turns it off.
        memory_format: how images lie in memory behind the model's first convolutions. "channels_last" is the same
            mathematics by other kernels: bits differ, and on CPUs convolutions with batch norms or pooling are faster.
    """

    epochs: int = 1
    batch_size: int = 32
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    lr_schedule: Schedule = "constant"
    lr_rounds: int = 0
    clip_norm: float = 0.0
    prox: float = 0.0
    memory_format: Literal["contiguous", "channels_last"] = "contiguous"

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise ConfigError(f"epochs ({self.epochs}) and batch_size ({self.batch_size}) must be at least 1")
        for name in ("lr", "momentum", "weight_decay", "clip_norm", "prox"):
            check_range(name, getattr(self, name), 0.0)
        if self.lr_schedule != "constant" and self.lr_rounds < 1:
            raise ConfigError(f"lr_schedule = {self.lr_schedule!r} needs lr_rounds, the length of the run")

    def at_round(self, round: int) -> LocalWork:
        """The same work with the learning rate of that round and no schedule left."""
        if self.lr_schedule == "constant":
            return self
        done = min(round / self.lr_rounds, 1.0)
        factor = 1 - done if self.lr_schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        return replace(self, lr=self.lr * factor, lr_schedule="constant", lr_rounds=0)


PrefixMode = Literal["resident", "chunked", "streamed", "cached"]


@dataclass(frozen=True)
class Means:
    """How a client does its work within its memory: chosen for each client. docs/memory.md says how exact each is.

    Args:
        micro_batch_size: examples in memory at once; gradients are accumulated over a batch. None: the batch.
        recompute: keep only the tensors between units; backward runs each unit again.
        prefix: how the frozen prefix runs. "resident": on a micro-batch at once; "chunked": on a few examples at a
            time; "streamed": so, and one unit's tensors held at a time; "cached": so, once for each example, with
            its features kept on disk for all epochs.
        free_gradients: update each parameter as soon as its gradient is there, and drop that.
        bfloat16: run in bfloat16 where autocast does; weights stay as they are. Approximate.
        frozen_statistics: norms that train use their running statistics, as frozen ones do. Approximate.
        stream_frozen: with `recompute`, hold the frozen tensors of what runs with a gradient one unit at a time.
    """

    micro_batch_size: int | None = None
    recompute: bool = False
    prefix: PrefixMode = "resident"
    free_gradients: bool = False
    bfloat16: bool = False
    frozen_statistics: bool = False
    stream_frozen: bool = False


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """Which means clients may use to fit their memory. "auto" leaves a rung to the planner; True takes it always.

    Args:
        micro_batch_size: examples in memory at once; "auto": the batch, or halves of it; None: the batch.
        smallest_micro_batch: how far "auto" goes.
        recompute, free_gradients, stream_frozen: see `Means`.
        prefix: see `Means`; "auto" tries them all.
        cache_bytes: the most that a client may keep on disk for a cached prefix.
        bfloat16: an approximation.
        frozen_statistics: rounds after which norms that train may use their running statistics, an approximation;
            None: never.
    """

    micro_batch_size: int | Literal["auto"] | None = None
    smallest_micro_batch: int = 4
    recompute: bool | Literal["auto"] = False
    prefix: PrefixMode | Literal["auto"] = "resident"
    cache_bytes: int = 2**30
    free_gradients: bool | Literal["auto"] = False
    stream_frozen: bool | Literal["auto"] = False
    bfloat16: bool | Literal["auto"] = False
    frozen_statistics: int | None = None

    def __post_init__(self) -> None:
        size = self.micro_batch_size
        if isinstance(size, int):
            check_range("micro_batch_size", size, 1)
        check_range("smallest_micro_batch", self.smallest_micro_batch, 1)
        check_range("cache_bytes", self.cache_bytes, 0)
        check_range("frozen_statistics", self.frozen_statistics or 0, 0)

    def micro_sizes(self, batch_size: int) -> list[int]:
        """The micro-batch sizes that may be tried, largest first."""
        if self.micro_batch_size != "auto":
            return [min(self.micro_batch_size or batch_size, batch_size)]
        sizes = [batch_size]
        while sizes[-1] > self.smallest_micro_batch:
            sizes.append(max(self.smallest_micro_batch, -(-sizes[-1] // 2)))
        return sizes


NO_MEANS = Ladder()
AUTO = Ladder(micro_batch_size="auto", recompute="auto", prefix="auto", free_gradients="auto", stream_frozen="auto")
LADDERS: Mapping[str, Ladder] = {"none": NO_MEANS, "micro-batches": Ladder(micro_batch_size="auto"), "auto": AUTO}
"""Ladders by name: no means but the whole batch; gradient accumulation alone; everything that does not approximate."""
LadderName = Literal["none", "micro-batches", "auto"]


def ladder_of(means: str | Ladder) -> Ladder:
    """A ladder, or the one of that name."""
    return LADDERS[means] if isinstance(means, str) else means


@dataclass(frozen=True)
class ClientInfo:
    """What the server knows of a client.

    Args:
        id: its number.
        num_examples: training examples it holds.
        memory_bytes: bytes that training may add to its warmed-up worker.
        device: the name of its memory class.
        flops_per_second, bandwidth_bytes_per_second: its speed, for simulated time.
        classes: the labels of which it has examples; None where it does not tell.
    """

    id: int
    num_examples: int
    memory_bytes: int
    device: str = "device"
    flops_per_second: float = math.inf
    bandwidth_bytes_per_second: float = math.inf
    classes: tuple[int, ...] | None = None

    @property
    def untold(self) -> ClientInfo:
        """The same without what its data decides, for runs in which no client tells."""
        return replace(self, num_examples=UNTOLD, classes=None)


UNTOLD = 2**40
"""Stands for a number of examples that nobody is told: so many that no plan takes their features to fit on disk."""


class Population(Protocol):
    """All clients, described lazily: nothing is held for those that nobody asks about."""

    @property
    def smallest_memory_bytes(self) -> int:
        """The least that any client has."""
        ...

    @property
    def largest_memory_bytes(self) -> int:
        """The most that any client has."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> ClientInfo: ...


OWN = ATTACHMENT + "own."
"""What the names of a client's own tensors start with."""


@dataclass(frozen=True)
class Step:
    """One piece of local training: a part of the model, what trains in it, and towards what.

    Args:
        part: what runs.
        trainable: parameters that receive gradients; none where norms collect statistics.
        moving: what is uploaded: `trainable` and the statistics of norms in train mode.
        coefficients: numbers from which `Method.objective` makes the objective.
        work, means: what to do, and how.
        classes: the labels that its objective tells apart, where that is the client's affair; None: all.
        feddyn: α of FedDyn (Acar et al., ICLR 2021): the step adds α(θ − θ⁽ʳ⁾) − h to gradients, where h are the
            client's own tensors, and takes α(θ − θ⁽ʳ⁾) off them at its end; 0 turns it off.
    """

    part: Part
    trainable: frozenset[str]
    moving: frozenset[str]
    coefficients: tuple[tuple[str, float], ...]
    work: LocalWork
    means: Means = Means()
    classes: tuple[int, ...] | None = None
    feddyn: float = 0.0

    @property
    def collects(self) -> bool:
        """Whether it trains nothing: norms collect statistics."""
        return not self.trainable

    @property
    def own(self) -> frozenset[str]:
        """The client's own tensors that it needs, and sends back."""
        return frozenset(OWN + name for name in self.trainable) if self.feddyn else frozenset()

    @property
    def trained(self) -> frozenset[str]:
        """The parameters of the model itself among those that it trains."""
        return frozenset(name for name in self.trainable if not is_attachment(name))

    @property
    def statistics(self) -> frozenset[str]:
        """Statistics of norms in train mode: what moves without being trained."""
        return self.moving - self.trainable

    @property
    def frozen(self) -> tuple[frozenset[str], ...]:
        """The frozen tensors that each stretch of what runs with a gradient needs, and no prefix; see `Part.needed`."""
        if not self.part.inner:
            return ()
        before = frozenset(name for stretch in self.part.prefix for name in stretch.held)
        return tuple(frozenset(names) - self.moving - before for names in self.part.needed)

    @property
    def passing(self) -> tuple[frozenset[str], ...]:
        """Those that come and go with their stretch."""
        return self.frozen if self.means.stream_frozen else ()

    @property
    def couples(self) -> bool:
        """Whether micro-batches change its numbers: norms that train see each of them as they would see a batch."""
        return self.splits and (bool(self.statistics) or self.part.couples)

    @property
    def largest_micro_batch(self) -> int:
        """Examples in the largest of the nearly equal slices of a batch."""
        rows = self.work.batch_size
        return math.ceil(rows / math.ceil(rows / min(self.means.micro_batch_size or rows, rows)))

    @property
    def splits(self) -> bool:
        """Whether batches run in micro-batches."""
        return self.means.micro_batch_size is not None and self.means.micro_batch_size < self.work.batch_size


@dataclass(frozen=True)
class ClientTask:
    """What one client is asked to do in one round: its steps, one after another.

    Args:
        client_id, round: who and when.
        steps: what.
        seed: of everything random in it.
        is_private: whether the client tells nothing of its data but what the moving tensors tell.
    """

    client_id: int
    round: int
    steps: tuple[Step, ...]
    seed: int
    is_private: bool = False

    @property
    def moving(self) -> frozenset[str]:
        """Everything that the task uploads."""
        return frozenset().union(*(step.moving | step.own for step in self.steps))


Window = tuple[Tensor | None, ...]
"""Where a submodel's tensor lies in the global one: the indices along each dimension, None for all of them."""

Coords = Mapping[str, Window | None]
"""The window of each tensor that a client gets; None for the whole tensor."""


@dataclass(frozen=True)
class RoundPlan:
    """A round before it happens.

    Args:
        stage: what the round trains, for people.
        tasks: one for each client of the cohort that takes part.
        coords: where each client's tensors lie in the global ones; never leaves the server.
        costs: predicted cost of each client's task: the peak of its dearest step, the FLOPs of all.
        rungs: by which part and means each client takes part, for people.
        clients: the cohort.
        counting: of a client's tensors, what enters the mean, as a window of its own tensor; all of those not named.
        is_uniform: whether clients count alike in the mean, not by their numbers of examples.
        own: tensors that belong to a client, which the server keeps for it from round to round.
    """

    stage: str
    tasks: tuple[ClientTask, ...]
    coords: Mapping[int, Coords]
    costs: Mapping[int, Cost]
    rungs: Mapping[int, str]
    clients: Mapping[int, ClientInfo]
    counting: Mapping[int, Coords] = field(default_factory=dict)
    is_uniform: bool = False
    own: Mapping[int, Params] = field(default_factory=dict)

    def flops(self, task: ClientTask, num_examples: int | None = None) -> float:
        """Predicted FLOPs of a task, for so many examples; by default as many as its client has."""
        count = self.clients[task.client_id].num_examples if num_examples is None else num_examples
        epochs = task.steps[0].work.epochs  # the run's: alike in all steps
        return self.costs[task.client_id].flops_per_example * count * epochs

    def longest_first(self) -> list[ClientTask]:
        """The tasks in an order in which workers that take one after another are done at nearly the same time."""
        return sorted(self.tasks, key=self.flops, reverse=True)


@dataclass(frozen=True)
class Receipt:
    """What a task took.

    Args:
        bytes_down, bytes_up: of its tensors.
        seconds: on the machine that ran it.
        peak_bytes: the most that it added to its warmed-up worker, measured; None where that can't be told: on
            systems that do not say, and where clients share a process with the server.
    """

    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0
    peak_bytes: int | None = None


@dataclass(frozen=True)
class ClientUpdate:
    """What a client sends back: exactly the moving tensors, its weight in the mean, and sums of its metrics.

    Of a private task the weight is 1, and there are no metrics and no seconds. If `is_added`, the tensors are not here:
    the engine has added them up (see `Reduces`).
    """

    client_id: int
    params: Params
    num_examples: int
    metrics: Mapping[str, tuple[float, float]]
    receipt: Receipt
    is_added: bool = False


@dataclass(frozen=True)
class ClientLoss:
    """A client that failed: who, when and why.

    Args:
        client_id, round: who and when.
        cause: in a line.
        receipt: what it took until then.
        traceback: for people who debug; it names this machine's files, so it stays out of the journal.
        out_of_memory: whether it asked for more than its budget, under a cap.
        has_spoilt: whether it has written into tensors that others share, so that the run can't go on.
    """

    client_id: int
    round: int
    cause: str
    receipt: Receipt = Receipt()
    traceback: str = ""
    out_of_memory: bool = False
    has_spoilt: bool = False


@dataclass(frozen=True)
class Aux:
    """A method's own history: tensors and JSON values, saved with the state."""

    tensors: Params = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ServerState:
    """Everything that changes in a run, beside what it is about.

    Args:
        model, problem: what is trained; they do not change.
        params: the global tensors, attachments included.
        round: rounds done.
        seed: the seed of the run, from which every random number is derived.
        aux: the method's own history.
        tightened: by client, what of its budget may still be planned with after it hit a memory cap, in bytes.
        releases: noised sums of clients' moves that have been made known, of which the privacy loss is counted.
    """

    model: ModelSpec
    problem: Problem
    params: Params
    round: int
    seed: int
    aux: Aux = Aux()
    tightened: Mapping[int, int] = field(default_factory=dict)
    releases: int = 0


class Objective(Protocol):
    """What a step minimises: a sum over samples, and terms that couple the samples of a batch. Hashable."""

    def __hash__(self) -> int: ...

    @property
    def coupled(self) -> tuple[str, ...]:
        """The taps that `batch_terms` takes a gradient to; none where it returns None."""
        ...

    def sample_terms(self, taps: Taps, batch: Batch, problem: Problem) -> Weighted:
        """A sum over the examples and its weight."""
        ...

    def batch_terms(self, taps: Taps, batch: Batch, problem: Problem) -> Tensor | None:
        """A scalar that is added to the batch's mean loss; None where there is none.

        Of `taps` it reads x and those in `coupled`, no others: in micro-batches only these are gathered.
        """
        ...


class Offer(NamedTuple):
    """Something that clients may be asked to do, before means are chosen for it.

    Args:
        label: its name for people ("block 2").
        ways: the steps that do it, best first, and least demanding last, as with fewer and fewer co-adapted layers;
            with words that tell them apart from the first.
        ladder: the means that it may be done by.
        fallback: whether it is for clients alone that cannot do what trains more.
        is_stage: whether some rounds consist of it alone, so that it has to fit somebody.
    """

    label: str
    ways: tuple[tuple[str, Step], ...]
    ladder: Ladder
    fallback: bool = False
    is_stage: bool = False

    @property
    def step(self) -> Step:
        """The best way."""
        return self.ways[0][1]

    @property
    def trained(self) -> frozenset[str]:
        """The parameters of the model itself that the best way trains."""
        return self.step.trained


class Choice(NamedTuple):
    """What a client is asked to do: the step, its cost, and its name for people ("block 2")."""

    step: Step
    cost: Cost
    label: str

    @property
    def rung(self) -> str:
        """The label with the means."""
        return ", ".join([self.label, *described(self.step)])


def described(step: Step) -> list[str]:
    """The means of a step in words; nothing where it has the memory that it likes."""
    means = step.means
    words = {
        f"micro-batch {means.micro_batch_size}{' (own norms)' if step.couples else ''}": step.splits,
        "recomputed": means.recompute,
        f"{means.prefix} prefix": means.prefix != "resident" and step.part.entry is not None,
        "frozen parts streamed": means.stream_frozen,
        "freed gradients": means.free_gradients and not step.splits,
        "bfloat16": means.bfloat16,
        "frozen statistics": means.frozen_statistics,
    }
    return [word for word, holds in words.items() if holds]


class Totals(Protocol):
    """What `Method.aggregate` receives: see `scalefl.aggregate.Total`."""

    @property
    def own(self) -> Mapping[int, Params]:
        """What came back of clients' own tensors."""
        ...

    def mean(self, base: Params) -> dict[str, Tensor]:
        """The coordinate-wise weighted mean of what moved, and `base` elsewhere; only names that moved."""
        ...

    def held(self, name: str) -> Tensor | None:
        """Which coordinates of a tensor moved, as booleans of its shape; None where all did."""
        ...


class Method(Protocol):
    """Who trains which coordinates of the global model, minimising what.

    An instance is frozen and is its own hyperparameters; everything that changes is in `ServerState`.
    """

    @property
    def work(self) -> LocalWork:
        """What each client does."""
        ...

    def init(self, model: ModelSpec, problem: Problem, *, seed: int, smallest_memory_bytes: int) -> ServerState:
        """The state before the first round."""
        ...

    def menu(self, state: ServerState) -> list[Offer]:
        """Everything that clients may be asked to do over the run."""
        ...

    def floor_bytes(self, state: ServerState) -> int:
        """The memory gate: the least that a client needs to take part in this round."""
        ...

    def plan(self, state: ServerState, cohort: Sequence[ClientInfo]) -> RoundPlan:
        """Who does what in this round."""
        ...

    def objective(self, step: Step) -> Objective:
        """What a step minimises; called where the client runs."""
        ...

    def aggregate(self, state: ServerState, plan: RoundPlan, total: Totals) -> ServerState:
        """The state after the round."""
        ...

    def deploy(self, state: ServerState) -> tuple[ModelSpec, Params]:
        """What is evaluated and exported."""
        ...


@runtime_checkable
class Gates(Method, Protocol):
    """What a method has beside, if its memory gate is dear to find, and need not be found where everybody passes."""

    def floor_within(self, state: ServerState, enough_bytes: int) -> int:
        """The least that a client needs to take part in this round; or more, but no more than `enough_bytes`."""
        ...


def floor_of(method: Method, state: ServerState, clients: Population) -> int:
    """The memory gate of a round, exact where it keeps any of the clients out."""
    if isinstance(method, Gates):
        return method.floor_within(state, clients.smallest_memory_bytes)
    return method.floor_bytes(state)


@runtime_checkable
class Collects(Method, Protocol):
    """What a method has beside, if its norms' statistics are collected once weights are done, and not in training."""

    def collection_floor_bytes(self, state: ServerState) -> int | None:
        """The least that a client needs to collect; None where there is nothing to collect."""
        ...

    def collection(self, state: ServerState, cohort: Sequence[ClientInfo]) -> RoundPlan:
        """What clients do to collect, each within its `memory_bytes`."""
        ...

    def collected(self, state: ServerState, plan: RoundPlan, total: Totals) -> ServerState:
        """The state with what was collected."""
        ...


class Engine(Protocol):
    """Where clients live."""

    def population(self) -> Population:
        """The clients there are now."""
        ...

    def fit(self, method: Method, orders: Iterable[tuple[ClientTask, Params]]) -> Iterator[ClientUpdate | ClientLoss]:
        """Run the tasks, in any order; orders are drawn when workers need them, results yielded as they come.

        The tensors of an update are the caller's only until it asks for the next.
        """
        ...


class Adding(NamedTuple):
    """How the tensors of a client enter the mean, where they are whole and all of them count.

    Attributes:
        weight: of the client; None: its number of examples.
        num_examples: that it was planned with: it may not claim more.
        scale: what weights are divided by, a power of 2.
    """

    weight: int | None
    num_examples: int
    scale: float


class Reduction(Protocol):
    """What an engine that adds updates up itself needs to know, and where its sums go."""

    def adding(self, client_id: int) -> Adding | None:
        """How a client's update enters; None where that is the caller's to do."""
        ...

    def merge(self, name: str, fine: Tensor, weight: int) -> None:
        """Take in a sum of whole numbers, as `scalefl.aggregate.add_fine` makes them, and that of its weights."""
        ...


@runtime_checkable
class Reduces(Engine, Protocol):
    """What an engine has beside, if its workers add updates up where these are."""

    def fit_into(
        self, method: Method, orders: Iterable[tuple[ClientTask, Params]], reduction: Reduction
    ) -> Iterator[ClientUpdate | ClientLoss]:
        """As `fit`, but some updates are checked and added up already, and merged when the iterator ends.

        A loss may follow the update of the same client: the sum that had it was spoilt, and it could not be done again.
        """
        ...
