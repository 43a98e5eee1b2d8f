"""The methods. One file each; a new one is a file and a line in this table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

METHODS: Mapping[str, str] = {
    "depthfl": "scalefl.methods.depthfl:DepthFL",
    "fedavg": "scalefl.methods.fedavg:FedAvg",
    "fedepth": "scalefl.methods.fedepth:FeDepth",
    "fedrolex": "scalefl.methods.fedrolex:FedRolex",
    "heterofl": "scalefl.methods.heterofl:HeteroFL",
    "profl": "scalefl.methods.profl:ProFL",
    "scalefl": "scalefl.methods.scalefl:ScaleFL",
    "slt": "scalefl.methods.slt:SLT",
}
"""Short name -> "package.module:Class"."""

_PAPER: Mapping[str, Any] = {
    "name": "scalefl",
    "spans": "single",
    "means": "none",
    "parts": False,
    "tails": False,
    "outputs": "plain",
    "coadapted_layers": 1,
}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # The paper's mode: one block a round for everybody, and the authors' depth of co-adaptation (docs/fidelity.md).
    "scalefl-paper": _PAPER,
    # Plain sequential block-wise training: the paper's motivation and the base of its ablations.
    "sbt": {**_PAPER, "mentor": None, "coadapted_layers": 0, "growth": {"kind": "sequential"}},
    # The paper's mode without one of its parts, or with the authors' projection head, which it does without.
    "scalefl-no-mentor": {**_PAPER, "mentor": None},
    "scalefl-no-growth": {**_PAPER, "growth": {"kind": "sequential"}},
    "scalefl-no-coadaptation": {**_PAPER, "coadapted_layers": 0},
    "scalefl-bare-outputs": {**_PAPER, "outputs": "bare"},
    "scalefl-projection-head": {**_PAPER, "mentor": {"projection": "mlp"}},
}
"""Settings that go by a name of their own; what a config sets beside the name overrides them."""
