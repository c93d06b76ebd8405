"""Measures how much speed a wrong cost of plain decoding loses, and how much of it occasional plain passes recover.

    python benchmarks/stale_costs.py MODEL.gguf --profile gemma3-vocabtrim-self [--believed 1.2] [--workload W.jsonl]

Four engines with one profile alternate prompt by prompt: plain decoding; the measured costs; costs in which a pass over
one row takes `--believed` times as long, as if memory had become faster since they were measured; and the same costs
without the planner's occasional plain passes. Prints, per engine, milliseconds per token, tokens per pass, the cost of
a one-row pass at the end, and the speedup in tokens per second after the prompt over plain decoding, with a 95%
interval over prompts.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import replace

from specplug import profile
from specplug.bench.arms import plain
from specplug.bench.statistics import paired_ratio
from specplug.bench.workloads import BUILTIN, limit, load_workload
from specplug.engines.llama_cpp.engine import LlamaCpp
from specplug.engines.llama_cpp.measure import cost_points
from specplug.engines.llama_cpp.model import open_model
from specplug.engines.llama_cpp.settings_choice import with_settings
from specplug.generation.answers import Request
from specplug.machine import hardware
from specplug.models.references import resolve
from specplug.planning.cost import CostCurve
from specplug.profile import CostPoints
from specplug.tune.verdict import interval_text

NO_PLAIN_PASSES = "wrong, no plain passes"


class WithoutPlainPasses(CostCurve):
    """A cost curve that follows the observed passes but never requests a plain one."""

    plain_due = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--profile", required=True)
    parser.add_argument("--believed", type=float, default=1.2)
    parser.add_argument("--workload", default=BUILTIN)
    parser.add_argument("--limit", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128)
    args = parser.parse_args()
    path = resolve(args.model)
    chosen = profile.load(args.profile)
    prompts = limit(load_workload(args.workload), args.limit)
    with ExitStack() as opened:
        model = opened.enter_context(open_model(path))
        points = cost_points(model, with_settings(chosen, model).runtime, chosen.planner.max_nodes + 1)
        wrong = believing(points, args.believed)
        engines = {"plain": opened.enter_context(LlamaCpp(model, plain(chosen)))}
        for arm, cost in (("measured costs", points), ("wrong costs", wrong), (NO_PLAIN_PASSES, wrong)):
            engines[arm] = opened.enter_context(LlamaCpp(model, chosen, cost=cost))
        blind = engines[NO_PLAIN_PASSES].speculator
        curve = blind.cost
        blind.cost = blind.planner.cost = WithoutPlainPasses(
            curve.contexts, curve.rows, curve.ms.tolist(), curve.change_ms
        )
        tokens: dict[str, list[float]] = {arm: [] for arm in engines}
        seconds: dict[str, list[float]] = {arm: [] for arm in engines}
        passes: dict[str, list[int]] = {arm: [] for arm in engines}
        for number, prompt in enumerate(prompts):
            asked = model.chat_prompt([{"role": "user", "content": prompt.turns[0]}])
            for arm in list(engines)[:: 1 if number % 2 else -1]:
                answer = engines[arm].generate(Request(asked, args.tokens))
                tokens[arm].append(len(answer.tokens) - 1)  # the prefill yields the first token
                seconds[arm].append(answer.decode_seconds)
                passes[arm].append(answer.counters.steps)
        believed = {arm: engine.speculator.cost.at(256)[0] for arm, engine in engines.items()}
    print(f"{hardware.fingerprint()}, {path.name}, profile {chosen.name}, {len(prompts)} prompts")
    print(f"T(1) measured {points.ms[0][0]:.2f} ms, wrong costs {wrong.ms[0][0]:.2f}, T(2) {points.ms[0][1]:.2f}")
    for arm in engines:
        speedup = paired_ratio(tokens[arm], seconds[arm], tokens["plain"], seconds["plain"])
        print(
            f"{arm:22s} {1000 * sum(seconds[arm]) / sum(tokens[arm]):6.2f} ms per token, "
            f"{sum(tokens[arm]) / sum(passes[arm]):.2f} tokens per pass, T(1) at the end {believed[arm]:.2f} ms, "
            f"speedup {interval_text(speedup.as_mapping())}"
        )


def believing(points: CostPoints, factor: float) -> CostPoints:
    """The costs with a one-row pass that takes `factor` times as long, but less than a two-row pass."""
    return replace(points, ms=tuple((min(factor * line[0], 0.99 * line[1]), *line[1:]) for line in points.ms))


if __name__ == "__main__":
    main()
