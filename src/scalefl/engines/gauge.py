"""What a task adds to the memory of the device that it trains on: measured, and limited."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

import torch

from scalefl import measure
from scalefl.errors import ConfigError


class Gauge(Protocol):
    """Of one task."""

    def start(self) -> None:
        """What is held now is not the task's."""
        ...

    def limited(self, added_bytes: int | None) -> contextlib.AbstractContextManager[None]:
        """Inside the block, whatever asks for more than so many bytes beyond what was held at the start fails.

        Raises:
            OSError, ValueError: the system refuses to limit; only where there is a number.
        """
        ...

    def added_peak_bytes(self) -> int | None:
        """The most that was held since the start, beyond what was held then; None where that can't be told."""
        ...


class HostGauge:
    """Of this process, as the system counts it."""

    def __init__(self) -> None:
        self._before: measure.Held | None = None

    def start(self) -> None:
        """See `Gauge`."""
        self._before = measure.start_peak()

    def limited(self, added_bytes: int | None) -> contextlib.AbstractContextManager[None]:
        """See `Gauge`: by RLIMIT_DATA."""
        return measure.limited(self._before, added_bytes)

    def added_peak_bytes(self) -> int | None:
        """See `Gauge`."""
        return measure.added_peak_bytes(self._before)


class CudaGauge:
    """Of a CUDA device, as torch's allocator counts it: tensors are measured, the segments that hold them limited."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: int | None = None

    def start(self) -> None:
        """See `Gauge`."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)

    @contextlib.contextmanager
    def limited(self, added_bytes: int | None) -> Iterator[None]:
        """See `Gauge`: by torch's fraction for the process."""
        if added_bytes is None:
            yield
            return
        total = torch.cuda.get_device_properties(self._device).total_memory
        limit = torch.cuda.memory_reserved(self._device) + added_bytes
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), self._device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, self._device)

    def added_peak_bytes(self) -> int | None:
        """See `Gauge`."""
        if self._before is None:
            return None
        return max(0, torch.cuda.max_memory_allocated(self._device) - self._before)


class NoGauge:
    """Of a process that keeps freed memory, and shares some: what it holds says nothing of a task."""

    def start(self) -> None:
        """See `Gauge`."""

    def limited(self, added_bytes: int | None) -> contextlib.AbstractContextManager[None]:
        """See `Gauge`; there is no limit."""
        return contextlib.nullcontext()

    def added_peak_bytes(self) -> int | None:
        """See `Gauge`."""
        return None


def gauge_of(device: torch.device) -> Gauge:
    """A gauge for what trains on a device."""
    return CudaGauge(device) if device.type == "cuda" else HostGauge()


def cap_refusal(device: torch.device) -> str | None:
    """Why what a process takes of a device can't be capped here; None where it can."""
    return measure.cap_refusal() if device.type == "cpu" else None


def device_of(name: str) -> torch.device:
    """The device of a name, ready to be used.

    Raises:
        ConfigError: there is no such device here, or it is of a kind that clients can't train on.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"engine.device = {name!r}: expected 'cpu', 'cuda' or 'cuda:1'") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"engine.device = {name!r}: clients train on 'cpu' or 'cuda'")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ConfigError(f"engine.device = {name!r}: torch sees {count} CUDA devices on this machine")
        torch.cuda.set_device(device)
        torch.cuda.init()  # type: ignore[no-untyped-call]  # or the first task's seed would not reach its generator
    return device
