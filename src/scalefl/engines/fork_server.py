"""Workers forked from one process that has imported what they need: they share its memory, and start in milliseconds.

To import torch takes a process two CPU-seconds and 140 MiB of its own. The engine's process can't be forked instead: it
holds data, and has run OpenMP threads, which a fork cuts off. The one here imports, forks, and does nothing else. Linux
only.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Self

_LONGEST = 4096
_STDERR = 2
"""What users' code prints in workers goes there: the output may be JSON."""


class ForkServer:
    """The process that forks workers. It ends with this one, as they do.

    Args:
        environment: its own, and its workers'.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "scalefl.engines.fork_server", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=_STDERR,
                stderr=subprocess.DEVNULL,
                env=dict(environment),
            )

    @classmethod
    def if_possible(cls, environment: Mapping[str, str]) -> Self | None:
        """None on systems where libraries do not survive a fork, or there is none."""
        return cls(environment) if sys.platform == "linux" else None

    def start(self, arguments: Sequence[str], connection: int, stderr: int) -> Forked:
        """A worker.

        Args:
            arguments: for `worker.main`.
            connection, stderr: descriptors, of which it gets copies.

        Raises:
            OSError: it can't fork, or has ended.
        """
        pid = self._ask({"start": list(arguments)}, connection, stderr)
        return Forked(self, pid)

    def wait(self, pid: int) -> int:
        """See `Forked`."""
        return self._ask({"wait": pid})

    def stop(self) -> None:
        """End it, and leave its workers to themselves."""
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def _ask(self, order: dict[str, Any], *descriptors: int) -> int:
        try:
            socket.send_fds(self._socket, [json.dumps(order).encode()], descriptors)
            told = self._socket.recv(_LONGEST)
        except BaseException:  # interrupted: what comes now must not be taken for the answer to another order
            self._socket.close()
            raise
        answer = json.loads(told) if told else "the fork server has ended"
        if not isinstance(answer, int):
            raise OSError(answer)
        return answer


class Forked:
    """A worker of a fork server, with as much of `subprocess.Popen` as an engine needs."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self._server, self.pid = server, pid
        self._status: int | None = None
        # Not by its number, which is given again when it has ended and its server has, too.
        self._handle = os.pidfd_open(pid)
        weakref.finalize(self, os.close, self._handle)

    def kill(self) -> None:
        """End it, if it lives."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    def wait(self) -> int:
        """Wait until it has ended; its exit status, as `subprocess` counts it.

        Raises:
            OSError: the fork server has ended, and nobody knows.
        """
        if self._status is None:
            self._status = self._server.wait(self.pid)
        return self._status


def serve(orders: socket.socket) -> tuple[list[str], int, int] | None:
    """Fork workers until the other end closes.

    Returns:
        In a worker, its arguments, connection and stderr; in the fork server None, at its end.
    """
    # Objects that no collection looks at are not written to, and stay shared.
    gc.collect()
    gc.freeze()
    while True:
        told, descriptors, _, _ = socket.recv_fds(orders, _LONGEST, 2)
        if not told:
            return None
        order = json.loads(told)
        try:
            if "wait" in order:
                answer: int | str = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
            else:
                answer = os.fork()
                if not answer:
                    return order["start"], *descriptors
        except OSError as error:
            answer = str(error)
        for descriptor in descriptors:
            os.close(descriptor)
        orders.send(json.dumps(answer).encode())


def main() -> None:
    """The fork server; and each of its workers, from its fork on."""
    from scalefl.engines import worker

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the engine's to handle
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # who ignores it, as programs may from their start, can't wait
    with socket.socket(fileno=int(sys.argv[1])) as orders:
        work = serve(orders)
    if work is not None:
        arguments, connection, stderr = work
        os.dup2(stderr, sys.stderr.fileno())
        os.close(stderr)
        worker.main(connection, *arguments)


if __name__ == "__main__":
    main()
