"""What a drafter keeps of a running sequence besides its KV cells."""

from __future__ import annotations

from dataclasses import dataclass, field

from specplug.core import Likeliest
from specplug.engines.llama_cpp.sampling import Sampler


@dataclass(slots=True)
class DraftedText:
    """One sequence.

    num_prompt  tokens of its prompt
    drafted     the chain that was drafted last
    likeliest   the likeliest tokens at each place of that chain
    chosen_at   its length when the parts that a window keeps were last chosen
    lost_ms     time since then that rejected draft tokens took
    """

    tokens: list[int]
    num_prompt: int
    chosen_at: int
    sampler: Sampler | None = None
    drafted: list[int] = field(default_factory=list)
    likeliest: list[Likeliest] = field(default_factory=list)
    lost_ms: float = 0.0
