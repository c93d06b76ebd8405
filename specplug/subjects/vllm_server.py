"""What vLLM's `/metrics` counts of drafting, and the counts of one answer as the difference around it.

vLLM reports no counts with an answer. They belong to an answer only where no other was computed meanwhile, so that is
checked with vLLM's own counters of answers and of their tokens. Source: metrics.py in vllm/v1/spec_decode, and
loggers.py in vllm/v1/metrics.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic, sleep

DRAFTED, ACCEPTED = "vllm:spec_decode_num_draft_tokens_total", "vllm:spec_decode_num_accepted_tokens_total"
ANSWERED, GENERATED = "vllm:request_success_total", "vllm:generation_tokens_total"

SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{[^}]*\})?\s+([0-9.eE+-]+)", re.MULTILINE)

LAG_S = 1.0
"""Seconds to wait for the counters of an answer; vLLM counts after it has sent the last token."""

POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class SpecCounts:
    """Totals since the server started."""

    answered: int
    generated: int
    drafted: int
    accepted: int


def spec_counts(metrics: str) -> SpecCounts | None:
    """Read a text in Prometheus' format; None where the server does not draft, or is no vLLM."""
    totals: dict[str, float] = {}
    for name, value in SAMPLE.findall(metrics):
        if name in (DRAFTED, ACCEPTED, ANSWERED, GENERATED):
            totals[name] = totals.get(name, 0.0) + float(value)  # one sample per engine, and per reason of the end
    if not {DRAFTED, ACCEPTED, ANSWERED, GENERATED} <= totals.keys():
        return None
    return SpecCounts(*(int(totals[name]) for name in (ANSWERED, GENERATED, DRAFTED, ACCEPTED)))


def counts_of_one_answer(
    before: SpecCounts, tokens: int, read: Callable[[], SpecCounts | None]
) -> tuple[int, int] | None:
    """Draft tokens of the answer that has just ended with so many tokens, and accepted ones.

    None where others were computed meanwhile.
    """
    give_up_at = monotonic() + LAG_S
    while (after := read()) is not None:
        answered, generated = after.answered - before.answered, after.generated - before.generated
        if (answered, generated) == (1, tokens):
            return after.drafted - before.drafted, after.accepted - before.accepted
        if answered > 1 or generated > tokens or monotonic() > give_up_at:
            break
        sleep(POLL_S)
    return None
