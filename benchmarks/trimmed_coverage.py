"""What share of a target's answers lies in a trimmed head, by what its rows are chosen by; cross-validated by prompt.

    python benchmarks/trimmed_coverage.py MODEL.gguf --workload prompts.jsonl [--limit 0] [--tokens 192]

counts       tokens of MODEL's greedy answers to the other prompts; those that never came by id
and prompts  the same; those that never came by how often they are in the text of those prompts, then by id
likelihoods  the probabilities that MODEL gave to every token at every place of those answers, added up: what
             `specplug build vocab-trim` does
prompts      tokens of those prompts' text alone (`--from raw`)
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
            kept = Answer(prompt.id, 0, prompt.category, tokens, answer, np.zeros((len(answer) - 1, 0), dtype=np.int32))
            counts.append(np.bincount(answer, minlength=size))
            likelihoods.append(source.expected_counts([kept], lambda share: None).astype(np.float32))
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
