"""Federated learning for clients that are too small to train the model.

    import scalefl

    print(scalefl.plan("resnet18", torch.zeros(2, 3, 32, 32), budget="64MiB"))
    summary = scalefl.run(scalefl.load_config("examples/demo.toml"), "runs/demo")

Names are loaded when they are first used, so that importing the package is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scalefl.config import Config, load_config, make_config
    from scalefl.data import Dataset, Devices, FederatedData, MemoryClass, PartitionedData, Source
    from scalefl.data.population import SimulatedPopulation
    from scalefl.engines.local import LocalEngine
    from scalefl.errors import ScaleFLError
    from scalefl.experiment import Experiment
    from scalefl.loop import federate
    from scalefl.memory_plan import MemoryPlan, plan
    from scalefl.mentor import Mentor
    from scalefl.methods.fedavg import FedAvg
    from scalefl.methods.scalefl import ScaleFL
    from scalefl.models.spec import ModelSpec
    from scalefl.privacy import Privacy
    from scalefl.problem import Classification, Column, Problem
    from scalefl.record import PrivateRecord, RoundRecord
    from scalefl.runner import run
    from scalefl.sampling import UniformSampler
    from scalefl.types import ClientInfo, Engine, LocalWork, Method, Population, ServerState

_WHERE = {
    "scalefl.config": ("Config", "load_config", "make_config"),
    "scalefl.data": ("Dataset", "Devices", "FederatedData", "MemoryClass", "PartitionedData", "Source"),
    "scalefl.data.population": ("SimulatedPopulation",),
    "scalefl.engines.local": ("LocalEngine",),
    "scalefl.errors": ("ScaleFLError",),
    "scalefl.experiment": ("Experiment",),
    "scalefl.runner": ("run",),
    "scalefl.loop": ("federate",),
    "scalefl.memory_plan": ("MemoryPlan", "plan"),
    "scalefl.mentor": ("Mentor",),
    "scalefl.methods.fedavg": ("FedAvg",),
    "scalefl.methods.scalefl": ("ScaleFL",),
    "scalefl.models.spec": ("ModelSpec",),
    "scalefl.privacy": ("Privacy",),
    "scalefl.problem": ("Classification", "Column", "Problem"),
    "scalefl.record": ("PrivateRecord", "RoundRecord"),
    "scalefl.sampling": ("UniformSampler",),
    "scalefl.types": ("ClientInfo", "Engine", "LocalWork", "Method", "Population", "ServerState"),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "Classification",
    "ClientInfo",
    "Column",
    "Config",
    "Dataset",
    "Devices",
    "Engine",
    "Experiment",
    "FedAvg",
    "FederatedData",
    "LocalEngine",
    "LocalWork",
    "MemoryClass",
    "MemoryPlan",
    "Mentor",
    "Method",
    "ModelSpec",
    "PartitionedData",
    "Population",
    "Privacy",
    "PrivateRecord",
    "Problem",
    "RoundRecord",
    "ScaleFL",
    "ScaleFLError",
    "ServerState",
    "SimulatedPopulation",
    "Source",
    "UniformSampler",
    "federate",
    "load_config",
    "make_config",
    "plan",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'scalefl' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
