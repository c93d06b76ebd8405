"""Computes the acceptance of a drafter under a sampling target, by the way in which the draft token is chosen.

    python benchmarks/sampled_drafts.py --model some.gguf --drafter drafter:mine --temperature 0.8

The target samples answers. At every position, p is the target's distribution and q the drafter's, both after top-k,
top-p, min-p and temperature. Prints, per temperature, one JSON object with the number of positions and the means of

likeliest   p of the drafter's most likely token
drawn       the probability that both draw the same token with one random number, each from its cumulative distribution
            over its tokens in descending order: `vocab_trim` does so where the target samples
coupled     the probability that both draw the same token with one Gumbel noise g: the maximum of log p + g, and of
            log q + g (arXiv 2408.07978)
rejection   the sum of min(p, q), which is the acceptance of rejection sampling (arXiv 2211.17192)
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import numpy.typing as npt
from drafter_formats import answered

from specplug.bench.workloads import BUILTIN
from specplug.engines.llama_cpp.context import open_context
from specplug.engines.llama_cpp.drafters.input_table import InputTable
from specplug.engines.llama_cpp.model import open_model
from specplug.engines.llama_cpp.teacher_forcing import ROWS, teacher_forced_logits
from specplug.generation.answers import Sampling
from specplug.models import drafter_folders, references
from specplug.transforms.gguf_head import EMBEDDINGS, MODEL

Ranked = tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]
"""Ids in descending order of probability, and their probabilities."""


def drawn_from(logits: npt.NDArray[np.float32], sampling: Sampling) -> Ranked:
    """llama.cpp's sampler chain: top-k, top-p and min-p on the probabilities before temperature, then temperature."""
    ids = np.argsort(-logits, kind="stable")[: sampling.top_k or len(logits)]
    line = logits[ids].astype(np.float64)
    p = np.exp(line - line[0])
    p /= p.sum()
    if sampling.top_p < 1:
        p = p[: int(np.searchsorted(np.cumsum(p), sampling.top_p)) + 1]
    keep = int((p >= sampling.min_p * p[0]).sum())
    p = np.exp((line[:keep] - line[0]) / sampling.temperature)
    return ids[:keep], p / p.sum()


def acceptances(target: Ranked, drafter: Ranked) -> tuple[float, float, float, float]:
    """likeliest, drawn, coupled and rejection, as the module's docstring defines them, at one position."""
    p_of = dict(zip(target[0].tolist(), target[1].tolist(), strict=True))
    start_of = dict(zip(target[0].tolist(), (np.cumsum(target[1]) - target[1]).tolist(), strict=True))
    drawn = coupled = rejection = start = 0.0
    all_p = np.array([p_of.get(id, 0.0) for id in drafter[0].tolist()])
    unseen = 1.0 - all_p.sum()
    for id, q in zip(drafter[0].tolist(), drafter[1].tolist(), strict=True):
        p = p_of.get(id, 0.0)
        rejection += min(p, q)
        if p:
            coupled += 1.0 / (np.maximum(all_p / p, drafter[1] / q).sum() + unseen / p)
            drawn += max(0.0, min(start + q, start_of[id] + p) - max(start, start_of[id]))
        start += q
    return p_of.get(int(drafter[0][0]), 0.0), drawn, coupled, rejection


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--drafter", required=True, help="a folder that build vocab-trim wrote, or drafter:NAME")
    parser.add_argument("--workload", default=BUILTIN)
    parser.add_argument("--limit", type=int, default=2, help="prompts per category")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.4, 0.8, 1.2])
    args = parser.parse_args()
    path, folder = references.resolve(args.model), drafter_folders.resolve(args.drafter)
    manifest, kept = drafter_folders.read(folder)
    table = InputTable(folder / EMBEDDINGS, manifest.input_scale)
    for temperature in args.temperature:
        sampling = Sampling(temperature=temperature, seed=0)
        found: list[tuple[float, float, float, float]] = []
        texts, runtime = answered(path, args.workload, args.limit, args.max_tokens, sampling)
        with open_model(path) as model, open_model(folder / MODEL) as small:
            cells = -(-max(len(tokens) + len(answer) for tokens, answer in texts) // 256) * 256 + 256
            with (
                open_context(model, runtime, cells=cells, num_ids=1, max_rows=ROWS) as one,
                open_context(small, runtime, cells=cells, num_ids=1, max_rows=ROWS, inputs=table) as other,
            ):
                for tokens, answer in texts:
                    text = np.concatenate((tokens, np.array(answer[:-1], dtype=np.int32)))
                    pairs = zip(
                        teacher_forced_logits(one, text, len(tokens)),
                        teacher_forced_logits(other, text, len(tokens)),
                        strict=True,
                    )
                    for target_rows, drafter_rows in pairs:
                        for target, drafter in zip(target_rows, drafter_rows, strict=True):
                            rows, q = drawn_from(drafter, sampling)
                            found.append(acceptances(drawn_from(target, sampling), (kept[rows].astype(np.int64), q)))
        likeliest, drawn, coupled, rejection = (round(float(value), 4) for value in np.mean(found, axis=0))
        figures = {"likeliest": likeliest, "drawn": drawn, "coupled": coupled, "rejection": rejection}
        print(json.dumps({"temperature": temperature, "places": len(found), **figures}))


if __name__ == "__main__":
    main()
