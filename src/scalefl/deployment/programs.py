"""Flower's programs, as processes that end with the one that started them."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from scalefl.deployment.address import Address
from scalefl.errors import ConfigError, ScaleFLError

Say = Callable[[str], None]
"""Shows a line to whoever started this."""

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_GRACE_SECONDS = 10.0
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_LIBC: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
"""Loaded here: between a fork and the program that follows, little may be done."""


_NO_PROXY = {"no_proxy": "*", "NO_PROXY": "*"}
"""For what speaks to this machine's server and to nobody else."""


def past_proxies(host: str) -> dict[str, str]:
    """The variables by which what runs here finds this machine, and a host of it, past the proxies that are set."""
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    hosts = ",".join(
        dict.fromkeys(
            filter(None, [*given.replace("[", "").replace("]", "").split(","), "localhost", "127.0.0.1", "::1", host])
        )
    )
    return {"no_proxy": hosts, "NO_PROXY": hosts}


class ProgramFailed(ScaleFLError):
    """One of Flower's programs did not do what it was started for."""


def environment(home: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """For Flower's programs: what they keep lies in `home`, and they ask nobody else for anything."""
    path = os.pathsep.join([str(_bin()), os.environ.get("PATH", "")])
    return {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path),
        "PYTHONUNBUFFERED": "1",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
        **(more or {}),
    }


def ask(say: Say, name: str, *arguments: str, home: Path) -> str:
    """Run a program to its end and return what it printed.

    Raises:
        ProgramFailed: it did not succeed; what it said.
    """
    say(_shown(name, arguments, home))
    done = subprocess.run(
        [*_found(name), *arguments],
        env=environment(home, _NO_PROXY),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise ProgramFailed(f"{name} failed: {_last_line(done.stderr) or _last_line(done.stdout)}")
    return done.stdout


def ask_flower(say: Say, *arguments: str, home: Path) -> dict[str, Any]:
    """What `flwr` answers in JSON, which says itself whether it succeeded.

    Raises:
        ProgramFailed: it did not.
    """
    said = ask(say, "flwr", *arguments, "--format", "json", home=home)
    try:
        found: dict[str, Any] = json.loads(said[said.index("{") :])
    except ValueError as error:
        raise ProgramFailed(f"flwr said something else than JSON: {_last_line(said)}") from error
    if not found.get("success"):
        raise ProgramFailed(" ".join(str(found.get("error-message", said)).split()))
    return found


class Program:
    """One of Flower's programs that runs until it is stopped.

    Args:
        say: is told the command.
        name, arguments: the command; a name with dots is a module of ours that runs one of Flower's.
        home, more: see `environment`.
        log: where its output goes, after what is there.
    """

    def __init__(
        self,
        say: Say,
        name: str,
        *arguments: str,
        home: Path,
        log: Path,
        more: Mapping[str, str] | None = None,
    ) -> None:
        say(_shown(name, arguments, home))
        self.name, self._log = name, log
        with log.open("ab") as output:
            self._begin = output.tell()
            self._process = subprocess.Popen(
                [*_found(name), *arguments],
                env=environment(home, more),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is ours to pass on
                preexec_fn=_die_with_parent,
            )

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    @property
    def ended(self) -> int | None:
        """The status with which it has ended; None while it runs."""
        return self._process.poll()

    @property
    def said(self) -> str:
        """What it has written."""
        with self._log.open("rb") as file:
            file.seek(self._begin)
            return _COLOURS.sub("", file.read().decode(errors="replace"))

    @property
    def obituary(self) -> str:
        """With what status it has ended, and its last words."""
        words = [line.strip() for line in self.said.splitlines() if line.strip()]
        errors = [i for i, line in enumerate(words) if line.startswith("ERROR") or "Error:" in line]
        last = words[errors[-1] : errors[-1] + 2] if errors else words[-2:]
        return f"status {self.ended}: {' / '.join(last)} ({self._log})"

    def stop(self) -> None:
        """End it, and all that it has started, gently at first."""
        family = [self.pid, *descendants(self.pid)]
        _signal(family[:1], signal.SIGTERM)
        try:
            self._process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            _signal([self.pid], signal.SIGKILL)
            self._process.wait()
        end(family[1:])


def _last_line(text: str) -> str:
    return next(iter(text.strip().splitlines()[::-1]), "")


def end(processes: Iterable[int]) -> None:
    """End processes that may have lost their parent: gently, then not."""
    left = [pid for pid in processes if _lives(pid)]
    _signal(left, signal.SIGTERM)
    give_up = time.monotonic() + _GRACE_SECONDS
    while any(map(_lives, left)) and time.monotonic() < give_up:
        time.sleep(0.05)
    _signal([pid for pid in left if _lives(pid)], signal.SIGKILL)


def adopt_orphans() -> None:
    """Have this process become the parent of whatever its children leave behind, so that it can be found and ended."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def descendants(pid: int) -> list[int]:
    """All processes that one has started, and those that they have."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
    found, new = [], [pid]
    while new:
        new = [child for child, parent in parents.items() if parent in new]
        found += new
    return found


def free_port() -> int:
    """A port of the loopback interface on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def check_free(address: Address) -> None:
    """Refuse a port on which something listens already: that would be taken for what is started.

    Raises:
        ConfigError: names it.
    """
    if _listens(address):
        raise ConfigError(f"something listens on {address} already: another server, or another program")


def wait_for(address: Address, program: Program, seconds: float = 60.0) -> None:
    """Wait until a program listens.

    Raises:
        ProgramFailed: it has ended, or does not.
    """
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        if program.ended is not None:
            raise ProgramFailed(f"{program.name} ended with {program.obituary}")
        if _listens(address):
            return
        time.sleep(0.1)
    raise ProgramFailed(f"{program.name} does not listen on {address} after {seconds:.0f} seconds")


def _listens(address: Address) -> bool:
    try:
        socket.create_connection(address, timeout=1.0).close()
    except OSError:
        return False
    return True


def _shown(name: str, arguments: Iterable[str], home: Path) -> str:
    words = ["python", "-m", name] if "." in name else [name]
    return f"FLWR_HOME={shlex.quote(str(home))} {shlex.join([*words, *arguments])}"


def _bin() -> Path:
    return Path(sys.executable).parent


def _found(name: str) -> list[str]:
    if "." in name:
        return [sys.executable, "-m", name]
    beside = _bin() / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise ProgramFailed(f'{name} is not installed: pip install "scalefl[flower]"')
    return [found]


def _die_with_parent() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _prctl(option: int, value: int) -> None:
    """Linux only; elsewhere a parent that is killed leaves its children."""
    if _LIBC is not None:
        _LIBC.prctl(option, value, 0, 0, 0)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return False


def _signal(processes: Iterable[int], number: signal.Signals) -> None:
    for pid in processes:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
