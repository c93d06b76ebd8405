"""A vocabulary of single bytes and some pairs for llguidance, and walks along its masks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache, partial

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from specplug.constraints.grammar_text import GrammarText, limits
from specplug.engines.llama_cpp.guidance_grammar import Guidance
from specplug.engines.llama_cpp.token_matcher import TokenMatcher

PAIRS = [b'{"', b'":', b', "', b'": ', b'", "', b'"}', b"ab", b"tr", b"true", b"false", b"null", b"\\n", b"12"]
END, OTHER_END = 256 + len(PAIRS), 257 + len(PAIRS)
PIECES = [*(bytes([byte]) for byte in range(256)), *PAIRS]


class _Greedy:
    """Takes the longest token at each place."""

    eos_token_id = END
    bos_token_id = None
    tokens = [*PIECES, b"\xff<end>", b"\xff<other>"]  # noqa: RUF012
    special_token_ids = [END, OTHER_END]  # noqa: RUF012

    def __call__(self, text: str | bytes) -> list[int]:
        data = text.encode() if isinstance(text, str) else text
        found = []
        while data:
            token = max((t for t, piece in enumerate(PIECES) if data.startswith(piece)), key=lambda t: len(PIECES[t]))
            found.append(token)
            data = data[len(PIECES[token]) :]
        return found


@cache
def tokenizer() -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_Greedy()), eos_token=[END, OTHER_END])


def tokens_of(text: str) -> list[int]:
    return _Greedy()(text)


def text_of(tokens: Sequence[int]) -> str:
    return b"".join(PIECES[token] for token in tokens if token < END).decode("utf-8", "replace")


class _Built:
    """In place of `GuidanceTokenizer`, whose tokenizer is that of a model."""

    end_tokens = frozenset({END, OTHER_END})

    def begin(self) -> None: ...

    def close(self) -> None: ...

    def get(self) -> LLTokenizer:
        return tokenizer()


def guidance() -> Guidance:
    return Guidance(_Built())  # type: ignore[arg-type]


def matcher_of(grammar: GrammarText | None) -> TokenMatcher:
    """At the beginning of a text, also where the grammar allows none."""
    assert grammar is not None
    opened = LLMatcher(tokenizer(), grammar.text, log_level=0, limits=limits())
    return TokenMatcher(opened, {END, OTHER_END}, partial(guidance().style, grammar) if grammar.styled else None)


def allowed_tokens(matcher: TokenMatcher) -> list[int]:
    return np.flatnonzero(np.unpackbits(matcher.mask(), bitorder="little")).tolist()


def walk(matcher: TokenMatcher, seed: int, most: int = 400) -> str | None:
    """A text of random tokens that the masks allow; None if it has not ended after `most`."""
    chooser = random.Random(seed)
    taken: list[int] = []
    for _ in range(most):
        allowed = allowed_tokens(matcher)
        ends = [token for token in allowed if token >= END]
        # Strings are left as soon as possible, so that most walks end.
        closing = [token for token in allowed if token < END and PIECES[token][:1] in (b'"', b"}", b"]")]
        some = ends or (closing if closing and chooser.random() < 0.5 else allowed)
        token = chooser.choice(some)
        matcher.advance([token])
        if token >= END:
            return text_of(taken)
        taken.append(token)
    return None
