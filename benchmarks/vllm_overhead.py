"""Measures the time that specplug adds to a step of vLLM, by the number of sequences, without an engine.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/vllm_overhead.py [--batch 1 16 64 256] [--steps 300] [--top-ids]

The sequences follow one random text source with branches and repeats, and every draft is verified against the source's
next tokens, so that steps emit one token or several, as with a model. Prints, per number of sequences, the median and
the 90th percentile of the microseconds per step, with

drafting     suffix and token recycling with four draft tokens under a static plan, for every sequence in every step
backed off   a cost curve with 20 ms per pass and a proportional share per draft token, so that no draft pays and the
             proposers back off: the median is a step without drafts, and the slowest tenth are steps with drafts
"""

from __future__ import annotations

import argparse
from statistics import median, quantiles
from time import perf_counter_ns

import numpy as np

from specplug import registry
from specplug.drafts.chains import as_chains
from specplug.engines.vllm.drafting import Drafting, Pass
from specplug.engines.vllm.request_table import RequestTable
from specplug.planning.batch_speculator import BatchSpeculator
from specplug.planning.cost import BatchCost, CostCurve
from specplug.registry import ProposerSpec

K, PROMPT, VOCAB, ANSWER = 4, 300, 49_152, 200
PLAIN_MS = 20.0
METHODS = ("suffix", "token_recycling")


def texts(count: int, length: int) -> np.ndarray:
    """int32[count, length]: random texts in which each token has three successors, with shares 0.6, 0.3 and 0.1."""
    random = np.random.default_rng(0)
    successors = random.integers(0, VOCAB, (VOCAB, 3)).astype(np.int32)
    chosen = random.choice(3, p=(0.6, 0.3, 0.1), size=(count, length))
    lines = np.zeros((count, length), dtype=np.int32)
    lines[:, 0] = random.integers(0, VOCAB, count)
    for i in range(1, length):
        lines[:, i] = successors[lines[:, i - 1], chosen[:, i]]
    copied = random.integers(0, PROMPT - 40, count)
    for line, start in zip(lines, copied.tolist(), strict=True):
        line[PROMPT + 60 : PROMPT + 100] = line[start : start + 40]  # a passage of the prompt is repeated
    return lines


def measure(batch: int, steps: int, *, static: bool, top: bool) -> tuple[list[float], float]:
    """The microseconds of every step, and the emitted tokens per sequence and step."""
    proposers = [as_chains(registry.build([ProposerSpec(method)])) for method in METHODS]
    rows = batch * (K + 1)
    points = [1, batch, rows] if batch > 1 else [1, rows]
    cost = BatchCost({1: CostCurve([0], points, [[*[PLAIN_MS] * (len(points) - 1), PLAIN_MS * (K + 1)]])})
    drafting = Drafting(
        BatchSpeculator(proposers, METHODS, cost, k=K, static=static), cost, RequestTable(1 << 20), adaptive=False
    )
    text = texts(batch, PROMPT + ANSWER + (K + 1) * steps)
    names = [f"request {row}" for row in range(batch)]
    live = dict.fromkeys(names)
    lengths = np.full(batch, PROMPT, dtype=np.int64)
    prompts = np.full(batch, PROMPT, dtype=np.int32)
    ids = np.random.default_rng(1).integers(0, VOCAB, (rows, 8)).astype(np.int32)
    drafts: list[list[int]] = [[] for _ in range(batch)]
    taken, emitted = [], 0
    for step in range(steps + 10):
        sampled = []
        for row in range(batch):
            place = int(lengths[row])
            accepted = 0
            while accepted < len(drafts[row]) and drafts[row][accepted] == text[row, place + accepted]:
                accepted += 1
            sampled.append(text[row, place : place + accepted + 1].tolist())
        lengths += [len(tokens) for tokens in sampled]
        done = Pass(
            names,
            sampled,
            [len(draft) for draft in drafts],
            lengths,
            prompts,
            text,
            batch + sum(map(len, drafts)),
            live,
            lambda request_id: None,
            (lambda wanted, k: ids[wanted % len(ids), :k]) if top else None,
        )
        began = perf_counter_ns()
        drafts = drafting.step(done)
        if step >= 10:
            taken.append((perf_counter_ns() - began) / 1e3)
            emitted += sum(map(len, sampled))
    return taken, emitted / batch / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument(
        "--top-ids", action="store_true", help="provide top-k ids with every pass; reading them is not counted"
    )
    options = parser.parse_args()
    print("| sequences | drafting, us (90%) | tokens per pass | backed off, us (90%) |")
    print("|---|---|---|---|")
    for batch in options.batch:
        busy, tokens = measure(batch, options.steps, static=True, top=options.top_ids)
        idle, _ = measure(batch, options.steps, static=False, top=False)
        cells = [f"{median(line):.0f} ({quantiles(line, n=10)[-1]:.0f})" for line in (busy, idle)]
        print(f"| {batch} | {cells[0]} | {tokens:.2f} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    main()
