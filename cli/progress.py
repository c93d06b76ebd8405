"""Progress bars on stderr, which are silent where stderr is not a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


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
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=1.0)
        current = ""

        def update(stage: str, share: float) -> None:
            nonlocal current
            if stage != current:
                current = stage
                bar.reset(task, total=1.0, description=f"{title}: {stage}")
            bar.update(task, completed=share)

        yield update
