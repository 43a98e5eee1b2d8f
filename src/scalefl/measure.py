"""Measured memory of this machine, to be read beside what is predicted. Needs no torch, so that reports can use it."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TIGHT_MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
}
"""Has glibc give freed memory back. By default it keeps so much that a process holds 40 to 60 % more than it uses."""

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def worker_environment() -> dict[str, str]:
    """The environment of a process that trains: it imports what this one can, and holds no more than it uses."""
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    return {**os.environ, "PYTHONPATH": path, **TIGHT_MALLOC}


@functools.cache
def base_bytes() -> int | None:
    """Resident bytes of a worker that has warmed up: what a budget comes on top of.

    Measured in a fresh process, once in each process that asks, as it takes seconds. None where the system does not
    tell (there is no /proc) or the measuring process fails.
    """
    if not Path("/proc/self/statm").exists():
        return None
    program = (
        "from scalefl.engines.worker import warm_up\n"
        "from scalefl.measure import resident_bytes\n"
        "warm_up(1)\n"
        "print(resident_bytes())"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=worker_environment(), capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 else None


def resident_bytes(pid: int | None = None) -> int:
    """Bytes of memory that a process holds, this one by default; Linux only."""
    pages = Path(f"/proc/{pid or 'self'}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Held:
    """What this process holds, in bytes, as the system counts it.

    Args:
        resident: all pages in memory.
        of_files: those that map files: the system may drop them at any moment.
        highest: the most pages in memory since `start_peak`.
        data: private writable memory, whether in use or not: what RLIMIT_DATA limits.
    """

    resident: int
    of_files: int
    highest: int
    data: int


def held() -> Held | None:
    """What this process holds now; None where the system does not tell."""
    try:
        lines = [line.partition(":") for line in _STATUS.read_text().splitlines()]
        sizes = {key: int(value.split()[0]) * 1024 for key, _, value in lines if value.endswith(" kB")}
        return Held(sizes["VmRSS"], sizes["RssFile"], sizes["VmHWM"], sizes["VmData"])
    except (OSError, KeyError):
        return None


def start_peak() -> Held | None:
    """Start to measure a peak; what the process holds at this moment. None where the system can't."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return None
    return held()


def added_peak_bytes(before: Held | None) -> int | None:
    """The most that this process has held since `start_peak`, beyond what it held then; None if unknown.

    Shared memory counts. File mappings do not, by how much they have grown until now.
    """
    now = held() if before else None
    if before is None or now is None:
        return None
    return max(0, now.highest - before.resident - max(0, now.of_files - before.of_files))
