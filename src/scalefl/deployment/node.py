"""A node of a deployment: Flower's SuperNode, and beside it the process that holds the data and does the tasks."""

from __future__ import annotations

import math
import os
import platform
import secrets
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from scalefl.data import Dataset, Source, load, parse_bytes
from scalefl.deployment.address import Address
from scalefl.deployment.layout import AUTO, NodeFolder, NodeSettings
from scalefl.deployment.programs import Program, Say, free_port, wait_for
from scalefl.deployment.reach import Watch
from scalefl.engines.codec import Allowed
from scalefl.engines.flower import LONGEST_PAUSE, SUPERNODE
from scalefl.engines.flower.executor import Executor
from scalefl.engines.local import LocalEngine
from scalefl.engines.node import Node, TensorCache
from scalefl.errors import ConfigError, DataError
from scalefl.measure import spare_bytes, usable_bytes
from scalefl.params import bytes_of
from scalefl.problem import Batch, Problem, num_rows, take
from scalefl.run_folder import locked
from scalefl.types import ClientInfo
from scalefl.units import mib

_RESTART_SECONDS, _POLL_SECONDS = 5.0, 0.1
_LONGEST_RESTART_SECONDS = 40.0
_CAUSES = {
    "[code: 2004]": "the server does not know this node's key; or it takes the node to be connected still, as it does "
    "for a minute after one was killed",
}
"""What Flower's program says when it gives up though it has reached its server, and what that means."""
_PIECE_BYTES = 8 * 2**20
"""An automatic budget is a multiple of it: otherwise no two plans would be alike."""


class Own:
    """What one client has: its examples and its budget, as data and as a population of one."""

    num_clients = 1

    def __init__(self, settings: NodeSettings, problem: Problem, rows: Batch) -> None:
        self._settings, self._rows = settings, rows
        self.problem = problem
        self.validation: Batch = {}
        self.test: Batch = {}
        self._budget = 0

    def describe(self) -> ClientInfo:
        """What it offers now: what is promised here is what its next task may take."""
        budget = self._settings.budget
        self._budget = parse_bytes(budget) if budget != AUTO else spare_bytes() // _PIECE_BYTES * _PIECE_BYTES
        return self._info(usable_bytes(self._budget))

    def __getitem__(self, index: int) -> ClientInfo:
        return self._info(self._budget)

    def __len__(self) -> int:
        return 1

    @property
    def smallest_memory_bytes(self) -> int:
        """Its budget."""
        return self._budget

    @property
    def largest_memory_bytes(self) -> int:
        """Its budget."""
        return self._budget

    def num_examples(self, client: int) -> int:
        """Its rows."""
        return num_rows(self._rows)

    def label_counts(self, client: int) -> Tensor:
        """Its rows for each class: [K]."""
        return torch.bincount(self.problem.labels(self._rows), minlength=self.problem.num_classes)

    def examples(self, client: int) -> Batch:
        """Its rows."""
        return self._rows

    def take_over(self, problem: Problem) -> None:
        """Take the server's word for what is learned: how images are normalised has to be the same everywhere.

        Raises:
            ValueError: this data is about something else.
        """
        mine, theirs = _described(self.problem), _described(problem)
        if mine != theirs:
            raise ValueError(f"the run is about {theirs}, this node's data about {mine}")
        highest = int(problem.labels(self._rows).max())
        if highest >= problem.num_classes:
            raise ValueError(f"the run tells {problem.num_classes} classes apart, this node has labels up to {highest}")
        self.problem = problem

    def _info(self, memory_bytes: int) -> ClientInfo:
        settings = self._settings
        counts = self.label_counts(0)
        return ClientInfo(
            settings.client,
            num_rows(self._rows),
            memory_bytes,
            settings.name,
            classes=tuple(counts.nonzero().flatten().tolist()),
        )


def run_node(folder: NodeFolder, settings: NodeSettings, watch: Watch, say: Say) -> None:
    """Serve as a node until interrupted; leave nothing running. The watch tells whether its server is there.

    Raises:
        ConfigError, DataError: the settings are wrong, or the data cannot be read.
        CheckpointError: the node runs already.
        ProgramFailed: the SuperNode does not start.
    """
    if settings.data is None:
        raise ConfigError(f"{settings.name} has no data: give --data, or a [data] table in {folder.settings_file}")
    with locked(folder.path):
        _serve(folder, settings, settings.data, watch, say)


def _serve(folder: NodeFolder, settings: NodeSettings, source: Source, watch: Watch, say: Say) -> None:
    say(f"reading {source.name}")
    own = Own(settings, *_rows(source, settings, folder))
    folder.flower.mkdir(mode=0o700, exist_ok=True)
    secret, port = secrets.token_bytes(32), free_port()
    secret_file = folder.flower / "secret"
    secret_file.unlink(missing_ok=True)
    with os.fdopen(os.open(secret_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secret)
    with LocalEngine(own, own, workers=1, threads=settings.threads, cap="hard") as engine:

        def engine_for(problem: Problem) -> LocalEngine:
            own.take_over(problem)
            return engine

        cache = TensorCache(folder.cache, parse_bytes(settings.cache))
        node = Node(settings.client, engine_for, own.describe, cache, Allowed(settings.allow), hardware())
        offer = own.describe()
        if not offer.memory_bytes:
            raise ConfigError(
                f"a budget of {mib(own.largest_memory_bytes)} MiB leaves nothing to plan with: 3 % of it, or 4 MiB if "
                "that is more, go to what no plan knows"
            )
        say(f"{settings.name}: {offer.num_examples} examples, budget {mib(own.largest_memory_bytes)} MiB")
        with (
            closing(_Supervised(folder, settings, secret_file, port, watch, say)) as flower,
            closing(Executor(f"127.0.0.1:{port}", secret, node.answer)) as executor,
        ):
            while True:
                flower.look()
                if not executor.step():
                    time.sleep(_POLL_SECONDS)


class _Supervised:
    """A SuperNode that is started again when it ends."""

    def __init__(
        self, folder: NodeFolder, settings: NodeSettings, secret_file: Path, port: int, watch: Watch, say: Say
    ) -> None:
        self._arguments = (
            *("--superlink", str(settings.address())),
            *("--root-certificates", str(folder.authority)),
            *("--auth-supernode-private-key", str(folder.key)),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--isolation", "process", "--superexec-auth-secret-file", str(secret_file)),
        )
        self._pause = {LONGEST_PAUSE: str(settings.poll_seconds)}
        self._folder, self._watch, self._say = folder, watch, say
        self._for_want_of_server = False
        self._log = folder.flower / "supernode.log"
        self._wait, self._again = _RESTART_SECONDS, 0.0
        self._start()
        wait_for(Address("127.0.0.1", port), self._program)

    def look(self) -> None:
        """Start it again if it has ended, after a while that grows: its server may take the old one to be there."""
        if self._program.ended is None:
            return
        now, cause = time.monotonic(), self._watch.cause
        if cause is None:
            return
        if not self._again:
            if now > self._begun + _LONGEST_RESTART_SECONDS:  # it was well until now
                self._wait = _RESTART_SECONDS
            self._for_want_of_server = bool(cause)
            if not cause:  # otherwise the watch has said it, and says when that is over
                self._say(f"the SuperNode ended ({self._cause()}); it is started again in {self._wait:.0f} seconds")
            self._again = now + self._wait
            self._wait = min(2 * self._wait, _LONGEST_RESTART_SECONDS)
        if self._for_want_of_server and not cause:
            self._again, self._wait = now, _RESTART_SECONDS
        if now >= self._again:
            self._again = 0.0
            self._start()

    def close(self) -> None:
        """Stop it."""
        self._program.stop()

    def _start(self) -> None:
        self._begun = time.monotonic()
        self._program = Program(
            self._say, SUPERNODE, *self._arguments, home=self._folder.flower, log=self._log, more=self._pause
        )

    def _cause(self) -> str:
        found = [meaning for sign, meaning in _CAUSES.items() if sign in self._program.said]
        return "; ".join(found) or self._program.obituary


def hardware() -> str:
    """What this machine is, in words."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{platform.machine()}, {os.cpu_count()} cores, {mib(memory)} MiB, torch {torch.__version__}"


def _rows(source: Source, settings: NodeSettings, folder: NodeFolder) -> tuple[Problem, Batch]:
    """The node's examples, mapped from a file without a name.

    Read by a process of its own: what decoding takes, several times the rows, is gone when that ends.
    """
    with tempfile.TemporaryDirectory(prefix=".rows-", dir=folder.path) as place:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            problem, heads = pool.submit(_read, source, settings, place).result()
        rows = {
            name: torch.from_file(f"{place}/{i}", size=math.prod(shape), dtype=dtype).view(shape)
            for i, (name, (shape, dtype)) in enumerate(heads.items())
        }
    return problem, rows


_Heads = dict[str, tuple[tuple[int, ...], torch.dtype]]


def _read(source: Source, settings: NodeSettings, place: str) -> tuple[Problem, _Heads]:
    """Write the columns of the node's examples into numbered files; what they are."""
    loaded = load(source, held_out=False)
    rows = loaded.train if isinstance(loaded, Dataset) else loaded.examples(settings.client)
    first, count = settings.part()
    chosen = torch.arange(first, num_rows(rows), count)
    if not len(chosen):
        raise DataError(f"{source.name} has {num_rows(rows)} rows: nothing is left for the share {settings.share}")
    columns = take(rows, chosen)
    for i, column in enumerate(columns.values()):
        Path(place, str(i)).write_bytes(bytes_of(column.contiguous()))
    return loaded.problem, {name: (tuple(column.shape), column.dtype) for name, column in columns.items()}


def _described(problem: Problem) -> str:
    """The columns of a problem: their names, shapes and kinds."""
    columns = problem.example(1).items()
    return ", ".join(f"{name} {list(t.shape[1:])} {str(t.dtype).removeprefix('torch.')}" for name, t in columns)
