"""Embeddings of texts with llama.cpp: several texts per pass, one vector per text.

Depends neither on HTTP nor on how requests are ordered. Vectors are pooled as the model's file says, or over all tokens
of a text where it says nothing, and have a length of 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as ll
import numpy as np
import numpy.typing as npt

from specplug.core import IntArray
from specplug.engines.llama_cpp.context import Context
from specplug.engines.llama_cpp.described_model import description_of
from specplug.engines.llama_cpp.model import Model, captured_log, load_model
from specplug.errors import SpecplugError, UsageError
from specplug.generation.model_description import ModelDescription
from specplug.machine.hardware import usable_cores
from specplug.profile import Runtime

MOST_TEXTS = 64
"""Texts of one pass at most."""

LEAST_BATCH = 512
"""Tokens of one pass at most, where a text may have fewer."""


class EmbeddingEngine:
    """One open model. Use it in a `with` statement; one thread at a time.

    max_tokens   tokens of one text at most
    batch_tokens tokens of all texts of a pass at most; batch_texts: texts of a pass at most
    """

    def __init__(self, path: Path, runtime: Runtime) -> None:
        """Raises UsageError, with llama.cpp's reason, where the model cannot be opened."""
        self.model: Model = load_model(path, runtime)
        try:
            self.max_tokens = min(runtime.context, self.model.train_context or runtime.context)
            self.batch_tokens = max(self.max_tokens, LEAST_BATCH)
            self.batch_texts = MOST_TEXTS
            self._context = self._open(runtime)
        except BaseException:
            self.model.close()
            raise
        self.description: ModelDescription = description_of(self.model)
        self.num_tokens = self.model.num_tokens
        self.width = int(ll.llama_model_n_embd_out(self.model.handle))

    def __enter__(self) -> EmbeddingEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self._context.close()
        self.model.close()

    def tokenize(self, text: str) -> IntArray:
        """int32[n]: a text with the tokens that the model expects around one."""
        return self.model.tokenize(text, parse_special=False)

    def embed(self, texts: Sequence[IntArray]) -> npt.NDArray[np.float32]:
        """float32[len(texts), width]: the vectors of texts (int32[n], n >= 1) that fit into one pass."""
        context = self._context
        context.clear_batch()
        for seq, text in enumerate(texts):
            context.add_span(text, 0, seq, wanted=True)
        if context.memory:
            context.clear()
            context.decode()
        else:
            context.encode_texts()
        vectors = np.stack([self._vector(seq) for seq in range(len(texts))])
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        normalised: npt.NDArray[np.float32] = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
        return normalised

    def _vector(self, seq: int) -> npt.NDArray[np.float32]:
        pointer = ll.llama_get_embeddings_seq(self._context.handle, seq)
        if not pointer:
            raise SpecplugError(f"llama.cpp has no vector of text {seq}")
        return np.ctypeslib.as_array(pointer, shape=(self.width,)).copy()

    def _open(self, runtime: Runtime) -> Context:
        params = ll.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = self.batch_tokens
        params.n_seq_max = self.batch_texts
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = runtime.threads or usable_cores()
        params.embeddings = True
        params.no_perf = True
        handle = self._context_of(params)
        if ll.llama_pooling_type(handle) == ll.LLAMA_POOLING_TYPE_NONE:
            ll.llama_free(handle)
            params.pooling_type = ll.LLAMA_POOLING_TYPE_MEAN
            handle = self._context_of(params)
        return Context(self.model, handle, num_ids=self.batch_texts, max_rows=1)

    def _context_of(self, params: Any) -> Any:
        with captured_log() as log:
            handle = ll.llama_init_from_model(self.model.handle, params)
        if not handle:
            raise UsageError(f"{self.model.path}: llama.cpp cannot open a context for embeddings: {log.reason()}")
        return handle
