"""llguidance's tokenizer of a model, made once from llama.cpp's own vocabulary.

Knows no grammar and no request. llguidance's helper for llama.cpp is not used: it treats tokens that a model's author
added as special where they look like tags, so that an answer could not contain them, and knows one end token.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Collection, Set
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import llama_cpp.llama_cpp as ll

if TYPE_CHECKING:
    from llguidance import LLTokenizer

_SPECIAL_MARK = b"\xff"
"""With this byte, which no UTF-8 text contains, llguidance expects special tokens to begin."""

_MAX_PIECE_BYTES = 1 << 16


class GuidanceTokenizer:
    """llguidance's tokenizer of one model, built at its first use or, after `begin`, in a thread of its own.

    State: 28 MB with a vocabulary of 49,152 tokens, 56 MB with 151,936, and none before it is built. Close it before
    the model: it tokenizes with llama.cpp's vocabulary.
    """

    def __init__(self, vocab: Any, num_tokens: int, end_tokens: Set[int]) -> None:
        """
        vocab       llama.cpp's pointer to the vocabulary
        end_tokens  all tokens that end an answer
        """
        self._vocab = vocab
        self._num_tokens = num_tokens
        self.end_tokens = end_tokens
        self._built: Future[LLTokenizer] | None = None
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Build it in a thread, if it is not being built already."""
        with self._lock:
            if self._built is None:
                self._built = Future()
                threading.Thread(target=self._build, args=(self._built,), name="guidance-tokenizer").start()

    def get(self) -> LLTokenizer:
        """The tokenizer; waits until it is built."""
        self.begin()
        built = self._built
        assert built is not None
        return built.result()

    def close(self) -> None:
        """Wait for the thread, and forget the tokenizer."""
        if self._built is not None:
            self._built.exception()
            self._built = None

    def _build(self, built: Future[LLTokenizer]) -> None:
        try:
            built.set_result(_build(self._vocab, self._num_tokens, self.end_tokens))
        except BaseException as error:  # whoever waits for the result raises it
            built.set_exception(error)


def _build(vocab: Any, num_tokens: int, end_tokens: Collection[int]) -> LLTokenizer:
    from llguidance import LLTokenizer  # takes 60 ms, which requests without a constraint need not spend

    first = ll.llama_vocab_eos(vocab)
    ends = [first, *sorted(set(end_tokens) - {first})] if first >= 0 else sorted(end_tokens)
    return LLTokenizer.from_llamacpp(  # type: ignore[attr-defined, no-any-return]
        tokens=vocabulary_bytes(vocab, num_tokens),
        vocab_ptr=vocab,
        tokenize_fptr=_address(ll.llama_tokenize),
        eos_token=ends,
        slices=None,
    )


def vocabulary_bytes(vocab: Any, num_tokens: int) -> list[bytes]:
    """The bytes of each token as llguidance expects them; control and unknown tokens begin with a mark.

    The functions are called without releasing the interpreter's lock: beside a thread that computes in Python, each
    of many thousands of calls would wait for the lock.
    """
    kinds = [ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32]
    text_of = ctypes.PYFUNCTYPE(*kinds, ctypes.c_char_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_bool)(
        _address(ll.llama_token_to_piece)
    )
    attributes_of = ctypes.PYFUNCTYPE(*kinds)(_address(ll.llama_vocab_get_attr))
    special = ll.LLAMA_TOKEN_ATTR_CONTROL | ll.LLAMA_TOKEN_ATTR_UNKNOWN
    buffer = ctypes.create_string_buffer(_MAX_PIECE_BYTES)
    pieces = []
    for token in range(num_tokens):
        size = text_of(vocab, token, buffer, len(buffer), 0, True)
        piece = ctypes.string_at(buffer, max(size, 0))
        pieces.append(_SPECIAL_MARK + piece if attributes_of(vocab, token) & special else piece)
    return pieces


def _address(function: Any) -> int:
    return int(ctypes.cast(function, ctypes.c_void_p).value or 0)
