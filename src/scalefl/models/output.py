"""Output modules: light stand-ins for the blocks that a stage does not run (ScaleFL, section 3).

While block t trains, φ_t follows it: one light layer for each change of resolution on the way to the model's
head, global pooling, and a linear classifier. So block t learns features that the missing blocks can use.
Shapes: B examples, C channels, H×W pixels, L tokens, D features, K classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalefl.params import ATTACHMENT, Params
from scalefl.problem import masks, without_padding
from scalefl.rng import derive, seeded

Shape = tuple[int, ...]
Projection = Literal["none", "linear", "mlp"]
Layers = Literal["full", "separable", "bare"]

# Deviation: the authors always use full 3×3 convolutions, which cost more than a compact model itself.
# From the closest stand-in to the cheapest; the first whose cost stays within that of the missing part is taken.
LAYERS: tuple[Layers, ...] = ("full", "separable", "bare")
PROJECTIONS: tuple[Projection, ...] = ("mlp", "linear", "none")
"""From the widest to the narrowest."""


@dataclass(frozen=True)
class OutputSpec:
    """What an output module is made of.

    Args:
        cut: the module path after which it stands.
        shape: the shape of one example there: (C, H, W), (L, D) or (D,).
        targets: the shapes that its light layers lead to, in order.
        layers: "full" 3×3 convolutions, depthwise-"separable" ones, or "bare" pooling.
        num_classes: K.
        projection: the head for the mentor's label term: "none" (the pooled feature itself), "linear" (d → d)
            or the authors' three linear layers "mlp" (d → 4d → 2d → d).
        normed: whether what each light layer makes of an example (of a token) is normalised, without parameters.
    """

    cut: str
    shape: Shape
    targets: tuple[Shape, ...]
    num_classes: int
    layers: Layers = "full"
    projection: Projection = "none"
    normed: bool = False

    @property
    def prefix(self) -> str:
        """What the names of its tensors start with."""
        return f"{ATTACHMENT}output.{self.cut}."

    def build(self) -> OutputModule:
        """The module, with weights from the current default generator."""
        return OutputModule(self)

    def names(self) -> list[str]:
        """Names of its parameters."""
        return list(_names(self))

    def initial(self, seed: int) -> Params:
        """Its first weights: a function of the seed and the cut, whatever else the model holds."""
        with seeded(derive(seed, "output", self.cut)):
            return {self.prefix + name: t.detach() for name, t in self.build().state_dict().items()}


@lru_cache(maxsize=1024)
def _names(spec: OutputSpec) -> tuple[str, ...]:
    return tuple(spec.prefix + name for name, _ in empty_output(spec).named_parameters())


@dataclass(frozen=True)
class OutputTaps:
    """What an output module shows: logits [B, K], its last light layer's features, and the projected vector [B, d].

    Features of tokens that do not count are 0.
    """

    logits: Tensor
    features: Tensor
    projected: Tensor


class OutputModule(nn.Module):
    """φ_t: light layers, global pooling, projection head, classifier."""

    def __init__(self, spec: OutputSpec) -> None:
        super().__init__()
        targets = () if spec.layers == "bare" else spec.targets
        shapes = [spec.shape, *targets]
        self.layers = nn.ModuleList(
            _layer(source, target, separable=spec.layers == "separable")
            for source, target in itertools.pairwise(shapes)
        )
        self.normed = spec.normed
        width = _width(shapes[-1])
        self.projection = _projection(spec.projection, width)
        self.classifier = nn.Linear(width, spec.num_classes)

    def forward(self, z: Tensor, mask_BL: Tensor | None = None) -> OutputTaps:
        """Logits and taps for a feature `z` of the shape that the spec names; `mask_BL` marks the tokens that count.

        A mask for another number of tokens than `z` has is passed over.
        """
        mask_BL = mask_BL if masks(mask_BL, z) else None
        for layer in self.layers:
            z, mask_BL = layer(z, mask_BL) if isinstance(layer, TokenLayer) else (layer(z), mask_BL)
            if self.normed:
                # Several layers with nothing between them diverge at rates at which the model itself learns.
                z = F.layer_norm(z, z.shape[2:] if z.ndim == 3 else z.shape[1:])
        z = without_padding(z, mask_BL)
        pooled_BD = _pool(z, mask_BL)
        return OutputTaps(self.classifier(pooled_BD), z, self.projection(pooled_BD))


def light_targets(shape: Shape, later: Sequence[Shape]) -> tuple[Shape, ...]:
    """The shapes that light layers lead to from `shape`: one for each later resolution (or token width).

    Changes of the channel count alone are merged with the change of resolution that follows, or fine-grained
    models would drown in light layers. Volumes [C, D, H, W] have none: pooling alone.
    """
    if len(shape) > 3:
        return ()
    # Deviation: the authors put one convolution for each missing stage; we put one for each resolution on the way.
    same_rank = list(itertools.takewhile(lambda s: len(s) == len(shape), later))
    runs = [list(run) for _, run in itertools.groupby([shape, *same_rank], key=_resolution)]
    targets = [run[-1] for run in runs[1:]]
    if not targets and _width(runs[0][-1]) != _width(shape):
        targets = [runs[0][-1]]
    return tuple(targets)


class TokenLayer(nn.Module):
    """A token-wise linear layer [B, L, D] → [B, L', D'], pooling tokens where there are fewer later."""

    def __init__(self, source: Shape, target: Shape) -> None:
        super().__init__()
        self.linear = nn.Linear(source[-1], target[-1])
        self.num_tokens = target[0] if target[0] < source[0] else None

    def forward(self, x_BLD: Tensor, mask_BL: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Project each token, then average neighbours down to the later number of tokens; and the mask of what is left.

        Only tokens that count enter a mean; a mean counts where any of its tokens does.
        """
        y_BLD: Tensor = self.linear(x_BLD)
        if self.num_tokens is None:
            return y_BLD, mask_BL
        if mask_BL is None:
            return _neighbours(y_BLD, self.num_tokens), None
        counting_BL1 = (mask_BL != 0).to(y_BLD.dtype).unsqueeze(-1)
        share_BL1 = _neighbours(counting_BL1, self.num_tokens)
        mean_BLD = _neighbours(without_padding(y_BLD, mask_BL), self.num_tokens)
        # Where no token counts the mean is 0 already.
        return mean_BLD / share_BL1.masked_fill(share_BL1 == 0, 1.0), (share_BL1 > 0).squeeze(-1)


def _neighbours(x_BLD: Tensor, num_tokens: int) -> Tensor:
    """Means of neighbouring tokens."""
    return F.adaptive_avg_pool1d(x_BLD.transpose(1, 2), num_tokens).transpose(1, 2)


def _layer(source: Shape, target: Shape, *, separable: bool) -> nn.Module:
    if len(source) == 3:
        return _convolution(source, target, separable=separable)
    return TokenLayer(source, target) if len(source) == 2 else nn.Linear(source[-1], target[-1])


def _convolution(source: Shape, target: Shape, *, separable: bool) -> nn.Module:
    (c, h, w), (c2, h2, w2) = source, target
    whole = h % h2 == 0 and w % w2 == 0 and h // h2 == w // w2
    stride = h // h2 if whole else 1
    if separable:
        layers = [
            nn.Conv2d(c, c, 3, stride=stride, padding=1, groups=c, bias=False),
            nn.Conv2d(c, c2, 1, bias=False),
        ]
    else:
        layers = [nn.Conv2d(c, c2, 3, stride=stride, padding=1, bias=False)]
    if not whole:
        layers.insert(0, nn.AdaptiveAvgPool2d((h2, w2)))  # type: ignore[arg-type]
    return nn.Sequential(*layers) if len(layers) > 1 else layers[0]


def _projection(kind: Projection, width: int) -> nn.Module:
    # Paper: the authors' code has three linear layers, 512 → 2056 → 1024 → 512, with nothing between them.
    # Deviation: ours go by the feature's width, d → 4d → 2d → d, or are left out.
    if kind == "none":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(width, width)
    return nn.Sequential(nn.Linear(width, 4 * width), nn.Linear(4 * width, 2 * width), nn.Linear(2 * width, width))


def _pool(z: Tensor, mask_BL: Tensor | None) -> Tensor:
    """One vector for each example; features of tokens that do not count are 0."""
    if z.ndim == 2:
        return z
    if z.ndim == 3:
        return z.mean(1) if mask_BL is None else z.sum(1) / (mask_BL != 0).sum(1, keepdim=True).clamp(min=1)
    return z.flatten(2).mean(2)


def _width(shape: Shape) -> int:
    return shape[-1] if len(shape) <= 2 else shape[0]


def _resolution(shape: Shape) -> Shape:
    return shape[1:] if len(shape) >= 3 else shape


def empty_output(spec: OutputSpec) -> OutputModule:
    """The module on the meta device: a skeleton to lay tensors on."""
    with torch.device("meta"):
        return spec.build()
