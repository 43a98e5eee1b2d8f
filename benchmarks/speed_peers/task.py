"""A work as it lies on disk, read by every program but ScaleFL's own data classes; and the plain local loop.

Shapes: B examples in a batch, C channels, H×W pixels.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import plain
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Task:
    """The rows of all users one after another, as uint8, mapped from a file; and what is done with them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings: dict[str, Any] = json.loads((folder / "task.json").read_text())
        self.sizes: list[int] = self.settings["sizes"]

    @cached_property
    def images(self) -> Tensor:
        """All users' images, uint8 [N, C, H, W]."""
        return self.mapped("images")

    @cached_property
    def labels(self) -> Tensor:
        """All users' labels, int64 [N]."""
        return self.mapped("labels")

    @cached_property
    def test(self) -> tuple[Tensor, Tensor]:
        """Images and labels to test on."""
        return self.mapped("test_images"), self.mapped("test_labels")

    def mapped(self, name: str) -> Tensor:
        """An array of the task, in memory only as far as it is read."""
        # "c": torch asks for memory that it may write; nothing does.
        return torch.from_numpy(np.load(self.folder / f"{name}.npy", mmap_mode="c"))

    def rows(self, user: int) -> slice:
        """Where a user's rows lie."""
        return slice(*self.settings["starts"][user : user + 2])

    def user(self, user: int) -> tuple[Tensor, Tensor]:
        """A user's images, ready to be trained on, and labels."""
        rows = self.rows(user)
        return normalised(self.images[rows]), self.labels[rows]

    def cohort(self, number: int) -> list[int]:
        """The users of a round; rounds count from 0."""
        cohorts = self.settings["cohorts"]
        return cohorts[number % len(cohorts)]

    def start(self) -> dict[str, Tensor]:
        """The first weights."""
        return torch.load(self.folder / "start.pt", weights_only=True)

    def model(self) -> nn.Module:
        """The plain model with the first weights."""
        model = plain.make(self.settings["model"])
        model.load_state_dict(self.start())
        return model

    def first(self, user: int) -> int:
        """The first of the model's parts that a user trains."""
        firsts = self.settings["firsts"]
        return firsts[user] if firsts else 0

    def freeze(self, model: nn.Module, user: int) -> None:
        """Leave as it is what a user does not train."""
        for number, part in enumerate(model.children()):
            part.requires_grad_(number >= self.first(user))

    def train(self, model: nn.Module, user: int) -> None:
        """What a user does: torch.optim.SGD on shuffled batches."""
        self.freeze(model, user)
        x, y = self.user(user)
        settings = self.settings
        optimizer = torch.optim.SGD(model.parameters(), lr=settings["lr"], momentum=settings["momentum"])
        for _ in range(settings["epochs"]):
            for rows in torch.randperm(len(y)).split(settings["batch_size"]):
                loss = F.cross_entropy(model(x[rows]), y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    @torch.no_grad()
    def score(self, model: nn.Module) -> dict[str, float]:
        """Accuracy and mean loss on the test images."""
        images, labels = self.test
        correct = loss = 0.0
        for x, y in zip(images.split(250), labels.split(250), strict=True):
            logits = model(normalised(x))
            correct += float((logits.argmax(1) == y).sum())
            loss += float(F.cross_entropy(logits, y, reduction="sum"))
        return {"accuracy": correct / len(labels), "loss": loss / len(labels)}


def normalised(x: Tensor) -> Tensor:
    """Bytes to numbers from -1 to 1."""
    return x.float().div_(255).sub_(0.5).div_(0.5)
