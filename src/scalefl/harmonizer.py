"""The Training Harmonizer's forward half: which block is trained in which round (ScaleFL, section 3).

Its backward half, co-adaptation of the last layers of the block before, is `Blocks.trainable`.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import msgspec

from scalefl.errors import check_range
from scalefl.params import Params, real


class Progress(msgspec.Struct, frozen=True):
    """Where growth stands: the block in turn, rounds spent on it, and quiet rounds in a row."""

    stage: int = 0
    rounds: int = 0
    quiet: int = 0

    def next_stage(self, stage: int) -> Progress:
        """At the start of another stage."""
        return Progress(stage=stage)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return msgspec.structs.asdict(self)


@runtime_checkable
class Growth(Protocol):
    """The order in which blocks have their turn; hashable, as a frozen dataclass is. `Progress` is all its memory."""

    def advance(self, progress: Progress, num_blocks: int, movement: float) -> Progress:
        """What comes after a round.

        Args:
            progress: where growth stood in that round; the first round's is `Progress()`.
            num_blocks: T; stages count from 0 to T − 1.
            movement: ‖Δθ‖ / ‖θ‖ of the block in turn.
        """
        ...


class RoundRobin(msgspec.Struct, frozen=True, tag_field="kind", tag="round_robin", forbid_unknown_fields=True):
    """Dynamic model growth: the block changes every round, 1, 2, …, T, 1, 2, …

    Paper: ScaleFL, section 3; the default.
    """

    def advance(self, progress: Progress, num_blocks: int, movement: float) -> Progress:
        """The next block."""
        return progress.next_stage((progress.stage + 1) % num_blocks)


class Sequential(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="sequential", forbid_unknown_fields=True
):
    """A fixed number of rounds for each block, first to last; the last block keeps its turn.

    Deviation: not the paper's method but what it improves on (its section 3), with a number for "converged".
    """

    rounds: int = 10

    def __post_init__(self) -> None:
        check_range("growth.rounds", self.rounds, 1)

    def advance(self, progress: Progress, num_blocks: int, movement: float) -> Progress:
        """The same block until its rounds are spent."""
        if progress.rounds + 1 >= self.rounds and progress.stage + 1 < num_blocks:
            return progress.next_stage(progress.stage + 1)
        return Progress(progress.stage, progress.rounds + 1)


class Converged(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="converged", forbid_unknown_fields=True
):
    """A block keeps its turn until it has hardly moved for a few rounds; the last block keeps it.

    Deviation: not the paper's method but what it improves on (its section 3); when a block has converged is our rule.

    Args:
        threshold: a round is quiet if ‖Δθ‖ / ‖θ‖ of the block stays under it.
        patience: quiet rounds in a row that end the turn.
        longest: rounds after which the turn ends anyway.
    """

    threshold: float = 0.01
    patience: int = 2
    longest: int = 50

    def __post_init__(self) -> None:
        check_range("growth.threshold", self.threshold, 0.0)
        check_range("growth.patience", self.patience, 1)
        check_range("growth.longest", self.longest, 1)

    def advance(self, progress: Progress, num_blocks: int, movement: float) -> Progress:
        """The next block once this one is quiet."""
        quiet = progress.quiet + 1 if movement < self.threshold else 0
        rounds = progress.rounds + 1
        done = quiet >= self.patience or rounds >= self.longest
        if done and progress.stage + 1 < num_blocks:
            return progress.next_stage(progress.stage + 1)
        return Progress(progress.stage, rounds, quiet)


GROWTHS = RoundRobin | Sequential | Converged
"""The built-in ones, as a config names them."""


def relative_movement(before: Params, after: Params, names: frozenset[str]) -> float:
    """‖after − before‖ / ‖before‖ over `names`."""
    moved = sum(float((real(after[n]).double() - real(before[n]).double()).square().sum()) for n in sorted(names))
    size = sum(float(real(before[n]).double().square().sum()) for n in sorted(names))
    return float((moved / max(size, 1e-300)) ** 0.5)
