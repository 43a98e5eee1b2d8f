"""Flower's SuperNode, but it looks for messages as often as it is told to, and ends where it would hang.

Its own pauses are fixed: three seconds where it has found no message, which a round then takes however small it is, and
half a second while one is worked at. And where it gives its server up, as after a handshake that was broken off, its
main loop ends while the thread that serves its executor keeps the process: nobody would start it again. Started as
`flower-supernode` is.
"""

from __future__ import annotations

import os
import time
import traceback
from types import SimpleNamespace

from flwr.supernode import start_client_internal
from flwr.supernode.cli.flower_supernode import flower_supernode

from scalefl.engines.flower import LONGEST_PAUSE


def main() -> None:
    """Run until told to end, or until there is no use in going on."""
    longest = float(os.environ[LONGEST_PAUSE])
    pauses = SimpleNamespace(sleep=lambda seconds: time.sleep(min(seconds, longest)))
    vars(start_client_internal)["time"] = pauses  # what this one module takes for it
    status = 1
    try:
        flower_supernode()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(status)


if __name__ == "__main__":
    main()
