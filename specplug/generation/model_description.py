"""What a server tells of the model that it serves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """Facts of a model's file.

    file           its name, without the folder
    created        its last change, in seconds since 1970
    num_params     numbers of all weights
    num_bytes      bytes of all weights
    width          numbers of a hidden state
    num_tokens     size of the vocabulary
    vocab_type     llama.cpp's number for the kind of vocabulary
    train_context  tokens of the longest text that it was trained for
    begin_text, end_text
                   texts of the tokens that begin a text and end an answer; empty where there is none
    architecture   its name in llama.cpp; empty where the file does not tell
    weight_format  format of most weights, such as Q4_K_M; empty where the file does not tell
    """

    file: str
    created: int
    num_params: int
    num_bytes: int
    width: int
    num_tokens: int
    vocab_type: int
    train_context: int
    begin_text: str = ""
    end_text: str = ""
    architecture: str = ""
    weight_format: str = ""
