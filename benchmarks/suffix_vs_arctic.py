"""Compares the suffix proposer with arctic-inference's SuffixDecodingCache on recorded texts, without a model.

The first command records greedy texts and requires llama-cpp-python. The second compares, and requires
arctic-inference:

    python benchmarks/suffix_vs_arctic.py --record MODEL.gguf --workload spec_bench.jsonl --per-category 12 traces.jsonl
    python benchmarks/suffix_vs_arctic.py traces.jsonl

Both proposers have the same budget, keep finished answers, and receive the requests in the order of the file.
Acceptance is that of greedy tree verification. Prints, per arm, the mean acceptance length (MAL), nodes per step, and
microseconds per Python call: `propose` against `speculate`, `observe` against `add_active_response`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from specplug.core import Draft, IntArray, Proposer, Step
from specplug.proposers.ngram import Ngram
from specplug.proposers.suffix import Suffix
from specplug.testing import replay


class Arctic:
    """SuffixDecodingCache as a specplug proposer, so that one replay serves both."""

    def __init__(self, cache_class: Any, **options: Any) -> None:
        self._cache = cache_class(max_tree_depth=64, max_cached_requests=100_000)
        self._options = options
        self._tail: dict[int, list[int]] = {}

    def begin(self, seq: int, prompt: IntArray) -> None:
        self._cache.start_request(seq, prompt)
        self._tail[seq] = prompt[-64:].tolist()

    def propose(self, seq: int, budget: int) -> Draft:
        found = self._cache.speculate(seq, self._tail[seq], max_spec_tokens=budget, **self._options)
        return Draft.of(found.token_ids, found.parents, [0] * len(found.token_ids))

    def observe(self, seq: int, step: Step) -> None:
        self._cache.add_active_response(seq, step.emitted)
        self._tail[seq] = (self._tail[seq] + step.emitted)[-64:]

    def end(self, seq: int) -> None:
        self._cache.stop_request(seq)
        del self._tail[seq]


class Timed:
    """A proposer whose calls are timed."""

    def __init__(self, proposer: Any) -> None:
        self._proposer = proposer
        self.requires = Suffix.requires
        self.buckets = Suffix.buckets
        self.us: dict[str, list[float]] = defaultdict(list)

    def begin(self, seq: int, prompt: IntArray) -> None:
        # The first look-up indexes the prompt, which counts as the start and not as a step.
        self._clock("begin", seq, prompt)
        self._clock("first", seq, 1)

    def propose(self, seq: int, budget: int) -> Draft:
        draft: Draft = self._clock("propose", seq, budget)
        return draft

    def observe(self, seq: int, step: Step) -> None:
        self._clock("observe", seq, step)

    def end(self, seq: int) -> None:
        self._clock("end", seq)

    def _clock(self, verb: str, *arguments: Any) -> Any:
        call = getattr(self._proposer, "propose" if verb == "first" else verb)
        start = time.perf_counter()
        result = call(*arguments)
        self.us[verb].append(1e6 * (time.perf_counter() - start))
        return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, help="JSONL of category, prompt and out (token ids)")
    parser.add_argument("--budget", type=int, default=16)
    parser.add_argument("--record", type=Path, metavar="GGUF")
    parser.add_argument("--workload", type=Path, help="JSONL of category and turns")
    parser.add_argument("--per-category", type=int, default=12)
    parser.add_argument("--max-tokens", type=int, default=128)
    arguments = parser.parse_args()
    if arguments.record:
        record(arguments)
        return 0
    traces = [json.loads(line) for line in arguments.traces.read_text().splitlines()]
    for name, make in arms().items():
        report(name, make(), traces, arguments.budget)
    return 0


def arms() -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {
        "specplug ngram": Ngram,
        "specplug suffix": Suffix,
        "specplug suffix, min_prob 0.1": lambda: Suffix(min_prob=0.1),
        "specplug suffix, no shared": lambda: Suffix(shared_tokens=0),
    }
    try:
        cache_class = import_module("arctic_inference.suffix_decoding").SuffixDecodingCache
    except ImportError:
        print(
            "arctic-inference is not installed; only specplug's arms run (pip install arctic-inference)",
            file=sys.stderr,
        )
        return found
    for tree in (False, True):
        for factor, offset, floor in ((1.0, 0.0, 0.1), (4.0, 1.0, 0.1), (4.0, 1.0, 0.02)):
            options: dict[str, Any] = {"use_tree_spec": tree, "min_token_prob": floor}
            options |= {"max_spec_factor": factor, "max_spec_offset": offset}
            name = f"arctic {'tree' if tree else 'path'}, {factor:.0f} m + {offset:.0f}, min_token_prob {floor}"
            found[name] = partial(Arctic, cache_class, **options)
    return found


def report(name: str, proposer: Any, traces: list[dict[str, Any]], budget: int) -> None:
    timed = Timed(proposer)
    arm: Proposer = timed
    steps = tokens = nodes = 0
    by_category: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for seq, trace in enumerate(traces):
        result = replay(arm, np.asarray(trace["prompt"], dtype=np.int32), trace["out"], budget, seq=seq)
        steps += len(result.steps)
        tokens += len(result.emitted)
        nodes += sum(len(step.draft) for step in result.steps)
        by_category[trace["category"]][0] += len(result.steps)
        by_category[trace["category"]][1] += len(result.emitted)
    us = timed.us
    propose = sorted(us["propose"])
    print(
        f"{name:42s} MAL {tokens / steps:.3f}  nodes/step {nodes / steps:4.1f}  us: propose "
        f"{statistics.fmean(propose):5.1f} (median {statistics.median(propose):5.1f}, "
        f"95% {propose[int(0.95 * len(propose))]:5.1f})  observe {statistics.fmean(us['observe']):4.1f}  "
        f"start {statistics.fmean(us['begin']) + statistics.fmean(us['first']):6.0f}  "
        f"end {statistics.fmean(us['end']):4.0f}"
    )
    print("    " + "  ".join(f"{category} {n / s:.2f}" for category, (s, n) in by_category.items()))


def record(arguments: argparse.Namespace) -> None:
    from llama_cpp import Llama
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    llama = Llama(str(arguments.record), n_ctx=4096, flash_attn=True, verbose=False)
    template = llama.metadata["tokenizer.chat_template"]
    chat = Jinja2ChatFormatter(template=template, eos_token="<|im_end|>", bos_token="<|im_start|>")
    taken: dict[str, int] = defaultdict(int)
    with arguments.traces.open("w") as out:
        for line in arguments.workload.read_text().splitlines():
            row = json.loads(line)
            taken[row["category"]] += 1
            if taken[row["category"]] > arguments.per_category:
                continue
            text = chat(messages=[{"role": "user", "content": row["turns"][0]}]).prompt
            prompt = llama.tokenize(text.encode(), add_bos=False, special=True)
            emitted: list[int] = []
            if len(prompt) + arguments.max_tokens > llama.n_ctx():
                continue
            llama.reset()
            for token in llama.generate(prompt, temp=0.0, repeat_penalty=1.0):
                emitted.append(token)
                if token == llama.token_eos() or len(emitted) >= arguments.max_tokens:
                    break
            out.write(json.dumps({"category": row["category"], "prompt": prompt, "out": emitted}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
