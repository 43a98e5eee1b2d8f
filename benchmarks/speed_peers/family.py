"""A process and all that it has started: the CPU seconds that they take, and the memory that they hold. Linux only."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

INTERVAL_SECONDS = 0.2
_TICKS = os.sysconf("SC_CLK_TCK")

Key = tuple[int, int]
"""A process's number, which is given again, and when it started."""


@dataclass
class Peak:
    """The most that all processes held at one moment, in bytes.

    Args:
        pss: each shared page counts in part for each of those that hold it.
        rss: it counts in full for each.
        processes: the most that lived at one moment.
    """

    pss: int = 0
    rss: int = 0
    processes: int = 0


class Family:
    """A process and its descendants; who was once seen counts on when its parent has ended, or itself.

    What a process does between the last look at it and its end is not counted.
    """

    def __init__(self, root: int) -> None:
        self._root: int | None = root
        self._ticks: dict[Key, int] = {}
        self._living: list[int] = []
        self._lock = threading.Lock()
        self._look()

    def cpu_seconds(self) -> float:
        """Of all, until now."""
        with self._lock:
            self._look()
            return sum(self._ticks.values()) / _TICKS

    def memory(self) -> Peak:
        """What they hold now."""
        with self._lock:
            self._look()
            living = list(self._living)
        held = [found for pid in living if (found := _memory(pid))]
        return Peak(sum(pss for pss, _ in held), sum(rss for _, rss in held), len(held))

    def end(self) -> None:
        """End those that are left: gently, then not."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            give_up = time.monotonic() + 5
            self.cpu_seconds()
            for pid in self._living:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            while self._living and time.monotonic() < give_up:
                time.sleep(0.1)
                self.cpu_seconds()

    @contextlib.contextmanager
    def watched(self, *, memory: bool = False) -> Iterator[Peak]:
        """Inside the block, look again and again, so that little of processes that end is lost; what they held."""
        peak, done = Peak(), threading.Event()

        def watch() -> None:
            while not done.wait(INTERVAL_SECONDS):
                if not memory:
                    self.cpu_seconds()
                    continue
                now = self.memory()
                for name, value in vars(now).items():
                    setattr(peak, name, max(getattr(peak, name), value))

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield peak
        finally:
            done.set()
            thread.join()

    def _look(self) -> None:
        parents, keys, ticks, living = {}, {}, {}, set()
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, IndexError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                pid = int(entry.name)
                parents[pid], keys[pid] = int(fields[1]), (pid, int(fields[19]))
                ticks[pid] = int(fields[11]) + int(fields[12])
                if fields[0] != "Z":
                    living.add(pid)
        new = {pid for pid, key in keys.items() if key in self._ticks or pid == self._root}
        self._root = None  # known by its key from now on: its number may be given again
        family: set[int] = set()
        while new:
            family |= new
            new = {pid for pid, parent in parents.items() if parent in family} - family
        self._ticks |= {keys[pid]: ticks[pid] for pid in family}
        self._living = [pid for pid in family if pid in living]


def _memory(pid: int) -> tuple[int, int] | None:
    """Its proportional and its resident bytes; None if it has ended."""
    with contextlib.suppress(OSError, KeyError, IndexError):
        lines = [line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]]
        sizes = {name: 1024 * int(size) for name, size, *_ in lines}
        return sizes["Pss:"], sizes["Rss:"]
    return None
