"""Settings for all tests."""

from __future__ import annotations

import os

import torch

# The tests' numbers are those of one thread, and other work shares the machine.
torch.set_num_threads(1)

# Tests trace: what an earlier run left on disk must not stand in for it.
os.environ["SCALEFL_CACHE"] = ""
