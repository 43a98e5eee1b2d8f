"""How a deployment stands, as tables."""

from __future__ import annotations

from typing import Any

from scalefl.deployment.layout import Deployment
from scalefl.deployment.programs import Say
from scalefl.deployment.server import connected
from scalefl.deployment.submit import all_runs
from scalefl.report.tables import NOTHING, Table
from scalefl.run_folder import RunFolder, read_json
from scalefl.units import mib


def node_table(deployment: Deployment, say: Say) -> Table:
    """The nodes, and what they offered when the last run started."""
    offered = _offered(deployment)

    def row(node: dict[str, Any]) -> tuple[str, ...]:
        told = offered.get(node["name"])
        words = [mib(told["memory_bytes"]), _count(told["num_examples"])] if told else [NOTHING, NOTHING]
        return node["name"], node["status"], node["online-at"], *words

    rows = tuple(map(row, sorted(connected(deployment, say), key=lambda node: str(node["name"]))))
    return Table(
        "Nodes",
        ("node", "status", "online since", "budget\nMiB", "examples"),
        rows,
        ("Budget (what may be planned with) and examples: as they were told when the newest run started.",),
        frozenset({"status", "online since"}),
    )


def run_table(deployment: Deployment, say: Say) -> Table:
    """The runs, the newest first, by Flower's account of them."""
    rows = tuple(
        (
            run["run-id"],
            run["status"],
            run["pending-at"],
            f"{run['elapsed']:.0f}",
            mib(run["network-traffic"]["outbound-bytes"]),
            mib(run["network-traffic"]["inbound-bytes"]),
        )
        for run in all_runs(deployment, say)
    )
    return Table(
        "Runs",
        ("run", "status", "submitted", "seconds", "to nodes\nMiB", "from nodes\nMiB"),
        rows,
        texts=frozenset({"status", "submitted"}),
    )


def _count(num_examples: int | None) -> str:
    """In private runs nodes do not tell."""
    return NOTHING if num_examples is None else f"{num_examples:,}"


def _offered(deployment: Deployment) -> dict[str, dict[str, Any]]:
    files = [RunFolder(path).clients for path in deployment.runs.glob("*")]
    newest = max((path for path in files if path.exists()), key=lambda path: path.stat().st_mtime, default=None)
    return {client["name"]: client for client in read_json(newest)["clients"]} if newest else {}
