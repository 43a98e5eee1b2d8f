"""What the local engine costs over a bare PyTorch loop that does the same local steps: interleaved pairs.

    python benchmarks/engine.py --out docs/benchmarks/engine [--quick]

A bare loop holds one model, copies the global weights into it for each client, trains with torch.optim.SGD and
adds the result to a running mean. Both train on the same synthetic CIFAR-shaped clients, one thread each. `scalefl
bench` does the same with fewer clients, in less time; `--quick` with a few, once: its figures mean nothing.
"""

from __future__ import annotations

import argparse
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

from scalefl.bench import WORKLOADS, Federation, Overhead
from scalefl.bookkeeping import environment

CNN, RESNET, _ = WORKLOADS
LONGER = (
    replace(CNN, name="A: two-convolution CNN, 50 clients of 50 examples a round, batch 10", clients=200, compared=50),
    replace(
        RESNET,
        name="B: ResNet-10 (16 channels, GroupNorm), 10 clients of 200 examples a round, batch 32",
        clients=50,
        examples=200,
        compared=10,
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="in seconds, once with few clients: figures mean nothing")
    options = parser.parse_args()
    workloads = LONGER
    if options.quick:
        options.pairs = options.rounds = 1
        workloads = tuple(replace(w, clients=4, examples=32, compared=2) for w in LONGER)
    lines = ["| workload | ScaleFL, s a round | bare loop, s a round | ratio, median | ratio, range |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for workload in workloads:
        with closing(Federation(workload).pairs(workload.compared, options.rounds)) as pairs:
            found = Overhead.of(list(islice(pairs, options.pairs)))
        ours, bare = (seconds / options.rounds for seconds in (found.seconds, found.bare_seconds))
        lines.append(
            f"| {workload.name} | {ours:.2f} | {bare:.2f} | {found.ratio:.3f} | {found.least:.3f}-{found.most:.3f} |"
        )
        print(lines[-1], flush=True)
    about = environment()
    where = f"torch {about['packages']['torch']}, {about['platform']}, one thread, {options.pairs} interleaved pairs"
    note = "\n\n**Quick form: 4 clients of 32 examples. Figures mean nothing.**" if options.quick else ""
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".md").write_text("\n".join(lines) + f"{note}\n\n{where}\n")


if __name__ == "__main__":
    main()
