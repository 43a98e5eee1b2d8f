"""Laws of the one mean."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scalefl.aggregate import FINE, FINE_LIMIT, LIMIT, Total, add_fine, check, largest
from scalefl.coords import add, extract, take, whole
from scalefl.errors import BadUpdate
from scalefl.types import ClientTask, ClientUpdate, LocalWork, Receipt, Step
from support import copied, identical

MODEST = settings(max_examples=80, deadline=None)
SEEDS = st.integers(0, 2**40)
WEIGHTS = st.lists(st.integers(1, 10**5), min_size=1, max_size=9)
# Sizes of the values that clients may hold, from nothing to where a run counts as diverged.
SCALES = st.sampled_from([0.0, 1e-30, 1e-12, 1e-6, 1e-3, 1.0, 30.0, 1e3, 1e6, 1e10])


def _add(total, params, weight, coords):
    """As the loop does, once `check` has passed the update."""
    total.add(params, weight, coords, {name: largest(tensor) for name, tensor in params.items()})


def values(seed: int, count: int, scale: float, dtype: torch.dtype = torch.float32, shape=(2, 3)) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=draw, dtype=torch.float64) * scale).to(dtype) for _ in range(count)]


def mixed(seed: int, count: int, dtype: torch.dtype = torch.float32, shape=(4, 5)) -> list[Tensor]:
    """Magnitudes from 1e-12 to 1e9 side by side, in one tensor and between clients."""
    draw = torch.Generator().manual_seed(seed)
    powers = torch.randint(-12, 10, (count, *shape), generator=draw).double()
    noise = torch.randn(count, *shape, generator=draw, dtype=torch.float64)
    return [row.to(dtype) for row in noise * 10**powers]


def mean_of(tensors: list[Tensor], weights: list[int], order: list[int], base: Tensor, limit: int = 0) -> Tensor:
    total = Total({"a": base}, limit or sum(weights))
    for i in order:
        _add(total, {"a": tensors[i]}, weights[i], whole(["a"]))
    return total.mean({"a": base})["a"]


def exact(tensors: list[Tensor], weights: list[int]) -> list[float]:
    """The weighted mean in rational arithmetic."""
    flat = [t.flatten().tolist() for t in tensors]
    total = sum(weights)
    sums = [sum(Fraction(t[i]) * w for t, w in zip(flat, weights, strict=True)) for i in range(len(flat[0]))]
    return [float(s / total) for s in sums]


def bound(count: int, weights: list[int], expected: float, dtype: torch.dtype) -> float:
    """As the module promises: 2⁻⁴⁸ for each client, on a scale of at most twice the weights; then the cast."""
    scale = 2.0 ** math.ceil(math.log2(sum(weights))) / sum(weights)
    rounding = torch.finfo(dtype).eps if dtype != torch.float64 else 2**-50
    return count * FINE / 2 * scale * 1.01 + abs(expected) * rounding + torch.finfo(dtype).tiny


@MODEST
@given(WEIGHTS, SCALES, SEEDS, st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
def test_full_coordinates_are_the_weighted_mean(weights, scale, seed, dtype):
    scale = min(scale, 1e3) if dtype == torch.float16 else scale
    tensors = values(seed, len(weights), scale, dtype)
    order = list(range(len(weights)))
    found = mean_of(tensors, weights, order, torch.zeros(2, 3, dtype=dtype))
    assert found.dtype == dtype
    for x, y in zip(found.flatten().tolist(), exact(tensors, weights), strict=True):
        slack = bound(len(weights), weights, y, dtype)
        if dtype == torch.float64:  # whose products x·w are rounded before they meet the grid
            slack += len(weights) * 2.0**-52 * float(torch.stack(tensors).abs().max())
        assert abs(x - y) <= slack, (x, y)


@MODEST
@given(WEIGHTS, SEEDS)
def test_mixed_magnitudes_cancel_exactly_enough(weights, seed):
    """Large values of opposite sign must not wipe out small ones beyond the module's bound."""
    tensors = mixed(seed, len(weights))
    tensors += [-t for t in tensors] + values(seed + 1, 1, 1e-3, shape=(4, 5))
    weights = weights + weights + [7]
    found = mean_of(tensors, weights, list(range(len(tensors))), torch.zeros(4, 5))
    for x, y in zip(found.flatten().tolist(), exact(tensors, weights), strict=True):
        assert abs(x - y) <= bound(len(weights), weights, y, torch.float32)


@MODEST
@given(st.data(), WEIGHTS, SEEDS, st.sampled_from([torch.float32, torch.float64, torch.int64]))
def test_no_order_changes_a_bit(data, weights, seed, dtype):
    tensors = mixed(seed, len(weights), dtype)
    if data.draw(st.booleans(), label="all tiny"):
        tensors = values(seed, len(weights), 1e-13, dtype, (4, 5))
    count, base = len(weights), torch.zeros(4, 5, dtype=dtype)
    before = [t.clone() for t in tensors]
    reference = mean_of(tensors, weights, list(range(count)), base)
    order = data.draw(st.permutations(range(count)))
    assert torch.equal(mean_of(tensors, weights, order, base), reference)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True)), "a client's tensors were changed"


@MODEST
@given(st.data(), st.integers(2, 6), SEEDS)
def test_values_at_the_limit_of_the_fine_grid(data, count, seed):
    """Just under, at and just over `FINE_LIMIT`, with every weight alike: the fine grid is at its fullest."""
    edge = torch.tensor(FINE_LIMIT)
    near = torch.stack([edge, edge.nextafter(torch.tensor(0.0)), edge.nextafter(torch.tensor(99.0)), -edge])
    draw = torch.Generator().manual_seed(seed)
    tensors = [near[torch.randint(0, 4, (4,), generator=draw)] for _ in range(count)]
    weights = [data.draw(st.sampled_from([1, 2**20, 2**31 - 1])) for _ in range(count)]
    base = torch.zeros(4)
    found = mean_of(tensors, weights, list(range(count)), base)
    assert torch.equal(found, mean_of(tensors, weights, data.draw(st.permutations(range(count))), base))
    for x, y in zip(found.tolist(), exact(tensors, weights), strict=True):
        assert abs(x - y) <= bound(count, weights, y, torch.float32)


def test_a_thousand_clients_at_the_limits():
    """The sums stay whole numbers below 2⁵³ when many clients all sit at the edge of what is allowed."""
    draw = torch.Generator().manual_seed(0)
    for size in (FINE_LIMIT, FINE_LIMIT * 1.001, LIMIT * 0.999):
        tensors = [torch.full((3,), size).mul_(1 - torch.rand(3, generator=draw) * 1e-6) for _ in range(1000)]
        weights = [600] * 1000
        forwards = mean_of(tensors, weights, list(range(1000)), torch.zeros(3))
        assert torch.equal(forwards, mean_of(tensors, weights, list(range(999, -1, -1)), torch.zeros(3)))
        for x, y in zip(forwards.tolist(), exact(tensors, weights), strict=True):
            assert abs(x - y) <= bound(1000, weights, y, torch.float32)


@MODEST
@given(WEIGHTS, st.data(), SEEDS)
def test_equal_clients_give_back_the_same_tensor(weights, data, seed):
    scale = data.draw(st.sampled_from([1e-3, 1.0, 20.0, 1e4, 1e8]))
    tensor = values(seed, 1, scale, shape=(50,))[0]
    # From here on, half a float32's spacing is more than the grid's rounding of all clients together.
    tensor[tensor.abs() < max(1e-5 * scale, len(weights) * 2.0**-21)] = 0.0
    tensor[0] = 0.0
    found = mean_of([tensor] * len(weights), weights, list(range(len(weights))), torch.ones(50))
    assert torch.equal(found, tensor)


@MODEST
@given(WEIGHTS, st.lists(st.integers(-(10**9), 10**12), min_size=3, max_size=3), SEEDS)
def test_integers_become_the_rounded_mean(weights, numbers, seed):
    draw = torch.Generator().manual_seed(seed)
    tensors = [torch.tensor(numbers) + torch.randint(-9, 9, (3,), generator=draw) for _ in weights]
    found = mean_of(tensors, weights, list(range(len(weights))), torch.zeros(3, dtype=torch.int64))
    assert found.dtype == torch.int64
    for x, y in zip(found.tolist(), exact(tensors, weights), strict=True):
        assert abs(x - y) <= 0.5 + 1e-3


def test_a_counter_that_is_a_scalar_and_an_empty_tensor():
    total = Total({"n": torch.tensor(0), "e": torch.zeros(0, 3)}, 4)
    for count in (10, 11):
        _add(total, {"n": torch.tensor(count), "e": torch.zeros(0, 3)}, 2, whole(["n", "e"]))
    mean = total.mean({"n": torch.tensor(3), "e": torch.zeros(0, 3)})
    assert mean["n"].shape == () and int(mean["n"]) in (10, 11)
    assert mean["e"].shape == (0, 3)


def test_lost_clients_only_widen_the_bound():
    """The scale is set by the weights that were planned; the mean is by those that came."""
    tensors, weights = values(3, 2, 1.0), [3, 5]
    found = mean_of(tensors, weights, [0, 1], torch.zeros(2, 3), limit=10**6)
    for x, y in zip(found.flatten().tolist(), exact(tensors, weights), strict=True):
        assert abs(x - y) <= 2 * FINE / 2 * 2**20 / 8 + abs(y) * 2**-23


# Windows.


def window_of(data: st.DataObject, shape: tuple[int, ...]) -> tuple[Tensor | None, ...]:
    """Any set of indices along each dimension, in any order."""
    window: list[Tensor | None] = []
    for size in shape:
        chosen = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=size, unique=True))
        window.append(data.draw(st.sampled_from([None, torch.tensor(chosen)])))
    return tuple(window)


@MODEST
@given(st.data(), st.sampled_from([(4,), (3, 5), (2, 3, 4)]), SEEDS)
def test_what_is_extracted_goes_back_to_its_place(data, shape, seed):
    (tensor,) = values(seed, 1, 1.0, shape=shape)
    window = data.draw(st.sampled_from([None, window_of(data, shape)]))
    held, back = torch.zeros(shape), torch.zeros(shape)
    add(held, window, 1)
    add(back, window, extract({"a": tensor}, {"a": window})["a"])
    assert int(held.sum()) == take(tensor, window).numel()
    assert torch.equal(back, tensor * held)


@MODEST
@given(st.data(), WEIGHTS, SEEDS, st.sampled_from([torch.float32, torch.int64]))
def test_overlapping_windows_average_over_holders_only(data, weights, seed, dtype):
    shape = (3, 5)
    clients = [t.round() if dtype == torch.int64 else t for t in values(seed, len(weights), 20.0, shape=shape)]
    clients = [t.to(dtype) for t in clients]
    windows = [data.draw(st.sampled_from([None, window_of(data, shape)])) for _ in weights]
    base = torch.full(shape, 77).to(dtype)
    if dtype == torch.float32:
        base[0, 0], base[1, 1] = torch.nan, -0.0
    orders = [range(len(weights)), data.draw(st.permutations(range(len(weights))))]
    means = []
    for order in orders:
        total = Total({"a": base}, sum(weights))
        for i in order:
            _add(total, {"a": take(clients[i], windows[i])}, weights[i], {"a": windows[i]})
        means.append(total.mean({"a": base})["a"])
    assert identical({"a": means[0]}, {"a": means[1]})

    holders = torch.zeros(len(weights), *shape, dtype=torch.int64)
    for i, window in enumerate(windows):
        add(holders[i], window, 1)
    held = holders.sum(0) > 0
    assert identical({"a": means[0][~held]}, {"a": base[~held]}), "a coordinate that nobody trained moved"
    for where in held.nonzero().tolist():
        at = tuple(where)
        own = [i for i in range(len(weights)) if holders[(i, *at)]]
        (wanted,) = exact([clients[i][at] for i in own], [weights[i] for i in own])
        slack = 0.5 + 1e-6 if dtype == torch.int64 else 1e-5
        assert abs(float(means[0][at]) - wanted) <= slack


def test_only_names_that_moved_are_in_the_mean():
    base = {"a": torch.ones(2), "b": torch.ones(3)}
    total = Total(base, 4)
    _add(total, {"a": torch.zeros(2)}, 4, whole(base))
    assert total.mean(base).keys() == {"a"}


# What must not enter the mean.


def update(changes: dict[str, Tensor | None] | None = None, num_examples: int = 5) -> ClientUpdate:
    params: dict[str, Tensor] = {"w": torch.ones(2, 3), "n": torch.tensor(4), "h": torch.ones(3, dtype=torch.bfloat16)}
    for name, tensor in (changes or {}).items():
        if tensor is None:
            del params[name]
        else:
            params[name] = tensor
    return ClientUpdate(7, params, num_examples, {}, Receipt())


EXPECTED = update().params
TASK = ClientTask(7, 12, (Step(None, frozenset("wh"), frozenset(EXPECTED), (), LocalWork()),), 0)  # type: ignore[arg-type]


def with_value(value: float) -> Tensor:
    tensor = torch.ones(2, 3)
    tensor[1, 2] = value
    return tensor


def test_check_accepts_what_was_asked_for():
    check(TASK, update(), EXPECTED, 5)
    check(TASK, update({"w": with_value(-999)}, num_examples=1), EXPECTED, 5)
    check(TASK, update({"w": with_value(1e12)}), {**EXPECTED, "w": with_value(2e9)}, 5)
    check(TASK, update({"n": torch.tensor(10**12)}), EXPECTED, 5)  # a counter may be large, as statistics may


@pytest.mark.parametrize(
    ("changes", "name", "why"),
    [
        ({"w": with_value(math.nan)}, "w", "NaN"),
        ({"w": with_value(math.inf)}, "w", "infinity"),
        ({"w": with_value(-math.inf)}, "w", "infinity"),
        ({"w": with_value(1e13)}, "w", "4e12"),
        ({"w": with_value(-1001)}, "w", "has grown to 1e+03: the client's training has diverged"),
        ({"h": torch.tensor([1, math.nan, 1], dtype=torch.bfloat16)}, "h", "NaN"),
        ({"n": torch.tensor(2**62)}, "n", "4e12"),
        ({"n": torch.tensor(-(2**63))}, "n", "4e12"),  # whose absolute value overflows
        ({"w": torch.ones(3, 2)}, "w", "(3, 2)"),
        ({"w": torch.ones(6)}, "w", "(6,)"),
        ({"w": torch.ones(2, 3, dtype=torch.float64)}, "w", "float64"),
        ({"n": torch.tensor(4.0)}, "n", "float32"),
        ({"w": None}, "w", "missing"),
        ({"x": torch.ones(1)}, "x", "not asked for"),
    ],
)
def test_check_refuses(changes, name, why):
    with pytest.raises(BadUpdate) as caught:
        check(TASK, update(changes), EXPECTED, 5)
    assert (caught.value.client_id, caught.value.round, caught.value.name) == (7, 12, name)
    assert why in str(caught.value)


@pytest.mark.parametrize("weight", [0, -3, 6, 10**12])
def test_check_refuses_a_weight_that_is_none(weight):
    with pytest.raises(BadUpdate, match="weight"):
        check(TASK, update(num_examples=weight), EXPECTED, 5)


def test_a_total_leaves_the_reference_alone():
    base = {"a": torch.randn(3, generator=torch.Generator().manual_seed(0))}
    before = copied(base)
    total = Total(base, 2)
    _add(total, {"a": torch.zeros(3)}, 2, whole(base))
    total.mean(base)["a"].fill_(9)
    assert identical(base, before)


def test_tensors_added_together_and_in_pieces_are_those_added_alone(monkeypatch):
    monkeypatch.setattr("scalefl.aggregate.PIECE", 8)
    sizes = (3, 20, 0, 5, 1, 8, 17)
    tensors = [torch.randn(size) for size in sizes]
    together, alone = ([torch.zeros(size, dtype=torch.float64) for size in sizes] for _ in range(2))
    add_fine(together, tensors, 3, 4.0)
    for total, tensor in zip(alone, tensors, strict=True):
        total += (tensor.double() * (3 / 4.0 / FINE)).round()
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
