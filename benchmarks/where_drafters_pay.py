"""Says from measured costs where a drafter would pay, by kind of work.

    python benchmarks/where_drafters_pay.py MODEL spec_bench.jsonl --draft SMALL.gguf [--limit 4] [--max-tokens 96]

The model answers without drafts. One pass of the drafter over each answer shows how often its likeliest token is the
model's (agreement). Prints T(n), the drafter's step and its reading speed, then per kind the agreement, the share of
decoding that chains of the best fixed length would save, and the length of an answer from which that repays reading
the prompt; then the step below which the drafter would pay at all.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from model_drafters import chosen_prompts, tell
from reporting import positive_int, run_benchmark, write

from specplug import profile
from specplug.bench.arms import plain
from specplug.core import int_array
from specplug.engines.llama_cpp.drafters.model_drafter import ModelDrafter
from specplug.engines.llama_cpp.drafters.opening import open_target
from specplug.engines.llama_cpp.drafters.recorded_guesses import recorded_guesses
from specplug.engines.llama_cpp.engine import LlamaCpp
from specplug.engines.llama_cpp.measure import cost_points
from specplug.engines.llama_cpp.settings_choice import with_settings
from specplug.engines.llama_cpp.settings_table import label
from specplug.generation.answers import Request
from specplug.models.references import resolve
from specplug.profile import PlannerSettings
from specplug.profile.with_drafter import with_drafter
from specplug.registry import ProposerSpec

CONTEXT = 256
"""Tokens in the cache at which costs are compared."""

SHOWN = (1, 2, 3, 4, 6, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("workload")
    parser.add_argument("--draft", required=True)
    parser.add_argument("--method", default="draft_model")
    parser.add_argument("--limit", type=positive_int, default=4)
    parser.add_argument("--max-tokens", type=positive_int, default=96)
    parser.add_argument("--json", type=Path)
    parser.set_defaults(run=predict)
    run_benchmark("where_drafters_pay.py", parser.parse_args())


def predict(args: argparse.Namespace, document: dict[str, Any]) -> None:
    small = ProposerSpec(args.method, {"model": args.draft})
    drafting = replace(with_drafter(profile.load("none"), small), planner=PlannerSettings(max_nodes=8))
    right: dict[str, list[bool]] = defaultdict(list)
    lengths: dict[str, list[int]] = defaultdict(list)
    with ExitStack() as stack:
        model = stack.enter_context(open_target(resolve(args.model), [drafting], drafting.runtime, tell))
        drafting = with_settings(drafting, model)
        cost = cost_points(model, drafting.runtime, 9, seconds=12.0)
        target = stack.enter_context(LlamaCpp(model, plain(drafting)))
        engine = stack.enter_context(LlamaCpp(model, drafting, cost=cost))
        (drafter,) = engine.speculator.fusion.sources
        assert isinstance(drafter, ModelDrafter)
        work = chosen_prompts(args.workload, args.limit, None)
        for number, (kind, prompt) in enumerate(work, start=1):
            asked = model.chat_prompt([{"role": "user", "content": prompt.turns[0]}])
            answer = target.generate(Request(asked, args.max_tokens))
            tokens = int_array(answer.tokens)
            guesses = recorded_guesses(drafter, asked, tokens, 1)
            right[kind] += (guesses.tokens == tokens[1:]).tolist()
            lengths[kind].append(len(asked))
            print(f"{number} of {len(work)}", file=sys.stderr)
        planner, ms = engine.speculator.planner, engine.speculator.cost.at(CONTEXT)
        step, reading = drafter.pass_ms(1), drafter.times.read_token_ms
    print(f"{model.path.name}, {label(drafting.runtime)}; {args.method} {Path(args.draft).name};")
    print(f"T(n) for n = {', '.join(map(str, SHOWN))}: {', '.join(f'{ms[n - 1]:.1f}' for n in SHOWN)} ms;")
    print(f"the drafter: {step:.1f} ms per draft token, {reading:.2f} ms per token read\n")
    print("| kind | agreement | saved share of decoding | answer that repays the prompt, tokens |")
    print("|---|---|---|---|")
    rows = []
    everything = [hit for hits in right.values() for hit in hits]
    for kind, hits in [*right.items(), ("all", everything)]:
        rate = sum(hits) / len(hits)
        share = planner.saved_share(rate, step, CONTEXT, 1)
        prompt_tokens = lengths.get(kind) or [n for line in lengths.values() for n in line]
        repaid = f"{sum(prompt_tokens) / len(prompt_tokens) * reading / (share * ms[0]):.0f}" if share > 0 else "never"
        rows.append(f"| {kind} | {rate:.2f} | {share:+.0%} | {repaid} |")
    rate = sum(everything) / len(everything)
    pays = [tenth for tenth in range(1, 1000) if planner.saved_share(rate, tenth / 10, CONTEXT, 1) > 0]
    print("\n".join(rows))
    print(f"\nat this agreement it pays with a step below {max(pays, default=0) / 10:.1f} ms")
    write(args.json, document | {"rows": rows})


if __name__ == "__main__":
    main()
