"""The terminal of a command: progress bars and results on it, everything else in a log file."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from rich.box import ROUNDED, SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeft
from rich.table import Table
from rich.text import Text

from tasks.titles.comparison import Comparison
from tasks.titles.comparison_report import side_by_side
from tasks.titles.evaluation import MEASURES
from tasks.titles.statistics import Interval
from tasks.titles.summary import DIGITS, HEADINGS, Evaluation, writer_name

# Chatty libraries; their warnings are kept.
_NOISY = ("httpx", "httpcore", "openai", "alembic", "urllib3", "matplotlib")
# A longer note would wrap the line of its bar; it stands above the bars instead.
LONGEST_NOTE = 60
_OURS = ("flows", "tasks", "reward_server")


def plain_console(file: IO[str] | None = None, *, stderr: bool = False) -> Console:
    """Return a console that shows text as it is: titles and paths may hold brackets and colons."""
    return Console(file=file, stderr=stderr, highlight=False, markup=False, emoji=False)


@contextmanager
def output_to(log_path: Path) -> Iterator[tuple[Console, Console]]:
    """Send what libraries print or log, child processes included, to `log_path`.

    Yields consoles on the real standard output and the real standard error.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    real = [os.dup(1), os.dup(2)]
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    for name in _OURS:
        # Prefect gives the root logger a handler on standard error.
        logging.getLogger(name).setLevel(logging.INFO)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
    streams = [os.fdopen(os.dup(descriptor), "w", encoding="utf-8", errors="replace") for descriptor in real]
    try:
        yield plain_console(file=streams[0]), plain_console(file=streams[1])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream in streams:
            stream.close()
        for target, descriptor in zip((1, 2), real, strict=True):
            os.dup2(descriptor, target)
            os.close(descriptor)


class Bars:
    """A `flows.progress.Watcher` that draws a bar per stage; where no terminal is, a line at every tenth."""

    def __init__(self, console: Console, labels: Mapping[str, str]) -> None:
        """`labels` says how each stage is called on the screen."""
        self._console = console
        self._labels = labels
        self._tasks: dict[str, TaskID] = {}
        self._tenths: dict[str, int] = {}
        self._progress = Progress(
            TextColumn("{task.description}", justify="right"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeLeft(compact=True, elapsed_when_finished=False),
            TextColumn("{task.fields[note]}"),
            console=console,
        )

    def __enter__(self) -> Bars:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, stage: str, done: float, total: float | None, note: str) -> None:
        label = self._labels.get(stage, stage)
        if not self._console.is_terminal:
            self._line(stage, label, done, total, note)
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(label, total=total, note=note)
        if len(note) > LONGEST_NOTE:
            self._console.print(f"{label}: {note}", soft_wrap=True)
            note = ""
        # A stage without a known length pulses until it is told that it is over.
        completed = done if total is not None else 0
        self._progress.update(self._tasks[stage], completed=completed, total=total, note=note)

    def _line(self, stage: str, label: str, done: float, total: float | None, note: str) -> None:
        if done == 0:
            self._tenths.pop(stage, None)  # it begins again, with another run
        tenth = int(10 * done / total) if total else 0
        if tenth > self._tenths.get(stage, -1) or (done == total and note):
            self._tenths[stage] = tenth
            place = f" {done:g}/{total:g}" if total and total > 1 else " ready" if total else " …"
            self._console.print(f"{label}:{place}{f'  {note}' if note else ''}", soft_wrap=True)


def table(rows: Sequence[Mapping[str, str]], title: str, *, lines: bool = False) -> Table:
    """Return rows of text as a table, its columns those of the first row."""
    grid = Table(title=title, title_justify="left", title_style="bold", show_lines=lines, box=ROUNDED)
    for name in rows[0] if rows else ():
        grid.add_column(name, overflow="fold")
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row.values()))
    return grid


def results_table(evaluation: Evaluation) -> Table:
    """Return the figures of an evaluation in 80 characters: each mean with its interval below."""
    title = "Means over test stories with 95% bootstrap intervals (length: characters)"
    grid = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("titles of", *MEASURES):
        grid.add_column(HEADINGS.get(name, name), no_wrap=True)
    for found in evaluation.figures:
        who = Text(writer_name(evaluation, found.writer), style="bold")
        how = "" if found.mode == "human" else f"\n({found.mode})"
        cells = [Text(_stacked(found.measures[measure], measure)) for measure in MEASURES]
        grid.add_row(who + Text(how, style="dim"), *cells)
    return grid


def comparison_table(comparison: Comparison) -> Table:
    """Return a comparison's figures in 80 characters: each mean with its interval below."""
    title = "Means over seeds and test stories with 95% intervals (length: characters)"
    grid = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    grid.add_column("titles of", max_width=14)
    for name in MEASURES:
        grid.add_column(HEADINGS.get(name, name), no_wrap=True)
    # What training raises first, then what a user would ask for.
    for (method, mode), found in sorted(comparison.figures.items(), key=lambda item: item[0][1] == "greedy"):
        who = Text(comparison.methods[method].name, style="bold")
        how = f"\n({mode})" if mode in ("sampled", "greedy") else ""
        cells = [Text(_stacked(found.measures[measure], measure)) for measure in MEASURES]
        grid.add_row(who + Text(how, style="dim"), *cells)
    return grid


def side_by_side_titles(comparison: Comparison, count: int) -> Table:
    """Return the titles of a few stories, one method below the other, each with its reward."""
    title = "Titles side by side (a model's are greedy), their reward in brackets"
    grid = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    grid.add_column("titles of", style="dim", no_wrap=True)
    grid.add_column("title", overflow="fold")
    for story in side_by_side(comparison, count):
        for number, (name, text) in enumerate(story.items(), start=1):
            grid.add_row(name, Text(text), end_section=number == len(story))
    return grid


def _stacked(interval: Interval | None, measure: str) -> str:
    if interval is None:
        return "-"
    digits = DIGITS.get(measure, 2)
    return f"{interval.mean:.{digits}f}\n{interval.low:.{digits}f}..{interval.high:.{digits}f}"
