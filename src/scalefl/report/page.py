"""One HTML page that holds all of a report: it loads nothing, and can be read without scripts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from scalefl.report.svg import inline, key
from scalefl.report.tables import Numbers, Table
from scalefl.run_folder import PAGE


@dataclass(frozen=True)
class Picture:
    """A picture, and the numbers that it is drawn from.

    Args:
        caption: what it shows.
        panels: its parts, which share a key; each is one plot.
        numbers: all that is drawn.
    """

    caption: str
    panels: Sequence[Figure]
    numbers: Numbers


@dataclass(frozen=True)
class Section:
    """Tables and then pictures under a heading, and last the numbers that stand for themselves."""

    heading: str
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    numbers: Sequence[Numbers] = ()


@dataclass(frozen=True)
class Page:
    """A report.

    Args:
        title: what it is about.
        facts: what was run, as pairs of a term and what there is to say.
        sections: in the order of reading.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section]


def write_page(page: Page, folder: Path) -> Path:
    """Write a page into a folder, which is made if need be, and return the file's path.

    Raises:
        OSError: the folder can't be made or written to.
    """
    environment = Environment(
        loader=PackageLoader("scalefl.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["zip"] = zip
    environment.filters |= {"key": _key, "panels": _panels, "data_link": _data_link}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PAGE
    path.write_text(environment.get_template("page.html").render(page=page), encoding="utf-8")
    return path


def _key(picture: Picture, name: str) -> list[tuple[str, str]]:
    return list(key(picture.panels[0], name))


def _panels(picture: Picture, name: str) -> Iterator[str]:
    for number, figure in enumerate(picture.panels):
        (axes,) = figure.axes
        shown = " over ".join(filter(None, (axes.get_ylabel(), axes.get_xlabel()))).replace("\n", " ")
        yield inline(figure, f"{name}-{number}", f"{picture.caption}: {shown}")


def _data_link(numbers: Numbers) -> str:
    return f"data:text/csv;charset=utf-8,{quote(numbers.to_csv(), safe=' ,:/+')}"
