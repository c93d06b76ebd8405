"""What vLLM's `/metrics` counts of drafting, and the counts of one answer as the difference around it.

vLLM tells no counts with an answer. They belong to an answer only where it was the only one that ended meanwhile, so
that is checked with vLLM's own counter of answers. Source: vllm/v1/spec_decode/metrics.py, vllm/v1/metrics/loggers.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic, sleep

DRAFTED, ACCEPTED = "vllm:spec_decode_num_draft_tokens_total", "vllm:spec_decode_num_accepted_tokens_total"
ANSWERED = "vllm:request_success_total"

SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{[^}]*\})?\s+([0-9.eE+-]+)", re.MULTILINE)

LAG_S = 1.0
"""Seconds to wait for the counters of an answer; vLLM counts after it has sent the last token."""

POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class SpecCounts:
    """Totals since the server started."""

    answered: int
    drafted: int
    accepted: int


def spec_counts(metrics: str) -> SpecCounts | None:
    """Read a text in Prometheus' format; None where the server does not draft, or is no vLLM."""
    totals: dict[str, float] = {}
    for name, value in SAMPLE.findall(metrics):
        if name in (DRAFTED, ACCEPTED, ANSWERED):
            totals[name] = totals.get(name, 0.0) + float(value)  # one sample per engine, and per reason of the end
    if DRAFTED not in totals or ANSWERED not in totals:
        return None
    return SpecCounts(int(totals[ANSWERED]), int(totals[DRAFTED]), int(totals.get(ACCEPTED, 0)))


def counts_of_one_answer(before: SpecCounts, read: Callable[[], SpecCounts | None]) -> tuple[int, int] | None:
    """Draft tokens of the answer that has just ended, and accepted ones; None where others ended meanwhile."""
    give_up_at = monotonic() + LAG_S
    while (after := read()) is not None:
        if after.answered - before.answered == 1:
            return after.drafted - before.drafted, after.accepted - before.accepted
        if after.answered - before.answered > 1 or monotonic() > give_up_at:
            break
        sleep(POLL_S)
    return None
