"""Times the first token of requests with a JSON schema against those without one.

    python benchmarks/constrained_first_token.py [--model REF] [--rounds 12]

Each round asks for one answer of each kind, with a schema that was not used before and the same prompt read anew. The
first constrained request also waits for the tokenizer of the constraint, and is reported by itself.
"""

from __future__ import annotations

import argparse
import json
from time import perf_counter

from structured_output import SHAPES

from specplug import profile
from specplug.bench.statistics import paired_ratio
from specplug.engines.llama_cpp.engine import LlamaCpp
from specplug.engines.llama_cpp.model import open_model
from specplug.generation.answers import Answer, Request, Sampling
from specplug.machine import hardware
from specplug.models.references import DEMO, resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO)
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    shapes = list(SHAPES.values())
    with open_model(resolve(args.model)) as model, LlamaCpp(model, profile.load("none")) as engine:

        def first_ms(text: str, schema: object | None) -> float:
            prompt = model.chat_prompt([{"role": "user", "content": text}])
            engine.loop.forget_prompts()
            began = perf_counter()
            asked = Request(prompt, 8, Sampling(json_schema=None if schema is None else json.dumps(schema)))
            stream = engine.stream(asked, Answer())
            next(stream)
            ms = (perf_counter() - began) * 1000
            stream.close()
            return ms

        free_first = first_ms(shapes[0][0], None)
        constrained_first = first_ms(*shapes[0])
        free, constrained = [], []
        for number in range(args.rounds):
            text, schema = shapes[number % len(shapes)]
            other = {**schema, "title": f"number {number}"}  # not one that was compiled before
            arms = [(free, None), (constrained, other)]
            for times, wanted in arms if number % 2 else arms[::-1]:
                times.append(first_ms(text, wanted))
        each = [1.0] * args.rounds
        ratio = paired_ratio(each, free, each, constrained)
    print(hardware.fingerprint())
    print(
        f"{resolve(args.model).name}, first request: {constrained_first:.0f} ms with a schema, {free_first:.0f} without"
    )
    print(f"later requests: with a schema {ratio.median:.3f} ({ratio.low:.3f}-{ratio.high:.3f}) of without")


if __name__ == "__main__":
    main()
