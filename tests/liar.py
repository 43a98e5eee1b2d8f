"""A node that lies: `scalefl deploy node`, whose answers to tasks are tampered with before they leave."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from scalefl.deployment.layout import NodeFolder
from scalefl.deployment.node import run_node
from scalefl.engines.messages import Parcel, Update, pack, unpack
from scalefl.engines.node import Node

EARLIER: list[Parcel] = []


def nan(parcel: Parcel) -> Parcel:
    return changed(parcel, lambda t: torch.full_like(t, float("nan")))


def shape(parcel: Parcel) -> Parcel:
    return changed(parcel, lambda t: t.flatten()[:1])


def foreign(parcel: Parcel) -> Parcel:
    return Parcel(parcel.header, {**parcel.tensors, "foreign": torch.ones(3)})


def old(parcel: Parcel) -> Parcel:
    """Its first answer, again and again."""
    EARLIER.append(parcel)
    return EARLIER[0]


def huge(parcel: Parcel) -> Parcel:
    header = msgspec.structs.replace(unpack(parcel, Update), num_examples=10**9)
    return pack(header, parcel.tensors)


def changed(parcel: Parcel, change: Callable[[torch.Tensor], torch.Tensor]) -> Parcel:
    name = min(name for name, t in parcel.tensors.items() if t.is_floating_point() and t.numel() > 1)
    return Parcel(parcel.header, {**parcel.tensors, name: change(parcel.tensors[name])})


LIES = {lie.__name__: lie for lie in (nan, shape, foreign, old, huge)}


def main(lie: str, folder: str, data: str, share: str) -> None:
    honest = Node.answer

    def answer(self: Node, parcel: Parcel) -> Parcel:
        said = honest(self, parcel)
        return LIES[lie](said) if b"Update" in said.header else said

    Node.answer = answer  # type: ignore[method-assign]
    node = NodeFolder(Path(folder))
    run_node(node, node.settings({"budget": "32MiB", "data": {"name": data}, "share": share}), print)


if __name__ == "__main__":
    main(*sys.argv[1:])
