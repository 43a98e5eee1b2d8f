"""Copies of a run where people look for runs: TensorBoard's event files, an MLflow server or store.

The run's folder is what counts; a copy is brought up to its journal whenever it is opened. So neither a kill nor a
server that was away leaves it with a round too few or twice, and nothing that happens to a copy happens to the run.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shlex
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from scalefl.checkpoint import write_whole
from scalefl.errors import ConfigError
from scalefl.run_folder import RunFolder, read_json

Destination = Literal["tensorboard", "mlflow"]
"""Where a run can be copied to: the name of the package that it takes, and of the extra that brings it."""

Line = Mapping[str, Any]
"""A line of the journal."""

REST = 20
"""A copy that failed rests for so many times as long as that took: a run is held up by a twentieth at most."""

HURRY = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
"""Where the user's environment says nothing else: MLflow by itself would wait minutes for a server that is away."""

_log = logging.getLogger("scalefl")


def check_installed(destinations: Iterable[Destination]) -> None:
    """Refuse destinations whose packages are missing.

    Raises:
        ConfigError: names the extra to install.
    """
    for name in destinations:
        # A mere folder of that name in the working directory has no origin.
        if getattr(find_spec(name), "origin", None) is None:
            raise ConfigError(f'tracking = ["{name}"] needs a package that is missing: pip install "scalefl[{name}]"')


def figures(line: Line) -> dict[str, float]:
    """The numbers of a journal's line, under the journal's names, as "validation/accuracy" or "plane/CUT/x".

    Lists of clients are counted, under the names that summaries have for these counts.
    """
    found = _numbers(line)
    del found["round"]
    if "rungs" in line:
        found["num_clients_seen"] = sum(len(ids) for ids in line["rungs"].values())
        found["num_clients_lost"] = len(line["lost"])
    for point in line.get("plane", ()):
        values = {key: value for key, value in point.items() if key != "num_samples"}
        found |= _numbers({"plane": {point["cut"]: values}})
    return found


class Tracking:
    """The copies of a run, as a context manager: what leaves it tells them how the run ended.

    What goes wrong with a copy is logged as a warning and raises nothing; the copy is tried again later, and once more
    at the end.

    Args:
        destinations: where to.
        files: the folder of the run, with its config and environment.
    """

    def __init__(self, destinations: Iterable[Destination], files: RunFolder) -> None:
        self._copies = [_Copy(name, files) for name in dict.fromkeys(destinations)]

    def __enter__(self) -> Self:
        for copy in self._copies:
            copy.add()
        return self

    def add(self, line: Line) -> None:
        """Write a line that the journal has got."""
        for copy in self._copies:
            copy.add(line)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for copy in self._copies:
            if kind is None:
                copy.finish()
            else:
                copy.stop("KILLED" if issubclass(kind, GeneratorExit | KeyboardInterrupt) else "FAILED")


class _Writer(Protocol):
    """Writes to one destination. Where it is made, it brings the copy up to the journal, which may be empty."""

    def write(self, lines: Sequence[Line]) -> None:
        """Write lines that the journal has got since; they are out of this process on return."""

    def conclude(self, summary: Mapping[str, Any]) -> None:
        """Write the final figures and end."""

    def stop(self, status: str) -> None:
        """End without them; the status is one of MLflow's."""


class _Copy:
    """One destination, whose writer is made anew after a failure."""

    def __init__(self, name: Destination, files: RunFolder) -> None:
        self._name, self._files = name, files
        self._writer: _Writer | None = None
        self._rest_until = 0.0
        self._is_behind = False

    def add(self, *lines: Line) -> None:
        if self._writer is None and time.monotonic() < self._rest_until:
            return
        with self._excused():
            if self._writer is None:
                self._writer = self._opened()
            else:
                self._writer.write(lines)
            self._is_behind = False

    def finish(self) -> None:
        with self._excused():
            writer, self._writer = self._writer or self._opened(), None
            writer.conclude(read_json(self._files.summary))
            self._is_behind = False
        if self._is_behind:
            path, settings = self._files.path, f'tracking=["{self._name}"]'
            command = ["scalefl", "run", self._files.config, "--runs", path.parent, "--resume", "--set", settings]
            words = shlex.join(map(str, command))
            _log.warning("tracking: %s lacks some of %s; what it lacks is written by %s", self._name, path, words)

    def stop(self, status: str) -> None:
        if self._writer is not None:
            with self._excused():
                self._writer.stop(status)

    def _opened(self) -> _Writer:
        return _TensorBoard(self._files) if self._name == "tensorboard" else _MLflow(self._files)

    @contextmanager
    def _excused(self) -> Iterator[None]:
        """Turn what goes wrong into a warning, the first time, and a rest."""
        begun = time.monotonic()
        try:
            yield
        except Exception as error:
            self._writer = None
            now = time.monotonic()
            self._rest_until = now + REST * (now - begun)
            if not self._is_behind:
                what = next(iter(str(error).strip().splitlines()), "")
                _log.warning(
                    "tracking: cannot write to %s (%s: %s); the run itself is not affected",
                    self._name,
                    type(error).__name__,
                    what,
                )
            _log.debug("tracking: %s", self._name, exc_info=True)
            self._is_behind = True


class _TensorBoard:
    """An event file in the run's folder. The journal has all that it holds: a resumed run writes one anew.

    It says that earlier ones are void. They are removed when the run is done: a viewer that had one open and finds it
    gone would never look for the next.
    """

    def __init__(self, files: RunFolder) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self._earlier = files.event_files
        self._writer = SummaryWriter(str(files.tensorboard), purge_step=0)
        # Without the first piece, the experiment's: TensorBoard would take that of one run for the settings of all.
        for piece in hparams(_settings(files), {})[1:]:
            self._writer.file_writer.add_summary(piece)
        self.write(files.read_journal())

    def write(self, lines: Sequence[Line]) -> None:
        # What was journalled long ago gets times at the distances that the rounds took.
        wall = time.time() - sum(line.get("seconds", 0.0) for line in lines)
        for line in lines:
            wall += line.get("seconds", 0.0)
            self._put(figures(line), line["round"], wall)
        self._writer.flush()

    def conclude(self, summary: Mapping[str, Any]) -> None:
        self._put(_final(summary), summary["rounds"], time.time())
        self._writer.close()
        for path in self._earlier:
            path.unlink(missing_ok=True)

    def stop(self, status: str) -> None:
        self._writer.close()

    def _put(self, values: Mapping[str, float], step: int, wall: float) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, wall)


@contextmanager
def _hurry() -> Iterator[None]:
    """Wait seconds for MLflow's server, not minutes; MLflow asks the environment how long."""
    ours = {key: value for key, value in HURRY.items() if key not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for key in ours:
            del os.environ[key]


@contextmanager
def _alone() -> Iterator[None]:
    """Keep this user's other runs out: where several at once make MLflow's SQLite file, none can use it."""
    with Path(tempfile.gettempdir(), f"scalefl-mlflow-{os.getuid()}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class _MLflow:
    """A run on the server that MLflow's environment variables name; its id is kept in the run's folder.

    What a server has can't be taken back. So what it has is looked up and not written again: rounds that were done
    again after a kill gave the same.
    """

    @_hurry()
    def __init__(self, files: RunFolder) -> None:
        from mlflow import MlflowClient, get_tracking_uri
        from mlflow.entities import Param

        with _alone() if get_tracking_uri().startswith("sqlite") else nullcontext():
            self._client = MlflowClient()
        run = self._kept(files) or self._created(files)
        self._id, self._status = run.info.run_id, run.info.status
        self._has = {
            name: {metric.step for metric in self._client.get_metric_history(self._id, name)}
            for name in run.data.metrics
        }
        params = {name: str(value) for name, value in _settings(files).items() if name not in run.data.params}
        self._client.log_batch(self._id, params=[Param(name, value) for name, value in params.items()])
        self.write(files.read_journal())
        if not files.summary.exists():
            self._mark("RUNNING")

    @_hurry()
    def write(self, lines: Sequence[Line]) -> None:
        self._put([(name, value, line["round"]) for line in lines for name, value in figures(line).items()])

    @_hurry()
    def conclude(self, summary: Mapping[str, Any]) -> None:
        self._put([(name, value, summary["rounds"]) for name, value in _final(summary).items()])
        self._mark("FINISHED")

    @_hurry()
    def stop(self, status: str) -> None:
        self._mark(status)

    def _kept(self, files: RunFolder) -> Any:
        """The run whose id is in the folder; None where there is none, or the server does not have it any more."""
        from mlflow.exceptions import MlflowException

        if not files.mlflow.exists():
            return None
        try:
            run = self._client.get_run(read_json(files.mlflow)["run_id"])
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def _created(self, files: RunFolder) -> Any:
        tags = {f"environment.{name}": str(value) for name, value in _leaves(read_json(files.environment), ".")}
        tags["folder"] = str(files.path.resolve())
        run = self._client.create_run(self._experiment_id(files), tags=tags, run_name=files.read_settings()["name"])
        write_whole(files.mlflow, json.dumps({"run_id": run.info.run_id}).encode())
        return run

    def _experiment_id(self, files: RunFolder) -> str:
        from mlflow.exceptions import MlflowException

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or _experiment(files)
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name))
            except MlflowException:
                found = self._client.get_experiment_by_name(name)
                if found is None:  # else another run of the comparison was faster
                    raise
        return str(found.experiment_id)

    def _put(self, values: Iterable[tuple[str, float, int]]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        # A problem may name its metrics with signs that MLflow refuses.
        legal = ((re.sub(r"[^\w./ -]", "_", name), value, step) for name, value, step in values)
        metrics = [Metric(name, value, now, step) for name, value, step in legal if step not in self._has.get(name, ())]
        self._client.log_batch(self._id, metrics=metrics)

    def _mark(self, status: str) -> None:
        if status == self._status:
            return
        if status == "RUNNING":
            self._client.update_run(self._id, status=status)
        else:
            self._client.set_terminated(self._id, status)
        self._status = status


def _experiment(files: RunFolder) -> str:
    """NAME or NAME/SCENARIO for a run of a comparison, else "scalefl"."""
    folder = files.path.resolve()
    for path in folder.parents[:2]:
        if RunFolder(path).comparison.exists():
            return folder.parent.relative_to(path.parent).as_posix()
    return "scalefl"


def _settings(files: RunFolder) -> dict[str, Any]:
    """The resolved config, by the names that `--set` takes; lists as JSON."""
    leaves = _leaves(files.read_settings(), ".")
    return {name: json.dumps(value) if isinstance(value, list) else value for name, value in leaves}


def _final(summary: Mapping[str, Any]) -> dict[str, float]:
    return _numbers({"summary": summary})


def _numbers(table: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in _leaves(table, "/")
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _leaves(table: Mapping[str, Any], separator: str) -> Iterator[tuple[str, Any]]:
    """What nested tables hold, under the names of all keys on the way."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}{separator}{rest}", leaf) for rest, leaf in _leaves(value, separator))
        else:
            yield key, value
