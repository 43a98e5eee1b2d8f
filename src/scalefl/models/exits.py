"""A model with classifiers on the way, which answers with the mean of what all of them say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scalefl.models.output import OutputSpec
from scalefl.models.spec import Factory, ModelSpec
from scalefl.models.stand_ins import floating

Plain = tuple[Any, ...]
"""An output module's recipe as values that a file can hold."""


def ensemble(model: ModelSpec, exits: Iterable[tuple[int, OutputSpec]]) -> ModelSpec:
    """The recipe of a model and its exits.

    Its tensors are "model.…" and "exits.0.…".

    Args:
        model: gives logits [B, K], itself or as `logits` of what it returns.
        exits: for each, which of the floating-point tensors that its module returns it reads, and what it is made of.
    """
    plain = [
        (position, spec.cut, spec.shape, spec.targets, spec.num_classes, spec.layers, spec.projection)
        for position, spec in exits
    ]
    return model.around("scalefl.models.exits:with_exits", exits=tuple(plain))


def with_exits(factory: str | Factory, arguments: tuple[tuple[str, Any], ...], exits: Sequence[Plain]) -> nn.Module:
    """A model that answers with the mean of its own logits and its exits'."""
    return WithExits(ModelSpec(factory, arguments).make(), [(p, OutputSpec(*plain)) for p, *plain in exits])


class WithExits(nn.Module):
    """[B, …] to [B, K]: the mean over the model's own head and the exits."""

    def __init__(self, model: nn.Module, exits: Sequence[tuple[int, OutputSpec]]) -> None:
        super().__init__()
        self.model = model
        self.exits = nn.ModuleList(spec.build() for _, spec in exits)
        self._places = [(position, spec.cut) for position, spec in exits]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The mean logits, for whatever the model takes."""
        said: list[Tensor] = []
        mask = kwargs.get("attention_mask")
        hooks = [
            self.model.get_submodule(cut).register_forward_hook(self._asking(number, position, mask, said))
            for number, (position, cut) in enumerate(self._places)
        ]
        try:
            raw = self.model(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack([*said, getattr(raw, "logits", raw)]).mean(0)

    def _asking(self, number: int, position: int, mask: Tensor | None, said: list[Tensor]) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            said.append(self.exits[number](floating(output)[position], mask).logits)

        return hook
