"""Faults of servers, played by the stub: each is one SubjectError that says what happened and what to do."""

import json
import socket
import sys
import time
from contextlib import closing, suppress
from pathlib import Path
from threading import Thread

import pytest
from subject_stubs import at_address, command, running, stub, words

from specplug.errors import UsageError
from specplug.subjects.address import ServerAddress
from specplug.subjects.connection import Connection
from specplug.subjects.launched import LaunchedServer
from specplug.subjects.opening import open_subject
from specplug.subjects.server_command import read_command
from specplug.subjects.server_process import ServerProcess
from specplug.subjects.subject import Question, RefusedQuestion, SubjectError

CHAT = ("--kind", "openai")
OWN = ()
"""Flags for OpenAI's interface, and for llama-server's own."""

MIDDLE = [
    ("--fail-at", "HTTP 500: failed to decode the batch"),
    ("--reset-at", "broke off the connection"),
    ("--broken-json-at", "no JSON object"),
    ("--error-event-at", "reported an error within the answer: context is full"),
    ("--page-at", "answered with text/html where a stream of events was asked for: <html>a proxy's page</html>"),
    ("--drop-at", "broke off the connection"),
]


@pytest.mark.parametrize("kind", [CHAT, OWN], ids=["chat", "completion"])
def test_a_fault_in_an_answer_is_an_error_and_the_next_answer_is_whole(kind: tuple[str, ...]) -> None:
    flags = [word for number, (flag, _) in enumerate(MIDDLE, 1) for word in (flag, str(number))]
    with at_address(*kind, *flags) as server:
        for _, message in MIDDLE:
            with pytest.raises(SubjectError, match=message):
                server.ask(words(5))
            # The stub counts answers, so each flag has hit one of them.
        assert server.ask(words(5)).tokens == 5


@pytest.mark.parametrize("kind", [CHAT, OWN], ids=["chat", "completion"])
def test_a_question_that_is_refused_or_has_an_empty_answer_is_no_fault_of_the_server(
    kind: tuple[str, ...], tmp_path: Path
) -> None:
    long = Question([{"role": "user", "content": "so huge"}], 5)
    with at_address(*kind, "--refused-word", "huge") as server:
        with pytest.raises(RefusedQuestion, match=r"HTTP 400: .* exceeds the available context size"):
            server.ask(long)
        assert server.ask(words(5)).tokens == 5
    with at_address(*kind, "--answer-tokens", "0") as server, pytest.raises(RefusedQuestion, match="answer is empty"):
        server.ask(words(5))
    (event := tmp_path / "event").write_text('{"error": {"code": 400, "message": "context is full"}}')
    with (
        at_address(*kind, "--event", str(event)) as server,
        pytest.raises(RefusedQuestion, match="within the answer: context is full"),
    ):
        server.ask(words(5))
    with at_address(*kind, "--fail-at", "1") as server, pytest.raises(SubjectError, match="HTTP 500") as failed:
        server.ask(words(5))
    assert not isinstance(failed.value, RefusedQuestion)


def test_a_server_that_sends_nothing_hangs() -> None:
    with (
        at_address("--hang-at", "1", silence_s=0.3) as server,
        pytest.raises(SubjectError, match=r"sent nothing for 0.3 s"),
    ):
        server.ask(words(5))


def test_an_answer_that_takes_longer_than_it_may() -> None:
    """A token every 20 ms, so 1000 take 20 s; the limit is asked for with each question."""
    limit = [60.0]
    server = LaunchedServer(read_command(command("--ms-per-pass", "20", "--hang-at", "3")), answer_s=lambda: limit[0])
    try:
        server.start()
        for seconds, tokens in ((0.3, 1000), (60.0, 3), (0.3, 3)):  # it sends for too long; is in time; sends nothing
            limit[0] = seconds
            if seconds == 60.0:
                assert server.ask(words(tokens)).tokens == tokens
                continue
            with pytest.raises(SubjectError, match=r"did not complete its answer within 0.3 s; it is too slow"):
                server.ask(words(tokens))
    finally:
        server.stop()


def dribble(listening: socket.socket) -> None:
    """Answer one request with a byte every 20 ms for 10 s, and no line feed among them."""
    client, _ = listening.accept()
    with client, suppress(OSError):
        client.recv(1 << 16)
        client.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: ")
        for _ in range(500):
            client.sendall(b"x")
            time.sleep(0.02)


def test_a_line_that_does_not_end_takes_no_longer_than_an_answer_may() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        Thread(target=dribble, args=(listening,), daemon=True).start()
        address = ServerAddress(f"http://127.0.0.1:{listening.getsockname()[1]}")
        with (
            closing(Connection(address, "dribbling", answer_s=lambda: 0.3)) as connection,
            pytest.raises(SubjectError, match=r"dribbling did not complete its answer within 0.3 s; it is too slow"),
        ):
            list(connection.stream("/v1/chat/completions", {}, ends_with_done=True))


@pytest.mark.parametrize(
    ("flag", "message"),
    [("--fail-at", "failed to decode the batch"), ("--hang-at", "sent nothing for 0.5 s; it hangs")],
)
def test_a_fault_of_a_launched_server_has_its_last_line(flag: str, message: str) -> None:
    with (
        stub(flag, "1", silence_s=0.5) as server,
        pytest.raises(SubjectError, match=f"{message}; its last line: server is listening on 127.0.0.1"),
    ):
        server.ask(words(5))


def test_a_stream_without_its_end_mark_is_incomplete() -> None:
    with pytest.raises(SubjectError, match=r"ended without \[DONE\]"), at_address(*CHAT, "--no-done"):
        pass


@pytest.mark.parametrize("kind", [CHAT, OWN], ids=["chat", "completion"])
def test_an_answer_without_usage_that_others_had(kind: tuple[str, ...]) -> None:
    with at_address(*kind, "--forget-at", "2") as server:
        server.ask(words(3))
        with pytest.raises(SubjectError, match="the answer has no usage"):
            server.ask(words(3))


def test_an_answer_without_timings_that_others_had() -> None:
    with at_address("--kind", "specplug", "--forget-timings-at", "1") as server:
        with pytest.raises(SubjectError, match="the answer has no timings"):
            server.ask(words(3))
        assert server.ask(words(3)).tokens == 3


def test_an_empty_answer_cannot_be_measured() -> None:
    with at_address("--answer-tokens", "0") as server, pytest.raises(SubjectError, match="the answer is empty"):
        server.ask(words(3))


# -- bodies of other types than they must have -----------------------------------------------------------------------

DEEP = "[" * 100_000 + "]" * 100_000


def chosen(**fields: object) -> str:
    return json.dumps({"choices": [fields]})


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ('{"usage": "2"}', "usage of an answer is, or has in it, not an object"),
        (
            '{"usage": {"completion_tokens": "2"}}',
            "completion_tokens of an answer is, or has in it, not a whole number",
        ),
        ('{"choices": ["x"]}', "choices of an answer is, or has in it, not an object"),
        ('{"choices": {"0": 1}}', "choices of an answer is, or has in it, not a list"),
        (chosen(delta={"content": [{"type": "text"}]}), "content of an answer is, or has in it, not a text"),
        (chosen(delta={}, token_ids=[1, "a"]), "token_ids of an answer is, or has in it, not a whole number"),
        (
            chosen(delta={}, logprobs={"content": [{"top_logprobs": [{"token": "a", "logprob": None}]}]}),
            "logprob of an answer is, or has in it, no finite number",
        ),
        ('{"timings": {"predicted_ms": NaN}}', "predicted_ms of an answer is, or has in it, no finite number"),
        (f'{{"choices": {DEEP}}}', "an event of the stream is no JSON object"),
        ('{"error": {"code": 500}}', r'reported an error within the answer: {"error": {"code": 500}}'),
    ],
)
def test_a_malformed_event_of_a_chat(event: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "event").write_text(event)
    with stub(*CHAT, "--event", str(tmp_path / "event")) as server, pytest.raises(SubjectError, match=message):
        server.ask(words(5))


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ('{"content": 1}', "content of an answer is, or has in it, not a text"),
        ('{"content": "", "tokens": [true]}', "tokens of an answer is, or has in it, not a whole number"),
        ('{"content": "", "completion_probabilities": [1]}', "completion_probabilities .* not an object"),
        ('{"stop": true, "tokens_predicted": "5"}', "tokens_predicted of an answer .* not a whole number"),
    ],
)
def test_a_malformed_event_of_llama_servers_own_interface(event: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "event").write_text(event)
    with stub("--event", str(tmp_path / "event")) as server, pytest.raises(SubjectError, match=message):
        server.ask(words(5))


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ('{"choices": [], "usage": "2"}', "usage of an answer is, or has in it, not an object"),
        (DEEP, "an event of the stream is no JSON object"),
    ],
)
def test_a_malformed_first_answer(event: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "event").write_text(event)
    with pytest.raises(SubjectError, match=message), stub(*CHAT, "--first-event", str(tmp_path / "event")):
        pass


@pytest.mark.parametrize(
    ("body", "message"),
    [('{"tokens": "2"}', "tokens of an answer is, or has in it, not a list"), (DEEP, "something else than JSON")],
)
def test_a_malformed_second_answer_with_the_tokens(body: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "body").write_text(body)
    with (
        stub("--hidden-token", "3", "--body", str(tmp_path / "body")) as server,
        pytest.raises(SubjectError, match=message),
    ):
        server.ask(words(5, ids=True))


# -- at the start ----------------------------------------------------------------------------------------------------


def test_nobody_at_the_address() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        server = open_subject(f"http://127.0.0.1:{bound.getsockname()[1]}")
        with pytest.raises(SubjectError, match="nobody answers at"):
            server.start()


def test_a_key_that_is_missing_or_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPECPLUG_SERVER_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with running("--need-key") as url:
        with pytest.raises(SubjectError, match=r"needs an API key \(HTTP 401\).*SPECPLUG_SERVER_KEY"):
            open_subject(url).start()
        monkeypatch.setenv("SPECPLUG_SERVER_KEY", "hunter2")
        with pytest.raises(SubjectError, match=r"refused the API key \(HTTP 401\)") as refused:
            open_subject(url).start()
    assert "hunter2" not in str(refused.value)


def test_a_page_that_is_no_server() -> None:
    with running("--prefix", "/elsewhere") as url, pytest.raises(SubjectError, match="/v1/models lists no model"):
        open_subject(url).start()


def test_tls_where_the_server_has_none() -> None:
    with running() as url, pytest.raises(SubjectError, match=r"nobody answers|broke off"):
        open_subject(url.replace("http:", "https:")).start()


def test_a_model_that_is_missing_ends_the_start_with_the_servers_words() -> None:
    server = open_subject(command("-m", "absent.gguf", "--missing-model"))
    with pytest.raises(
        SubjectError,
        match=(
            r"ended with exit code 1; its last line: exiting due to model loading error; "
            r"the first error before it: llama_model_load: error loading model: failed to open absent.gguf"
        ),
    ):
        server.start()


def test_a_flag_that_the_server_does_not_know() -> None:
    server = open_subject(command())
    with pytest.raises(SubjectError, match=r"ended with exit code 2; its last line: .*--spec-nonsense"):
        server.start(["--spec-nonsense", "1"])


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with running() as url:
        port = url.rpartition(":")[2]
        with pytest.raises(SubjectError, match=f"port {port} of 127.0.0.1 is taken by another process"):
            open_subject(command("--port", port)).start()


def test_a_host_that_is_not_ours() -> None:
    with pytest.raises(UsageError, match="no address of this machine"):
        open_subject(command("--host", "203.0.113.1")).start()


def test_a_start_that_takes_too_long_ends() -> None:
    server = open_subject(command("--slow-start", "60"), start_s=1.0)
    with pytest.raises(
        SubjectError, match=r"did not answer at http://127.0.0.1:.* within 1 s; its last line: server is"
    ):
        server.start()


def test_a_start_that_takes_a_while_is_waited_for() -> None:
    with stub("--slow-start", "0.5") as server:
        assert server.ask(words(3)).tokens == 3


# -- the process dies ------------------------------------------------------------------------------------------------


def test_a_server_that_dies_in_an_answer_says_why_and_can_be_started_again() -> None:
    with stub("--die-at", "2") as server:
        server.ask(words(5))
        with pytest.raises(
            SubjectError, match=r"stub_server.py ended with exit code 3; its last line: stub: out of memory"
        ):
            server.ask(words(5))
        server.start()
        assert server.ask(words(5)).tokens == 5


def test_the_log_has_what_the_server_printed(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "server.log"
    for _ in range(2):
        with stub(log=log):
            pass
    assert log.read_text().count("server is listening") == 2


# -- what a terminal would obey --------------------------------------------------------------------------------------

RED = "\x1b[31m\x07\u202ered"
"""A colour, a bell, and the direction of writing."""


def test_a_models_name_has_no_control_characters() -> None:
    with stub("--kind", "openai", "--alias", RED) as server:
        assert server.abilities.model == "[31mred"


def test_a_servers_error_has_no_control_characters(tmp_path: Path) -> None:
    (tmp_path / "event").write_text(json.dumps({"error": {"message": f"bad\n{RED}"}}))
    with stub(*CHAT, "--event", str(tmp_path / "event")) as server, pytest.raises(SubjectError) as raised:
        server.ask(words(5))
    assert "within the answer: bad [31mred; its last line" in str(raised.value)


def test_the_last_line_of_a_log_has_no_control_characters(tmp_path: Path) -> None:
    printing = ServerProcess([sys.executable, "-c", f"print({RED!r}, flush=True)"], tmp_path / "log")
    printing.wait(30)
    assert printing.last_words() == "its last line: [31mred"
    printing.stop()
