"""What clients' devices can do: memory, speed and bandwidth by device class.

A budget is the bytes that training may add to a warmed-up worker, not the size of the device's memory.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import msgspec

from scalefl.errors import ConfigError, nearest
from scalefl.rng import derive

_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_BYTES = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(" + "|".join(_UNITS) + ")")
_PERCENT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*%")
_BYTES_EXAMPLES = '"300MiB", "1.5 GiB" or "500MB"'
_MEMORY_EXAMPLES = f'bytes as {_BYTES_EXAMPLES}, or a part of full training as 0.4 or "40%"'
_LARGEST_FRACTION = 10.0  # above it, a number was surely meant as bytes


def parse_bytes(text: str) -> int:
    """Bytes in a text such as "300MiB"; KiB, MiB, GiB are powers of 2, kB, MB, GB powers of 10.

    Raises:
        ConfigError: not a positive number with one of these units.
    """
    match = _BYTES.fullmatch(text.strip())
    num_bytes = round(float(match[1]) * _UNITS[match[2]]) if match else 0
    if num_bytes < 1:
        raise ConfigError(f"{text!r} is not a number of bytes: write {_BYTES_EXAMPLES}")
    return num_bytes


class MemoryClass(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Devices of one kind.

    Args:
        name: shown in reports.
        share: part of the population, in (0, 1].
        memory: the budget: bytes ("300MiB"), or a part of what training the full model takes (0.4, "40%").
        flops_per_second: sustained in training.
        bandwidth_bytes_per_second: of the slower direction.

    Raises:
        ConfigError: a value is out of range.
    """

    name: str
    share: float
    memory: str | float
    flops_per_second: float
    bandwidth_bytes_per_second: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(f"device class {self.name!r}: share = {self.share}: expected more than 0, at most 1")
        for field in ("flops_per_second", "bandwidth_bytes_per_second"):
            value = getattr(self, field)
            if not 0 < value < math.inf:
                raise ConfigError(f"device class {self.name!r}: {field} = {value}: expected more than 0")
        self.memory_bytes(1)

    def memory_bytes(self, full_training_bytes: int) -> int:
        """The budget in bytes; at least 1."""
        fraction = _fraction(self.memory)
        if fraction is None:
            return parse_bytes(str(self.memory))
        if not 0 < fraction <= _LARGEST_FRACTION:
            raise ConfigError(f"device class {self.name!r}: memory = {self.memory!r}: write {_MEMORY_EXAMPLES}")
        return max(1, int(fraction * full_training_bytes))


def _fraction(memory: str | float) -> float | None:
    """Part of full training, or None for a text that should be bytes."""
    if not isinstance(memory, str):
        return memory
    match = _PERCENT.fullmatch(memory.strip())
    return float(match[1]) / 100 if match else None


@dataclass(frozen=True)
class ResolvedClass:
    """A device class once the model is known; `strength` 0 has the least memory, equals share a rank."""

    name: str
    share: float
    memory_bytes: int
    flops_per_second: float
    bandwidth_bytes_per_second: float
    strength: int


class Devices(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The device classes of a population.

    Args:
        classes: the classes, whose shares sum to 1, or the name of a profile in `PROFILES`.

    Raises:
        ConfigError: an unknown profile, no classes, two of one name, or shares that do not sum to 1.
    """

    classes: str | tuple[MemoryClass, ...]

    def __post_init__(self) -> None:
        names = [member.name for member in self.members]
        if len(set(names)) < len(names):
            raise ConfigError(f"device classes {names}: two have the same name")
        total = sum(member.share for member in self.members)
        if abs(total - 1) > 1e-6:
            shares = ", ".join(f"{member.name} {member.share:g}" for member in self.members)
            raise ConfigError(f"the shares of the device classes sum to {total:g}, not 1: {shares or 'no classes'}")

    @property
    def members(self) -> tuple[MemoryClass, ...]:
        """The classes, looked up where a profile is named."""
        if not isinstance(self.classes, str):
            return self.classes
        if self.classes not in PROFILES:
            hint = nearest(self.classes, PROFILES)
            raise ConfigError(f"no device profile {self.classes!r}{hint}; known: {', '.join(PROFILES)}")
        return PROFILES[self.classes]

    def resolve(self, full_training_bytes: int) -> tuple[ResolvedClass, ...]:
        """The classes in the order of `members`, with budgets in bytes.

        Args:
            full_training_bytes: the peak of training the full model, of which fractions are taken.
        """
        budgets = [member.memory_bytes(full_training_bytes) for member in self.members]
        ranks = {budget: rank for rank, budget in enumerate(sorted(set(budgets)))}
        return tuple(
            ResolvedClass(
                member.name,
                member.share,
                budget,
                member.flops_per_second,
                member.bandwidth_bytes_per_second,
                ranks[budget],
            )
            for member, budget in zip(self.members, budgets, strict=True)
        )

    def class_of(self, client: int, seed: int) -> int:
        """Index in `members` of a client's class; nothing is stored, whatever the population.

        Multiples of the golden ratio spread evenly over [0, 1), so that the clients 0 … n - 1 meet the shares
        within a few clients, for every n. `seed` shifts the sequence.
        """
        # Exact arithmetic on 64-bit fractions: with floats, client 10^8 would have lost half of its digits.
        point = (derive(seed, "devices") * 2 + client * _GOLDEN) % _ONE
        bound = 0.0
        for index, member in enumerate(self.members):
            bound += member.share
            if point < bound * _ONE:
                return index
        return len(self.members) - 1


_ONE = 2**64
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio

# Where each number comes from: "measured" and "vendor" name their source, all else is "assumed". docs/config.md has
# the same as a table.
#
# Speeds.
#   Raspberry Pi 4: measured, 11.4 GFLOP/s: HPL on a Compute Module 4, which has its SoC
#                   (github.com/geerlingguy/top500-benchmark/issues/33).
#   Raspberry Pi 5: measured, 30.2 GFLOP/s: HPL (github.com/geerlingguy/top500-benchmark/issues/18).
#   Jetson Nano:    vendor, 128 CUDA cores at 921 MHz (NVIDIA Jetson Nano data sheet: 472 GFLOP/s in FP16),
#                   so 236 GFLOP/s in FP32 at peak.
#   Jetson TX2 NX:  vendor, 1.33 TFLOP/s in FP16 (developer.nvidia.com/embedded/jetson-tx2-nx), so 0.67 in FP32.
#   Jetson Orin Nano 8GB: vendor, 1024 CUDA cores at 625 MHz (NVIDIA Jetson Orin Nano data sheet), so
#                   1.28 TFLOP/s in FP32.
#   Adreno 740 (Snapdragon 8 Gen 2): assumed, 3.7 TFLOP/s in FP32, as specification tables have it; we know of
#                   no source from the vendor.
# Assumed: training on a GPU sustains 10 % of its FP32 peak; a CPU sustains in FP32 what HPL reaches in FP64
# (its FP32 peak is twice that); an entry phone is a Pi 4 (Cortex-A72), a mid-range phone a Pi 5 (Cortex-A76).
_PI_4, _PI_5 = 11.4e9, 30.2e9
_NANO, _TX2, _ORIN_NANO, _ADRENO_740 = 0.1 * 236e9, 0.1 * 665e9, 0.1 * 1.28e12, 0.1 * 3.7e12

# Upload, in bytes per second; downloads are faster.
#   Mobile: measured, 11.22 Mbit/s, fixed: measured, 45.74 Mbit/s, means of the world (Ookla, Speedtest Global
#   Index, September 2020).
#   5G: measured, 21.08 Mbit/s, median of the world (Ookla, "Growing and Slowing: The State of 5G Worldwide in 2021").
# Assumed: which class has which of them.
_MOBILE, _MOBILE_5G, _FIXED = 11.22e6 / 8, 21.08e6 / 8, 45.74e6 / 8


def _classes(*rows: tuple[str, float, str | float, float, float]) -> tuple[MemoryClass, ...]:
    return tuple(
        MemoryClass(
            name=name,
            share=share,
            memory=memory,
            flops_per_second=speed,
            bandwidth_bytes_per_second=bandwidth,
        )
        for name, share, memory, speed, bandwidth in rows
    )


PROFILES: dict[str, tuple[MemoryClass, ...]] = {
    # Budgets and shares: assumed. What the foreground leaves to a background job differs more between moments
    # than between phones. Seven phones in ten cannot train the full model.
    "phones": _classes(
        ("entry", 0.3, 0.35, _PI_4, _MOBILE),
        ("mid", 0.4, 0.6, _PI_5, _MOBILE),
        ("flagship", 0.3, 1.2, _ADRENO_740, _MOBILE_5G),
    ),
    # The boards' memory: vendor, the same NVIDIA sheets: 4, 4 and 8 GB. Assumed: system and CUDA context leave
    # training half of it on the TX2 NX and Orin Nano, and a quarter on the Nano, which also drives a display.
    # Shares: assumed.
    "jetson": _classes(
        ("nano", 0.4, "1GiB", _NANO, _FIXED),
        ("tx2-nx", 0.3, "2GiB", _TX2, _FIXED),
        ("orin-nano", 0.3, "4GiB", _ORIN_NANO, _FIXED),
    ),
    # Weak to strong over the whole range, for memory-limited studies. Budgets and shares: assumed.
    "mixed": _classes(
        ("pi-4", 0.25, 0.25, _PI_4, _MOBILE),
        ("phone", 0.25, 0.45, _PI_5, _MOBILE),
        ("nano", 0.25, 0.7, _NANO, _FIXED),
        ("orin-nano", 0.25, 1.2, _ORIN_NANO, _FIXED),
    ),
}
"""Named populations. The source says of each number whether it is measured, the vendor's or assumed: budgets are."""
