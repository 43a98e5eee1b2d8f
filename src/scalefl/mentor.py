"""The Curriculum Mentor: an objective for each block (ScaleFL, arXiv 2408.10826, section 3).

    L_t = CE(φ_t(z_t), Y) − λ_t · nHSIC(X; Z_t) − γ_t · nHSIC(Y; Z_t)

Early blocks keep information about the input (λ high), late ones learn the task (γ high).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import msgspec
from torch import Tensor

from scalefl.errors import ConfigError, check_range
from scalefl.hsic import SIGMA, Form, likeness, normalised_kernel
from scalefl.models.output import Projection
from scalefl.parts import Taps
from scalefl.problem import Batch, Problem, Weighted, without_padding

Tap = Literal["output", "cut"]


@runtime_checkable
class Schedule(Protocol):
    """How λ and γ change from block to block, and over the run; hashable, as a frozen dataclass is."""

    def weights(self, position: float, progress: float) -> tuple[float, float]:
        """Factors of λ_max and γ_max.

        Args:
            position: of the block, from 0 (the first) to 1 (the last).
            progress: of the run, from 0 to 1 (see `Mentor.schedule_rounds`).
        """
        ...


class Linear(msgspec.Struct, frozen=True, tag_field="kind", tag="linear", forbid_unknown_fields=True):
    """λ falls and γ rises linearly from the first block to the last.

    Deviation: the paper (section 3) says that early blocks have λ high and γ low, and late ones the reverse, not how.
    """

    def weights(self, position: float, progress: float) -> tuple[float, float]:
        """See `Schedule`."""
        return 1 - position, position


class Cosine(msgspec.Struct, frozen=True, tag_field="kind", tag="cosine", forbid_unknown_fields=True):
    """λ falls and γ rises along half a cosine: slowly at both ends."""

    def weights(self, position: float, progress: float) -> tuple[float, float]:
        """See `Schedule`."""
        down = (1 + math.cos(math.pi * position)) / 2
        return down, 1 - down


class Constant(msgspec.Struct, frozen=True, tag_field="kind", tag="constant", forbid_unknown_fields=True):
    """The same λ and γ for every block."""

    def weights(self, position: float, progress: float) -> tuple[float, float]:
        """See `Schedule`."""
        return 1.0, 1.0


SCHEDULES = Linear | Cosine | Constant
"""The built-in ones, as a config names them."""


@dataclass(frozen=True, kw_only=True)
class Mentor:
    """The mentor's settings.

    Args:
        lambda_max, gamma_max: largest weights of nHSIC(X; Z) and nHSIC(Y; Z).
        schedule: how they change from block to block, and over the run: `Linear`, `Cosine`, `Constant` or your own.
        schedule_rounds: the length of the run, for schedules that move with its progress; 0: it stays at its start.
        form: the normalisation of HSIC.
        sigma: bandwidth of the Gaussian kernels, in units of √d.
        tap: Z is read after the output module's light layers and projection head ("output", the authors'
            choice), or is the block's own feature z_t ("cut").
        projection: the projection head for the label term.
    """

    # Deviation: the authors print no weights, and project through three linear layers ("mlp"). These defaults come from
    # validation data (docs/benchmarks); what "mlp" gained over "none" lies within the spread, and it takes memory.
    lambda_max: float = 3.0
    gamma_max: float = 3.0
    schedule: Schedule = Linear()
    schedule_rounds: int = 0
    form: Form = "cka"
    sigma: float = SIGMA
    tap: Tap = "output"
    projection: Projection = "none"

    def __post_init__(self) -> None:
        check_range("mentor.lambda_max", self.lambda_max, 0.0)
        check_range("mentor.gamma_max", self.gamma_max, 0.0)
        check_range("mentor.sigma", self.sigma, 1e-6)
        check_range("mentor.schedule_rounds", self.schedule_rounds, 0)

    def coefficients(self, end: int, num_blocks: int, round: int = 0) -> tuple[tuple[str, float], ...]:
        """λ and γ in a round of a span that ends with block `end` (from 0) of `num_blocks`.

        Paper: section 3 gives each stage its λ and γ. Deviation: a span of several blocks has those of its end, since
        that is where Z is read; and one block alone is the last.
        """
        position = end / (num_blocks - 1) if num_blocks > 1 else 1.0
        progress = min(round / self.schedule_rounds, 1.0) if self.schedule_rounds else 0.0
        down, up = self.schedule.weights(position, progress)
        return (("lambda", self.lambda_max * down), ("gamma", self.gamma_max * up))

    def largest_coefficients(self, end: int, num_blocks: int) -> tuple[tuple[str, float], ...]:
        """The λ and the γ of largest size that the span gets in any round: 0 only for a term that is never computed."""
        rounds = [dict(self.coefficients(end, num_blocks, r)) for r in range(self.schedule_rounds + 1)]
        return tuple((name, max((found[name] for found in rounds), key=abs)) for name in ("lambda", "gamma"))


@dataclass(frozen=True)
class MentorLoss:
    """The problem's loss less the two weighted nHSIC terms; a term of weight 0 is not computed."""

    mentor: Mentor
    lambda_x: float
    gamma_y: float

    @property
    def coupled(self) -> tuple[str, ...]:
        """The features of the terms that have a weight."""
        of_x, of_y = ("z", "z") if self.mentor.tap == "cut" else ("late", "projected")
        used = {*([of_x] if self.lambda_x else []), *([of_y] if self.gamma_y else [])}
        return tuple(sorted(used))

    def sample_terms(self, taps: Taps, batch: Batch, problem: Problem) -> Weighted:
        """The loss of the logits."""
        return problem.loss(taps.logits, batch)

    def batch_terms(self, taps: Taps, batch: Batch, problem: Problem) -> Tensor | None:
        """−λ nHSIC(X; Z) − γ nHSIC(Y; Z)."""
        mentor = self.mentor
        # Paper: the authors' code reads Z after φ's last convolution (X term) and after the projection (Y term).
        z_x, z_y = (taps.z, taps.z) if mentor.tap == "cut" else (taps.late, taps.projected)
        # Deviation: the paper has no tokens. What stands where an example has ended says nothing of it.
        mask = problem.mask(batch)
        form, sigma = mentor.form, mentor.sigma
        wanted = []  # features, and what their kernel is to be like
        if self.lambda_x:
            if taps.x is None:
                raise ConfigError(
                    "the mentor compares features with the input, and this model has token ids for one, of which no "
                    "module makes numbers alone: set method.mentor.lambda_max = 0"
                )
            kernel_x = normalised_kernel(without_padding(taps.x, mask), form, sigma)
            wanted.append((z_x, self.lambda_x * kernel_x))
        if self.gamma_y:
            kernel_y = normalised_kernel(problem.y_features(batch).to(z_y.dtype), form, sigma)
            wanted.append((z_y, self.gamma_y * kernel_y))
        if len(wanted) == 2 and z_x is z_y:  # one kernel and one product do for both terms
            wanted = [(z_x, wanted[0][1] + wanted[1][1])]
        terms = [-likeness(without_padding(z, mask), target, form, sigma) for z, target in wanted]
        return sum(terms[1:], terms[0]) if terms else None
