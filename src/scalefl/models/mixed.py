"""A model that is narrower from some layer on: what SLT trains behind its front."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from scalefl.errors import UnsliceableModel
from scalefl.models.spec import Factory, ModelSpec
from scalefl.rng import seeded

Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""Those that may take more channels than their model's width has: their weights are [out, in, ...]."""


def narrower_behind(
    model: ModelSpec, paths: Sequence[str], width: float, run: Callable[[nn.Module], object]
) -> ModelSpec:
    """The recipe of `model`, with the modules at `paths` as they are at `width` times the channels.

    Layers that get the wide front's channels take all of them.

    Args:
        model: whose factory takes a width.
        paths: modules that own tensors.
        width: of them, as a share of the model's.
        run: runs a module on a few examples.

    Raises:
        UnsliceableModel: the factory takes no width, or the model does not run so: the error names the module after
            which it broke off. A residual sum of the wide front with a narrow layer cannot be.
    """
    found: dict[str, int] = {}
    recipe = model.around("scalefl.models.mixed:mixed", width=width, narrow=tuple(sorted(paths)), inputs=())
    with seeded(0):
        module = recipe.make().eval()
    passed = [""]

    def note(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def before(child: nn.Module, args: tuple[Any, ...]) -> None:
            passed[0] = path
            if path in paths and isinstance(child, LAYERS):
                channels = args[0].shape[-1 if isinstance(child, nn.Linear) else 1]
                if channels != child.weight.shape[1]:
                    _widen(child, channels)
                    found[path] = channels

        return before

    for path, child in module.named_modules():
        if not list(child.children()):
            child.register_forward_pre_hook(note(path))
    try:
        with torch.no_grad(), seeded(0):
            run(module)
    except Exception as error:
        raise UnsliceableModel(
            f"{model.name}: narrower behind a cut, it breaks off after {passed[0]}: {error}"
        ) from error
    return ModelSpec.of(recipe, inputs=tuple(sorted(found.items())))


def mixed(
    factory: str | Factory,
    arguments: tuple[tuple[str, Any], ...],
    width: float,
    narrow: Sequence[str],
    inputs: Sequence[tuple[str, int]],
) -> nn.Module:
    """A model whose modules at `narrow` are those of a narrower one; `inputs` says which take how many channels."""
    model = ModelSpec(factory, arguments)
    module, narrower = model.make(), model.at_width(width).make()
    for path in narrow:
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, narrower.get_submodule(path))
    for path, channels in inputs:
        _widen(module.get_submodule(path), channels)
    return module


def _widen(layer: nn.Module, channels: int) -> None:
    """Let a layer take more channels, with weights drawn anew."""
    assert isinstance(layer, LAYERS)
    if getattr(layer, "groups", 1) != 1:
        raise UnsliceableModel("a layer in groups cannot take more channels than it was made for")
    setattr(layer, "in_features" if isinstance(layer, nn.Linear) else "in_channels", channels)
    layer.weight = nn.Parameter(layer.weight.new_empty(layer.weight.shape[0], channels, *layer.weight.shape[2:]))
    layer.reset_parameters()
