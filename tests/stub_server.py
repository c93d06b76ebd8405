"""A small server with llama-server's flags and endpoints, which has no model: its answers repeat the last message.

    python tests/stub_server.py --port 8081 [-m MODEL] [--spec-type ngram-simple ...] [--ms-per-pass 1] [--hang-at 2]

An answer is the words of the last message, then `step1`, the words again, `step2` and so on, so that lookup finds real
hits and real misses. A token is a word with the white space before it. ngram-simple drafts by llama.cpp's own rule
(`common_ngram_simple_draft` in common/ngram-map.cpp); other lookup types draft by the same rule with their own sizes; a
drafter (`-md`) is right but for every fifth token. Times are slept, and `timings` has exactly what was asked for by
`--ms-per-...`. `--kind` makes it another server. Faults are flags; the N of `--...-at N` counts streamed answers, but
those to `Say hello.`, by which specplug finds out what a server can do. The content of the file `--event` is sent in
the middle of each counted one, that of `--first-event` in the others, that of `--body` in place of an answer that is
not streamed. With `--unsteady` the number of the answer is in its text. Standard library only, so that it starts at
once.
"""

import argparse
import json
import os
import re
import ssl
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llama_flags import llama_parser, print_what_is_asked

STUB_FLAGS: list[tuple[str, Any]] = [
    ("--ms-per-pass", 0.05),
    ("--ms-per-row", 0.0),
    ("--ms-per-draft", 0.0),
    ("--prompt-ms", 0.0),
    ("--tokenize-ms", 0.0),
    ("--answer-tokens", 1 << 30),
    ("--slow-start", 0.0),
    ("--fail-at", 0),
    ("--die-at", 0),
    ("--hang-at", 0),
    ("--reset-at", 0),
    ("--drop-at", 0),
    ("--broken-json-at", 0),
    ("--error-event-at", 0),
    ("--page-at", 0),
    ("--forget-at", 0),
    ("--forget-timings-at", 0),
    ("--hidden-token", 0),
    ("--clock-rate", 1.0),
    ("--more-models", ""),
    ("--refused-field", ""),
    ("--refused-word", ""),
    ("--event", ""),
    ("--first-event", ""),
    ("--body", ""),
]
SWITCHES = (
    "--no-timings --no-usage --no-streamed-usage --no-done --no-template --no-logprobs "
    "--missing-model --wrong-draft --unsteady --byte-by-byte".split()
)
KINDS = ["llama-server", "vllm", "specplug", "ollama", "lm-studio", "openai"]

GREETING = "Say hello."
UNCOUNTED = -1

PIECE = re.compile(r"<\|\w+\|>|\s*[^\s<]+|\s+|<")


class Vocabulary:
    """Ids of texts, the same in every process; and the texts of ids that were given."""

    def __init__(self) -> None:
        self.texts: dict[int, str] = {}

    def ids(self, text: str) -> list[int]:
        found = [(zlib.crc32(piece.encode()) % 100_000, piece) for piece in PIECE.findall(text)]
        self.texts.update(found)
        return [token for token, _ in found]


def ngram_simple(tokens: list[int], sampled: int, size_n: int, size_m: int) -> list[int]:
    """llama.cpp's rule: `tokens` are all before the last sampled one."""
    length = len(tokens)
    if length <= size_n + size_m + 1:
        return []
    pattern = [*tokens[length - size_n + 1 :], sampled]
    for at in range(length - size_n - 1, 0, -1):
        if tokens[at : at + size_n] == pattern:
            copied = min(size_m, length - (at + size_n))
            return [] if copied < size_n else tokens[at + size_n : at + size_n + copied]
    return []


class Drafting:
    """The types of `--spec-type`, asked in order; the first draft counts."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._types = [one.strip() for one in options.spec_type.split(",") if one.strip() != "none"]
        if options.spec_draft_model and "draft-simple" not in self._types:
            self._types.append("draft-simple")
        self._options = vars(options)
        if options.speculative_config:
            config = json.loads(options.speculative_config)
            self._types = ["ngram-simple"]
            self._options["spec_ngram_simple_size_n"] = config.get("prompt_lookup_max", 2)
            self._options["spec_ngram_simple_size_m"] = config["num_speculative_tokens"]

    def __bool__(self) -> bool:
        return bool(self._types)

    def draft(self, before: list[int], coming: list[int], limit: int) -> list[int]:
        """At most `limit` tokens after `before`; `coming` is what the model will answer, which a drafter guesses."""
        for kind in self._types:
            if kind == "draft-simple":
                most = min(limit, int(self._options["spec_draft_n_max"]))
                return [token if token % 5 else token + 1 for token in coming[:most]]
            name = kind.replace("-", "_")
            if kind == "ngram-mod":
                sizes = self._options["spec_ngram_mod_n_match"], self._options["spec_ngram_mod_n_max"]
            else:
                sizes = self._options[f"spec_{name}_size_n"], self._options[f"spec_{name}_size_m"]
            if found := ngram_simple(before[:-1], before[-1], *map(int, sizes))[:limit]:
                return found
        return []


class Stub:
    """What all requests share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.kind: str = options.kind
        self.vocabulary = Vocabulary()
        self.drafting = Drafting(options)
        self.ready_at = time.monotonic() + options.slow_start
        self.slots = threading.Semaphore(options.parallel)
        self.lock = threading.Lock()
        self.streamed = 0
        self.answered = 0
        self.generated = 0
        self.drafted = 0
        self.accepted = 0
        self.prefix = options.prefix or options.api_prefix
        self.key = options.need_key or options.api_key
        self.model = options.alias or os.path.basename(options.model)

    def number_of_stream(self) -> int:
        with self.lock:
            self.streamed += 1
            return self.streamed

    def template(self, messages: list[dict[str, str]]) -> str:
        written = "".join(f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in messages)
        return written + "<|im_start|>assistant\n"

    def answer(self, prompt: list[int]) -> Iterator[int]:
        """The tokens that the model will say, without end."""
        text = "".join(self.vocabulary.texts.get(token, "") for token in prompt)
        last = text.rpartition("<|im_end|>")[0].rpartition("<|im_start|>")[2].partition("\n")[2] or text
        words = self.vocabulary.ids(" " + " ".join(last.split()))
        step = 0
        while True:
            step += 1
            yield from words
            yield from self.vocabulary.ids(f" step{step}" + (f"of{self.streamed}" if self.options.unsteady else ""))

    def passes(self, prompt: list[int], limit: int, drafting: bool) -> Iterator[tuple[list[int], int, float]]:
        """Each pass: its tokens, how many of them were drafted, and its milliseconds, which have been slept.

        The first one reads the prompt."""
        options = self.options
        limit = min(limit, options.answer_tokens)
        generated = self.answer(prompt)
        coming: list[int] = []
        text = list(prompt)
        done = 0
        while done < limit:
            while len(coming) < limit - done + 64:
                coming.append(next(generated))
            first = done == 0
            draft = self.drafting.draft(text, coming, limit - done - 1) if drafting and not first else []
            hits = next((n for n, (a, b) in enumerate(zip(draft, coming, strict=False)) if a != b), len(draft))
            tokens = coming[: hits + 1]
            del coming[: hits + 1]
            if hits and options.wrong_draft:
                tokens[hits - 1] = self.vocabulary.ids(" WRONG")[0]
            ms = options.prompt_ms if first else options.ms_per_pass
            ms += 0 if first else (options.ms_per_row + options.ms_per_draft) * len(draft)
            if ms:
                time.sleep(ms / 1000)
            with self.lock:
                self.generated += len(tokens)
                self.drafted += len(draft)
                self.accepted += hits
            text += tokens
            done += len(tokens)
            yield tokens, len(draft), ms


def build_parser() -> argparse.ArgumentParser:
    parser = llama_parser()
    for name, default in STUB_FLAGS:
        parser.add_argument(name, type=type(default), default=default)
    for name in SWITCHES:
        parser.add_argument(name, action="store_true")
    parser.add_argument("--need-key", nargs="?", const="secret", default="")
    parser.add_argument("--prefix", default="")
    parser.add_argument("--kind", choices=KINDS, default="llama-server")
    parser.add_argument("--speculative-config", default="")
    parser.add_argument("words", nargs="*")
    return parser


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    stub: Stub

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged, so that the last line of the log is the stub's own."""

    # -- what is asked ---------------------------------------------------------------------------------------------

    def do_GET(self) -> None:
        path = self.checked_path()
        if path is None:
            return
        found = self.described(path)
        if found is None:
            self.send_json({"error": {"code": 404, "message": "File Not Found", "type": "not_found_error"}}, 404)
        elif isinstance(found, str):
            self.send_body(found.encode(), "text/plain")
        else:
            self.send_json(found)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or b"{}")
        path = self.checked_path()
        if path is None:
            return
        stub = self.stub
        if stub.options.refused_field in body:
            self.send_json({"error": {"code": 400, "message": "field refused", "type": "invalid_request_error"}}, 400)
            return
        own = stub.kind == "llama-server" and not stub.options.no_template
        if path == "/tokenize" and own:
            time.sleep(stub.options.tokenize_ms / 1000)
            self.send_json({"tokens": stub.vocabulary.ids(body["content"])})
        elif path == "/apply-template" and own:
            self.send_json({"prompt": stub.template(body["messages"])})
        elif path == "/completion" and own:
            prompt = body["prompt"] if isinstance(body["prompt"], list) else stub.vocabulary.ids(body["prompt"])
            self.answer(Completion(stub, prompt, body), body)
        elif path == "/v1/chat/completions":
            prompt = stub.vocabulary.ids(stub.template(body["messages"]))
            self.answer(Chat(stub, prompt, body), body)
        else:
            self.send_json({"error": {"code": 404, "message": "File Not Found", "type": "not_found_error"}}, 404)

    def checked_path(self) -> str | None:
        """The path without the prefix; None where an error was sent."""
        stub = self.stub
        path = urlsplit(self.path).path
        if not path.startswith(stub.prefix):
            self.send_json({"error": {"code": 404, "message": "File Not Found", "type": "not_found_error"}}, 404)
            return None
        path = path.removeprefix(stub.prefix)
        if stub.key and path != "/health" and self.headers.get("authorization") != f"Bearer {stub.key}":
            self.send_json({"error": {"code": 401, "message": "Invalid API Key", "type": "authentication_error"}}, 401)
            return None
        if time.monotonic() < stub.ready_at:
            self.send_json({"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}, 503)
            return None
        return path

    def described(self, path: str) -> Any:
        stub = self.stub
        options = stub.options
        if path == "/health":
            return None if stub.kind in ("ollama", "lm-studio", "openai") else {"status": "ok"}
        if path in ("/v1/models", "/models"):
            owners = {"llama-server": "llamacpp", "ollama": "library", "lm-studio": "organization_owner"}
            entry = {"id": stub.model, "object": "model", "owned_by": owners.get(stub.kind, stub.kind)}
            if stub.kind == "vllm":
                entry["max_model_len"] = options.ctx_size
            more = [entry | {"id": name} for name in options.more_models.split(",") if name]
            return {"object": "list", "data": [entry, *more]}
        if stub.kind in ("llama-server", "specplug"):
            if path == "/props":
                return {
                    "default_generation_settings": {"n_ctx": options.ctx_size // options.parallel},
                    "total_slots": options.parallel,
                    "model_path": options.model,
                    "build_info": "b9999-stub" if stub.kind == "llama-server" else "specplug-0.0.1",
                }
            if path == "/slots":
                return [{"id": i, "speculative": bool(stub.drafting)} for i in range(options.parallel)]
            if path == "/metrics" and options.metrics:
                return f"llamacpp:spec_decode_num_draft_tokens_total {stub.drafted}\n"
        if stub.kind == "vllm":
            if path == "/version":
                return {"version": "0.32.0"}
            if path == "/metrics":
                return self.vllm_metrics()
        if stub.kind == "ollama" and path == "/api/version":
            return {"version": "0.12.6"}
        if stub.kind == "lm-studio" and path == "/api/v0/models":
            entry = {"id": stub.model, "object": "model", "type": "llm", "state": "loaded", "max_context_length": 32768}
            return {"object": "list", "data": [entry | {"loaded_context_length": 4096}]}
        return None

    def vllm_metrics(self) -> str:
        stub = self.stub
        lines = [
            f'vllm:request_success_total{{engine="0",finished_reason="length"}} {float(stub.answered)}',
            f'vllm:generation_tokens_total{{engine="0"}} {float(stub.generated)}',
        ]
        if stub.drafting:
            lines += [
                f'vllm:spec_decode_num_draft_tokens_total{{engine="0"}} {float(stub.drafted)}',
                f'vllm:spec_decode_num_accepted_tokens_total{{engine="0"}} {float(stub.accepted)}',
            ]
        return "\n".join(lines) + "\n"

    # -- answers ---------------------------------------------------------------------------------------------------

    def answer(self, form: "Answer", body: dict[str, Any]) -> None:
        stub = self.stub
        options = stub.options
        if options.refused_word and options.refused_word in "".join(map(form.text, form.prompt)):
            message = "request (5000 tokens) exceeds the available context size (4096 tokens)"
            self.send_json({"error": {"code": 400, "message": message, "type": "exceed_context_size_error"}}, 400)
            return
        with stub.slots:
            if not body.get("stream"):
                for _ in form.events():
                    pass
                stub.answered += 1
                text = Path(options.body).read_text() if options.body else json.dumps(form.whole())
                self.send_body(text.encode(), "application/json")
                return
            number = UNCOUNTED if form.is_greeting() else stub.number_of_stream()
            form.forgets = number == options.forget_at
            form.forgets_timings = number == options.forget_timings_at
            if number == options.fail_at:
                self.send_json(
                    {"error": {"code": 500, "message": "failed to decode the batch", "type": "server_error"}}, 500
                )
                return
            if number == options.drop_at:
                self.close_connection = True  # without a byte of an answer
                return
            if number == options.page_at:
                self.send_body(b"<html>a proxy's page</html>", "text/html")
                return
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            for count, event in enumerate(form.events()):
                if count == 2:
                    self.fault(number)
                self.send_event(json.dumps(event))
            stub.answered += 1
            if form.done_mark and not options.no_done:
                self.send_event("[DONE]")
            self.wfile.write(b"0\r\n\r\n")

    def fault(self, number: int) -> None:
        """In the middle of an answer."""
        options = self.stub.options
        if number == UNCOUNTED:
            if options.first_event:
                self.send_event(Path(options.first_event).read_text())
            return
        if number == options.die_at:
            print("stub: out of memory", flush=True)
            os._exit(3)
        if number == options.hang_at:
            time.sleep(3600)
        if number == options.reset_at:
            self.connection.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")  # SO_LINGER of zero seconds: closing sends RST
            self.connection.close()
            raise ConnectionResetError
        if number == options.broken_json_at:
            self.send_event('{"choices": [')
        if options.event:
            self.send_event(Path(options.event).read_text(encoding="utf-8"))
        if number == options.error_event_at:
            self.send_event(json.dumps({"error": {"code": 500, "message": "context is full", "type": "server_error"}}))

    def send_event(self, data: str) -> None:
        content = f"data: {data}\n\n".encode()
        size = 1 if self.stub.options.byte_by_byte else len(content)
        for at in range(0, len(content), size):
            self.wfile.write(b"%x\r\n%s\r\n" % (size, content[at : at + size]))
            self.wfile.flush()

    def send_json(self, body: Any, status: int = 200) -> None:
        self.send_body(json.dumps(body).encode(), "application/json", status)

    def send_body(self, content: bytes, kind: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


class Answer:
    """One answer, in one of the two interfaces. `events` makes it."""

    done_mark = False

    def __init__(self, stub: Stub, prompt: list[int], body: dict[str, Any]) -> None:
        self.stub = stub
        self.prompt = prompt
        self.body = body
        self.tokens: list[int] = []
        self.drafted = self.accepted = 0
        self.decode_ms = 0.0
        self.finish = "length"
        self.forgets = self.forgets_timings = False

    def is_greeting(self) -> bool:
        return GREETING in "".join(self.stub.vocabulary.texts.get(token, "") for token in self.prompt)

    def steps(self) -> Iterator[int]:
        limit = self.body.get("n_predict") or self.body.get("max_tokens") or 16
        drafting = (self.body.get("specplug") or {}).get("mode") != "off"
        for tokens, drafted, ms in self.stub.passes(self.prompt, limit, drafting):
            if self.tokens:
                self.decode_ms += ms
            self.drafted += drafted
            self.accepted += len(tokens) - 1
            for token in tokens:
                self.tokens.append(token)
                yield token
        self.finish = "length" if len(self.tokens) == limit else "stop"

    def events(self) -> Iterator[dict[str, Any]]:
        raise NotImplementedError

    def whole(self) -> dict[str, Any]:
        raise NotImplementedError

    def text(self, token: int) -> str:
        return self.stub.vocabulary.texts[token]

    def timings(self) -> dict[str, Any]:
        if self.stub.options.no_timings or self.forgets_timings or self.stub.kind not in ("llama-server", "specplug"):
            return {}
        found: dict[str, Any] = {
            "prompt_n": len(self.prompt),
            "prompt_ms": self.stub.options.prompt_ms,
            "predicted_n": len(self.tokens),
            "predicted_ms": self.decode_ms * self.stub.options.clock_rate,
        }
        if self.drafted:
            found |= {"draft_n": self.drafted, "draft_n_accepted": self.accepted}
        return {"timings": found}

    def likeliest(self, token: int, top: int) -> dict[str, Any]:
        """The token at 0.9, and others at less."""
        others = [{"token": f" other{i}", "logprob": -2.5 - i} for i in range(1, top)]
        mine = {"token": self.text(token), "logprob": -0.105}
        return {**mine, "id": token, "top_logprobs": [mine, *others]}


class Completion(Answer):
    def events(self) -> Iterator[dict[str, Any]]:
        held = ""
        for number, token in enumerate(self.steps(), 1):
            held += self.text(token)
            if number == self.stub.options.hidden_token:
                continue  # as a token that is part of a character: its text comes with the next one, its id never
            event = {"index": 0, "content": held, "tokens": [token], "stop": False}
            held = ""
            yield event | self.probabilities([token])
        yield self.last("", [])

    def whole(self) -> dict[str, Any]:
        return self.last("".join(map(self.text, self.tokens)), self.tokens) | self.probabilities(self.tokens)

    def last(self, text: str, tokens: list[int]) -> dict[str, Any]:
        kind = "limit" if self.finish == "length" else "eos"
        usage = {} if self.stub.options.no_usage or self.forgets else {"tokens_predicted": len(self.tokens)}
        end = {"index": 0, "content": text, "tokens": tokens, "stop": True, "stop_type": kind}
        return {**end, **usage, **self.timings()}

    def probabilities(self, tokens: list[int]) -> dict[str, Any]:
        top = self.body.get("n_probs")
        return {"completion_probabilities": [self.likeliest(token, top) for token in tokens]} if top else {}


class Chat(Answer):
    done_mark = True

    def events(self) -> Iterator[dict[str, Any]]:
        first = self.chunk({"role": "assistant", "content": None}, None)
        yield first | ({"prompt_token_ids": self.prompt} if self.tells_ids() else {})
        for token in self.steps():
            yield self.chunk({"content": self.text(token)}, None, [token])
        yield self.chunk({}, self.finish) | self.timings()
        if not (self.stub.options.no_usage or self.stub.options.no_streamed_usage or self.forgets):
            yield {"object": "chat.completion.chunk", "choices": [], "usage": self.usage()}

    def whole(self) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": "".join(map(self.text, self.tokens))},
            "finish_reason": self.finish,
            **self.logprobs(self.tokens),
        }
        if self.tells_ids():
            choice["token_ids"] = self.tokens
        usage = {} if self.stub.options.no_usage else {"usage": self.usage()}
        return {"object": "chat.completion", "choices": [choice], **usage, **self.timings()}

    def chunk(self, delta: dict[str, Any], finish: str | None, tokens: list[int] | None = None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "delta": delta, "finish_reason": finish, **self.logprobs(tokens or [])}
        if tokens and self.tells_ids():
            choice["token_ids"] = tokens
        return {"object": "chat.completion.chunk", "choices": [choice]}

    def usage(self) -> dict[str, int]:
        return {"prompt_tokens": len(self.prompt), "completion_tokens": len(self.tokens)}

    def tells_ids(self) -> bool:
        return self.stub.kind == "vllm" and bool(self.body.get("return_token_ids"))

    def logprobs(self, tokens: list[int]) -> dict[str, Any]:
        if not self.body.get("logprobs") or not tokens or self.stub.options.no_logprobs:
            return {}
        return {"logprobs": {"content": [self.likeliest(token, self.body["top_logprobs"]) for token in tokens]}}


def main() -> None:
    arguments = sys.argv[1:]
    print_what_is_asked(arguments)
    options = build_parser().parse_args(arguments)
    if options.missing_model:
        print(f"llama_model_load: error loading model: failed to open {options.model}", file=sys.stderr)
        print("exiting due to model loading error", file=sys.stderr)
        sys.exit(1)
    Handler.stub = Stub(options)
    try:
        server = ThreadingHTTPServer((options.host, options.port), Handler)
    except OSError:
        sys.exit(f"couldn't bind HTTP server socket, hostname: {options.host}, port: {options.port}")
    server.daemon_threads = True
    if options.ssl_cert_file:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(options.ssl_cert_file, options.ssl_key_file)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    print(f"server is listening on {options.host}:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
