"""Memory of this machine, measured and limited, to be held against what is predicted. Needs no torch."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import math
import mmap
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_MIB = 2**20

TIGHT_MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
}
"""Has glibc give freed memory back. By default it keeps so much that a process holds 40 to 60 % more than it uses."""

_KEPT_BYTES, _LARGEST_KEPT_BYTES = 2**30, 2**25
_ROOMY_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(_LARGEST_KEPT_BYTES),
    "MALLOC_TRIM_THRESHOLD_": str(_KEPT_BYTES),
}
"""Has glibc keep freed memory: the system clears each page that it gives, a quarter of a small ResNet's CPU time."""


def keep_freed_memory() -> None:
    """Have this process keep freed memory, as workers without a budget do; without effect where malloc is not glibc's.

    It lasts: what malloc has learned of the process until now cannot be set back.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version()  # other libraries' mallopt, where they have one, knows other numbers
        library.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)
        library.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

_NO_KERNELS_KEPT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}
"""Has oneDNN compile a convolution each time that it runs.

Each compiled kernel reserves 256 KiB or more, of which it uses a tenth; a limit on data counts what is reserved: 17 to
38 MiB for the first step of a SqueezeNet of 26 MiB. Kernels that are not kept reserve next to nothing.
"""

MARGIN_SHARE, MARGIN_BYTES = 0.03, 4 * _MIB

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


_SMALL_SEGMENTS = {f"PYTORCH_{kind}ALLOC_CONF": "expandable_segments:True" for kind in ("", "CUDA_")}
"""Has torch's CUDA allocator take memory in pieces of 2 MiB; by default tensors of 1 MiB and more have it take 20."""


_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}
"""Has numpy start no threads at its import: a fork would cut them off, and none trains."""


def worker_environment(*, measured: bool = True, capped: bool = False) -> dict[str, str]:
    """The environment of a process that trains: it imports what this one can.

    Where it is `measured` it holds no more than it uses; where not, it keeps what it may use again. What is `capped`
    is measured.
    """
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    memory = TIGHT_MALLOC if measured else {**_ROOMY_MALLOC, **_huge_pages()}
    usual = {**_ONE_THREAD, **os.environ, "PYTHONPATH": path}
    return {**usual, **memory, **(_NO_KERNELS_KEPT | _SMALL_SEGMENTS if capped else {})}


def _huge_pages() -> dict[str, str]:
    """Has glibc, from 2.35 on, ask for huge pages, of which a processor finds more at once: 2 to 5 % of CPU time."""
    before = os.environ.get("GLIBC_TUNABLES")
    return {"GLIBC_TUNABLES": ":".join(filter(None, (before, "glibc.malloc.hugetlb=1")))}


def warm_worker_bytes() -> int | None:
    """Resident bytes of a worker that has warmed up, measured in a fresh process, which takes seconds.

    None where the system does not tell (there is no /proc) or the measuring process fails.
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


def usable_bytes(budget_bytes: int) -> int:
    """What of a budget may be planned with where the whole of it is a hard cap: all but 3 % of it, or 4 MiB if more.

    A prediction is never under the measurement by more than that: it does not know what Python, allocators and
    libraries take beside tensors.
    """
    return max(0, budget_bytes - max(math.ceil(MARGIN_SHARE * budget_bytes), MARGIN_BYTES))


SPARED_SHARE = 0.05
"""Of a machine's or a GPU's memory: what is left to everything else."""
_CGROUP = Path("/sys/fs/cgroup")


def spare_bytes() -> int:
    """What this machine, or the container that this process is in, can spare now; Linux only.

    Raises:
        OSError: the system does not tell.
    """
    lines = [line.split() for line in Path("/proc/meminfo").read_text().splitlines()]
    sizes = {name.rstrip(":"): int(size) * 1024 for name, size, *_ in lines}
    total, free = sizes["MemTotal"], sizes["MemAvailable"]
    with contextlib.suppress(OSError, ValueError):  # "max": no limit; no such file: no container
        limit = int((_CGROUP / "memory.max").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        held = int((_CGROUP / "memory.current").read_text()) - int(stat["inactive_file"])
        total, free = min(total, limit), min(free, limit - held)
    return max(0, free - int(SPARED_SHARE * total))


@contextlib.contextmanager
def limited(before: Held | None, added_bytes: int | None) -> Iterator[None]:
    """Inside the block, the process gets no more than so many bytes of private memory beyond what it held `before`.

    What asks for more fails with a MemoryError, or in torch with a RuntimeError. Without a number there is no limit.

    Raises:
        OSError, ValueError: the system refuses.
    """
    if added_bytes is None:
        yield
        return
    if before is None:
        raise OSError(errno.ENOTSUP, "the system does not tell what a process holds")
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = before.data + added_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def cap_refusal() -> str | None:
    """Why this system can't cap the memory of a process, tried on this one; None where it can."""
    try:
        with limited(start_peak(), _MIB):
            mmap.mmap(-1, 16 * _MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError as error:
        return None if error.errno == errno.ENOMEM else str(error.strerror)
    except ValueError as error:
        return str(error)
    return "it grants memory beyond RLIMIT_DATA"
