"""How memory, privacy and time are told: in MiB, by the terms of a training peak, as ε. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

MIB = 2**20

Term = Literal["weights", "gradients", "optimizer", "copies", "output_module", "mentor", "activations", "transients"]
TERMS: tuple[Term, ...] = get_args(Term)
"""What memory holds in training: the model's own weights, their gradients and optimizer state, and copies kept of them;
all of these for the output module, with its activations; the mentor's kernels; the batch and what backward needs of
the forward pass; and what lives for a moment, scratch included."""


def mib(num_bytes: float) -> str:
    """Bytes in MiB, as text without the unit: "1,234", "12.3", "1.23"."""
    return digits(num_bytes / MIB)


def privacy(spent: Mapping[str, float | None]) -> str:
    """What a journal says of the privacy loss, as "ε = 4.97 at δ = 1e-05"."""
    epsilon, delta = spent["epsilon"], spent["delta"]
    return "no privacy (no noise)" if epsilon is None else f"ε = {rounded_up(epsilon)} at δ = {delta:g}"


def rounded_up(epsilon: float) -> str:
    """With two decimals: it is an upper bound."""
    return f"{math.ceil(100 * epsilon) / 100:.2f}"


def digits(value: float) -> str:
    """Three significant digits or so, never an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def duration(seconds: float) -> str:
    """Seconds as people tell them: "0.42 s", "12.3 min", "5.40 h"."""
    for name, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{digits(seconds / size)} {name}"
    return f"{digits(seconds)} s"
