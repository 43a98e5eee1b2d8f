"""A deployment of real processes on this machine, for tests: a server, nodes, and what a person would type."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scalefl.deployment.layout import Deployment
from scalefl.deployment.programs import descendants, free_port
from scalefl.run_folder import RunFolder

TESTS = Path(__file__).parent
PATHS = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
ENVIRONMENT = {**os.environ, "PYTHONPATH": PATHS, "COLUMNS": "120"}


def scalefl(*arguments: object, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
    """A command to its end."""
    return subprocess.run(command(*arguments), env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "scalefl.cli", *map(str, arguments)]


def eventually(holds: Callable[[], Any], seconds: float = 90.0, why: Callable[[], str] = lambda: "") -> Any:
    """Wait until something holds, and return it."""
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        found = holds()
        if found:
            return found
        time.sleep(0.2)
    raise AssertionError(f"not within {seconds} seconds. {why()}")


@dataclass
class Field:
    """A deployment and its processes; `host_of` says what to put before the command of one to run it elsewhere."""

    deployment: Deployment
    host_of: Callable[[str], list[str]]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, *arguments: object) -> subprocess.Popen[bytes]:
        """A command of ours that goes on."""
        return self.start_program(name, *command(*arguments))

    def start_program(self, name: str, *words: str) -> subprocess.Popen[bytes]:
        """Any command that goes on."""
        with self.log(name).open("ab") as log:
            process = subprocess.Popen([*self.host_of(name), *words], env=ENVIRONMENT, stdout=log, stderr=log)
        self.processes[name] = process
        return process

    def start_server(self) -> None:
        self.start("server", "deploy", "server", "--dir", self.deployment.path)
        eventually(lambda: "listening on" in self.said("server"), why=lambda: self.said("server"))

    def start_node(self, name: str, budget: str, share: str, *more: object, data: str = "mnist5k") -> None:
        folder = self.deployment.node(name).path
        options = ["--budget", budget, "--data", data, "--share", share, *more]
        self.start(name, "deploy", "node", "--dir", folder, *options)

    def wait_until_there(self, *names: str) -> None:
        """Wait until nodes have connected."""
        for name in names:
            eventually(lambda name=name: "SuperNode ID" in self.flower_said(name), why=self.everything)

    def log(self, name: str) -> Path:
        return self.deployment.path / f"{name}.log"

    def said(self, name: str) -> str:
        return self.log(name).read_text(errors="replace")

    def flower_said(self, name: str) -> str:
        log = self.deployment.node(name).flower / "supernode.log"
        return log.read_text(errors="replace") if log.exists() else ""

    def write_config(self, name: str, text: str) -> Path:
        path = self.deployment.path / f"{name}.toml"
        path.write_text(f'name = "{name}"\n{text}')
        return path

    def submit(self, config: Path, *more: object) -> subprocess.Popen[bytes]:
        """Submit, and do not wait."""
        name = tomllib.loads(config.read_text())["name"]
        arguments = ["deploy", "submit", config, "--dir", self.deployment.path, *more]
        return self.start(f"submit-{name}", *arguments)

    def run_number(self, name: str) -> str:
        """Flower's number of the run that was submitted last under a name."""
        log = f"submit-{name}"
        found = eventually(lambda: re.findall(r"^run (\d+):", self.said(log), re.MULTILINE), why=lambda: self.said(log))
        return str(found[-1])

    def journal(self, name: str) -> list[dict[str, Any]]:
        """The rounds of a run that are journalled."""
        files = RunFolder(self.deployment.runs / name)
        if not files.journal.exists():
            return []
        *whole, _ = files.journal.read_text().split("\n")
        return [line for line in map(json.loads, whole) if line["round"] > 0]

    def finish(self, name: str, seconds: float = 240.0) -> None:
        """Wait until a submission has ended well."""
        process = self.processes[f"submit-{name}"]
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(self.everything()) from error
        assert process.returncode == 0, self.everything()

    def everything(self) -> str:
        """All that anybody said last."""
        logs = [self.log(name) for name in self.processes]
        logs += [self.deployment.flower / "superlink.log"]
        logs += [self.deployment.node(name).flower / "supernode.log" for name in self.deployment.nodes]
        return "\n".join(f"== {log}\n{log.read_text(errors='replace')[-2000:]}" for log in logs if log.exists())

    def stop(self, name: str, number: signal.Signals = signal.SIGTERM) -> int:
        """End a process and return its status."""
        process = self.processes.pop(name)
        process.send_signal(number)
        return process.wait(60)

    def family(self, name: str) -> list[int]:
        """A process and all that it has started."""
        pid = self.processes[name].pid
        return [pid, *descendants(pid)]


def none_elsewhere(name: str) -> list[str]:
    """All on this host."""
    return []


@contextmanager
def deployed(
    folder: Path, *options: object, nodes: int, host_of: Callable[[str], list[str]] = none_elsewhere
) -> Iterator[Field]:
    """A deployment whose server runs."""
    done = scalefl("deploy", "init", folder, "--nodes", nodes, "--port", free_port(), *options)
    assert done.returncode == 0, done.stderr
    area = Field(Deployment(folder), host_of)
    try:
        area.start_server()
        yield area
    finally:
        for name in [*area.processes][::-1]:
            if area.processes[name].poll() is None:
                area.stop(name)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
