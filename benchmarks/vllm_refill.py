"""Measures vLLM's output tokens per second under constant load: plain decoding against profiles, on the same prompts.

    python benchmarks/vllm_refill.py --profile P --profile vllm-builtin-ngram --workload W.jsonl --concurrency 4

All prompts of a chunk are requested at once, and N are answered at a time: when one ends, the next starts, as on a
server under load. Every prompt is prefilled once before, so that the timed part takes most of it from the prefix cache
(VLLM_CPU_KVCACHE_SPACE must hold a chunk). The arms alternate chunk by chunk.

Two processes of the same engine differ by some percent for as long as they run. Therefore profiles that draft with
specplug share one engine, the arm `at-rest` is that engine with drafting disabled, and all engines are restarted
`--restarts` times. Intervals over `none` come from these restarts, intervals over `at-rest` from chunks.

Prints, per arm, how many answers equal plain decoding's, tokens per pass, the share of time spent drafting, and the
ratio of tokens per second to both base arms, over all prompts and per category. The second form runs nothing and prints
one table of earlier runs, which may differ in categories and arms:

    python benchmarks/vllm_refill.py --profile P --restarts 0 --join one.json --join two.json
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from specplug import profile
from specplug.bench.arms import plain
from specplug.bench.statistics import Interval, paired_ratio
from specplug.bench.vllm_stage import is_ours, with_shared_settings
from specplug.bench.workloads import load_workload
from specplug.engines.vllm.configure import write_profile
from specplug.engines.vllm.offline import Vllm, open_vllm
from specplug.engines.vllm.switch import SWITCH
from specplug.generation.answers import Request
from specplug.generation.counters import Counters
from specplug.profile import Measured, Profile
from specplug.registry import ProposerSpec

FEW = 10
"""Categories with at most this many prompts are combined into one, `talk`; in Spec-Bench these are MT-bench's."""

REST = "at-rest"
"""The name of the arm with drafting disabled, on the engine of the profiles that draft with specplug."""


@dataclass
class Arm:
    """The figures of one arm.

    chunks  per category, for each chunk: its tokens, its seconds, and the number of the restart it ran after
    """

    chunks: dict[str, list[tuple[int, float, int]]] = field(default_factory=lambda: defaultdict(list))
    answers: int = 0
    same: int = 0
    work: Counters = field(default_factory=Counters)


@dataclass(frozen=True)
class Opened:
    """An engine, and the file of the profile to select where several profiles share the engine."""

    engine: Vllm
    ref: str | None = None


def main() -> None:
    options = _options()
    bases = [replace(profile.load(ref), model=options.model) for ref in options.profile]
    shared = replace(bases[0].vllm, max_num_seqs=options.concurrency)
    own = [replace(base, vllm=with_shared_settings(base.vllm, shared)) for base in bases]
    chunks = _chunks(options)
    arms: dict[str, Arm] = defaultdict(Arm)
    for start in range(options.restarts):
        with ExitStack() as stack:
            opened = _open(stack, options.model, own, start)
            for place, number in enumerate(range(start, len(chunks), options.restarts)):
                kind, texts = chunks[number]
                _answer_chunk(arms, opened, kind, texts, (start, start + place), options.max_tokens)
                line = ", ".join(f"{name} {_speed(arm, kind):.1f}" for name, arm in arms.items())
                notify(f"chunk {number + 1} of {len(chunks)}, {kind}: {line} tokens/s")
    for path in options.join:
        earlier = json.loads(path.read_bytes())
        if earlier["asked"] != _asked(options):
            raise SystemExit(f"{path}: was run with {earlier['asked']} instead of {_asked(options)}; run it again")
        _join(arms, earlier)
    if not arms["none"].chunks:
        raise SystemExit("there is nothing to report; use --restarts 1 or more, or --join")
    _report(arms, {REST} | {p.name for p in own if is_ours(p)}, options)


def _chunks(options: argparse.Namespace) -> list[tuple[str, list[str]]]:
    prompts = load_workload(options.workload)
    sizes = {kind: sum(p.category == kind for p in prompts) for kind in {p.category for p in prompts}}
    asked: dict[str, list[str]] = defaultdict(list)
    for prompt in prompts:
        kind = "talk" if sizes[prompt.category] <= FEW else prompt.category
        if (not options.kind or kind in options.kind) and len(asked[kind]) < (options.limit or len(prompts)):
            asked[kind].append(prompt.turns[0])
    return [
        (kind, texts[start : start + options.chunk])
        for kind, texts in asked.items()
        for start in range(0, len(texts), options.chunk)
    ]


def _open(stack: ExitStack, model: str, profiles: Sequence[Profile], turn: int) -> dict[str, Opened]:
    """The engine of every arm. The engine that is started first changes from restart to restart."""
    ours = [p for p in profiles if is_ours(p)]
    ours.sort(key=lambda p: p.planner.mode == "static")  # the first must be planned, so that costs are measured
    others = [replace(plain(profiles[0]), vllm=profiles[0].vllm), *(p for p in profiles if p not in ours)]
    longest = max((p.vllm.num_speculative_tokens for p in ours), default=0)
    starts = [*others, *ours[:1]]
    folder = Path(stack.enter_context(TemporaryDirectory()))
    found: dict[str, Opened] = {}
    for place in range(len(starts)):
        one = starts[(place + turn) % len(starts)]
        notify(f"starting vLLM for {one.name}")
        further = {"worker_extension_cls": SWITCH} if one in ours else {}
        if one in ours:
            one = replace(one, vllm=replace(one.vllm, num_speculative_tokens=longest))
        engine = stack.enter_context(open_vllm(model, one, notify=notify, engines=len(starts), **further))
        if not further:
            found[one.name] = Opened(engine)
            continue
        costs = engine.profile.measured or Measured()
        for each in (replace(one, name=REST, proposers=(ProposerSpec("none"),), measured=None), *ours):
            learned = each.measured.acceptance if each.measured else {}
            ref = write_profile(replace(each, measured=replace(costs, acceptance=learned)), folder)
            engine.llm.collective_rpc("specplug_use", args=(ref, True))
            found[each.name] = Opened(engine, ref)
    return {name: found[name] for name in ("none", REST, *(p.name for p in profiles)) if name in found}


def _answer_chunk(
    arms: dict[str, Arm],
    opened: dict[str, Opened],
    kind: str,
    texts: Sequence[str],
    turn: tuple[int, int],
    max_tokens: int,
) -> None:
    """Answer a chunk by all arms. `turn`: the number of the restart, and the index of the arm that goes first."""
    outputs: dict[str, list[list[int]]] = {}
    prefilled: set[int] = set()
    for place in range(len(opened)):
        name = list(opened)[(turn[1] + place) % len(opened)]
        engine, ref = opened[name].engine, opened[name].ref
        prompts = [engine.chat_prompt([{"role": "user", "content": text}]) for text in texts]
        if id(engine) not in prefilled:
            prefilled.add(id(engine))
            engine.llm.reset_prefix_cache()
            if ref is not None:  # so that no proposer learns from a prompt that is only prefilled
                engine.llm.collective_rpc("specplug_use", args=(opened[REST].ref, False))
            engine.generate_all([Request(prompt, 1) for prompt in prompts])
        if ref is not None:
            engine.llm.collective_rpc("specplug_use", args=(ref, False))
        began = perf_counter()
        answers, _ = engine.generate_all([Request(prompt, max_tokens) for prompt in prompts])
        seconds = perf_counter() - began
        outputs[name] = [answer.tokens for answer in answers]
        arms[name].chunks[kind].append((sum(map(len, outputs[name])), seconds, turn[0]))
        for answer in answers:
            arms[name].work.add(answer.counters)
    for name, tokens in outputs.items():
        arms[name].answers += len(tokens)
        arms[name].same += sum(one == two for one, two in zip(tokens, outputs["none"], strict=True))


def _asked(options: argparse.Namespace) -> dict[str, int]:
    """The options that runs must share to be reported in one table."""
    return {"max_tokens": options.max_tokens, "concurrency": options.concurrency, "chunk": options.chunk}


def _join(arms: dict[str, Arm], earlier: dict[str, Any]) -> None:
    """Add the figures of an earlier run; its restarts count as further restarts."""
    first = 1 + max((at for arm in arms.values() for chunks in arm.chunks.values() for *_, at in chunks), default=-1)
    for name, figures in earlier["arms"].items():
        for kind, chunks in figures["chunks"].items():
            arms[name].chunks[kind] += [(tokens, seconds, first + at) for tokens, seconds, at in chunks]
        arms[name].answers += figures["answers"]
        arms[name].same += figures["same"]
        arms[name].work.add(Counters(**figures["work"]))


def _report(arms: dict[str, Arm], ours: set[str], options: argparse.Namespace) -> None:
    kinds = list(arms["none"].chunks)
    asked = f"{options.max_tokens} tokens, {options.concurrency} at a time, chunks of {options.chunk}"
    print(f"{arms['none'].answers} prompts, {asked}")
    print(f"{'arm':24} {'same':>9} a pass drafting {'all':>17}  " + "  ".join(f"{kind:>17}" for kind in kinds))
    ratios = {}
    for base in ("none", REST):
        if base not in arms:
            continue
        print(f"tokens per second over those of {base}")
        for name, arm in arms.items():
            starts = base != REST or name not in ours
            measured = [kind for kind in kinds if arm.chunks.get(kind)]
            cells = {k: _ratio(arm, arms[base], [k] if k in kinds else measured, starts) for k in ("all", *kinds)}
            ratios[f"{name} / {base}"] = cells
            seconds = sum(s for chunks in arm.chunks.values() for _, s, _ in chunks)
            share = f"{arm.work.draft_ns / 1e9 / seconds:.2%}" if name in ours else "-"
            own = f"{arm.work.mean_acceptance_length:6.2f} {share:>8}"
            print(
                f"{name:24} {arm.same:4}/{arm.answers:4} {own} " + "  ".join(f"{cell:>17}" for cell in cells.values())
            )
    if options.json:
        found = {
            "asked": _asked(options),
            "ratios": ratios,
            "arms": {
                name: {
                    "chunks": dict(arm.chunks),
                    "answers": arm.answers,
                    "same": arm.same,
                    "work": asdict(arm.work),
                }
                for name, arm in arms.items()
            },
        }
        options.json.write_text(json.dumps(found, indent=1))


def _ratio(arm: Arm, base: Arm, kinds: Sequence[str], starts: bool) -> str:
    """The ratio of tokens per second with its interval; "" where the two arms have no sample in common.

    starts  whether one restart is a sample, rather than one chunk
    """
    own, other = (_samples(one, kinds, starts) for one in (arm, base))
    both = [key for key in own if key in other]  # joined runs may have different arms
    if not both:
        return ""
    columns = [list(column) for samples in (own, other) for column in zip(*(samples[key] for key in both), strict=True)]
    found: Interval = paired_ratio(*columns)
    if len(both) < 2:
        return f"{found.median:.2f}"
    return f"{found.median:.2f} ({found.low:.2f}-{found.high:.2f})"


def _samples(arm: Arm, kinds: Sequence[str], starts: bool) -> dict[object, tuple[int, float]]:
    """Tokens and seconds per restart, or per chunk."""
    found: dict[object, tuple[int, float]] = {}
    for kind in kinds:
        of_start: dict[int, int] = defaultdict(int)
        for tokens, seconds, start in arm.chunks.get(kind, ()):
            of_start[start] += 1
            key = start if starts else (kind, start, of_start[start])
            before = found.get(key, (0, 0.0))
            found[key] = (before[0] + tokens, before[1] + seconds)
    return found


def _speed(arm: Arm, kind: str) -> float:
    return sum(tokens for tokens, _, _ in arm.chunks[kind]) / sum(seconds for _, seconds, _ in arm.chunks[kind])


def notify(text: str) -> None:
    print(text, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--profile", action="append", required=True)
    parser.add_argument("--workload", default="builtin")
    parser.add_argument("--kind", action="append", help="a category of prompts; all categories by default")
    parser.add_argument("--limit", type=int, help="prompts per category")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--chunk", type=int, default=20)
    parser.add_argument("--restarts", type=int, default=1, help="starts of all engines, each for a part of the chunks")
    parser.add_argument(
        "--join", type=Path, action="append", default=[], help="the --json file of an earlier run to add to the table"
    )
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
