"""Measures the mean acceptance length in vLLM when a model drafts for itself with a trimmed head.

    python benchmarks/vllm_trimmed_acceptance.py CHECKPOINT --rows 16384 --workload W.jsonl --limit 2
    python benchmarks/vllm_trimmed_acceptance.py CHECKPOINT --ids DRAFTER/ids.npy --workload W.jsonl --limit 2

Decoding is greedy, and nothing is timed. The kept ids determine the result, not the engine, so that it can be compared
with llama.cpp's for the same weights and ids. Prints a JSON document with figures overall and per category.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from specplug.bench.workloads import limit, load_workload
from specplug.core import IntArray
from specplug.engines.vllm.located_model import located_model
from specplug.engines.vllm.offline import open_vllm
from specplug.generation.answers import Answer, Request
from specplug.profile import Profile, VllmSettings
from specplug.registry import ProposerSpec
from specplug.transforms.checkpoint_head import trim, vocabulary
from specplug.transforms.kept_ids import by_size

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
"""Variables that vLLM reads at import: they keep the engine in this process, so that it can use both cores of a small
machine."""


def main() -> None:
    options = _options()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    checkpoint = located_model(options.checkpoint)
    ids = np.load(options.ids) if options.ids else _first(checkpoint, options.rows)
    prompts = limit(load_workload(options.workload), options.limit)
    with TemporaryDirectory() as folder:
        drafter = Path(folder) / "drafter"
        trim(checkpoint, ids, drafter)
        profile = Profile(
            name="trimmed",
            engine="vllm",
            proposers=(ProposerSpec("vocab_trim", {"model": str(drafter)}),),
            vllm=VllmSettings(
                num_speculative_tokens=options.k,
                max_num_seqs=options.concurrency,
                max_model_len=options.context,
                dtype=options.dtype,
                enforce_eager=True,
            ),
        )
        with open_vllm(str(checkpoint), profile) as engine:
            turns = [engine.chat_prompt([{"role": "user", "content": prompt.turns[0]}]) for prompt in prompts]
            answers, _ = engine.generate_all([Request(turn, options.max_tokens) for turn in turns])
    by_category: defaultdict[str, list[Answer]] = defaultdict(list)
    for prompt, answer in zip(prompts, answers, strict=True):
        by_category[prompt.category].append(answer)
    document = {
        "model": options.checkpoint,
        "dtype": options.dtype,
        "rows": len(ids),
        "k": options.k,
        "max_tokens": options.max_tokens,
        "workload": options.workload,
        **_figures(answers, ids),
        "categories": {name: _figures(some, ids) for name, some in sorted(by_category.items())},
    }
    print(json.dumps(document, indent=1))


def _figures(answers: list[Answer], ids: IntArray) -> dict[str, float]:
    """The figures of some answers. `kept` is the share of their tokens that have a row."""
    passes = sum(answer.counters.steps for answer in answers)
    emitted = sum(answer.counters.emitted_tokens for answer in answers)
    tokens = np.concatenate([answer.tokens for answer in answers])
    return {
        "prompts": len(answers),
        "tokens": emitted,
        "passes": passes,
        "mean_acceptance_length": round(emitted / passes, 4),
        "kept": round(float(np.isin(tokens, ids).mean()), 4),
    }


def _first(checkpoint: Path, rows: int) -> IntArray:
    """The first `rows` ids of the vocabulary and those always kept; vocabularies list frequent tokens first."""
    known = vocabulary(checkpoint)
    return by_size(np.zeros(len(known.pieces), np.int64), known.always_kept(), rows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", help="a Hugging Face folder, or demo:NAME")
    parser.add_argument("--rows", type=int, default=16384, help="keep this many ids, the first of the vocabulary")
    parser.add_argument("--ids", type=Path, help="the kept ids of a drafter, in place of --rows")
    parser.add_argument("--workload", default="builtin")
    parser.add_argument("--limit", type=int, default=2, help="prompts per category")
    parser.add_argument("--k", type=int, default=3, help="tokens per draft")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--dtype", default="float32")
    return parser.parse_args()


if __name__ == "__main__":
    main()
