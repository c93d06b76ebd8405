"""Drafting with the target's own weights from a part of the text: agreement by the share that is kept, and costs.

    python benchmarks/short_context.py MODEL [--tokens 4000] [--count 3] [--answer 64] [--states FOLDER]
    python benchmarks/short_context.py MODEL --costs [--tokens 4000]

The prompts are passages of this repository's documents with a question about one of them (rag), and the same with codes
hidden in them, some of which are asked for (needle). The target answers greedily. Each drafter gets the target's cells
of the parts that it keeps and is compared with the answer, given the right tokens before each place: counts, which a
busy machine does not change. `--states` keeps the target's cells of every prompt for the next run.

`--costs` times passes instead, over a cache that is filled by copying. With one thread that is CPU time, which other
programs disturb less. For the live comparison make prompts with rag_prompts.py and run long_context.py with the profile
`rapid`, alone on the machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

import numpy as np
from rag_prompts import BEGINNING, long_prompts, rag_prompts
from reporting import positive_int, run_benchmark, threads_text, write

from specplug import profile
from specplug.core import IntArray, int_array
from specplug.drafts.retrieval import CHUNK, Window
from specplug.engines.llama_cpp.cache_fill import CacheFill
from specplug.engines.llama_cpp.context import Context, cache_bytes, open_context
from specplug.engines.llama_cpp.drafters.chain_drafter import SCORE_CONTEXT, SCORED_ROWS
from specplug.engines.llama_cpp.drafters.model_drafter import ModelDrafter
from specplug.engines.llama_cpp.drafters.recorded_guesses import recorded_guesses
from specplug.engines.llama_cpp.drafters.slot_cells import cells_per_slot
from specplug.engines.llama_cpp.model import Model, open_model
from specplug.engines.llama_cpp.settings_choice import with_settings
from specplug.engines.llama_cpp.settings_table import label
from specplug.machine import fingerprint
from specplug.models.references import resolve
from specplug.profile import Runtime

FIRST = 64
RECENT = (256, 512)
CHUNKS = (0, 4, 8, 16)
"""The windows that are compared: without chunks for each of RECENT, with chunks for the first of them, and all."""

CHAIN = 4
"""Longest draft for which tokens per pass are counted."""

ROWS = (1, 2, 3, 4, 5, 8)
"""Rows of the passes that are timed."""

CHAINS = (1, 2, 4, 7)
"""Lengths of the chains for which it is said from which agreement they pay."""

REPEATS = 4
"""Passes of each kind, of which the shortest counts."""

NAMES = ("heron", "walrus", "lynx", "otter", "badger", "falcon", "marten", "puffin", "gecko", "tapir", "ibis", "stoat")
COLOURS = ("blue", "green", "red", "white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=positive_int, default=4000, help="tokens of a prompt")
    parser.add_argument("--count", type=positive_int, default=3, help="prompts of each kind")
    parser.add_argument("--answer", type=positive_int, default=64, help="tokens of an answer at most")
    parser.add_argument("--chunk", type=positive_int, default=CHUNK)
    parser.add_argument("--kind", choices=("rag", "needle"), action="append", help="one kind only")
    parser.add_argument("--threads", type=positive_int)
    parser.add_argument("--states", type=Path, help="an existing folder for the target's cells of the prompts")
    parser.add_argument("--costs", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.set_defaults(run=run)
    run_benchmark("short_context.py", parser.parse_args())


def run(args: argparse.Namespace, document: dict[str, Any]) -> None:
    chosen = profile.load("rapid")
    runtime = replace(chosen.runtime, context=args.tokens + args.answer + 256)
    if args.threads:
        runtime = replace(runtime, threads=args.threads)
    with open_model(resolve(args.model)) as model:
        runtime = with_settings(replace(chosen, runtime=runtime), model).runtime
        print(f"{model.path.name}, {label(runtime)}, {threads_text(runtime.threads)}\n")
        (costs if args.costs else agreement)(args, document, model, runtime)


# -- agreement ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Counts:
    right: int = 0
    tokens: int = 0
    passes: int = 0
    kept: int = 0
    length: int = 0


def agreement(args: argparse.Namespace, document: dict[str, Any], model: Model, runtime: Runtime) -> None:
    kinds = args.kind or ["rag", "needle"]
    windows = [Window(FIRST, recent) for recent in RECENT]
    windows += [Window(FIRST, RECENT[0], count * args.chunk, args.chunk) for count in CHUNKS if count]
    names = [f"{FIRST} first, {recent} recent" for recent in RECENT]
    names += [f"{FIRST} first, {RECENT[0]} recent, {count} chunks" for count in CHUNKS if count]
    everything = Window(FIRST, runtime.context - FIRST)
    fitting = [(n, w) for n, w in zip(names, windows, strict=True) if w.size < args.tokens] + [("all", everything)]
    found = {(kind, name): Counts() for kind in kinds for name, _ in fitting}
    lengths: list[int] = []
    with ExitStack() as stack:
        open_one = partial(open_context, model, runtime)
        target = stack.enter_context(
            open_one(cells=-(-runtime.context // 256) * 256 + 256, num_ids=3, max_rows=SCORED_ROWS)
        )
        for kind in kinds:
            for number, prompt in enumerate(prompts(model, kind, args.tokens, args.count)):
                tokens = answer(target, model, runtime, prompt, args.answer, args.states)
                lengths.append(len(prompt))
                if len(tokens) < 2:
                    continue
                for name, window in fitting:
                    right = agrees(target, model, runtime, window, prompt, tokens)
                    counts = found[kind, name]
                    counts.right += int(right.sum())
                    counts.tokens += len(right)
                    counts.passes += passes(right)
                    counts.kept += min(window.size, len(prompt))
                    counts.length += len(prompt)
                print(f"{kind}, prompt {number + 1}: {model.text(tokens.tolist())!r}", file=sys.stderr)
    print(
        f"{args.count} prompts of each kind, {min(lengths)} to {max(lengths)} tokens; answers of up to {args.answer};"
    )
    print(f"chunks of {args.chunk} tokens\n")
    print("| kind | kept | tokens kept | share | agreement | tokens per pass, chains of 4 |")
    print("|---" * 6 + "|")
    rows = [line(kind, name, counts, args.count) for (kind, name), counts in found.items()]
    print("\n".join(rows))
    write(args.json, document | {"prompt_tokens": lengths, "rows": rows})


def line(kind: str, name: str, counts: Counts, prompts: int) -> str:
    rate = counts.right / max(counts.tokens, 1)
    cells = [
        kind,
        name,
        f"{counts.kept / prompts:.0f}",
        f"{counts.kept / max(counts.length, 1):.2f}",
        f"{rate:.2f} ({counts.right} of {counts.tokens})",
        f"{counts.tokens / max(counts.passes, 1):.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def passes(right: np.ndarray) -> int:
    """Target passes for an answer with drafts of CHAIN tokens at every place, by where the drafter agrees."""
    at = count = 0
    while at < len(right):
        run = 0
        while run < CHAIN and at + run < len(right) and right[at + run]:
            run += 1
        at += run + 1
        count += 1
    return count


def agrees(
    target: Context, model: Model, runtime: Runtime, window: Window, prompt: IntArray, tokens: IntArray
) -> np.ndarray:
    """bool[len(tokens) - 1]: whether the drafter's likeliest token is the answer's, whose prompt is in slot 0."""
    cells = -(-(cells_per_slot(runtime.context, 8, window) + SCORE_CONTEXT + SCORED_ROWS) // 256) * 256
    with open_context(model, runtime, cells=cells, num_ids=2, max_rows=SCORED_ROWS) as context:
        drafter = ModelDrafter(
            context,
            None,
            slots=1,
            max_tokens=runtime.context,
            max_draft=8,
            branches=1,
            is_control=model.is_control,
            window=window,
            target_cells=partial(target.state_of, spare=2),
            cell_bytes=cache_bytes(model, runtime, 1),
        )
        guesses = recorded_guesses(drafter, prompt, tokens, 1, target_slot=0)
    return np.asarray(guesses.tokens == tokens[1:])


def answer(
    target: Context, model: Model, runtime: Runtime, prompt: IntArray, most: int, states: Path | None
) -> IntArray:
    """int32[n]: the target's greedy answer; afterwards slot 0 holds the prompt."""
    about = fingerprint.model_identity(model.path), label(runtime), prompt.tolist()
    name = sha256(json.dumps(about, default=str).encode()).hexdigest()[:20]
    kept = states / f"{name}.cells" if states else None
    target.clear()
    last: int
    if kept is not None and kept.is_file():
        data = kept.read_bytes()
        target.restore(0, data[4:])
        last = int.from_bytes(data[:4], "little")
    else:
        logits = target.read(prompt)
        last = int(logits[0].argmax())
        if kept is not None:
            kept.write_bytes(last.to_bytes(4, "little") + target.state(0))
    tokens = [last]
    while len(tokens) < most and tokens[-1] not in model.end_tokens:
        target.clear_batch()
        target.add(tokens[-1], len(prompt) + len(tokens) - 1, (0,))
        target.decode()
        tokens.append(int(target.logits(1)[0].argmax()))
    target.drop(0, len(prompt))
    return int_array(tokens)


# -- prompts -----------------------------------------------------------------------------------------------------------


def prompts(model: Model, kind: str, tokens: int, count: int) -> Iterator[IntArray]:
    texts = rag_prompts(model, tokens, count) if kind == "rag" else needle_prompts(model, tokens, count)
    for text in texts:
        yield model.chat_prompt([{"role": "user", "content": text}])


def needle_prompts(model: Model, tokens: int, count: int) -> list[str]:
    """Passages with a dozen codes between them, and a question for four of them. The same in every run."""
    random = np.random.default_rng(0)
    hidden: list[list[str]] = []
    questions: list[str] = []
    for _ in range(count):
        owners = [f"{COLOURS[int(random.integers(len(COLOURS)))]} {name}" for name in NAMES]
        hidden.append([f"The access code of the {one} is {int(random.integers(10_000, 99_999))}." for one in owners])
        asked = [owners[place] for place in random.permutation(len(owners))[:4].tolist()]
        questions.append(
            f"Question: what are the access codes of the {', the '.join(asked[:-1])} and the {asked[-1]}? "
            "Write one sentence for each, in the words of the text."
        )
    room = tokens - max(len(model.tokenize("\n\n".join(needles), add_special=False)) for needles in hidden)
    found = []
    for text, needles, question in zip(long_prompts(model, room, questions), hidden, questions, strict=True):
        parts = text.split("\n\n")[:-2]
        places = random.choice(np.arange(1, len(parts)), len(needles), replace=False).tolist()
        for place, needle in zip(sorted(places, reverse=True), needles, strict=True):
            parts.insert(place, needle)
        found.append(BEGINNING + "\n\n".join([*parts, question]))
    return found


# -- costs -------------------------------------------------------------------------------------------------------------


def costs(args: argparse.Namespace, document: dict[str, Any], model: Model, runtime: Runtime) -> None:
    clock, what = (thread_time, "CPU time") if runtime.threads == 1 else (perf_counter, "time")
    chosen = [count for count in CHUNKS if FIRST + RECENT[0] + count * args.chunk < args.tokens]
    contexts = [FIRST + RECENT[0] + count * args.chunk for count in chosen] + [args.tokens]
    found: dict[int, dict[int, float]] = {}
    cells = -(-(args.tokens + max(ROWS)) // 256) * 256
    with open_context(model, runtime, cells=cells, num_ids=2, max_rows=max(ROWS)) as context:
        fill = CacheFill(context)
        before = 0
        for length in contexts:
            fill.extend(0, before, length)
            before = length
            found[length] = {rows: row_ms(context, length, rows, clock) for rows in ROWS}
    print(f"T(n), ms of {what}, the least of {REPEATS}, by tokens in the cache\n")
    print(f"| tokens | {' | '.join(f'n = {rows}' for rows in ROWS)} |")
    print("|---" * (len(ROWS) + 1) + "|")
    rows = [f"| {length} | {' | '.join(f'{ms:.0f}' for ms in by.values())} |" for length, by in found.items()]
    print("\n".join(rows), end="\n\n")
    long = found[args.tokens]
    print("Agreement from which chains of a fixed length would save time, as nothing is read:\n")
    print(f"| kept | T(1, long) / T(1, kept) | {' | '.join(f'chains of {chain}' for chain in CHAINS)} |")
    print("|---" * (len(CHAINS) + 2) + "|")
    breaks = []
    for length in contexts[:-1]:
        step = found[length][1]
        cells_ = [least_rate(long, step, chain) for chain in CHAINS]
        texts = [f"{rate:.2f}" if rate is not None else "never" for rate in cells_]
        breaks.append(f"| {length} | {long[1] / step:.2f} | {' | '.join(texts)} |")
    print("\n".join(breaks))
    write(args.json, document | {"rows": rows, "breaks": breaks})


def row_ms(context: Context, length: int, rows: int, clock: Any) -> float:
    """Milliseconds of a pass over so many rows after `length` tokens."""
    times = []
    for _ in range(REPEATS):
        began = clock()
        context.clear_batch()
        context.add_span([1] * rows, length, 0, wanted=True)
        context.decode()
        context.logits(rows)
        times.append((clock() - began) * 1000)
        context.drop(0, length)
    return min(times)


def least_rate(long: dict[int, float], step_ms: float, chain: int) -> float | None:
    """The agreement with which chains of a fixed length cost as much per token as plain decoding."""
    for rate in np.arange(0.01, 1.001, 0.01).tolist():
        tokens = sum(rate**depth for depth in range(chain + 1))
        if (long[chain + 1] + chain * step_ms) / tokens <= long[1]:
            return float(rate)
    return None


if __name__ == "__main__":
    main()
