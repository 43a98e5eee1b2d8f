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
from typing import Any, Literal

import torch
from torch import Tensor

from scalefl.torch_private import is_transformed

Form = Literal["cka", "cca"]

# Paper: the authors' code: a Gaussian kernel on flattened features, σ = 5 in units of √d.
SIGMA = 5.0
EPSILON = 1e-5


def centred_kernel(features: Tensor, sigma: float = SIGMA) -> Tensor:
    """The centred Gaussian kernel of a batch [B, ...], [B, B], in float32 at least; differentiable once.

    Args:
        features: any shape; flattened to [B, D].
        sigma: bandwidth, in units of √D.
    """
    a_BD = _flat(features)
    return _centred(_kernel_less_one(_shifted(a_BD), _exponent_scale(a_BD, sigma)))


def _flat(features: Tensor) -> Tensor:
    a_BD = features.reshape(len(features), -1)  # single numbers too: [B]
    return a_BD.to(torch.promote_types(a_BD.dtype, torch.float32))


def _exponent_scale(a_BD: Tensor, sigma: float) -> float:
    """What makes a squared distance the kernel's exponent."""
    return -1 / (2 * sigma**2 * a_BD.shape[1])


def _shifted(a_BD: Tensor) -> Tensor:
    """It changes no distance between samples, and keeps the cancellation in ‖a‖² + ‖b‖² − 2ab small."""
    return a_BD - a_BD.detach().mean(0)


def _kernel_less_one(a_BD: Tensor, scale: float) -> Tensor:
    """K − 1: centring takes any constant away, and next to 1 a kernel of near samples would lose its digits."""
    with _without_autocast(a_BD):
        gram_BB = a_BD @ a_BD.detach().T
    if is_transformed(a_BD) or (a_BD.requires_grad and torch.is_grad_enabled()):  # transforms hide what has a gradient
        # The gradient by way of the second factor is that of the transpose: to add it so takes one product less.
        gram_BB = gram_BB + gram_BB.T - gram_BB.detach()
    squares_B = gram_BB.diagonal()
    distances_BB = torch.sub(squares_B[:, None] + squares_B, gram_BB, alpha=2).clamp(min=0)
    return distances_BB.mul_(scale).expm1_()


def _centred(k_BB: Tensor) -> Tensor:
    """H K H with H = I − 11ᵀ/B, for a symmetric K."""
    means_B = k_BB.mean(0)
    return k_BB - means_B - (means_B - means_B.mean())[:, None]


def _without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """Inside the block, products of matrices keep the precision of what is multiplied."""
    device = tensor.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def nhsic(a: Tensor, b: Tensor, form: Form = "cka", sigma: float = SIGMA) -> Tensor:
    """nHSIC of two representations of the same batch: a scalar, differentiable in both, once.

    A batch that a representation cannot tell apart (one class, one sample) has a zero kernel: the value is 0
    and so is its gradient.

    Args:
        a, b: [B, ...] each; B may be 1.
        form: the normalisation.
        sigma: kernel bandwidth, in units of √D.
    """
    if b.requires_grad and not a.requires_grad:  # nHSIC is symmetric, and `likeness` is fast by its features
        a, b = b, a
    return likeness(a, normalised_kernel(b, form, sigma), form, sigma)


def likeness(features: Tensor, target_BB: Tensor, form: Form = "cka", sigma: float = SIGMA) -> Tensor:
    """The inner product of a batch's normalised kernel with another one, or with a weighted sum of several: a scalar.

    Of a weighted sum it is that of several nHSIC. Differentiable once.

    Args:
        features: [B, ...].
        target_BB: normalised kernels of other representations, by the same form; that they are symmetric is not
            checked.
        form: the normalisation.
        sigma: bandwidth, in units of √D.
    """
    a_BD = _flat(features)
    trains = a_BD.requires_grad and torch.is_grad_enabled()
    if not trains or form != "cka" or target_BB.requires_grad or target_BB.dtype != a_BD.dtype or is_transformed(a_BD):
        return inner_product(normalised_kernel(a_BD, form, sigma), target_BB)
    value: Tensor = _Likeness.apply(a_BD, target_BB, _exponent_scale(a_BD, sigma))  # type: ignore[no-untyped-call]
    return value


class _Likeness(torch.autograd.Function):
    """Differentiated by hand: for a small client, to start operations is what they cost, and autograd starts 50."""

    @staticmethod
    def forward(ctx: Any, a_BD: Tensor, target_BB: Tensor, scale: float) -> Tensor:
        shifted_BD = _shifted(a_BD)
        less_BB = _kernel_less_one(shifted_BD, scale)
        k_BB = _centred(less_BB)
        inverse = _inverse_norm(k_BB)
        value = (k_BB * target_BB).sum() * inverse
        # The gradient by K̄: (T − K̄ ⟨K̄, T⟩ / ‖K̄‖²) / ‖K̄‖. By K: that, centred; it is already, but for rounding.
        by_kernel_BB = _centred(torch.addcmul(target_BB, k_BB, value * inverse, value=-1))
        # By distances ‖a_i − a_j‖²: W, symmetric. By a_i: 4 Σ_j W_ij (a_i − a_j).
        pull_BB = by_kernel_BB.mul_(less_BB + 1).mul_(-4 * scale * inverse)
        pull_BB.diagonal().sub_(pull_BB.sum(1))
        ctx.save_for_backward(pull_BB, shifted_BD)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():  # create_graph: what is done here would be left out of it
            raise RuntimeError("nHSIC can be differentiated once only")
        pull_BB, shifted_BD = ctx.saved_tensors
        with _without_autocast(pull_BB):
            return (gradient * pull_BB) @ shifted_BD, None, None


def normalised_kernel(features: Tensor, form: Form = "cka", sigma: float = SIGMA) -> Tensor:
    """What enters nHSIC of a batch [B, ...], [B, B]: K̄ / ‖K̄‖ for "cka", R for "cca".

    Args:
        features: any shape; flattened to [B, D].
        form: the normalisation.
        sigma: bandwidth, in units of √D.
    """
    k_BB = centred_kernel(features, sigma)
    return k_BB * _inverse_norm(k_BB) if form == "cka" else _regularised(k_BB)


def inner_product(ra_BB: Tensor, rb_BB: Tensor) -> Tensor:
    """nHSIC from two normalised kernels, which are symmetric: tr(R_A R_B) = ⟨R_A, R_B⟩."""
    dtype = torch.promote_types(ra_BB.dtype, rb_BB.dtype)
    return (ra_BB.to(dtype) * rb_BB.to(dtype)).sum()


def _inverse_norm(k_BB: Tensor) -> Tensor:
    """1/‖K‖, or 0 for a kernel that is zero up to rounding, whose gradient is then exactly 0."""
    # Samples this close differ by the rounding of the layers before, not by structure: nothing to compare.
    floor = len(k_BB) * 4 * torch.finfo(k_BB.dtype).eps
    total = k_BB.square().sum()  # not a dot product, which loses digits of many samples
    return torch.where(total > floor**2, total, torch.inf).rsqrt()


# Paper: Ma et al., eq. 3. Deviation: the authors of ScaleFL train with "cka" only.
def _regularised(k_BB: Tensor) -> Tensor:
    m = len(k_BB)
    ridge_BB = EPSILON * m * torch.eye(m, dtype=k_BB.dtype, device=k_BB.device)
    # K̄ and (K̄ + εmI)⁻¹ commute, so solving from the left gives the same product.
    solved_BB: Tensor = torch.linalg.solve(k_BB + ridge_BB, k_BB)
    return solved_BB
