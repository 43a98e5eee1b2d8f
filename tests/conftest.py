"""Settings for all tests."""

from __future__ import annotations

import os

import torch
from hypothesis import settings

# The tests' numbers are those of one thread, and other work shares the machine.
torch.set_num_threads(1)

# Tests trace: what an earlier run left on disk must not stand in for it.
os.environ["SCALEFL_CACHE"] = ""

# The same examples each time; `make test-full` looks for new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")
