"""Compares a profile with and without a model drafter with plain decoding, by kind of work.

    python benchmarks/model_drafters.py MODEL spec_bench.jsonl --draft SMALL.gguf [--method vocab_trim]
        [--window 64,512] [--whole] [--always] [--kind rag] [--profile default] [--limit 8] [--max-tokens 96]
        [--repeats 3]

The workload is a JSONL file such as that of Spec-Bench; its eight MT-Bench categories count as one kind. Each prompt is
read once and its cache loaded for every arm, so that the tokens after the prompt are timed, with what the drafter
reads. Arms answer in turns, in another order for every prompt; what they have learned is forgotten before each repeat.
Prints Markdown: tokens per second over plain decoding's and over those without the drafter, with 95% intervals over
prompts, whose repeats are added up.

--window  the first and recent tokens that the drafter reads
--whole   with --window: a fourth arm, in which the drafter reads everything
--always  chains of four tokens at every place, whatever they cost, to see how many are accepted
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from reporting import positive_int, run_benchmark, write

from specplug import profile
from specplug.bench.arms import ProfileArm, PromptStates, Result, plain
from specplug.bench.statistics import paired_ratio
from specplug.bench.workloads import Prompt, limit, load_workload
from specplug.engines.llama_cpp.drafters.opening import open_target
from specplug.engines.llama_cpp.measure import cost_points
from specplug.engines.llama_cpp.settings_choice import with_settings
from specplug.engines.llama_cpp.settings_table import label
from specplug.generation.answers import Sampling
from specplug.models.references import resolve
from specplug.profile import PlannerSettings
from specplug.profile.with_drafter import with_drafter
from specplug.registry import ProposerSpec
from specplug.tune.verdict import interval_text

MT_BENCH = {"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"}

PLAIN, WITHOUT, WITH, WHOLE = "plain", "without", "with", "whole context"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("workload")
    parser.add_argument("--draft", required=True)
    parser.add_argument("--method", default="draft_model")
    parser.add_argument("--window")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--always", action="store_true", help="draft at every place, whatever it costs")
    parser.add_argument("--kind", action="append", help="only this kind")
    parser.add_argument("--profile", default="default")
    parser.add_argument("--threads", type=positive_int)
    parser.add_argument("--limit", type=positive_int, default=8)
    parser.add_argument("--max-tokens", type=positive_int, default=96)
    parser.add_argument("--repeats", type=positive_int, default=3)
    parser.add_argument("--json", type=Path)
    parser.set_defaults(run=compare)
    run_benchmark("model_drafters.py", parser.parse_args())


@dataclass(slots=True)
class Sums:
    """Sums over the repeats of one prompt, by arm; `verified` and `accepted` are draft tokens of the drafter."""

    tokens: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    steps: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    verified: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    accepted: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    same: int = 0


def compare(args: argparse.Namespace, document: dict[str, Any]) -> None:
    base = profile.load(args.profile)
    base = replace(base, runtime=replace(base.runtime, threads=args.threads or base.runtime.threads))
    names = ("first", "recent", "retrieved", "chunk")
    window = dict(zip(names, map(int, args.window.split(",")), strict=False)) if args.window else None
    name = f"{base.name}-drafter"
    profiles = {WITHOUT: base, WITH: with_drafter(base, drafter(args.method, args.draft, window), name=name)}
    if args.whole:
        profiles[WHOLE] = with_drafter(base, drafter(args.method, args.draft, None), name=name)
    if args.always:
        planner = PlannerSettings(mode="static", max_nodes=4, trees=False)
        profiles = {name: replace(one, planner=planner) for name, one in profiles.items()}
    prompts = chosen_prompts(args.workload, args.limit, args.kind)
    found: dict[str, list[Sums]] = defaultdict(list)
    with ExitStack() as stack:
        path = resolve(args.model)
        model = stack.enter_context(open_target(path, profiles.values(), base.runtime, tell))
        base = with_settings(base, model)
        states = PromptStates(limit=8 << 30)
        cost = cost_points(model, base.runtime, base.planner.max_nodes + 1, seconds=12.0)
        arms = {PLAIN: ProfileArm(model, plain(base), Sampling(), prompts=states)}
        for name, one in profiles.items():
            one = replace(one, runtime=base.runtime)
            arms[name] = ProfileArm(model, one, Sampling(), cost=cost, notify=tell, prompts=states)
        for arm in arms.values():
            stack.callback(arm.close)
        work = [(kind, model.chat_prompt([{"role": "user", "content": p.turns[0]}]), Sums()) for kind, p in prompts]
        for kind, _, sums in work:
            found[kind].append(sums)
        names = list(arms)
        for repeat in range(args.repeats):
            for arm in arms.values():
                arm.reset()
            for number, (_, prompt, sums) in enumerate(work):
                first = (repeat + number) % len(names)
                results = {}
                for name in names[first:] + names[:first]:
                    before = drafted(arms[name])
                    results[name] = arms[name].answer([prompt], args.max_tokens)[0]
                    after = drafted(arms[name])
                    sums.verified[name] += after[0] - before[0]
                    sums.accepted[name] += after[1] - before[1]
                add(sums, results)
                print(f"repeat {repeat + 1}, prompt {number + 1} of {len(work)}", file=sys.stderr)
        lengths = [len(prompt) for _, prompt, _ in work]
        about = f"{model.path.name}, {label(base.runtime)}, {base.runtime.threads} threads"
    print(f"{about}, profile {base.name};")
    print(f"{args.method} {Path(args.draft).name}{f', window {args.window}' if window else ''};")
    print(f"prompts of {min(lengths)} to {max(lengths)} tokens, at most {args.max_tokens} new tokens,")
    print(f"{args.repeats} repeats\n")
    drafting = [name for name in names if name not in (PLAIN, WITHOUT)]
    head = ["kind", "prompts", "plain, tokens/s", "without / plain"]
    for name in drafting:
        head += [f"{name} / plain", f"{name} / without", "of its tokens accepted"]
    head.append("answers as plain's")
    print(f"| {' | '.join(head)} |")
    print("|---" * len(head) + "|")
    rows = [*found.items(), ("all", [sums for line in found.values() for sums in line])]
    lines = [line(kind, sums, drafting, args.repeats) for kind, sums in rows]
    print("\n".join(lines))
    write(args.json, document | {"prompt_tokens": lengths, "rows": lines})


def drafter(method: str, ref: str, window: Mapping[str, int] | None) -> ProposerSpec:
    return ProposerSpec(method, {"model": ref, **({"context": window} if window else {})})


def chosen_prompts(workload: str, most: int, kinds: Sequence[str] | None) -> list[tuple[str, Prompt]]:
    """The first prompts of every kind, in turns; of MT-Bench as many of each category as are needed."""
    by_kind: dict[str, list[Prompt]] = defaultdict(list)
    prompts = load_workload(workload)
    for prompt in prompts:
        if prompt.category not in MT_BENCH:
            by_kind[prompt.category].append(prompt)
    together = limit([p for p in prompts if p.category in MT_BENCH], -(-most // len(MT_BENCH)))
    if together:
        by_kind["mt_bench"] = together
    return [
        (kind, by_kind[kind][number])
        for number in range(most)
        for kind in by_kind
        if number < len(by_kind[kind]) and (not kinds or kind in kinds)
    ]


def drafted(arm: ProfileArm) -> tuple[int, int]:
    """Verified and accepted draft tokens of the last proposer."""
    loop = arm.engine.loop
    return int(loop.verified[-1].sum()), int(loop.accepted[-1].sum())


def add(sums: Sums, results: Mapping[str, Result]) -> None:
    if any(len(one.tokens) < 2 for one in results.values()):
        return
    for name, one in results.items():
        sums.tokens[name] += len(one.tokens) - 1
        sums.seconds[name] += one.seconds
        sums.steps[name] += one.counters.steps if one.counters else 0
    sums.same += all(one.tokens == results[PLAIN].tokens for one in results.values())


def line(kind: str, found: Sequence[Sums], drafting: Sequence[str], repeats: int) -> str:
    """One row of the table."""
    used = [sums for sums in found if sums.tokens]

    def ratio(one: str, other: str) -> str:
        columns = [
            [getattr(sums, what)[arm] for sums in used] for arm in (one, other) for what in ("tokens", "seconds")
        ]
        return interval_text(paired_ratio(*columns).as_mapping())

    rate = sum(sums.tokens[PLAIN] for sums in used) / sum(sums.seconds[PLAIN] for sums in used)
    cells = [kind, str(len(used)), f"{rate:.1f}", ratio(WITHOUT, PLAIN)]
    for name in drafting:
        verified, accepted = (sum(getattr(sums, what)[name] for sums in used) for what in ("verified", "accepted"))
        cells += [ratio(name, PLAIN), ratio(name, WITHOUT), f"{accepted} of {verified}"]
    cells.append(f"{sum(sums.same for sums in used)} of {repeats * len(used)}")
    return f"| {' | '.join(cells)} |"


def tell(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    main()
