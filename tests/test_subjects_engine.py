"""specplug's own engine as a subject, on the packaged model."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("llama_cpp")

from specplug.errors import UsageError
from specplug.profile import PlannerSettings, Profile, Runtime
from specplug.registry import ProposerSpec
from specplug.subjects.engine_subject import EngineSubject
from specplug.subjects.subject import Question, SubjectError

pytestmark = pytest.mark.llama

PROFILE = Profile(
    "drafting",
    proposers=(ProposerSpec("suffix"),),
    planner=PlannerSettings(mode="static", max_nodes=4),
    runtime=Runtime(kv_type="bf16", context=512, threads=1),
)
"""Static, so that drafts are verified whatever they cost."""

COUNTING = [{"role": "user", "content": "Count: one two three four five six seven eight. Write exactly that again."}]


@pytest.fixture(scope="module")
def engine(demo_path: Path) -> Iterator[EngineSubject]:
    subject = EngineSubject(PROFILE, demo_path, slots=2)
    subject.start()
    yield subject
    subject.stop()


def test_the_engine_says_what_it_can_do(engine: EngineSubject, demo_path: Path) -> None:
    able = engine.abilities
    assert (able.kind, able.model, able.slots, able.context) == ("specplug", demo_path.name, 2, 512)
    assert able.token_ids and able.timings and able.counters and able.logprobs and able.per_request


def test_an_answer_without_drafts_has_the_same_text(engine: EngineSubject) -> None:
    with_drafts = engine.ask(Question(COUNTING, 40))
    without = engine.ask(Question(COUNTING, 40, drafting=False))
    assert with_drafts.text == without.text and with_drafts.ids == without.ids
    assert with_drafts.draft_tokens and without.draft_tokens == without.accepted_tokens == 0
    assert with_drafts.accepted_tokens is not None
    assert 0 < with_drafts.accepted_tokens <= with_drafts.draft_tokens
    assert without.ids is not None and len(without.gaps_ms) == without.tokens - 1 == len(without.ids) - 1
    assert len(with_drafts.gaps_ms) == with_drafts.tokens - 1 - with_drafts.accepted_tokens


def test_a_conversation_is_in_the_models_own_template(engine: EngineSubject) -> None:
    reply = engine.ask(Question([{"role": "user", "content": "Hello"}], 1))
    assert reply.prompt_ids is not None and reply.finish == "length" and reply.tokens == 1
    assert reply.prompt_ids[0] == 1 and reply.prompt_ids.count(1) >= 2  # <|im_start|>, before each message


def test_the_likeliest_tokens(engine: EngineSubject) -> None:
    reply = engine.ask(Question(COUNTING, 3, top=2))
    assert len(reply.top) == 3 and all(len(one) == 2 for one in reply.top)
    assert all(list(one.values()) == sorted(one.values(), reverse=True) and max(one.values()) < 0 for one in reply.top)
    assert reply.text.startswith(next(iter(reply.top[0])))


def test_answers_at_once(engine: EngineSubject) -> None:
    with ThreadPoolExecutor(4) as threads:
        replies = list(threads.map(lambda tokens: engine.ask(Question(COUNTING, tokens)), (2, 4, 6, 8)))
    assert [reply.tokens for reply in replies] == [2, 4, 6, 8]
    assert replies[3].text.startswith(replies[0].text)


def test_a_prompt_longer_than_the_context(engine: EngineSubject) -> None:
    with pytest.raises(SubjectError, match=r"drafting: the prompt has .* the context is 512"):
        engine.ask(Question([{"role": "user", "content": "word " * 600}], 4))
    assert engine.ask(Question(COUNTING, 2)).tokens == 2


def test_the_engine_takes_no_flags_and_is_nothing_before_its_start(demo_path: Path) -> None:
    subject = EngineSubject(PROFILE, demo_path, name="mine")
    with pytest.raises(UsageError, match=r"mine: .*--spec-type"):
        subject.start(["--spec-type"])
    with pytest.raises(SubjectError, match="`start` comes first"):
        subject.ask(Question(COUNTING, 2))
    subject.stop()


def test_an_engine_that_cannot_be_opened_says_why(demo_path: Path) -> None:
    wrong = replace(PROFILE, proposers=(ProposerSpec("mtp"),))
    with pytest.raises(UsageError):
        EngineSubject(wrong, demo_path).start()


def test_an_engine_that_is_missing_is_a_fault_of_the_subject(demo_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)  # an import then fails
    with pytest.raises(SubjectError, match=r"drafting: .*llama-cpp"):
        EngineSubject(PROFILE, demo_path).start()
