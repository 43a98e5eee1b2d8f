"""The same from Python: a model of your own, data of your own, and the round loop in your hands."""

import itertools

import numpy as np
import torch
from torch import nn

import scalefl
from scalefl.data import Dirichlet, MemoryClass


def make_data() -> scalefl.PartitionedData:
    """Any arrays: here drawings of stripes in ten directions, on 40 clients that see few directions each.

    For a config the same function would return the `Dataset`: source = { name = "my_module:make_data" }.
    """
    draw = np.random.default_rng(0)
    label = draw.integers(0, 10, 3000)
    angle, phase = np.pi * label / 10, draw.uniform(0, 2 * np.pi, len(label))
    y, x = np.mgrid[:28, :28]
    waves = np.cos(0.8 * (np.cos(angle)[:, None, None] * x + np.sin(angle)[:, None, None] * y) + phase[:, None, None])
    image = (128 + 60 * waves + draw.normal(0, 20, waves.shape)).clip(0, 255).astype(np.uint8)[:, None]
    problem = scalefl.Classification(10, (scalefl.Column("image", (1, 28, 28), "uint8"),))
    train, test = {"image": image[:2500], "label": label[:2500]}, {"image": image[2500:], "label": label[2500:]}
    return scalefl.PartitionedData.from_dataset(
        scalefl.Dataset(problem, train, test), Dirichlet(alpha=0.3), 40, groups=[0] * 40, seed=0
    )


def make_model() -> nn.Module:
    """Any nn.Module, unchanged: ScaleFL finds where to cut it."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )


def main() -> None:
    print(scalefl.plan(make_model, torch.zeros(2, 1, 28, 28), budget="3MiB", blocks=3))

    data = make_data()
    devices = scalefl.Devices(classes=(device("phone", 0.7, "3MiB"), device("laptop", 0.3, "1GiB")))
    population = scalefl.SimulatedPopulation(data, devices, full_training_bytes=1, seed=0)  # no budget is a share of it
    method = scalefl.ScaleFL(work=scalefl.LocalWork(epochs=2), blocks=3)
    model = scalefl.ModelSpec.of(make_model)
    state = method.init(model, data.problem, seed=0, smallest_memory_bytes=population.smallest_memory_bytes)
    with scalefl.LocalEngine(data, population) as engine:
        rounds = scalefl.federate(method, engine, scalefl.UniformSampler(8), state)
        for state, record in itertools.islice(rounds, 10):  # noqa: B007  (the last state is used below)
            print(record.round, record.stage, record.train)
    _, params = method.deploy(state)
    trained = make_model().eval()
    trained.load_state_dict(params)
    (x,), _ = data.problem.inputs(data.test)
    accuracy = (trained(x).argmax(1) == data.test["label"]).float().mean()
    print(f"test accuracy {accuracy:.2f}")


def device(name: str, share: float, memory: str) -> MemoryClass:
    return MemoryClass(name=name, share=share, memory=memory, flops_per_second=1e10, bandwidth_bytes_per_second=1e6)


if __name__ == "__main__":
    main()
