"""Compares drafting with plain decoding over long contexts, by kind of work.

    python benchmarks/rag_prompts.py MODEL --tokens 3500 --before builtin --limit 1 --out long.jsonl
    python benchmarks/long_context.py MODEL long.jsonl [--profile default] [--max-tokens 96] [--repeats 3]

Each prompt is read once; its cache is loaded for every arm and repeat, so that only the tokens after it are timed. Arms
answer in turns, and what they have learned is forgotten before each repeat. Both use the engine settings that the
profile gets on this machine. Prints Markdown: tokens per second over plain decoding's, with 95% intervals over answers;
repeats of a prompt count as answers, so where a kind has one prompt, its interval shows the noise of the runs.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from reporting import positive_int, run_benchmark, write

from specplug import profile
from specplug.bench.arms import ProfileArm, PromptStates, Result, plain
from specplug.bench.statistics import paired_ratio
from specplug.bench.workloads import load_workload
from specplug.engines.llama_cpp.model import open_model
from specplug.engines.llama_cpp.settings_choice import with_settings
from specplug.engines.llama_cpp.settings_table import label
from specplug.generation.answers import Sampling
from specplug.models.references import resolve
from specplug.tune.verdict import interval_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("workload")
    parser.add_argument("--profile", default="default")
    parser.add_argument("--threads", type=positive_int)
    parser.add_argument("--max-tokens", type=positive_int, default=96)
    parser.add_argument("--repeats", type=positive_int, default=3)
    parser.add_argument("--json", type=Path)
    parser.set_defaults(run=compare)
    run_benchmark("long_context.py", parser.parse_args())


def compare(args: argparse.Namespace, document: dict[str, Any]) -> None:
    found: dict[str, list[tuple[Result, Result]]] = defaultdict(list)
    with open_model(resolve(args.model)) as model, ExitStack() as stack:
        chosen = profile.load(args.profile)
        chosen = replace(chosen, runtime=replace(chosen.runtime, threads=args.threads or chosen.runtime.threads))
        chosen = with_settings(chosen, model)
        states = PromptStates()
        arms = []
        for one in (plain(chosen), chosen):
            arms.append(ProfileArm(model, one, Sampling(), prompts=states))
            stack.callback(arms[-1].close)
        work = [
            (prompt.category, model.chat_prompt([{"role": "user", "content": prompt.turns[0]}]))
            for prompt in load_workload(args.workload, category="prompt")
        ]
        for repeat in range(args.repeats):
            for arm in arms:
                arm.reset()
            for number, (category, prompt) in enumerate(work):
                order = [0, 1] if (repeat + number) % 2 else [1, 0]
                results = {place: arms[place].answer([prompt], args.max_tokens)[0] for place in order}
                if all(len(one.tokens) > 1 for one in results.values()):
                    found[category].append((results[0], results[1]))
                print(f"repeat {repeat + 1}, prompt {number + 1} of {len(work)}", file=sys.stderr)
    lengths = [len(prompt) for _, prompt in work]
    print(f"{model.path.name}, {label(chosen.runtime)}, {chosen.runtime.threads} threads, profile {chosen.name};")
    print(f"prompts of {min(lengths)} to {max(lengths)} tokens, at most {args.max_tokens} new tokens,")
    print(f"{args.repeats} repeats\n")
    print("| kind | tokens/s plain | tokens/s | tokens per pass | speedup (95%) | answers as plain's |")
    print("|---" * 6 + "|")
    rows = [*found.items(), ("all", [pair for pairs in found.values() for pair in pairs])]
    lines = [line(kind, pairs) for kind, pairs in rows if pairs]
    print("\n".join(lines))
    write(args.json, document | {"prompt_tokens": lengths, "rows": lines})


def line(kind: str, pairs: Sequence[tuple[Result, Result]]) -> str:
    """One row of the table; each pair is a plain answer and one with drafts to the same prompt."""
    tokens = [[len(one.tokens) - 1 for one in arm] for arm in zip(*pairs, strict=True)]
    seconds = [[one.seconds for one in arm] for arm in zip(*pairs, strict=True)]
    rates = [sum(tokens[arm]) / sum(seconds[arm]) for arm in (0, 1)]
    steps = sum(one.counters.steps for _, one in pairs if one.counters)
    same = sum(one.tokens == other.tokens for one, other in pairs)
    ratio = interval_text(paired_ratio(tokens[1], seconds[1], tokens[0], seconds[0]).as_mapping())
    cells = [
        kind,
        f"{rates[0]:.1f}",
        f"{rates[1]:.1f}",
        f"{sum(tokens[1]) / steps:.2f}",
        ratio,
        f"{same} of {len(pairs)}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
