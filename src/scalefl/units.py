"""How memory is told: in MiB, and by the terms of a training peak. Needs no torch, as reports and help do not."""

from __future__ import annotations

from typing import Literal

MIB = 2**20

Term = Literal["weights", "gradients", "optimizer", "activations"]
TERMS: tuple[Term, ...] = ("weights", "gradients", "optimizer", "activations")


def mib(num_bytes: float) -> str:
    """Bytes in MiB, as text without the unit: "1,234", "12.3", "1.23"."""
    return digits(num_bytes / MIB)


def digits(value: float) -> str:
    """Three significant digits or so, never an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
