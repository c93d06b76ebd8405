"""Runs arms side by side over a workload and adds up their tokens, seconds and counters.

All arms answer a prompt before any arm receives the next one, and the arm that goes first changes from prompt to
prompt. Every repeat starts with nothing learned, as far as an arm can forget. In a conversation, every arm receives the
first arm's earlier answers. An arm that fails is left out from then on, and a prompt that the first arm refuses, for
all; where the first arm has failed, one that all others refuse. The module does not depend on files or a terminal, or
on what a prompt is: tokens, or a conversation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from specplug.bench.arms import Timed, TimedArm
from specplug.bench.statistics import Interval, paired_ratio
from specplug.bench.workloads import Prompt
from specplug.core import IntArray
from specplug.generation.counters import Counters
from specplug.subjects.subject import RefusedQuestion, SubjectError

Explain = Callable[[IntArray, list[int], list[int]], bool]
"""Takes a prompt, the reference's answer and another answer; returns whether rounding explains the difference."""

Asked = TypeVar("Asked")
"""What an arm is asked."""

Content = TypeVar("Content")
"""What answers are compared by."""


@dataclass(slots=True)
class Tally:
    """One arm's figures over a set of answers, beside those of the first arm to the same prompts.

    tokens, seconds              of each answer, without its first token
    base_tokens, base_seconds    of the first arm's answers; 0 where it has failed
    counted                      whether every answer had counters
    identical, rounding, different  answers of the first repeat, by how they compare with the arm's reference
    prompt_seconds               of each answer: the prefill and its first token; None where it was not measured
    groups                       for each answer, a number of those that were asked at once with it
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
    prompt_seconds: list[float | None] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)

    @property
    def measured_prompts(self) -> list[float] | None:
        """`prompt_seconds`; None where one is missing."""
        found = [seconds for seconds in self.prompt_seconds if seconds is not None]
        return found if found and len(found) == len(self.seconds) else None

    @property
    def speedup(self) -> Interval | None:
        """Tokens per second over the first arm's; None where no pair of answers has tokens."""
        if not any(min(pair) > 0 for pair in zip(self.tokens, self.base_tokens, strict=True)):
            return None
        return paired_ratio(self.tokens, self.seconds, self.base_tokens, self.base_seconds, self.groups)

    def figures(self) -> dict[str, Any]:
        """The figures of `bench --json`. Those that an arm does not report are None."""
        tokens, seconds = sum(self.tokens), sum(self.seconds)
        prompts, speedup = self.measured_prompts, self.speedup
        c = self.counters if self.counted and self.tokens else None
        return {
            "tokens": tokens,
            "seconds": round(seconds, 4),
            "prompt_seconds": round(sum(prompts), 4) if prompts else None,
            "tokens_per_second": round(tokens / seconds, 3) if seconds > 0 else None,
            "mean_acceptance_length": round(c.mean_acceptance_length, 4) if c else None,
            "steps": c.steps if c else None,
            "draft_tokens": c.draft_tokens if c else None,
            "accepted_tokens": c.accepted_tokens if c else None,
            "overhead_us_per_step": round(c.overhead_us_per_step, 1) if c else None,
            "speedup": speedup.as_mapping() if speedup else None,
            "identical": self.identical,
            "rounding": self.rounding,
            "different": self.different,
        }


@dataclass(slots=True)
class Outcome:
    """One tally per arm, in the order of the arms: over all answers, and per category.

    answers   of each arm, those in its tallies
    failures  why an arm answers no more, by its index; its tallies are those of its earlier answers
    refused   why a prompt is left out for all, by the prompt's name; the answers to its earlier turns are in the
              tallies
    """

    overall: list[Tally]
    categories: list[dict[str, Tally]]
    answers: list[list[Timed[object]]]
    failures: dict[int, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def run_arms(
    arms: Sequence[TimedArm[Asked, Content]],
    prompts: Sequence[Prompt],
    encode: Callable[[Sequence[dict[str, str]]], Asked],
    decode: Callable[[Content], str],
    explain: Callable[[Asked, Content, Content], bool] | Sequence[Callable[[Asked, Content, Content], bool]],
    *,
    references: Sequence[int] | None = None,
    max_tokens: int,
    repeats: int = 1,
    concurrency: int = 1,
    progress: Callable[[str, int], None] = lambda what, steps: None,
) -> Outcome:
    """Measure all arms over all prompts. `arms[0]` is plain decoding, which the speed of all arms is compared with.

    encode      turns messages into what arms are asked
    decode      turns an answer into text
    explain     is called for answers of the first repeat that differ from the reference's: one for all arms, or one
                per arm
    references  per arm, the index of plain decoding under the same engine settings, whose answers it must reproduce;
                arms[0] for all where None
    progress    receives the category, and how many more answers of one arm are done
    """
    references = [0] * len(arms) if references is None else references
    explains = [explain] * len(arms) if callable(explain) else explain
    outcome = Outcome([Tally() for _ in arms], [{} for _ in arms], [[] for _ in arms])
    asked_groups = 0
    for repeat in range(repeats):
        _reset(arms, outcome.failures)
        for number, group in enumerate(_groups(prompts, concurrency)):
            order = [(number + repeat + offset) % len(arms) for offset in range(len(arms))]
            conversations: list[list[dict[str, str]]] = [[] for _ in group]
            left_out: set[int] = set()
            for turn in range(max(len(prompt.turns) for prompt in group)):
                active = [i for i, prompt in enumerate(group) if turn < len(prompt.turns) and i not in left_out]
                if not active:
                    break
                for i in active:
                    conversations[i].append({"role": "user", "content": group[i].turns[turn]})
                asked = {i: encode(conversations[i]) for i in active}
                done = partial(progress, group[0].category, len(active))
                results, refused = _answers(arms, order, asked, max_tokens, outcome.failures, done)
                outcome.refused |= {group[i].id: why for i, why in refused.items()}
                left_out |= refused.keys()
                if not results:
                    return outcome
                active = [i for i in active if i not in left_out]
                for i, answer in zip(active, results[min(results)], strict=True):
                    conversations[i].append({"role": "assistant", "content": decode(answer.content)})
                kinds = [group[i].category for i in active]
                _add(outcome, kinds, results, asked_groups)
                asked_groups += 1
                if repeat == 0:
                    _judge(outcome, kinds, [asked[i] for i in active], results, references, explains)
    if outcome.refused and not outcome.overall[0].tokens:
        outcome.failures.setdefault(0, next(iter(outcome.refused.values())))
    return outcome


def _answers(
    arms: Sequence[TimedArm[Asked, Content]],
    order: Sequence[int],
    asked: Mapping[int, Asked],
    max_tokens: int,
    failures: dict[int, str],
    done: Callable[[], None],
) -> tuple[dict[int, list[Timed[Content]]], dict[int, str]]:
    """Ask all arms the same prompts at once. Returns the answers of each arm that goes on, by its index, without those
    to prompts that are left out; and why these are, by their keys.

    Where an arm has answered one that is left out, its other answers took longer for that: all arms are reset, since
    they know the others by now, and asked the others again.

    order     of the arms, by their indices
    failures  as in `Outcome`, to which new ones are added
    done      is called once for each arm
    """
    refused: dict[int, str] = {}
    while True:
        keys = [key for key in asked if key not in refused]
        found: dict[int, Sequence[Timed[Content] | RefusedQuestion]] = {}
        for index in order:
            if index in failures:
                continue
            try:
                found[index] = arms[index].answer([asked[key] for key in keys], max_tokens)
            except SubjectError as error:
                failures[index] = str(error)
            if not refused:
                done()
        new = _refused(keys, found)
        results: dict[int, list[Timed[Content]]] = {}
        alike = True
        for index, answers in found.items():
            faults = [
                str(one)
                for key, one in zip(keys, answers, strict=True)
                if key not in new and isinstance(one, RefusedQuestion)
            ]
            if faults:  # others answer this
                failures[index] = faults[0]
                continue
            given = {key: one for key, one in zip(keys, answers, strict=True) if not isinstance(one, RefusedQuestion)}
            alike = alike and given.keys().isdisjoint(new)
            results[index] = [one for key, one in given.items() if key not in new]
        refused |= new
        if alike or len(new) == len(keys):
            return results, refused
        _reset(arms, failures)


def _refused(keys: Sequence[int], found: Mapping[int, Sequence[object]]) -> dict[int, str]:
    """Why prompts are left out, by their keys: those that the first arm refuses, and where it has failed, those that
    all others refuse. found: by the arm's index, its answers or refusals"""
    judges = [found[0]] if 0 in found else [found[index] for index in sorted(found)]
    return {
        key: str(verdicts[0])
        for key, verdicts in zip(keys, zip(*judges, strict=True), strict=False)
        if all(isinstance(one, RefusedQuestion) for one in verdicts)
    }


def _reset(arms: Sequence[TimedArm[Asked, Content]], failures: dict[int, str]) -> None:
    """Reset the arms that have not failed."""
    for index, arm in enumerate(arms):
        if index not in failures:
            try:
                arm.reset()
            except SubjectError as error:
                failures[index] = str(error)


def _groups(prompts: Sequence[Prompt], size: int) -> list[list[Prompt]]:
    """The prompts that are answered at once: up to `size` of one category. With `size` 1 the order does not change."""
    by_category: dict[str, list[Prompt]] = {}
    if size == 1:
        return [[prompt] for prompt in prompts]
    for prompt in prompts:
        by_category.setdefault(prompt.category, []).append(prompt)
    return [of_one[i : i + size] for of_one in by_category.values() for i in range(0, len(of_one), size)]


def _add(
    outcome: Outcome, categories: Sequence[str], results: Mapping[int, Sequence[Timed[object]]], group: int
) -> None:
    """Add the tokens, times and counters of one answer of every arm, by its index, to each of the same prompts.

    group  a number for these prompts
    """
    bases = [(one.length - 1, one.seconds) for one in results.get(0, ())] or [(0, 0.0)] * len(categories)
    for index, of_arm in results.items():
        outcome.answers[index] += of_arm
        for category, result, (base_tokens, base_seconds) in zip(categories, of_arm, bases, strict=True):
            for tally in (outcome.overall[index], outcome.categories[index].setdefault(category, Tally())):
                tally.tokens.append(result.length - 1)
                tally.seconds.append(result.seconds)
                tally.prompt_seconds.append(result.prompt_seconds)
                tally.groups.append(group)
                tally.base_tokens.append(base_tokens)
                tally.base_seconds.append(base_seconds)
                if result.counters is None:
                    tally.counted = False
                else:
                    tally.counters.add(result.counters)


def _judge(
    outcome: Outcome,
    categories: Sequence[str],
    prompts: Sequence[Asked],
    results: Mapping[int, Sequence[Timed[Content]]],
    references: Sequence[int],
    explains: Sequence[Callable[[Asked, Content, Content], bool]],
) -> None:
    """Compare every answer with that of its arm's reference, where both have answered, and count the verdict."""
    for index, (reference, explain) in enumerate(zip(references, explains, strict=True)):
        if not {index, reference} <= results.keys():
            continue
        for category, prompt, result, base in zip(categories, prompts, results[index], results[reference], strict=True):
            same = result.content == base.content
            rounding = not same and explain(prompt, base.content, result.content)
            verdict = "identical" if same else "rounding" if rounding else "different"
            for tally in (outcome.overall[index], outcome.categories[index][category]):
                setattr(tally, verdict, getattr(tally, verdict) + 1)
