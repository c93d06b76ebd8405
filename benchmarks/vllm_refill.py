"""Output tokens per second of vLLM with its places always filled: plain decoding and profiles, over the same prompts.

All prompts of a chunk are asked for at once and N are answered at a time; when one has ended, the next takes its place,
as on a server under load. Prompts are read once before, so that what is timed takes most of them from the prefix cache
(VLLM_CPU_KVCACHE_SPACE must hold a chunk). Arms take turns chunk by chunk. Two processes of the same engine differ by
some percent for as long as they live: profiles that draft with specplug share one engine, `at-rest` is that engine with
nobody drafting, and all engines are started anew from time to time: intervals over `none` are drawn from these starts,
intervals over `at-rest` from chunks.

    python benchmarks/vllm_refill.py --profile P --profile vllm-builtin-ngram --workload W.jsonl --concurrency 4
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

from specplug import profile
from specplug.answers import Request
from specplug.bench.arms import plain
from specplug.bench.statistics import Interval, paired_ratio
from specplug.bench.vllm_stage import as_first, is_ours
from specplug.bench.workloads import load_workload
from specplug.counters import Counters
from specplug.engines.vllm.configure import write_profile
from specplug.engines.vllm.offline import NONE, Vllm, open_vllm
from specplug.engines.vllm.switch import SWITCH
from specplug.profile import Measured, Profile

FEW = 10
"""Categories with no more prompts than this are one kind, `talk`: the categories of MT-bench."""

REST = "at-rest"


@dataclass
class Arm:
    """What one way of drafting did. `chunks`: by kind, of each chunk the tokens, the seconds, and after which start."""

    chunks: dict[str, list[tuple[int, float, int]]] = field(default_factory=lambda: defaultdict(list))
    same: int = 0
    work: Counters = field(default_factory=Counters)


@dataclass(frozen=True)
class Opened:
    """An engine, with the file of the profile that it should draft with where it can draft with several."""

    engine: Vllm
    ref: str | None = None


def main() -> None:
    options = _options()
    bases = [replace(profile.load(ref), model=options.model) for ref in options.profile]
    shared = replace(bases[0].vllm, max_num_seqs=options.concurrency)
    own = [replace(base, vllm=as_first(base.vllm, shared)) for base in bases]
    chunks = _chunks(options)
    arms: dict[str, Arm] = defaultdict(Arm)
    for start in range(options.restarts):
        with ExitStack() as stack:
            opened = _open(stack, options.model, own, start)
            for place, number in enumerate(range(start, len(chunks), options.restarts)):
                kind, texts = chunks[number]
                _answer_chunk(arms, opened, kind, texts, (start, start + place), options.max_tokens)
                line = ", ".join(f"{name} {_speed(arm, kind):.1f}" for name, arm in arms.items())
                say(f"chunk {number + 1} of {len(chunks)}, {kind}: {line} tokens/s")
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
    """Every arm's engine. Which one is started first changes from turn to turn."""
    ours = [p for p in profiles if is_ours(p)]
    ours.sort(key=lambda p: p.planner.mode == "static")  # costs are measured for a planned one
    others = [replace(plain(profiles[0]), vllm=profiles[0].vllm), *(p for p in profiles if p not in ours)]
    longest = max((p.vllm.num_speculative_tokens for p in ours), default=0)
    starts = [*others, *ours[:1]]
    folder = Path(stack.enter_context(TemporaryDirectory()))
    found: dict[str, Opened] = {}
    for place in range(len(starts)):
        one = starts[(place + turn) % len(starts)]
        say(f"starting vLLM for {one.name}")
        further = {"worker_extension_cls": SWITCH} if one in ours else {}
        if one in ours:
            one = replace(one, vllm=replace(one.vllm, num_speculative_tokens=longest))
        engine = stack.enter_context(open_vllm(model, one, say=say, engines=len(starts), **further))
        if not further:
            found[one.name] = Opened(engine)
            continue
        costs = engine.profile.measured or Measured()
        for each in (replace(one, name=REST, proposers=NONE, measured=None), *ours):
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
    """`turn`: which start of the engines this is, and which arm goes first."""
    said: dict[str, list[list[int]]] = {}
    read: set[int] = set()
    for place in range(len(opened)):
        name = list(opened)[(turn[1] + place) % len(opened)]
        engine, ref = opened[name].engine, opened[name].ref
        prompts = [engine.chat_prompt([{"role": "user", "content": text}]) for text in texts]
        if id(engine) not in read:
            read.add(id(engine))
            engine.llm.reset_prefix_cache()
            if ref is not None:  # nobody learns from a prompt that is read without being answered
                engine.llm.collective_rpc("specplug_use", args=(opened[REST].ref, False))
            engine.generate_all([Request(prompt, 1) for prompt in prompts])
        if ref is not None:
            engine.llm.collective_rpc("specplug_use", args=(ref, False))
        began = perf_counter()
        answers, _ = engine.generate_all([Request(prompt, max_tokens) for prompt in prompts])
        seconds = perf_counter() - began
        said[name] = [answer.tokens for answer in answers]
        arms[name].chunks[kind].append((sum(map(len, said[name])), seconds, turn[0]))
        for answer in answers:
            arms[name].work.add(answer.counters)
    for name, tokens in said.items():
        arms[name].same += sum(one == two for one, two in zip(tokens, said["none"], strict=True))


def _report(arms: dict[str, Arm], ours: set[str], options: argparse.Namespace) -> None:
    kinds = list(arms["none"].chunks)
    count = arms["none"].same
    print(f"{count} prompts, {options.max_tokens} tokens, {options.concurrency} at a time, chunks of {options.chunk}")
    print(f"{'arm':24} {'same':>9} a pass drafting {'all':>17}  " + "  ".join(f"{kind:>17}" for kind in kinds))
    ratios = {}
    for base in ("none", REST):
        if base not in arms:
            continue
        print(f"tokens per second over those of {base}")
        for name, arm in arms.items():
            starts = base != REST or name not in ours
            cells = {k: _ratio(arm, arms[base], [k] if k in kinds else kinds, starts) for k in ("all", *kinds)}
            ratios[f"{name} / {base}"] = cells
            seconds = sum(s for chunks in arm.chunks.values() for _, s, _ in chunks)
            share = f"{arm.work.draft_ns / 1e9 / seconds:.2%}" if name in ours else "-"
            own = f"{arm.work.mean_acceptance_length:6.2f} {share:>8}"
            print(f"{name:24} {arm.same:4}/{count:4} {own} " + "  ".join(f"{cell:>17}" for cell in cells.values()))
    if options.json:
        found = {
            "ratios": ratios,
            "arms": {
                name: {"chunks": dict(arm.chunks), "same": arm.same, "work": asdict(arm.work)}
                for name, arm in arms.items()
            },
        }
        options.json.write_text(json.dumps(found, indent=1))


def _ratio(arm: Arm, base: Arm, kinds: Sequence[str], starts: bool) -> str:
    """`starts`: what was measured after one start of the engines is one sample."""
    own, other = (_samples(one, kinds, starts) for one in (arm, base))
    found: Interval = paired_ratio(*map(list, zip(*own, strict=True)), *map(list, zip(*other, strict=True)))
    if len(own) < 2:
        return f"{found.median:.2f}"
    return f"{found.median:.2f} ({found.low:.2f}-{found.high:.2f})"


def _samples(arm: Arm, kinds: Sequence[str], starts: bool) -> list[tuple[int, float]]:
    seen = [chunk for kind in kinds for chunk in arm.chunks[kind]]
    if not starts:
        return [(tokens, seconds) for tokens, seconds, _ in seen]
    return [
        (sum(tokens for tokens, _, at in seen if at == start), sum(seconds for _, seconds, at in seen if at == start))
        for start in sorted({at for _, _, at in seen})
    ]


def _speed(arm: Arm, kind: str) -> float:
    return sum(tokens for tokens, _, _ in arm.chunks[kind]) / sum(seconds for _, seconds, _ in arm.chunks[kind])


def say(text: str) -> None:
    print(text, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--profile", action="append", required=True)
    parser.add_argument("--workload", default="builtin")
    parser.add_argument("--kind", action="append", help="of prompts; all where none is named")
    parser.add_argument("--limit", type=int, help="prompts of a kind")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--chunk", type=int, default=20)
    parser.add_argument("--restarts", type=int, default=1, help="times that all engines are started, chunks in between")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
