"""The result of a demo in words: a bar for each prompt, and what the measured figures mean."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from specplug.bench.demo import Comparison, mean_speed, median_run
from specplug.bench.demo_format import PassTimes
from specplug.bench.other_work import is_too_much
from specplug.bench.statistics import Interval
from specplug.machine import hardware

MARGIN = 0.03
"""Ratio. A speedup nearer to 1 is called neither a gain nor a loss. Chosen."""

LITTLE = 0.1
"""Share of an answer's tokens. Where drafts gave less, hardly any of its tokens occur earlier. Chosen."""

CELLS_OF_ONE = 16
"""Characters of a bar for plain decoding's speed, where the longest bar fits beside its figures."""

FIGURES_WIDTH = 38
"""Characters that the figures beside a bar take."""

BLOCKS, MARK = " ▏▎▍▌▋▊▉█", "│"
ASCII_BLOCKS, ASCII_MARK = "    ----#", "|"


def result(console: Console, comparisons: Sequence[Comparison]) -> Table:
    """One bar per prompt with its figures below, on a scale on which plain decoding has a mark."""
    ascii_only = console.options.ascii_only
    kinds = [found.prompt.kind for found in comparisons]
    highest = max((found.speedup.median for found in comparisons if found.speedup), default=1.0)
    room = console.width - max(map(len, kinds)) - 2 - FIGURES_WIDTH
    unit = cells_of_one(highest, room)
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("", f"{' ' * unit}{ASCII_MARK if ascii_only else MARK} 1.00, plain decoding")
    for found in comparisons:
        ratio = found.speedup
        if ratio is None:
            table.add_row(found.prompt.kind, "an answer of one token has no speed")
            continue
        style = "green" if gained(found, ratio) else "yellow" if lost(ratio) else ""
        line = Text(bar(ratio.median, unit, ascii_only=ascii_only), style)
        same = "same output" if found.same_output else "other output"
        line.append(f" {ratio.median:.2f} times ({ratio.low:.2f}-{ratio.high:.2f}), {same}", "bold")
        table.add_row(Text(found.prompt.kind, "bold"), line)
        table.add_row("", details(found))
    return table


def cells_of_one(highest: float, room: int) -> int:
    """Characters of a bar for 1.00, so that a bar for `highest` takes `room` characters at most; at least 4."""
    return max(4, min(CELLS_OF_ONE, int(room / max(1.0, highest))))


def bar(value: float, unit: int, *, ascii_only: bool = False) -> str:
    """A bar of `value` times `unit` characters, to an eighth of one, in which a mark follows the first `unit`."""
    blocks, mark = (ASCII_BLOCKS, ASCII_MARK) if ascii_only else (BLOCKS, MARK)
    whole, eighths = divmod(round(value * unit * 8), 8)
    cells = blocks[8] * whole + (blocks[eighths] if eighths else "")
    cells = cells.ljust(unit + 1)
    return cells[:unit] + mark + cells[unit + 1 :]


def details(found: Comparison) -> str:
    """The figures of a prompt besides its speedup."""
    counters = median_run(found.drafting).counters
    return (
        f"{mean_speed(found.drafting):.1f} instead of {mean_speed(found.plain):.1f} tokens/s, "
        f"{counters.mean_acceptance_length:.2f} tokens per pass, "
        f"{counters.accepted_tokens} draft token{'' if counters.accepted_tokens == 1 else 's'} accepted"
    )


def gained(found: Comparison, ratio: Interval) -> bool:
    """Whether the speedup is a gain that drafts gave and the variation between the runs does not explain."""
    return ratio.median >= 1 + MARGIN and ratio.low > 1 and _accepted(found) > 0


def lost(ratio: Interval) -> bool:
    """Whether the speedup is a loss that the variation between the runs does not explain."""
    return ratio.median <= 1 - MARGIN and ratio.high < 1


def sentences(comparisons: Sequence[Comparison], times: PassTimes) -> list[str]:
    """What the figures mean: whether they are reliable, that nothing gained, which prompts lost time, why free text is
    as it is, and what another output means."""
    measured = [(found, found.speedup) for found in comparisons if found.speedup is not None]
    lines = []
    busiest = max(found.busy_cores for found in comparisons)
    if is_too_much(busiest):
        lines.append(
            f"Other programs kept {busiest:.1f} of {hardware.usable_cores()} cores busy meanwhile, so these figures "
            "are not reliable; run specplug demo again while the machine is idle."
        )
    if measured and not any(gained(found, ratio) for found, ratio in measured):
        longest = max(median_run(found.drafting).counters.mean_acceptance_length for found, _ in measured)
        lines.append(
            "Nothing gained with this model on this machine: a pass over 4 tokens costs "
            f"{times.ratio:.2f} times a pass over one (measured), so such passes pay only if they emit more than "
            f"{times.ratio:.2f} tokens on average. The answers had at most {longest:.2f} tokens per pass."
        )
    for found, ratio in measured:
        if found.prompt.kind == "free text":
            lines.append(_free_text(found, ratio))
        elif ratio.median <= 1 - MARGIN:
            lines.append(f"{found.prompt.kind.capitalize()} lost {_percent(ratio)}: {_spent(found)}.{_chance(ratio)}")
    others = " and ".join(found.prompt.kind for found in comparisons if not found.same_output)
    if others:
        lines.append(f"The output of {others} differs by rounding or more: specplug verify explains it.")
    return lines


def packaged_line(found: Comparison, name: str, packaged: str) -> str:
    """How fast the packaged file decodes plainly, beside the format `name` that is used."""
    file, plain, drafting = mean_speed(found.packaged), mean_speed(found.plain), mean_speed(found.drafting)
    line = (
        f"On the {found.prompt.kind}, plain decoding of the packaged {packaged} file gave {file:.1f} tokens/s in the "
        f"same turns; {name} gave {plain:.1f}, and {drafting:.1f} with specplug."
    )
    if file <= plain:
        return line
    best = "even with specplug" if file > drafting else "for plain decoding"
    return f"{line} So {name} is not the fastest format of this model {best}; it is used to show what drafting adds."


def _free_text(found: Comparison, ratio: Interval) -> str:
    """Why free text gained nothing, or that it did."""
    run = median_run(found.drafting)
    drafted = f"{run.counters.accepted_tokens} of its {len(run.tokens) - 1} tokens came from drafts"
    if ratio.median >= 1 + MARGIN and _accepted(found):
        return f"Free text gained {_percent(ratio)}: {drafted}.{_chance(ratio)}"
    if ratio.median <= 1 - MARGIN:
        return f"Free text lost {_percent(ratio)}: {drafted}; {_spent(found)}.{_chance(ratio)}"
    if _accepted(found) > LITTLE * (len(run.tokens) - 1):
        return f"Free text stays near 1.00: {drafted}, which hardly paid for planning and for verifying other drafts."
    near = "stays near 1.00" if abs(ratio.median - 1) < MARGIN else "differs from 1.00 by variation only"
    return (
        f"Free text {near}, because hardly any of its tokens occur earlier, so there is little to draft ({drafted}); "
        "specplug then decodes plainly."
    )


def _spent(found: Comparison) -> str:
    """What the time that a prompt lost was spent on."""
    run = median_run(found.drafting)
    c = run.counters
    share = c.draft_ns / 1e9 / run.seconds if run.seconds > 0 else 0.0
    planning = f"drafting and planning took {share:.1%} of the time, and"
    if not c.draft_tokens:
        return f"{planning} no draft token was verified"
    return f"{planning} {c.draft_tokens - c.accepted_tokens} of {c.draft_tokens} draft tokens were verified in vain"


def _accepted(found: Comparison) -> int:
    """Draft tokens that were accepted in the median run."""
    return median_run(found.drafting).counters.accepted_tokens


def _percent(ratio: Interval) -> str:
    return f"{abs(ratio.median - 1):.0%}"


def _chance(ratio: Interval) -> str:
    return " The runs vary by more than that." if ratio.low <= 1 <= ratio.high else ""
