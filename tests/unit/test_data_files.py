"""Data that needs no code: tables, arrays, text, images of unequal size, and labels of other kinds than numbers."""

from __future__ import annotations

import logging
import zlib

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from test_data_sources import IMAGE_FEATURES, encoded, from_folder, pictures, write, write_images

from scalefl.data import Source, load
from scalefl.errors import ConfigError, DataError
from scalefl.problem import Column

CSV = "age,height,kind,label\n" + "".join(
    f"{row},{row / 4},{'ab'[row % 2]},{['no', 'yes'][row % 2]}\n" for row in range(12)
)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "set"


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_single_numbers_of_a_table_make_one_vector_in_the_order_named(tmp_path, caplog, ending):
    path = tmp_path / f"people.{ending}"
    path.write_text(CSV.replace(",", "\t") if ending == "tsv" else CSV)
    with caplog.at_level(logging.INFO, "scalefl"):
        data = load(Source(name=str(path), columns=("height", "age"), test="train"))
    assert data.problem.columns == (Column("table", (2,), "float32"),)
    assert data.train["table"][5].tolist() == [1.25, 5.0]
    (x,), named = data.problem.inputs(data.train)
    assert x.shape == (12, 2) and named == {}
    assert data.train["label"].tolist() == [0, 1] * 6
    assert "labels of 'label': 0 = no, 1 = yes" in caplog.text


def test_single_numbers_may_stay_apart(tmp_path):
    (tmp_path / "people.csv").write_text(CSV)
    data = load(Source(name=str(tmp_path / "people.csv"), columns=("height", "age"), table="", test="train"))
    assert data.problem.columns == (Column("height", (), "float32"), Column("age", (), "int64"))
    args, named = data.problem.inputs(data.train)
    assert args == () and named["age"].tolist() == list(range(12))


def test_a_column_of_kinds_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "people.csv").write_text(CSV)
    with pytest.raises(
        DataError, match=r"'kind' holds (large_)?string: .* `text = 'kind'`, kinds by a column of 0 and 1"
    ):
        load(Source(name=str(tmp_path / "people.csv"), columns=("kind", "age")))
    with pytest.raises(DataError, match=r"set `image` .or `columns` for numbers, `text` for text"):
        load(Source(name=str(tmp_path / "people.csv")))


def test_a_missing_number_is_named_by_split_and_row(folder):
    write(folder, "train", v=[[0.5, 1.0]] * 6, label=[0, 1] * 3)
    write(folder, "test", v=[[0.5, 1.0], [0.5, float("nan")]], label=[0, 1])
    with pytest.raises(DataError, match="column 'v' of split 'test': row 1, number 1 of it, is nan: leave the row out"):
        from_folder(folder, columns=("v",))


def test_nested_lists_of_one_shape_are_signals(folder):
    signal = np.random.default_rng(0).normal(size=(12, 2, 5)).astype(np.float32)
    write(folder, "train", signal=signal.tolist(), label=[0, 1] * 6)
    data = from_folder(folder, test="train")
    assert data.problem.columns == (Column("signal", (2, 5), "float32"),)
    assert np.array_equal(data.train["signal"].numpy(), signal)
    assert data.problem.inputs(data.train)[0][0].shape == (12, 2, 5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[[1.0, 2.0]], [[1.0], [2.0, 3.0]]], "row 1 has 2 values, row 0 has 1"),
        ([[[1.0, 2.0], [1.0, 2.0]], [[1.0], [2.0, 3.0]]], "row 1 has lists of unequal length"),
        ([[[1.0, 2.0], [1.0, 2.0]], [[1.0], [2.0]]], r"row 1 has the shape \[2, 1\], row 0 has \[2, 2\]"),
        ([[1.0, 2.0], [None, 3.0]], "row 1 has none in some place"),
    ],
)
def test_nested_lists_of_other_shapes_are_named_by_row(folder, values, message):
    write(folder, "train", signal=values, label=[0, 1])
    with pytest.raises(DataError, match=message):
        from_folder(folder, columns=("signal",))


def labelled(folder, label, tested=None, features=None, **options):
    write(folder, "train", features, v=[[0.5]] * len(label), label=label)
    if tested:
        write(folder, "test", features, v=[[0.5]] * len(tested), label=tested)
    return from_folder(folder, **{"columns": ("v",), "label": "label", **options})


@pytest.mark.parametrize(
    ("label", "found", "num_classes"),
    [
        (["b", "a", "c", "a"], [1, 0, 2, 0], 3),
        ([2.0, 0.0, 1.0, 0.0], [2, 0, 1, 0], 3),
        ([True, False, True, True], [1, 0, 1, 1], 2),
        ([[2], [0], [1], [1]], [2, 0, 1, 1], 3),
        ([[0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 1, 0]], [2, 0, 1, 1], 3),
    ],
)
def test_labels_of_every_usual_form_are_classes(folder, label, found, num_classes):
    data = labelled(folder, label, test="train")
    assert data.train["label"].tolist() == found
    assert data.problem.num_classes == num_classes


def test_text_labels_are_numbered_over_all_splits(folder):
    data = labelled(folder, ["b", "d", "b"], ["a", "d"])
    assert (data.train["label"].tolist(), data.test["label"].tolist()) == ([1, 2, 1], [0, 2])


def test_classes_say_how_labels_are_numbered(folder):
    data = labelled(folder, ["mid", "low", "high"], ["low"], classes=("low", "mid", "high", "top"))
    assert data.train["label"].tolist() == [1, 0, 2] and data.problem.num_classes == 4
    data = labelled(folder, [3, 1, 2, 1], [3], classes=(1, 2, 3))
    assert data.train["label"].tolist() == [2, 0, 1, 0] and data.problem.num_classes == 3
    names = {"v": datasets.List(datasets.Value("float32")), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    data = labelled(folder, [0, 1, 2], [1], names, classes=("c", "b", "a"))
    assert data.train["label"].tolist() == [2, 1, 0]
    with pytest.raises(ConfigError, match=r"classes = \['a', 'a'\]: one is there twice"):
        labelled(folder, ["a"], classes=("a", "a"))


@pytest.mark.parametrize(
    ("label", "options", "message"),
    [
        ([1, 2, 3], {}, r"values from 1 to 3, and classes are numbered from 0: .* set `classes` = \[1, 2, 3\]"),
        ([-1, 1, 1], {}, r"values from -1 to 1, .*set `classes` = \[-1, 1\]"),
        ([0, 250_000, 310_000], {}, "values up to 310000 in 3 rows, fewer than that would be classes: set `classes`"),
        ([0.5, 1.0, 2.0], {}, r"'label' of split 'train' holds real numbers \(row 0: 0.5\).*Problem of your own"),
        ([[1, 1, 0], [0, 0, 1]], {}, "marks 2 of 3 classes in row 0"),
        ([[0.1, 0.9], [0.5, 0.5]], {}, r"holds 2 numbers for each example \(row 0: 0.1, 0.9\)"),
        (
            ["a", "b", "x"],
            {"classes": ("a", "b", "xx")},
            r"row 2 has 'x', which is not .*\[\"a\", \"b\", \"xx\"\]: did",
        ),
        ([1, 2, 5], {"classes": (1, 2, 3)}, r"row 2 has 5, which is not among the classes \[1, 2, 3\]"),
        (["a", None, "b"], {}, "column 'label' of split 'train': row 1 is empty"),
    ],
)
def test_labels_that_are_no_classes_are_refused(folder, label, options, message):
    with pytest.raises(DataError, match=message):
        labelled(folder, label, **options)


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ({"label": [-1, -1]}, r"split 'test' has no labels \(all are -1\)"),
        ({"label": [None, None]}, r"split 'test' has no labels"),
        ({}, "split 'test' has no column 'label'"),
    ],
)
def test_a_test_split_without_labels_is_refused_and_may_be_left_out(folder, test, message):
    write(folder, "train", v=[[0.5]] * 12, label=[0, 1] * 6)
    write(folder, "validation", v=[[0.5]] * 3, label=[0, 1, 1])
    write(folder, "test", v=[[0.5]] * 2, **test)
    if "label" not in test or None in test["label"]:
        # As `datasets` wants it: the same columns in all splits, or a split of its own.
        for split in ("train", "validation"):
            (folder / f"{split}.parquet").unlink()
        (folder / "test.parquet").unlink()
        arrays = {"v_train": np.ones((12, 1)), "label_train": np.arange(12) % 2, "v_test": np.ones((2, 1))}
        extra = {} if "label" not in test else {"label_test": np.array([-1, -1])}
        np.savez(folder / "all.npz", **arrays, **extra)
        with pytest.raises(DataError, match=rf'{message}.*: set `test` to "", which holds a sixth'):
            from_folder(folder, columns=("v",))
        assert len(from_folder(folder, columns=("v",), test="").test["label"]) == 2
        return
    with pytest.raises(DataError, match=rf'{message}: set `test` to another split \(validation\), or to "", which'):
        from_folder(folder, columns=("v",))
    assert len(from_folder(folder, columns=("v",), test="validation").test["label"]) == 3
    assert len(from_folder(folder, columns=("v",), test="").test["label"]) == 2


def test_a_clients_own_data_cannot_number_the_labels_of_all(folder):
    write(folder, "train", v=[[0.5]] * 3, label=["b", "c", "b"])
    source = Source(name=str(folder), columns=("v",))
    with pytest.raises(
        DataError, match=r'what other clients hold is not known here: .*`classes`; here are \["b", "c"\]'
    ):
        load(source, held_out=False)
    listed = Source(name=str(folder), columns=("v",), classes=("a", "b", "c"))
    assert load(listed, held_out=False).train["label"].tolist() == [1, 2, 1]
    write(folder, "train", v=[[0.5]] * 3, label=[2, 7, 2])
    assert load(source, held_out=False).train["label"].tolist() == [2, 7, 2]


def arrays(count, shape, kind=np.uint8):
    draw = np.random.default_rng(count)
    return draw.integers(0, 200, (count, *shape)).astype(kind), draw.permutation(np.arange(count) % 3)


@pytest.mark.parametrize("names", ["x_{}", "{}_x"])
@pytest.mark.parametrize(("shape", "order"), [((6, 5), None), ((6, 5, 3), (0, 3, 1, 2)), ((3, 6, 5), (0, 1, 2, 3))])
def test_arrays_of_a_file_are_images_whatever_their_layout(tmp_path, names, shape, order):
    (x, y), (u, v) = arrays(12, shape), arrays(6, shape)
    content = {"x_{}": ("x_train", "y_train", "x_test", "y_test"), "{}_x": ("train_x", "train_y", "test_x", "test_y")}
    np.savez(tmp_path / "a.npz", **dict(zip(content[names], (x, y[:, None], u, v[:, None]), strict=True)))
    data = load(Source(name=str(tmp_path / "a.npz")))
    wanted = x[:, None] if order is None else x.transpose(order)
    assert np.array_equal(data.train["x"].numpy(), wanted) and data.train["x"].is_contiguous()
    assert data.train["label" if "label" in data.train else "y"].tolist() == y.tolist()
    assert len(data.test["x"]) == 6
    assert data.problem.mean == pytest.approx(tuple((wanted / 255).mean((0, 2, 3)).round(4)))


def test_a_folder_of_archives_and_one_of_arrays_without_splits(tmp_path):
    for split, count in (("train", 12), ("test", 6)):
        x, y = arrays(count, (2, 9), np.int16)
        np.savez(tmp_path / f"{split}.npz", signal=x - 100, label=y.astype(str))
    data = load(Source(name=str(tmp_path)))
    assert data.problem.columns == (Column("signal", (2, 9), "int16"),)
    (x,), _ = data.problem.inputs(data.train)
    assert x.dtype == torch.float32 and x.min() < -50
    assert len(data.test["label"]) == 6
    (tmp_path / "one").mkdir()
    np.savez(tmp_path / "one" / "everything.npz", x=np.ones((12, 4)), y=np.arange(12) % 2)
    data = load(Source(name=str(tmp_path / "one")))
    assert (len(data.train["x"]), len(data.test["x"])) == (10, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x": np.array([{}, None]), "y": np.arange(2)}, "it holds Python objects, not arrays of numbers or text"),
        ({"x": np.ones((3, 2)), "y": np.arange(2)}, "split 'train' have the lengths .*'x': 3, 'y': 2.*: expected one"),
        ({"x": np.float32(1), "y": np.arange(2)}, "lengths .*'x': None"),
        (
            {"x": np.zeros((2, 9, 9, 7), np.uint8), "y": np.arange(2)},
            r"images \[9, 9, 7\]: expected 1, 3 or 4 channels",
        ),
        ({"x": np.array(["a", "b"]), "y": np.arange(2)}, "set `image`.*columns: x .string., y .int64."),
        (
            {"x": np.full((2, 3), np.nan), "y": np.arange(2)},
            "column 'x' of split 'train': row 0, number 0 of it, is nan",
        ),
    ],
)
def test_arrays_that_are_no_data_are_refused(tmp_path, content, message):
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(DataError, match=message):
        load(Source(name=str(tmp_path / "a.npz")))


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK but not really")
    with pytest.raises(DataError, match=r"cannot read .*a\.npz"):
        load(Source(name=str(tmp_path / "a.npz")))


@pytest.mark.parametrize(("resize", "shape"), [(4, (3, 4, 4)), ((4, 7), (3, 4, 7))])
def test_images_of_unequal_size_are_brought_to_one(folder, resize, shape):
    sizes = [(6, 5, 3), (9, 8, 3), (4, 7, 3)]
    images = [pictures(1, size, seed=i)[0] for i, size in enumerate(sizes * 2)]
    write_images(folder, "train", [encoded(image) for image in images])
    with pytest.raises(DataError, match=r"image 1 of split 'train' has 9×8 pixels, image 0 has 6×5: set `resize`"):
        from_folder(folder, test="train")
    data = from_folder(folder, test="train", resize=resize)
    assert data.problem.columns == (Column("img", shape, "uint8"),)
    wanted = Image.fromarray(images[1]).resize(shape[:0:-1], Image.Resampling.BILINEAR)
    assert np.array_equal(data.train["img"][1].permute(1, 2, 0).numpy(), np.asarray(wanted))


def test_arrays_are_resized_too(tmp_path):
    x, y = arrays(6, (8, 8))
    np.savez(tmp_path / "a.npz", image=x, label=y)
    data = load(Source(name=str(tmp_path / "a.npz"), resize=[4, 6], test="train"))
    wanted = np.asarray(Image.fromarray(x[2]).resize((6, 4), Image.Resampling.BILINEAR))
    assert np.array_equal(data.train["image"][2, 0].numpy(), wanted)


def test_an_image_text_and_numbers_make_one_example(folder):
    texts = ["one two", "two"] * 3
    write_images(folder, "train", [encoded(p) for p in pictures(6)], None, words=texts, age=range(6), mask=[[1, 0]] * 6)
    data = from_folder(folder, image="img", text="words", max_length=4, columns=("age", "mask"), test="train")
    assert [(column.name, column.shape) for column in data.problem.columns] == [
        ("img", (3, 6, 5)),
        ("input_ids", (4,)),
        ("attention_mask", (4,)),
        ("mask", (2,)),
        ("table", (1,)),
    ]
    _, named = data.problem.inputs(data.train)
    assert named["img"].dtype == torch.float32 and named["img"].mean().abs() < 0.1
    assert named["table"][:, 0].tolist() == list(range(6))
    assert named["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]] * 3
    with pytest.raises(DataError, match=r"'img' holds dict: expected numbers in every row$"):
        from_folder(folder, columns=("img",))


def test_an_image_may_be_one_of_the_columns(folder):
    features = {**IMAGE_FEATURES, "age": datasets.Value("int64")}
    write_images(folder, "train", [encoded(p) for p in pictures(6)], features, age=list(range(6)))
    data = from_folder(folder, columns=("age", "img"), test="train")
    assert [column.name for column in data.problem.columns] == ["img", "table"]
    assert torch.equal(data.train["img"], torch.from_numpy(pictures(6)).permute(0, 3, 1, 2))


def test_hashed_words_are_the_same_numbers_everywhere(folder):
    write(folder, "train", text=["Good, good film", ""], label=[0, 1])
    data = from_folder(folder, text="text", tokenizer="hash:100", max_length=5, test="train")
    good, comma, film = (2 + zlib.crc32(word) % 98 for word in (b"good", b",", b"film"))
    assert data.train["input_ids"].tolist() == [[1, good, comma, good, film], [1, 0, 0, 0, 0]]
    assert data.train["attention_mask"].tolist() == [[1] * 5, [1, 0, 0, 0, 0]]


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "film", "##s"]


@pytest.mark.parametrize("place", ["vocab.txt", "tokenizer.json", "folder"])
def test_tokenizers_of_hugging_faces_kinds(folder, tmp_path, place):
    tokenizers = pytest.importorskip("tokenizers")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    tokenizers.BertWordPieceTokenizer(str(tmp_path / "vocab.txt")).save(str(tmp_path / "tokenizer.json"))
    write(folder, "train", text=["Good films", "good good good good good"], label=[0, 1])
    where = tmp_path if place == "folder" else tmp_path / place
    data = from_folder(folder, text="text", tokenizer=str(where), max_length=6, test="train")
    assert data.train["input_ids"].tolist() == [[2, 4, 5, 6, 3, 0], [2, 4, 4, 4, 4, 3]]
    assert data.train["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tokenizer": "hash:two"}, ConfigError, "'hash:two': expected the size of the vocabulary, 3 or more"),
        ({"tokenizer": "hash:2"}, ConfigError, "3 or more"),
        (
            {"tokenizer": "/no/such/tokenizer"},
            ConfigError,
            "'/no/such/tokenizer': no .*file or folder|no tokenizer.json",
        ),
        ({"text": "label"}, DataError, "column 'label' holds int64: expected text"),
        ({"text": "words"}, DataError, "no column 'words'"),
        ({"max_length": 1}, ConfigError, "max_length = 1: expected at least 2"),
    ],
)
def test_text_that_cannot_be_read_is_refused(folder, options, error, message):
    write(folder, "train", text=["a", "b"], label=[0, 1])
    with pytest.raises(error, match=message):
        from_folder(folder, **{"text": "text", **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": ("v", "label")}, "'label' is both the label and an input"),
        ({"columns": ("v", "v")}, "column 'v' is an input twice"),
        ({"columns": ("v", "w"), "table": "v"}, "table = 'v' is another column's name"),
        ({"resize": 0, "columns": ("v",)}, "resize = 0: expected at least 1"),
    ],
)
def test_columns_that_clash_are_refused(folder, options, message):
    write(folder, "train", v=[[0.5]] * 4, w=[1, 2, 3, 4], label=[0, 1] * 2)
    with pytest.raises(ConfigError, match=message):
        from_folder(folder, **{"table": "", **options})
