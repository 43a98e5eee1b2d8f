"""What the commands have in common: a console, a bar or lines for progress, and the figures at the end."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from scalefl.run_folder import RunFolder
from scalefl.units import mib, privacy

if TYPE_CHECKING:
    from scalefl.bookkeeping import RunProgress
    from scalefl.comparison import Comparison

PLAIN_WIDTH = 120
"""Columns where the output is no terminal and nobody says how wide it is."""
PLAIN_SECONDS = 30.0
"""Where the output is no terminal, a line is printed at least so often, and after each tenth of the rounds."""

_FIELDS, _WIDE = ("loss", "accuracy", "privacy", "moved", "speed"), 100
"""What stands beside a run's bar, and from how many columns on there is room for all of it."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with what to say about it."""


@dataclass
class _Totals:
    """What a run has come to; `samples` and `seconds` of the rounds that are done here, not before a resumption."""

    bytes_moved: int = 0
    accuracy: float | None = None
    samples: int = 0
    seconds: float = 0.0

    def add(self, line: Mapping[str, Any]) -> None:
        """Count a line of the journal."""
        self.bytes_moved += line.get("bytes_down", 0) + line.get("bytes_up", 0)
        self.accuracy = line.get("validation", {}).get("accuracy", self.accuracy)

    def clock(self, progress: RunProgress) -> None:
        """Count what a round has trained on, and how long it took."""
        self.samples += progress.samples
        self.seconds += progress.line.get("seconds", 0.0)

    def describe(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """The words beside the bar."""
        train = line.get("train", {})
        loss = train.get("loss")
        return {
            "loss": "" if "loss" not in train else "loss is no number" if loss is None else f"loss {loss:.3f}",
            "accuracy": "" if self.accuracy is None else f"val. acc. {100 * self.accuracy:.1f} %",
            # Of private runs no bytes, which would tell how many clients take part.
            "privacy": privacy(line["privacy"]) if "privacy" in line else "",
            "moved": "" if "privacy" in line else f"{mib(self.bytes_moved)} MiB moved",
            "speed": f"{self.samples / self.seconds:,.0f} samples/s" if self.samples and self.seconds else "",
        }


def _described(rounds: Iterator[RunProgress], folder: Path) -> Iterator[tuple[RunProgress, dict[str, Any]]]:
    """Each round with its words; totals count the rounds before a resumption too."""
    totals: _Totals | None = None
    for progress in rounds:
        lines = [progress.line]
        if totals is None:  # the journal may already have rounds that are told of later
            journal = RunFolder(folder).read_journal()
            lines = [line for line in journal if line["round"] <= progress.line["round"]]
        totals = totals or _Totals()
        for line in lines:
            totals.add(line)
        totals.clock(progress)
        yield progress, totals.describe(progress.line)


def follow(console: Console, rounds: Iterator[RunProgress], folder: Path) -> None:
    """Show rounds as they come: in a bar, or line by line where the output is no terminal."""
    (_follow_live if console.is_terminal else _follow_plainly)(console, rounds, folder)


def _follow_live(console: Console, rounds: Iterator[RunProgress], folder: Path) -> None:
    fields = [name for name in _FIELDS if name != "moved" or console.width >= _WIDE]
    with bar_beside(console, *fields) as bar, contextlib.ExitStack() as preparing:
        nothing: dict[str, Any] = dict.fromkeys(_FIELDS, "")
        task = bar.add_task("preparing", total=None, **nothing)
        preparing.enter_context(_steps(lambda text: bar.update(task, description=escape(text))))
        started = False
        for progress, words in _described(rounds, folder):
            done, stage = progress.line["round"], progress.line["stage"]
            if not started:  # the clock starts here: preparing, and rounds before a resumption, say nothing of speed
                preparing.close()
                bar.reset(task, total=progress.rounds, completed=done)
                started = True
            bar.update(task, completed=done, description=stage, **words)


def bar_beside(console: Console, *fields: str) -> Progress:
    """A bar with fields of text beside it; only on a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        *(TextColumn(f"{{task.fields[{name}]}}") for name in fields),
        TimeRemainingColumn(),
        console=console,
        # What is counted may take minutes: the mean over all of it tells the time left.
        speed_estimate_period=float("inf"),
        disable=not console.is_terminal,
    )


def _follow_plainly(console: Console, rounds: Iterator[RunProgress], folder: Path) -> None:
    first, start, printed = 0, 0.0, 0.0
    for progress, words in _described(rounds, folder):
        done, now = progress.line["round"], time.monotonic()
        texts = [f"round {done}/{progress.rounds}", progress.line["stage"], *filter(None, words.values())]
        if first:
            texts.append(f"{(now - start) / (done - first) * (progress.rounds - done):.0f} s left")
        else:
            first, start = done, now
        tenth = max(1, progress.rounds // 10)
        if done in (first, progress.rounds) or done % tenth == 0 or now - printed > PLAIN_SECONDS:
            console.print(", ".join(texts), highlight=False, soft_wrap=True)
            printed = now


def conclude(console: Console, folder: Path) -> None:
    """Draw a finished run, and print its figures and files."""
    from scalefl.report import draw, read_run
    from scalefl.report.tables import show, summary_table

    finished = read_run(folder)
    draw(finished, folder)
    console.print()
    show(console, summary_table(finished))
    print_files(console, sorted(folder.iterdir()))


def follow_jobs(console: Console, comparison: Comparison, parallel: int | None) -> list[str]:
    """Run a comparison's jobs, and show how many are done; returns what went wrong, a text for each failed run."""
    failed: list[str] = []
    with bar_beside(console) as bar, contextlib.closing(comparison.run(parallel)) as ended:
        task = bar.add_task(comparison.name, total=len(comparison.jobs))
        for number, one in enumerate(ended, 1):
            if one.before:  # the clock starts with what runs now
                bar.reset(task, completed=number)
            bar.update(task, completed=number)
            if one.error:
                failed.append(f"{one.job.folder}: {one.error.removeprefix('error: ')}")
            console.print(
                f"{number}/{len(comparison.jobs)} {one.job.folder}{': failed' if one.error else ''}",
                highlight=False,
                soft_wrap=True,
            )
            for warning in one.warnings:
                console.print(f"  {warning}", highlight=False, markup=False, soft_wrap=True)
    return failed


def conclude_comparison(console: Console, folder: Path, out: Path | None) -> None:
    """Draw a comparison, and print its tables and files."""
    from scalefl.report.comparison import read_results, tables, write
    from scalefl.report.tables import show

    results = read_results(folder)
    for scenario in results.runs:
        for table in tables(results, scenario):
            show(console, table)
    print_files(console, write(results, out or folder))


def print_files(console: Console, paths: list[Path]) -> None:
    """Print which files were written."""
    console.print("Files written:")
    for path in paths:
        console.print(f"  {path}", highlight=False, soft_wrap=True)


class _Output(Console):
    """Standard output, as long as somebody reads it: a run goes on without."""

    def on_broken_pipe(self) -> None:
        """See `Console`, which would end the program."""
        self.quiet = True
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def console_of() -> Console:
    """Standard output."""
    console = _Output()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        return _Output(width=PLAIN_WIDTH)
    return console


@contextlib.contextmanager
def telling(first: str) -> Iterator[Callable[[str], None]]:
    """Show on standard error what is under way, if that is a terminal: `first`, and then each step that is logged.

    Yields:
        What shows something else.
    """
    console = Console(stderr=True)
    with console.status(Text(first), refresh_per_second=4) as status:  # seldom, as others may be timed

        def show(text: str) -> None:
            status.update(Text(text))

        with _steps(show) if console.is_terminal else contextlib.nullcontext():
            yield show


class _Steps(logging.Handler):
    """Shows what the package says it is at."""

    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.INFO:
            self._show(record.getMessage())


@contextlib.contextmanager
def _steps(show: Callable[[str], None]) -> Iterator[None]:
    logger, handler = logging.getLogger("scalefl"), _Steps(show)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(min(logger.getEffectiveLevel(), logging.INFO))
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


class _ToStderr(logging.Handler):
    """Prints to what standard error is at that moment: a progress bar takes its place while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        said = "warning: " if record.levelno >= logging.WARNING else ""
        with contextlib.suppress(OSError):  # nobody reads it any more
            print(said + self.format(record), file=sys.stderr)


@contextlib.contextmanager
def talking(level: int) -> Iterator[None]:
    """Print the package's messages from this level on."""
    logger, handler = logging.getLogger("scalefl"), _ToStderr()
    before = logger.level
    handler.setLevel(level)
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@contextlib.contextmanager
def apart(is_wanted: bool) -> Iterator[None]:
    """Keep what a user's code prints out of the output, if it is to be read by programs."""
    with contextlib.redirect_stdout(sys.stderr) if is_wanted else contextlib.nullcontext():
        yield
