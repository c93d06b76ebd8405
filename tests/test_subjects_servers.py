"""Questions to servers of several kinds, played by the stub: what replies have, and what abilities are found."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter

import pytest
from serving import free_port
from subject_stubs import SIMPLE, at_address, command, running, stub, words

from specplug.errors import UsageError
from specplug.subjects.opening import open_subject
from specplug.subjects.subject import Abilities, SubjectError

ANSWER = " a b c d e step1 a b c d e step2 a b"
TOKENS = 14
PASSES, DRAFTED, ACCEPTED = 8, 6, 5
"""By hand, for n = 2 and m = 3. The prompt has `\\na b c d e`, whose first word is another token than ` a`. Then the
passes after the first one emit: b; c; d e step1 (`b c` is found in the prompt, d e and the end of the message are
drafted, 2 of 3 accepted); a; b; c d e step2 (`a b` is found in the answer, 3 of 3 accepted); a; b."""


# -- llama-server ----------------------------------------------------------------------------------------------------


def test_a_llama_server_says_what_it_can_do() -> None:
    with stub("-m", "some/model.gguf", "-c", "2048", "-np", "2") as server:
        assert server.abilities == Abilities(
            kind="llama-server",
            version="b9999-stub",
            model="model.gguf",
            slots=2,
            context=1024,
            token_ids=True,
            timings=True,
            counters=True,
            logprobs=True,
        )


def test_a_reply_has_text_tokens_times_and_counters() -> None:
    with stub("--ms-per-pass", "2", "--ms-per-row", "0.5", "--ms-per-draft", "0.25", added=SIMPLE) as server:
        reply = server.ask(words(TOKENS))
    assert (reply.text, reply.tokens, reply.finish) == (ANSWER, TOKENS, "length")
    assert (reply.draft_tokens, reply.accepted_tokens) == (DRAFTED, ACCEPTED)
    assert reply.decode_ms == pytest.approx(2 * PASSES + 0.75 * DRAFTED)  # the server's own
    assert reply.stream_ms > 0 and reply.first_ms > 0
    assert reply.ids is not None and len(reply.ids) == TOKENS
    assert reply.ids[0] == reply.ids[6] == reply.ids[12] != reply.ids[1]
    assert reply.prompt_ids is not None and len(reply.prompt_ids) == 12
    assert len(reply.gaps_ms) == TOKENS - 1 and sum(reply.gaps_ms) <= reply.stream_ms + 1e-6


def test_making_the_prompt_is_a_part_of_the_time_to_the_first_token() -> None:
    with stub("--tokenize-ms", "50") as server:
        before = perf_counter()
        reply = server.ask(words(TOKENS))
        after = perf_counter()
    assert reply.first_ms >= 50
    assert before <= reply.asked_at <= after - (reply.first_ms + reply.stream_ms) / 1000


def test_without_drafting_flags_the_text_is_the_same_and_nothing_is_drafted() -> None:
    with stub("--ms-per-pass", "1") as server:
        reply = server.ask(words(TOKENS))
    assert (reply.text, reply.draft_tokens, reply.accepted_tokens) == (ANSWER, 0, 0)
    assert reply.decode_ms == pytest.approx(TOKENS - 1)


def test_prompts_are_cached_as_the_servers_own_flags_say() -> None:
    """A field `cache_prompt` of a request would count instead of a user's --no-cache-prompt."""
    with stub("--refused-field", "cache_prompt") as server:
        assert server.ask(words(3)).tokens == 3


def test_the_likeliest_tokens_come_with_each_token() -> None:
    with stub() as server:
        reply = server.ask(words(2, top=2))
    assert reply.top == ({" a": -0.105, " other1": -3.5}, {" b": -0.105, " other1": -3.5})


def test_a_drafter_is_right_but_for_every_fifth_token() -> None:
    added = ["-md", "draft.gguf", "--spec-draft-n-max", "4"]
    with stub(added=added) as server:
        reply = server.ask(words(TOKENS))
    assert reply.text == ANSWER and reply.draft_tokens is not None and reply.accepted_tokens is not None
    assert 0 < reply.accepted_tokens <= reply.draft_tokens


def test_a_server_whose_drafts_change_the_text() -> None:
    """The stub's fault, which others must find: without drafts its text is right."""
    with stub("--wrong-draft") as server:
        assert server.ask(words(TOKENS)).text == ANSWER
        server.start(SIMPLE)
        # Of `d e`, e is wrong. Then `c d WRONG` is drafted, of which the model says c and d, and d becomes wrong.
        assert server.ask(words(TOKENS)).text == " a b c d WRONG step1 a b c WRONG e step2 a b"


def test_an_answer_that_ends_itself() -> None:
    with stub("--answer-tokens", "5") as server:
        assert server.ask(words(TOKENS)).finish == "stop"


def test_token_ids_are_asked_for_again_where_the_stream_tells_not_all() -> None:
    with stub("--hidden-token", "3") as server:
        assert server.ask(words(TOKENS)).ids is None
        assert server.ask(words(TOKENS)).tokens == TOKENS
        known = server.ask(words(TOKENS, ids=True)).ids
    with stub() as server:
        assert known == server.ask(words(TOKENS)).ids


def test_a_build_without_templates_is_asked_over_openais_interface() -> None:
    with stub("--no-template", added=SIMPLE) as server:
        able = server.abilities
        assert (able.kind, able.token_ids, able.timings, able.counters) == ("llama-server", False, True, True)
        reply = server.ask(words(TOKENS, top=1))
    assert (reply.text, reply.ids, reply.draft_tokens) == (ANSWER, None, DRAFTED)
    assert [list(one) for one in reply.top[:2]] == [[" a"], [" b"]]


def test_answers_at_once_are_told_apart() -> None:
    with stub("-np", "4") as server, ThreadPoolExecutor(4) as threads:
        replies = list(threads.map(lambda tokens: server.ask(words(tokens)), range(1, 13)))
    assert [reply.tokens for reply in replies] == list(range(1, 13))


# -- other kinds -----------------------------------------------------------------------------------------------------


def test_vllm_tells_token_ids_and_its_counters_belong_to_the_answer() -> None:
    config = '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}'
    with stub("--kind", "vllm", "--speculative-config", config) as server:
        able = server.abilities
        assert (able.kind, able.version, able.context, able.counters) == ("vllm", "0.32.0", 4096, True)
        assert (able.token_ids, able.timings) == (True, False)
        for _ in range(2):
            reply = server.ask(words(TOKENS))
            assert (reply.draft_tokens, reply.accepted_tokens) == (DRAFTED, ACCEPTED)
    assert reply.ids is not None and len(reply.ids) == TOKENS and reply.prompt_ids is not None
    assert reply.decode_ms == reply.stream_ms


def test_counters_of_vllm_are_unknown_where_two_answers_were_computed_at_once() -> None:
    config = '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}'
    flags = ("--kind", "vllm", "--speculative-config", config, "-np", "2", "--ms-per-pass", "20")
    with stub(*flags) as server, ThreadPoolExecutor(2) as threads:
        replies = list(threads.map(lambda _: server.ask(words(TOKENS)), range(2)))
    assert [reply.draft_tokens for reply in replies] == [None, None]


def test_vllm_without_drafts_has_no_counters() -> None:
    with stub("--kind", "vllm") as server:
        assert not server.abilities.counters
        assert server.ask(words(3)).draft_tokens is None


def test_specplugs_own_server_switches_drafting_off_for_a_request() -> None:
    with at_address("--kind", "specplug", *SIMPLE) as server:
        able = server.abilities
        assert (able.kind, able.version, able.per_request, able.timings) == ("specplug", "0.0.1", True, True)
        assert server.ask(words(TOKENS)).draft_tokens == DRAFTED
        off = server.ask(words(TOKENS, drafting=False))
    assert (off.text, off.draft_tokens) == (ANSWER, 0)


@pytest.mark.parametrize(
    ("kind", "version", "context"), [("ollama", "0.12.6", None), ("lm-studio", "", 4096), ("openai", "", None)]
)
def test_servers_of_which_little_is_known(kind: str, version: str, context: int | None) -> None:
    with at_address("--kind", kind, "-m", "m.gguf", prefix="/v1") as server:
        assert server.abilities == Abilities(kind, version, "m.gguf", context=context, logprobs=True)
        reply = server.ask(words(TOKENS))
    assert (reply.text, reply.tokens, reply.ids, reply.draft_tokens) == (ANSWER, TOKENS, None, None)
    assert reply.decode_ms == reply.stream_ms


def test_tokens_are_counted_by_events_where_a_server_never_counts_them() -> None:
    with at_address("--kind", "openai", "--no-usage") as server:
        assert server.ask(words(TOKENS)).tokens == TOKENS


def test_a_server_that_counts_tokens_in_whole_answers_alone_is_measured_by_events() -> None:
    """As llama-cpp-python's own server does."""
    with at_address("--kind", "openai", "--no-streamed-usage") as server:
        reply = server.ask(words(TOKENS))
    assert (reply.tokens, reply.counted) == (TOKENS, False)


def text_with(folder: Path, delta: dict[str, str], *flags: str) -> str:
    """Of an answer of three tokens with one more event after the first one."""
    event = json.dumps({"choices": [{"index": 0, "delta": delta}]}, ensure_ascii=False)
    (folder / "event").write_text(event, encoding="utf-8")
    with stub("--kind", "openai", "--event", str(folder / "event"), *flags) as server:
        return server.ask(words(3)).text


@pytest.mark.parametrize(
    "delta",
    [{"reasoning": " why"}, {"reasoning_content": " why"}, {"reasoning": " why", "reasoning_content": " why"}],
)
def test_reasoning_counts_once_whatever_its_names_are(tmp_path: Path, delta: dict[str, str]) -> None:
    assert text_with(tmp_path, delta) == " a why b c"


@pytest.mark.parametrize("flags", [[], ["--byte-by-byte"]])
def test_only_a_line_feed_ends_a_line_of_a_stream(tmp_path: Path, flags: list[str]) -> None:
    said = " \u2028\u2029\x85."
    assert text_with(tmp_path, {"content": said}, *flags) == f" a{said} b c"


def test_a_server_that_never_gave_timings_is_timed_by_its_stream() -> None:
    with stub("--no-timings") as server:
        assert not server.abilities.timings and not server.abilities.counters
        reply = server.ask(words(3))
        assert reply.decode_ms == reply.stream_ms and reply.draft_tokens is None


# -- what a subject cannot do ----------------------------------------------------------------------------------------


def test_what_a_server_cannot_do_is_said() -> None:
    with stub("--kind", "openai", "--no-logprobs") as server:
        with pytest.raises(SubjectError, match="cannot turn drafting off"):
            server.ask(words(3, drafting=False))
        with pytest.raises(SubjectError, match="log probabilities"):
            server.ask(words(3, top=1))
        with pytest.raises(SubjectError, match="token ids"):
            server.ask(words(3, ids=True))


def test_a_remote_server_takes_no_flags_and_goes_on_after_stop() -> None:
    with stub() as started:
        remote = open_subject(started.address)
        with pytest.raises(UsageError, match='--server "llama-server'):
            remote.start(SIMPLE)
        remote.start()
        remote.sleep()
        remote.wake()
        assert remote.ask(words(3)).tokens == 3
        remote.stop()
        remote.stop()
        assert started.ask(words(3)).tokens == 3
        with pytest.raises(SubjectError, match="`start` comes first"):
            remote.ask(words(3))


def test_one_of_several_models_must_be_named() -> None:
    with running("--kind", "ollama", "-m", "one", "--more-models", "two,three") as url:
        for model, message in (
            (None, r"has 3 models \(one, two, three\); name one"),
            ("four", "it lists one, two, three"),
        ):
            with pytest.raises(UsageError, match=message):
                open_subject(url, model=model).start()
        server = open_subject(url, model="two")
        server.start()
        assert server.abilities.model == "two"
        server.stop()


def test_several_models_of_vllm_are_its_adapters() -> None:
    with at_address("--kind", "vllm", "-m", "one", "--more-models", "two") as server:
        assert server.abilities.model == "one"


# -- where a server answers ------------------------------------------------------------------------------------------


def test_a_path_prefix_and_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    with stub("--api-prefix", "/x/y", "--api-key", "k") as started:
        assert started.address.endswith("/x/y")
        assert started.ask(words(3)).tokens == 3
        monkeypatch.setenv("SPECPLUG_SERVER_KEY", "k")
        for end in ("", "/", "/v1"):
            remote = open_subject(started.address + end)
            remote.start()
            assert remote.ask(words(3)).tokens == 3
            remote.stop()


def test_a_key_of_the_environment_reaches_a_launched_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECPLUG_SERVER_KEY", "secret")
    with stub("--need-key") as server:
        assert server.ask(words(3)).tokens == 3


@pytest.mark.skipif(sys.platform != "linux", reason="needs a name of this machine that nobody recognises as one")
def test_no_proxy_stands_before_a_launched_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux reads the host 0 as 0.0.0.0."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with stub("--host", "0", start_s=10.0) as server:
        assert server.address.startswith("http://0:")
        assert server.ask(words(3)).tokens == 3


def test_a_script_that_starts_a_server_whatever_its_arguments_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specplug.subjects.server_command.HELP_S", 1.0)
    port = free_port()
    script = tmp_path / "start.sh"
    script.write_text(f"#!/bin/sh\nexec {command('--port', str(port))}\n")
    script.chmod(0o755)
    server = open_subject(f"{script} --port {port}")
    try:
        server.start()
        assert server.ask(words(3)).tokens == 3
    finally:
        server.stop()
    with pytest.raises(SubjectError, match="if it listens elsewhere, write its --port into the command"):
        open_subject(str(script), start_s=1.0).start()


def test_tls_with_a_certificate_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, key = self_signed(tmp_path)
    with stub("--ssl-cert-file", certificate, "--ssl-key-file", key) as started:
        assert started.address.startswith("https://")
        assert started.ask(words(3)).tokens == 3
        remote = open_subject(started.address)
        with pytest.raises(SubjectError, match=r"self-signed certificate.*SSL_CERT_FILE"):
            remote.start()
        monkeypatch.setenv("SSL_CERT_FILE", certificate)
        remote.start()
        assert remote.ask(words(3)).tokens == 3
        remote.stop()


def self_signed(folder: Path) -> tuple[str, str]:
    """The files of a certificate for 127.0.0.1, and of its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl")
    names = str(folder / "cert.pem"), str(folder / "key.pem")
    subject = ["-subj", "/CN=stub", "-addext", "subjectAltName=IP:127.0.0.1"]
    words = [openssl, "req", "-x509", "-nodes", "-newkey", "rsa:2048", *subject, "-out", names[0], "-keyout", names[1]]
    subprocess.run(words, check=True, capture_output=True)
    return names
