from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from made_up import PLAN, SUMMARY, write_run
from scalefl.errors import CheckpointError
from scalefl.report import Run, draw, read_run, side_by_side
from scalefl.report.pictures import accuracy_picture, memory_picture, plane_picture, save
from scalefl.report.tables import (
    NOTHING,
    Table,
    class_table,
    comparison,
    flops,
    memory_table,
    show,
    summary_table,
    to_markdown,
)
from scalefl.units import MIB

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def finished(tmp_path: Path) -> Run:
    return read_run(write_run(tmp_path / "a"))


@pytest.fixture
def unfinished(tmp_path: Path) -> Run:
    return read_run(write_run(tmp_path / "b", "b", finished=False))


def printed(table: Table, width: int) -> str:
    console = Console(file=StringIO(), width=width)
    show(console, table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_run_is_read(finished: Run, unfinished: Run) -> None:
    assert (finished.name, finished.method, finished.num_rounds) == ("a", "sbt", 2)
    assert finished.summary == SUMMARY
    assert (unfinished.summary, unfinished.num_rounds) == (None, 1)


def test_a_half_written_journal_line_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    with (folder / "journal.jsonl").open("a") as journal:
        journal.write('{"round": 3, "valid')
    assert read_run(folder).num_rounds == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("{", "is damaged"),
        ("[]", "holds no table"),
        ("{}", "not the folder of a run"),
        ('{"format": "scalefl-run", "version": 99}', "format version 99"),
    ],
)
def test_other_folders_are_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_run(tmp_path)


def test_memory_table() -> None:
    full, first, second = memory_table(PLAN).rows
    assert full[:3] == ("full training", "10.0", "100 %") and full[-1] == "large"
    assert first[:3] == ("block 1", "4.00", "40 %") and first[-1] == "all"
    assert second[-5:] == ("4.20", "3.00", "60 %", "0.50", "large")
    assert memory_table({**PLAN, "full": {**PLAN["full"], "fits": {}}}).rows[0][-1] == "none"


def test_class_table_tells_base_and_total_where_the_base_is_known() -> None:
    classes = [{"name": "small", "budget_bytes": 5 * MIB, "planned_bytes": 5 * MIB, "share": 0.5}]
    found = class_table(classes, 10 * MIB, 300 * MIB)
    assert found.rows == (("small", "5.00", "5.00", "50 %", "50 %", "300", "305"),)
    assert len(found.notes) == 1
    assert class_table(classes, 10 * MIB, None).rows[0][-2:] == (NOTHING, NOTHING)


def test_class_table_tells_the_margin_under_a_cap() -> None:
    classes = [{"name": "small", "budget_bytes": 5 * MIB, "planned_bytes": MIB, "share": 0.5}]
    found = class_table(classes, 10 * MIB, 300 * MIB)
    assert found.rows[0][:4] == ("small", "5.00", "1.00", "10 %")
    assert "4 MiB" in found.notes[-1]


def test_summary_table(finished: Run, unfinished: Run) -> None:
    values = dict(summary_table(finished).rows)
    assert values["test accuracy"] == "50.0 %"
    assert values["clients that took part"] == "5 of 8"
    assert values["FLOPs of all clients"] == "2.50 TFLOP"
    assert values["simulated time on the devices"] == "1,234 s"
    assert values["predicted peak of a client"] == "base 300 MiB + 6.00 MiB"
    unmeasured = dict(summary_table(replace(finished, base_bytes=None)).rows)
    assert unmeasured["predicted peak of a client"] == "6.00 MiB"
    assert "unfinished, 1 of 2 rounds" in summary_table(unfinished).title
    assert {value for _, value in summary_table(unfinished).rows} == {NOTHING}


def test_comparison(finished: Run, unfinished: Run) -> None:
    table = comparison([finished, unfinished])
    assert table.rows[0] == (
        "a (sbt, 2 rounds)", "50.0", "25.0", "5 / 8", "6.00", "2.50", "3.00", "2.00", "4.25", "1,234",
    )  # fmt: skip
    assert set(table.rows[1][1:]) == {NOTHING}
    assert "on top of a worker's base of 300 MiB" in table.notes[0]
    assert "base" not in comparison([replace(finished, base_bytes=None)]).notes[0]
    assert table.notes[-1] == "b is unfinished: 1 of 2 rounds are done."
    assert comparison([finished, finished]).title == "Comparison after 2 rounds"


def test_markdown(finished: Run) -> None:
    title, _, header, rule, first, *_ = to_markdown(comparison([finished])).splitlines()
    assert title == "## Comparison after 2 rounds"
    assert header.startswith("| method | accuracy % | low-mem. % |")
    assert rule.startswith("| :-- | --: |")
    assert header.count("|") == rule.count("|") == first.count("|")


@pytest.mark.parametrize("width", [80, 120])
def test_numbers_are_never_cut_off_on_a_terminal(finished: Run, width: int) -> None:
    for table in (memory_table(PLAN), summary_table(finished), comparison([finished])):
        text = printed(table, width)
        assert "…" not in text
        assert all(cell in text for row in table.rows for cell in row[1:-1])


@pytest.mark.parametrize(
    ("count", "text"), [(None, NOTHING), (12, "12 FLOP"), (3.2e9, "3.20 GFLOP"), (5e15, "5.00 PFLOP")]
)
def test_flops(count: float | None, text: str) -> None:
    assert flops(count) == text


def test_pictures_of_a_run(finished: Run, tmp_path: Path) -> None:
    written = draw(finished, tmp_path / "out")
    assert [path.name for path in written] == ["accuracy.png", "memory.png", "nhsic.png", "report.html"]
    assert all(path.read_bytes().startswith(PNG) for path in written[:3])


def test_pictures_without_measurements_are_left_out(unfinished: Run) -> None:
    bare = Run(unfinished.path, unfinished.config, PLAN, [{"round": 0, "validation": {}}], None, None)
    assert accuracy_picture([bare]) is None
    assert plane_picture(bare) is None


def test_accuracy_has_a_line_for_each_run(finished: Run, unfinished: Run) -> None:
    figure = accuracy_picture([finished, unfinished])
    assert figure is not None
    lines = figure.axes[0].lines
    assert [drawn.get_label() for drawn in lines] == ["a", "b"]
    assert list(lines[0].get_ydata()) == [10, 50, 75]
    assert len({drawn.get_color() for drawn in lines}) == 2


def test_names_are_taken_as_they_are(finished: Run, tmp_path: Path) -> None:
    names = ["_first", r"$\frac$", "same", "same"]
    figure = accuracy_picture([replace(finished, config={"name": name}) for name in names])
    save(figure, tmp_path / "accuracy.png")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names


def test_what_is_no_number_is_not_drawn(finished: Run) -> None:
    """A model that has diverged: rounds without numbers, and a whole run without any."""
    finished.journal[1]["validation"]["accuracy"] = finished.journal[2]["plane"][0]["y"] = math.nan
    assert list(accuracy_picture([finished]).axes[0].lines[0].get_xdata()) == [0, 2]
    near, _ = plane_picture(finished).axes
    assert [list(drawn.get_xdata()) for drawn in near.lines if drawn.get_label() in ("a", "b")] == [[0.5], [0.6, 0.6]]
    for entry in finished.journal:
        entry["validation"]["accuracy"] = math.nan
        for drawn in entry.get("plane", ()):
            drawn["x"] = math.inf
    assert accuracy_picture([finished]) is None and plane_picture(finished) is None


def test_memory_bars_stack_to_the_peak() -> None:
    axes = memory_picture(PLAN, "a").axes[0]
    ends = [bars[-1].get_x() + bars[-1].get_width() for bars in zip(*axes.containers, strict=True)]
    assert ends == pytest.approx([10, 4, 6], abs=1e-5)
    assert [drawn.get_xdata()[0] for drawn in axes.lines] == [5, 12]


def test_a_budget_far_beyond_the_bars_is_named_in_words() -> None:
    axes = memory_picture({**PLAN, "budgets_bytes": {"small": 5 * MIB, "board": 4096 * MIB}}, "a").axes[0]
    assert axes.get_xlim()[1] < 20
    assert "board (4,096 MiB)" in axes.get_xlabel()


def test_budget_labels_do_not_overlap() -> None:
    budgets = {f"class-{i}": int((5 + 0.1 * i) * MIB) for i in range(4)}
    figure = memory_picture({**PLAN, "budgets_bytes": budgets}, "a")
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 4
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_plane_has_a_path_for_each_cut(finished: Run) -> None:
    figure = plane_picture(finished)
    assert figure is not None
    near, whole = figure.axes
    paths = {drawn.get_label(): drawn for drawn in near.lines if not str(drawn.get_label()).startswith("_")}
    assert list(paths) == ["a", "b"]
    assert list(paths["a"].get_xdata()) == [0.5, 0.7]
    assert whole.get_xlim() == (0, 1.02)
    assert near.get_title(loc="left") == "a: nHSIC plane of 64 samples"


def test_plane_of_a_journal_that_does_not_name_its_samples(finished: Run) -> None:
    for entry in finished.journal:
        for drawn in entry.get("plane", ()):
            del drawn["num_samples"]
    figure = plane_picture(finished)
    assert figure.axes[0].get_title(loc="left") == "a: nHSIC plane"


def test_comparison_files(finished: Run, unfinished: Run, tmp_path: Path) -> None:
    written = side_by_side([finished, unfinished], tmp_path / "report")
    assert [path.name for path in written] == ["comparison.md", "accuracy.png", "report.html"]
    assert "| a (sbt, 2 rounds) | 50.0 |" in written[0].read_text()


def test_reports_need_no_torch(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    program = (
        "import sys; from scalefl.cli import app; "
        f"app(['report', {str(folder)!r}], standalone_mode=False); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert (folder / "nhsic.png").exists()
