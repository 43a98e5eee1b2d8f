"""The paper's diagnosis from the runs of a grid: what block 1 keeps of the input, variant by variant.

    python benchmarks/plane.py runs/accuracy sbt scalefl-paper --rounds 0 20 80 --out docs/benchmarks/plane.md

Values are nHSIC less its permuted baseline: what the biased estimator would give for nothing is taken off.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from scalefl.run_folder import RunFolder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("variants", nargs="+")
    parser.add_argument("--rounds", type=int, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    lines = ["| variant | cut | value | " + " | ".join(f"round {r}" for r in options.rounds) + " |"]
    lines.append("| --- " * (3 + len(options.rounds)) + "|")
    for variant in options.variants:
        runs = sorted(options.folder.glob(f"{variant}-[0-9]*/"))
        journals = [RunFolder(run).read_journal() for run in runs]
        for number, cut in enumerate(point["cut"] for point in journals[0][0]["plane"]):
            for axis, name in (("x", "nHSIC(X; Z)"), ("y", "nHSIC(Y; Z)")):
                cells = [cell(journals, number, axis, round) for round in options.rounds]
                lines.append(f"| {variant} | {cut} | {name} | " + " | ".join(cells) + " |")
    options.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def cell(journals: list[list[dict]], number: int, axis: str, round: int) -> str:
    points = [line["plane"][number] for journal in journals for line in journal if line["round"] == round]
    values = [point[axis] - point[f"{axis}_permuted"] for point in points]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {spread:.3f}"


if __name__ == "__main__":
    main()
