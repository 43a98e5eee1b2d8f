"""Folders of runs and comparisons as `scalefl` leaves them, made up: reports need no more."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scalefl.units import MIB, TERMS

BASE = 300 * MIB


def row(label: str, mib: float) -> dict[str, Any]:
    terms = {"weights": 0.1, "gradients": 0.1, "optimizer": 0.1, "activations": 0.5, "transients": 0.2}
    sizes = {f"{term}_bytes": int(terms.get(term, 0) * mib * MIB) for term in TERMS}
    peak = int(mib * MIB)
    budgets = {"small": 5 * MIB, "large": 12 * MIB}
    fits = {name: {"peak_bytes": peak, "means": ""} for name, budget in budgets.items() if peak <= budget}
    common = {"cut": None, "flops_per_example": mib * 1e6, "bytes_down": MIB, "bytes_up": MIB // 2}
    least = {"peak_bytes": peak // 2, "means": "micro-batch 4"}
    return {"label": label, "peak_bytes": peak, **sizes, **common, "least": least, "fits": fits}


PLAN = {
    "model": "net",
    "batch_size": 8,
    "budgets_bytes": {"small": 5 * MIB, "large": 12 * MIB},
    "full": row("full training", 10),
    "rows": [row("block 1", 4), row("block 2", 6)],
}
SUMMARY = {
    "name": "a",
    "rounds": 2,
    "test": {"loss": 1.0, "accuracy": 0.5},
    "low_memory_test": {"loss": 1.0, "accuracy": 0.25},
    "validation": {"accuracy": 0.75},
    "full_training_peak_bytes": 10 * MIB,
    "predicted_peak_bytes": 6 * MIB,
    "num_clients": 8,
    "num_clients_seen": 5,
    "num_clients_lost": 1,
    "flops": 2.5e12,
    "bytes_down": 3 * MIB,
    "bytes_up": 2 * MIB,
    "simulated_seconds": 1234.5,
    "seconds": 4.25,
}


def point(cut: str, x: float, y: float) -> dict[str, Any]:
    return {"cut": cut, "num_samples": 64, "x": x, "y": y, "x_permuted": 0.1, "y_permuted": 0.1}


def line(number: int, accuracy: float, plane: bool = True) -> dict[str, Any]:
    common = {"train": {"loss": 1.0}, "bytes_down": MIB, "bytes_up": MIB} if number else {}
    points = {"plane": [point("a", 0.5 + number / 10, 0.4), point("b", 0.6, 0.3 + number / 10)]} if plane else {}
    return {"round": number, "validation": {"accuracy": accuracy}, **common, **points}


def write_run(folder: Path, name: str = "a", *, finished: bool = True, version: int = 1) -> Path:
    folder.mkdir(parents=True)
    config = {"name": name, "rounds": 2, "method": {"name": "sbt"}}
    head = {"format": "scalefl-run", "version": version, "config": config}
    (folder / "config.json").write_text(json.dumps(head))
    (folder / "plan.json").write_text(json.dumps(PLAN))
    (folder / "environment.json").write_text(json.dumps({"base_bytes": BASE}))
    journal = [line(0, 0.1), line(1, 0.5, plane=False), line(2, 0.75)][: 3 if finished else 2]
    (folder / "journal.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in journal))
    if finished:
        (folder / "summary.json").write_text(json.dumps({**SUMMARY, "name": name}))
    return folder


def write_comparison(
    folder: Path,
    variants: Sequence[str] = ("fedavg", "scalefl"),
    scenarios: Sequence[str] = ("",),
    seeds: Sequence[int] = (0, 1, 2),
    *,
    rounds: int = 12,
    unfinished: Sequence[tuple[str, str, int]] = (),
) -> Path:
    """A comparison whose runs learn at different speeds; those `unfinished` (scenario, variant, seed) are not there."""
    folder.mkdir(parents=True)
    settings = {"seeds": seeds, "target_accuracy": None, "validation_only": False}
    head = {"name": folder.name, "settings": settings, "scenarios": scenarios, "variants": variants}
    (folder / "comparison.json").write_text(json.dumps(head))
    for i, scenario in enumerate(scenarios):
        for j, variant in enumerate(variants):
            for seed in seeds:
                if (scenario, variant, seed) not in unfinished:
                    speed = (1 + j) * (1 + 0.1 * math.sin(7 * seed + j)) / (2 + i)
                    _write_member(folder / scenario / f"{variant}-{seed}", speed, 0.9 - 0.3 * i, rounds)
    return folder


def _write_member(folder: Path, speed: float, budget: float, rounds: int) -> None:
    """A finished run of a comparison: the faster it learns, the more it spends."""
    write_run(folder, folder.name)
    reached = [0.1 + 0.8 * (1 - math.exp(-speed * number / rounds)) for number in range(rounds + 1)]
    spent = {"flops": 1e11 * speed, "bytes_down": MIB, "bytes_up": MIB // 2, "simulated_seconds": 3.5 + speed}
    journal = [
        {"round": number, "validation": {"accuracy": accuracy}, **(spent if number else {})}
        for number, accuracy in enumerate(reached)
    ]
    (folder / "journal.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in journal))
    accuracies = {
        "test": {"accuracy": reached[-1] - 0.01},
        "low_memory_test": {"accuracy": reached[-1] - 0.05},
        "client_test": {"accuracy_p10": reached[-1] - 0.1},
        "validation": {"accuracy": reached[-1]},
    }
    sums = {key: rounds * value for key, value in spent.items()}
    more = {"measured_peak_bytes": 5 * MIB, "mean_budget": budget}
    (folder / "summary.json").write_text(json.dumps({**SUMMARY, **accuracies, **sums, **more}))
