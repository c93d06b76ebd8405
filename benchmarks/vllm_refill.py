"""Output tokens per second of vLLM with its places always filled: plain decoding and profiles, over the same prompts.

All prompts of a chunk are asked for at once and N are answered at a time; when one has ended, the next takes its place,
as on a server under load. Reading the prompts counts. Arms take turns chunk by chunk.

    python benchmarks/vllm_refill.py --profile P --profile vllm-builtin-ngram --workload W.jsonl --concurrency 4
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from specplug import profile
from specplug.answers import Request
from specplug.bench.arms import plain
from specplug.bench.statistics import Interval, paired_ratio
from specplug.bench.vllm_stage import as_first
from specplug.bench.workloads import load_workload
from specplug.engines.vllm.offline import open_vllm

FEW = 10
"""Categories with no more prompts than this are one kind, `talk`: the categories of MT-bench."""


def main() -> None:
    options = _options()
    bases = [replace(profile.load(ref), model=options.model) for ref in options.profile]
    shared = replace(bases[0].vllm, max_num_seqs=options.concurrency)
    own = [replace(base, vllm=as_first(base.vllm, shared)) for base in bases]
    asked = defaultdict(list)
    prompts = load_workload(options.workload)
    sizes = {kind: sum(p.category == kind for p in prompts) for kind in {p.category for p in prompts}}
    for prompt in prompts:
        kind = "talk" if sizes[prompt.category] <= FEW else prompt.category
        if len(asked[kind]) < (options.limit or len(prompts)):
            asked[kind].append(prompt.turns[0])
    chunks = [
        (kind, texts[start : start + options.chunk])
        for kind, texts in asked.items()
        for start in range(0, len(texts), options.chunk)
    ]
    with ExitStack() as stack:
        engines = {}
        for one in (replace(plain(own[0]), vllm=shared), *own):
            say(f"starting vLLM for {one.name}")
            engines[one.name] = stack.enter_context(
                open_vllm(options.model, one, say=say, engines=1 + len(own), max_num_seqs=options.concurrency)
            )
        seen: dict[str, dict[str, list[tuple[int, float]]]] = {name: defaultdict(list) for name in engines}
        same = dict.fromkeys(engines, 0)
        count = 0
        for number, (kind, texts) in enumerate(chunks):
            said: dict[str, list[list[int]]] = {}
            for place in range(len(engines)):
                name = list(engines)[(number + place) % len(engines)]
                engine = engines[name]
                requests = [
                    Request(engine.chat_prompt([{"role": "user", "content": text}]), options.max_tokens)
                    for text in texts
                ]
                engine.llm.reset_prefix_cache()
                began = perf_counter()
                answers, _ = engine.generate_all(requests)
                seconds = perf_counter() - began
                said[name] = [answer.tokens for answer in answers]
                seen[name][kind].append((sum(map(len, said[name])), seconds))
            count += len(texts)
            for name, tokens in said.items():
                same[name] += sum(one == two for one, two in zip(tokens, said["none"], strict=True))
            line = ", ".join(
                f"{name} {sum(t for t, _ in v[kind]) / sum(s for _, s in v[kind]):.1f}" for name, v in seen.items()
            )
            say(f"chunk {number + 1} of {len(chunks)}, {kind}: {line} tokens/s")
    report(seen, same, count, options)


def report(
    seen: dict[str, dict[str, list[tuple[int, float]]]], same: dict[str, int], count: int, options: argparse.Namespace
) -> None:
    kinds = list(seen["none"])
    print(f"{count} prompts, {options.max_tokens} tokens, {options.concurrency} at a time, chunks of {options.chunk}")
    print(f"{'arm':28} {'same':>9} {'all':>18}  " + "  ".join(f"{kind:>18}" for kind in kinds))
    figures = {}
    for name in seen:
        cells = [ratio(seen, name, kinds), *(ratio(seen, name, [kind]) for kind in kinds)]
        figures[name] = dict(zip(("all", *kinds), cells, strict=True))
        print(f"{name:28} {same[name]:4}/{count:4} " + "  ".join(f"{cell:>18}" for cell in cells))
    if options.json:
        options.json.write_text(json.dumps({"figures": figures, "same": same, "chunks": seen}, indent=1))


def ratio(seen: dict[str, dict[str, list[tuple[int, float]]]], name: str, kinds: list[str]) -> str:
    own = [pair for kind in kinds for pair in seen[name][kind]]
    base = [pair for kind in kinds for pair in seen["none"][kind]]
    found: Interval = paired_ratio(*map(list, zip(*own, strict=True)), *map(list, zip(*base, strict=True)))
    if len(own) < 2:
        return f"{found.median:.2f}"
    return f"{found.median:.2f} ({found.low:.2f}-{found.high:.2f})"


def say(text: str) -> None:
    print(text, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--profile", action="append", required=True)
    parser.add_argument("--workload", default="builtin")
    parser.add_argument("--limit", type=int, help="prompts of a kind")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--chunk", type=int, default=20)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
