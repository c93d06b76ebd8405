"""The weights and the vocabulary: opening a GGUF file, tokens to text and back.

Wraps llama.cpp's model functions, and does not depend on a context, a KV cache or drafts.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import llama_cpp._logger as llama_logger
import llama_cpp.llama_cpp as ll
import numpy as np

from specplug.core import IntArray
from specplug.engines.llama_cpp.chat_template import ChatTemplate, Message
from specplug.engines.llama_cpp.guidance_grammar import Guidance
from specplug.engines.llama_cpp.guidance_tokenizer import GuidanceTokenizer
from specplug.engines.llama_cpp.library_check import WAYS, Way, check_model
from specplug.errors import SpecplugError, UsageError
from specplug.profile import Runtime

LOG_LEVEL_ERROR, LOG_LEVEL_CONTINUED = 4, 5
"""Levels that ggml's log callback receives: for errors, and for the rest of a line that was begun. 3 is a warning."""


def open_model(
    path: Path,
    runtime: Runtime | None = None,
    notify: Callable[[str], None] | None = None,
    *,
    mtp: bool = False,
    head: bool = False,
) -> Model:
    """Open a GGUF file with the settings for weights in `runtime`, or with llama.cpp's own, after `check_model`.

    mtp   load its MTP layers, too
    head  it is a head or an MTP layer without a model, which decodes nothing alone
    Raises UsageError, with llama.cpp's reason, when it cannot be loaded, and EngineError for a faulty library.
    """
    runtime = runtime or Runtime()
    if not ll.llama_supports_gpu_offload():
        runtime = replace(runtime, gpu_layers=0)
    return load_model(path, runtime, check_model(path, runtime, notify, head=head), mtp=mtp)


def load_model(path: Path, runtime: Runtime, way: Way = WAYS[0], *, mtp: bool = False) -> Model:
    """As `open_model`, without trying the library first; `way` is what it can do."""
    llama_logger.set_verbose(False)
    ll.llama_backend_init()
    params = ll.llama_model_default_params()
    params.n_gpu_layers = runtime.gpu_layers if runtime.gpu_layers >= 0 else 0x7FFFFFFF
    params.use_extra_bufts = runtime.repack and way.repack
    if not runtime.mmap:
        params.load_mode = ll.LLAMA_LOAD_MODE_NONE
    params.load_mtp = mtp
    with captured_log() as log:
        handle = ll.llama_model_load_from_file(os.fsencode(path), params)
    if not handle:
        raise UsageError(f"{path}: llama.cpp cannot load this model: {log.reason()}")
    return Model(path, handle, way, has_mtp=mtp)


class Model:
    """One opened GGUF file. Close it, or use it in a `with` statement."""

    def __init__(self, path: Path, handle: Any, way: Way = WAYS[0], *, has_mtp: bool = False) -> None:
        """`handle` is llama.cpp's pointer to the model; `way` is what the library can do with it.

        has_mtp  whether its MTP layers are loaded
        """
        self.path = path
        self.way = way
        self.has_mtp = has_mtp
        self.handle = handle
        self.vocab = ll.llama_model_get_vocab(self.handle)
        self.num_tokens: int = ll.llama_vocab_n_tokens(self.vocab)
        self.train_context: int = ll.llama_model_n_ctx_train(self.handle)
        self.end_tokens = frozenset(t for t in range(self.num_tokens) if ll.llama_vocab_is_eog(self.vocab, t))
        self.guidance = Guidance(GuidanceTokenizer(self.vocab, self.num_tokens, self.end_tokens))
        """For constraints."""
        self._pieces: dict[int, bytes] = {}

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.guidance.close()
        if self.handle:
            with captured_log():
                ll.llama_model_free(self.handle)
            self.handle = None

    @property
    def description(self) -> str:
        """For example `llama 134.52M BF16`."""
        buffer = ctypes.create_string_buffer(256)
        ll.llama_model_desc(self.handle, buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace")

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights."""
        return int(ll.llama_model_size(self.handle))

    @property
    def attention_width(self) -> int:
        """Numbers of all attention heads of all layers: the work per cached token."""
        return self.num_layers * self.width

    @property
    def width(self) -> int:
        """Numbers of a hidden state."""
        return int(ll.llama_model_n_embd(self.handle))

    @property
    def num_layers(self) -> int:
        return int(ll.llama_model_n_layer(self.handle))

    @property
    def is_full_precision(self) -> bool:
        """Whether most weights have 16 or 32 bits (f32, f16 or bf16 files)."""
        return self.meta("general.file_type") in ("0", "1", "32")

    @property
    def has_recurrent_memory(self) -> bool:
        """Whether some layers keep a state instead of cells, so that tokens cannot be taken back."""
        return bool(ll.llama_model_is_recurrent(self.handle) or ll.llama_model_is_hybrid(self.handle))

    @property
    def attends_to_window(self) -> bool:
        """Whether some layers attend to recent tokens only, or to those of the same chunk."""
        return bool(ll.llama_model_n_swa(self.handle) > 0)

    def is_control(self, token: int) -> bool:
        """Whether a token prints nothing and separates turns or documents."""
        return bool(ll.llama_vocab_is_control(self.vocab, token))

    def meta(self, key: str) -> str | None:
        """A metadata value of the GGUF file as text; None where the key is missing."""
        size = ll.llama_model_meta_val_str(self.handle, key.encode(), ctypes.create_string_buffer(1), 1)
        if size < 0:
            return None
        buffer = ctypes.create_string_buffer(size + 1)
        ll.llama_model_meta_val_str(self.handle, key.encode(), buffer, size + 1)
        return buffer.value.decode("utf-8", "replace")

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> IntArray:
        """int32[n]: the tokens of a text.

        add_special    add the special tokens that the model expects around a text, such as BOS
        parse_special  turn the text of control tokens into those tokens, as in rendered chat templates
        """
        data = text.encode("utf-8")
        buffer = (ctypes.c_int32 * (len(data) + 8))()
        count = ll.llama_tokenize(self.vocab, data, len(data), buffer, len(buffer), add_special, parse_special)
        if count < 0:
            raise SpecplugError(f"llama.cpp cannot tokenize a text of {len(data)} bytes: it reports {-count} tokens")
        return np.array(buffer[:count], dtype=np.int32)

    def raw_prompt(self, text: str, *, parse_special: bool = True) -> IntArray:
        """int32[n]: a text to continue, with the tokens that the model expects around one, such as BOS, once."""
        tokens = self.tokenize(text, parse_special=parse_special)
        begins_twice = len(tokens) > 1 and tokens[0] == tokens[1] == ll.llama_vocab_bos(self.vocab)
        return tokens[1:] if begins_twice else tokens

    def control_token(self, text: str) -> int | None:
        """The control token whose text this is; None where there is none."""
        tokens = self.tokenize(text, add_special=False, parse_special=True)
        return int(tokens[0]) if len(tokens) == 1 and self.is_control(int(tokens[0])) else None

    def piece(self, token: int) -> bytes:
        """The bytes that `token` prints: sometimes a part of a character, and none for control tokens."""
        piece = self._pieces.get(token)
        if piece is None:
            buffer = ctypes.create_string_buffer(128)
            size = ll.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, False)
            if size < 0:
                buffer = ctypes.create_string_buffer(-size)
                size = ll.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, False)
            piece = self._pieces[token] = buffer.raw[:size]
        return piece

    def text(self, tokens: Sequence[int]) -> str:
        """The text that the tokens print; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.piece, tokens)).decode("utf-8", "replace")

    @cached_property
    def free_control_tokens(self) -> frozenset[int]:
        """The control tokens that do not end an answer."""
        return frozenset(token for token in range(self.num_tokens) if self.is_control(token)) - self.end_tokens

    @cached_property
    def chat(self) -> ChatTemplate:
        """How conversations become prompts."""
        return ChatTemplate(self)

    def chat_prompt(self, messages: Sequence[Message]) -> IntArray:
        """int32[n]: a conversation in the model's own chat template, ready for the answer."""
        try:
            return self.chat.prompt(messages)
        except UsageError as error:
            raise UsageError(f"{self.path}: {error}; use --raw") from error


_PREFIXES = re.compile(r"^(?:(?:\w+_\w+|error loading model[\w ]*): )+")
"""Names of functions, and what every failed opening says."""


class CapturedLog:
    """The errors that llama.cpp logs while a call runs."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self._in_error = False
        self.callback = ll.llama_log_callback(self._take)

    def reason(self) -> str:
        """The first error line without llama.cpp's function names."""
        for line in self.errors:
            text = _PREFIXES.sub("", line).strip()
            if text:
                return text
        return "no reason given"

    def _take(self, level: int, text: bytes, _user: object) -> None:
        part = text.decode("utf-8", "replace")
        if level == LOG_LEVEL_CONTINUED:
            if self._in_error:
                self.errors[-1] += part
            return
        self._in_error = level == LOG_LEVEL_ERROR
        if self._in_error:
            self.errors.append(part)


@contextlib.contextmanager
def captured_log() -> Iterator[CapturedLog]:
    """Keep llama.cpp's log lines off stderr while the block runs, and delay Ctrl-C until it ends.

    llama.cpp calls back into Python for every line, and ctypes would discard a KeyboardInterrupt that is raised there.
    """
    log = CapturedLog()
    with _interrupts_delayed():
        ll.llama_log_set(log.callback, ctypes.c_void_p(0))
        try:
            yield log
        finally:
            ll.llama_log_set(llama_logger.llama_log_callback, ctypes.c_void_p(0))


@contextlib.contextmanager
def _interrupts_delayed() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield  # Ctrl-C raises nothing in this thread
        return
    received: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if received:
            signal.raise_signal(signal.SIGINT)


_STDERR = threading.Lock()
"""Held while stderr is redirected, since all threads share it."""


@contextlib.contextmanager
def captured_stderr() -> Iterator[list[str]]:
    """The lines that C code prints to stderr while the block runs, filled when it ends.

    For messages that llama.cpp prints without its log callback. Needs neither a folder to write to nor an open stderr.
    """
    lines: list[str] = []
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
    with _STDERR, _memory_file() as file:
        try:
            saved_stderr = os.dup(2)
        except OSError:
            saved_stderr = None  # it is closed
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            if saved_stderr is None:
                os.close(2)
            else:
                os.dup2(saved_stderr, 2)
                os.close(saved_stderr)
            file.seek(0)
            lines += file.read().decode("utf-8", "replace").splitlines()


def _memory_file() -> IO[bytes]:
    """A file in memory; where the system has none, a temporary file, or the null device, which keeps nothing."""
    try:
        return open(os.memfd_create("stderr"), "w+b")
    except (AttributeError, OSError):
        with contextlib.suppress(OSError):
            return tempfile.TemporaryFile()
    return open(os.devnull, "rb+", buffering=0)
