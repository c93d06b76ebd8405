"""Writes the packaged model's tokenizer as Hugging Face's files. transformers' own reader of GGUF files needs torch."""

from pathlib import Path


def write_tokenizer(model: Path, folder: Path) -> Path:
    """For byte-level vocabularies that split every digit, such as SmolLM2's; returns `folder`."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(model).fields
    tokens, merges, kinds = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges", "token_type"))
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"
    vocabulary = {text: number for number, text in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # token types as GGUF numbers them
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True) for text, kind in zip(tokens, kinds, strict=True) if kind == control]
    )
    end = tokens[fields["tokenizer.ggml.eos_token_id"].contents()]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end).save_pretrained(folder)
    return folder
