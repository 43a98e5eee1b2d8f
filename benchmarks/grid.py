"""Run a grid of variants × seeds, as many side by side as asked, and write one table.

    python benchmarks/grid.py benchmarks/accuracy.toml --out docs/benchmarks/accuracy

A grid file is a run's config with a table `[grid]` (seeds; `validation_only` leaves test figures out) and tables
`[variants.NAME]` of settings that replace the config's own. Runs land in runs/GRID/VARIANT-SEED; finished ones are not
run again, broken ones are resumed.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scalefl.config import make_config, to_plain
from scalefl.run_folder import RunFolder

TEST = ("test", "low_memory_test")
COLUMNS = ("test", "low_memory_test", "validation", "best_validation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("grid", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="where the table goes: OUT.md and OUT.csv")
    parser.add_argument("--parallel", type=int, default=os.cpu_count(), help="runs side by side")
    parser.add_argument("--only", nargs="*", help="variants to run")
    options = parser.parse_args()

    raw = tomllib.loads(options.grid.read_text())
    grid, variants = raw.pop("grid"), raw.pop("variants")
    names = options.only or list(variants)
    jobs = [(name, seed) for seed in grid["seeds"] for name in names]
    folder = Path("runs") / options.grid.stem
    with ThreadPoolExecutor(options.parallel) as pool:
        list(pool.map(lambda job: run_one(raw, variants[job[0]], folder, *job), jobs))
    hidden = TEST if grid.get("validation_only") else ()
    rows = [row(folder, name, grid["seeds"], hidden) for name in names]
    write_csv(options.out.with_suffix(".csv"), folder, names, grid["seeds"], hidden)
    options.out.with_suffix(".md").write_text(table(rows))
    print(table(rows))


def run_one(base: dict, changes: dict, folder: Path, variant: str, seed: int) -> None:
    """One run in a process of its own."""
    target = folder / f"{variant}-{seed}"
    if RunFolder(target).summary.exists():
        return
    config = make_config({**base, **changes, "name": target.name, "seed": seed})
    target.parent.mkdir(parents=True, exist_ok=True)
    path = folder / f"{target.name}.json"
    path.write_text(json.dumps({"config": to_plain(config)}))
    start = time.perf_counter()
    command = [sys.executable, "-m", "scalefl.cli", "run", str(path), "--runs", str(folder), "--resume"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    path.unlink()
    if done.returncode:
        print(f"{target}: failed\n{done.stderr}", file=sys.stderr)
    else:
        print(f"{target}: {time.perf_counter() - start:.0f} s", flush=True)


def figures(folder: Path, name: str, seed: int, hidden: tuple[str, ...]) -> dict | None:
    """What one run came to."""
    files = RunFolder(folder / f"{name}-{seed}")
    if not files.summary.exists():
        return None
    summary = json.loads(files.summary.read_text())
    curve = [line["validation"]["accuracy"] for line in files.read_journal() if "validation" in line]
    return {
        **{key: summary[key]["accuracy"] for key in COLUMNS[:3] if key not in hidden},
        "best_validation": max(curve),
        "validation_loss": summary["validation"]["loss"],
        "clients": summary["num_clients_seen"],
        "peak_mib": summary["predicted_peak_bytes"] / 2**20,
        "tflop": summary["flops"] / 1e12,
        "down_mb": summary["bytes_down"] / 1e6,
        "up_mb": summary["bytes_up"] / 1e6,
        "seconds": summary["seconds"],
        "device_seconds": summary["simulated_seconds"],
    }


def row(folder: Path, name: str, seeds: list[int], hidden: tuple[str, ...]) -> dict[str, str]:
    runs = [found for seed in seeds if (found := figures(folder, name, seed, hidden))]
    cells = {"variant": name, "seeds": str(len(runs))}
    for key in runs[0] if runs else ():
        values = [run[key] for run in runs]
        mean, spread = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        cells[key] = f"{100 * mean:.1f} ± {100 * spread:.1f}" if key in COLUMNS else f"{mean:.4g}"
    return cells


def table(rows: list[dict[str, str]]) -> str:
    names = list(max(rows, key=len))
    lines = [names, ["---"] * len(names), *([r.get(n, "") for n in names] for r in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_csv(path: Path, folder: Path, names: list[str], seeds: list[int], hidden: tuple[str, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    found = [(n, s, f) for n in names for s in seeds if (f := figures(folder, n, s, hidden))]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["variant", "seed", *found[0][2]])
        writer.writerows([n, s, *(f"{v:.6g}" for v in f.values())] for n, s, f in found)


if __name__ == "__main__":
    main()
