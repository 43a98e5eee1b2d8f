"""FedAvg without a framework: two processes, each with every other user of a cohort, and one all-reduce a round.

    python bare.py FOLDER

The practical limit: all parameters are views of one vector, so that copying, summing and reducing take one call each.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from resident import turns
from task import Task

PROCESSES = 2


class Loop:
    """One of the processes."""

    def __init__(self, task: Task, rank: int) -> None:
        self.task, self.rank, self.round = task, rank, 0
        self.model = task.model()
        parameters = list(self.model.parameters())
        self._own = torch.cat([p.detach().flatten() for p in parameters])
        for p, piece in zip(parameters, self._own.split([p.numel() for p in parameters]), strict=True):
            p.data = piece.view_as(p)
        self._weights, self._total = self._own.clone(), torch.zeros_like(self._own)

    def run(self, rounds: int) -> None:
        """Rounds, all processes together."""
        for _ in range(rounds):
            cohort = self.task.cohort(self.round)
            examples = sum(self.task.sizes[user] for user in cohort)
            self._total.zero_()
            for user in cohort[self.rank :: PROCESSES]:
                self._own.copy_(self._weights)
                self.task.train(self.model, user)
                self._total.add_(self._own, alpha=self.task.sizes[user] / examples)
            dist.all_reduce(self._total)
            self._weights.copy_(self._total)
            self.round += 1

    def score(self) -> dict[str, float]:
        """Of the global model."""
        self._own.copy_(self._weights)
        return self.task.score(self.model)


def join(meeting: str, rank: int) -> None:
    """Meet the other process, by way of a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=PROCESSES)


def agreed(rounds: int) -> int:
    """What the first process says."""
    told = torch.tensor([rounds])
    dist.broadcast(told, 0)
    return int(told)


def first(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        meeting = str(Path(place) / "meeting")
        others = [
            subprocess.Popen([sys.executable, __file__, str(folder), meeting, str(rank)], stdin=subprocess.DEVNULL)
            for rank in range(1, PROCESSES)
        ]
        join(meeting, 0)
        loop = Loop(Task(folder), 0)
        dist.barrier()
        for rounds in turns(loop.score, "torch"):
            loop.run(agreed(rounds))
        agreed(0)
        for other in others:
            other.wait()


def other(folder: Path, meeting: str, rank: int) -> None:
    join(meeting, rank)
    loop = Loop(Task(folder), rank)
    dist.barrier()
    while rounds := agreed(0):
        loop.run(rounds)


if __name__ == "__main__":
    folder, *place = sys.argv[1:]
    other(Path(folder), place[0], int(place[1])) if place else first(Path(folder))
