"""What a server tells of an open model: facts of its file, and its tokens for fill-in-the-middle.

Reads llama.cpp's model and vocabulary; computes nothing with them.
"""

from __future__ import annotations

import llama_cpp.llama_cpp as ll
from gguf import LlamaFileType

from specplug.engines.llama_cpp.model import Model
from specplug.generation.fill_in import FillInTokens
from specplug.generation.model_description import ModelDescription

NONE = -1
"""llama.cpp's id for a token that a vocabulary lacks."""


def description_of(model: Model) -> ModelDescription:
    return ModelDescription(
        file=model.path.name,
        created=int(model.path.stat().st_mtime),
        num_params=int(ll.llama_model_n_params(model.handle)),
        num_bytes=model.num_bytes,
        width=model.width,
        num_tokens=model.num_tokens,
        vocab_type=int(ll.llama_vocab_type(model.vocab)),
        train_context=model.train_context,
        begin_text=_text(model, ll.llama_vocab_bos(model.vocab)),
        end_text=_text(model, ll.llama_vocab_eos(model.vocab)),
        architecture=model.meta("general.architecture") or "",
        weight_format=_weight_format(model.meta("general.file_type") or ""),
    )


def fill_in_tokens_of(model: Model) -> FillInTokens | None:
    """The tokens by which a model was trained to fill in; None where one of the three that are needed is missing."""
    vocab = model.vocab
    prefix, suffix, middle = (
        read(vocab) for read in (ll.llama_vocab_fim_pre, ll.llama_vocab_fim_suf, ll.llama_vocab_fim_mid)
    )
    if NONE in (prefix, suffix, middle):
        return None
    repository, file = ll.llama_vocab_fim_rep(vocab), ll.llama_vocab_fim_sep(vocab)
    return FillInTokens(
        prefix,
        suffix,
        middle,
        None if repository == NONE else repository,
        None if file == NONE else file,
        ll.llama_vocab_bos(vocab) if ll.llama_vocab_get_add_bos(vocab) else None,
    )


def _weight_format(file_type: str) -> str:
    """The name of llama.cpp's number for the format of a file."""
    known: dict[str, str] = {str(one.value): one.name for one in LlamaFileType}
    return known.get(file_type, "").removeprefix("MOSTLY_").removeprefix("ALL_")


def _text(model: Model, token: int) -> str:
    text = ll.llama_vocab_get_text(model.vocab, token) if token != NONE else None
    return text.decode("utf-8", "replace") if text else ""
