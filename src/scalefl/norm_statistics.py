"""Statistics of batch norms, collected anew for weights that are done: HeteroFL's static batch norm.

Each client's norms see its batches in train mode. Variances of different batches, or clients, do not average, as their
means differ; second moments do. So clients send those, and the server takes the square of the mean off again.

Paper: Diao et al., HeteroFL, ICLR 2021, section 3.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from scalefl.params import Params


@contextlib.contextmanager
def collecting(module: nn.Module) -> Iterator[None]:
    """Inside the block, batch norms in train mode collect; at its end their running variances are second moments."""
    seen = {norm: _Seen() for _, norm in _norms(module) if norm.training}
    hooks = [norm.register_forward_pre_hook(found.note) for norm, found in seen.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    for norm, found in seen.items():
        if found.num_examples:
            _tensor(norm.running_mean).copy_(found.mean / found.num_examples)
            _tensor(norm.running_var).copy_(found.second / found.num_examples)


def collectable(module: nn.Module) -> frozenset[str]:
    """Names of the statistics that `collecting` can collect, counters of batches included."""
    return frozenset(f"{path}.{name}" for path, norm in _norms(module) for name, _ in norm.named_buffers(recurse=False))


def centred(module: nn.Module, collected: Params) -> dict[str, Tensor]:
    """Collected statistics with variances where second moments were.

    Args:
        module: whose norms they belong to; its own tensors may be on the meta device.
        collected: by the names of the module.
    """
    found = dict(collected)
    for path, _ in _norms(module):
        mean, second = f"{path}.running_mean", f"{path}.running_var"
        if second in found:
            found[second] = (found[second] - found[mean].square()).clamp_(min=0)
    return found


class _Seen:
    """What came to a norm: sums over examples of the mean and the mean square of each channel, [C]."""

    def __init__(self) -> None:
        self.mean = self.second = torch.zeros(())
        self.num_examples = 0

    def note(self, _norm: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        variance, mean = torch.var_mean(x, [d for d in range(x.ndim) if d != 1], correction=0)
        self.mean = self.mean + len(x) * mean
        self.second = self.second + len(x) * (variance + mean.square())
        self.num_examples += len(x)


def _norms(module: nn.Module) -> list[tuple[str, _BatchNorm]]:
    return [
        (path, child)
        for path, child in module.named_modules()
        if isinstance(child, _BatchNorm) and child.running_var is not None
    ]


def _tensor(buffer: Tensor | None) -> Tensor:
    assert isinstance(buffer, torch.Tensor)
    return buffer
