"""The same from Python: a model of your own, data of your own, and the round loop in your hands."""

import itertools

import torch
from torch import nn

import scalefl


def make_model() -> nn.Module:
    """Any nn.Module, unchanged: ScaleFL finds where to cut it."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )


def main() -> None:
    print(scalefl.plan(make_model, torch.zeros(2, 1, 28, 28), budget="16MiB", blocks=3))

    config = scalefl.load_config("examples/demo.toml", ["rounds=10", "engine.workers=0"])
    experiment = scalefl.Experiment(config)
    method = scalefl.ScaleFL(work=scalefl.LocalWork(epochs=2), blocks=3)
    model = scalefl.ModelSpec.of(make_model)
    state = method.init(model, experiment.problem, seed=0, smallest_memory_bytes=0)
    with scalefl.LocalEngine(experiment.data, experiment.population) as engine:
        rounds = scalefl.federate(method, engine, scalefl.UniformSampler(8), state)
        for state, record in itertools.islice(rounds, 10):  # noqa: B007  (the last state is used below)
            print(record.round, record.stage, record.train)
    _, params = method.deploy(state)
    make_model().load_state_dict(params)


if __name__ == "__main__":
    main()
