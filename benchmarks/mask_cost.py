"""Measures what constraints cost per emitted token, without passes of the model, in thread CPU time.

    python benchmarks/mask_cost.py [--model REF ...]

Walks along an example answer with random logits in which the answer's token is likely: an exact row for the sampler,
as after a pass. For each vocabulary it prints the time to build llguidance's tokenizer and the memory that it takes,
then microseconds per token of the sampler: with the mask and with GBNF, greedy and sampled, and without a constraint.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from time import process_time, thread_time_ns
from typing import Any, cast

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from specplug.engines.llama_cpp.context import Context
from specplug.engines.llama_cpp.model import Model, load_model
from specplug.engines.llama_cpp.sampling import Sampler
from specplug.generation.answers import Sampling
from specplug.machine import hardware
from specplug.models.references import DEMO, resolve
from specplug.profile import Runtime

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "year": {"type": "integer"},
        "tags": {"type": "array", "items": {"enum": ["new", "used", "sold"]}},
    },
    "required": ["name", "year", "tags"],
}
ANSWER = '{"name": "a chair of oak, with a high back", "year": 1912, "tags": ["used", "sold"]}'
GBNF = r"""root ::= "{\"name\": " string ", \"year\": " [0-9]+ ", \"tags\": [" tag (", " tag)* "]}"
string ::= "\"" [^"\\]* "\""
tag ::= "\"new\"" | "\"used\"" | "\"sold\""
"""
LIKELY = 30.0
"""Added to the logit of the answer's token, so that it is drawn."""

CONSTRAINTS: dict[str, dict[str, Any]] = {
    "none": {},
    "JSON schema": {"json_schema": json.dumps(SCHEMA)},
    "GBNF": {"grammar": GBNF},
}
WAYS: dict[str, dict[str, Any]] = {"greedy": {}, "sampled": {"temperature": 0.8, "seed": 1}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=[DEMO])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(hardware.fingerprint())
    table = Table("vocabulary", "constraint", "way", "us per token, median", "largest", box=None)
    for ref in args.model:
        with load_model(resolve(ref), Runtime()) as model:
            _report_tokenizer(model)
            for constraint, fields in CONSTRAINTS.items():
                for way, options in WAYS.items():
                    walks = [_walk(model, Sampling(**fields, **options)) for _ in range(args.rounds)]
                    times = np.array(walks).min(axis=0)  # of each place, as other work only adds time
                    row = [str(model.num_tokens), constraint, way, f"{np.median(times):.0f}", f"{times.max():.0f}"]
                    table.add_row(*row)
    Console().print(table)


def _report_tokenizer(model: Model) -> None:
    process = psutil.Process()
    before, began = process.memory_info().rss, process_time()
    first = _cpu_ms(lambda: Sampler(model, Sampling(json_schema=json.dumps(SCHEMA))).close())
    built, took = process.memory_info().rss, process_time() - began
    again = _cpu_ms(lambda: Sampler(model, Sampling(json_schema=json.dumps(SCHEMA))).close())
    other = _cpu_ms(lambda: Sampler(model, Sampling(json_schema=json.dumps({"const": 1}))).close())
    print(
        f"{model.path.name}: tokenizer {took:.2f} s of CPU time, {(built - before) / 1e6:.0f} MB, with the first "
        f"constraint ({first:.1f} ms in its thread); the same schema again {again:.2f} ms, another {other:.2f} ms"
    )


def _cpu_ms(work: Callable[[], None]) -> float:
    began = thread_time_ns()
    work()
    return (thread_time_ns() - began) / 1e6


def _walk(model: Model, sampling: Sampling) -> list[float]:
    """Microseconds of the sampler for each token of the example answer."""
    tokens = model.tokenize(ANSWER, add_special=False).tolist()
    sampler = Sampler(model, sampling)
    generator = np.random.default_rng(0)
    times = []
    for token in tokens:
        logits = generator.standard_normal((1, model.num_tokens)).astype(np.float32)
        logits[0, token] += LIKELY
        began = thread_time_ns()
        if sampling.constraints or sampling.is_argmax:
            drawn = sampler.pick(cast(Context, None), logits, 0)
        else:  # without a constraint llama.cpp reads the row from its context, so the copy's way is timed
            drawn = sampler.pick_from(logits[0])
        times.append((thread_time_ns() - began) / 1e3)
        assert drawn == token, "the example answer is the likeliest"
    sampler.close()
    return times


if __name__ == "__main__":
    main()
