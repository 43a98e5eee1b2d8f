"""FedAvg by Flower's own strategy, as its documentation has one write it; the end of each round is noted in a file."""

import json
import time
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from scalefl.models.cnn import cnn

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    settings = context.run_config
    folder = Path(str(settings["folder"]))
    model = cnn(in_channels=1, image_size=28, width=settings["width"])
    model.load_state_dict(torch.load(folder / "start.pt"))

    def note(server_round: int, arrays: ArrayRecord) -> None:
        with (folder / "rounds.jsonl").open("a") as file:
            file.write(json.dumps({"round": server_round, "at": time.time()}) + "\n")

    result = FedAvg(fraction_evaluate=0.0, train_metrics_aggr_fn=slowest).start(
        grid=grid,
        initial_arrays=ArrayRecord(model.state_dict()),
        num_rounds=int(settings["rounds"]),
        train_config=ConfigRecord({key: settings[key] for key in ("batch-size", "lr", "momentum", "weight-decay")}),
        evaluate_fn=note,
    )
    torch.save(result.arrays.to_torch_state_dict(), folder / "end.pt")
    seconds = {number: found["train-seconds"] for number, found in result.train_metrics_clientapp.items()}
    (folder / "seconds.json").write_text(json.dumps(seconds))


def slowest(replies: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    seconds = [record["train-seconds"] for reply in replies for record in reply.metric_records.values()]
    return MetricRecord({"train-seconds": max(seconds)})
