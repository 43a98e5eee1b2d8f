"""Statistics of batch norms, collected anew for weights that are done: HeteroFL's static batch norm.

Each client's norms see its batches in train mode and keep the plain mean of what they saw. Variances of different
clients do not average, as their means differ; second moments do. So clients send those, and the server takes the square
of the mean off again.

Paper: Diao et al., HeteroFL, ICLR 2021, section 3.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from scalefl.params import Params


@contextlib.contextmanager
def collecting(module: nn.Module) -> Iterator[None]:
    """Inside the block, norms in train mode collect; at its end their running variances are second moments."""
    norms = [norm for _, norm in _norms(module) if norm.training]
    momentum = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # torch's word for the plain mean over all batches
        norm.reset_running_stats()
    try:
        yield
    finally:
        for norm, before in zip(norms, momentum, strict=True):
            norm.momentum = before
    for norm in norms:
        mean, variance = _tensor(norm.running_mean), _tensor(norm.running_var)
        variance.addcmul_(mean, mean)


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


def _norms(module: nn.Module) -> list[tuple[str, nn.modules.batchnorm._NormBase]]:
    return [
        (path, child)
        for path, child in module.named_modules()
        if isinstance(child, nn.modules.batchnorm._NormBase) and child.running_var is not None
    ]


def _tensor(buffer: Tensor | None) -> Tensor:
    assert isinstance(buffer, torch.Tensor)
    return buffer
