"""What a draft of an MTP layer or an EAGLE-3 head costs at real widths, as a share of a pass of its model, by length.

    python benchmarks/head_step_costs.py [--rounds 20] [--kept 8192,32768] [--only mtp] [--layers 24] [--json FILE]

The models have random weights in q8_0: one with the widths of Qwen3.5-0.8B, 248 thousand tokens and an MTP layer, whose
output matrix is also trimmed to --kept rows, and one with those of SmolLM2-135M and an EAGLE-3 head with all rows, and
with 8,192 of them. Unlike in the published models, every second layer of the first has attention, its state has two
groups, and output matrices are not the embeddings. Times are CPU time of one thread, in interleaved rounds, the least
of each. A draft reads the last two tokens first. The models take 1.5 GB of disk, and 4 GB of memory while they are
written; --layers makes a smaller one, whose shares are larger.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time_ns
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import tiny_architectures
import tiny_gguf
import tiny_layers
from hand_driven import HandDriven
from reporting import positive_int, run_benchmark
from reporting import write as write_json

from specplug.core import EMPTY
from specplug.engines.llama_cpp.cache_fill import hashed_tokens
from specplug.engines.llama_cpp.context import open_context
from specplug.engines.llama_cpp.drafters.head_drafter import HeadDrafter
from specplug.engines.llama_cpp.drafters.head_finding import find_head
from specplug.engines.llama_cpp.drafters.head_opening import open_head
from specplug.engines.llama_cpp.model import open_model
from specplug.profile import Runtime
from specplug.proposers.eagle3 import Eagle3
from specplug.proposers.mtp import Mtp
from specplug.transforms.gguf_mtp_head import trim_mtp

RUNTIME = Runtime(threads=1, context=512, kv_type="f16", flash_attention=True)
LENGTHS = (1, 2, 3, 4, 8)
FILL = 128
"""Tokens of the text that is drafted for."""

QWEN35 = {"HEADS": 8, "HEAD": 256, "FEED_FORWARD": 3584, "STATE": 128, "SSM_HEADS": 16}
SMOLLM2 = {"HEADS": 9, "KV_HEADS": 3, "HEAD": 64, "FEED_FORWARD": 1536}
QWEN35_TOKENS, SMOLLM2_TOKENS = 248_320, 49_152
FEWER_ROWS = 8192
"""Rows of the smaller EAGLE-3 head."""

Heads = dict[str, Mtp | Eagle3]


def with_sizes(constants: dict[str, int], tokens: int) -> None:
    """Have the writers of tiny models use these sizes, and a vocabulary of so many tokens."""
    for module in (tiny_gguf, tiny_layers, tiny_architectures):
        for name, value in constants.items():
            if hasattr(module, name):
                setattr(module, name, value)
    known, merges = ORIGINAL_VOCABULARY()
    extra = [f"<extra {number}>" for number in range(tokens - len(known))]
    tiny_gguf.vocabulary = lambda: ([*known[:-2], *extra, *known[-2:]], merges)


ORIGINAL_VOCABULARY = tiny_gguf.vocabulary


def qwen35(folder: Path, args: argparse.Namespace) -> tuple[Path, Heads]:
    with_sizes(QWEN35, QWEN35_TOKENS)
    options: dict[str, Any] = {"width": 1024, "num_tokens": QWEN35_TOKENS, "weights": "q8_0"}
    path = tiny_architectures.qwen35(folder / "qwen35.gguf", mtp_layers=1, layers=args.layers or 24, **options)
    heads: Heads = {f"mtp, all {QWEN35_TOKENS:,} rows": Mtp()}
    for rows in args.kept:
        kept = np.sort(np.random.default_rng(0).permutation(QWEN35_TOKENS)[:rows]).astype(np.int32)
        trim_mtp(path, kept, folder / f"head-{rows}")
        heads[f"mtp, {rows:,} rows"] = Mtp(head=str(folder / f"head-{rows}"))
    return path, heads


def smollm2(folder: Path, args: argparse.Namespace) -> tuple[Path, Heads]:
    with_sizes(SMOLLM2, SMOLLM2_TOKENS)
    options: dict[str, Any] = {"width": 576, "num_tokens": SMOLLM2_TOKENS, "weights": "q8_0"}
    layers = args.layers or 30
    path = tiny_architectures.llama(folder / "smollm2.gguf", layers=layers, **options)
    taps, heads = (1, layers // 2, layers - 2), Heads()
    for rows in (None, FEWER_ROWS):
        head = folder / f"eagle3-{rows}.gguf"
        tiny_architectures.eagle3(head, taps=taps, target_width=576, draft_tokens=rows, **options)
        heads[f"eagle3, {rows or SMOLLM2_TOKENS:,} rows"] = Eagle3(model=str(head))
    return path, heads


MODELS: dict[str, Callable[[Path, argparse.Namespace], tuple[Path, Heads]]] = {"mtp": qwen35, "eagle3": smollm2}
"""By the method of its heads."""


def positive_ints(text: str) -> list[int]:
    return [positive_int(one) for one in text.split(",")]


def cpu_ms(work: Callable[[], object]) -> float:
    began = process_time_ns()
    work()
    return (process_time_ns() - began) / 1e6


def drafted(head: HeadDrafter, length: int) -> float:
    """Milliseconds of a draft, which changes nothing."""
    found = 0

    def work() -> None:
        nonlocal found
        found = len(head.propose(0, length))

    ms = cpu_ms(work)
    assert found == length, f"{found} instead of {length} draft tokens"
    return ms


def costs(folder: Path, method: str, args: argparse.Namespace) -> dict[str, Any]:
    path, sources = MODELS[method](folder, args)
    times: dict[str, list[float]] = {}
    with ExitStack() as stack:
        model = stack.enter_context(open_model(path, RUNTIME, mtp=method == "mtp"))
        driven: dict[str, tuple[HandDriven, Any]] = {}
        for name, source in {"": None, **sources}.items():
            target = stack.enter_context(open_context(model, RUNTIME, cells=512, num_ids=1, max_rows=1))
            head = None
            if source is not None:
                source.max_draft = max(LENGTHS)
                head, own = open_head(source, find_head(source, path), target, replace(RUNTIME, context=256), slots=1)
                head._end_tokens = frozenset()
                if own is not None:
                    stack.callback(own.close)
                stack.callback(head.close)
            one = HandDriven(target, head)
            driven[name] = one, one.begin(0, hashed_tokens(0, FILL, model.num_tokens))
            if head is not None:
                head.propose(0, 1)  # which reads the text
        for _ in range(args.rounds):
            for name, (one, stream) in driven.items():
                for length in LENGTHS:
                    times.setdefault(f"{name} pass", []).append(cpu_ms(lambda: one.step(stream, EMPTY)))  # noqa: B023
                    if one.head is not None:
                        times.setdefault(f"{name} {length}", []).append(drafted(one.head, length))
    least = {name: min(found) for name, found in times.items()}
    plain = least[" pass"]
    return {
        "pass_ms": plain,
        "heads": {
            name: {
                "pass_with_states": least[f"{name} pass"] / plain,
                "draft": {length: least[f"{name} {length}"] / plain for length in LENGTHS},
            }
            for name in sources
        },
    }


def report(found: dict[str, Any]) -> None:
    for name, figures in found["heads"].items():
        draft = figures["draft"]
        step = (draft[LENGTHS[-1]] - draft[1]) / (LENGTHS[-1] - 1)
        line = [f"{found['pass_ms']:.1f}", f"{figures['pass_with_states']:.2f}"]
        line += [f"{draft[length]:.3f}" for length in LENGTHS]
        print(f"| {name} | {' | '.join(line)} | {step:.3f} |", flush=True)


def run(args: argparse.Namespace, document: dict[str, Any]) -> None:
    head = ["head", "T(1) ms", "T(1) with states", *(f"draft of {length}" for length in LENGTHS), "one more token"]
    print(f"all but T(1) ms: shares of T(1)\n\n| {' | '.join(head)} |\n{'|---' * len(head)}|", flush=True)
    document["costs"] = {}
    for method in [args.only] if args.only else MODELS:
        with TemporaryDirectory() as folder:
            document["costs"][method] = costs(Path(folder), method, args)
        report(document["costs"][method])
    write_json(args.json, document)


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive_int, default=20)
    parser.add_argument("--kept", type=positive_ints, default=[8192, 32768])
    parser.add_argument("--only", choices=tuple(MODELS))
    parser.add_argument("--layers", type=positive_int, help="of both models; those of the published ones by default")
    parser.add_argument("--json", type=Path)
    parser.set_defaults(run=run)
    run_benchmark("head_step_costs.py", parser.parse_args())


if __name__ == "__main__":
    main()
