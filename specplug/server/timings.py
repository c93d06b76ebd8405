"""llama-server's `timings` of answers, from their reports.

Source: the section on timings of tools/server/README.md of github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specplug.server.jobs import Report


def timings(reports: Sequence[Report], answers_per_prompt: int = 1) -> dict[str, Any]:
    """Counts summed over the answers, where a prompt with several answers counts once; times of the slowest one.

    reports  those of all answers of a request, one or more
    """
    prompts = reports[::answers_per_prompt]
    cached = sum(report.cached for report in prompts)
    read = sum(report.prompt_tokens for report in prompts) - cached
    predicted = sum(report.completion_tokens for report in reports)
    prompt_ms = max(report.prompt_ms for report in reports)
    predicted_ms = max(report.decode_ms for report in reports)
    found: dict[str, Any] = {
        "cache_n": cached,
        "prompt_n": read,
        "prompt_ms": round(prompt_ms, 3),
        "prompt_per_token_ms": _per(prompt_ms, read),
        "prompt_per_second": _per(1000 * read, prompt_ms),
        "predicted_n": predicted,
        "predicted_ms": round(predicted_ms, 3),
        "predicted_per_token_ms": _per(predicted_ms, predicted),
        "predicted_per_second": _per(1000 * predicted, predicted_ms),
    }
    drafted = sum(report.counters.draft_tokens for report in reports)
    if drafted:
        accepted = sum(report.counters.accepted_tokens for report in reports)
        found |= {"draft_n": drafted, "draft_n_accepted": accepted}
    return found


def _per(amount: float, number: float) -> float:
    return round(amount / number, 3) if number else 0.0
