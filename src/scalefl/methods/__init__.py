"""The methods. One file each; a new one is a file and a line in this table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

METHODS: Mapping[str, str] = {
    "fedavg": "scalefl.methods.fedavg:FedAvg",
    "fedepth": "scalefl.methods.fedepth:FeDepth",
    "fedrolex": "scalefl.methods.fedrolex:FedRolex",
    "heterofl": "scalefl.methods.heterofl:HeteroFL",
    "scalefl": "scalefl.methods.scalefl:ScaleFL",
}
"""Short name -> "package.module:Class"."""

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # Plain sequential block-wise training: the paper's motivation and the base of its ablations.
    "sbt": {
        "name": "scalefl",
        "spans": "single",
        "means": "none",
        "parts": False,
        "mentor": None,
        "coadapted_layers": 0,
        "growth": {"kind": "sequential"},
    },
    # The paper's mode: one block a round for everybody, and the authors' depth of co-adaptation (docs/fidelity.md).
    "scalefl-paper": {"name": "scalefl", "spans": "single", "means": "none", "parts": False, "coadapted_layers": 1},
}
"""Settings that go by a name of their own; what a config sets beside the name overrides them."""
