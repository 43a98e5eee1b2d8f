"""What a round leaves behind: one line of the journal. Units are in the names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from scalefl.types import ClientInfo, ClientLoss, ClientUpdate, Receipt, RoundPlan

MEASURED = ("seconds", "measured_peak_bytes", "measured_bytes")
"""Fields of journals and summaries, however deep inside, that two runs of one config do not share."""


@dataclass(frozen=True)
class RoundRecord:
    """A round, as journalled.

    Args:
        round: its number, from 1.
        stage: what it trained.
        rungs: by which part and means clients took part -> their ids.
        lost: clients that failed: `client`, `cause`, `predicted_peak_bytes` and `measured_peak_bytes` of its task.
        train: mean loss and metrics over the examples trained on, in each client's last epoch.
        num_examples: examples of the clients that took part.
        bytes_down, bytes_up: sent to and by clients, lost ones included.
        flops: of all clients.
        peaks: of each client that took part, by number: `client`, `predicted_bytes`, and `measured_bytes` if known.
        predicted_peak_bytes: the largest predicted peak of a task.
        measured_peak_bytes: the largest measured one; None where none was.
        simulated_seconds: what the slowest client would take on its device, transfers included.
        seconds: what the round took here.
        collected: clients whose norms collected statistics after it; what that cost is counted in.
        uncounted_operators: what `flops` leaves out: operators that may cost much, and nothing says how much.
    """

    round: int
    stage: str
    rungs: Mapping[str, list[int]]
    lost: list[dict[str, Any]]
    train: Mapping[str, float]
    num_examples: int
    bytes_down: int
    bytes_up: int
    flops: float
    peaks: list[dict[str, int | None]]
    predicted_peak_bytes: int
    measured_peak_bytes: int | None
    simulated_seconds: float
    seconds: float
    collected: list[int] = field(default_factory=list)
    uncounted_operators: list[str] = field(default_factory=list)

    def with_collection(self, other: RoundRecord) -> RoundRecord:
        """The round with the statistics that were collected after it."""
        measured = [p for p in (self.measured_peak_bytes, other.measured_peak_bytes) if p is not None]
        return replace(
            self,
            lost=[*self.lost, *other.lost],
            bytes_down=self.bytes_down + other.bytes_down,
            bytes_up=self.bytes_up + other.bytes_up,
            flops=self.flops + other.flops,
            peaks=[*self.peaks, *other.peaks],
            predicted_peak_bytes=max(self.predicted_peak_bytes, other.predicted_peak_bytes),
            measured_peak_bytes=max(measured, default=None),
            simulated_seconds=self.simulated_seconds + other.simulated_seconds,
            seconds=self.seconds + other.seconds,
            collected=sorted(i for ids in other.rungs.values() for i in ids),
        )


@dataclass(frozen=True)
class PrivateRecord:
    """A round of a private run, as journalled: nothing that depends on who took part, nor how many did.

    Args:
        round, stage: as in `RoundRecord`.
        predicted_peak_bytes: the largest predicted peak of a task, of all clients that could have taken part.
        privacy: so far: `epsilon` (None where there is no guarantee), `delta` and `releases`.
    """

    round: int
    stage: str
    predicted_peak_bytes: int
    privacy: Mapping[str, float | None]


@dataclass(frozen=True)
class _Done:
    """A client's update without its tensors."""

    num_examples: int
    metrics: Mapping[str, tuple[float, float]]
    receipt: Receipt


@dataclass
class Tally:
    """Adds a round's answers up, in whatever order they come."""

    updates: dict[int, _Done] = field(default_factory=dict)
    losses: dict[int, ClientLoss] = field(default_factory=dict)

    def add(self, update: ClientUpdate) -> None:
        """Note an update."""
        self.updates[update.client_id] = _Done(update.num_examples, update.metrics, update.receipt)

    def lose(self, loss: ClientLoss) -> None:
        """Note a lost client; its update, if there was one, went with whoever had added it."""
        self.updates.pop(loss.client_id, None)
        self.losses[loss.client_id] = loss

    def causes(self) -> str:
        """Why clients were lost, the most common cause first."""
        common = Counter(loss.cause for loss in self.losses.values()).most_common(3)
        return "; ".join(f"{cause} ({count}×)" for cause, count in common)

    def lost(self, plan: RoundPlan) -> list[dict[str, Any]]:
        """The lost clients, as journalled."""
        return [_lost(loss, plan) for _, loss in sorted(self.losses.items())]

    def record(self, plan: RoundPlan, round: int, seconds: float) -> RoundRecord:
        """The round's record. Clients are taken in the order of their numbers, so no sum depends on luck."""
        done = sorted(self.updates.items())
        rungs: dict[str, list[int]] = {}
        for client_id, _ in done:
            rungs.setdefault(plan.rungs[client_id], []).append(client_id)
        tasks = {task.client_id: task for task in plan.tasks}
        flops = {client_id: plan.flops(tasks[client_id], d.num_examples) for client_id, d in done}
        measured = [peak for _, d in done if (peak := d.receipt.peak_bytes) is not None]
        receipts = [d.receipt for _, d in done] + [loss.receipt for loss in self.losses.values()]
        return RoundRecord(
            round=round,
            stage=plan.stage,
            rungs=dict(sorted(rungs.items())),
            lost=self.lost(plan),
            train=_means([d.metrics for _, d in done]),
            num_examples=sum(d.num_examples for _, d in done),
            bytes_down=sum(receipt.bytes_down for receipt in receipts),
            bytes_up=sum(receipt.bytes_up for receipt in receipts),
            flops=sum(flops.values()),
            peaks=[_peaks(client_id, d.receipt, plan) for client_id, d in done],
            predicted_peak_bytes=max(plan.costs[client_id].peak_bytes for client_id, _ in done),
            measured_peak_bytes=max(measured, default=None),
            simulated_seconds=max(_simulated(plan.clients[i], flops[i], d) for i, d in done),
            seconds=seconds,
            uncounted_operators=sorted({name for client_id, _ in done for name in plan.costs[client_id].unknown}),
        )


def _lost(loss: ClientLoss, plan: RoundPlan) -> dict[str, Any]:
    return {
        "client": loss.client_id,
        "cause": loss.cause,
        "predicted_peak_bytes": plan.costs[loss.client_id].peak_bytes,
        "measured_peak_bytes": loss.receipt.peak_bytes,
    }


def _peaks(client_id: int, receipt: Receipt, plan: RoundPlan) -> dict[str, int | None]:
    predicted = plan.costs[client_id].peak_bytes
    return {"client": client_id, "predicted_bytes": predicted, "measured_bytes": receipt.peak_bytes}


def _simulated(client: ClientInfo, flops: float, done: _Done) -> float:
    transfer = (done.receipt.bytes_down + done.receipt.bytes_up) / client.bandwidth_bytes_per_second
    return flops / client.flops_per_second + transfer


def _means(metrics: list[Mapping[str, tuple[float, float]]]) -> dict[str, float]:
    names = sorted({name for m in metrics for name in m})
    sums = {name: [m[name] for m in metrics if name in m] for name in names}
    weights = {name: sum(weight for _, weight in pairs) for name, pairs in sums.items()}
    return {name: sum(value for value, _ in pairs) / weights[name] for name, pairs in sums.items() if weights[name]}
