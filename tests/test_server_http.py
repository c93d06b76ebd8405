"""The HTTP interface on a toy engine: keys, hosts, limits, response formats and malformed requests."""

import base64
import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from time import monotonic, process_time, sleep
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("llguidance")

from fastapi import FastAPI
from toy_serving import ToyEngine, serving

from specplug.errors import SpecplugError, UsageError
from specplug.server.middleware import Limits
from specplug.server.process import Address, _listen, connections, guarded
from specplug.server.state import Settings

PATHS = [
    "/",
    "/scripts/main.js",
    "/vendor/marked.js",
    "/v1/models",
    "/metrics",
    "/specplug/stats",
    "/openapi.json",
    "/nowhere",
]
CHAT = "/v1/chat/completions"


def chat(text: str = "hello", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **fields}


def ask(
    url: str, path: str = CHAT, body: Any = None, headers: dict[str, str] | None = None, method: str | None = None
) -> tuple[int, Any, http.client.HTTPMessage]:
    """Send a POST with a body, else a GET, or `method`; returns status, body (parsed if it is JSON) and headers."""
    with closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)) as connection:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        default_headers = {"content-type": "application/json"} if body is not None else {}
        connection.request(method or ("GET" if body is None else "POST"), path, data, default_headers | (headers or {}))
        response = connection.getresponse()
        raw = response.read()
        media_type = response.headers.get("content-type", "")
        parsed = json.loads(raw) if raw and media_type == "application/json" else raw.decode()
        return response.status, parsed, response.headers


def events(url: str, body: dict[str, Any], path: str = CHAT) -> list[Any]:
    status, text, _ = ask(url, path, {**body, "stream": True})
    assert status == 200
    lines = [part.removeprefix("data: ") for part in text.strip().split("\n\n")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def is_error(body: Any) -> bool:
    return set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(ToyEngine(), limits=Limits(body_bytes=100_000, body_seconds=0.5)) as server_url:
        yield server_url


@pytest.fixture(scope="module")
def keyed() -> Iterator[str]:
    with serving(ToyEngine(), key="s3cret") as server_url:
        yield server_url


# -- which clients are accepted ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_every_path_requires_the_key(keyed: str, path: str) -> None:
    for sent in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic !"}, {"authorization": "s3cret"}):
        status, body, headers = ask(keyed, path, headers=sent)
        assert (status, is_error(body), headers["www-authenticate"][:5]) == (401, True, "Basic")
    basic = base64.b64encode(b"anyone:s3cret").decode()
    for sent in ({"authorization": "Bearer s3cret"}, {"authorization": f"Basic {basic}"}):
        assert ask(keyed, path, headers=sent)[0] == (404 if path == "/nowhere" else 200)


def test_posts_require_the_key_and_health_does_not(keyed: str) -> None:
    assert ask(keyed, body=chat())[0] == 401
    assert ask(keyed, "/tokenize", {"content": "a"})[0] == 401
    assert ask(keyed, "/health")[:2] == (200, {"status": "ok"})


def test_other_host_names_and_content_types_are_refused(url: str) -> None:
    """A page of another site can send these without a CORS preflight: a rebound host name, a form, plain text."""
    assert ask(url, "/v1/models", headers={"host": "evil.example:8000"})[0] == 421
    for media_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        assert ask(url, body=chat(), headers={"content-type": media_type})[0] == 415
    _, _, headers = ask(url, body=chat(), headers={"origin": "https://evil.example"})
    assert not [name for name in headers if name.lower().startswith("access-control")]


SITE = "https://chat.example"


@pytest.mark.parametrize("key", [None, "k"])
def test_pages_of_a_permitted_site_can_send_requests(key: str | None) -> None:
    wanted = {"access-control-request-method": "POST", "access-control-request-headers": "content-type,authorization"}
    with serving(ToyEngine(), key=key, origins=(SITE,)) as url:
        status, _, headers = ask(url, headers={"origin": SITE, **wanted}, method="OPTIONS")
        assert (status, headers["access-control-allow-origin"]) == (200, SITE)
        assert "POST" in headers["access-control-allow-methods"]
        other = ask(url, headers={"origin": "https://evil.example", **wanted}, method="OPTIONS")
        assert other[0] == 400 and "access-control-allow-origin" not in other[2]
        status, _, headers = ask(url, body=chat(), headers={"authorization": f"Bearer {key}", "origin": SITE})
        assert (status, headers["access-control-allow-origin"]) == (200, SITE)


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/metrics"])
def test_head_is_get_without_a_body(url: str, path: str) -> None:
    status, body, headers = ask(url, path, method="HEAD")
    assert (status, body) == (200, "") and int(headers["content-length"]) > 0
    status, _, headers = ask(url, path, method="OPTIONS")
    assert (status, headers["allow"]) == (204, "GET, HEAD, OPTIONS")


def test_a_path_or_a_method_that_does_not_exist_says_what_does(url: str) -> None:
    status, body, _ = ask(url, "/v1/chat")
    assert status == 404 and "/v1/chat/completions" in body["error"]["message"]
    status, body, _ = ask(url, "/v1/completions", method="DELETE")
    assert status == 405 and body["error"]["message"] == "/v1/completions does not take DELETE; use POST"


@pytest.mark.parametrize("name", ["org/model", "org%2Fmodel", "toy"])
def test_the_name_of_a_model_may_have_a_slash(name: str) -> None:
    with serving(ToyEngine(), Settings(unquote(name))) as url:
        status, body, _ = ask(url, f"/v1/models/{name}")
        assert (status, body["id"]) == (200, unquote(name))


def test_localhost_listens_on_all_its_addresses() -> None:
    families = {family for family, *_ in socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)}
    listening = _listen(Address("localhost", 0))
    try:
        assert {one.family for one in listening} <= families and listening[0].getsockname()[0] == "127.0.0.1"
        assert len({one.getsockname()[1] for one in listening}) == 1, "one port"
    finally:
        for one in listening:
            one.close()


def test_idle_connections_stay_open_for_longer_than_a_minute() -> None:
    assert connections(guarded(FastAPI(), Address(), Limits())).timeout_keep_alive > 60


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "some.host"])
def test_an_address_open_to_the_network_needs_a_key(host: str) -> None:
    with pytest.raises(UsageError, match="--api-key, or --insecure"):
        Address(host).check()
    Address(host, key="k").check()
    Address(host, insecure=True).check()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.0.0.53"])
def test_a_local_address_needs_no_key(host: str) -> None:
    Address(host).check()


@pytest.mark.parametrize("key", ["", "  ", "schlüssel"])
def test_unusable_keys_are_refused(key: str) -> None:
    with pytest.raises(UsageError, match="the API key"):
        Address(key=key).check()


# -- valid requests ---------------------------------------------------------------------------------------------------


def test_a_complete_answer_and_a_streamed_one(url: str) -> None:
    status, body, _ = ask(url, body=chat("say me", specplug={"mode": "auto"}))
    assert status == 200 and body["choices"][0]["message"] == {
        "role": "assistant",
        "content": "say me",
        "refusal": None,
    }
    assert body["usage"]["prompt_tokens"] == 6 and body["usage"]["completion_tokens"] == 7
    chunks = events(url, chat("say me", stream_options={"include_usage": True}))
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"]) == "say me"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks if chunk["choices"]][-1] == "stop"
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["total_tokens"] == 13


def test_chunks_say_which_text_was_drafted_with_details(url: str) -> None:
    chunks = events(url, chat("abcde", specplug={"details": True}))
    segments = [tuple(s) for chunk in chunks if chunk["choices"] for s in chunk.get("specplug", {}).get("segments", [])]
    assert segments == [("a", None), ("b", "suffix"), ("c", None), ("d", "suffix"), ("e", None)]
    off = events(url, chat("abc", specplug={"details": True, "mode": "off"}))
    assert not any(s[1] for chunk in off if chunk["choices"] for s in chunk.get("specplug", {}).get("segments", []))


def test_details_have_all_text_also_where_a_reader_holds_it_back() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    with serving(ToyEngine(step_s=0.12)) as server:  # so slow that each step is sent on its own
        chunks = events(server, chat("x<tool_ca", tools=[tool], specplug={"details": True}))
    segments = [
        segment for chunk in chunks if chunk["choices"] for segment in chunk.get("specplug", {}).get("segments", [])
    ]
    assert "".join(text for text, _ in segments) == "x<tool_ca"


def test_n_answers_to_several_prompts(url: str) -> None:
    _, body, _ = ask(url, body=chat("abc", n=3))
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert body["usage"]["prompt_tokens"] == 3 and body["usage"]["completion_tokens"] == 12
    _, several, _ = ask(url, "/v1/completions", {"prompt": ["one", "two!"], "n": 2, "echo": True})
    assert [choice["text"] for choice in several["choices"]] == ["oneone"] * 2 + ["two!two!"] * 2
    assert several["usage"]["prompt_tokens"] == 7
    for ids in ([97, 98], [[97, 98]]):
        assert ask(url, "/v1/completions", {"prompt": ids})[1]["choices"][0]["text"] == "ab"


def test_max_tokens_and_stop(url: str) -> None:
    _, short, _ = ask(url, body=chat("abcdef", max_completion_tokens=3))
    assert short["choices"][0]["message"]["content"] == "abc" and short["choices"][0]["finish_reason"] == "length"
    _, stopped, _ = ask(url, body=chat("abcdef", stop="d"))
    assert stopped["choices"][0]["message"]["content"] == "abc" and stopped["choices"][0]["finish_reason"] == "stop"


def test_tokenize_and_detokenize(url: str) -> None:
    assert ask(url, "/tokenize", {"content": "hé"})[1] == {"tokens": [104, 195, 169], "count": 3}
    assert ask(url, "/detokenize", {"tokens": [104, 195, 169]})[1] == {"content": "hé"}
    assert ask(url, "/detokenize", {"tokens": [257]})[0] == 400


def test_metrics_count_requests_and_tokens() -> None:
    with serving(ToyEngine()) as server:
        for _ in range(3):
            ask(server, body=chat("abc"))
        ask(server, body={"nothing": 1})
        _, text, _ = ask(server, "/metrics")
        assert 'specplug_requests_total{path="/v1/chat/completions",status="200"} 3.0' in text
        assert 'specplug_requests_total{path="/v1/chat/completions",status="400"} 1.0' in text
        assert "specplug_generated_tokens_total 12.0" in text
        stats = ask(server, "/specplug/stats")[1]
        assert stats["slots"] == [{"state": "idle"}] * 2 and stats["waiting"] == 0


# -- invalid requests -------------------------------------------------------------------------------------------------

WRONG = [
    ({}, "messages"),
    (chat(n=17), "n:"),
    (chat(n=0), "n:"),
    (chat(temperature=-1), "temperature"),
    (chat(max_tokens=0), "max_tokens"),
    (chat(top_logprobs=3), "top_logprobs needs logprobs"),
    (chat(logprobs=True, top_logprobs=21), "top_logprobs"),
    (chat(logit_bias={"x": 1}), "is not a token id"),
    (chat(logit_bias={str(n): 1 for n in range(301)}), "logit_bias"),
    (chat(stop=[""]), "stop"),
    (chat(stop=["x"] * 17), "stop"),
    (chat(grammar="a" * 70_000), "the grammar has more than 64 KiB"),
    (chat(grammar="(" * 101), "nested deeper"),
    (chat(grammar="wrong"), "the grammar does not parse"),
    (chat(tool_choice="required"), "tool_choice needs tools"),
    (chat(tool_choice={"type": "function", "function": {"name": "x"}}, tools=[]), "not in tools"),
    (chat(response_format={"type": "json_schema"}), "needs json_schema"),
    (chat(messages=[]), "messages"),
    (
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        "messages.0.content: image_url is not supported; this server takes text only",
    ),
    (chat(messages=[{"role": "user", "content": [{"text": 1}]}]), "messages.0.content"),
    (chat(modalities=["audio"]), "modalities"),
    (chat("x" * 4096), "the prompt has 4096 tokens"),
    (chat(""), "the prompt is empty"),
    (chat("\ud800"), ""),
    (chat(specplug={"mode": "fast"}), "specplug.mode"),
]


@pytest.mark.parametrize(("body", "expected"), WRONG, ids=[str(n) for n in range(len(WRONG))])
def test_wrong_requests_are_refused_with_a_reason(url: str, body: Any, expected: str) -> None:
    status, answer, _ = ask(url, body=body)
    assert status == 400 and is_error(answer) and expected in answer["error"]["message"]


# -- fields of other servers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"unknown": 1}, "unknown"),
        ({"mirostat": 2, "dry_multiplier": 0.8}, "dry_multiplier, mirostat"),
        ({"cache_prompt": False, "id_slot": 1, "samplers": ["top_k"], "keep_alive": "5m"}, "cache_prompt, id_slot"),
        ({"specplug": {"mode": "off", "unknown": 1}}, "specplug.unknown"),
        ({"stream_options": {"more": 1}}, "stream_options.more"),
        ({"\r\nx: y": 1}, "ignored: x: y"),
    ],
)
def test_fields_without_a_meaning_are_ignored_and_named(url: str, fields: dict[str, Any], named: str) -> None:
    before = ignored_fields(url)
    status, body, headers = ask(url, body=chat("abc", **fields))
    assert status == 200 and body["choices"][0]["message"]["content"] == "abc"
    assert named in headers["specplug-warnings"] and body["specplug"]["warnings"][0].startswith("ignored: ")
    assert ignored_fields(url) > before


def test_an_answer_names_the_stop_string_that_ended_it(url: str) -> None:
    for text, stop in (("abcdef", "de"), ("abc", None)):
        asked = chat(text, stop=["x", "de"])
        (last,) = [chunk["choices"][0] for chunk in events(url, asked) if chunk["choices"][0]["finish_reason"]]
        assert ask(url, body=asked)[1]["choices"][0]["stop_reason"] == last["stop_reason"] == stop
        texts = ask(url, "/v1/completions", {"prompt": text, "stop": "de"})[1]["choices"]
        assert [one["stop_reason"] for one in texts] == [stop]


@pytest.mark.parametrize("field", ["choice", "guided_choice"])
@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["a" * 70_000], "choice (guided_choice) has more than 64 KiB"),
        (["\ud800"], "choice (guided_choice) is not Unicode text"),
        (["", ""], "choice (guided_choice) allows no text"),
    ],
)
def test_choices_that_cannot_be_enforced_are_refused_by_the_field(
    url: str, field: str, texts: list[str], expected: str
) -> None:
    for path, body in (("/v1/chat/completions", chat("abc")), ("/v1/completions", {"prompt": "abc"})):
        status, answer, _ = ask(url, path, body | {field: texts})
        assert (status, answer["error"]["message"]) == (400, expected)


def ignored_fields(url: str) -> float:
    text = ask(url, "/metrics")[1]
    return next(
        float(line.split()[1]) for line in text.splitlines() if line.startswith("specplug_ignored_fields_total")
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"cache_prompt": True, "skip_special_tokens": True, "mirostat": 0, "dry_multiplier": 0.0}, {}),
        ({name: None for name in ("n", "stop", "temperature", "logit_bias", "tools", "specplug", "seed", "x")}, {}),
        (
            {"repetition_penalty": 1.1, "repeat_last_n": 7, "typical_p": 0.9},
            {"repeat_penalty": 1.1, "penalty_last_n": 3, "typical_p": 0.9},
        ),
        ({"top_k": -1, "seed": -1, "repeat_last_n": -1}, {"top_k": 0, "seed": None}),
        ({"temperature": 3, "top_k": 100_000}, {"temperature": 3.0, "top_k": 100_000}),
        ({"min_tokens": 3, "stop_token_ids": [3]}, {"min_tokens": 3, "stop_tokens": frozenset({3})}),
        ({"ignore_eos": True}, {"min_tokens": 2**31 - 1}),
        ({"logit_bias": [[5, 1.5], [6, False]]}, {"logit_bias": {5: 1.5, 6: -100.0}}),
        ({"guided_choice": ["a+b", "b"]}, {"regex": r"a\+b|b"}),
        ({"structured_outputs": {"regex": "[a-c]+"}}, {"regex": "[a-c]+"}),
        ({"guided_json": {"type": "object"}}, {"json_schema": '{"type": "object"}'}),
        ({"guided_grammar": 'root ::= "a"'}, {"grammar": 'root ::= "a"'}),
        ({"guided_grammar": 'start: "::=" /a/'}, {"lark": 'start: "::=" /a/'}),
        ({"reasoning_effort": "low", "metadata": {"a": "b"}, "response_format": {"type": "text"}}, {}),
    ],
)
def test_fields_of_other_servers_that_have_a_meaning_here(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    engine = ToyEngine()
    with serving(engine) as url:
        status, body, headers = ask(url, body=chat("abc", max_tokens=3, **fields))
        assert status == 200 and "specplug-warnings" not in headers, body
        ask(url, body=chat("abc", max_tokens=3))
    got, plain = engine.samplings
    assert got == replace(plain, **expected)


@pytest.mark.parametrize(
    ("limits", "tokens"),
    [
        ({"max_tokens": 2}, 2),
        ({"n_predict": 2}, 2),
        ({"max_tokens": -1}, 6),
        ({"max_tokens": -1, "max_completion_tokens": 3}, 3),
        ({"max_completion_tokens": -1}, 6),
    ],
)
def test_limits_of_tokens(url: str, limits: dict[str, int], tokens: int) -> None:
    assert ask(url, body=chat("abcde", **limits))[1]["usage"]["completion_tokens"] == tokens


@pytest.mark.parametrize("path", ["/health", "/v1/models"])
def test_a_route_names_its_own_methods(url: str, path: str) -> None:
    status, body, _ = ask(url, path, {})
    assert status == 405 and body["error"]["message"] == f"{path} does not take POST; use GET"


def test_the_text_of_a_stop_token_is_no_part_of_the_answer(url: str) -> None:
    _, body, _ = ask(url, body=chat("abcd", stop_token_ids=[ord("c")]))
    choice = body["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("ab", "stop")


def test_what_a_constraint_leaves_without_effect_is_named(url: str) -> None:
    body = chat("abc", regex="[a-c]*", ignore_eos=True)
    assert "min_tokens and ignore_eos have no effect" in ask(url, body=body)[2]["specplug-warnings"]
    body = chat("abc", structured_outputs={"structural_tag": "x"}, continue_final_message=False)
    assert ask(url, body=body)[2]["specplug-warnings"] == "ignored: continue_final_message, structured_outputs"


def test_a_grammar_of_blank_lines_takes_no_time(url: str) -> None:
    began = process_time()
    ask(url, body=chat("abc", grammar="\n" * 60_000))
    assert process_time() - began < 5


def test_names_that_the_server_gives_its_templates_are_refused(url: str) -> None:
    status, body, _ = ask(url, body=chat(chat_template_kwargs={"messages": []}))
    assert status == 400 and "messages is set by the server" in body["error"]["message"]


def test_a_limit_of_minus_one_is_none() -> None:
    with serving(ToyEngine()) as url:
        body = {"prompt": "x" * 40, "max_tokens": -1}
        assert ask(url, "/v1/completions", body)[1]["choices"][0]["text"] == "x" * 40
        assert ask(url, "/v1/completions", {"prompt": "x" * 40})[1]["usage"]["completion_tokens"] == 16


def test_a_strict_server_refuses_unknown_fields() -> None:
    with serving(ToyEngine(), Settings("toy", strict=True)) as url:
        status, body, _ = ask(url, body=chat(unknown=1))
        assert status == 400 and body["error"]["message"] == "Unrecognized request argument supplied: unknown"
        assert ask(url, body=chat(specplug={"x": 1}))[0] == 400
        assert ask(url, body=chat(temperature=None, cache_prompt=True))[0] == 200


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"regex": "a", "lark": "start: /a/"}, "regex and lark exclude each other"),
        ({"guided_json": {}, "grammar": 'root ::= "a"'}, "grammar and json_schema exclude each other"),
        ({"regex": "a", "response_format": {"type": "json_object"}}, "exclude each other"),
    ],
)
def test_constraints_exclude_each_other_under_any_name(url: str, fields: dict[str, Any], message: str) -> None:
    status, body, _ = ask(url, body=chat(**fields))
    assert status == 400 and message in body["error"]["message"]


def test_parts_of_earlier_messages_that_are_no_text_are_left_out(url: str) -> None:
    parts = [
        {"type": "thinking", "thinking": "x"},
        {"type": "output_text", "text": "ab"},
        {"type": "text", "text": "c"},
    ]
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": parts, "reasoning": "y"}]
    status, body, _ = ask(url, body={"messages": messages})
    assert status == 200 and body["choices"][0]["message"]["content"] == "abc"


def test_null_is_unset_within_messages(url: str) -> None:
    call = {"id": None, "type": None, "function": {"name": "f", "arguments": None}}
    answered = {"role": "assistant", "content": [{"type": None, "text": "x"}], "tool_calls": [call]}
    messages = [{"role": "user", "content": "hi"}, answered, {"role": "tool", "content": "abc", "tool_call_id": None}]
    assert ask(url, body={"messages": messages})[0] == 200


# -- reasoning --------------------------------------------------------------------------------------------------------

THINKS = "{{ messages }}<think></think>"


def test_reasoning_is_apart_from_the_answer_streamed_and_not() -> None:
    with serving(ToyEngine(chat_template=THINKS)) as url:
        asked = chat("<think>\nIt is two.\n</think>\n\nTwo.", max_tokens=-1)
        message = ask(url, body=asked)[1]["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("It is two.", "Two.")
        deltas = [chunk["choices"][0]["delta"] for chunk in events(url, asked)]
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "It is two."
        assert "".join(delta.get("content", "") for delta in deltas) == "Two."
        shaped = asked | {"regex": "(?s).*"}  # the text is constrained, so that all of it is the answer
        assert ask(url, body=shaped)[1]["choices"][0]["message"]["content"].startswith("<think>")
        as_text = ask(url, body=asked | {"reasoning_format": "none"})[1]["choices"][0]["message"]["content"]
        assert as_text.startswith("<think>")
    with serving(ToyEngine()) as url:
        assert ask(url, body=asked)[1]["choices"][0]["message"]["content"].startswith("<think>")


@pytest.mark.parametrize(
    ("fields", "variables"),
    [
        ({}, {}),
        ({"reasoning_effort": "low"}, {"reasoning_effort": "low"}),
        ({"reasoning_effort": "none"}, {"reasoning_effort": "none", "enable_thinking": False}),
        ({"chat_template_kwargs": {"enable_thinking": False, "x": 1}}, {"enable_thinking": False, "x": 1}),
        ({"response_format": {"type": "json_object"}}, {"enable_thinking": False}),
        (
            {"regex": "a*", "chat_template_kwargs": {"enable_thinking": True}},
            {"enable_thinking": True},
        ),
    ],
)
def test_the_template_is_told_whether_to_reason(fields: dict[str, Any], variables: dict[str, Any]) -> None:
    engine = ToyEngine(chat_template=THINKS)
    with serving(engine) as url:
        assert ask(url, body=chat("abc", **fields))[0] == 200
    assert engine.variables == variables


def schema(inner: Any) -> dict[str, Any]:
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": inner}})


def link(n: int) -> dict[str, Any]:
    return {"items": {"$ref": f"#/$defs/d{n}"}}


def nested(depth: int) -> dict[str, Any]:
    return {"type": "array", "items": nested(depth - 1)} if depth else {"type": "string"}


@pytest.mark.parametrize(
    ("inner", "expected"),
    [
        (nested(110), "nested deeper than 100"),
        ({"properties": {"a": {"$ref": "https://example.com/a.json"}}}, "$ref at #/properties/a: another document"),
        ({"$ref": "file:///etc/passwd"}, "another document"),
        ({"properties": {"a": {"type": "text"}}}, "type at #/properties/a: Invalid type"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "no value can end at #"),
        (False, "allows no value"),
        ({"const": "\ud83d"}, "JSON schema"),
        ({"const": -(2**63)}, "const at #: -9223372036854775808 has too many digits"),
        ({"$ref": "#/$defs/d0", "$defs": {f"d{n}": link(n + 1) for n in range(1200)}}, "the schema has no #/$defs/d"),
        ({"$ref": "#/$defs/d0", "$defs": {f"d{n}": link((n + 1) % 1200) for n in range(1200)}}, "in one chain"),
        ({"enum": []}, "enum at #"),
    ],
)
def test_a_schema_that_cannot_be_kept_is_refused_with_its_place(url: str, inner: Any, expected: str) -> None:
    began = process_time()
    status, answer, _ = ask(url, body=schema(inner))
    assert status == 400 and expected in answer["error"]["message"] and "\n" not in answer["error"]["message"]
    assert process_time() - began < 1
    assert ask(url, body=schema({"type": "object"}))[0] == 200


def test_a_schema_of_a_megabyte_is_refused() -> None:
    large = {"type": "object", "properties": {f"property {n}": {"type": "string"} for n in range(26_000)}}
    with serving(ToyEngine()) as server_url:
        status, answer, _ = ask(server_url, body=schema(large))
        assert status == 400 and "more than 256 KiB" in answer["error"]["message"]
        assert ask(server_url, body=schema({"type": "object"}))[0] == 200


LAX = {"type": "object", "properties": {"tags": {"type": "array", "uniqueItems": True}}}


def test_what_is_not_enforced_is_in_the_answer_and_in_a_header(url: str) -> None:
    _, answer, headers = ask(url, body=schema(LAX))
    assert answer["specplug"]["warnings"] == ["uniqueItems at #/properties/tags is not enforced"]
    assert headers["specplug-warnings"] == "uniqueItems at #/properties/tags is not enforced"
    _, _, headers = ask(url, body=schema(LAX) | {"stream": True})
    assert "uniqueItems" in headers["specplug-warnings"]
    _, answer, headers = ask(url, body=schema({"type": "object"}))
    assert answer["specplug"]["warnings"] == [] and "specplug-warnings" not in headers


def test_a_header_of_warnings_has_no_line_breaks_and_no_other_characters_than_ascii(url: str) -> None:
    named = {"type": "object", "properties": {"é\n😀": {"uniqueItems": True}}}
    _, answer, headers = ask(url, body=schema(named))
    assert answer["specplug"]["warnings"] == [r"uniqueItems at #/properties/é\n😀 is not enforced"]
    assert headers["specplug-warnings"] == r"uniqueItems at #/properties/\xe9\n\U0001f600 is not enforced"


def test_a_strict_schema_is_refused_where_it_cannot_be_enforced(url: str) -> None:
    body = schema(LAX)
    body["response_format"]["json_schema"]["strict"] = True
    status, answer, _ = ask(url, body=body)
    assert status == 400 and "uniqueItems at #/properties/tags" in answer["error"]["message"]


def test_a_prompt_longer_than_the_context_has_its_own_error_code(url: str) -> None:
    error = ask(url, body=chat("x" * 5000))[1]["error"]
    assert error["code"] == "context_length_exceeded"
    assert "the server was started with a context of 4096" in error["message"]
    assert "start the server with a larger --context" in error["message"]


@pytest.mark.parametrize("data", [b"", b"{", b"[" * 50_000, b"\xff\xfe", b'{"a": NaN}', b"null", b"1", b'"text"'])
def test_bodies_that_are_not_requests_are_refused(url: str, data: bytes) -> None:
    status, answer, _ = ask(url, body=data)
    assert status == 400 and is_error(answer)


def test_bodies_over_the_limit_are_refused(url: str) -> None:
    assert ask(url, body=b" " * 100_001)[0] == 413
    with closing(socket.create_connection(urlsplit(url).netloc.split(":"), timeout=5)) as raw:  # type: ignore[arg-type]
        raw.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        raw.sendall(b"Transfer-Encoding: chunked\r\n\r\n" + b"8000\r\n" + b" " * 0x8000 + b"\r\n")
        for _ in range(4):
            raw.sendall(b"8000\r\n" + b" " * 0x8000 + b"\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 413")


def test_an_incomplete_body_times_out(url: str) -> None:
    with closing(socket.create_connection(urlsplit(url).netloc.split(":"), timeout=5)) as raw:  # type: ignore[arg-type]
        raw.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        raw.sendall(b'Content-Length: 100\r\n\r\n{"content":')
        began = monotonic()
        assert raw.recv(100).startswith(b"HTTP/1.1 408")
        assert 0.3 < monotonic() - began < 3


def test_a_full_queue_says_when_to_retry() -> None:
    engine = ToyEngine(slots=1, step_s=0.02)
    with serving(engine, Settings("toy", queue_limit=1)) as server:
        held = [http.client.HTTPConnection(urlsplit(server).netloc, timeout=20) for _ in range(2)]
        for connection in held:
            connection.request("POST", CHAT, json.dumps(chat("x" * 200)), {"content-type": "application/json"})
        while ask(server, "/specplug/stats")[1]["waiting"] < 1:
            sleep(0.01)
        status, answer, headers = ask(server, body=chat())
        assert (status, answer["error"]["code"]) == (429, "queue_full") and 1 <= int(headers["retry-after"]) <= 60
        for connection in held:
            connection.close()
        while engine.loop.open:
            sleep(0.01)
        assert ask(server, body=chat())[0] == 200


def test_a_deadline_ends_an_answer_early(url: str) -> None:
    with serving(ToyEngine(step_s=0.02)) as server:
        _, body, _ = ask(server, body=chat("x" * 500, specplug={"deadline": 0.3}))
        assert body["choices"][0]["finish_reason"] == "length" and body["specplug"]["deadline_passed"]
        assert 2 < len(body["choices"][0]["message"]["content"]) < 40


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_frees_its_slot_within_a_step(stream: bool) -> None:
    engine = ToyEngine(step_s=0.02)
    with serving(engine) as server:
        connection = http.client.HTTPConnection(urlsplit(server).netloc, timeout=20)
        body = json.dumps(chat("x" * 4000, stream=stream))
        connection.request("POST", CHAT, body, {"content-type": "application/json"})
        while not engine.loop.open:
            sleep(0.01)
        if stream:
            connection.getresponse().read(100)
        connection.close()
        began = monotonic()
        while engine.loop.open:
            assert monotonic() - began < 1
            sleep(0.005)
        assert ask(server, body=chat())[0] == 200


@pytest.mark.parametrize("error", [SpecplugError("out of cells"), RuntimeError("a bug")])
def test_the_server_goes_on_after_an_engine_failure(error: Exception) -> None:
    engine = ToyEngine(step_s=0.01)
    with serving(engine) as server:
        engine.loop.fail = error
        status, answer, _ = ask(server, body=chat())
        assert (status, answer["error"]["code"]) == (503, "engine_failed")
        engine.loop.fail = error
        (failed,) = events(server, chat())  # the status 200 is already sent
        assert failed["error"]["code"] == "engine_failed"
        assert ask(server, body=chat())[0] == 200
        assert engine.loop.open == 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
POSTS = [CHAT, "/v1/completions", "/tokenize", "/detokenize"]
FIELDS = st.sampled_from(
    "messages model n temperature top_p seed stop stream stream_options max_tokens logit_bias logprobs top_logprobs "
    "response_format tools tool_choice specplug presence_penalty prompt grammar content tokens echo".split()
)


@settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([CHAT, "/v1/completions", "/tokenize", "/detokenize"]), st.dictionaries(FIELDS, JSON, max_size=6)
)
def test_malformed_requests_get_an_error_in_openais_format(url: str, path: str, body: dict[str, Any]) -> None:
    status, answer, _ = ask(url, path, body)
    assert status < 500
    assert status == 200 or is_error(answer)


@settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(FIELDS, JSON)
def test_one_wrong_field_in_a_valid_request(url: str, field: str, value: Any) -> None:
    status, answer, _ = ask(url, body=chat("hi", max_tokens=4) | {field: value})
    assert status < 500
    assert status == 200 or is_error(answer)
