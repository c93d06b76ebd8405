"""The interface that an engine implements for the server of embeddings.

`specplug.engines.llama_cpp.embedding_engine.EmbeddingEngine` implements it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from specplug.core import IntArray
from specplug.generation.model_description import ModelDescription


class Embedder(Protocol):
    """A loaded embedding model.

    description   facts of its file
    num_tokens    size of the vocabulary
    width         numbers of a vector
    max_tokens    tokens of one text at most
    batch_tokens  tokens of all texts of a pass at most, `max_tokens` at least
    batch_texts   texts of a pass at most
    """

    description: ModelDescription
    num_tokens: int
    width: int
    max_tokens: int
    batch_tokens: int
    batch_texts: int

    def tokenize(self, text: str) -> IntArray:
        """int32[n]: a text with the tokens that the model expects around one. Any thread may call it."""

    def embed(self, texts: Sequence[IntArray]) -> npt.NDArray[np.float32]:
        """float32[len(texts), width]: the vectors, of length 1, of texts that fit into one pass; one call at a time."""
