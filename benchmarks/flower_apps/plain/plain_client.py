"""A client of FedAvg, as Flower's documentation has one write it; its rows are ready to be trained on."""

import time

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch.utils.data import DataLoader, TensorDataset

from scalefl.models.cnn import cnn

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    torch.set_num_threads(1)
    config = message.content["config"]
    model = cnn(in_channels=1, image_size=28, width=context.run_config["width"])
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    rows = TensorDataset(*torch.load(context.node_config["rows"]))
    loader = DataLoader(rows, batch_size=config["batch-size"], shuffle=True)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config["lr"], momentum=config["momentum"], weight_decay=config["weight-decay"]
    )
    start = time.perf_counter()
    model.train()
    for x, y in loader:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    metrics = MetricRecord({"num-examples": len(rows), "train-seconds": time.perf_counter() - start})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)
