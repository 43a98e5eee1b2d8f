"""The page of a report: one file, well-formed, harmless whatever names are, the same bytes each time."""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from io import StringIO
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

from typer.testing import CliRunner

from made_up import line, write_comparison, write_run
from scalefl.cli import app
from scalefl.report import draw, read_run, side_by_side
from scalefl.report.comparison import MOST_ON_PAGE, curves_numbers, mean_curves, read_results, tables, write
from scalefl.report.tables import NOTHING, Numbers
from scalefl.run_folder import PAGE, RunFolder

VOID = {"meta", "link", "br"}
EVIL = """<script>alert('1')</script>"><img src=x onerror=alert(2)>&amp;]]>"""


class Element:
    """An element of a parsed page."""

    def __init__(self, tag: str, attributes: dict[str, str | None]) -> None:
        self.tag, self.attributes, self.children, self.text = tag, attributes, [], ""

    def all(self, tag: str) -> list[Element]:
        """The elements of a kind below this one, in their order."""
        return [found for child in self.children for found in [*([child] * (child.tag == tag)), *child.all(tag)]]

    @property
    def words(self) -> str:
        """Its text and that of what is below it."""
        return " ".join(f"{self.text} {' '.join(child.words for child in self.children)}".split())


class Parsed(HTMLParser):
    """A page in which every element is closed, in the right order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]
        self.feed(page)
        self.close()
        assert self.open == [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].text += data


def elements(root: Element) -> list[Element]:
    return [found for child in root.children for found in [child, *elements(child)]]


def checked(path: Path) -> Element:
    """The page in a file, which is as every page has to be."""
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", text.partition("<script>")[0])
    root = Parsed(text).root
    found = elements(root)
    ids = Counter(element.attributes["id"] for element in found if "id" in element.attributes)
    assert set(ids.values()) == {1}
    for element in found:
        for name, value in element.attributes.items():
            assert not name.startswith("on") and name != "src"
            for target in re.findall(r"#([\w-]+)", value or "") if name in ("href", "clip-path") else ():
                assert target in ids
            if name == "aria-labelledby":
                assert value in ids
            if name == "style":
                assert not re.search(r"#[0-9a-f]{6}", value or "")  # both light and dark have their own
    (html,), (title,), (main,), (heading,) = (root.all(tag) for tag in ("html", "title", "main", "h1"))
    assert html.attributes["lang"] == "en" and heading.words in title.words and main.all("h2")
    assert len(root.all("script")) == 1 and not root.all("img")
    levels = [int(element.tag[1]) for element in found if re.fullmatch(r"h\d", element.tag)]
    assert levels[0] == 1 and all(below - above <= 1 for above, below in pairwise(levels))
    for table in root.all("table"):
        assert table.all("caption")[0].words
        headers = [cell for cell in table.all("th") if cell.attributes["scope"] == "col"]
        rows = table.all("tbody")[0].all("tr")
        assert all(cell.words for cell in headers)
        assert all([cell.tag for cell in row.children] == ["th"] + ["td"] * (len(headers) - 1) for row in rows)
    for figure in root.all("figure"):
        assert figure.all("figcaption")[0].words and figure.all("details")[0].all("table")
        assert any(svg.attributes.get("aria-label") for svg in figure.all("svg"))
    return root


def linked_csv(element: Element) -> list[list[str]]:
    (link,) = [link for link in element.all("a") if "download" in link.attributes]
    head, _, content = str(link.attributes["href"]).partition(",")
    assert head == "data:text/csv;charset=utf-8"
    return list(csv.reader(StringIO(unquote(content))))


def test_the_page_of_a_comparison(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "both", scenarios=["generous", "tight"], unfinished=[("tight", "fedavg", 2)])
    (*_, page) = write(read_results(folder), tmp_path / "out")
    assert page == tmp_path / "out" / PAGE
    root = checked(page)
    assert [heading.words for heading in root.all("h2")] == ["Over budgets", "generous", "tight", "Each run"]
    facts = dict(zip(*([it.words for it in root.all(tag)] for tag in ("dt", "dd")), strict=True))
    assert facts == {
        "variants": "fedavg, scalefl",
        "scenarios": "generous, tight",
        "seeds": "0, 1, 2",
        "runs": "11 of 12 finished, 1 missing",
    }
    shown = root.all("main")[0].words
    for scenario in ("generous", "tight"):
        for table in tables(read_results(folder), scenario):
            assert table.title in shown and all(note in shown for note in table.notes)
            assert all(cell in shown for row in table.rows for cell in row)
    over_budgets, *curves = root.all("figure")
    assert [len(figure.all("svg")) - len(figure.all("li")) for figure in (over_budgets, *curves)] == [1, 4, 4]
    assert [[entry.words for entry in figure.all("li")] for figure in curves] == [["fedavg", "scalefl"]] * 2
    assert linked_csv(over_budgets)[0][1:3] == ["scenario", "seeds"]
    assert len(linked_csv(curves[0])) == 1 + 2 * 13
    assert len(linked_csv(root.all("details")[-1])) == 1 + 11


def test_a_comparison_without_scenarios_or_finished_runs(tmp_path: Path) -> None:
    nothing = [("", variant, seed) for variant in ("fedavg", "scalefl") for seed in (0, 1, 2)]
    root = checked(write(read_results(write_comparison(tmp_path / "none", unfinished=nothing)), tmp_path)[-1])
    assert "0 of 6 finished, 6 missing" in root.words and "scenarios" not in root.words
    assert [heading.words for heading in root.all("h2")] == ["Variants"]
    assert not root.all("figure") and not root.all("nav")
    assert len(root.all("table")) == 2


def test_the_page_of_a_run(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a"))
    root = checked(draw(run, tmp_path / "out")[-1])
    assert [heading.words for heading in root.all("h2")] == ["Figures", "Memory", "nHSIC plane"]
    assert "rounds 2 of 2" in root.words and "2.50 TFLOP" in root.words
    accuracy, memory, plane = root.all("figure")
    assert linked_csv(accuracy) == [
        ["run", "round", "validation accuracy %"],
        ["a", "0", "10"],
        ["a", "1", "50"],
        ["a", "2", "75"],
    ]
    assert linked_csv(memory)[1] == ["full training", "10", "1", "1", "1", "5", "2", "5"]
    assert "small 5.00 MiB, large 12.0 MiB" in memory.words
    assert [row[:3] for row in linked_csv(plane)[1:]] == [[cut, n, x] for cut, n, x in (
        ("a", "0", "0.5"), ("a", "2", "0.7"), ("b", "0", "0.6"), ("b", "2", "0.6"),
    )]  # fmt: skip


def test_the_page_of_a_run_that_has_hardly_begun(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", finished=False)
    RunFolder(folder).journal.unlink()
    root = checked(draw(read_run(folder), folder)[-1])
    assert "rounds 0 of 2: unfinished" in root.words
    assert [heading.words for heading in root.all("h2")] == ["Figures", "Memory"]


def test_the_page_of_several_runs(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / name, "same", finished=name != "b")) for name in "ab"]
    root = checked(side_by_side(runs, tmp_path / "out")[-1])
    assert "unfinished same" in root.words
    assert [entry.words for entry in root.all("figure")[0].all("li")] == ["same", "same"]


def test_names_are_harmless(tmp_path: Path) -> None:
    """Names of runs, classes, models and cuts are any text; those of variants and scenarios, folders' names."""
    folder = write_run(tmp_path / "a", EVIL)
    plan = json.loads((folder / "plan.json").read_text())
    plan |= {"model": EVIL, "budgets_bytes": {EVIL: 2**22}}
    (folder / "plan.json").write_text(json.dumps(plan))
    journal = [{**line(0, 0.1), "plane": [{**line(0, 0.1)["plane"][0], "cut": EVIL}]}]
    (folder / "journal.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in journal))
    run = read_run(folder)
    assert checked(draw(run, folder)[-1]).words.count("<script>alert('1')</script>") >= 5
    assert EVIL in checked(side_by_side([run, run], folder)[-1]).words

    evil = EVIL.replace("/", "")
    compared = write_comparison(tmp_path / evil, variants=[evil, "_$a", "_$b"], scenarios=[evil, "$\\frac$"], seeds=[0])
    root = checked(write(read_results(compared), tmp_path / "out")[-1])
    assert evil in root.all("h1")[0].words
    assert [entry.words for entry in root.all("figure")[1].all("li")] == [evil, "_$a", "_$b"]
    assert {row[0] for row in linked_csv(root.all("figure")[1])[1:]} == {evil, "_$a", "_$b"}


def test_the_same_folders_give_the_same_bytes(tmp_path: Path) -> None:
    results = read_results(write_comparison(tmp_path / "both", scenarios=["a", "b"], rounds=3))
    run = read_run(write_run(tmp_path / "run"))
    first, again = (
        [write(results, tmp_path / n)[-1].read_bytes(), draw(run, tmp_path / n)[-1].read_bytes()] for n in "xy"
    )
    assert first == again


def test_long_runs_leave_the_page_small(tmp_path: Path) -> None:
    """A third of a grid of three scenarios."""
    variants = [f"variant-{number}" for number in range(12)]
    results = read_results(write_comparison(tmp_path / "grid", variants, rounds=500))
    root = checked(page := write(results, tmp_path)[-1])
    assert page.stat().st_size < 500_000
    rows = linked_csv(root.all("figure")[0])[1:]
    assert f"{MOST_ON_PAGE} of the evaluated rounds" in root.words
    rounds = [int(row[1]) for row in rows if row[0] == "variant-3"]
    assert (len(rounds), rounds[0], rounds[-1]) == (MOST_ON_PAGE, 0, 500)
    assert max(b - a for a, b in pairwise(rounds)) <= 9


def test_what_is_no_number_is_left_out(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "odd", seeds=[0, 1], rounds=4)
    files = RunFolder(folder / "scalefl-1")
    journal = files.read_journal()
    journal[2]["validation"]["accuracy"] = math.nan
    files.journal.write_text("".join(json.dumps(entry) + "\n" for entry in journal))
    summary = json.loads(files.summary.read_text())
    files.summary.write_text(json.dumps({**summary, "test": {"accuracy": math.nan}, "client_test": {}}))
    results = read_results(folder)
    row = tables(results, "")[0].rows[1]
    assert row[0] == "scalefl" and row[2] == NOTHING and row[3] != NOTHING
    numbers = curves_numbers(mean_curves(results, ""), "")
    assert [cells[1] for cells in numbers.rows if cells[0] == "scalefl"] == [0, 1, 3, 4]
    checked(write(results, tmp_path)[-1])

    run = write_run(tmp_path / "run")
    entries = [line(number, math.nan) for number in range(3)]
    for entry in entries:
        entry["plane"][0]["x"] = math.nan
    (run / "journal.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    root = checked(draw(read_run(run), run)[-1])
    _, plane = root.all("figure")
    assert {row[0] for row in linked_csv(plane)[1:]} == {"b"}


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "both", seeds=[0], rounds=2)
    (tmp_path / "out" / PAGE).mkdir(parents=True)
    failed = CliRunner().invoke(app, ["report", str(folder), "--out", str(tmp_path / "out")])
    assert failed.exit_code == 1
    assert failed.stderr.strip() == f"error: {tmp_path / 'out' / PAGE}: Is a directory"


def test_numbers_are_shown_with_as_many_digits_as_they_need() -> None:
    numbers = Numbers("t", ("a", "b", "c", "d"), (("x", 1.0, 12345, None), ("y", 98.7654321, 0, 1e-5)))
    assert numbers.to_table().rows == (("x", "1.00", "12,345", NOTHING), ("y", "98.77", "0", "0.00001000"))
    assert numbers.to_csv() == "a,b,c,d\nx,1,12345,\ny,98.7654,0,1e-05\n"
    assert Numbers("t", ("a",), ()).to_table().rows == ()
