"""Measures the share of a target's answers that a trimmed head covers, by the criterion that its rows are chosen by.

    python benchmarks/trimmed_coverage.py MODEL.gguf --workload prompts.jsonl [--other SMALL.gguf] [--limit 0]
        [--tokens 192]

The rows are chosen on the answers to some of the prompts and evaluated on the others (cross-validation over prompts).
Prints, per criterion, the coverage by number of rows:

counts       counts of the tokens of MODEL's greedy answers; tokens that do not occur are ranked by id
and prompts  the same, but tokens that do not occur are ranked by their counts in the prompts, then by id
likelihoods  sums of the probabilities of every token over all positions of those answers, as `specplug build
             vocab-trim` does
prompts      counts of the tokens of the prompts alone (`--from raw`)
other        sums of the probabilities that another model with the same tokenizer, such as the drafter itself, gave
             along its own answers to the same prompts
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from specplug.bench.workloads import BUILTIN, Prompt, limit, load_workload
from specplug.build.head_sizes import SIZES
from specplug.build.llama_cpp import GgufSource
from specplug.core import IntArray
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
    parser.add_argument("--other", help="another model, whose own answers also choose rows")
    args = parser.parse_args()
    path = references.resolve(args.model)
    asked = load_workload(args.workload, category="all")
    asked = limit(asked, args.limit) if args.limit else asked
    size, always, criteria = recorded_answers(path, asked, args.tokens)
    counts = criteria["counts"]
    if args.other:
        criteria["other"] = recorded_answers(references.resolve(args.other), asked, args.tokens)[2]["likelihoods"]
    folds = np.array_split(np.random.default_rng(0).permutation(len(counts)), FOLDS)
    answered = sum(int(line.sum()) for line in counts)
    print(f"{hardware.fingerprint()}, {path.name}, {len(counts)} answers, {answered} tokens")
    sizes = [rows for rows in SIZES if len(always) <= rows < size]
    print(f"{'':12s}" + "".join(f"{rows:>9d}" for rows in sizes))
    for name in ("counts", "and prompts", "likelihoods", "prompts", *(["other"] if args.other else [])):
        shares = np.zeros(len(sizes))
        for fold in folds:
            others = np.setdiff1d(np.arange(len(counts)), fold)
            weights = chosen_by(name, {key: added(lines, others) for key, lines in criteria.items()})
            tested = added(counts, fold)
            shares += [coverage(by_size(weights, always, rows), tested) * tested.sum() for rows in sizes]
        shares /= answered
        print(f"{name:12s}" + "".join(f"{share:9.4f}" for share in shares))


def recorded_answers(
    path: Path, asked: Sequence[Prompt], max_tokens: int
) -> tuple[int, IntArray, dict[str, list[Weights]]]:
    """The size of the vocabulary, the rows that are always kept, and the weights of each answer by criterion."""
    source = GgufSource(path, path, quantize=None, threads=None)
    size, always = len(source.ids_with_rows()), source.vocabulary().always_kept()
    criteria: dict[str, list[Weights]] = {"counts": [], "likelihoods": [], "prompts": []}
    with open_model(path) as model, LlamaCpp(model, load("none")) as engine:
        for prompt in asked:
            tokens = model.chat_prompt([{"role": "user", "content": prompt.turns[0]}])
            answer = np.array(engine.generate(Request(tokens, max_tokens)).tokens, dtype=np.int32)
            none = np.zeros((len(answer) - 1, 0), dtype=np.int32)
            recorded = Answer(prompt.id, 0, prompt.category, tokens, answer, none)
            criteria["counts"].append(np.bincount(answer, minlength=size))
            expected = source.expected_counts([recorded], lambda share: None)
            criteria["likelihoods"].append(expected.astype(np.float32))
            criteria["prompts"].append(np.bincount(source.tokenize([prompt.turns[0]])[0], minlength=size))
    source.close()
    return size, always, criteria


def added(lines: Sequence[Weights], which: Sequence[int]) -> Weights:
    return np.sum([lines[index] for index in which], axis=0)


def chosen_by(name: str, weights: Mapping[str, Weights]) -> Weights:
    if name == "and prompts":
        return weights["counts"] + weights["prompts"] / (weights["prompts"].sum() + 1)
    return weights[name]


if __name__ == "__main__":
    main()
