"""Data sets, how they are shared among clients, and what clients' devices can do."""

from scalefl.data.checks import warn_of_scale
from scalefl.data.dataset import Dataset, FederatedData, PartitionedData, stratified_split
from scalefl.data.devices import (
    PROFILES,
    Devices,
    MemoryClass,
    ResolvedClass,
    parse_bytes,
)
from scalefl.data.partitioners import (
    Capability,
    Dirichlet,
    Iid,
    Natural,
    Partitioner,
    Pathological,
    Shards,
    partition,
)
from scalefl.data.sources import Source, load

__all__ = [
    "PROFILES",
    "Capability",
    "Dataset",
    "Devices",
    "Dirichlet",
    "FederatedData",
    "Iid",
    "MemoryClass",
    "Natural",
    "PartitionedData",
    "Partitioner",
    "Pathological",
    "ResolvedClass",
    "Shards",
    "Source",
    "load",
    "parse_bytes",
    "partition",
    "stratified_split",
    "warn_of_scale",
]
