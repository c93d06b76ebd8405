"""The order in which arms answer, and the sums, with arms whose answers follow from a rule."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import pytest

from specplug.bench.arms import PromptStates, Result
from specplug.bench.interleaved import Explain, Outcome, Tally, run_arms
from specplug.bench.workloads import Prompt
from specplug.core import IntArray, int_array
from specplug.generation.counters import Counters
from specplug.profile import Runtime
from specplug.subjects.subject import RefusedQuestion, SubjectError

Event = tuple[str, tuple[tuple[int, ...], ...]]
"""An arm's name, and the prompts that it received at once (no prompts: `reset`)."""


@dataclass
class Toy:
    """Answers a prompt with `reply(prompt)`, in `token_seconds` per token after the first.

    refuses, breaks_at  it refuses prompts that end in one of these numbers, and fails where one ends in this number
    """

    name: str
    reply: Callable[[list[int]], list[int]]
    events: list[Event] = field(default_factory=list)
    token_seconds: float = 0.5
    counters: Counters | None = field(default_factory=lambda: Counters(steps=2, accepted_tokens=1))
    profile: str | None = None
    prompt_seconds: float | None = None
    refuses: Sequence[int] = ()
    breaks_at: int | None = None

    def answer(self, prompts: Sequence[IntArray], max_tokens: int) -> list[Result | RefusedQuestion]:
        self.events.append((self.name, tuple(tuple(prompt.tolist()) for prompt in prompts)))
        if any(prompt.tolist()[-1] == self.breaks_at for prompt in prompts):
            raise SubjectError(f"{self.name} broke")
        return [self.answered(prompt.tolist(), max_tokens) for prompt in prompts]

    def answered(self, prompt: list[int], max_tokens: int) -> Result | RefusedQuestion:
        if prompt[-1] in self.refuses:
            return RefusedQuestion(f"{self.name} refuses {prompt[-1]}")
        tokens = self.reply(prompt)[:max_tokens]
        return Result(tokens, self.token_seconds * (len(tokens) - 1), self.counters, self.prompt_seconds)

    def reset(self) -> None:
        self.events.append((self.name, ()))

    def close(self) -> None:
        pass


def encode(messages: Sequence[dict[str, str]]) -> IntArray:
    """A user's text is a number, which is one token; the assistant's text is its tokens, joined."""
    return int_array([int(word) for message in messages for word in message["content"].split()])


def decode(tokens: Sequence[int]) -> str:
    return " ".join(map(str, tokens))


def count_up(prompt: list[int]) -> list[int]:
    return [prompt[-1] + 1, prompt[-1] + 2, prompt[-1] + 3]


def other(prompt: list[int]) -> list[int]:
    return [prompt[-1] + 1, 90, 91]


def never(prompt: IntArray, plain: list[int], found: list[int]) -> bool:
    raise AssertionError("nothing differs")


def run(
    arms: Sequence[Toy],
    prompts: Sequence[Prompt],
    explain: Explain | Sequence[Explain] = never,
    references: Sequence[int] | None = None,
    repeats: int = 1,
    concurrency: int = 1,
) -> Outcome:
    return run_arms(
        arms,
        prompts,
        encode,
        decode,
        explain,
        references=references,
        max_tokens=8,
        repeats=repeats,
        concurrency=concurrency,
    )


def single(*texts: str, category: str = "qa") -> list[Prompt]:
    return [Prompt(text, category, (text,)) for text in texts]


def order(events: Sequence[Event]) -> str:
    """The names of the arms in the order of their answers, with a dash for every reset."""
    return "".join(name if prompts else "-" for name, prompts in events)


def three() -> tuple[list[Toy], list[Event]]:
    events: list[Event] = []
    return [Toy(name, count_up, events) for name in "abc"], events


# -- order -----------------------------------------------------------------------------------------------------------


def test_the_first_arm_changes_from_prompt_to_prompt() -> None:
    arms, events = three()
    run(arms, single("10", "20", "30", "40"))
    assert order(events) == "---abcbcacababc"
    assert [prompts for _, prompts in events[3:6]] == [((10,),)] * 3


def test_every_repeat_starts_with_nothing_learned_and_another_arm() -> None:
    arms, events = three()
    run(arms, single("10", "20"), repeats=3)
    assert order(events) == "---abcbca---bcacab---cababc"


def test_progress_is_reported_per_arm_and_answer() -> None:
    arms, _ = three()
    reported: list[tuple[str, int]] = []
    run_arms(
        arms,
        [*single("1", "2", "3"), *single("4", category="code")],
        encode,
        decode,
        never,
        max_tokens=8,
        concurrency=2,
        progress=lambda what, steps: reported.append((what, steps)),
    )
    assert reported == [("qa", 2)] * 3 + [("qa", 1)] * 3 + [("code", 1)] * 3


# -- conversations ---------------------------------------------------------------------------------------------------


def test_later_turns_contain_plain_decodings_answers_for_every_arm() -> None:
    events: list[Event] = []
    arms = [Toy("a", count_up, events), Toy("b", other, events)]
    run(arms, [Prompt("1", "qa", ("10", "20", "30"))], explain=lambda *_: True)
    first, second = (10,), (10, 11, 12, 13, 20)
    third = (*second, 21, 22, 23, 30)
    assert events[2:] == [(name, (prompt,)) for prompt in (first, second, third) for name in "ab"]


def test_the_arms_stay_in_order_within_a_conversation() -> None:
    arms, events = three()
    run(arms, [*single("1"), Prompt("2", "qa", ("10", "20"))])
    assert order(events) == "---abcbcabca"


def test_prompts_are_answered_together_within_a_category() -> None:
    arms, events = three()
    prompts = [*single("1"), *single("2", category="code"), *single("3", "4"), *single("5", category="code")]
    run(arms[:1], prompts, concurrency=2)
    assert [asked for _, asked in events[1:]] == [((1,), (3,)), ((4,),), ((2,), (5,))]


def test_one_at_a_time_keeps_the_workloads_order() -> None:
    arms, events = three()
    run(arms[:1], [*single("1"), *single("2", category="code"), *single("3")])
    assert [asked for _, asked in events[1:]] == [((1,),), ((2,),), ((3,),)]


def test_a_short_conversation_leaves_the_group_early() -> None:
    arms, events = three()
    run(arms[:1], [Prompt("1", "qa", ("10",)), Prompt("2", "qa", ("20", "30"))], concurrency=2)
    assert [asked for _, asked in events[1:]] == [((10,), (20,)), ((20, 21, 22, 23, 30),)]


def test_the_prompts_token_limit_is_passed_on() -> None:
    arms, _ = three()
    outcome = run_arms(arms[:1], single("1"), encode, decode, never, max_tokens=2)
    assert outcome.overall[0].tokens == [1]


# -- verdicts --------------------------------------------------------------------------------------------------------


def test_answers_are_identical_rounding_or_different() -> None:
    """The second arm differs on prompts 20 and 30; only the difference on 20 is rounding."""
    asked: list[tuple[list[int], list[int], list[int]]] = []

    def explain(prompt: IntArray, plain: list[int], found: list[int]) -> bool:
        asked.append((prompt.tolist(), plain, found))
        return prompt.tolist() == [20]

    arms = [Toy("a", count_up), Toy("b", lambda prompt: (count_up if prompt == [10] else other)(prompt))]
    plain, found = run(arms, single("10", "20", "30"), explain).overall
    assert (plain.identical, plain.rounding, plain.different) == (3, 0, 0)
    assert (found.identical, found.rounding, found.different) == (1, 1, 1)
    assert asked == [([20], [21, 22, 23], [21, 90, 91]), ([30], [31, 32, 33], [31, 90, 91])]


def test_only_answers_of_the_first_repeat_are_compared() -> None:
    asked: list[IntArray] = []
    arms = [Toy("a", count_up), Toy("b", other)]
    outcome = run(arms, single("10", "20"), lambda prompt, *_: bool(asked.append(prompt)), repeats=3)
    assert len(asked) == 2
    assert [tally.identical for tally in outcome.overall] == [2, 0]
    assert outcome.overall[1].different == 2
    assert len(outcome.overall[1].tokens) == 6


def test_every_arm_is_compared_with_its_own_reference() -> None:
    """b is plain decoding under another setting, whose answers differ from a's; c drafts under it and d under a's."""
    asked: list[tuple[str, list[int], list[int]]] = []

    def explain(name: str, prompt: IntArray, plain: list[int], found: list[int]) -> bool:
        asked.append((name, plain, found))
        return True

    arms = [Toy("a", count_up), Toy("b", other), Toy("c", other), Toy("d", other)]
    explains = [partial(explain, arm.name) for arm in arms]
    outcome = run(arms, single("10", "20"), explains, references=[0, 1, 1, 0])
    assert [tally.identical for tally in outcome.overall] == [2, 2, 2, 0]
    assert outcome.categories[2]["qa"].identical == 2 and outcome.overall[3].rounding == 2
    assert asked == [("d", [11, 12, 13], [11, 90, 91]), ("d", [21, 22, 23], [21, 90, 91])]
    assert outcome.overall[2].base_tokens == [2, 2], "the speed is compared with the first arm's"


def test_every_arm_continues_the_first_arms_conversation_whatever_its_reference() -> None:
    events: list[Event] = []
    arms = [Toy("a", count_up, events), Toy("b", other, events), Toy("c", other, events)]
    run(arms, [Prompt("1", "qa", ("10", "20"))], references=[0, 1, 1])
    assert [asked for _, asked in events[6:]] == [((10, 11, 12, 13, 20),)] * 3


# -- prompts that are refused ----------------------------------------------------------------------------------------


def test_of_prompts_asked_at_once_only_the_refused_one_is_left_out() -> None:
    events: list[Event] = []
    arms = [Toy(name, count_up, events, refuses=[20]) for name in "ab"]
    outcome = run(arms, single("10", "20", "30"), concurrency=3)
    assert outcome.refused == {"20": "a refuses 20"} and outcome.failures == {}
    assert [(tally.tokens, tally.identical) for tally in outcome.overall] == [([2, 2], 2)] * 2
    assert [[answer.content for answer in answers] for answers in outcome.answers] == [[[11, 12, 13], [31, 32, 33]]] * 2
    assert order(events) == "--ab", "their answers to the others took the time of two"


def test_where_another_arm_has_answered_what_the_first_one_refuses_the_others_are_asked_again_anew() -> None:
    events: list[Event] = []
    arms = [Toy("a", count_up, events, refuses=[20]), Toy("b", count_up, events)]
    outcome = run(arms, single("10", "20", "30"), concurrency=3)
    assert outcome.refused == {"20": "a refuses 20"} and outcome.failures == {}
    assert [tally.tokens for tally in outcome.overall] == [[2, 2]] * 2
    assert order(events) == "--ab--ab"
    assert [asked for _, asked in events[6:]] == [((10,), (30,))] * 2


def test_a_conversation_goes_on_beside_one_that_was_left_out() -> None:
    events: list[Event] = []
    prompts = [Prompt("1", "qa", ("10", "20")), Prompt("2", "qa", ("30", "40", "50"))]
    outcome = run([Toy("a", count_up, events, refuses=[30])], prompts, concurrency=2)
    assert outcome.refused == {"2": "a refuses 30"} and outcome.overall[0].tokens == [2, 2]
    assert [asked for _, asked in events[1:]] == [((10,), (30,)), ((10, 11, 12, 13, 20),)]


def test_an_arm_that_refuses_what_the_first_one_answers_has_failed() -> None:
    outcome = run([Toy("a", count_up), Toy("b", count_up, refuses=[20])], single("10", "20", "30"), concurrency=2)
    assert outcome.failures == {1: "b refuses 20"} and outcome.refused == {}
    assert [tally.tokens for tally in outcome.overall] == [[2, 2, 2], []]


@pytest.mark.parametrize("concurrency", [1, 2])
def test_where_the_first_arm_has_failed_a_prompt_that_all_others_refuse_is_left_out(concurrency: int) -> None:
    arms = [Toy("a", count_up, breaks_at=10), *(Toy(name, count_up, refuses=[30]) for name in "bc")]
    outcome = run(arms, single("10", "20", "30", "40"), concurrency=concurrency)
    assert outcome.failures == {0: "a broke"} and outcome.refused == {"30": "b refuses 30"}
    assert [tally.tokens for tally in outcome.overall] == [[], [2, 2, 2], [2, 2, 2]]


def test_where_the_first_arm_has_failed_an_arm_that_alone_refuses_a_prompt_has_failed() -> None:
    arms = [Toy("a", count_up, breaks_at=10), Toy("b", count_up, refuses=[20]), Toy("c", count_up)]
    outcome = run(arms, single("10", "20", "30"))
    assert outcome.failures == {0: "a broke", 1: "b refuses 20"} and outcome.refused == {}
    assert [tally.tokens for tally in outcome.overall] == [[], [2], [2, 2, 2]]


# -- sums ------------------------------------------------------------------------------------------------------------


def test_the_first_token_is_not_counted() -> None:
    """The prefill yields it: of three tokens, two count, at half a second each."""
    outcome = run([Toy("a", count_up), Toy("b", count_up, token_seconds=0.25)], single("10", "20"))
    assert outcome.overall[0].tokens == [2, 2]
    assert outcome.overall[0].seconds == [1.0, 1.0]
    assert outcome.overall[1].seconds == [0.5, 0.5]
    assert outcome.overall[1].base_tokens == [2, 2]
    assert outcome.overall[1].base_seconds == [1.0, 1.0]
    assert outcome.overall[1].figures()["speedup"] == {"median": 2.0, "low": 2.0, "high": 2.0}


def test_sums_per_category_and_overall() -> None:
    prompts = [*single("10", "20"), *single("30", category="code")]
    outcome = run([Toy("a", count_up), Toy("b", other)], prompts, lambda prompt, *_: prompt.tolist() == [30])
    assert [list(line) for line in outcome.categories] == [["qa", "code"]] * 2
    qa, code = outcome.categories[1]["qa"], outcome.categories[1]["code"]
    assert (len(qa.tokens), len(code.tokens), len(outcome.overall[1].tokens)) == (2, 1, 3)
    assert (qa.rounding, qa.different, code.rounding, code.different) == (0, 2, 1, 0)
    assert (qa.counters.steps, code.counters.steps, outcome.overall[1].counters.steps) == (4, 2, 6)


def test_figures_by_hand() -> None:
    """40 tokens in 4 s against 30 in 6 s are 10 and 5 per second. 20 steps accepted 15 of 30 draft tokens; drafting
    took 5 ms."""
    counters = Counters(steps=20, draft_tokens=30, accepted_tokens=15, draft_ns=5_000_000)
    tally = Tally([40], [4.0], [30], [6.0], counters, identical=3, rounding=2, different=1, prompt_seconds=[1.5])
    assert tally.figures() == {
        "tokens": 40,
        "seconds": 4.0,
        "prompt_seconds": 1.5,
        "tokens_per_second": 10.0,
        "mean_acceptance_length": 1.75,
        "steps": 20,
        "draft_tokens": 30,
        "accepted_tokens": 15,
        "overhead_us_per_step": 250.0,
        "speedup": {"median": 2.0, "low": 2.0, "high": 2.0},
        "identical": 3,
        "rounding": 2,
        "different": 1,
    }


def test_answers_at_once_are_one_unit_of_the_bootstrap() -> None:
    """Two groups of four answers, twice and half as fast as the base's. Of two groups, a quarter of the resamples has
    only the first one, and a quarter only the second; of eight answers, 1 in 256 would."""
    tally = Tally([10] * 8, [1.0] * 4 + [4.0] * 4, [10] * 8, [2.0] * 8, groups=[0] * 4 + [1] * 4)
    assert tally.speedup is not None and (tally.speedup.low, tally.speedup.high) == (0.5, 2.0)
    outcome = run([Toy("a", count_up)], [*single("1", "2", "3"), *single("4", category="code")], concurrency=2)
    assert outcome.overall[0].groups == [0, 0, 1, 2] and outcome.categories[0]["code"].groups == [2]


def test_the_seconds_of_prompts_are_added_where_all_were_measured() -> None:
    arms = [Toy("a", count_up, prompt_seconds=0.75), Toy("b", count_up)]
    measured, unknown = run(arms, single("10", "20", "30")).overall
    assert measured.prompt_seconds == [0.75] * 3 and measured.figures()["prompt_seconds"] == 2.25
    assert unknown.figures()["prompt_seconds"] is None
    assert Tally([1, 1], [1.0, 1.0], prompt_seconds=[0.5, None]).measured_prompts is None


def test_prompt_states_belong_to_one_engine_setting() -> None:
    states = PromptStates()
    prompt, setting = int_array([1, 2]), Runtime(flash_attention=True, kv_type="bf16")
    states.keep(prompt, b"bf16", setting)
    assert states.of(prompt, setting) == b"bf16"
    assert states.of(prompt, replace(setting, kv_type="f16")) is None and states.of(prompt) is None


COUNTED = ("mean_acceptance_length", "steps", "draft_tokens", "accepted_tokens", "overhead_us_per_step")


def test_figures_that_a_reference_engine_does_not_report_are_none() -> None:
    outcome = run([Toy("a", count_up), Toy("reference", count_up, counters=None)], single("10", "20"))
    plain, reference = (tally.figures() for tally in outcome.overall)
    assert [reference[name] for name in COUNTED] == [None] * 5
    assert all(plain[name] is not None for name in COUNTED)
    assert reference["tokens_per_second"] == 2.0
    assert reference["identical"] == 2


@pytest.mark.parametrize("tally", [Tally(), Tally([0], [0.0], [0], [0.0])])
def test_without_tokens_there_is_no_speed(tally: Tally) -> None:
    figures = tally.figures()
    assert (figures["tokens"], figures["seconds"]) == (0, 0.0)
    assert figures["tokens_per_second"] is None
    assert figures["speedup"] is None


def test_without_prompts_there_are_no_answers() -> None:
    arms, events = three()
    outcome = run(arms, [])
    assert order(events) == "---"
    assert [tally.tokens for tally in outcome.overall] == [[], [], []]
