"""Conversations as prompts: the chat template of a model file, and the tokens of what it renders.

Text that somebody typed never becomes a control token: where a string contains the text of one, it is tokenized as
characters. Depends on a model's vocabulary and metadata, not on a context.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import llama_cpp.llama_cpp as ll
import numpy as np
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from specplug.core import IntArray, int_array
from specplug.errors import UsageError

Message = Mapping[str, Any]

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The template of models without one. Source: the format of OpenAI's ChatML."""

NO_TEMPLATE = "the model file has no chat template; conversations are written as ChatML"

_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Characters that no text needs: Unicode reserves them for use inside a program."""


class Vocabulary(Protocol):
    """What is used here of a `Model`."""

    vocab: Any
    num_tokens: int

    def meta(self, key: str) -> str | None: ...

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> IntArray: ...


class ChatTemplate:
    """Renders conversations. A template comes from the model file, so it runs in llama-cpp-python's sandboxed Jinja."""

    def __init__(self, model: Vocabulary) -> None:
        self._model = model
        self._own = model.meta("tokenizer.chat_template")

    @property
    def is_own(self) -> bool:
        """Whether the model file has a template; else conversations are written as ChatML."""
        return self._own is not None

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer. A model without a template may write that of ChatML as characters."""
        return () if self.is_own else ("<|im_end|>",)

    @property
    def text(self) -> str:
        """The template."""
        return self._own if self._own is not None else CHATML

    def prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
        *,
        answers: bool = True,
    ) -> IntArray:
        """int32[n]: a conversation. One that ends with a message of the assistant ends within that message.

        variables  further variables of the template, such as `enable_thinking`
        answers    end with the beginning of an answer
        Raises UsageError where the template fails.
        """
        texts = list(_strings([messages, tools, variables or {}]))
        mark = None
        if any(self._names_control(text) for text in texts):
            mark = next(one for one in _MARKS if not any(one in text for text in texts))
            given = (messages, tools, variables)
            messages, tools, variables = (_mapped(part, lambda text: self._marked(text, mark)) for part in given)
        rendered = self._rendered(messages, tools, variables or {}, answers)
        if mark is None:
            return self._model.tokenize(rendered, add_special=False, parse_special=True)
        return self._tokens(rendered, mark)

    def _rendered(
        self, messages: Sequence[Message], tools: Sequence[Message], variables: Mapping[str, Any], answers: bool
    ) -> str:
        begun = ""
        if answers and len(messages) > 1 and messages[-1].get("role") == "assistant":
            last = messages[-1]
            if not last.get("tool_calls"):
                messages, begun = messages[:-1], last.get("content") or ""
        try:
            formatter = self._answering if answers else self._closed
            text: str = formatter(messages=list(messages), tools=list(tools) or None, **variables).prompt
        except Exception as error:  # a template can raise any exception
            raise UsageError(f"the model's chat template failed: {error}") from error
        return text + begun

    @cached_property
    def message_token(self) -> int | None:
        """The token with which every message of a chat begins; None where the template has none."""
        if not self.is_own:
            return None
        messages = [{"role": "user", "content": "a"}]
        with contextlib.suppress(UsageError, IndexError):
            asked, message = self.prompt(messages), self.prompt(messages, answers=False)
            token = int(asked[len(message)])
            if np.array_equal(asked[: len(message)], message) and token in message:
                return token
        return None

    # -- text of control tokens that somebody typed -----------------------------------------------------------------

    def _names_control(self, text: str) -> bool:
        """Whether a text contains that of a control token: only then does parsing them make a difference."""
        model = self._model
        parsed = model.tokenize(text, add_special=False, parse_special=True)
        return len(text) > 1 and parsed.tolist() != model.tokenize(text, add_special=False).tolist()

    def _marked(self, text: str, mark: str) -> str:
        """The text with a mark within every text of a control token."""
        return self._control_texts.sub(lambda found: found[0][0] + mark + found[0][1:], text)

    def _tokens(self, rendered: str, mark: str) -> IntArray:
        """The tokens of a rendered text: as llama.cpp divides it, but for the texts with a mark, which are characters.

        Source: `tokenizer_st_partition` (github.com/ggml-org/llama.cpp, src/llama-vocab.cpp).
        """
        parts = self._control_texts.split(rendered)
        controls = self._control_texts.findall(rendered)
        tokens: list[int] = []
        for place, part in enumerate(parts):
            if place and self._attribute(controls[place - 1]) & ll.LLAMA_TOKEN_ATTR_RSTRIP:
                part = part.lstrip()
            if place < len(controls) and self._attribute(controls[place]) & ll.LLAMA_TOKEN_ATTR_LSTRIP:
                part = part.rstrip()
            if part:
                tokens += self._model.tokenize(part.replace(mark, ""), add_special=False).tolist()
            if place < len(controls):
                tokens.append(self._control_ids[controls[place]])
        return int_array(tokens)

    def _attribute(self, text: str) -> int:
        return int(ll.llama_vocab_get_attr(self._model.vocab, self._control_ids[text]))

    @cached_property
    def _control_ids(self) -> dict[str, int]:
        """The tokens that only parsing finds, by their text."""
        vocab, parsed = self._model.vocab, ll.LLAMA_TOKEN_ATTR_CONTROL | ll.LLAMA_TOKEN_ATTR_UNKNOWN
        ids = [token for token in range(self._model.num_tokens) if ll.llama_vocab_get_attr(vocab, token) & parsed]
        texts = [(ll.llama_vocab_get_text(vocab, token).decode("utf-8", "replace"), token) for token in ids]
        return {text: token for text, token in texts if len(text) > 1}

    @cached_property
    def _control_texts(self) -> re.Pattern[str]:
        """Matches the text of any control token, the longest that begins at a place."""
        texts = sorted(self._control_ids, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts)) or r"(?!)")

    # -- the template -----------------------------------------------------------------------------------------------

    @cached_property
    def _answering(self) -> Jinja2ChatFormatter:
        return self._formatter(answers=True)

    @cached_property
    def _closed(self) -> Jinja2ChatFormatter:
        return self._formatter(answers=False)

    def _formatter(self, *, answers: bool) -> Jinja2ChatFormatter:
        vocab = self._model.vocab
        return Jinja2ChatFormatter(
            template=self.text,
            eos_token=self._token_text(ll.llama_vocab_eos(vocab)),
            bos_token=self._token_text(ll.llama_vocab_bos(vocab)),
            add_generation_prompt=answers,
        )

    def _token_text(self, token: int) -> str:
        text = ll.llama_vocab_get_text(self._model.vocab, token) if token >= 0 else b""
        return text.decode("utf-8", "replace") if text else ""


def _strings(value: Any) -> Iterator[str]:
    """All strings in a nested value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _strings(key)
            yield from _strings(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from _strings(inner)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of a nested value with all its strings changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_mapped(key, change): _mapped(inner, change) for key, inner in value.items()}
    if isinstance(value, Sequence):
        return [_mapped(inner, change) for inner in value]
    return value
