"""Tables of what `scalefl bench` has measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from scalefl.report.tables import NOTHING, Table
from scalefl.units import digits, duration


def machine_table(found: Mapping[str, Any]) -> Table:
    """How fast a machine trains.

    Args:
        found: what the command prints as JSON.
    """
    workloads, environment = found["workloads"], found["environment"]
    rounds = _counts(workload["round_seconds"]["rounds"] for workload in workloads)
    pairs = _counts(overhead["pairs"] for workload in workloads if (overhead := workload["overhead"]))
    notes = [
        "Crew: workers × threads of each, × clients at once; 0 workers: this process trains. "
        f"Round: the median of {rounds} rounds, after one that warms up. "
        "Over bare: the time of a plain PyTorch loop that does the same is 1; both run by turns, on one thread of this "
        f"process: the ratio of the medians, and the range of the ratios of {pairs} pairs of rounds.",
        *(f"{w['name']}: {w['about']}. Its crew was tried out: {w['crew']['why']}." for w in workloads),
    ]
    cores, torch = environment["cores"], environment["packages"]["torch"]
    return Table(
        f"This machine: {cores} cores, torch {torch}, {environment['torch_cpu']}",
        ("workload", "crew", "round\ns", "range\ns", "rounds\n/ s", "samples\n/ s", "over\nbare", "range"),
        tuple(map(_row, workloads)),
        tuple(notes),
    )


def _row(workload: Mapping[str, Any]) -> tuple[str, ...]:
    crew, seconds, overhead = workload["crew"], workload["round_seconds"], workload["overhead"]
    who = [crew["workers"], crew["threads"], *([crew["clients_at_once"]] if crew["clients_at_once"] > 1 else [])]
    return (
        workload["name"],
        " × ".join(map(str, who)),
        digits(seconds["median"]),
        _range(seconds),
        digits(workload["rounds_per_second"]),
        digits(workload["samples_per_second"]),
        *((f"{overhead['ratio']:.2f}", _range(overhead)) if overhead else (NOTHING, NOTHING)),
    )


def _range(spread: Mapping[str, float]) -> str:
    return f"{digits(spread['least'])}–{digits(spread['most'])}"


def _counts(counts: Iterable[int]) -> str:
    found = sorted(set(counts))
    return f"{found[0]}" if len(found) == 1 else f"{found[0]} to {found[-1]}"


def preview_table(found: Mapping[str, Any], described: str) -> Table:
    """What a run will take.

    Args:
        found: what the command prints as JSON.
        described: who trains, in words.
    """
    run = found["run"]
    seconds, forecast = run["round_seconds"], run["forecast"]
    samples, idle = run["samples_per_second"], run["idle_share"]
    rows = (
        ("a round, measured", f"{duration(seconds['median'])} ({_range(seconds)} s, {seconds['rounds']} rounds)"),
        ("samples", NOTHING if samples is None else f"{digits(samples)} / s"),
        ("workers not training", NOTHING if idle is None else f"{100 * idle:.0f} %"),
        *((("tasks that clients lost", str(run["num_lost"])),) if run["num_lost"] else ()),
        ("start", duration(forecast["start_seconds"])),
        (f"{forecast['rounds']} rounds", f"{duration(forecast['round_seconds'])} each"),
        (f"{forecast['evaluations']} evaluations", f"{duration(forecast['evaluation_seconds'])} each"),
        ("the whole run, predicted", duration(forecast["seconds"])),
    )
    return Table(
        f"{run['name']}: {run['method']} on this machine",
        ("figure", "value"),
        rows,
        (
            f"Engine: {described}.",
            "Samples: examples that clients train on, once an epoch. Not training: of the workers' time in a round, "
            "what goes to the server, to transfers and to waiting for the last client.",
            f"The prediction assumes {forecast['assumes']}. Evaluations are added up, though with workers they run "
            "beside the next round. The final test, the nHSIC plane, saving and tracking are left out.",
            *(("Clients of a private run tell neither their examples nor their time.",) if samples is None else ()),
        ),
    )
