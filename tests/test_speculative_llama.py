"""SpeculativeLlama beside llama_cpp.Llama on the real model: a script gets the same results from both."""

import json
import pickle
import signal
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llama_cpp")

import llama_cpp

from specplug.engines.llama_cpp import SpeculativeLlama, speculative_llama
from specplug.errors import UsageError
from specplug.profile import CostPoints, Measured, PlannerSettings, Profile
from specplug.registry import ProposerSpec

pytestmark = pytest.mark.llama

TREES = Profile(
    "trees",
    proposers=(ProposerSpec("suffix"), ProposerSpec("token_recycling")),
    planner=PlannerSettings(mode="static", max_nodes=12),
    measured=Measured(cost_curve=CostPoints((128,), (1, 64), ((1.0, 1.001),))),
)
TEXT = "def area(w, h):\n    return w * h\n\nRepeat the function above, with type hints added:\n\ndef area("
TALK = [{"role": "user", "content": "Repeat this list and then sort it: pear, apple, fig, plum, apple, fig, plum."}]

Both = tuple[Any, Any]


@pytest.fixture(scope="module")
def options(formats: dict[str, Path]) -> dict[str, Any]:
    return {
        "model_path": str(formats["f32"]),
        "n_ctx": 256,
        "n_batch": 128,
        "n_threads": 2,
        "n_threads_batch": 2,
        "type_k": llama_cpp.GGML_TYPE_F32,
        "type_v": llama_cpp.GGML_TYPE_F32,
        "verbose": False,
    }


@pytest.fixture(scope="module")
def both(options: dict[str, Any]) -> Iterator[Both]:
    plain, drafting = llama_cpp.Llama(**options), SpeculativeLlama(profile=TREES, **options)
    yield plain, drafting
    assert drafting.counters.accepted_tokens > 100
    plain.close()
    drafting.close()


def test_it_prints_nothing_unless_asked_to(options: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    given = {name: value for name, value in options.items() if name != "verbose"}
    for verbose in ({}, {"verbose": True}):
        llama = SpeculativeLlama(profile=TREES, **given, **verbose)
        llama("The", max_tokens=2)
        llama.close()
        assert bool("".join(capfd.readouterr())) is bool(verbose)


def test_the_context_is_opened_for_as_many_rows_as_align_it(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def eight_more(model: Any, params: Any, rows: int) -> int:
        asked.append(rows)
        return rows + 8

    monkeypatch.setattr(speculative_llama, "aligned_rows", eight_more)
    llama = SpeculativeLlama(profile=TREES, **options)
    assert llama.context_params.n_outputs_max == asked[0] + 8 and len(asked) == 1
    llama.close()


def choice(llama: Any, text: str = TEXT, **options: Any) -> Any:
    return llama(text, **{"max_tokens": 48, "temperature": 0.0} | options)["choices"][0]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"temperature": 0.8, "seed": 5},
        {"repeat_penalty": 1.3, "frequency_penalty": 0.2, "presence_penalty": 0.1},
        {"stop": ["return"]},
        {"logit_bias": {314: 5.0, 28: -100.0}},
        {"temperature": 0.9, "mirostat_mode": 2, "seed": 5},
        {"suffix": "the end", "max_tokens": 16},
        {"echo": True},
        {"max_tokens": 1},
        {"max_tokens": None},
    ],
    ids=str,
)
def test_completions(both: Both, more: dict[str, Any]) -> None:
    plain, drafting = both
    for _ in range(2):  # the second time from the cache
        assert choice(drafting, **more) == choice(plain, **more)


def test_chats(both: Both) -> None:
    answers = []
    for llama in both:
        chat = llama.create_chat_completion(TALK, max_tokens=60, temperature=0.0)
        answers.append([chat["choices"], chat["usage"]])
    assert answers[0] == answers[1]


def test_streams(both: Both) -> None:
    streams = [
        [part["choices"] for part in llama.create_chat_completion(TALK, max_tokens=60, temperature=0.0, stream=True)]
        for llama in both
    ]
    assert streams[0] == streams[1]
    assert len(streams[0]) > 25


def test_grammar_objects(both: Both) -> None:
    texts = []
    for llama in both:
        grammar = llama_cpp.LlamaGrammar.from_string('root ::= [a-z ]+ "."', verbose=False)
        texts.append([choice(llama, grammar=grammar, temperature=t, seed=2)["text"] for t in (0.0, 0.8)])
    assert texts[0] == texts[1]


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "path": {"enum": ["D:\\temp\\new\n"]}},
    "required": ["name", "path"],
}
FORMATS = [
    {"type": "json_object", "schema": PERSON},
    {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}},
]


@pytest.mark.parametrize("response_format", FORMATS, ids=["llama-cpp-python's form", "OpenAI's form"])
def test_response_formats_are_kept_with_and_without_drafts(
    both: Both, options: dict[str, Any], response_format: Any
) -> None:
    plain = SpeculativeLlama(profile=Profile("plain", proposers=(ProposerSpec("none"),)), **options)
    texts = []
    for llama in (plain, both[1]):
        for temperature in (0.0, 0.8):
            asked = {"response_format": response_format, "temperature": temperature, "seed": 2, "max_tokens": 60}
            answer = llama.create_chat_completion(TALK, **asked)
            texts.append(answer["choices"][0]["message"]["content"])
            assert json.loads(texts[-1])["path"] == "D:\\temp\\new\n" and answer["specplug"]["warnings"] == []
            parts = [part["choices"][0]["delta"] for part in llama.create_chat_completion(TALK, stream=True, **asked)]
            assert "".join(part.get("content", "") for part in parts) == texts[-1]
    plain.close()
    assert texts[:2] == texts[2:]


def test_response_formats_that_cannot_be_kept_are_refused_or_listed(both: Both) -> None:
    _, drafting = both
    lax = {"type": "array", "uniqueItems": True, "maxItems": 1}
    asked = {"schema": lax, "strict": True}
    with pytest.raises(UsageError, match="uniqueItems at #"):
        drafting.create_chat_completion(TALK, response_format={"type": "json_schema", "json_schema": asked})
    answer = drafting.create_chat_completion(TALK, response_format={"type": "json_object", "schema": lax}, max_tokens=8)
    assert answer["specplug"]["warnings"] == ["uniqueItems at # is not enforced"]
    with pytest.raises(UsageError, match="is not supported; use text, json_object or json_schema"):
        drafting.create_chat_completion(TALK, response_format={"type": "xml"})
    grammar = llama_cpp.LlamaGrammar.from_string('root ::= "a"', verbose=False)
    with pytest.raises(UsageError, match="given at once"):
        drafting.create_chat_completion(TALK, response_format={"type": "json_object"}, grammar=grammar)


def test_abandoned_streams_and_prompts_that_continue(both: Both) -> None:
    plain, drafting = both
    for count in range(1, 12, 2):
        for llama in both:
            stream = llama.create_completion(TEXT, max_tokens=48, temperature=0.0, stream=True)
            for _ in range(count):
                next(stream)
            stream.close()
        assert drafting.n_tokens == plain.n_tokens
        assert drafting.input_ids[: plain.n_tokens].tolist() == plain.input_ids[: plain.n_tokens].tolist()
        assert choice(drafting, TEXT + "width: float") == choice(plain, TEXT + "width: float")


def test_an_open_stream_ends_with_the_next_call(both: Both) -> None:
    open_streams = []
    for llama in both:
        open_streams.append(llama.create_completion(TEXT, max_tokens=48, temperature=0.0, stream=True))
        for _ in range(9):
            next(open_streams[-1])
    plain, drafting = both
    expected = choice(plain, "The sea is")
    assert choice(drafting, "The sea is") == expected
    open_streams.clear()  # closing the streams must not touch the cache, which now holds another text
    assert choice(drafting, "The sea is") == expected


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer's signal")
def test_after_an_interrupted_pass(both: Both) -> None:
    def interrupt(number: int, frame: FrameType | None) -> None:
        # ctypes prints and drops what a callback raises, and `logit_bias` is applied in a callback of the sampler.
        if any(caller.f_code.co_name == "apply_wrapper" for caller, _ in traceback.walk_stack(frame)):
            signal.setitimer(signal.ITIMER_REAL, 0.001)
        else:
            raise TimeoutError

    plain, drafting = both
    no_end = {str(token): -100.0 for token in (0, 1, 2)}
    texts = ["The sea is", TEXT]
    expected = [choice(plain, text) for text in texts]
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for delay in (0.02, 0.05, 0.07):
            stream = drafting.create_completion(
                "tick tack " * 12, max_tokens=200, temperature=0.0, logit_bias=no_end, stream=True
            )
            next(stream)  # the prompt is read
            signal.setitimer(signal.ITIMER_REAL, delay)
            with pytest.raises(TimeoutError):
                for _ in stream:
                    pass
            assert [choice(drafting, text) for text in texts] == expected
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_processors_and_criteria_see_what_the_base_class_shows(both: Both) -> None:
    seen: list[list[list[int]]] = []
    for llama in both:
        inputs: list[list[int]] = []

        def no_digits(ids: Any, scores: Any, inputs: list[list[int]] = inputs) -> Any:
            inputs.append(ids.tolist())
            scores[20:100] = -np.inf
            return scores

        def enough(ids: Any, logits: Any, inputs: list[list[int]] = inputs) -> bool:
            inputs.append(ids.tolist())
            return len(ids) > 60

        prompt = llama.tokenize(TEXT.encode())
        processors = llama_cpp.LogitsProcessorList([no_digits])
        criteria = llama_cpp.StoppingCriteriaList([enough])
        inputs.append(list(llama.generate(prompt, temp=0.0, logits_processor=processors, stopping_criteria=criteria)))
        seen.append(inputs)
    assert seen[0] == seen[1]
    assert len(seen[0][-1]) > 10


def test_saved_states(both: Both) -> None:
    plain, drafting = both
    expected = choice(plain)
    state = drafting.save_state()
    choice(drafting, "Something else entirely.")
    drafting.load_state(state)
    assert choice(drafting) == expected


def test_the_context_can_be_filled(both: Both) -> None:
    plain, drafting = both
    texts = [choice(llama, "One, two, three, four, five, six,", max_tokens=None)["text"] for llama in (plain, drafting)]
    assert texts[0] == texts[1]
    tokens = plain.tokenize(texts[0].encode())
    assert len(tokens) > 220


def test_all_logits_are_left_to_the_base_class(options: dict[str, Any]) -> None:
    plain = llama_cpp.Llama(logits_all=True, **options)
    drafting = SpeculativeLlama(profile=TREES, logits_all=True, **options)
    assert choice(drafting, logprobs=2, max_tokens=12) == choice(plain, logprobs=2, max_tokens=12)
    assert drafting.counters.steps == 0
    plain.close()
    drafting.close()


def test_a_pickled_instance_keeps_its_profile(options: dict[str, Any]) -> None:
    llama = SpeculativeLlama(profile=TREES, **options)
    copied = pickle.loads(pickle.dumps(llama))
    assert copied.profile == llama.profile
    assert choice(copied, max_tokens=8) == choice(llama, max_tokens=8)
    llama.close()
    copied.close()


def test_unsupported_uses_are_errors(options: dict[str, Any], both: Both) -> None:
    with pytest.raises(UsageError, match="name a profile instead"):
        SpeculativeLlama(draft_model=object(), **options)
    with pytest.raises(UsageError, match="no profile is named fastest"):
        SpeculativeLlama(profile="fastest", **options)
    stream = both[1].generate(both[1].tokenize(TEXT.encode()), temp=0.0)
    next(stream)
    with pytest.raises(UsageError, match="logits_all=True"):
        stream.send([1, 2])


def test_drafts_fit_into_a_small_batch(options: dict[str, Any]) -> None:
    """The profile allows 12 nodes and its curve 64 rows; the batch holds 8."""
    small = options | {"n_batch": 8}
    plain, drafting = llama_cpp.Llama(**small), SpeculativeLlama(profile=TREES, **small)
    assert choice(drafting) == choice(plain)
    assert drafting.counters.accepted_tokens > 0
    plain.close()
    drafting.close()


@pytest.mark.parametrize("weights", ["f32", "q8_0"])
def test_exact_drafts_change_no_bit(weights: str, options: dict[str, Any], formats: dict[str, Path]) -> None:
    """The logits that a stopping criterion sees are compared: those of all rows from which a token was sampled."""
    plain = replace(TREES, proposers=(ProposerSpec("none"),), planner=PlannerSettings(mode="static"), exact=True)
    exact_options = options | {"model_path": str(formats[weights]), "flash_attn": True, "type_k": 30, "type_v": 30}
    seen: list[list[Any]] = []
    for profile in (plain, replace(TREES, exact=True)):
        llama = SpeculativeLlama(profile=profile, **exact_options)
        found: list[Any] = []
        for _ in range(2):  # the second time the prompt is cached, and read again
            rows: list[Any] = []

            def keep(ids: Any, logits: Any, rows: list[Any] = rows) -> bool:
                rows.append(logits.copy())
                return len(rows) >= 60

            criteria = llama_cpp.StoppingCriteriaList([keep])
            tokens = list(llama.generate(llama.tokenize(TEXT.encode()), temp=0.0, stopping_criteria=criteria))
            found += [tokens, *rows[1:]]  # to the first token's row the base class has no logits
        accepted = llama.counters.accepted_tokens
        llama.close()
        seen.append(found)
    assert accepted > 4
    assert len(seen[0]) == len(seen[1]) == 120
    assert all(np.array_equal(one, other) for one, other in zip(*seen, strict=True))


def test_options_under_which_passes_cannot_be_exact(options: dict[str, Any]) -> None:
    exact = replace(TREES, exact=True)
    for wrong, message in (
        ({}, "exact needs flash attention; pass flash_attn=True"),
        ({"flash_attn": True, "n_batch": 1}, "exact needs passes of two rows; pass n_batch=2 or more"),
        ({"flash_attn": True, "chat_handler": object()}, "exact reads every prompt again"),
    ):
        with pytest.raises(UsageError, match=message):
            SpeculativeLlama(profile=exact, **options | wrong)


def test_exact_in_a_small_batch(options: dict[str, Any]) -> None:
    small = options | {"n_batch": 8, "flash_attn": True, "type_k": 30, "type_v": 30}
    texts = []
    for method in ("none", "suffix"):
        profile = replace(TREES, proposers=(ProposerSpec(method),), exact=True)
        llama = SpeculativeLlama(profile=profile, **small)
        texts.append(choice(llama))
        llama.close()
    assert texts[0] == texts[1]


def test_a_text_that_the_caller_evaluates_goes_on(both: Both) -> None:
    """`generate(reset=False)` after `eval`, as scripts that prepare a context do; also after an `eval` that fails."""
    found = []
    for llama in both:
        tokens = llama.tokenize(TEXT.encode())
        llama.reset()
        llama.eval(tokens[:20])
        with pytest.raises(RuntimeError, match="llama_decode"):
            llama.eval([1] * 400)  # more than the context holds
        llama.n_tokens = 20
        llama.eval(tokens[20:-1])
        answer = llama.generate([tokens[-1]], temp=0.0, reset=False)
        found.append([next(answer) for _ in range(30)])
        answer.close()
        found[-1].append(choice(llama, "The sea is"))
    assert found[0] == found[1]


def test_a_stream_left_in_the_middle_ends_when_its_state_is_saved(both: Both) -> None:
    plain, drafting = both
    expected = choice(plain)
    stream = drafting.create_completion(TEXT, max_tokens=48, temperature=0.0, stream=True)
    for _ in range(9):
        next(stream)
    state = drafting.save_state()
    choice(drafting, "Something else entirely.")
    drafting.load_state(state)
    assert choice(drafting) == expected
