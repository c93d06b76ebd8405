"""Counts how many tokens a pass of a model gives with a head that drafts for it, by the length of its drafts.

    python benchmarks/eagle_head.py HEAD.gguf MODEL PROMPTS.jsonl [--method eagle3] [--lengths 1 3] [--answers 30]

PROMPTS has a JSON object with `turns` per line; of it the first prompts of at most --max-prompt tokens are answered
greedily. Every pass verifies a chain of the given length. All figures are counts, so they do not depend on what else
the machine does: they are those of one thread on any machine on which the passes round alike.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from model_drafters import tell
from reporting import positive_int, run_benchmark, write

from specplug.bench.workloads import load_workload
from specplug.core import IntArray
from specplug.engines.llama_cpp.drafters.opening import open_target
from specplug.engines.llama_cpp.engine import LlamaCpp
from specplug.engines.llama_cpp.model import Model
from specplug.errors import UsageError
from specplug.generation.answers import Request
from specplug.generation.counters import Counters
from specplug.models.references import resolve
from specplug.profile import CostPoints, PlannerSettings, Profile, Runtime
from specplug.registry import ProposerSpec

FREE_ROWS = CostPoints((128,), (1, 64), ((1.0, 1.001),))
"""A cost curve under which every draft pays, so that none is left out."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("head", help="a GGUF file; `own` for the model's own MTP layer")
    parser.add_argument("model")
    parser.add_argument("prompts")
    parser.add_argument("--method", choices=("eagle3", "mtp"), default="eagle3")
    parser.add_argument("--lengths", type=positive_int, nargs="+", default=[1, 3])
    parser.add_argument("--answers", type=positive_int, default=30)
    parser.add_argument("--max-tokens", type=positive_int, default=96)
    parser.add_argument("--max-prompt", type=positive_int, default=200, help="tokens")
    parser.add_argument("--json", type=Path)
    parser.set_defaults(run=count)
    run_benchmark("eagle_head.py", parser.parse_args())


def count(args: argparse.Namespace, document: dict[str, Any]) -> None:
    profiles = {length: _profile(args, length) for length in args.lengths}
    rows = []
    with open_target(resolve(args.model), profiles.values(), Runtime(threads=1, context=512), tell) as model:
        prompts = _prompts(model, args)
        print(f"{model.path.name}, {Path(args.head).name}: {len(prompts)} greedy answers\n")
        print("| draft tokens | tokens per pass | passes | right of those at depth 1, 2, ... |")
        print("|---|---|---|---|")
        for length, profile in profiles.items():
            counters, rates = _counted(model, profile, prompts, args.max_tokens)
            shown = " ".join(f"{rate:.3f}" for rate in rates)
            print(f"| {length} | {counters.mean_acceptance_length:.3f} | {counters.steps} | {shown} |", flush=True)
            rows.append({"length": length, "tokens_per_pass": counters.mean_acceptance_length, "rates": rates})
    write(args.json, document | {"rows": rows})


def _counted(model: Model, profile: Profile, prompts: list[IntArray], max_tokens: int) -> tuple[Counters, list[float]]:
    """The counters of all answers, and the share of right draft tokens by depth, given that those before were right."""
    sums = Counters()
    with LlamaCpp(model, profile, cost=FREE_ROWS) as engine:
        for number, prompt in enumerate(prompts, start=1):
            sums.add(engine.generate(Request(prompt, max_tokens)).counters)
            print(f"{number} of {len(prompts)}", file=sys.stderr)
        (accepted,) = engine.loop.accepted[:, : profile.planner.max_nodes].tolist()
    # A draft token is tested where those before it were right; drafts are shorter near the end of an answer.
    tested = [sums.steps, *accepted[:-1]]
    return sums, [right / max(of, 1) for right, of in zip(accepted, tested, strict=True)]


def _profile(args: argparse.Namespace, length: int) -> Profile:
    options = {} if args.head == "own" else {"model": args.head}
    spec = ProposerSpec(args.method, options | {"max_draft": length})
    planner = PlannerSettings(mode="static", max_nodes=length)
    return Profile("counted", proposers=(spec,), planner=planner, runtime=Runtime(threads=1, context=512))


def _prompts(model: Model, args: argparse.Namespace) -> list[IntArray]:
    found = []
    for prompt in load_workload(args.prompts):
        asked = model.chat_prompt([{"role": "user", "content": prompt.turns[0]}])
        if len(asked) <= args.max_prompt:
            found.append(asked)
        if len(found) == args.answers:
            return found
    if not found:
        raise UsageError(f"{args.prompts}: no prompt of at most {args.max_prompt} tokens; raise --max-prompt")
    return found


if __name__ == "__main__":
    main()
