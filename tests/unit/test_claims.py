"""Every sentence of README that claims something has tests, which docs/claims.md names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECTIONS = ("Your model, your data", "What it does", "How good it is")

SILENT = {
    # The first words of an entry, in bold: what follows them says it.
    "Any model.",
    "Budgets that mean something.",
    "As little loss as a budget forces.",
    "Exact.",
    "Quick to run.",
    "Privacy, as an option.",
    "Reports to hand on.",
    "Methods:",
    # The end of a title, and where to read on.
    "Scaling Federated Learning for Heterogeneous Clients (arXiv 2408.10826); docs/fidelity.md says what we follow, "
    "what we test, and what we do otherwise.",
    "docs/benchmarks has the configs, costs, causes, what block 1 keeps of its input with and without the mentor, "
    "and what the engine costs.",
    # What one needs to begin: where it is not so, no test runs.
    "Both need Python ≥ 3.11, git and make; they make `.venv` on first use and reuse it afterwards.",
}


def plain(text: str) -> str:
    """Without emphasis, targets of links and line breaks."""
    return " ".join(re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text.replace("*", "")).split())


README = (ROOT / "README.md").read_text()
ROWS = re.findall(r"^\| (?!README says)(\S.*?) \| (.*) \|$", (ROOT / "docs" / "claims.md").read_text(), re.MULTILINE)


def said() -> list[str]:
    """README's sentences, and the commands in its blocks of code, in the sections that claim something."""
    opening, *rest = re.split(r"^## (.*)\n", README, flags=re.MULTILINE)
    sections = dict(zip(rest[::2], rest[1::2], strict=True))
    found = []
    for text in (opening, *(sections[name] for name in SECTIONS)):
        if text is not opening:  # its commands are those of make
            commands = "\n".join(re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
            found += [plain(line) for line in commands.splitlines()]
        prose = re.sub(r"^```.*?^```$|^(?:[|#]|!\[)[^\n]*$", "", text, flags=re.MULTILINE | re.DOTALL)
        for paragraph in re.split(r"\n\s*\n|^- ", prose, flags=re.MULTILINE):
            found += re.split(r"(?<=[.!?:]) (?=[A-Z`]|docs/benchmarks has)", plain(paragraph))
    return list(filter(None, found))


@pytest.mark.parametrize("sentence", said())
def test_what_the_readme_says_has_a_test(sentence: str) -> None:
    assert sentence in SILENT or any(sentence.startswith(plain(quote)) for quote, _ in ROWS), "not in docs/claims.md"


@pytest.mark.parametrize(("quote", "shown_by"), ROWS, ids=[quote for quote, _ in ROWS])
def test_what_the_page_says_is_there(quote: str, shown_by: str) -> None:
    assert plain(README).count(plain(quote)) == 1
    names = re.findall(r"`([^`]+)`", shown_by)
    assert any("::" in name for name in names)
    for name in names:
        path, _, test = name.partition("::")
        if name.startswith("make "):
            assert re.search(rf"^\.PHONY:.* {name.removeprefix('make ')}\b", (ROOT / "Makefile").read_text(), re.M)
        else:
            assert f"\ndef {test.partition('[')[0]}(" in (ROOT / path).read_text() if test else (ROOT / path).exists()


def test_nothing_is_listed_that_nobody_says() -> None:
    assert ROWS and set(said()) >= SILENT
