"""Runs arms side by side over a workload and adds up their tokens, seconds and counters.

All arms answer a prompt before any arm receives the next one, and the arm that goes first changes from prompt to
prompt. Every repeat starts with nothing learned. In a conversation, every arm receives plain decoding's earlier
answers. The module does not depend on files or a terminal.
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
"""Takes a prompt, plain decoding's answer and another answer; returns whether rounding explains the difference."""


@dataclass(slots=True)
class Tally:
    """One arm's figures over a set of answers, beside plain decoding's (`base_*`) to the same prompts.

    tokens, seconds              of each answer, without its first token
    counted                      whether every answer had counters
    identical, rounding, different  answers of the first repeat, by how they compare with plain decoding
    """

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
        """The figures of `bench --json`. Those that an arm does not report are None."""
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
    """One tally per arm, in the order of the arms: over all answers, and per category."""

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
    """Measure all arms over all prompts. `arms[0]` is plain decoding, which all arms are compared with.

    encode    turns messages into prompt tokens
    decode    turns tokens into text
    explain   is called for answers of the first repeat that differ from plain decoding's
    progress  receives the category, and how many more answers of one arm are done
    """
    outcome = Outcome([Tally() for _ in arms], [{} for _ in arms])
    for repeat in range(repeats):
        for arm in arms:
            arm.reset()
        for number, group in enumerate(_groups(prompts, concurrency)):
            conversations: list[list[dict[str, str]]] = [[] for _ in group]
            for turn in range(max(len(prompt.turns) for prompt in group)):
                active = [i for i, prompt in enumerate(group) if turn < len(prompt.turns)]
                for i in active:
                    conversations[i].append({"role": "user", "content": group[i].turns[turn]})
                tokens = [encode(conversations[i]) for i in active]
                results: list[list[Result]] = [[] for _ in arms]
                for offset in range(len(arms)):
                    index = (number + repeat + offset) % len(arms)
                    results[index] = arms[index].answer(tokens, max_tokens)
                    progress(group[0].category, len(active))
                for i, plain in zip(active, results[0], strict=True):
                    conversations[i].append({"role": "assistant", "content": decode(plain.tokens)})
                _add(outcome, [group[i].category for i in active], tokens, results, explain if repeat == 0 else None)
    return outcome


def _groups(prompts: Sequence[Prompt], size: int) -> list[list[Prompt]]:
    """The prompts that are answered at once: up to `size` of one category. With `size` 1 the order does not change."""
    by_category: dict[str, list[Prompt]] = {}
    if size == 1:
        return [[prompt] for prompt in prompts]
    for prompt in prompts:
        by_category.setdefault(prompt.category, []).append(prompt)
    return [of_one[i : i + size] for of_one in by_category.values() for i in range(0, len(of_one), size)]


def _add(
    outcome: Outcome,
    categories: Sequence[str],
    prompts: Sequence[IntArray],
    results: Sequence[Sequence[Result]],
    explain: Explain | None,
) -> None:
    for index, of_arm in enumerate(results):
        for category, prompt, result, base in zip(categories, prompts, of_arm, results[0], strict=True):
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
