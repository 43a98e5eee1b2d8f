"""The programs that are compared: the environments that they need, and how to talk to them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speed_peers.family import Family

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

TUNED = {
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""Has glibc keep freed memory and ask for huge pages, as ScaleFL does in its workers."""
LAST = {"CHANNELS_LAST": "1"}
"""Has programs lay images out with the channels last, behind the first convolution."""

QUIET = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "SCALEFL_CACHE": "",  # ScaleFL plans anew in each process, as it does the first time
}
"""One thread each; nothing is asked of other machines, nor remembered."""


@dataclass(frozen=True)
class Program:
    """One of those that are compared.

    Args:
        name, title: in files, and for people.
        command: "{bin}" is its environment's folder of programs, "{here}" that of this file.
        requirement: what its environment has beside torch; None: it runs in this one.
        more: its own environment variables.
    """

    name: str
    title: str
    command: tuple[str, ...]
    requirement: str | None = None
    more: tuple[tuple[str, str], ...] = ()


def pinned(package: str, extra: str = "") -> str:
    """A package in the version that `make` installs."""
    found = re.search(rf"^{package}==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    if found is None:
        raise SystemExit(f"constraints.txt does not name {package}")
    return f"{package}{extra}=={found[1]}"


PROGRAMS = {
    program.name: program
    for program in (
        Program("scalefl", "ScaleFL, 2 workers", ("{bin}/python", "{here}/with_scalefl.py")),
        Program("bare", "bare loops", ("{bin}/python", "{here}/bare.py")),
        Program("bare-tuned", "bare loops, tuned", ("{bin}/python", "{here}/bare.py"), more=(*TUNED.items(),)),
        Program(
            "scalefl-last",
            "ScaleFL, 2 workers, channels last",
            ("{bin}/python", "{here}/with_scalefl.py"),
            more=(*LAST.items(),),
        ),
        Program(
            "scalefl-at-once",
            "ScaleFL, 2 workers, clients at once",
            ("{bin}/python", "{here}/with_scalefl.py"),
            more=(("AT_ONCE", "1"),),
        ),
        Program(
            "bare-last",
            "bare loops, tuned, channels last",
            ("{bin}/python", "{here}/bare.py"),
            more=(*TUNED.items(), *LAST.items()),
        ),
        Program(
            "pfl",
            "pfl-research, 2 processes",
            ("{bin}/torchrun", "--standalone", "--nproc-per-node=2", "{here}/with_pfl.py"),
            "pfl[pytorch]==0.6.*",
        ),
        Program(
            "flower",
            "Flower's simulation, 2 actors",
            ("{bin}/python", "{here}/with_flower.py"),
            pinned("flwr", "[simulation]"),
        ),
    )
}


@dataclass(frozen=True)
class Environments:
    """Virtual environments of the peers, kept in a folder."""

    folder: Path

    def bin(self, program: Program) -> Path:
        """Where a program's interpreter lies; its environment is made if it is not there, or has other versions."""
        if program.requirement is None:
            return Path(sys.executable).parent
        wanted = [pinned("torch"), program.requirement]
        place = self.folder / program.name
        stamp = place / "requirements.json"
        if not stamp.exists() or json.loads(stamp.read_text()) != wanted:
            self._make(place, wanted)
            stamp.write_text(json.dumps(wanted))
        return place / "bin"

    def _make(self, place: Path, wanted: list[str]) -> None:
        print(f"making {place} with {' '.join(wanted)}", flush=True)
        shutil.rmtree(place, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        for requirement in wanted:  # torch first: alone, it comes in the build for CPUs where pip is set up so
            pip = (
                str(place / "bin" / "python"),
                "-m",
                "pip",
                "install",
                "--quiet",
                "--quiet",
                "--disable-pip-version-check",
            )
            subprocess.run([*pip, requirement], check=True)


class Resident:
    """A program that runs, and does what it is told."""

    def __init__(self, program: Program, environments: Environments, task: Path, log: Path) -> None:
        place = environments.bin(program)
        command = [word.format(bin=place, here=HERE) for word in program.command]
        where = {**os.environ, **QUIET, **dict(program.more)}
        if program.requirement is not None:
            where.pop("PYTHONPATH", None)  # a peer sees its own environment only
        self.program, self._log = program, log
        self.launched = time.time()
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*command, str(task)],
                env=where,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )
        self.family = Family(self._process.pid)

    def ready(self) -> dict[str, str]:
        """Wait until it has loaded everything; its packages' versions."""
        return self._answer()["versions"]

    def run(self, rounds: int) -> tuple[float, float]:
        """Have it do rounds; when they began and ended."""
        answer = self._ask(f"run {rounds}")
        return answer["start"], answer["end"]

    def score(self) -> dict[str, float]:
        """Accuracy and loss of its global model."""
        return self._ask("accuracy")

    def close(self) -> None:
        """End it."""
        if self._process.poll() is None:
            self._process.stdin.close()  # type: ignore[union-attr]
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(20)
        self.family.end()
        self._process.wait()

    def __enter__(self) -> Resident:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, order: str) -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.write(f"{order}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("{"):  # frameworks say things too
                return json.loads(line)
        last = "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])
        raise SystemExit(f"{self.program.name} ended; it said:\n{last}")
