"""Write the works down for all programs: data, splits, cohorts, and first weights, which are ScaleFL's.

    python export.py FOLDER NAME...

Reads $SCALEFL_DATA/cifar10.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import plain
import torch
from works import CHECK, SMALL, WORKS, Work

from scalefl.data import Dataset, Source, load
from scalefl.methods.common import initial_params
from scalefl.models.spec import ModelSpec
from scalefl.problem import Batch
from scalefl.rng import generator


def write(work: Work, data: Dataset, folder: Path) -> None:
    """One work, into a folder of its own."""
    folder.mkdir(parents=True)
    starts = work.starts()
    (image,) = (column.name for column in data.problem.columns)  # type: ignore[attr-defined]
    order = torch.randperm(len(data.train["label"]), generator=generator(0, "users"))[: starts[-1]]
    if len(order) < starts[-1]:
        raise SystemExit(f"work {work.name} takes {starts[-1]} training examples, there are {len(order)}")
    _save(folder, "", image, data.train, order)
    _save(folder, "test_", image, data.test, torch.arange(work.test_examples))
    start = initial_params(ModelSpec.of(work.factory, **dict(work.arguments)), 0)
    _check(work, start)
    torch.save(start, folder / "start.pt")
    fields = ("model", "factory", "arguments", "sizes", "batch_size", "epochs", "lr", "momentum", "firsts")
    settings = {name: getattr(work, name) for name in fields}
    (folder / "task.json").write_text(json.dumps({**settings, "starts": starts, "cohorts": work.cohorts()}))


def _save(folder: Path, prefix: str, image: str, rows: Batch, chosen: torch.Tensor) -> None:
    np.save(folder / f"{prefix}images.npy", rows[image][chosen].numpy())
    np.save(folder / f"{prefix}labels.npy", rows["label"][chosen].numpy())


@torch.no_grad()
def _check(work: Work, start: dict[str, torch.Tensor]) -> None:
    """The plain model and ScaleFL's are the same function."""
    ours, theirs = ModelSpec.of(work.factory, **dict(work.arguments)).build(0), plain.make(work.model)
    ours.load_state_dict(start)
    theirs.load_state_dict(start)
    x = torch.rand(4, 3, 32, 32, generator=generator(0, "check"))
    torch.testing.assert_close(theirs(x), ours(x))


def main() -> None:
    folder, *names = sys.argv[1:]
    data = load(Source(name="$SCALEFL_DATA/cifar10"))
    assert isinstance(data, Dataset)
    for work in (*WORKS, *SMALL, CHECK):
        if work.name in names:
            write(work, data, Path(folder) / work.name)


if __name__ == "__main__":
    main()
