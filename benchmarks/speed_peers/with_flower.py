"""FedAvg by Flower's simulation, on Ray with two actors.

    python with_flower.py FOLDER

Each `run` is a whole simulation from the first weights, with the start of Ray and its end. `run_simulation` is
deprecated; `flwr run`, which replaces it, starts a server's processes besides.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from flower_client import TASK
from flower_client import app as client
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from resident import turns
from task import Task

ACTORS = 2


class GivenCohorts(FedAvg):
    """Flower's FedAvg, whose messages also say which user is to be trained."""

    def __init__(self, task: Task) -> None:
        cohort, users = len(task.cohort(0)), len(task.sizes)
        super().__init__(
            fraction_train=cohort / users, fraction_evaluate=0.0, min_train_nodes=cohort, min_available_nodes=users
        )
        self._task = task

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message for each user of the cohort; rounds count from 1."""
        messages = list(super().configure_train(server_round, arrays, config, grid))
        for message, user in zip(messages, self._task.cohort(server_round - 1), strict=True):
            message.content = RecordDict({"arrays": arrays, "config": ConfigRecord({**config, "user": user})})
        return messages


def simulated(task: Task, rounds: int) -> dict[str, torch.Tensor]:
    """The weights after so many rounds."""
    server, found = ServerApp(), {}

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        result = GivenCohorts(task).start(grid=grid, initial_arrays=ArrayRecord(task.start()), num_rounds=rounds)
        found.update(result.arrays.to_torch_state_dict())

    run_simulation(
        server_app=server,
        client_app=client,
        num_supernodes=len(task.sizes),
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": ACTORS, "num_gpus": 0},
        },
    )
    return found


def main(task: Task) -> None:
    torch.set_num_threads(1)
    os.environ[TASK] = str(task.folder.absolute())
    model = task.model()
    for rounds in turns(lambda: task.score(model), "torch", "flwr", "ray"):
        model.load_state_dict(simulated(task, rounds))


if __name__ == "__main__":
    main(Task(Path(sys.argv[1])))
