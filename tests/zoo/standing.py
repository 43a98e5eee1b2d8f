"""Workers for many runs, forked from one process that has imported what the zoo's models need."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping

import pytest

from scalefl.engines import local
from scalefl.engines.fork_server import ForkServer

PRELOADED = """
import sys
import torch
import peft, transformers  # what workers of the zoo need: each would import it by itself
from transformers.models.bert import modeling_bert
from transformers.models.gpt2 import modeling_gpt2
import zoo.models
from scalefl.engines import fork_server
fork_server.main()
"""


class StandingServer(ForkServer):
    """A fork server that has imported what all models of the zoo need, and serves one run after another.

    Workers are forked and work as ever; only their imports, of some seconds each, are done once.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", PRELOADED, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                env=dict(environment),
            )

    def stop(self) -> None:
        """Stay."""

    def end(self) -> None:
        """End it."""
        super().stop()


@contextlib.contextmanager
def standing_server() -> Iterator[None]:
    """Inside the block, engines fork their workers from one process."""
    servers: list[StandingServer] = []

    class Lent:
        @classmethod
        def if_possible(cls, environment: Mapping[str, str]) -> ForkServer | None:
            if sys.platform != "linux":
                return None
            if not servers:
                servers.append(StandingServer(environment))
            return servers[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "ForkServer", Lent)
        try:
            yield
        finally:
            for server in servers:
                server.end()
