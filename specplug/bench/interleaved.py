"""Runs arms side by side over a workload and adds up what they did.

Knows prompts, arms and figures. Knows no file and no terminal.
Order: all arms answer a prompt before any sees the next, the first arm changing from prompt to prompt; every repeat
starts with nothing learned. Later turns of a conversation contain plain decoding's earlier answers, for every arm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from specplug.bench.arms import Arm, Result
from specplug.bench.statistics import paired_ratio
from specplug.bench.workloads import Prompt
from specplug.core import IntArray
from specplug.generation.counters import Counters

Explain = Callable[[IntArray, list[int], list[int]], bool]
"""Whether a difference of two answers to a prompt is rounding."""


@dataclass(slots=True)
class Tally:
    """One arm's sums over some answers, and the pairs that its speedup comes from."""

    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    base_tokens: list[int] = field(default_factory=list)
    base_seconds: list[float] = field(default_factory=list)
    counters: Counters = field(default_factory=Counters)
    counted: bool = True
    identical: int = 0
    rounding: int = 0
    different: int = 0

    def figures(self) -> dict[str, Any]:
        """The figures of `bench --json`; those that an arm does not tell are None."""
        tokens, seconds = sum(self.tokens), sum(self.seconds)
        c = self.counters if self.counted else None
        return {
            "tokens": tokens,
            "seconds": round(seconds, 4),
            "tokens_per_second": round(tokens / seconds, 3) if seconds > 0 else None,
            "mean_acceptance_length": round(c.mean_acceptance_length, 4) if c else None,
            "steps": c.steps if c else None,
            "draft_tokens": c.draft_tokens if c else None,
            "accepted_tokens": c.accepted_tokens if c else None,
            "overhead_us_per_step": round(c.overhead_us_per_step, 1) if c else None,
            "speedup": paired_ratio(self.tokens, self.seconds, self.base_tokens, self.base_seconds).as_mapping()
            if any(min(pair) > 0 for pair in zip(self.tokens, self.base_tokens, strict=True))
            else None,
            "identical": self.identical,
            "rounding": self.rounding,
            "different": self.different,
        }


@dataclass(slots=True)
class Outcome:
    """Per arm, in the order given: all answers, and those of each category."""

    overall: list[Tally]
    categories: list[dict[str, Tally]]


def run_arms(
    arms: Sequence[Arm],
    prompts: Sequence[Prompt],
    encode: Callable[[Sequence[dict[str, str]]], IntArray],
    decode: Callable[[Sequence[int]], str],
    explain: Explain,
    *,
    max_tokens: int,
    repeats: int = 1,
    concurrency: int = 1,
    progress: Callable[[str, int], None] = lambda what, steps: None,
) -> Outcome:
    """Measure; `arms[0]` is plain decoding, the one that all are compared with.

    encode   messages to prompt tokens      decode   tokens to text
    explain  is asked about differences of the first repeat
    progress is told the category and how many more answers of one arm are done
    """
    outcome = Outcome([Tally() for _ in arms], [{} for _ in arms])
    for repeat in range(repeats):
        for arm in arms:
            arm.reset()
        for number, group in enumerate(_groups(prompts, concurrency)):
            talks: list[list[dict[str, str]]] = [[] for _ in group]
            for turn in range(max(len(prompt.turns) for prompt in group)):
                active = [i for i, prompt in enumerate(group) if turn < len(prompt.turns)]
                for i in active:
                    talks[i].append({"role": "user", "content": group[i].turns[turn]})
                tokens = [encode(talks[i]) for i in active]
                results: list[list[Result]] = [[] for _ in arms]
                for offset in range(len(arms)):
                    index = (number + repeat + offset) % len(arms)
                    results[index] = arms[index].answer(tokens, max_tokens)
                    progress(group[0].category, len(active))
                for i, plain in zip(active, results[0], strict=True):
                    talks[i].append({"role": "assistant", "content": decode(plain.tokens)})
                _add(outcome, [group[i].category for i in active], tokens, results, explain if repeat == 0 else None)
    return outcome


def _groups(prompts: Sequence[Prompt], size: int) -> list[list[Prompt]]:
    """Prompts answered together: `size` of one category at a time."""
    by_category: dict[str, list[Prompt]] = {}
    if size == 1:
        return [[prompt] for prompt in prompts]
    for prompt in prompts:
        by_category.setdefault(prompt.category, []).append(prompt)
    return [line[i : i + size] for line in by_category.values() for i in range(0, len(line), size)]


def _add(
    outcome: Outcome,
    categories: Sequence[str],
    prompts: Sequence[IntArray],
    results: Sequence[Sequence[Result]],
    explain: Explain | None,
) -> None:
    for index, line in enumerate(results):
        for category, prompt, result, base in zip(categories, prompts, line, results[0], strict=True):
            verdict = None
            if explain is not None:
                same = result.tokens == base.tokens
                rounding = not same and explain(prompt, base.tokens, result.tokens)
                verdict = "identical" if same else "rounding" if rounding else "different"
            for tally in (outcome.overall[index], outcome.categories[index].setdefault(category, Tally())):
                tally.tokens.append(len(result.tokens) - 1)
                tally.seconds.append(result.seconds)
                tally.base_tokens.append(len(base.tokens) - 1)
                tally.base_seconds.append(base.seconds)
                if result.counters is None:
                    tally.counted = False
                else:
                    tally.counters.add(result.counters)
                if verdict is not None:
                    setattr(tally, verdict, getattr(tally, verdict) + 1)
