"""Progress on stderr, silent off a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[str, int], None]]:
    """A function that tells what is under way and how many steps were done since the last call."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)

        def advance(what: str, steps: int) -> None:
            bar.update(task, advance=steps, description=f"{title}: {what}")

        yield advance


@contextmanager
def budget_bar(title: str, seconds: float) -> Iterator[Callable[[str, float, str, float], None]]:
    """For work with a time of its own: a function that tells the stage, its share done, what is best so far, and the
    seconds that are left."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=seconds, left="")

        def tell(stage: str, share: float, best: str, left: float) -> None:
            rest = max(0, round(left))
            what = f"{title}: {stage} {share:.0%}" + (f", best so far {best}" if best else "")
            bar.update(task, completed=seconds - rest, description=what, left=f"{rest // 60}:{rest % 60:02} left")

        yield tell


@contextmanager
def stage_bar(title: str) -> Iterator[Callable[[str, float], None]]:
    """A function that tells the stage, and its share that is done."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=1.0)
        under_way = ""

        def tell(stage: str, share: float) -> None:
            nonlocal under_way
            if stage != under_way:
                under_way = stage
                bar.reset(task, total=1.0, description=f"{title}: {stage}")
            bar.update(task, completed=share)

        yield tell
