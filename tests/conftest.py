"""Settings for all tests."""

from __future__ import annotations

import torch

# The tests' numbers are those of one thread, and other work shares the machine.
torch.set_num_threads(1)
