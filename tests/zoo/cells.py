"""The cells of the zoo's matrix: a model, what of it is trained, and a method; and what each has to come to."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from zoo import models
from zoo.models import VARIANTS, ZOO

METHODS = ("fedavg", "scalefl", "scalefl-paper", "fedepth", "depthfl")

PASSES, WRONG = "passes", "wrong"

CONFIG = """
name = "{name}"
model = "zoo.models:{model}"
model_arguments = {{ variant = "{variant}" }}
rounds = {rounds}
clients_per_round = 4

[data]
source = {{ name = "zoo.data:{data}", arguments = {{ {arguments} }} }}
clients = 4
validation = 0.2

[method]
name = "{method}"
{settings}

[work]
batch_size = 8
lr = 0.05

[engine]
workers = {workers}
threads = 1
clients_at_once = 1

[evaluation]
plane_samples = 12
plane_cuts = 2

[[devices.classes]]
name = "weak"
share = 0.5
memory = "45%"
flops_per_second = 1e9
bandwidth_bytes_per_second = 1e6

[[devices.classes]]
name = "strong"
share = 0.5
memory = "200%"
flops_per_second = 4e9
bandwidth_bytes_per_second = 1e6
"""


@dataclass(frozen=True)
class Cell:
    """A cell's place."""

    model: str
    variant: str
    method: str

    def __str__(self) -> str:
        return f"{self.model}-{self.variant.replace(' ', '_')}-{self.method}"

    def config(self, folder: Path, *, name: str = "run", rounds: int = 2, workers: int = 0) -> Path:
        """A file with the run's config, as a user writes it."""
        entry = ZOO[self.model]
        words = {True: "true", False: "false"}
        text = CONFIG.format(
            name=name,
            model=self.model,
            variant=self.variant,
            data=entry.data,
            arguments=", ".join(f"{key} = {words.get(value, value)}" for key, value in entry.arguments),
            method=self.method,
            settings="" if self.method == "fedavg" else "blocks = 2",
            rounds=rounds,
            workers=workers,
        )
        path = folder / f"{name}-{workers}.toml"
        path.write_text(text)
        return path

    def fresh(self) -> nn.Module:
        """The user's own model, made anew."""
        module: nn.Module = getattr(models, self.model)(self.variant)
        return module


CELLS = [Cell(*place) for place in itertools.product(ZOO, VARIANTS, METHODS)]

# What is expected of cells that do not pass: the pattern of a refusal.
# ScaleFL's paper mode, FeDepth and DepthFL put classifiers behind blocks, which answer with one label for an example.
ONE_LABEL = r"one label for each example"
SEVERAL_LABELS = ("unet", "per_pixel")
REFUSED: Mapping[tuple[str, str, str], str] = {
    (model, variant, method): ONE_LABEL
    for model in SEVERAL_LABELS
    for variant in VARIANTS
    for method in ("scalefl-paper", "fedepth", "depthfl")
}


def refusal(cell: Cell) -> str | None:
    """The pattern of the refusal that a cell has to come to; None where it has to pass."""
    return REFUSED.get((cell.model, cell.variant, cell.method))


@dataclass(frozen=True)
class Result:
    """What a cell came to.

    Args:
        said: `PASSES`, `WRONG`, or the refusal.
        units: the pieces between the model's cuts; 0 where it has none.
    """

    said: str
    units: int
