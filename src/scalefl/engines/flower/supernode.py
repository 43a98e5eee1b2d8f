"""Flower's SuperNode, but it looks for messages and answers as often as it is told to.

Its own pauses are fixed: three seconds where it has found no message, which a round then takes however small it is, and
half a second while one is worked at. Started as `flower-supernode` is.
"""

from __future__ import annotations

import os
import time
from types import SimpleNamespace

from flwr.supernode import start_client_internal
from flwr.supernode.cli.flower_supernode import flower_supernode

from scalefl.engines.flower import LONGEST_PAUSE


def main() -> None:
    """Run until told to end."""
    longest = float(os.environ[LONGEST_PAUSE])
    pauses = SimpleNamespace(sleep=lambda seconds: time.sleep(min(seconds, longest)))
    vars(start_client_internal)["time"] = pauses  # what this one module takes for it
    flower_supernode()


if __name__ == "__main__":
    main()
