"""Laws of every partition: no row twice, the same for the same seed and, where promised, every row."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scalefl.data import Capability, Dirichlet, Iid, Shards, partition, stratified_split
from scalefl.data.partitioners import largest_remainder

LABELS = st.lists(st.integers(0, 6), min_size=1, max_size=80).map(torch.tensor)
SEEDS = st.integers(0, 2**40)
MODEST = settings(max_examples=40, deadline=None)


def rows_of(parts):
    return torch.cat(parts).sort().values.tolist()


@MODEST
@given(LABELS, st.data(), SEEDS)
def test_flower_partitions_cover_the_rows(labels, data, seed):
    num_clients = data.draw(st.integers(1, min(len(labels), 8)))
    config = data.draw(st.sampled_from([Iid(), Dirichlet(alpha=0.2), Shards(shards_per_client=1)]))
    first, again = (partition(config, labels, num_clients, groups=[], seed=seed) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    num_rows = len(labels) - len(labels) % num_clients if isinstance(config, Shards) else len(labels)
    assert len(rows_of(first)) == len(set(rows_of(first))) == num_rows


@settings(max_examples=150, deadline=None)
@given(LABELS, st.data(), SEEDS, st.floats(0, 1), st.floats(1e-3, 1e3))
def test_capability_gives_every_row_to_exactly_one_client(labels, data, seed, correlation, alpha):
    groups = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=min(len(labels), 15)))
    config = Capability(correlation=correlation, alpha=alpha)
    first, again = (partition(config, labels, len(groups), groups=groups, seed=seed) for _ in range(2))
    assert rows_of(first) == list(range(len(labels)))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@settings(max_examples=100, deadline=None)
@given(LABELS, st.data(), SEEDS, st.floats(1e-3, 1e3))
def test_with_full_correlation_device_classes_hold_different_labels(labels, data, seed, alpha):
    most = min(len(labels), 15)
    groups = data.draw(st.lists(st.integers(0, len(labels.unique()) - 1), min_size=1, max_size=most))
    parts = partition(Capability(correlation=1, alpha=alpha), labels, len(groups), groups=groups, seed=seed)
    held = [{*labels[part].tolist()} for part in parts]
    for a, held_a in zip(groups, held, strict=True):
        for b, held_b in zip(groups, held, strict=True):
            assert a == b or not held_a & held_b


@MODEST
@given(LABELS, st.floats(0, 0.9), SEEDS)
def test_a_stratified_split_holds_out_each_label_in_proportion(labels, fraction, seed):
    kept, held_out = stratified_split(labels, fraction, torch.Generator().manual_seed(seed))
    assert rows_of([kept, held_out]) == list(range(len(labels)))
    assert len(held_out) == round(fraction * len(labels))
    expected = torch.bincount(labels) * len(held_out) / len(labels)
    assert (torch.bincount(labels[held_out], minlength=len(expected)) - expected).abs().max() < 1


@MODEST
@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=30).filter(lambda w: sum(w) > 1e-3),
    st.integers(0, 10**6),
)
def test_largest_remainders_sum_to_the_total(weights, total):
    weights = torch.tensor(weights, dtype=torch.float64).numpy()
    shares = largest_remainder(weights, total)
    assert shares.sum() == total
    assert abs(shares - weights / weights.sum() * total).max() <= 1
    assert not shares[weights == 0].any()
