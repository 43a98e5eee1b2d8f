"""The protocol of a resident program: orders are lines on stdin, answers are lines of JSON on stdout.

run K       K more rounds; answered with when they began and ended, by the wall clock
accuracy    of the global model; answered with accuracy and loss
quit        so does the end of stdin
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any


def turns(score: Callable[[], dict[str, float]], *packages: str) -> Iterator[int]:
    """Yield how many rounds are asked for, each time they are; what happens until the next is asked for is timed.

    Args:
        score: of the global model as it is then.
        packages: whose versions are told.
    """
    say(ready=True, versions={name: version(name) for name in packages})
    for line in sys.stdin:
        word, *arguments = line.split()
        if word == "quit":
            return
        if word == "accuracy":
            say(**score())
            continue
        start = time.time()
        yield int(arguments[0])
        say(start=start, end=time.time())


def say(**facts: Any) -> None:
    """Answer."""
    print(json.dumps(facts), flush=True)
