import pytest
import torch

from scalefl.data import Capability, Dataset, FederatedData, Iid, Natural, PartitionedData
from scalefl.errors import ConfigError, DataError
from scalefl.problem import Classification, Column, num_rows, take

PROBLEM = Classification(3, (Column("x", (2,), "float32"),))


def batch(num_examples, **columns):
    label = torch.arange(num_examples) % 3
    return {"x": torch.arange(num_examples * 2.0).reshape(-1, 2), "label": label, **columns}


def partitioned(dataset=None, partitioner=None, num_clients=6, **options):
    dataset = dataset or Dataset(PROBLEM, batch(90), batch(12))
    options = {"groups": [0] * num_clients, "seed": 0, **options}
    return PartitionedData.from_dataset(dataset, partitioner or Iid(), num_clients, **options)


def test_clients_hold_each_training_row_once():
    data = partitioned()
    assert isinstance(data, FederatedData)
    assert data.num_clients == 6
    held = torch.cat([data.examples(client)["x"] for client in range(6)])
    assert sorted(held[:, 0].tolist()) == [2.0 * row for row in range(90)]
    for client in range(6):
        labels = data.examples(client)["label"]
        assert data.num_examples(client) == len(labels) == num_rows(data.examples(client))
        assert data.label_counts(client).tolist() == torch.bincount(labels, minlength=3).tolist()
    assert num_rows(data.validation) == 0
    assert num_rows(data.test) == 12


def test_validation_rows_are_stratified_and_belong_to_no_client():
    data = partitioned(validation_fraction=0.2)
    assert torch.bincount(data.validation["label"]).tolist() == [6, 6, 6]
    held = {x for client in range(6) for x in data.examples(client)["x"][:, 0].tolist()}
    validation = set(data.validation["x"][:, 0].tolist())
    assert not held & validation
    assert len(held | validation) == 90
    assert torch.equal(partitioned(validation_fraction=0.2).validation["x"], data.validation["x"])
    assert not torch.equal(partitioned(validation_fraction=0.2, seed=1).validation["x"], data.validation["x"])


def test_examples_are_copies():
    data = partitioned()
    data.examples(0)["x"].zero_()
    assert data.examples(0)["x"].sum() > 0


def test_a_client_without_rows_stays_empty():
    dataset = Dataset(PROBLEM, batch(6), batch(3))
    data = PartitionedData(dataset, [torch.arange(6), torch.arange(0)], torch.arange(0))
    assert data.num_examples(1) == num_rows(data.examples(1)) == 0
    assert data.label_counts(1).tolist() == [0, 0, 0]


@pytest.mark.parametrize("client", [-1, 6])
def test_a_client_that_is_not_there_is_an_index_error(client):
    with pytest.raises(IndexError, match="of 6"):
        partitioned().num_examples(client)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_validation_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ConfigError, match="validation_fraction"):
        partitioned(validation_fraction=fraction)


def test_natural_clients_follow_their_column_which_examples_then_lack():
    writer = torch.arange(90) // 15 * 7
    dataset = Dataset(PROBLEM, batch(90, writer=writer), batch(12))
    data = partitioned(dataset, Natural(column="writer"), validation_fraction=0.1)
    owners = [set(writer[data.indices(client)].tolist()) for client in range(6)]
    assert all(len(owner) == 1 for owner in owners)
    assert set(data.examples(0)) == {"x", "label"}
    with pytest.raises(DataError, match="no training column 'user' to partition by; columns: x, label, writer"):
        partitioned(dataset, Natural(column="user"))


def test_natural_partition_by_the_label_keeps_the_label():
    data = partitioned(None, Natural(column="label"), num_clients=3)
    assert sorted(data.label_counts(client).tolist() for client in range(3)) == [
        [0, 0, 30],
        [0, 30, 0],
        [30, 0, 0],
    ]


def test_capability_reads_the_groups():
    data = partitioned(partitioner=Capability(correlation=1.0), num_clients=3, groups=[0, 1, 2])
    assert sorted(data.label_counts(client).argmax().item() for client in range(3)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (batch(0), "no training rows"),
        ({}, "no training rows"),
        ({**batch(5), "x": torch.zeros(4, 2)}, r"differ in length: .*4"),
        ({**batch(5), "label": torch.full((5,), 3)}, "run from 3 to 3: expected 0 to 2"),
        ({**batch(5), "label": torch.full((5,), -1)}, "training labels are all -1: these rows have no labels"),
    ],
)
def test_rows_that_are_no_data_set_are_refused(train, message):
    with pytest.raises(DataError, match=message):
        Dataset(PROBLEM, train, batch(3))


def test_take_follows_the_order_of_the_indices():
    assert take(batch(5), torch.tensor([3, 1]))["x"][:, 0].tolist() == [6.0, 2.0]
