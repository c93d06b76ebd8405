"""Replays recorded answers side by side on a terminal, each at the speed at which it was generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter, sleep

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.style import Style
from rich.table import Table
from rich.text import Text

from specplug.bench.demo import Run, tokens_per_second

from .terminal_text import for_terminal

NARROW = 60
"""Columns of a terminal below which the answers are shown one below the other."""

FRAME_SECONDS = 0.05
"""Seconds between two drawings."""

GAP = 4
"""Columns between two answers."""

OTHER_LINES = 4
"""Lines of a replay that hold no answer: the titles, the speeds, and space for the cursor."""


@dataclass(frozen=True, slots=True)
class Column:
    """One of the answers that are shown together."""

    title: str
    run: Run


def replay(
    console: Console,
    columns: Sequence[Column],
    *,
    clock: Callable[[], float] = perf_counter,
    sleep: Callable[[float], None] = sleep,
) -> None:
    """Draw the answers until the last one is complete. The complete ones stay on the terminal."""
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        play(
            max(column.run.seconds for column in columns),
            lambda seconds: live.update(frame(console, columns, seconds), refresh=True),
            clock=clock,
            sleep=sleep,
        )
        live.update(frame(console, columns, None))


def play(
    seconds: float, show: Callable[[float], None], *, clock: Callable[[], float], sleep: Callable[[float], None]
) -> None:
    """Call `show` with the time since the start, every FRAME_SECONDS until `seconds`, and once with `seconds`."""
    began = clock()
    while (now := clock() - began) < seconds:
        show(now)
        sleep(min(FRAME_SECONDS, seconds - now))
    show(seconds)


def frame(console: Console, columns: Sequence[Column], seconds: float | None) -> RenderableType:
    """What is shown `seconds` after the start: the last lines that fit. All lines where that is None."""
    narrow = console.width < NARROW
    width = console.width if narrow else (console.width - GAP * (len(columns) - 1)) // len(columns)
    lines = None if seconds is None else console.height - OTHER_LINES
    if narrow and lines is not None:
        lines = (lines + OTHER_LINES) // len(columns) - OTHER_LINES
    parts = []
    for column in columns:
        written = answer_text(column.run, seconds, coloured=not console.no_color)
        if lines is not None:
            written = Text("\n").join(written.wrap(console, width)[-max(1, lines) :])
        parts.append((Text(column.title, "bold"), written, Text(speed_line(column.run, seconds), "bold")))
    if narrow:
        return Group(*(line for part in parts for line in (*part, Text())))
    table = Table.grid(padding=(0, GAP))
    for _ in columns:
        table.add_column(width=width)
    for row in zip(*parts, strict=True):
        table.add_row(*row)
    return table


def answer_text(run: Run, seconds: float | None, *, coloured: bool) -> Text:
    """The text of an answer that is complete by then, with accepted draft tokens marked, without control characters."""
    drafted = Style(color="green", bold=True) if coloured else Style(underline=True)
    text = Text(tab_size=4)
    for piece in run.pieces:
        if seconds is None or piece.at <= seconds:
            # a carriage return would rewrite a line of the replay
            text.append(for_terminal(piece.text).replace("\r", ""), drafted if piece.drafted else None)
    return text


def speed_line(run: Run, seconds: float | None) -> str:
    """The tokens per second of an answer until then; of the complete answer once it is finished."""
    if seconds is None or seconds >= run.seconds:
        return f"{tokens_per_second(run):.1f} tokens/s, {run.seconds:.1f} s"
    tokens = max((piece.tokens for piece in run.pieces if piece.at <= seconds), default=0)
    return f"{(tokens - 1) / seconds:.1f} tokens/s" if tokens > 1 and seconds > 0 else "..."
