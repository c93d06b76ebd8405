"""Measures the share of a target's answers that a trimmed head covers, by the criterion that its rows are chosen by.

    python benchmarks/trimmed_coverage.py MODEL.gguf --workload prompts.jsonl [--limit 0] [--tokens 192]

The rows are chosen on the answers to some of the prompts and evaluated on the others (cross-validation over prompts).
Prints, per criterion, the coverage by number of rows:

counts       counts of the tokens of MODEL's greedy answers; tokens that do not occur are ranked by id
and prompts  the same, but tokens that do not occur are ranked by their counts in the prompts, then by id
likelihoods  sums of the probabilities of every token over all positions of those answers, as `specplug build
             vocab-trim` does
prompts      counts of the tokens of the prompts alone (`--from raw`)
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from specplug.bench.workloads import BUILTIN, limit, load_workload
from specplug.build.head_sizes import SIZES
from specplug.build.llama_cpp import GgufSource
from specplug.engines.llama_cpp.engine import LlamaCpp
from specplug.engines.llama_cpp.model import open_model
from specplug.generation.answers import Request
from specplug.machine import hardware
from specplug.models import references
from specplug.profile import load
from specplug.transforms.kept_ids import Weights, by_size, coverage
from specplug.tune.trace import Answer

FOLDS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--workload", default=BUILTIN)
    parser.add_argument("--limit", type=int, default=0, help="prompts per category; 0 for all")
    parser.add_argument("--tokens", type=int, default=192)
    args = parser.parse_args()
    path = references.resolve(args.model)
    source = GgufSource(path, path, quantize=None, threads=None)
    size = len(source.ids_with_rows())
    always = source.vocabulary().always_kept()
    asked = load_workload(args.workload, category="all")
    counts, likelihoods, prompts = [], [], []
    with open_model(path) as model, LlamaCpp(model, load("none")) as engine:
        for prompt in limit(asked, args.limit) if args.limit else asked:
            tokens = model.chat_prompt([{"role": "user", "content": prompt.turns[0]}])
            answer = np.array(engine.generate(Request(tokens, args.tokens)).tokens, dtype=np.int32)
            none = np.zeros((len(answer) - 1, 0), dtype=np.int32)
            recorded = Answer(prompt.id, 0, prompt.category, tokens, answer, none)
            counts.append(np.bincount(answer, minlength=size))
            likelihoods.append(source.expected_counts([recorded], lambda share: None).astype(np.float32))
            prompts.append(np.bincount(source.tokenize([prompt.turns[0]])[0], minlength=size))
    source.close()
    folds = np.array_split(np.random.default_rng(0).permutation(len(counts)), FOLDS)
    answered = sum(int(line.sum()) for line in counts)
    print(f"{hardware.fingerprint()}, {path.name}, {len(counts)} answers, {answered} tokens")
    sizes = [rows for rows in SIZES if len(always) <= rows < size]
    print(f"{'':12s}" + "".join(f"{rows:>9d}" for rows in sizes))
    for name in ("counts", "and prompts", "likelihoods", "prompts"):
        shares = np.zeros(len(sizes))
        for fold in folds:
            others = np.setdiff1d(np.arange(len(counts)), fold)
            weights = chosen_by(name, added(counts, others), added(likelihoods, others), added(prompts, others))
            tested = added(counts, fold)
            shares += [coverage(by_size(weights, always, rows), tested) * tested.sum() for rows in sizes]
        shares /= answered
        print(f"{name:12s}" + "".join(f"{share:9.4f}" for share in shares))


def added(lines: Sequence[Weights], which: Sequence[int]) -> Weights:
    return np.sum([lines[index] for index in which], axis=0)


def chosen_by(name: str, counts: Weights, likelihoods: Weights, prompts: Weights) -> Weights:
    if name == "and prompts":
        return counts + prompts / (prompts.sum() + 1)
    return {"counts": counts, "likelihoods": likelihoods, "prompts": prompts}[name]


if __name__ == "__main__":
    main()
