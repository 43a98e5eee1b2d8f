"""A comparison of this folder in seconds: its last two variants, by the code of the long one.

    python benchmarks/quick.py core --out /tmp/quick

All of it is read and checked. What runs are a few rounds of a few clients, for one seed and in one scenario, on a CNN
of at most four blocks (planning for a ResNet takes longer than to train it here), with budgets of no less than 60 %,
which hold a block of it. Data that the long one takes from $SCALEFL_DATA is replaced by noise. Figures mean nothing:
that they can be made is what is seen. `make bench-core QUICK=1` does this.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np

from scalefl.comparison import load_comparison

ROUNDS, COHORT = 2, 3
MODEL, BLOCKS, LEAST_PERCENT, PLENTY_PERCENT = "cnn", 4, 60, 150
"""The last for budgets that are told in bytes, of another model."""
DATA, SIZES = "$SCALEFL_DATA", {"train": 400, "test": 100}


def shrunk(raw: dict[str, Any]) -> dict[str, Any]:
    """A comparison of two variants, with little for each to do."""
    found = {**raw, "rounds": ROUNDS, "clients_per_round": COHORT, "save_every": 1}
    found["compare"] = {**raw["compare"], "seeds": raw["compare"]["seeds"][:1]}
    found["evaluation"] = {
        name: ROUNDS if name.endswith("every") else value for name, value in raw["evaluation"].items()
    }
    found["variants"] = dict(list(raw["variants"].items())[-2:])
    if "scenarios" in raw:
        found["scenarios"] = dict(list(raw["scenarios"].items())[:1])
    return lightened({**found, "model": MODEL})


def lightened(table: Any) -> Any:
    """The same with blocks and budgets that the light model has, wherever they stand."""
    if isinstance(table, list):
        return [lightened(entry) for entry in table]
    if not isinstance(table, dict):
        return table
    found = {key: lightened(value) for key, value in table.items()}
    if isinstance(found.get("blocks"), int):
        found["blocks"] = min(found["blocks"], BLOCKS)
    if "flops_per_second" in found:
        share, percent, _ = found["memory"].partition("%")
        found["memory"] = f"{max(LEAST_PERCENT, float(share)) if percent else PLENTY_PERCENT:g}%"
    return found


def write_noise(folder: Path) -> None:
    """Images of ten classes, in a folder as a comparison's data source has them."""
    from datasets import ClassLabel, Dataset, Features, Image

    draw = np.random.default_rng(0)
    features = Features({"image": Image(), "label": ClassLabel(num_classes=10)})
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in SIZES.items():
        pixels = draw.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        rows = {"image": list(pixels), "label": draw.integers(0, 10, count).tolist()}
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="of a file of this folder, without its ending")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    whole = Path(__file__).with_name(f"{options.name}.toml")
    text = whole.read_text()
    load_comparison(whole, runs=options.out / "runs")  # all that it says is checked
    options.out.mkdir(parents=True, exist_ok=True)
    config = options.out / f"{options.name}.json"
    config.write_text(json.dumps(shrunk(tomllib.loads(text)), indent=1))
    where = dict(os.environ)
    if DATA in text:
        where[DATA.removeprefix("$")] = str(options.out.absolute() / "data")
        write_noise(options.out / "data" / "cifar10-small")
    folders = ("--runs", str(options.out / "runs"), "--out", str(options.out / options.name))
    done = subprocess.run([sys.executable, "-m", "scalefl.cli", "compare", str(config), *folders], env=where)
    raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
