"""Compares greedy answers of vLLM with every proposer, and with fusion, to those of vLLM without drafts.

    python benchmarks/vllm_equality.py --workload W.jsonl --limit 40 --max-tokens 128 --concurrency 1 4 16

Every draft is verified, whether it pays or not. The engines run one after the other in this process, and nothing is
timed. Prints, per concurrency and proposer, how many answers are equal, and how many draft tokens were accepted. The
exit code is 1 if an answer differs or a proposer had no token accepted.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence

from specplug.bench.workloads import Prompt, limit, load_workload
from specplug.engines.vllm.offline import open_vllm
from specplug.generation.answers import Answer, Request
from specplug.profile import PlannerSettings, Profile, VllmSettings
from specplug.registry import ProposerSpec

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "2",
}
"""Variables that vLLM reads at import: they keep the engine in this process, so that it can use both cores of a small
machine."""

ARMS = ("none", "ngram", "suffix", "token_recycling", "suffix+token_recycling", "ngram+suffix")


def main() -> None:
    options = _options()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    prompts = limit(load_workload(options.workload), options.limit)
    failed = False
    print(f"{len(prompts)} prompts, {options.max_tokens} tokens, greedy, {options.dtype}", flush=True)
    for concurrency in options.concurrency:
        plain = None
        for arm in ARMS:
            answers = _answers(_profile(arm, concurrency, options), prompts, options.max_tokens)
            tokens = [answer.tokens for answer in answers]
            plain = plain or tokens
            same = sum(one == other for one, other in zip(tokens, plain, strict=True))
            verified = sum(answer.counters.steps for answer in answers)
            accepted = sum(answer.counters.accepted_tokens for answer in answers)
            failed |= same < len(prompts) or (
                arm != "none" and not accepted
            )  # without accepted drafts nothing is shown
            print(
                f"{concurrency:2} at once, {arm:24} same {same} of {len(prompts)}, {sum(map(len, tokens))} tokens, "
                f"{accepted} draft tokens accepted in {verified} verifications",
                flush=True,
            )
    sys.exit(failed)


def _profile(arm: str, concurrency: int, options: argparse.Namespace) -> Profile:
    return Profile(
        name=arm.replace("+", "-"),
        engine="vllm",
        model=options.model,
        proposers=tuple(ProposerSpec(method) for method in arm.split("+")),
        planner=PlannerSettings(mode="static"),
        vllm=VllmSettings(
            num_speculative_tokens=5,
            max_num_seqs=concurrency,
            max_model_len=2048,
            dtype=options.dtype,
            enforce_eager=True,
        ),
    )


def _answers(one: Profile, prompts: Sequence[Prompt], max_tokens: int) -> list[Answer]:
    assert one.model is not None
    with open_vllm(one.model, one) as engine:
        requests = [
            Request(engine.chat_prompt([{"role": "user", "content": prompt.turns[0]}]), max_tokens)
            for prompt in prompts
        ]
        answers, _ = engine.generate_all(requests)
        del engine
    gc.collect()
    return answers


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--workload", default="builtin")
    parser.add_argument("--limit", type=int, default=40, help="prompts per category")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--dtype", default="float32")
    return parser.parse_args()


if __name__ == "__main__":
    main()
