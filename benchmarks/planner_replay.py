"""What the planner would gain under a given cost curve: the same texts, with time counted and not measured.

python benchmarks/planner_replay.py --model OUT/smollm2-bf16.gguf [--limit 4] [--free] [--ms 1:15.9 2:19.7 ...]

A pass of n rows takes what the curve says, drafting what DRAFT_MS and the others say (nothing with --free), so that two
settings of the planner can be told apart without the noise of a clock. The model only says which tokens come true.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import count

import numpy as np
from recycling_vs_paper import MAX_NODES, SHORT, Oracle, Path, Turn, converse

from specplug import models
from specplug.bench.workloads import categories, limit, load_workload
from specplug.core import Proposer, Step, int_array
from specplug.cost import CostCurve
from specplug.engines.llama_cpp.context import open_context
from specplug.engines.llama_cpp.model import open_model
from specplug.profile import PlannerSettings, Profile, Runtime
from specplug.proposers.fusion import Fusion
from specplug.proposers.ngram import Ngram
from specplug.proposers.suffix import Suffix
from specplug.proposers.token_recycling import TokenRecycling
from specplug.speculator import Speculator
from specplug.verify import verify_tree

DRAFT_MS = {Ngram: 0.10, Suffix: 0.14, TokenRecycling: 0.11}
"""Asking a method and telling it what came, about as benchmarks/overhead.py measures it."""

TOP_IDS_MS, TOP_IDS_ROW_MS = 0.06, 0.04
CLOCK_NS = 45_000
"""What the planner's own clock moves at every look."""

BF16 = ("1:15.9", "2:19.7", "3:21.2", "4:27.6", "6:30.3", "8:36.8", "12:48.3", "16:59.5", "24:82.8")


class Planned:
    """Proposers under the planner; `spent` is (counted ms, ms of plain decoding) per answer."""

    def __init__(self, name: str, proposers: Sequence[Proposer], rows: list[int], ms: list[float], free: bool) -> None:
        self.name = name
        self.free = free
        fusion = Fusion(proposers, clock=count(step=0 if free else CLOCK_NS).__next__)
        profile = Profile(name, planner=PlannerSettings(max_nodes=rows[-1] - 1))
        self.truth = CostCurve([0], rows, [ms]).at(0)
        self.one = Speculator(fusion, CostCurve([0], rows, [ms]), profile)
        self.spent: list[tuple[float, float]] = []

    def answer(self, oracle: Oracle, prompt: Sequence[int], turn: Turn) -> None:
        one = self.one
        one.begin(0, int_array(prompt))
        total, over = 0.0, False
        while not over:
            (draft,) = one.plan([0], 0, [turn.max_tokens - len(turn.emitted) - 1])
            guesses: list[Path] = [()]
            for parent, token in zip(draft.parents.tolist(), draft.tokens.tolist(), strict=True):
                guesses.append((*guesses[parent + 1], token))
            tops = oracle.ask(turn.emitted, guesses)
            choices = [top[0] for top in tops]
            new, accepted = verify_tree(draft, lambda node, choices=choices: choices[node + 1])  # type: ignore[misc]
            kept, over = turn.take(new, len(draft))
            target_ms, wanted = self.truth[len(draft)], one.wants_topk
            reading_ms = TOP_IDS_MS + TOP_IDS_ROW_MS * (1 + len(draft)) if wanted and not self.free else 0.0
            asked = [type(one.fusion.sources[i]) for i in one.asked]
            total += target_ms + reading_ms + (0.0 if self.free else sum(DRAFT_MS[method] for method in asked))
            topk = np.array(tops, dtype=np.int32)[:, :wanted] if wanted else None
            step = Step(kept, draft, accepted, topk)
            one.observe([0], [step], target_ms=target_ms, topk_ns=round(reading_ms * 1e6))
        one.end(0)
        self.spent.append((total, len(turn.emitted) * self.truth[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--workload", default="builtin")
    parser.add_argument("--limit", type=int, default=4, help="prompts per category")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--free", action="store_true", help="drafting takes no time")
    parser.add_argument("--ms", nargs="+", default=BF16, metavar="ROWS:MS", help="the cost curve")
    options = parser.parse_args()
    points = [pair.split(":") for pair in options.ms]
    rows, ms = [int(row) for row, _ in points], [float(value) for _, value in points]
    arms = [
        Planned("suffix", [Suffix()], rows, ms, options.free),
        Planned("ngram", [Ngram()], rows, ms, options.free),
        Planned("recycling", [TokenRecycling()], rows, ms, options.free),
        Planned("default", [Suffix(), TokenRecycling()], rows, ms, options.free),
    ]
    prompts = limit(load_workload(options.workload), options.limit)
    kinds: list[str] = []
    runtime = Runtime(context=4096, threads=2, flash_attention=True)
    with (
        open_model(models.resolve(options.model)) as model,
        open_context(model, runtime, cells=4096, num_ids=MAX_NODES + 1, max_rows=SHORT + 1 + MAX_NODES) as context,
    ):
        oracle = Oracle(model, context)
        for prompt in prompts:
            answered = converse(arms, oracle, model, prompt, options.max_tokens)
            kinds += [prompt.category] * (len(answered) // len(arms))
    for arm in arms:
        line = [f"{arm.name:10} all {_speedup(arm.spent):.2f} "]
        for kind in categories(prompts):
            spent = [pair for pair, of in zip(arm.spent, kinds, strict=True) if of == kind]
            line.append(f"{kind} {_speedup(spent):.2f}")
        print(" ".join(line))


def _speedup(spent: Sequence[tuple[float, float]]) -> float:
    return sum(plain for _, plain in spent) / sum(total for total, _ in spent)


if __name__ == "__main__":
    main()
