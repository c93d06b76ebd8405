"""Converts a GGUF file to a Hugging Face checkpoint, for engines that load no GGUF, and caches the result.

It restores what transformers loses when it reads a GGUF: how the tokenizer splits text, and which tokens end an answer.
It downloads nothing and does not depend on the engine. Source of the tables: llama.cpp, src/llama-vocab.cpp.
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

from specplug.errors import EngineError, SpecplugError, UsageError
from specplug.machine.folders import cache_folder
from specplug.models.gguf_header import require_one_file
from specplug.models.references import check_gguf, resolve

DTYPES = ("float32", "bfloat16", "float16")

RECIPE = 1
"""The version of the conversion. It is raised when the same GGUF yields another checkpoint, so that none from an older
version is reused."""

PACKAGES = ("accelerate", "gguf", "torch", "transformers")
INSTALL = "pip install 'specplug[checkpoint]'"

DIGITS_APART = ("codeshell", "command-r", "exaone", "minerva-7b", "refact", "smollm", "starcoder")
"""Byte-level vocabularies whose text is split at every digit first; transformers would split it like GPT-2's."""

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
"""The texts of tokens that end an answer in llama.cpp, in addition to those that a GGUF names by id."""


def checkpoint_of(ref: str, dtype: str = "float32") -> Path:
    """The folder of a model's checkpoint, which is converted on first use and kept in the user's cache.

    A reference to a folder is returned as that folder. Each call reads the complete GGUF to detect a change, which
    takes 0.1 s per 100 MB.
    """
    source = resolve(ref)
    if source.is_dir():
        return source
    require_one_file(source)
    _check_dtype(source, dtype)
    try:
        with open(source, "rb") as file:
            content = file_digest(file, "sha256").hexdigest()
        name = sha256(f"{RECIPE} {dtype} {content}".encode()).hexdigest()[:16]
        out = cache_folder() / "checkpoints" / name
        if out.is_dir():
            return out
        out.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{out}.lock"):
            if not out.is_dir():
                # A killed process may have left partial folders; the lock guarantees that nobody still writes them.
                for leftover in out.parent.glob(f".{name}.*"):
                    rmtree(leftover, ignore_errors=True)
                dequantise(source, out, dtype)
    except OSError as error:
        raise SpecplugError(
            f"checkpoint of {ref}: the cache cannot be used ({error}); make room there, or set XDG_CACHE_HOME"
        ) from error
    return out


def dequantise(gguf: Path, out: Path, dtype: str = "float32") -> None:
    """Write config, weights in `dtype`, tokenizer and chat template to the folder `out`, completely or not at all.

    UsageError for a damaged file, an unknown dtype or a folder in use; EngineError where transformers cannot convert
    it.
    """
    _check_dtype(gguf, dtype)
    check_gguf(gguf)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out}: exists already; name a new folder")
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise EngineError(f"{gguf}: converting it needs {', '.join(missing)}, not installed; {INSTALL}")
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
        raise EngineError(f"{gguf}: cannot be converted ({error}); {INSTALL}") from error
    except Exception as error:  # transformers, torch and the disk raise errors of any type
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise EngineError(
            f"{gguf}: cannot be written as a checkpoint ({reason}); use its publisher's checkpoint"
        ) from error
    finally:
        rmtree(partial, ignore_errors=True)


def _check_dtype(gguf: Path, dtype: str) -> None:
    if dtype not in DTYPES:
        raise UsageError(f"{gguf}: dtype {dtype!r} is unknown; use one of {', '.join(DTYPES)}")


def _write(gguf: Path, partial: Path, dtype: str) -> None:
    from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedTokenizerFast
    from transformers.integrations.gguf import read_gguf_metadata

    alone = partial / "gguf"  # a separate folder, because transformers also reads other files beside the GGUF
    alone.mkdir()
    link = alone / "model.gguf"
    link.symlink_to(gguf.resolve())
    source: dict[str, Any] = {"gguf_file": str(link), "local_files_only": True}
    metadata, _ = read_gguf_metadata(str(link))
    with _quiet():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(alone, **source)
        _fix_tokenizer(gguf, tokenizer, metadata)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            alone, dtype=dtype, quantization_config=GgufConfig(dequantize=True), output_loading_info=True, **source
        )
        lost = sorted(map(str, [*loaded["missing_keys"], *loaded["mismatched_keys"]]))
        if lost:  # transformers fills them with random values and only logs a warning
            raise EngineError(f"{gguf}: transformers finds no {lost[0]} in it; use its publisher's checkpoint")
        model.generation_config.eos_token_id = _ends(tokenizer, metadata)
        model.save_pretrained(partial / "checkpoint")
        tokenizer.save_pretrained(partial / "checkpoint")


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the progress bars and warnings of transformers; errors are still raised."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logging.set_verbosity(level)


def _fix_tokenizer(gguf: Path, tokenizer: Any, metadata: dict[str, Any]) -> None:
    """Split text as llama.cpp does, and take over whether a text begins with a BOS token."""
    from tokenizers import pre_tokenizers

    if metadata.get("tokenizer.ggml.model") == "gpt2":
        split = metadata.get("tokenizer.ggml.pre", "default")
        if split in DIGITS_APART:
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        elif split not in KNOWN_SPLITS:
            raise EngineError(f"{gguf}: transformers does not split text like {split}; use its publisher's checkpoint")
    if "tokenizer.ggml.add_bos_token" in metadata:
        tokenizer.add_bos_token = metadata["tokenizer.ggml.add_bos_token"]
    for key in ("is_local", "local_files_only"):  # arguments of this call, which must not be saved with the tokenizer
        tokenizer.init_kwargs.pop(key, None)


def _ends(tokenizer: Any, metadata: dict[str, Any]) -> list[int]:
    """The token ids that end an answer; the model's own EOS token comes first."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    named = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    by_text = [vocabulary.get(token) for token in END_TOKENS]
    return list(dict.fromkeys(end for end in [*named, *by_text] if end is not None))
