"""Laws of nHSIC, against a reference written from the formulas of method.md in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scalefl.hsic import (
    EPSILON,
    SIGMA,
    Form,
    centred_kernel,
    inner_product,
    likeness,
    nhsic,
    normalised_kernel,
)

MODEST = settings(max_examples=60, deadline=None)
SEEDS = st.integers(0, 2**40)
BATCHES = st.integers(2, 24)
FORMS: tuple[Form, ...] = ("cka", "cca")


def features(seed: int, m: int, d: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(m, d, generator=draw, dtype=torch.float64) * scale).to(dtype)


def related(seed: int, m: int, d: int) -> tuple[Tensor, Tensor]:
    """Two representations that share something."""
    a = features(seed, m, d)
    return a, torch.tanh(a @ features(seed + 1, d, 3)) + 0.3 * features(seed + 2, m, 3)


def reference_kernel(a: Tensor, sigma: float = SIGMA) -> Tensor:
    """K̄ = H K H with H = I − 11ᵀ/m, sample by sample."""
    a = a.double().flatten(1)
    m, d = a.shape
    k = a.new_tensor([[math.exp(-float((x - y).square().sum()) / (2 * sigma**2 * d)) for y in a] for x in a])
    h = torch.eye(m, dtype=torch.float64) - 1 / m
    return h @ k @ h


def reference(a: Tensor, b: Tensor, form: Form, sigma: float = SIGMA) -> float:
    ka, kb = reference_kernel(a, sigma), reference_kernel(b, sigma)
    if form == "cka":
        return float((ka * kb).sum() / (ka.norm() * kb.norm()))
    ridge = EPSILON * len(a) * torch.eye(len(a), dtype=torch.float64)
    ra, rb = ka @ torch.linalg.inv(ka + ridge), kb @ torch.linalg.inv(kb + ridge)
    return float(torch.trace(ra @ rb))


@MODEST
@given(SEEDS, BATCHES, st.integers(1, 12), st.sampled_from(FORMS), st.sampled_from([0.5, 5.0]))
def test_equals_the_formula(seed, m, d, form, sigma):
    a, b = related(seed, m, d)
    assert float(nhsic(a, b, form, sigma)) == pytest.approx(reference(a, b, form, sigma), rel=1e-7, abs=1e-9)


@MODEST
@given(SEEDS, BATCHES, st.integers(1, 12))
def test_cka_is_a_correlation(seed, m, d):
    a, b = related(seed, m, d)
    assert -1e-12 <= float(nhsic(a, b)) <= 1 + 1e-12
    assert float(nhsic(a, a)) == pytest.approx(1, abs=1e-12)
    if centred_kernel(a).norm() > 1e-4:  # far above the floor of the next test
        assert float(nhsic(a.float(), a.float())) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("power", range(0, 24, 2))
def test_features_that_collapse(power):
    """As samples come together the value with itself stays 1 until it is 0: never noise, never a huge gradient."""
    a = (1 + features(0, 16, 40, 10.0**-power)).float().requires_grad_()
    value = nhsic(a, a)
    assert value.item() == pytest.approx(1, abs=1e-4) if power <= 2 else value.item() in (0, pytest.approx(1, abs=0.01))
    (grad,) = torch.autograd.grad(nhsic(a, features(1, 16, 40, dtype=torch.float32)), a)
    assert bool(grad.isfinite().all()) and float(grad.norm()) < 1e4


@MODEST
@given(SEEDS, BATCHES, st.integers(1, 12), st.sampled_from(FORMS))
def test_symmetric(seed, m, d, form):
    a, b = related(seed, m, d)
    assert float(nhsic(a, b, form)) == pytest.approx(float(nhsic(b, a, form)), rel=1e-8, abs=1e-10)


@MODEST
@given(SEEDS, BATCHES, st.integers(1, 12), st.sampled_from(FORMS))
def test_invariant_to_row_order_orthogonal_maps_and_shifts(seed, m, d, form):
    a, b = related(seed, m, d)
    value = float(nhsic(a, b, form))
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    assert float(nhsic(a[order], b[order], form)) == pytest.approx(value, rel=1e-7, abs=1e-9)
    rotation, _ = torch.linalg.qr(features(seed + 3, d, d))
    assert float(nhsic(a @ rotation + 100 * features(seed + 4, 1, d), b, form)) == pytest.approx(
        value, rel=1e-6, abs=1e-8
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", ["one class", "one sample", "equal features", "huge equal features"])
def test_a_batch_without_structure_gives_exactly_zero(form, dtype, rows):
    m = 1 if rows == "one sample" else 16
    z = features(0, m, 33, dtype=dtype).requires_grad_()
    other = F.one_hot(torch.full((m,), 2), 10).to(dtype)
    if "equal" in rows:
        other = features(1, 1, 70, 1e4 if "huge" in rows else 0.1, dtype).expand(m, -1)
    other = other.clone().requires_grad_()
    for a, b in ((z, other), (other, z)):
        value = nhsic(a, b, form)
        assert value.item() == 0
        grads = torch.autograd.grad(value, (z, other))
        assert all(bool(grad.isfinite().all()) for grad in grads)
        assert bool((grads[0] == 0).all())
    if form == "cka":  # by hand, too
        for trained, constant in ((z, other.detach()), (other, z.detach())):
            value = nhsic(trained, constant)
            (grad,) = torch.autograd.grad(value, trained)
            assert value.item() == 0 and bool((grad == 0).all())


@pytest.mark.parametrize("form", FORMS)
def test_both_without_structure(form):
    y = torch.ones(8, 3, requires_grad=True)
    value = nhsic(y, y, form)
    assert value.item() == 0
    value.backward()
    assert torch.equal(y.grad, torch.zeros(8, 3))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("m", [2, 3, 7])
def test_gradcheck(form, m):
    a, b = related(5, m, 4)
    a, b = a.requires_grad_(), b.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: nhsic(a, b, form), (a, b), atol=1e-6, rtol=1e-5)


def test_gradient_where_two_samples_coincide():
    """‖a − b‖ has a kink at 0, ‖a − b‖² has none: duplicates in a batch must not give NaN."""
    a = features(0, 6, 5)
    a[3] = a[1]
    a.requires_grad_()
    (grad,) = torch.autograd.grad(nhsic(a, features(1, 6, 4)), a)
    assert bool(grad.isfinite().all()) and float(grad.abs().max()) > 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("m", "d", "scale", "shift"),
    [(32, 3072, 0.5, 0.0), (128, 3072, 1.0, 0.0), (64, 16384, 0.3, 5.0), (64, 512, 0.02, 0.0), (64, 100, 3.0, 50.0)],
)
def test_float32_is_accurate(form, m, d, scale, shift):
    """Wide features, small ones (late layers) and ones with a large mean (after ReLU)."""
    a = features(7, m, d, scale) + shift
    b = F.one_hot(torch.arange(m) % 10, 10).double() + 0.1 * a[:, :10]
    error = 1e-4 if form == "cka" else 5e-3
    exact = float(nhsic(a, b, form))
    assert float(nhsic(a.float(), b.float(), form)) == pytest.approx(exact, rel=error)
    gradients = []
    for features_a, features_b in ((a, b), (a.float(), b.float())):
        trained = features_a.clone().requires_grad_()
        nhsic(trained, features_b, form).backward()
        gradients.append(trained.grad.double())
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < error


@pytest.mark.parametrize("classes", [10, 100, 1000, 20000])
def test_float32_labels_of_many_classes(classes):
    """One-hot rows of K classes lie √2 apart on a scale of σ√K: kernels near 1, where rounding bites."""
    labels = torch.arange(40) % 9
    y, z = F.one_hot(labels, classes), features(3, 40, 64) + 2 * features(4, 9, 64)[labels]
    assert float(nhsic(y.float(), z.float())) == pytest.approx(float(nhsic(y.double(), z)), rel=1e-4)
    assert float(nhsic(y.float(), z.float())) > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_of_half_precision_features_are_float32(dtype):
    a = features(0, 12, 40).to(dtype)
    assert centred_kernel(a).dtype == torch.float32
    assert float(nhsic(a, features(1, 12, 6, dtype=torch.float32))) == pytest.approx(
        float(nhsic(a.float(), features(1, 12, 6, dtype=torch.float32))), rel=1e-6
    )


def test_features_of_any_shape_are_flattened():
    a, b = features(0, 6, 24), features(1, 6, 5)
    assert torch.equal(nhsic(a.view(6, 2, 3, 4), b), nhsic(a, b))


def test_the_biased_estimator_falls_with_more_samples():
    """Independent noise, 512 against 3072 dimensions: .98, .93, .88 at 16, 64 and 128 samples (method.md)."""
    values = [float(nhsic(features(0, m, 512), features(1, m, 3072))) for m in (16, 64, 128)]
    assert values == pytest.approx([0.98, 0.93, 0.88], abs=0.01)


@pytest.mark.parametrize("m", [2, 3, 7])
@pytest.mark.parametrize("first", [True, False])
def test_gradcheck_by_hand(m, first):
    a, b = related(5, m, 4)
    a.requires_grad_()
    value = (lambda a: nhsic(a, b)) if first else (lambda a: nhsic(b, a))
    assert "Likeness" in value(a).grad_fn.name()
    assert torch.autograd.gradcheck(value, [a], atol=1e-6, rtol=1e-5, check_batched_grad=True)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # of what jvp imports
def test_forward_mode_without_gradients():
    a, b = related(5, 6, 4)
    tangent = features(9, 6, 4)
    a.requires_grad_()
    (gradient,) = torch.autograd.grad(nhsic(a, b), a)
    with torch.no_grad():
        _, found = torch.func.jvp(lambda a: nhsic(a, b), (a.detach(),), (tangent,))
    torch.testing.assert_close(found, (gradient * tangent).sum())


def test_autocast_leaves_the_value_alone():
    a, b = features(1, 16, 40, dtype=torch.float32), features(2, 16, 30, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = nhsic(a, b)
    assert torch.equal(found, nhsic(a, b)) and found.dtype == torch.float32


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_several_batches_at_once_are_those_of_each(form: Form) -> None:
    a, b = (torch.stack([features(seed, 8, 5) for seed in seeds]) for seeds in ((1, 2), (3, 4)))
    together, alone = (b.clone().requires_grad_() for _ in range(2))
    torch.func.vmap(lambda x, z: nhsic(x, z, form))(a, together).sum().backward()
    for x, z in zip(a, alone, strict=True):
        nhsic(x, z, form).backward()
    torch.testing.assert_close(together.grad, alone.grad)


@MODEST
@given(SEEDS, BATCHES, st.integers(1, 12), st.sampled_from([0.5, 5.0]))
def test_the_gradient_by_hand_is_that_of_autograd(seed, m, d, sigma):
    """For a weighted sum of two terms, as the mentor asks for it; two samples coincide."""
    a, b = related(seed, m, d)
    a[-1] = a[0]
    target = 3 * normalised_kernel(b, sigma=sigma) - 2 * normalised_kernel(features(seed + 5, m, 4), sigma=sigma)
    by_hand, by_autograd = (a.clone().requires_grad_() for _ in range(2))
    value, expected = (
        likeness(by_hand, target, sigma=sigma),
        inner_product(normalised_kernel(by_autograd, sigma=sigma), target),
    )
    assert value.grad_fn is not None and "Likeness" in value.grad_fn.name()
    torch.testing.assert_close(value, expected)
    (7 * value).backward()
    (7 * expected).backward()
    torch.testing.assert_close(by_hand.grad, by_autograd.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_leaves_the_gradient_alone(dtype):
    b = features(2, 16, 30, dtype=torch.float32)
    plain, cast = (features(1, 16, 40).to(dtype).requires_grad_() for _ in range(2))
    nhsic(plain, b).backward()
    with torch.autocast("cpu", torch.bfloat16):
        nhsic(cast, b).backward()
    assert torch.equal(plain.grad, cast.grad) and plain.grad.any()


def test_sums_over_many_samples_keep_their_digits():
    a = features(0, 1200, 40, dtype=torch.float32)
    assert float(nhsic(a, a)) == pytest.approx(1, abs=5e-7)


def test_the_value_may_be_changed_in_place():
    a, b = features(0, 6, 5).requires_grad_(), features(1, 6, 4)
    (expected,) = torch.autograd.grad(nhsic(a, b), a)
    value = nhsic(a, b)
    value += 1
    value.backward()
    assert torch.equal(a.grad, expected)


def test_a_second_derivative_is_refused():
    a = features(0, 6, 5).requires_grad_()
    with pytest.raises(RuntimeError, match="differentiated once only"):
        torch.autograd.grad(nhsic(a, features(1, 6, 4)), a, create_graph=True)


def test_the_gradient_of_a_kernel_is_right_whatever_comes_after_it() -> None:
    a = features(1, 6, 4).requires_grad_()
    weights = features(2, 6, 6)
    assert torch.autograd.gradcheck(lambda a: (centred_kernel(a) * weights).sum(), [a])


def test_a_kernel_of_shapes_alone() -> None:
    assert centred_kernel(torch.empty(4, 3, device="meta")).shape == (4, 4)
