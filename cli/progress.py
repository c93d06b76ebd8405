"""Progress on stderr: bars on a terminal; off a terminal, lines for what takes minutes, and nothing for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

SMALL_BYTES = 1 << 20
"""Files below this size are downloaded without a line of their own, off a terminal."""

LINE_SECONDS = 10.0
"""Time between two lines about the same work, off a terminal."""


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[str, int], None]]:
    """A bar of `total` steps. The yielded function takes the current work and the steps done since the last call."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)

        def advance(current: str, steps: int) -> None:
            bar.update(task, advance=steps, description=f"{title}: {current}")

        yield advance


@contextmanager
def budget_bar(title: str, seconds: float) -> Iterator[Callable[[str, float, str, float], None]]:
    """A bar for work with a time budget.

    The yielded function takes the stage, its share that is done, the best result so far and the seconds that are left.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=seconds, left="")

        def update(stage: str, share: float, best: str, left: float) -> None:
            remaining = max(0, round(left))
            description = f"{title}: {stage} {share:.0%}" + (f", best so far {best}" if best else "")
            time_left = f"{remaining // 60}:{remaining % 60:02} left"
            bar.update(task, completed=seconds - remaining, description=description, left=time_left)

        yield update


@contextmanager
def stage_bar(title: str) -> Iterator[Callable[[str, float], None]]:
    """A bar that restarts at every stage. The yielded function takes the stage and its share that is done."""
    console = Console(stderr=True)
    if not console.is_terminal:
        lines = _Lines()
        yield lambda stage, share: lines.show(stage, f"{title}: {stage}" + (f" {share:.0%}" if share else ""))
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=1.0)
        current = ""

        def update(stage: str, share: float) -> None:
            nonlocal current
            if stage != current:
                current = stage
                bar.reset(task, total=1.0, description=f"{title}: {stage}")
            bar.update(task, completed=share)

        yield update


@contextmanager
def download_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar with speed and time left. The yielded function takes a file, its bytes that are here, and its size."""
    console = Console(stderr=True)
    if not console.is_terminal:
        lines = _Lines()

        def line(name: str, done: int, total: int) -> None:
            if done < total and total >= SMALL_BYTES:
                lines.show(name, f"downloading {name}: {done / 1e6:.0f} of {total / 1e6:.0f} MB")

        yield line
        return
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), DownloadColumn()),
        *(TransferSpeedColumn(), TimeRemainingColumn()),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("download", total=None)
        current = ""

        def update(name: str, done: int, total: int) -> None:
            nonlocal current
            if name != current:
                current = name
                bar.reset(task, total=total, completed=done, description=name.rpartition("/")[2])
            bar.update(task, completed=done)

        yield update


class _Lines:
    """Prints a line where the work is another than before, or LINE_SECONDS have passed."""

    def __init__(self) -> None:
        self._work, self._printed_at = "", 0.0

    def show(self, work: str, text: str) -> None:
        now = monotonic()
        if work != self._work or now - self._printed_at >= LINE_SECONDS:
            self._work, self._printed_at = work, now
            click.echo(f"specplug: {text}", err=True)
