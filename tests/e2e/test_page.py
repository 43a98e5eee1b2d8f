"""The page of a report in a browser: by mouse and by keyboard, in the dark, on a phone, and for screen readers."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from made_up import write_comparison, write_run
from scalefl.report import draw, read_run
from scalefl.report.comparison import read_results, write
from scalefl.report.page import Page, Section, write_page
from scalefl.report.tables import NOTHING, Table

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = Path("/usr/bin/chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no {CHROMIUM}: Debian's package chromium")

ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
)
PHONE = {"width": 360, "height": 740}

# What each text on the page looks like: itself, its size, its colour and that of the ground on which it stands.
TEXTS = """() => {
  const ground = (element) => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if (colour !== "rgba(0, 0, 0, 0)") return colour;
    }
  };
  return [...document.querySelectorAll("body *")]
    .filter((element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()))
    .filter((element) => element.checkVisibility() && !["SCRIPT", "STYLE"].includes(element.tagName))
    .map((element) => {
      const style = getComputedStyle(element), before = getComputedStyle(element, "::before");
      const colour = element instanceof SVGElement ? style.fill : style.color;
      return [element.textContent.trim(), colour, ground(element), before.color];
    });
}"""

COLOURS = """(swatches) => swatches.map((swatch) => [...swatch.querySelectorAll("path, use")]
  .map((it) => getComputedStyle(it)).flatMap((style) => [style.fill, style.stroke]))"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages: of a comparison one of whose variants has not run, of a run, and of one table."""
    home = tmp_path_factory.mktemp("pages")
    missing = [(scenario, "late", seed) for scenario in ("generous", "tight") for seed in (0, 1)]
    names = ["late", "fedavg", "scalefl-with-a-long-name-on-a-narrow-page", "sbt"]
    folder = write_comparison(home / "both", names, ["generous", "tight"], [0, 1], rounds=6, unfinished=missing)
    table = Table(
        "Made to be sorted",
        ("name", "score\n%", "bytes", "fits"),
        (
            ("a", "12.3 ± 0.4", "98.1", "small"),
            ("b", NOTHING, "1,234", "none"),
            ("c", "9.5 ± 0.1", NOTHING, "10 of 12"),
            ("d", "100.0", "7.00", "9 of 12"),
        ),
        texts=frozenset({"fits"}),
    )
    return {
        "comparison": write(read_results(folder), home / "comparison")[-1],
        "run": draw(read_run(write_run(home / "a")), home / "run")[-1],
        "table": write_page(Page("Table", [], [Section("One", [table])]), home / "table"),
    }


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS.split())
        yield chromium
        chromium.close()


@contextmanager
def opened(browser: Any, file: Path, **context: Any) -> Iterator[Any]:
    """A page that asks for nothing but its file, and has nothing to complain of."""
    with browser.new_context(**context) as session:
        page = session.new_page()
        said, asked = [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        yield page
        assert not said
        assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]


def order(page: Any) -> str:
    return "".join(page.locator("tbody th").all_text_contents())


def contrast(one: str, other: str) -> float:
    """The ratio of WCAG 2.2 between two colours as computed styles have them."""

    def luminance(colour: str) -> float:
        red, green, blue = (float(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(","))
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_tables_are_sorted_by_click(browser: Any, files: dict[str, Path]) -> None:
    with opened(browser, files["table"]) as page:
        for column, upwards, downwards in (
            ("score", "cadb", "dacb"),
            ("bytes", "dabc", "badc"),
            ("fits", "dcba", "abcd"),
            ("name", "abcd", "dcba"),
        ):
            header = page.get_by_role("columnheader", name=column)
            assert header.get_attribute("aria-sort") is None
            for direction, found in (("ascending", upwards), ("descending", downwards), ("ascending", upwards)):
                header.get_by_role("button").click()
                assert (header.get_attribute("aria-sort"), order(page)) == (direction, found)
            assert page.locator("[aria-sort]").count() == 1


def test_everything_is_reached_by_keyboard(browser: Any, files: dict[str, Path]) -> None:
    with opened(browser, files["table"]) as page:
        page.keyboard.press("Tab")
        assert page.locator(":focus").inner_text() == "Skip to the report"
        assert page.locator(":focus").bounding_box()["x"] >= 0
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        region = page.locator(":focus")
        assert region.get_attribute("role") == "region"
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        outline = page.evaluate("getComputedStyle(document.activeElement).outline")
        assert "solid" in outline and "3px" in outline
        for key, found in (("Enter", "cadb"), ("Space", "dacb")):
            page.keyboard.press(key)
            assert order(page) == found
        assert page.locator(":focus").inner_text().split() == ["score", "%"]


def test_the_numbers_behind_a_picture_open_by_keyboard(browser: Any, files: dict[str, Path], tmp_path: Path) -> None:
    with opened(browser, files["comparison"]) as page:
        figure = page.get_by_role("figure").first
        table = figure.get_by_role("table")
        assert not table.is_visible()
        figure.locator("summary").focus()
        page.keyboard.press("Enter")
        assert table.is_visible() and table.locator("tbody tr").count() == 6
        page.keyboard.press("Tab")
        with page.expect_download() as download:
            page.keyboard.press("Enter")
        download.value.save_as(tmp_path / "numbers.csv")
        with (tmp_path / "numbers.csv").open() as file:
            assert len(list(csv.reader(file))) == 7


@pytest.mark.parametrize("name", ["comparison", "run"])
def test_text_stands_out_in_light_and_in_dark(browser: Any, files: dict[str, Path], name: str) -> None:
    grounds, texts = [], []
    for scheme in ("light", "dark"):
        with opened(browser, files[name], color_scheme=scheme) as page:
            page.evaluate("document.querySelectorAll('details').forEach((details) => details.open = true)")
            found = page.evaluate(TEXTS)
            assert len(found) > 100
            faint = {text: ratio for text, *look in found if (ratio := contrast(*look[:2])) < 4.5}
            assert not faint
            assert all(contrast(ground, before) >= 4.5 for *_, ground, before in found)
            ground = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
            for colours in page.locator(".key svg").evaluate_all(COLOURS):
                assert max(contrast(colour, ground) for colour in colours if colour != "none") >= 3
            grounds.append(ground)
            texts.append(page.locator("svg text").first.evaluate("(it) => getComputedStyle(it).fill"))
    assert contrast(*grounds) > 10 and contrast(*texts) > 10


@pytest.mark.parametrize("name", ["comparison", "run"])
def test_a_phone_scrolls_tables_and_not_the_page(browser: Any, files: dict[str, Path], name: str) -> None:
    with opened(browser, files[name], viewport=PHONE) as page:
        page.evaluate("document.querySelectorAll('details').forEach((details) => details.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
        wide = page.locator(".scroll").evaluate_all("all => all.filter((it) => it.scrollWidth > it.clientWidth).length")
        assert wide
        for picture in page.get_by_role("img").all():
            box = picture.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"]
            drawn = picture.evaluate("(it) => it.viewBox.baseVal.width")
            assert 9 * box["width"] / drawn > 8.5  # the smallest text, in pixels


def test_the_names_of_rows_stay_and_hide_nothing_in_focus(browser: Any, files: dict[str, Path]) -> None:
    with opened(browser, files["comparison"], viewport=PHONE) as page:
        table = page.get_by_role("table", name="both: tight: cost")
        names, second, *_, last = table.get_by_role("columnheader").all()
        for header in (last, second):  # to the very right, and back
            header.get_by_role("button").focus()
            page.wait_for_timeout(50)  # for the browser to scroll
            left, box = names.bounding_box(), header.bounding_box()
            assert left["x"] >= 0
            assert left["x"] + left["width"] <= box["x"] + 1 and box["x"] < PHONE["width"]


def test_a_screen_reader_finds_names_for_everything(browser: Any, files: dict[str, Path]) -> None:
    with opened(browser, files["comparison"]) as page:
        page.evaluate("document.querySelectorAll('details').forEach((details) => details.open = true)")
        session = page.context.new_cdp_session(page)
        nodes = session.send("Accessibility.getFullAXTree")["nodes"]
        found: dict[str, list[str]] = {}
        for node in nodes:
            if not node.get("ignored"):
                found.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
        for role, count in {"figure": 3, "image": 9, "table": 8, "region": 12, "navigation": 1, "main": 1}.items():
            assert len(found[role]) == count, (role, found[role])
            assert all(found[role]) or role == "main"
        assert all(found["button"]) and all(found["columnheader"]) and all(found["rowheader"])
        assert "accuracy %" in found["button"]
        assert "both: tight: accuracy" in found["table"]
        assert "validation accuracy (%) over round" in " ".join(found["image"])
        assert found["heading"] == ["both", "Over budgets", "generous", "tight", "Each run"]


def test_without_scripts_everything_can_be_read(browser: Any, files: dict[str, Path]) -> None:
    with opened(browser, files["comparison"], java_script_enabled=False) as page:
        assert page.get_by_role("table").count() == 4
        assert page.get_by_role("button").count() == 0
        page.locator("summary").first.click()
        assert page.get_by_role("table").count() == 5


def test_nothing_moves_for_those_who_asked_for_that(browser: Any, files: dict[str, Path]) -> None:
    for asked, found in (("reduce", "auto"), ("no-preference", "smooth")):
        with opened(browser, files["run"], reduced_motion=asked) as page:
            assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == found
