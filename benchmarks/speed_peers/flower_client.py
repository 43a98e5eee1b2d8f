"""What Flower's actors run: a client of FedAvg, as Flower's documentation has one write it."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import plain
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from task import Task

TASK = "SPEED_TASK"
"""Names the folder of the task, in the environment that actors inherit."""

app = ClientApp()


@cache
def task() -> Task:
    """Opened once in each actor."""
    torch.set_num_threads(1)
    return Task(Path(os.environ[TASK]))


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the user that the server names: nodes are all alike, and the cohort is given."""
    user = int(message.content["config"]["user"])
    model = plain.make(task().settings["model"])
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    task().train(model, user)
    metrics = MetricRecord({"num-examples": task().sizes[user]})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)
