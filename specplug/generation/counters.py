"""What happened while generating: plain sums.

Knows numbers only.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(slots=True)
class Counters:
    """Sums over target passes of decoding (prompt passes excluded); times in nanoseconds."""

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
        """Tokens per verification and sequence, the target's own included: plain decoding is 1.00."""
        return 1 + self.accepted_tokens / self.steps if self.steps else 1.0

    @property
    def overhead_us_per_step(self) -> float:
        """Propose, plan and observe (top-k included), in microseconds per verification."""
        return self.draft_ns / 1000 / self.steps if self.steps else 0.0
