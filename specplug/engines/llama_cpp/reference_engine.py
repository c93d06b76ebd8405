"""llama-cpp-python's own generation, as a reference engine: timed like ours, and used for comparison only.

Uses the high-level `Llama` class, with and without its prompt lookup decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

from llama_cpp import Llama
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from specplug.core import IntArray
from specplug.engines.llama_cpp.context import KV_TYPES
from specplug.engines.llama_cpp.model import Model
from specplug.engines.llama_cpp.settings_choice import with_settings
from specplug.errors import EngineError
from specplug.generation.answers import Sampling
from specplug.profile import Profile

Generate = Callable[[IntArray, int], tuple[list[int], float]]


def open_peer(
    model: Model, profile: Profile, num_draft: int, sampling: Sampling
) -> tuple[Generate, Callable[[], None]]:
    """Returns a function from (prompt, token limit) to (tokens, seconds after the first token), and one that closes it.

    num_draft  tokens per draft of prompt lookup decoding; 0 for plain generation

    With drafts, `Llama` fails once a sequence is longer than n_batch, so n_batch is the full context here.
    """
    runtime = with_settings(profile, model).runtime
    if not model.way.repack:
        raise EngineError("llama-cpp-python's own engine repacks weights, which ends the process here; drop --peer")
    options: dict[str, Any] = {}
    if num_draft:
        options["draft_model"] = LlamaPromptLookupDecoding(num_pred_tokens=num_draft)
    llama = Llama(
        str(model.path),
        n_ctx=runtime.context,
        n_batch=runtime.context if num_draft else runtime.batch,
        n_ubatch=min(runtime.ubatch or runtime.batch, runtime.context),
        use_mmap=runtime.mmap,
        n_threads=runtime.threads,
        n_threads_batch=runtime.threads_batch or runtime.threads,
        n_gpu_layers=runtime.gpu_layers,
        flash_attn=runtime.flash_attention,
        type_k=KV_TYPES[str(runtime.kv_type)],
        type_v=KV_TYPES[str(runtime.kv_type)],
        seed=sampling.seed if sampling.seed is not None else -1,
        verbose=False,
        **options,
    )

    def generate(prompt: IntArray, max_tokens: int) -> tuple[list[int], float]:
        tokens: list[int] = []
        began = 0.0
        stream = llama.generate(
            prompt.tolist(),
            temp=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repeat_penalty=sampling.repeat_penalty,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
        )
        for token in stream:
            if not tokens:
                began = perf_counter()
            tokens.append(token)
            if token in model.end_tokens or len(tokens) == max_tokens:
                break
        seconds = perf_counter() - began
        stream.close()
        llama.reset()
        return tokens, seconds

    return generate, llama.close
