"""llama-server's own interface on a toy engine, which repeats the prompt: /completion, /infill, /props, /slots."""

import json
import threading
from collections.abc import Iterator
from time import monotonic
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from test_server_http import ask, chat, events, is_error
from toy_serving import ToyEngine, serving

from specplug.generation.fill_in import FillInTokens
from specplug.server.state import Settings

MARKS = FillInTokens(prefix=257, suffix=258, middle=259)
CONTROL = ("<pre>", "<suf>", "<mid>")


@pytest.fixture(scope="module")
def engine() -> ToyEngine:
    return ToyEngine(control=CONTROL, fill_in_tokens=MARKS)


@pytest.fixture(scope="module")
def url(engine: ToyEngine) -> Iterator[str]:
    with serving(engine) as server_url:
        yield server_url


def streamed(url: str, path: str, body: dict[str, Any]) -> list[Any]:
    status, text, headers = ask(url, path, {**body, "stream": True})
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    return [json.loads(part.removeprefix("data: ")) for part in text.strip().split("\n\n")]


# -- /completion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "content", "ending"),
    [
        ({}, "hello", ("eos", "")),
        ({"n_predict": 3}, "hel", ("limit", "")),
        ({"n_predict": -1}, "hello", ("eos", "")),
        ({"n_predict": 0}, "", ("limit", "")),
        ({"stop": ["lo", "x"]}, "hel", ("word", "lo")),
    ],
)
def test_an_answer_has_llama_servers_fields(url: str, fields: dict[str, Any], content: str, ending: Any) -> None:
    status, body, _ = ask(url, "/completion", {"prompt": "hello", **fields})
    assert status == 200 and (body["content"], body["stop"], body["index"]) == (content, True, 0)
    assert (body["stop_type"], body["stopping_word"]) == ending
    assert (body["prompt"], body["tokens_evaluated"], body["tokens_cached"]) == ("hello", 5, 0)
    assert body["generation_settings"]["n_predict"] == fields.get("n_predict", -1)
    assert body["tokens"] == [] and "choices" not in body
    assert body["timings"]["predicted_n"] == body["tokens_predicted"]


def test_a_prompt_alone_is_evaluated_and_no_token_emitted(url: str) -> None:
    body = ask(url, "/completion", {"prompt": "hello", "n_predict": 0})[1]
    assert (body["tokens_predicted"], body["timings"]["prompt_n"], body["timings"]["predicted_n"]) == (0, 5, 0)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "repeat_last_n": 64}),
        ({"temperature": 0, "top_p": 1, "repeat_last_n": 8}, {"temperature": 0.0, "top_p": 1.0, "repeat_last_n": 8}),
    ],
)
def test_defaults_are_llama_servers(url: str, fields: dict[str, Any], expected: dict[str, Any]) -> None:
    settings = ask(url, "/completion", {"prompt": "a", **fields})[1]["generation_settings"]
    assert settings | expected == settings
    assert ask(url, "/props")[1]["default_generation_settings"]["params"]["temperature"] == 0.8


@pytest.mark.parametrize(
    ("prompt", "contents"),
    [
        ("ab", ["ab"]),
        ([97, 98], ["ab"]),
        ([97, "bc", 100], ["abcd"]),
        (["ab", "c"], ["ab", "c"]),
        (["ab", [99, "d"]], ["ab", "cd"]),
        ([[97], [98]], ["a", "b"]),
    ],
)
def test_prompts_are_texts_ids_or_both(url: str, prompt: Any, contents: list[str]) -> None:
    body = ask(url, "/completion", {"prompt": prompt})[1]
    bodies = body if isinstance(body, list) else [body]
    assert [one["content"] for one in bodies] == contents and [one["index"] for one in bodies] == [*range(len(bodies))]
    assert isinstance(body, list) == (len(contents) > 1)


def test_a_stream_ends_with_the_figures_and_no_further_mark(url: str) -> None:
    *parts, last = streamed(url, "/completion", {"prompt": "hello"})
    assert [one["stop"] for one in parts] == [False] * len(parts) and last["stop"]
    assert "".join(one["content"] for one in parts) == "hello" and last["content"] == ""
    assert [token for one in parts for token in one["tokens"]] == list(b"hello")
    assert last["timings"]["predicted_n"] == 6 and not any("timings" in one for one in parts)


@pytest.fixture(scope="module")
def slow_url() -> Iterator[str]:
    """Steps so slow that each is sent as an event of its own."""
    with serving(ToyEngine(step_s=0.03)) as server_url:
        yield server_url


def test_timings_per_token_are_in_every_event(slow_url: str) -> None:
    *parts, last = streamed(slow_url, "/completion", {"prompt": "hello", "timings_per_token": True})
    counts = [one["timings"]["predicted_n"] for one in (*parts, last)]
    assert counts == sorted(counts) and counts[-1] == 6 and len(parts) > 1


def test_probabilities_and_tokens_on_demand(url: str) -> None:
    body = ask(url, "/completion", {"prompt": "hé", "n_probs": 1, "return_tokens": True})[1]
    assert body["tokens"] == [*"hé".encode(), 256]
    first, second, _ = body["completion_probabilities"]
    assert first == {"id": 104, "token": "h", "bytes": [104], "logprob": -0.5, "top_logprobs": first["top_logprobs"]}
    assert (second["id"], second["bytes"]) == (195, [195])
    per_event = streamed(url, "/completion", {"prompt": "hé", "n_probs": 1})
    found = [one["id"] for event in per_event for one in event.get("completion_probabilities", ())]
    assert found == [104, 195, 169]


def test_only_the_wanted_fields_are_sent(url: str) -> None:
    wanted = ["content", "generation_settings/top_k", "timings/cache_n", "nothing", "content/x"]
    body = ask(url, "/completion", {"prompt": "a", "response_fields": wanted})[1]
    assert body == {"content": "a", "top_k": 40, "cache_n": 0}


# -- fill-in-the-middle -----------------------------------------------------------------------------------------------


def prompt_of(engine: ToyEngine, url: str, path: str, body: dict[str, Any]) -> list[int]:
    """The tokens of the prompt that a request is answered with."""
    shown: list[int] = []
    begin = engine.loop.begin

    def remember(prompt: Any, *rest: Any) -> Any:
        shown.extend(prompt.tolist())
        return begin(prompt, *rest)

    engine.loop.begin = remember  # type: ignore[method-assign]
    try:
        assert ask(url, path, body)[0] == 200
    finally:
        engine.loop.begin = begin  # type: ignore[method-assign]
    return shown


INFILL = {"input_prefix": "ab", "input_suffix": "yz", "prompt": "c"}


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/infill", INFILL, [257, *b"abc", 258, *b"yz", 259]),
        ("/infill", {**INFILL, "input_prefix": "<pre>"}, [257, *b"<pre>c", 258, *b"yz", 259]),
        ("/infill", {**INFILL, "n_predict": -1}, [257, *b"abc", 258, *b"yz", 259]),
        ("/infill", {**INFILL, "n_predict": 10**6}, [257, *b"abc", 258, *b"yz", 259]),
        ("/v1/completions", {"prompt": "ab", "suffix": "yz"}, [257, *b"ab", 258, *b"yz", 259]),
        ("/v1/completions", {"prompt": [97], "suffix": ""}, [257, 97, 258, 259]),
    ],
)
def test_prompts_have_the_models_marks(
    engine: ToyEngine, url: str, path: str, body: dict[str, Any], expected: list[int]
) -> None:
    assert prompt_of(engine, url, path, body) == expected


def test_infill_answers_as_completion_does(url: str) -> None:
    body = ask(url, "/infill", {**INFILL, "n_predict": 2, "input_extra": [{"filename": "x.py", "text": "pass"}]})[1]
    assert (body["stop_type"], body["tokens_predicted"], body["stop"]) == ("limit", 2, True)
    assert "pass" in body["prompt"] and body["prompt"].endswith("abcyz")
    *parts, last = streamed(url, "/infill", {**INFILL, "n_predict": 4})
    assert "".join(one["content"] for one in parts) and last["stop"]


def test_the_suffix_may_come_first() -> None:
    engine = ToyEngine(control=CONTROL, fill_in_tokens=MARKS)
    with serving(engine, Settings("toy", suffix_first=True)) as url:
        for path, body in (("/infill", INFILL), ("/v1/completions", {"prompt": "abc", "suffix": "yz"})):
            assert prompt_of(engine, url, path, body) == [258, *b"yz", 257, *b"abc", 259]


@pytest.mark.parametrize(("path", "body"), [("/infill", INFILL), ("/v1/completions", {"prompt": "a", "suffix": "b"})])
def test_a_model_without_the_marks_is_named(path: str, body: dict[str, Any]) -> None:
    with serving(ToyEngine()) as url:
        status, answer, _ = ask(url, path, body)
        assert status == 400 and is_error(answer)
        assert answer["error"]["message"].startswith("the model toy has no tokens for fill-in-the-middle")


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/completion", {}, "prompt"),
        ("/completion", {"prompt": []}, "no prompt"),
        ("/completion", {"prompt": ["a"] * 17}, "prompts times n"),
        ("/completion", {"prompt": [999]}, "there is no token 999"),
        ("/completion", {"prompt": ""}, "the prompt is empty"),
        ("/completion", {"prompt": "a", "n_predict": -2}, "max_tokens"),
        ("/completion", {"prompt": "a", "n_probs": 101}, "n_probs"),
        ("/infill", {"input_suffix": "a"}, "input_prefix"),
        ("/infill", {"input_prefix": "a"}, "input_suffix"),
        ("/infill", {**INFILL, "input_extra": [{"filename": "x"}]}, "input_extra.0.text"),
        ("/v1/completions", {"prompt": "a", "suffix": "b", "echo": True}, "suffix and echo exclude each other"),
    ],
)
def test_bad_input_is_one_line(url: str, path: str, body: dict[str, Any], named: str) -> None:
    status, answer, _ = ask(url, path, body)
    assert status == 400 and is_error(answer) and named in answer["error"]["message"]


# -- the server's properties ------------------------------------------------------------------------------------------


def test_props_describe_the_server_without_paths() -> None:
    with serving(ToyEngine(slots=3, max_context=512, chat_template="{{ messages }}"), Settings("org/toy")) as url:
        body = ask(url, "/props")[1]
    assert (body["total_slots"], body["n_ctx"], body["model_alias"]) == (3, 512, "org/toy")
    assert (body["model_path"], body["chat_template"], body["eos_token"]) == ("toy.gguf", "{{ messages }}", "<end>")
    assert body["default_generation_settings"]["n_ctx"] == 512


def test_slots_show_what_is_running() -> None:
    engine = ToyEngine(slots=2, max_context=4096, step_s=0.02)
    with serving(engine) as url:
        idle = {"n_ctx": 4096, "speculative": True, "is_processing": False, "n_past": 0}
        assert ask(url, "/slots")[1] == [{"id": 0, **idle}, {"id": 1, **idle}]
        body = {"prompt": "a" * 200, "specplug": {"mode": "off"}}
        running = threading.Thread(target=ask, args=(url, "/completion", body))
        running.start()
        give_up = monotonic() + 10
        while not (first := ask(url, "/slots")[1][0]).get("next_token", {}).get("n_decoded"):
            assert monotonic() < give_up
        assert first["is_processing"] and not first["speculative"]
        assert first["n_past"] == 200 + first["next_token"]["n_decoded"]
        second = threading.Thread(target=ask, args=(url, "/completion", body))
        second.start()
        while (status := ask(url, "/slots?fail_on_no_slot=1")[0]) == 200:
            assert monotonic() < give_up
        assert status == 503
        running.join()
        second.join()
        assert ask(url, "/slots?fail_on_no_slot=1")[0] == 200


def test_models_tell_the_files_time_and_sizes(url: str) -> None:
    (model,) = ask(url, "/v1/models")[1]["data"]
    assert (model["id"], model["created"]) == ("toy", 1_700_000_000)
    assert model["meta"] == {
        "vocab_type": 2, "n_vocab": 257, "n_ctx_train": 8192, "n_embd": 64, "n_params": 1000, "size": 4000,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "same"),
    [("/models", "/v1/models"), ("/v1/health", "/health")],
)
def test_paths_without_or_with_v1_are_the_same(url: str, path: str, same: str) -> None:
    assert ask(url, path)[:2] == ask(url, same)[:2]


@pytest.mark.parametrize(
    ("path", "body", "shape"),
    [("/chat/completions", chat("hi"), "chat.completion"), ("/completions", {"prompt": "hi"}, "text_completion")],
)
def test_openais_paths_work_without_v1(url: str, path: str, body: dict[str, Any], shape: str) -> None:
    assert ask(url, path, body)[1]["object"] == shape
    assert events(url, body, path)[-1]["object"].startswith(shape)


def test_the_version_and_open_paths() -> None:
    from specplug import __version__

    with serving(ToyEngine(), key="k") as url:
        assert ask(url, "/v1/health")[0] == 200
        assert ask(url, "/version")[0] == ask(url, "/props")[0] == ask(url, "/slots")[0] == 401
        assert ask(url, "/version", headers={"authorization": "Bearer k"})[1] == {"version": __version__}


# -- timings ----------------------------------------------------------------------------------------------------------


TIMINGS = {
    "cache_n", "prompt_n", "prompt_ms", "prompt_per_token_ms", "prompt_per_second",
    "predicted_n", "predicted_ms", "predicted_per_token_ms", "predicted_per_second",
}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", chat("hey")), ("/v1/completions", {"prompt": "hey"})]
)
def test_timings_are_in_the_body_and_the_last_chunk(url: str, slow_url: str, path: str, body: dict[str, Any]) -> None:
    found = ask(url, path, body)[1]["timings"]
    assert TIMINGS <= set(found) <= TIMINGS | {"draft_n", "draft_n_accepted"}
    assert (found["cache_n"], found["prompt_n"], found["predicted_n"]) == (0, 3, 4)
    *others, last = events(url, body, path)
    assert last["timings"]["predicted_n"] == 4 and not any("timings" in chunk for chunk in others)
    *others, finish, usage = events(url, {**body, "stream_options": {"include_usage": True}}, path)
    assert usage["timings"] == finish["timings"]
    each = events(slow_url, {**body, "timings_per_token": True}, path)
    assert sum("timings" in chunk for chunk in each) > 1


def test_timings_are_sums_and_rates() -> None:
    from specplug.generation.counters import Counters
    from specplug.server.jobs import Report
    from specplug.server.timings import timings

    def report(cached: int, tokens: int, prompt_ms: float, decode_ms: float, drafted: int, accepted: int) -> Report:
        counters = Counters(draft_tokens=drafted, accepted_tokens=accepted)
        return Report(10, cached, counters, tokens, 0.0, prompt_ms, decode_ms, 0.0, 0.0)

    assert timings([report(2, 20, 4.0, 100.0, 0, 0)]) == {
        "cache_n": 2, "prompt_n": 8, "prompt_ms": 4.0, "prompt_per_token_ms": 0.5, "prompt_per_second": 2000.0,
        "predicted_n": 20, "predicted_ms": 100.0, "predicted_per_token_ms": 5.0, "predicted_per_second": 200.0,
    }  # fmt: skip
    both = timings([report(2, 20, 4.0, 100.0, 8, 5), report(9, 10, 1.0, 50.0, 2, 1)], answers_per_prompt=2)
    assert (both["prompt_n"], both["cache_n"], both["predicted_n"], both["predicted_ms"]) == (8, 2, 30, 100.0)
    assert (both["draft_n"], both["draft_n_accepted"]) == (10, 6)
    nothing = timings([report(0, 0, 0.0, 0.0, 0, 0)])
    assert (nothing["predicted_per_second"], nothing["prompt_per_second"]) == (0.0, 0.0)


# -- echo with log probabilities --------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 1])
@pytest.mark.parametrize("prompt", ["héy", [*"héy".encode()]])
def test_echo_scores_the_prompt_as_harnesses_ask_for_it(url: str, prompt: Any, limit: int) -> None:
    """The toy engine scores token t of a prompt with -t."""
    body = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": limit, "temperature": 0}
    (choice,) = ask(url, "/v1/completions", body)[1]["choices"]
    found = choice["logprobs"]
    own = ["h"] * limit
    assert (choice["text"], choice["finish_reason"]) == ("héy" + "".join(own), "length")
    assert found["tokens"] == ["h", "\ufffd", "\ufffd", "y", *own]
    assert found["token_logprobs"] == [None, -195, -169, -121, *[-0.5] * limit]
    assert found["top_logprobs"] == [None, {"\ufffd": -195}, {"\ufffd": -169}, {"y": -121}, *[{"h": -0.5}] * limit]
    assert found["text_offset"] == [0, 1, 1, 2, *[3] * limit]
    chunks = events(url, body, "/v1/completions")
    for key in found:
        joined = [one for chunk in chunks for one in (chunk["choices"][0]["logprobs"] or {}).get(key, ())]
        assert joined == found[key]


def test_an_end_token_after_an_echoed_prompt_has_an_entry(url: str) -> None:
    """Harnesses leave out the last entry, which is that of the generated token."""
    body = {"prompt": "ab", "echo": True, "logprobs": 0, "max_tokens": 5}
    (choice,) = ask(url, "/v1/completions", body)[1]["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("abab", "stop")
    assert len(choice["logprobs"]["token_logprobs"]) == 2 + 3


@pytest.mark.parametrize("prompt", ["a", "abc"])
def test_echo_alone_has_no_log_probabilities(url: str, prompt: str) -> None:
    (choice,) = ask(url, "/v1/completions", {"prompt": prompt, "echo": True})[1]["choices"]
    assert (choice["text"], choice["logprobs"]) == (prompt * 2, None)


def test_several_prompts_are_scored_in_order(url: str) -> None:
    body = {"prompt": ["ab", "c"], "echo": True, "logprobs": 1, "max_tokens": 0, "n": 1}
    choices = ask(url, "/v1/completions", body)[1]["choices"]
    assert [one["logprobs"]["token_logprobs"] for one in choices] == [[None, -98], [None]]
