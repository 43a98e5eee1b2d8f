"""Submit a config to a deployment's server, and follow the run by what it writes."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from scalefl.bookkeeping import RunProgress
from scalefl.config import Config, make_config, to_plain
from scalefl.deployment.layout import CONNECTION, Deployment
from scalefl.deployment.programs import ProgramFailed, Say, ask, ask_flower
from scalefl.errors import ConfigError, ScaleFLError
from scalefl.run_folder import RunFolder
from scalefl.runner import check_same
from scalefl.settings import overridden, read_settings

_POLL_SECONDS, _STATUS_SECONDS = 0.5, 10.0

_PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "scalefl-run"
version = "1.0.0"
dependencies = []

[tool.flwr.app]
publisher = "scalefl"

[tool.flwr.app.components]
serverapp = "scalefl.deployment.app:app"
clientapp = "scalefl.deployment.app:client"

[tool.flwr.app.config]
config = ""
folder = ""
resume = false
"""
"""An app without code of its own: the server has ScaleFL, and nodes load no app at all."""


def load_submission(path: Path, overrides: tuple[str, ...] = ()) -> Config:
    """A config for real nodes: `devices` and `data.clients` may be missing, as nodes speak for themselves.

    Raises:
        ConfigError: see `load_config`.
    """
    raw = read_settings(path)
    for override in overrides:
        raw = overridden(raw, override)
    try:
        return make_config({"devices": {"classes": "mixed"}, **raw})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def submit(deployment: Deployment, config: Config, say: Say, *, resume: bool) -> str:
    """Hand a run to the server and return Flower's number for it.

    Raises:
        ConfigError: the folder of that name holds another run, or one that could be resumed.
        ProgramFailed: the server does not take it.
    """
    files = RunFolder(deployment.runs / config.name)
    if files.config.exists():
        if not resume:
            raise ConfigError(f"{files.path} holds a run: go on with it (--resume), or give this one another name")
        check_same(config, files)
    with tempfile.TemporaryDirectory(prefix="scalefl-") as folder:
        (Path(folder) / "pyproject.toml").write_text(_PROJECT)
        values = {"config": json.dumps(to_plain(config)), "folder": str(files.path)}
        settings = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
        chosen = Path(folder) / "settings.toml"
        chosen.write_text("\n".join([*settings, f"resume = {str(resume).lower()}\n"]))
        arguments = ("run", folder, CONNECTION, "--run-config", str(chosen))
        return str(ask_flower(say, *arguments, home=deployment.flower)["run-id"])


def follow(deployment: Deployment, config: Config, run: str) -> Generator[RunProgress]:
    """Yield the rounds of a run as it journals them, to its end.

    Raises:
        ScaleFLError: the run has failed; what it said.
    """
    files = RunFolder(deployment.runs / config.name)
    seen, asked = len(_lines(files)), time.monotonic()
    while True:
        is_over, why = False, ""
        if files.summary.exists() or time.monotonic() - asked > _STATUS_SECONDS:
            asked, status = time.monotonic(), _status_of(deployment, files, run)
            is_over = status["status"].startswith("finished")
            why = "" if status["status"] == "finished:completed" else f"{status['status']}: {status['status-details']}"
        lines = _lines(files)
        for line in lines[seen:]:
            if line["round"] > 0:
                yield RunProgress(line, config.rounds, config.work.epochs)
        seen = max(seen, len(lines))
        if is_over:
            if why:
                raise ScaleFLError(f"the run has ended ({why}); what it saved is in {files.path}")
            return
        time.sleep(_POLL_SECONDS)


def _status_of(deployment: Deployment, files: RunFolder, run: str) -> dict[str, Any]:
    try:
        return run_status(deployment, run)
    except ProgramFailed as error:
        where = f"what it saved is in {files.path}; once the server is back, --resume goes on from there"
        raise ScaleFLError(f"the server does not answer ({error}), so the run has ended; {where}") from error


def run_status(deployment: Deployment, run: str) -> dict[str, Any]:
    """What Flower knows of a run: its state, the bytes that it has moved, its compute time.

    Raises:
        ProgramFailed: the server does not answer.
    """
    runs = ask_flower(_silent, "list", CONNECTION, "--run-id", run, home=deployment.flower)["runs"]
    return dict(runs[0])


def all_runs(deployment: Deployment, say: Say) -> list[dict[str, Any]]:
    """All runs, the newest first, as Flower lists them.

    Raises:
        ProgramFailed: the server does not answer.
    """
    return list(ask_flower(say, "list", CONNECTION, home=deployment.flower)["runs"])


def stop(deployment: Deployment, run: str, say: Say) -> None:
    """Stop a run; what it has saved can be resumed."""
    try:
        ask(say, "flwr", "stop", run, CONNECTION, home=deployment.flower)
    except ProgramFailed as error:
        say(f"it could not be stopped: {error}")


def _silent(line: str) -> None:
    """Nothing is shown of what is asked every few seconds."""


def _lines(files: RunFolder) -> list[dict[str, Any]]:
    """The journal as far as it is written: a last line without an end is not there yet."""
    if not files.journal.exists():
        return []
    *whole, _ = files.journal.read_text().split("\n")
    return [json.loads(line) for line in whole]
