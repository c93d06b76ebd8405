"""A toy engine for the real server. It has no model: each answer repeats the prompt byte by byte, then ends."""

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import sleep
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI

from specplug.constraints.gbnf_limits import check_gbnf
from specplug.constraints.grammar_text import grammar_text
from specplug.core import IntArray, SequenceOptions, int_array
from specplug.corpora.folder import Corpus, check_files, open_corpus, place
from specplug.errors import SpecplugError, UsageError
from specplug.generation.answers import Sampling, TokenLogprobs
from specplug.generation.counters import Counters
from specplug.generation.fill_in import FillInTokens
from specplug.generation.model_description import ModelDescription
from specplug.profile import Profile
from specplug.proposers.datastore import Datastore
from specplug.server.answer_recorder import AnswerStore
from specplug.server.app import make_app
from specplug.server.middleware import Limits
from specplug.server.process import Address, connections, guarded
from specplug.server.state import Settings

END = 256
PLAIN_NS, DRAFT_ROW_NS = 10_000_000, 5_000_000


@dataclass(eq=False)
class ToySampler:
    sampling: Sampling
    warnings: tuple[str, ...] = ()
    open: bool = True

    def close(self) -> None:
        assert self.open, "closed twice"
        self.open = False


@dataclass(eq=False)
class ToyStream:
    prompt: list[int]
    sampler: ToySampler
    max_tokens: int
    max_draft: int
    reading: bool = True
    cached: int = 0
    drafters: list[int] = field(default_factory=list)
    failure: SpecplugError | None = None
    decode_ms: float = 0.0
    plain_ms: float = 0.0
    fresh: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: str | None = None
    counters: Counters = field(default_factory=Counters)
    position: int = 0


class ToyLoop:
    """Emits two tokens per step with drafting and one without; a prompt takes one step.

    begun              the prompts of all answers so far, as text
    options            what their requests ask of the proposers
    open               number of streams that have begun and not finished
    fail               raised by the next step, once
    answers_fail_at    every answer ends with a failure of its own after so many tokens; None: none does
    prefixes_shared    True makes equal prompts wait for each other
    """

    def __init__(self, step_s: float = 0.0) -> None:
        self.step_s = step_s
        self.begun: list[str] = []
        self.options: list[SequenceOptions] = []
        self.open = 0
        self.resets = 0
        self.steps = 0
        self.fail: BaseException | None = None
        self.answers_fail_at: int | None = None
        self._steps_before = 0
        self.drafts = 0
        self.verified = np.zeros((1, 16), dtype=np.int64)
        self.accepted = np.zeros((1, 16), dtype=np.int64)
        self.prefixes_shared = False

    def begin(
        self, prompt: IntArray, sampler: ToySampler, max_tokens: int, max_draft: int, options: SequenceOptions
    ) -> ToyStream:
        self.options.append(options)
        self.begun.append(bytes(token for token in prompt.tolist() if token < END).decode("utf-8", "replace"))
        self.open += 1
        return ToyStream(prompt.tolist(), sampler, max_tokens, max_draft)

    def shares_more_later(self, prompt: IntArray, reading: Sequence[ToyStream]) -> bool:
        return self.prefixes_shared and any(s.prompt == prompt.tolist() for s in reading)

    def step(self, running: Sequence[ToyStream], reading: Sequence[ToyStream]) -> None:
        sleep(self.step_s)
        self.steps += 1
        if self.fail is not None:
            if self._steps_before:
                self._steps_before -= 1
            else:
                error, self.fail = self.fail, None
                raise error
        for stream in running:
            drafted = int(stream.max_draft > 0)
            self._emit(stream, 1 + drafted)
            stream.counters.steps += 1
            stream.counters.emitted_tokens += len(stream.fresh)
            stream.counters.draft_tokens += drafted
            stream.counters.accepted_tokens += len(stream.drafters)
            stream.counters.target_ns += PLAIN_NS + DRAFT_ROW_NS * drafted
        for stream in reading:
            stream.reading = False
            if (top := stream.sampler.sampling.prompt_logprobs) is not None:
                stream.prompt_logprobs = [
                    TokenLogprobs(-float(t), [(t, -float(t))] * min(top, 1)) for t in stream.prompt[1:]
                ]
            self._emit(stream, 1)

    def fail_after(self, steps: int, error: BaseException) -> None:
        """Let the step after that many more fail."""
        self.fail, self._steps_before = error, steps

    def finish(self, stream: ToyStream) -> None:
        stream.sampler.close()
        self.open -= 1

    def reset(self) -> None:
        self.resets += 1

    def _emit(self, stream: ToyStream, count: int) -> None:
        if self.answers_fail_at is not None and stream.position >= self.answers_fail_at:
            stream.failure = SpecplugError("the constraint is too complex")
        stream.fresh = []
        for _ in range(count):
            token = stream.prompt[stream.position] if stream.position < len(stream.prompt) else END
            stream.position += 1
            stream.fresh.append(token)
            ends = token == END or token in stream.sampler.sampling.stop_tokens
            if ends or stream.position == stream.max_tokens:
                stream.finish = "stop" if ends else "length"
                break
        stream.drafters = [0] * (len(stream.fresh) - 1)
        if stream.drafters:
            self.drafts += 1
            self.verified[0][0] += 1
            self.accepted[0][0] += 1
        top = stream.sampler.sampling.logprobs
        stream.logprobs = [] if top is None else [TokenLogprobs(-0.5, [(t, -0.5)] * min(top, 1)) for t in stream.fresh]


class ToyEngine:
    profile = Profile("toy")
    end_tokens = frozenset({END})
    source_names = ["suffix"]  # noqa: RUF012
    knows_plain_ms = True
    description = ModelDescription("toy.gguf", 1_700_000_000, 1000, 4000, 64, END + 1, 2, 8192, "", "<end>")

    def __init__(
        self,
        *,
        slots: int = 2,
        max_context: int = 4096,
        step_s: float = 0.0,
        datastore: Datastore | None = None,
        chat_template: str = "",
        control: Sequence[str] = (),
        fill_in_tokens: FillInTokens | None = None,
    ) -> None:
        """Corpora of the vocabulary and of a tokenizer that is all zeros fit.

        control  texts of control tokens, which prompts and so answers may contain
        """
        self.chat_template = chat_template
        self.fill_in_tokens = fill_in_tokens
        self._control = {text: END + 1 + index for index, text in enumerate(control)}
        self.free_control_tokens = frozenset(self._control.values())
        self.num_tokens = END + 1 + len(control)
        self.samplings: list[Sampling] = []
        self.slots = slots
        self.max_context = max_context
        self.kv_tokens = slots * max_context
        self.loop = ToyLoop(step_s)
        self.datastore = datastore

    def learned(self) -> dict[str, tuple[float, float]]:
        return {"toy": (3.0, 1.0)}

    def open_corpus(self, name: str) -> Corpus:
        manifest = check_files(place(name), name)
        if manifest.tokenizer != "0" * 64:
            raise UsageError(f"corpus {name}: another tokenizer")
        return open_corpus(name)

    def sampler(self, sampling: Sampling) -> ToySampler:
        """Checks constraints, and keeps none."""
        self.samplings.append(sampling)
        if sampling.grammar == "wrong":
            raise UsageError("the grammar does not parse: wrong")
        check_gbnf(sampling.grammar or "")
        grammar = grammar_text(sampling)
        return ToySampler(sampling, grammar.warnings if grammar is not None else ())

    chat_stops: tuple[str, ...] = ()

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> IntArray:
        marks = "|".join(f"({re.escape(mark)})" for mark in self._control if parse_special)
        parts = re.split(marks or "(?!)", text)
        control = self._control if parse_special else {}
        ids = [[control[part]] if part in control else list(part.encode()) for part in parts if part]
        return int_array([token for piece in ids for token in piece])

    def raw_prompt(self, text: str, *, parse_special: bool = True) -> IntArray:
        return self.tokenize(text, add_special=True, parse_special=parse_special)

    def control_token(self, text: str) -> int | None:
        return END if text == "<end>" else self._control.get(text)

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> IntArray:
        self.variables = dict(variables or {})
        return self.raw_prompt(messages[-1]["content"])

    def piece(self, token: int) -> bytes:
        return b"" if token >= END else bytes([token])

    def text(self, tokens: Sequence[int]) -> str:
        return b"".join(map(self.piece, tokens)).decode("utf-8", "replace")


@contextmanager
def serving(
    engine: Any,
    settings: Settings | None = None,
    *,
    key: str | None = None,
    limits: Limits | None = None,
    answer_store: AnswerStore | None = None,
    origins: tuple[str, ...] = (),
    port: int = 0,
) -> Iterator[str]:
    """Run the server of an engine in a thread, on a free port or on `port`; yields its URL."""
    app = make_app(engine, settings or Settings("toy"), has_key=key is not None, answer_store=answer_store)
    with running(app, key=key, limits=limits, origins=origins, port=port) as url:
        yield url


@contextmanager
def running(
    app: FastAPI,
    *,
    key: str | None = None,
    limits: Limits | None = None,
    origins: tuple[str, ...] = (),
    port: int = 0,
) -> Iterator[str]:
    """Run an application in a thread, on a free port or on `port`; yields its URL."""
    address = Address(key=key, origins=origins)
    config = connections(guarded(app, address, limits or Limits(body_seconds=1.0)), timeout_graceful_shutdown=1)
    config.port = port
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        sleep(0.01)
        assert thread.is_alive(), "the server did not start"
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
