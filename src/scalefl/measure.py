"""Measured memory of this machine, to be read beside what is predicted. Needs no torch, so that reports can use it."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

# A program of its own, since a process that has planned a step, as ours may have, holds more than a worker does:
# tracing imports torch's compiler. So its one step is made by hand.
_FIRST_TASK = """
import torch, scalefl.engines.worker
from scalefl.client import Residents, run_task
from scalefl.measure import resident_bytes
from scalefl.methods.common import initial_params
from scalefl.methods.fedavg import FedAvg
from scalefl.models.spec import ModelSpec
from scalefl.parts import Part
from scalefl.problem import Classification, Column
from scalefl.types import ClientTask, LocalWork, Step

torch.set_num_threads(1)
problem = Classification(2, (Column("x", (3, 16, 16), "float32"),))
model = ModelSpec.of("scalefl.models.resnet:resnet10", num_classes=2, width=0.0625)
params = initial_params(model, 0)
part = Part(model, stop=None, output=None, feature=None, source=None, active=("",), held=tuple(params))
trained = frozenset(name for name, t in params.items() if name.endswith(("weight", "bias")))
task = ClientTask(0, 0, (Step(part, trained, trained, (), LocalWork(batch_size=4)),), 0)
run_task(FedAvg(), problem, Residents(), task, params, problem.example(4))
print(resident_bytes())
"""


@functools.cache
def base_bytes() -> int | None:
    """Resident bytes of a worker that has done its first task: what a budget comes on top of.

    Measured in a fresh process with a worker's imports, on a tiny ResNet; once in each process that asks, as it takes
    seconds. None where the system does not tell (there is no /proc) or the measuring process fails.
    """
    if not Path("/proc/self/statm").exists():
        return None
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
    command = [sys.executable, "-c", _FIRST_TASK]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 else None


def resident_bytes(pid: int | None = None) -> int:
    """Bytes of memory that a process holds, this one by default; Linux only."""
    pages = Path(f"/proc/{pid or 'self'}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
