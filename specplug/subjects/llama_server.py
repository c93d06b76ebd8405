"""Asking llama-server over its own interface, which reports token ids, times and counters.

Its template makes the prompt (`/apply-template`), its tokenizer the tokens (`/tokenize`), and `/completion` the answer,
so that all of a conversation's tokens are known. Source: tools/server/README.md of github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from time import perf_counter

from specplug.subjects.connection import Connection, Json
from specplug.subjects.heard import Extras, Heard, timings_of, top_of
from specplug.subjects.subject import Message, Question, Reply, SubjectError

COMPLETION, TEMPLATE, TOKENIZE = "/completion", "/apply-template", "/tokenize"

KEPT_PROMPTS = 256
"""Conversations whose prompt tokens are kept, so that the next request of one is sent at once."""

FINISHES = {"eos": "stop", "word": "stop", "limit": "length"}
"""OpenAI's names for llama-server's reasons of an end."""


class Completions:
    """Asks one llama-server. It keeps the prompt tokens of conversations, which several threads may use."""

    def __init__(self, connection: Connection, name: str, extras: Extras) -> None:
        """`name` is what messages call the server."""
        self._connection = connection
        self._name = name
        self._extras = extras
        self._prompts: OrderedDict[str, list[int]] = OrderedDict()
        self._lock = Lock()

    def ask(self, question: Question) -> Reply:
        """The tokens of a character that several tokens make are not all in the stream: see `Question.ids`."""
        heard = self.hear(question)
        heard.check(self._extras)
        complete = heard.tokens == len(heard.ids)
        if question.ids and not complete:
            body = _body(self.prompt(question.messages), question)
            heard.ids = self._connection.post(COMPLETION, body | {"stream": False}).wholes("tokens")
            complete = True
        return heard.reply(ids=complete)

    def hear(self, question: Question) -> Heard:
        """What arrives of one answer, of which nothing is demanded but its last event."""
        heard = Heard(self._name)
        heard.prompt_ids = prompt = self.prompt(question.messages)
        body = _body(prompt, question)
        prepared = perf_counter() - heard.asked_at  # other servers make the prompt within the request
        for event in self._connection.stream(COMPLETION, body | {"stream": True}, ends_with_done=False):
            answer = event.data
            heard.hear(prepared + event.seconds, answer.text("content"), answer.wholes("tokens"))
            heard.top += [top_of(one) for one in answer.parts("completion_probabilities")]
            if answer.fields.get("stop"):
                heard.finish = FINISHES.get(answer.text("stop_type"), "stop")
                heard.tokens = answer.whole("tokens_predicted")
                heard.timings = timings_of(answer)
        if not heard.finish:
            raise SubjectError(f"{self._name}: the stream of {COMPLETION} ended without its last event")
        return heard

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a conversation, as this server's template and tokenizer make them."""
        key = json.dumps([dict(message) for message in messages])
        with self._lock:
            if key in self._prompts:
                self._prompts.move_to_end(key)
                return self._prompts[key]
        text = self._connection.post(TEMPLATE, {"messages": json.loads(key)}).text("prompt")
        found = self._connection.post(TOKENIZE, {"content": text, "add_special": True, "parse_special": True})
        tokens = found.wholes("tokens")
        if not text or not tokens:
            raise SubjectError(
                f"{self._name}: {TEMPLATE} or {TOKENIZE} answered without a prompt; its version is unknown"
            )
        with self._lock:
            self._prompts[key] = tokens
            while len(self._prompts) > KEPT_PROMPTS:
                self._prompts.popitem(last=False)
        return tokens


def _body(prompt: list[int], question: Question) -> Json:
    return {
        "prompt": prompt,
        "n_predict": question.max_tokens,
        "temperature": 0,
        "return_tokens": True,
        "timings_per_token": False,
        **({"n_probs": question.top} if question.top else {}),
    }
