"""A model whose norms get, in train mode, what comes to them divided by a number: HeteroFL's scaler."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from scalefl.models.spec import Factory, ModelSpec

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def with_scaler(model: ModelSpec, rate: float) -> ModelSpec:
    """The recipe of a model with a scaler before each norm; the names of its tensors are those of `model`.

    Paper: Diao et al., HeteroFL, ICLR 2021, section 3: a model of width `rate` divides by it, so that what a wider one
    computes from the same weights is of the same size.
    """
    return model.around("scalefl.models.scaler:dividing", rate=rate)


def dividing(factory: str | Factory, arguments: tuple[tuple[str, Any], ...], rate: float) -> nn.Module:
    """A model with its scalers."""

    def divided(norm: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (args[0] / rate, *args[1:]) if norm.training and isinstance(args[0], Tensor) else None

    module = ModelSpec(factory, arguments).make()
    for child in module.modules():
        if isinstance(child, NORMS):
            child.register_forward_pre_hook(divided)
    return module
