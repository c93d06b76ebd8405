"""Counters of passes, tokens and times, from which the usual statistics are computed."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(slots=True)
class Counters:
    """Sums over the target passes of decoding, without those that read prompts; times in nanoseconds."""

    steps: int = 0
    emitted_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    target_ns: int = 0
    sample_ns: int = 0
    draft_ns: int = 0
    prompt_tokens: int = 0
    prompt_ns: int = 0

    def add(self, other: Counters) -> None:
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per target pass and sequence, including the target's own token: plain decoding is 1.00."""
        return 1 + self.accepted_tokens / self.steps if self.steps else 1.0

    @property
    def overhead_us_per_step(self) -> float:
        """Time to propose, plan and observe, including reading top ids, in microseconds per target pass."""
        return self.draft_ns / 1000 / self.steps if self.steps else 0.0
