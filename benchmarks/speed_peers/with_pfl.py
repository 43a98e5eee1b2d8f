"""FedAvg by Apple's pfl-research, in the processes that torchrun starts.

    torchrun --nproc-per-node 2 with_pfl.py FOLDER

As its own benchmarks do it: `FederatedAveraging` in a `SimulatedBackend`, users' data as float32 tensors in memory.
Besides, users are balanced between processes by their numbers of examples, which are their weights too. The server's
step at a rate of 1 is FedAvg's mean. A user's examples come in the same order each time: pfl does not shuffle.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data import FederatedDataset
from pfl.data.dataset import Dataset
from pfl.data.sampling import MinimizeReuseUserSampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.internal.ops import get_ops
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from resident import turns
from task import Task, normalised
from torch import Tensor, nn

NEVER = 2**30


class Learner(nn.Module):
    """The plain model, with the loss and the metrics that pfl asks for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean loss of a batch."""
        return F.cross_entropy(self.model(x), y)

    @torch.no_grad()
    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Weighted]:
        """Asked for before and after each user's training of the first round, and never again."""
        return {"loss": Weighted(float(F.cross_entropy(self.model(x), y, reduction="sum")), len(y))}


class Spans(PyTorchModel):
    """A model of which each user trains what it is to train; what is left as it is counts as a difference of 0."""

    task: Task

    def do_multiple_epochs_of(self, user_dataset: Dataset, *args: Any, **kwargs: Any) -> Any:
        """Freeze, then train as always."""
        self.task.freeze(self.pytorch_model.model, user_dataset.user_id)
        return super().do_multiple_epochs_of(user_dataset, *args, **kwargs)


class Told(TrainingProcessCallback):
    """Has the first process wait for orders between rounds, and the others wait for the first."""

    def __init__(self, orders: Iterator[int] | None) -> None:
        self._orders = orders
        self._left = 0

    def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
        """Wait for the first order."""
        self._wait()
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """Go on, or answer and wait; stop where no order comes."""
        self._left -= 1
        if self._left == 0:
            self._wait()
        return self._left == 0, Metrics()

    def _wait(self) -> None:
        told = torch.tensor([next(self._orders, 0) if self._orders else 0])
        torch.distributed.broadcast(told, 0)
        self._left = int(told)


def federated(task: Task) -> FederatedDataset:
    """Users' tensors in memory, and the given cohorts one after another."""
    images, labels = normalised(task.mapped("images")), task.mapped("labels").clone()
    users = {user: (images[task.rows(user)], labels[task.rows(user)]) for user in range(len(task.sizes))}
    return FederatedDataset(
        lambda user: Dataset(users[user], user_id=user),
        MinimizeReuseUserSampler([user for cohort in task.settings["cohorts"] for user in cohort]),
        user_id_to_weight=dict(enumerate(task.sizes)),
    )


def main(task: Task) -> None:
    torch.set_num_threads(1)
    np.random.seed(0)  # noqa: TID251  (pfl's processes draw from the global generator, and must draw alike)
    plain, settings, is_first = task.model(), task.settings, get_ops().distributed.global_rank == 0
    learner = Learner(plain)
    data = federated(task)
    model = Spans(
        learner,
        local_optimizer_create=lambda parameters, lr: torch.optim.SGD(parameters, lr, momentum=settings["momentum"]),
        central_optimizer=torch.optim.SGD(learner.parameters(), 1.0),
    )
    model.task = task
    orders = turns(lambda: task.score(plain), "torch", "pfl") if is_first else None
    torch.distributed.barrier()
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=NEVER,
            evaluation_frequency=NEVER,
            train_cohort_size=len(task.cohort(0)),
            val_cohort_size=0,
        ),
        SimulatedBackend(data, data, postprocessors=[WeightByDatapoints()]),
        model,
        NNTrainHyperParams(
            local_learning_rate=settings["lr"],
            local_num_epochs=settings["epochs"],
            local_batch_size=settings["batch_size"],
        ),
        NNEvalHyperParams(local_batch_size=None),
        [Told(orders)],
        send_metrics_to_platform=False,
    )


if __name__ == "__main__":
    main(Task(Path(sys.argv[1])))
