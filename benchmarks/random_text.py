"""Prints a workload on which no draft can pay: prompts of random tokens, as JSONL.

    python benchmarks/random_text.py --model demo:smollm2 > random.jsonl
    specplug tune --model demo:smollm2 --workload random.jsonl --max-tokens 16 --budget 90s    # exit code 3

Keep the answers short: a small model soon repeats itself, and then drafts pay.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from specplug.engines.llama_cpp.model import open_model
from specplug.models import references


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=60, help="tokens per prompt")
    options = parser.parse_args()
    draw = np.random.default_rng(0)
    with open_model(references.resolve(options.model)) as model:
        for number in range(options.prompts):
            tokens = draw.integers(0, model.num_tokens, options.tokens).tolist()
            text = model.text([token for token in tokens if token not in model.end_tokens]).replace("\x00", " ")
            print(json.dumps({"id": str(number), "category": f"random {number % 3}", "turns": [text]}))


if __name__ == "__main__":
    main()
