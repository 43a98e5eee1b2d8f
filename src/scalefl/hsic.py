"""Normalised HSIC: how much one representation of a batch says about another.

Gaussian kernels on flattened features of width d, K_ij = exp(−‖a_i − a_j‖² / (2 σ² d)), centred, then
normalised as "cka", ⟨K̄_A, K̄_B⟩ / (‖K̄_A‖ ‖K̄_B‖) in [0, 1], or as "cca", tr(R_A R_B) with
R = K̄ (K̄ + ε m I)⁻¹ (the HSIC bottleneck, Ma et al., AAAI 2020, eq. 3). The estimator is biased where the
feature is wide and the batch small: compare values at equal numbers of samples only. A centred kernel whose norm is
within rounding of zero (about 4 m ε for m samples) counts as without structure: its nHSIC is 0, its gradient too.
Shapes: B samples, D features.
"""

from __future__ import annotations

import contextlib
from typing import Literal

import torch
from torch import Tensor

Form = Literal["cka", "cca"]

# Paper: the authors' code: a Gaussian kernel on flattened features, σ = 5 in units of √d.
SIGMA = 5.0
EPSILON = 1e-5


def centred_kernel(features: Tensor, sigma: float = SIGMA) -> Tensor:
    """The centred Gaussian kernel of a batch [B, ...], [B, B], in float32 at least.

    Args:
        features: any shape; flattened to [B, D].
        sigma: bandwidth, in units of √D.
    """
    a_BD = features.flatten(1)
    a_BD = a_BD.to(torch.promote_types(a_BD.dtype, torch.float32))
    # Shifting all samples changes no distance and keeps the cancellation in ‖a‖² + ‖b‖² − 2ab small.
    a_BD = a_BD - a_BD.detach().mean(0)
    with _without_autocast(a_BD):
        half_BB = a_BD @ a_BD.detach().T
    # The gradient by way of the second factor is that of the transpose: to add it so takes one product less.
    gram_BB = half_BB + half_BB.T - half_BB.detach()
    squares_B = gram_BB.diagonal()
    distances_BB = (squares_B[:, None] + squares_B - 2 * gram_BB).clamp(min=0)
    # K − 1: centring takes any constant away, and next to 1 a kernel of near samples would lose its digits.
    less_BB = torch.expm1(distances_BB / (-2 * sigma**2 * a_BD.shape[1]))
    return less_BB - less_BB.mean(0) - less_BB.mean(1, keepdim=True) + less_BB.mean()


def _without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """Inside the block, products of matrices keep the precision of what is multiplied."""
    device = tensor.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def nhsic(a: Tensor, b: Tensor, form: Form = "cka", sigma: float = SIGMA) -> Tensor:
    """nHSIC of two representations of the same batch: a scalar, differentiable in both.

    A batch that a representation cannot tell apart (one class, one sample) has a zero kernel: the value is 0
    and so is its gradient.

    Args:
        a, b: [B, ...] each; B may be 1.
        form: the normalisation.
        sigma: kernel bandwidth, in units of √D.
    """
    return normalised(centred_kernel(a, sigma), centred_kernel(b, sigma), form)


def normalised(ka_BB: Tensor, kb_BB: Tensor, form: Form = "cka") -> Tensor:
    """nHSIC from two centred kernels."""
    dtype = torch.promote_types(ka_BB.dtype, kb_BB.dtype)
    ka_BB, kb_BB = ka_BB.to(dtype), kb_BB.to(dtype)
    return _cka(ka_BB, kb_BB) if form == "cka" else _cca(ka_BB, kb_BB)


def _cka(ka_BB: Tensor, kb_BB: Tensor) -> Tensor:
    # Samples this close differ by the rounding of the layers before, not by structure: nothing to compare.
    floor = len(ka_BB) * 4 * torch.finfo(ka_BB.dtype).eps
    return (ka_BB * kb_BB).sum() * _scale(ka_BB, floor) * _scale(kb_BB, floor)


def _scale(k_BB: Tensor, floor: float) -> Tensor:
    """1/‖K‖, or 0 for a kernel that is zero up to rounding, whose gradient is then exactly 0."""
    total = k_BB.square().sum()
    return torch.where(total > floor**2, total, torch.inf).rsqrt()


# Paper: Ma et al., eq. 3. Deviation: the authors of ScaleFL train with "cka" only.
def _cca(ka_BB: Tensor, kb_BB: Tensor) -> Tensor:
    ra_BB, rb_BB = _regularised(ka_BB), _regularised(kb_BB)
    return (ra_BB * rb_BB.T).sum()


def _regularised(k_BB: Tensor) -> Tensor:
    m = len(k_BB)
    ridge_BB = EPSILON * m * torch.eye(m, dtype=k_BB.dtype, device=k_BB.device)
    # K̄ and (K̄ + εmI)⁻¹ commute, so solving from the left gives the same product.
    solved_BB: Tensor = torch.linalg.solve(k_BB + ridge_BB, k_BB)
    return solved_BB
