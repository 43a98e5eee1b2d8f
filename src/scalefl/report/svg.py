"""Pictures as parts of a page: their text stays text, their colours are the page's, in light and in dark."""

from __future__ import annotations

import re
from collections.abc import Iterator
from io import StringIO
from itertools import count
from xml.etree import ElementTree

import matplotlib
from matplotlib.artist import Artist
from matplotlib.figure import Figure

from scalefl.report.pictures import GRID, PALETTE, QUIET, STYLE, TERM_COLOURS

WIDTH = 4.4
"""Inches: no wider than a phone, where a picture is shown as it is drawn; so its text can be read there."""
LARGEST = 1.6
"""How much a picture grows where there is room; its text is as large as the page's then."""
COLOURS = {
    **{colour.lower(): f"var(--series-{number})" for number, colour in enumerate(PALETTE, 1)},
    TERM_COLOURS["transients"].lower(): "var(--series-8)",
    GRID.lower(): "var(--grid)",
    QUIET.lower(): "var(--quiet)",
    "#ffffff": "var(--page)",
    "#000000": "currentColor",
}
"""The colours of pictures, and what the page has for them."""
SWATCH = (0.5, 0.17)
"""Inches."""


def inline(figure: Figure, name: str, label: str) -> str:
    """A picture as an SVG element, without its title and its key, which the page has as text.

    Args:
        figure: is changed.
        name: of the picture in the page; its ids start with it.
        label: says what it shows to those who don't see it.
    """
    for legend in list(figure.legends):
        legend.remove()
    figure.suptitle("")
    for axes in figure.axes:
        axes.set_title("", loc="left")
    width, height = figure.get_size_inches()
    scale = min(1.0, WIDTH / width)
    figure.set_size_inches(width * scale, height * scale)
    return _element(figure, name, {"role": "img", "aria-label": label})


def key(figure: Figure, name: str) -> Iterator[tuple[str, str]]:
    """What the legend of a picture says: pairs of a swatch, as an SVG element, and a text."""
    for legend in figure.legends:
        for number, (handle, text) in enumerate(zip(legend.legend_handles, legend.get_texts(), strict=True)):
            if handle is not None:
                yield _swatch(handle, f"{name}-key{number}"), text.get_text()


def _swatch(handle: Artist, name: str) -> str:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SWATCH)
        figure.legend([handle], [""], loc="center", borderpad=0, handletextpad=0, handlelength=3.2)
    return _element(figure, name, {"aria-hidden": "true"})


def _element(figure: Figure, name: str, attributes: dict[str, str]) -> str:
    file = StringIO()
    with matplotlib.rc_context({**STYLE, "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", transparent=True)
    root = ElementTree.fromstring(file.getvalue())
    for element in root.iter():
        for child in list(element):
            # Who drew it and when; and a style sheet, which would hold for the whole page.
            if child.tag.endswith(("}metadata", "}style")):
                element.remove(child)
    new_ids = _new_ids(root, name)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]  # HTML knows the names of SVG
        if element.tag != "text":
            element.text = None
        element.tail = None
        element.attrib = dict(_attributes(element, new_ids))
    width = float(root.attrib["width"].removesuffix("pt"))
    root.attrib = {"viewBox": root.attrib["viewBox"], "style": f"max-width:{LARGEST * width:.0f}px", **attributes}
    return ElementTree.tostring(root, encoding="unicode")


def _new_ids(root: ElementTree.Element, name: str) -> dict[str, str]:
    """For the id of each element that another one refers to, one that nothing else in the page has."""
    numbers = count(1)
    text = " ".join(value for element in root.iter() for value in element.attrib.values())
    used = set(re.findall(r"#([\w-]+)", text))
    found = (element.get("id", "") for element in root.iter())
    return {old: f"{name}-{next(numbers)}" for old in found if old in used}


def _attributes(element: ElementTree.Element, new_ids: dict[str, str]) -> Iterator[tuple[str, str]]:
    for attribute, value in element.attrib.items():
        if attribute == "id":
            if value in new_ids:
                yield attribute, new_ids[value]
        elif attribute == "style":
            value = re.sub(r"#[0-9a-f]{6}", lambda found: COLOURS.get(found[0], found[0]), value)
            value = re.sub(r"(font-family: |font: [^;]*px )[^;]*", r"\1var(--font)", value)
            yield attribute, value.replace("; ", ";").replace(": ", ":")
        else:
            value = re.sub(r"#([\w-]+)", lambda found: f"#{new_ids[found[1]]}", value)
            value = re.sub(r"-?\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", value)
            yield attribute.rpartition("}")[2], " ".join(value.split())
