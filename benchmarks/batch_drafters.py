"""Measures eight streams at once, cold, without drafts, with a profile, and with a model drafter beside it.

    python benchmarks/batch_drafters.py MODEL spec_bench.jsonl [--draft REF] [--method vocab_trim] [--profile default]
        [--limit 4] [--max-tokens 96] [--repeats 5]

The prompts of all kinds are answered in turns, eight at once; a slot that becomes free takes the next prompt at once.
Every repeat starts with nothing learned or cached; arms take turns. Prints Markdown: tokens per second of the batch
over those of other arms, with the median and the range over repeats; and the time to the first token, from taking a
slot, as a ratio of two arms for each prompt, of which the median over repeats is taken, and then the median and the
largest over the prompts.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from model_drafters import chosen_prompts, drafter, tell
from reporting import positive_int, run_benchmark, write

from specplug import profile
from specplug.bench.arms import plain
from specplug.core import IntArray
from specplug.engines.llama_cpp.drafters.opening import open_target
from specplug.engines.llama_cpp.engine import LlamaCpp
from specplug.engines.llama_cpp.measure import cost_points
from specplug.engines.llama_cpp.settings_choice import with_settings
from specplug.engines.llama_cpp.settings_table import label
from specplug.engines.llama_cpp.stream import Stream
from specplug.generation.answers import Sampling
from specplug.models.references import resolve
from specplug.profile.with_drafter import with_drafter

PLAIN, WITHOUT, WITH = "plain", "without", "with"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("workload")
    parser.add_argument("--draft")
    parser.add_argument("--method", default="draft_model")
    parser.add_argument("--profile", default="default")
    parser.add_argument("--slots", type=positive_int, default=8)
    parser.add_argument("--limit", type=positive_int, default=4)
    parser.add_argument("--max-tokens", type=positive_int, default=96)
    parser.add_argument("--repeats", type=positive_int, default=5)
    parser.add_argument("--json", type=Path)
    parser.set_defaults(run=compare)
    run_benchmark("batch_drafters.py", parser.parse_args())


@dataclass(frozen=True, slots=True)
class Batch:
    """One run over all prompts.

    rate        tokens per second, from the first prompt to the last token
    first       seconds to the first token, by prompt
    tokens      the answers
    drafted     verified draft tokens of the last proposer
    """

    rate: float
    first: list[float]
    tokens: list[list[int]]
    drafted: int


def compare(args: argparse.Namespace, document: dict[str, Any]) -> None:
    base = profile.load(args.profile)
    profiles = {WITHOUT: base}
    if args.draft:
        profiles[WITH] = with_drafter(base, drafter(args.method, args.draft, None), name=WITH)
    with ExitStack() as stack:
        model = stack.enter_context(open_target(resolve(args.model), profiles.values(), base.runtime, tell))
        base = with_settings(base, model, many=args.slots > 1)
        prompts = [
            model.chat_prompt([{"role": "user", "content": prompt.turns[0]}])
            for _, prompt in chosen_prompts(args.workload, args.limit, None)
        ]
        longest = -(-(max(map(len, prompts)) + args.max_tokens) // 256) * 256
        runtime = replace(base.runtime, context=longest)
        cost = cost_points(model, runtime, base.planner.max_nodes + args.slots, seconds=12.0)
        arms = {PLAIN: replace(plain(base), runtime=runtime)}
        arms |= {name: replace(one, runtime=runtime) for name, one in profiles.items()}
        engines = {
            name: stack.enter_context(LlamaCpp(model, one, slots=args.slots, cost=cost, notify=tell))
            for name, one in arms.items()
        }
        found: dict[str, list[Batch]] = defaultdict(list)
        for repeat in range(args.repeats):
            first = repeat % len(engines)
            names = list(engines)
            for name in names[first:] + names[:first]:
                engines[name].reset()
                found[name].append(answer_all(engines[name], prompts, args.max_tokens))
                print(f"repeat {repeat + 1}, {name}: {found[name][-1].rate:.1f} tokens/s", file=sys.stderr)
    print(f"{model.path.name}, {label(base.runtime)}, {base.runtime.threads} threads, profile {base.name};")
    print(
        f"{args.slots} at once, {len(prompts)} prompts, at most {args.max_tokens} new tokens, {args.repeats} repeats\n"
    )
    print(
        "| arm | tokens/s | of plain | of without | first token, of without | largest | answers as plain's | drafted |"
    )
    print("|---" * 8 + "|")
    rows = []
    for name, batches in found.items():
        ratios = [
            median(own.first[i] / other.first[i] for own, other in zip(batches, found[WITHOUT], strict=True))
            for i in range(len(prompts))
        ]
        same = sum(a == b for own, other in zip(batches, found[PLAIN], strict=True) for a, b in pairs(own, other))
        cells = [
            name,
            f"{median(batch.rate for batch in batches):.1f}",
            spread([own.rate / other.rate for own, other in zip(batches, found[PLAIN], strict=True)]),
            spread([own.rate / other.rate for own, other in zip(batches, found[WITHOUT], strict=True)]),
            f"{median(ratios):.2f}",
            f"{max(ratios):.2f}",
            f"{same} of {len(prompts) * args.repeats}",
            str(sum(batch.drafted for batch in batches)),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    print("\n".join(rows))
    write(args.json, document | {"rows": rows})


def answer_all(engine: LlamaCpp, prompts: list[IntArray], max_tokens: int) -> Batch:
    loop = engine.loop
    waiting = list(enumerate(prompts))[::-1]
    streams: dict[int, Stream] = {}
    began_at: dict[int, float] = {}
    first: dict[int, float] = {}
    tokens: list[list[int]] = [[] for _ in prompts]
    began = perf_counter()
    while waiting or streams:
        while waiting and len(streams) < engine.slots:
            index, prompt = waiting.pop()
            began_at[index] = perf_counter()
            streams[index] = loop.begin(prompt, engine.sampler(Sampling()), max_tokens, max_tokens)
        running = [stream for stream in streams.values() if not stream.reading]
        loop.step(running, [stream for stream in streams.values() if stream.reading])
        for index, stream in list(streams.items()):
            if stream.reading:
                continue
            first.setdefault(index, perf_counter() - began_at[index])
            tokens[index] += stream.fresh
            if stream.finish:
                loop.finish(streams.pop(index))
    seconds = perf_counter() - began
    drafted = int(loop.verified[-1].sum()) if engine.profile.speculates else 0
    return Batch(sum(map(len, tokens)) / seconds, [first[i] for i in range(len(prompts))], tokens, drafted)


def pairs(one: Batch, other: Batch) -> list[tuple[list[int], list[int]]]:
    return list(zip(one.tokens, other.tokens, strict=True))


def spread(ratios: list[float]) -> str:
    return f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


if __name__ == "__main__":
    main()
