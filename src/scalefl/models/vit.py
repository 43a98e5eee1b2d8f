"""Vision transformer: Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021.

Deviation: the mean over patches feeds the classifier, where the paper has a class token (its appendix D.3
finds them equal). Shapes: B images, L patches, D channels.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalefl.errors import ConfigError
from scalefl.models.norms import Norm, check_choice, make_norm, scaled

TokenNormKind = Literal["layer", "batch", "group"]


def vit(
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    image_size: int = 32,
    patch_size: int = 4,
    dim: int = 192,
    depth: int = 12,
    heads: int = 3,
    width: float = 1.0,
    norm: TokenNormKind = "layer",
) -> nn.Module:
    """A pre-norm ViT: square images [B, C, image_size, image_size] to logits [B, K].

    `width` narrows every head; their number stays. The MLPs are four times as wide as `dim`. `norm`: "layer" as in
    the paper; "batch" and "group" see the patches of an image as its pixels.

    Raises:
        ConfigError: the patches don't tile the image, or the heads don't divide `dim`.
    """
    if image_size % patch_size:
        raise ConfigError(f"vit: patch_size {patch_size} does not divide image_size {image_size}")
    if dim % heads:
        raise ConfigError(f"vit: heads {heads} does not divide dim {dim}")
    check_choice("norm", norm, TokenNormKind)
    patches = Patches(in_channels, image_size, patch_size, heads * scaled(dim // heads, width))
    return ViT(patches, depth, heads, num_classes, norm)


class TokenNorm(nn.Module):
    """A batch or group norm over tokens [B, L, D]."""

    def __init__(self, kind: Norm, dim: int) -> None:
        super().__init__()
        self.over_channels = make_norm(kind, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] to [B, L, D]."""
        normed: Tensor = self.over_channels(x.mT.unsqueeze(-1))
        return normed.squeeze(-1).mT


def token_norm(kind: TokenNormKind, dim: int) -> nn.Module:
    """The norm of that name for tokens [B, L, D]."""
    return nn.LayerNorm(dim) if kind == "layer" else TokenNorm(kind, dim)


class Patches(nn.Module):
    """Patches as vectors, plus a learned vector for each position."""

    def __init__(self, in_channels: int, image_size: int, patch_size: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)
        self.position = nn.Parameter(torch.empty((image_size // patch_size) ** 2, dim))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, L, D]."""
        patches: Tensor = self.conv(x)
        return patches.flatten(2).mT + self.position


class Attention(nn.Module):
    """Self-attention over [B, L, D]."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] to [B, L, D]."""
        q, k, v = (self._split(project(x)) for project in (self.query, self.key, self.value))
        x = F.scaled_dot_product_attention(q, k, v)
        mixed: Tensor = self.out(x.permute(0, 2, 3, 1).flatten(2))
        return mixed

    def _split(self, x: Tensor) -> Tensor:
        # Heads vary fastest, so that the leading channels, which a narrower model takes, are the
        # leading ones of every head. Fused attention wants them contiguous.
        return x.view(*x.shape[:2], -1, self.heads).permute(0, 3, 1, 2).contiguous()


class Block(nn.Module):
    """Attention and an MLP, each after a norm and around a shortcut."""

    def __init__(self, dim: int, heads: int, norm: TokenNormKind) -> None:
        super().__init__()
        self.norm1 = token_norm(norm, dim)
        self.attention = Attention(dim, heads)
        self.norm2 = token_norm(norm, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] to [B, L, D]."""
        x = x + self.attention(self.norm1(x))
        update: Tensor = self.mlp(self.norm2(x))
        return x + update


class ViT(nn.Module):
    """Patches, `depth` blocks, a norm, the mean over patches and a linear classifier."""

    def __init__(
        self, patches: Patches, depth: int, heads: int, num_classes: int, norm: TokenNormKind = "layer"
    ) -> None:
        super().__init__()
        dim = patches.conv.out_channels
        self.patches = patches
        self.blocks = nn.ModuleList(Block(dim, heads, norm) for _ in range(depth))
        self.norm = token_norm(norm, dim)
        self.classifier = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.patches.position, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, K]."""
        x = self.patches(x)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.classifier(self.norm(x).mean(1))
        return logits
