"""Rows that are not what the problem says, through the door that users take: a config that names a function."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from test_experiment import settings
from torch import nn

from scalefl.data import Dataset, PartitionedData
from scalefl.errors import ConfigError, DataError
from scalefl.experiment import Experiment
from scalefl.problem import Classification, Column
from scalefl.runner import run

N, K = 60, 3
IMAGES = Classification(K, (Column("image", (1, 8, 8), "float32"),))
LABELS = torch.arange(N) % K


def images(shape=(1, 8, 8)):
    return torch.rand(N, *shape, generator=torch.Generator().manual_seed(0))


MADE = {}
"""What `make_data` returns next."""


def make_data():
    return MADE["data"]() if callable(MADE["data"]) else MADE["data"]


def make_model(channels=1):
    return nn.Sequential(
        *(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, K)),
    )


def started(made, **changes):
    MADE["data"] = made
    common = {
        "model": "test_data_checks:make_model",
        "data": {"source": {"name": "test_data_checks:make_data"}, "clients": 3},
        "engine": {"workers": 0, "threads": 1, "clients_at_once": 1},
    }
    experiment = Experiment(settings("200%", **{**common, **changes}))
    experiment.check_clients()
    return experiment


def trained(made, folder, **changes):
    return run(started(made, **changes).config, folder)


def rows(**changes):
    return {"image": images(), "label": LABELS, **changes}


def test_a_column_that_lies_about_its_shape_is_refused_before_anything_is_predicted(tmp_path):
    with pytest.raises(
        DataError,
        match=r"column 'image' of the training rows has the shape \[1, 96, 96\] for each example, the problem says "
        r"\[1, 8, 8\]: say Column\('image', \(1, 96, 96\), 'float32'\)",
    ):
        trained(lambda: Dataset(IMAGES, rows(image=images((1, 96, 96))), rows()), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["training", "test"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": images((8, 8))}, r"shape \[8, 8\].*says \[1, 8, 8\]: say Column\('image', \(8, 8\), 'float32'\)"),
        ({"image": (images() * 255).to(torch.uint8)}, "holds uint8, the problem says float32: say Column.*'uint8'.*or"),
        ({"image": images().to_sparse()}, r"is a sparse tensor.*\.to_dense\(\)"),
        ({"image": images().to(torch.complex64)}, "holds complex64, the problem says float32"),
        ({"image": torch.empty(N, 1, 8, 8, device="meta")}, "has no values"),
        ({"image": np.array([None] * N)}, "is a ndarray of object: expected a tensor or array of numbers"),
        ({"image": np.ma.masked_less(images().numpy(), 0.5)}, "is a MaskedArray with masked values: fill them in"),
        ({"image": [[1.0, 2.0], [1.0]]}, "is a list that makes no array"),
        ({"image": images().index_fill(0, torch.tensor([7]), torch.nan)}, "row 7, number 0 of it, is nan"),
        ({"image": images().index_fill(3, torch.tensor([2]), -torch.inf)}, "row 0, number 2 of it, is -inf"),
        ({"image": images()[:50]}, "columns differ in length: .*'image': 50"),
        ({"label": torch.tensor(1)}, "is a single number"),
        ({"label": LABELS + 1}, "labels run from 1 to 3: expected 0 to 2; .* 3, in row 2: subtract 1"),
        ({"label": LABELS * 2}, "labels run from 0 to 4: .* 4, in row 2: number the classes from 0, or raise"),
        ({"label": LABELS * 0 - 1}, "labels are all -1: these rows have no labels"),
        ({"label": LABELS + 0.5}, r"real numbers \(row 0: 0.5\), not classes .*Problem of your own \(docs/data.md\)"),
        ({"label": LABELS / 0}, r"real numbers \(row 0: nan\)"),
        ({"label": torch.ones(N, K)}, "marks 3 of 3 classes in row 0, and one class .*Problem of your own"),
        ({"label": torch.full((N, K), 0.2)}, r"holds 3 numbers for each example \(row 0: 0.2, 0.2, 0.2\)"),
        ({"label": torch.zeros(N, 8, 8)}, r"holds \[8, 8\] for each example, not one class: .*Problem of your own"),
        ({"label": np.array(["a", "b", "c"] * 20)}, "holds text: number it first, as by numpy.unique"),
    ],
)
def test_rows_that_are_not_what_the_problem_says_are_refused(split, changes, message):
    wrong = rows(**changes)
    with pytest.raises(DataError, match=rf"(?s)\b{split}\b.*{message}"):
        started(lambda: Dataset(IMAGES, *((wrong, rows()) if split == "training" else (rows(), wrong))))


def test_a_missing_column_and_rows_that_are_no_columns_are_refused():
    with pytest.raises(DataError, match="no column 'image', which the problem names: did you mean 'images'"):
        started(lambda: Dataset(IMAGES, {"images": images(), "label": LABELS}, rows()))
    with pytest.raises(DataError, match="the test rows are a list: expected a mapping from column names"):
        started(lambda: Dataset(IMAGES, rows(), [images(), LABELS]))


ONE_HOT = nn.functional.one_hot(LABELS, K)


@pytest.mark.parametrize(
    "label",
    [
        *(LABELS.to(dtype) for dtype in (torch.int32, torch.int16, torch.uint8, torch.float32, torch.float64)),
        *(LABELS[:, None], LABELS[:, None].int(), ONE_HOT, ONE_HOT.float(), ONE_HOT.bool()),
        *(LABELS.numpy().astype(kind) for kind in ("uint16", ">i4")),
        LABELS.tolist(),
    ],
    ids=lambda label: f"{getattr(label, 'dtype', 'list')}{list(np.shape(label))[1:]}",
)
def test_labels_of_every_usual_form_are_the_same_classes(label):
    data = started(lambda: Dataset(IMAGES, rows(label=label), rows(label=label))).data
    assert torch.equal(data.test["label"], LABELS)
    assert data.validation["label"].dtype == torch.int64
    assert sum(data.label_counts(client) for client in range(3)).tolist() == [18, 18, 18]


def test_truth_values_are_labels():
    problem = Classification(2, IMAGES.columns)
    data = Dataset(problem, rows(label=LABELS == 1), {})
    assert torch.equal(data.train["label"], (LABELS == 1).long())


def test_numpy_arrays_train_to_the_bit_as_tensors(tmp_path):
    read_only = images().numpy().astype(np.float64)
    read_only.flags.writeable = False
    arrays = {"image": read_only, "label": LABELS.numpy().astype(np.int32)}
    for name, part in (("tensors", rows()), ("arrays", arrays)):
        trained(lambda part=part: Dataset(IMAGES, part, part), tmp_path / name)
    states = [(tmp_path / name / "state.safetensors").read_bytes() for name in ("tensors", "arrays")]
    assert states[0] == states[1]


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64", "complex64"])
def test_numbers_of_any_kind_have_to_be_finite(kind):
    x = torch.ones(N, 3).to(getattr(torch, kind))
    problem = Classification(K, (Column("x", (3,), kind),))
    assert Dataset(problem, {"x": x, "label": LABELS}, {}).train["x"].dtype == x.dtype
    x[7, 2] = torch.inf
    with pytest.raises(DataError, match=r"column 'x' of the training rows: row 7, number 2 of it, is .*inf"):
        Dataset(problem, {"x": x, "label": LABELS}, {})


def test_columns_that_the_problem_does_not_name_reach_no_client():
    names = np.array(["ann", "bob"] * 30)
    data = started(lambda: Dataset(IMAGES, rows(user=names, junk=torch.zeros(N, 1000)), rows())).data
    assert set(data.examples(0)) == set(data.validation) == {"image", "label"}


def test_clients_are_counted_by_ids_that_are_text():
    names = np.array([f"user {i % 7}" for i in range(N)])
    source = {"source": {"name": "test_data_checks:make_data"}, "partition": {"kind": "natural", "column": "user"}}
    experiment = started(lambda: Dataset(IMAGES, rows(user=names), rows()), data=source)
    assert experiment.config.data.clients == "auto"
    assert experiment.data.num_clients == len(experiment.population) == 7
    fewer = started(lambda: Dataset(IMAGES, rows(user=names), rows()), data={**source, "clients": 4})
    assert len(fewer.population) == 4


def test_other_partitions_have_100_clients_unless_told():
    source = {"source": {"name": "test_data_checks:make_data"}}
    for given in ({}, {"clients": "auto"}):
        assert settings("200%", data={**source, **given}).data.clients == 100


class Lazy:
    """Rows that are made when asked for."""

    num_clients = 40

    def __init__(self, spoilt=None, problem=IMAGES, **held_out):
        self.spoilt, self.problem = spoilt or {}, problem
        self.validation, self.test = held_out.get("validation", rows()), held_out.get("test", rows())

    def num_examples(self, client):
        return N

    def label_counts(self, client):
        return torch.bincount(LABELS, minlength=K)

    def examples(self, client):
        return self.spoilt.get(client, rows())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: Lazy({0: rows(image=images((3, 8, 8)))}), r"column 'image' of the client 0's rows has the shape \[3"),
        (lambda: Lazy({0: {k: v[:9] for k, v in rows().items()}}), "client 0 has 9 rows, and num_examples says 60"),
        (lambda: Lazy(test=rows(image=images() / 0)), "column 'image' of the test rows: row 0, number 0 of it, is inf"),
        (lambda: Lazy(validation=rows(label=LABELS + 1)), "validation labels run from 1 to 3"),
    ],
)
def test_rows_of_ones_own_federated_data_are_checked_before_the_first_round(data, message):
    with pytest.raises(DataError, match=message):
        started(data)


def test_a_client_whose_rows_are_made_later_is_checked_then():
    data = started(lambda: Lazy({5: rows(label=LABELS + 1)})).data
    assert num_classes_of(data.examples(4)) == K
    with pytest.raises(DataError, match="client 5's labels run from 1 to 3"):
        data.examples(5)


def num_classes_of(batch):
    return len(batch["label"].unique())


def test_what_a_federated_data_returns_is_converted():
    data = started(
        lambda: Lazy({client: {k: v.numpy() for k, v in rows(label=LABELS.int()).items()} for client in (0, 1)})
    )
    for _ in range(2):
        assert data.data.examples(1)["label"].dtype == torch.int64


class Makes(PartitionedData):
    def examples(self, client):
        return {**super().examples(client), "image": torch.zeros(1)}


def test_a_partitioned_data_with_rows_of_its_own_is_checked_too():
    dataset = Dataset(IMAGES, rows(), rows())
    with pytest.raises(DataError, match="client 0's rows has the shape"):
        started(lambda: Makes(dataset, [torch.arange(30)], torch.arange(30, 60)))


@dataclass(frozen=True)
class Pixelwise:
    """A problem that is no subclass of `Classification`: a class for each pixel."""

    num_classes: int = K

    def example(self, num_examples):
        return {"image": torch.zeros(num_examples, 1, 8, 8), "mask": torch.zeros(num_examples, 8, 8, dtype=torch.int64)}

    def labels(self, batch):
        return batch["mask"].flatten(1).amax(1)


def test_a_problem_of_any_kind_is_held_against_its_example():
    masks = (LABELS[:, None, None] * torch.ones(1, 8, 8)).long()
    assert Dataset(Pixelwise(), {"image": images(), "mask": masks.int()}, {}).train["mask"].dtype == torch.int64
    with pytest.raises(DataError, match=r"column 'mask' .* shape \[4, 4\] .* says \[8, 8\]"):
        Dataset(Pixelwise(), {"image": images(), "mask": masks[:, :4, :4]}, {})
    with pytest.raises(DataError, match="test labels run from 0 to 2: expected 0 to 1"):
        Dataset(Pixelwise(2), {"image": images(), "mask": masks.clamp(max=1)}, {"image": images(), "mask": masks})


@dataclass(frozen=True)
class Odd(Pixelwise):
    def labels(self, batch):
        return batch["mask"][0, 0, "x"]


@dataclass(frozen=True)
class Wide(Pixelwise):
    def labels(self, batch):
        return batch["mask"]


@pytest.mark.parametrize(
    ("problem", "message"), [(Odd(), "Odd.labels of the training rows: "), (Wide(), r"gives torch.int64 \[60, 8, 8\]")]
)
def test_labels_that_a_problem_gets_wrong_are_told(problem, message):
    with pytest.raises(DataError, match=message):
        Dataset(problem, {"image": images(), "mask": torch.zeros(N, 8, 8).long()}, {})


class Both(nn.Module):
    """An image and a table."""

    def __init__(self):
        super().__init__()
        self.image, self.table, self.head = nn.Conv2d(3, 4, 3), nn.Linear(5, 8), nn.Linear(4 * 36 + 8, K)

    def forward(self, image, table):
        assert image.dtype == torch.float32 and image.abs().max() < 4
        return self.head(torch.cat([self.image(image).relu().flatten(1), self.table(table).relu()], 1))


def test_an_image_beside_a_table_is_normalised_as_one_alone(tmp_path):
    pixels = (images((3, 8, 8)) * 255).to(torch.uint8)
    columns = (Column("image", (3, 8, 8), "uint8"), Column("table", (5,), "float32"))
    both, alone = (Classification(K, columns[:n], mean=(0.5, 0.4, 0.3), std=(0.2,)) for n in (2, 1))
    batch = {"image": pixels, "table": torch.randn(N, 5), "label": LABELS}
    _, named = both.inputs(batch)
    (image,), _ = alone.inputs(batch)
    assert torch.equal(named["image"], image)
    assert image[0, 1, 2, 3] == pytest.approx((pixels[0, 1, 2, 3].item() / 255 - 0.4) / 0.2, abs=1e-5)
    assert named["table"] is batch["table"]
    summary = trained(lambda: Dataset(both, batch, batch), tmp_path / "run", model="test_data_checks:Both")
    assert summary["test"]["loss"] < 2


@pytest.mark.parametrize("beside", [(), (Column("table", (5,), "float32"),)])
def test_images_of_more_than_8_bits_are_passed_as_they_are(beside):
    scans = (images() * 4000 - 1000).to(torch.int16)
    problem = Classification(K, (Column("image", (1, 8, 8), "int16"), *beside))
    args, named = problem.inputs({"image": scans, "table": torch.randn(N, 5)})
    found = named["image"] if beside else args[0]
    assert torch.equal(found, scans.float())


@pytest.mark.parametrize("dtype", ["int64", "int32"])
def test_token_ids_alone_are_passed_by_name(dtype):
    problem = Classification(K, (Column("input_ids", (4,), dtype),))
    batch = problem.example(2)
    args, named = problem.inputs(batch)
    assert args == () and named["input_ids"] is batch["input_ids"]


def test_other_columns_beside_tokens_are_passed_as_they_are():
    columns = [Column("input_ids", [4], torch.int32), Column("mask", (4,), "bool"), Column("age", (), "torch.float32")]
    problem = Classification(K, columns)
    loose = Classification(np.int64(K), columns, mean=[0.5], std=np.array([0.5]), augmentation=[])
    assert hash(problem) == hash(loose) and problem == loose and type(loose.num_classes) is int
    assert Classification(K, columns[0]).columns == (columns[0],)
    batch = problem.example(2)
    _, named = problem.inputs(batch)
    assert all(named[column.name] is batch[column.name] for column in columns)
    assert batch["age"].shape == (2,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Column("x", (3,), "flaot32"), r"column 'x': dtype = 'flaot32': did you mean 'float32'\?"),
        (lambda: Column("x", 3, "float32"), r"column 'x': shape = 3: expected the sizes of one example"),
        (lambda: Column("x", (0, 3), "float32"), r"shape = \(0, 3\)"),
        (lambda: Classification(K, ("x",)), r"expected Column\(name, shape, dtype\) of each input"),
        (lambda: Classification(2.5, IMAGES.columns), "num_classes = 2.5: expected a whole number from 1 on"),
        (lambda: Classification(K, IMAGES.columns, augmentation=("flop",)), "'flop': did you mean 'flip'.*known: crop"),
        (lambda: Classification(K, ()), "expected one column or more"),
        (lambda: Classification(K, (Column("label", (), "int64"),)), "each of another name"),
        (lambda: Classification(K, (Column("x", (1, 8, 8), "uint8"),), std=(0.0,)), "no zero"),
        (
            lambda: Classification(K, (Column("x", (1, 8, 8), "uint8"),), mean=(0.1, 0.2, 0.3)),
            "mean of 3 and std of 1 numbers for column 'x' of 1 channels: expected 1 or 1",
        ),
    ],
)
def test_problems_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(("factor", "warned"), [(2e5, True), (100, False)])
def test_a_column_of_a_huge_scale_is_warned_of_before_the_first_round(caplog, factor, warned):
    x = torch.rand(N, 6) * torch.tensor([1, 1, factor, 1, 1, 1])
    problem = Classification(K, (Column("features", (6,), "float32"),))
    with caplog.at_level(logging.WARNING, "scalefl"):
        started(
            lambda: Dataset(problem, {"features": x, "label": LABELS}, {"features": x, "label": LABELS}),
            model="test_data_checks:dense",
        )
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == warned
    assert all("column 'features' has values from" in text and "in number 2 of 6" in text for text in told)


def dense():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, K))
