import random

import msgspec
import numpy as np
import pytest
import torch

from scalefl.data import Capability, Dirichlet, Iid, Natural, Partitioner, Pathological, Shards, partition
from scalefl.errors import ConfigError, DataError

LABELS = torch.arange(10).repeat(40)
IDS = torch.arange(400) % 7


def share(config, num_clients=8, labels=LABELS, groups=None, seed=0, ids=None):
    groups = [0] * num_clients if groups is None else groups
    return partition(config, labels, num_clients, groups=groups, natural_ids=ids, seed=seed)


def labels_of(parts, labels=LABELS):
    return [set(labels[part].tolist()) for part in parts]


ALL = [
    Iid(),
    Dirichlet(alpha=0.3),
    Shards(),
    Pathological(),
    Natural(column="id"),
    Capability(correlation=0.7),
]


@pytest.mark.parametrize("config", ALL, ids=lambda c: type(c).__name__)
def test_rows_go_to_one_client_by_seed_and_without_global_randomness(config):
    clients = 7 if isinstance(config, Natural) else 8 if not isinstance(config, Pathological) else 20
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first, again, other = (share(config, clients, seed=seed, ids=IDS) for seed in (0, 0, 1))
    assert torch.cat(first).sort().values.tolist() == list(range(len(LABELS)))
    assert all(part.dtype == torch.int64 and part.tolist() == sorted(part.tolist()) for part in first)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_iid_sizes_differ_by_one_at_most():
    assert {len(part) for part in share(Iid(), 7)} == {57, 58}


def test_dirichlet_keeps_the_least_size():
    assert min(len(part) for part in share(Dirichlet(alpha=1.0, min_size=10))) >= 10


def test_dirichlet_with_an_impossible_least_size_is_refused_with_the_numbers():
    with pytest.raises(ConfigError, match=r"alpha=0\.01, min_size=50\) on 400 rows and 8 clients"):
        share(Dirichlet(alpha=0.01, min_size=50))


def test_dirichlet_with_a_small_alpha_may_leave_clients_empty():
    parts = share(Dirichlet(alpha=0.01), 50)
    assert min(len(part) for part in parts) == 0
    assert sum(len(part) for part in parts) == 400


def test_shards_give_few_labels_and_leave_the_remainder_out():
    parts = share(Shards(shards_per_client=2), 7)
    assert {len(part) for part in parts} == {2 * (400 // 14)}
    assert max(len(labels) for labels in labels_of(parts)) <= 4
    assert len(torch.cat(parts).unique()) == 14 * (400 // 14)


def test_pathological_gives_each_client_exactly_so_many_labels():
    assert {len(labels) for labels in labels_of(share(Pathological(classes_per_client=3), 20))} == {3}


def test_pathological_asking_for_more_labels_than_there_are_is_refused():
    with pytest.raises(ConfigError, match="11"):
        share(Pathological(classes_per_client=11))


def test_natural_gives_each_client_the_rows_of_one_id():
    parts = share(Natural(column="id"), 5, ids=IDS)
    owners = [set(IDS[part].tolist()) for part in parts]
    assert all(len(owner) == 1 for owner in owners)
    assert len(set.union(*owners)) == 5


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (None, DataError, "'id'"),
        (IDS, ConfigError, "7 values, too few for 8 clients"),
        (IDS.float(), DataError, "float32"),
    ],
)
def test_natural_without_enough_ids_is_refused(ids, error, message):
    with pytest.raises(error, match=message):
        share(Natural(column="id"), 8, ids=ids)


@pytest.mark.parametrize(
    ("config", "clients", "message"),
    [
        (Iid(), 401, "401 clients cannot share 400 rows"),
        (Capability(correlation=0.5), 401, "401 clients"),
        (Iid(), 0, "num_clients = 0"),
        (Shards(shards_per_client=60), 8, r"8 clients × 60 shards > 400 rows"),
    ],
)
def test_more_clients_than_rows_are_refused(config, clients, message):
    with pytest.raises(ConfigError, match=message):
        share(config, clients)


def test_no_rows_are_refused():
    with pytest.raises(DataError, match="no rows"):
        share(Iid(), labels=LABELS[:0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: Dirichlet(alpha=0.0),
        lambda: Dirichlet(alpha=float("nan")),
        lambda: Dirichlet(alpha=1.0, min_size=-1),
        lambda: Shards(shards_per_client=0),
        lambda: Pathological(classes_per_client=-2),
        lambda: Capability(correlation=1.1),
        lambda: Capability(correlation=0.5, alpha=-1.0),
    ],
)
def test_settings_out_of_range_are_refused(make):
    with pytest.raises(ConfigError, match="expected"):
        make()


def test_capability_needs_the_class_of_each_client():
    with pytest.raises(ConfigError, match="3 device classes were given for 8 clients"):
        share(Capability(correlation=1.0), groups=[0, 1, 2])


def test_full_correlation_separates_the_device_classes():
    groups = [0] * 10 + [1] * 6 + [2] * 4
    held = labels_of(share(Capability(correlation=1.0), 20, groups=groups))
    by_group = [set.union(*(h for h, g in zip(held, groups, strict=True) if g == group)) for group in range(3)]
    assert [len(labels) for labels in by_group] == [5, 3, 2]
    assert set.union(*by_group) == set(range(10))


def test_no_correlation_does_not_look_at_the_device_class():
    groups = [0] * 10 + [1] * 10
    split, joint = (share(Capability(correlation=0.0), 20, groups=g) for g in (groups, groups))
    assert all(torch.equal(a, b) for a, b in zip(split, joint, strict=True))
    assert len(set.union(*labels_of(split)[:10])) == 10


@pytest.mark.parametrize("alpha", [0.001, 1.0, 1e6])
def test_clients_have_nearly_the_same_size_where_the_labels_allow(alpha):
    labels = torch.arange(10).repeat(30)
    sizes = [len(part) for part in share(Capability(correlation=0.5, alpha=alpha), 100, labels, [0] * 60 + [1] * 40)]
    assert sum(sizes) == 300
    assert sorted(sizes)[10] >= 2
    assert sorted(sizes)[-10] <= 4


def test_fewer_labels_than_device_classes_are_shared_by_neighbours():
    labels = torch.arange(2).repeat(50)
    groups = [0, 1, 2, 3]
    held = labels_of(share(Capability(correlation=1.0), 4, labels, groups), labels)
    assert held[0] == held[1]
    assert held[2] == held[3]
    assert held[0] != held[2]


def test_a_small_alpha_gives_clients_few_labels():
    few, many = (
        np.mean([len(labels) for labels in labels_of(share(Capability(correlation=0.0, alpha=alpha), 20))])
        for alpha in (0.01, 100.0)
    )
    assert few < 4 < 9 < many


def test_partitioners_are_read_by_kind():
    config = msgspec.convert({"kind": "capability", "correlation": 1, "alpha": 0.5}, Partitioner)
    assert config == Capability(correlation=1.0, alpha=0.5)
    assert msgspec.to_builtins(Iid()) == {"kind": "iid"}
    with pytest.raises(msgspec.ValidationError, match="beta"):
        msgspec.convert({"kind": "dirichlet", "alpha": 1, "beta": 1}, Partitioner)
