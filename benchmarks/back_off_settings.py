"""Measures settings of the planner's back-off for a model-based proposer, on the same prompts, per category.

    python benchmarks/back_off_settings.py MODEL.gguf --profile gemma3-vocabtrim-self --workload W.jsonl \
        --setting 0.01,8,1 --setting 0.04,8,0.5

A setting is EXPENSIVE_COST_SHARE,RETRIES_PER_TEXT,CONFIDENCE_MARGIN of specplug/planning/constants.py. Each setting has
an engine of its own, and all engines take turns prompt by prompt with one for plain decoding, so that a machine that
changes within the run changes for all. It prints, per category and in all, tokens per second after the prompt over
plain decoding's, with a 95% interval over prompts; then the prompts on which each setting is slowest.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack

from specplug import profile
from specplug.bench.arms import plain
from specplug.bench.statistics import paired_ratio
from specplug.bench.workloads import BUILTIN, limit, load_workload
from specplug.engines.llama_cpp.engine import LlamaCpp
from specplug.engines.llama_cpp.model import open_model
from specplug.generation.answers import Request
from specplug.machine import hardware
from specplug.models.references import resolve
from specplug.planning import back_off
from specplug.tune.verdict import interval_text

PLAIN = "plain"

FEWEST = 8
"""Tokens after the first that plain decoding's answer must have; prompts with shorter answers are left out."""

WORST = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--profile", required=True)
    parser.add_argument("--setting", action="append", required=True)
    parser.add_argument("--workload", default=BUILTIN)
    parser.add_argument("--limit", type=int, default=3)
    parser.add_argument("--skip", type=int, default=0, help="prompts per category to leave out")
    parser.add_argument("--tokens", type=int, default=128)
    args = parser.parse_args()
    path = resolve(args.model)
    chosen = profile.load(args.profile)
    work = load_workload(args.workload)
    left_out = {prompt.id for prompt in limit(work, args.skip)} if args.skip else set()
    prompts = [prompt for prompt in limit(work, args.skip + args.limit) if prompt.id not in left_out]
    kinds: list[str] = []
    tokens: dict[str, list[float]] = {arm: [] for arm in (PLAIN, *args.setting)}
    seconds: dict[str, list[float]] = {arm: [] for arm in tokens}
    with ExitStack() as opened:
        model = opened.enter_context(open_model(path))
        engines = {arm: opened.enter_context(LlamaCpp(model, chosen)) for arm in args.setting}
        for arm in args.setting:
            for one in engines[arm].speculator.selection.back_offs:
                one.retries_per_text = int(arm.split(",")[1])
        engines[PLAIN] = opened.enter_context(LlamaCpp(model, plain(chosen)))
        for number, prompt in enumerate(prompts):
            asked = model.chat_prompt([{"role": "user", "content": prompt.turns[0]}])
            first = number % len(engines)
            took = {}
            for arm in (list(engines) * 2)[first : first + len(engines)]:
                if arm != PLAIN:
                    share, retries, margin = arm.split(",")
                    back_off.EXPENSIVE_COST_SHARE, back_off.CONFIDENCE_MARGIN = float(share), float(margin)
                    back_off.RETRIES_PER_TEXT = int(retries)
                answer = engines[arm].generate(Request(asked, args.tokens))
                took[arm] = (len(answer.tokens) - 1, answer.decode_seconds)  # the prefill yields the first token
            if took[PLAIN][0] < FEWEST:
                continue
            kinds.append(prompt.category)
            for arm, (count, spent) in took.items():
                tokens[arm].append(count)
                seconds[arm].append(spent)
    print(f"{hardware.fingerprint()}, {path.name}, profile {chosen.name}, {len(kinds)} prompts")
    print(f"{'':16s}{'plain, ms':>10s} " + " ".join(f"{arm:>12s}" for arm in args.setting))
    for kind in dict.fromkeys(kinds):
        rows = [row for row, other in enumerate(kinds) if other == kind]
        ms = {
            arm: 1000 * sum(seconds[arm][row] for row in rows) / sum(tokens[arm][row] for row in rows) for arm in tokens
        }
        print(f"{kind:16s}{ms[PLAIN]:10.2f} " + " ".join(f"{ms[PLAIN] / ms[arm]:12.2f}" for arm in args.setting))
    for arm in args.setting:
        speedup = paired_ratio(tokens[arm], seconds[arm], tokens[PLAIN], seconds[PLAIN])
        each = sorted(
            seconds[PLAIN][row] / tokens[PLAIN][row] * tokens[arm][row] / seconds[arm][row] for row in range(len(kinds))
        )
        worst = ", ".join(f"{ratio:.2f}" for ratio in each[:WORST])
        print(f"{arm:12s} speedup {interval_text(speedup.as_mapping())}, worst {worst}")


if __name__ == "__main__":
    main()
