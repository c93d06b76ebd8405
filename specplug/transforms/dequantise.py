"""Writes a GGUF as a Hugging Face checkpoint, for engines that load no GGUF, and keeps what was written.

Knows what transformers loses of a GGUF: how its tokenizer splits text, and which tokens end an answer.
Knows nothing of who loads the checkpoint, and downloads nothing.
Source of the tables: llama.cpp, src/llama-vocab.cpp.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from hashlib import file_digest, sha256
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

from filelock import FileLock
from platformdirs import user_cache_dir

from specplug.errors import EngineError, SpecplugError, UsageError
from specplug.models.references import check_gguf, resolve

DTYPES = ("float32", "bfloat16", "float16")

RECIPE = 1
"""Counts up when the same GGUF comes out differently, so that no older checkpoint is taken for a new one."""

PACKAGES = ("accelerate", "gguf", "torch", "transformers")
INSTALL = "pip install 'specplug[checkpoint]'"

DIGITS_APART = ("codeshell", "command-r", "exaone", "minerva-7b", "refact", "smollm", "starcoder")
"""Byte-level vocabularies whose text is split at every digit first. transformers splits them like GPT-2's."""

KNOWN_SPLITS = (
    "deepseek-r1-qwen", "falcon3", "gpt-2", "gpt-4o", "lfm2", "llama-bpe", "llama3", "llama4", "qwen2", "qwen35",
    "smaug-bpe", "tekken",
)  # fmt: skip
"""Byte-level vocabularies whose text transformers splits as llama.cpp does."""

END_TOKENS = (
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<end_of_turn>", "<turn|>",
    "<|return|>", "<|call|>", "<end_of_utterance>", "<|fim_pad|>", "<fim_pad>", "<|fim_repo|>", "<|repo_name|>",
    "<reponame>", "<|file_sep|>",
)  # fmt: skip
"""Tokens that end an answer in llama.cpp by their text, beside those that a GGUF names by number."""


def checkpoint_of(ref: str, dtype: str = "float32") -> Path:
    """The folder with a model's checkpoint: made on first use, kept in the user's cache; a folder is its own.

    Costs a read of the whole file each time, to be sure that it is the same: 0.1 s per 100 MB.
    """
    source = resolve(ref)
    if source.is_dir():
        return source
    _check_dtype(source, dtype)
    try:
        with open(source, "rb") as file:
            content = file_digest(file, "sha256").hexdigest()
        name = sha256(f"{RECIPE} {dtype} {content}".encode()).hexdigest()[:16]
        out = Path(user_cache_dir("specplug")) / "checkpoints" / name
        if out.is_dir():
            return out
        out.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{out}.lock"):
            if not out.is_dir():
                for leftover in out.parent.glob(f".{name}.*"):  # of a process that was killed; we hold the lock
                    rmtree(leftover, ignore_errors=True)
                dequantise(source, out, dtype)
    except OSError as error:
        raise SpecplugError(
            f"checkpoint of {ref}: the cache cannot be used ({error}); make room there, or set XDG_CACHE_HOME"
        ) from error
    return out


def dequantise(gguf: Path, out: Path, dtype: str = "float32") -> None:
    """Write config, weights in `dtype`, tokenizer and chat template to the folder `out`: whole, or not at all.

    UsageError for a damaged file, an unknown dtype or a folder in use; EngineError where transformers cannot do it.
    """
    _check_dtype(gguf, dtype)
    check_gguf(gguf)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out}: exists already; name a new folder")
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise EngineError(f"{gguf}: a checkpoint of it needs {', '.join(missing)}, not installed; {INSTALL}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as error:
        raise SpecplugError(f"{out}: cannot be written ({error.strerror or error}); name another folder") from error
    try:
        _write(gguf, partial, dtype)
        os.replace(partial / "checkpoint", out)
    except SpecplugError:
        raise
    except ImportError as error:
        raise EngineError(f"{gguf}: a checkpoint of it cannot be made ({error}); {INSTALL}") from error
    except Exception as error:  # whatever transformers, torch or the disk say
        found = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise EngineError(f"{gguf}: cannot be written as a checkpoint ({found}); take its publisher's own") from error
    finally:
        rmtree(partial, ignore_errors=True)


def _check_dtype(gguf: Path, dtype: str) -> None:
    if dtype not in DTYPES:
        raise UsageError(f"{gguf}: dtype {dtype!r} is unknown; use one of {', '.join(DTYPES)}")


def _write(gguf: Path, partial: Path, dtype: str) -> None:
    from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedTokenizerFast
    from transformers.integrations.gguf import read_gguf_metadata

    alone = partial / "gguf"  # in a folder of its own: transformers would also read what lies beside the file
    alone.mkdir()
    link = alone / "model.gguf"
    link.symlink_to(gguf.resolve())
    source: dict[str, Any] = {"gguf_file": str(link), "local_files_only": True}
    metadata, _ = read_gguf_metadata(str(link))
    with _quiet():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(alone, **source)
        _mend_tokenizer(gguf, tokenizer, metadata)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            alone, dtype=dtype, quantization_config=GgufConfig(dequantize=True), output_loading_info=True, **source
        )
        lost = sorted(map(str, [*loaded["missing_keys"], *loaded["mismatched_keys"]]))
        if lost:  # transformers has drawn them at random, and said so in a log
            raise EngineError(f"{gguf}: transformers finds no {lost[0]} in it; take its publisher's checkpoint")
        model.generation_config.eos_token_id = _ends(tokenizer, metadata)
        model.save_pretrained(partial / "checkpoint")
        tokenizer.save_pretrained(partial / "checkpoint")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and warnings of transformers; what goes wrong is raised."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logging.set_verbosity(level)


def _mend_tokenizer(gguf: Path, tokenizer: Any, metadata: dict[str, Any]) -> None:
    from tokenizers import pre_tokenizers

    if metadata.get("tokenizer.ggml.model") == "gpt2":
        split = metadata.get("tokenizer.ggml.pre", "default")
        if split in DIGITS_APART:
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        elif split not in KNOWN_SPLITS:
            raise EngineError(f"{gguf}: transformers does not split text like {split}; take its publisher's checkpoint")
    if "tokenizer.ggml.add_bos_token" in metadata:
        tokenizer.add_bos_token = metadata["tokenizer.ggml.add_bos_token"]
    for key in ("is_local", "local_files_only"):  # of this call, not of the tokenizer
        tokenizer.init_kwargs.pop(key, None)


def _ends(tokenizer: Any, metadata: dict[str, Any]) -> list[int]:
    """Token ids that end an answer, the model's own end first."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    named = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    by_text = [vocabulary.get(token) for token in END_TOKENS]
    return list(dict.fromkeys(end for end in [*named, *by_text] if end is not None))
