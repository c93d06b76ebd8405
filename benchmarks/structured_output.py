"""Compares the speed of answers that follow a JSON schema: ways to constrain them, and drafts.

    python benchmarks/structured_output.py --model demo:smollm2 [--server http://127.0.0.1:8080] [--json FILE] [--quick]

Ten schemas of different shapes, one request each, greedy and sampled. All arms answer a request before the next one is
asked, and the arm that goes first changes from request to request. The arms:

    before         plain decoding under llama.cpp's grammar sampler over the complete vocabulary, with the GBNF grammar
                   that llama-cpp-python makes from the schema, as specplug did before it used llguidance
    before, drafts the same with suffix lookup and token recycling
    mask           plain decoding under the mask of llguidance
    grammar        the same with the default profile's proposers, of which `grammar` drafts what the schema forces
    free           plain decoding without the schema
    server         llama-server with the same schema, where --server names one that serves the same model

Prints tokens per second of each arm, without prompt and first token, and the ratio to `before` and to `free` over the
same requests, with 95% intervals; whether `grammar` emits the tokens of `mask`; and of how many forced draft tokens all
were accepted.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

from llama_cpp.llama_grammar import json_schema_to_gbnf
from rich.console import Console
from rich.table import Table

from specplug import profile
from specplug.bench.statistics import Interval, paired_ratio
from specplug.engines.llama_cpp import sampling as sampling_module
from specplug.engines.llama_cpp.constraint import GrammarConstraint, constraint_of
from specplug.engines.llama_cpp.context import Logits
from specplug.engines.llama_cpp.engine import LlamaCpp
from specplug.engines.llama_cpp.model import Model, open_model
from specplug.generation.answers import Request, Sampling
from specplug.machine import hardware
from specplug.models.references import DEMO, resolve
from specplug.planning.acceptance import AcceptanceTable
from specplug.profile import Profile
from specplug.registry import ProposerSpec

TEXT: dict[str, Any] = {"type": "string"}


def record(properties: dict[str, Any], *optional: str) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "flat record": (
        "Describe a hiking boot for an online shop.",
        record({"product": TEXT, "brand": TEXT, "price": {"type": "number"}, "in_stock": {"type": "boolean"}}),
    ),
    "nested": (
        "A parcel goes from a bakery in Lyon to a school in Ghent. Describe sender and receiver.",
        record(
            {
                "sender": record({"name": TEXT, "address": record({"street": TEXT, "city": TEXT, "country": TEXT})}),
                "receiver": record({"name": TEXT, "address": record({"street": TEXT, "city": TEXT, "country": TEXT})}),
            }
        ),
    ),
    "array of records": (
        "List the ingredients of a pancake batter for four people.",
        record(
            {
                "ingredients": {
                    "type": "array",
                    "items": record({"name": TEXT, "amount": {"type": "integer"}, "unit": {"enum": ["g", "ml"]}}),
                    "minItems": 3,
                    "maxItems": 6,
                }
            }
        ),
    ),
    "enums": (
        "Classify this message: 'The second update made the printer stop answering.'",
        record(
            {
                "department": {"enum": ["sales", "technical support", "accounting"]},
                "urgency": {"enum": ["low", "normal", "high"]},
                "sentiment": {"enum": ["negative", "neutral", "positive"]},
                "language": {"enum": ["English", "French", "German"]},
            }
        ),
    ),
    "numbers": (
        "Give typical values for a small greenhouse in May.",
        record(
            {
                "temperature_celsius": {"type": "number"},
                "humidity_percent": {"type": "integer", "minimum": 0, "maximum": 100},
                "light_hours": {"type": "integer", "minimum": 0, "maximum": 24},
                "watering_litres_per_day": {"type": "number"},
            }
        ),
    ),
    "strings with patterns": (
        "Register a bicycle that belongs to the city library.",
        record(
            {
                "registration": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
                "colour": {"type": "string", "pattern": "^[a-z]{3,12}$"},
                "owner": TEXT,
            }
        ),
    ),
    "dates": (
        "Plan a two-day workshop about bees in early autumn.",
        record(
            {
                "title": TEXT,
                "first_day": {"type": "string", "format": "date"},
                "last_day": {"type": "string", "format": "date"},
                "registration_closes": {"type": "string", "format": "date"},
            }
        ),
    ),
    "optional properties": (
        "Write a contact entry for the plumber Nora Quist, who has no e-mail address.",
        record({"name": TEXT, "trade": TEXT, "phone": TEXT, "email": TEXT, "notes": TEXT}, "phone", "email", "notes"),
    ),
    "union": (
        "A customer paid 12.50 by card. Record the payment.",
        record(
            {
                "payment": {
                    "anyOf": [
                        record({"kind": {"const": "card"}, "amount": {"type": "number"}, "network": TEXT}),
                        record({"kind": {"const": "cash"}, "amount": {"type": "number"}, "change": {"type": "number"}}),
                    ]
                }
            }
        ),
    ),
    "tool call": (
        "Call the tool that reserves a table for three people at seven in the evening in the restaurant Seagull.",
        record(
            {
                "name": {"const": "reserve_table"},
                "arguments": record(
                    {"restaurant": TEXT, "people": {"type": "integer"}, "time": TEXT, "outside": {"type": "boolean"}}
                ),
            }
        ),
    ),
}
"""By name, a request and the schema of its answer."""

SAMPLINGS = {"greedy": Sampling(), "sampled": Sampling(temperature=0.8, seed=7)}
LOOKUPS = ("suffix", "token_recycling")
QUICK_SHAPES, QUICK_TOKENS = 2, 40


class CompleteList(GrammarConstraint):
    """llama.cpp's grammar sampler as it was used: on all tokens, without trying the likeliest one first."""

    def best(self, logits: Logits) -> int | None:
        rows = self.rows(logits, None)
        return int(rows[logits[rows].argmax()]) if len(rows) else None


def complete_list(model: Model, sampling: Sampling) -> Any:
    made = constraint_of(model, sampling)
    if isinstance(made, GrammarConstraint):
        made.__class__ = CompleteList
    return made


@dataclass(frozen=True, slots=True)
class Answered:
    """The tokens of one answer, where they are known, their number without the first one, and the seconds it took."""

    tokens: list[int]
    count: int
    seconds: float


@dataclass(slots=True)
class Arm:
    """
    answer     answers a request of a shape
    answers    so far
    """

    name: str
    answer: Callable[[str, Sampling], Answered]
    answers: list[Answered] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return sum(one.count for one in self.answers) / sum(one.seconds for one in self.answers)

    def over(self, base: Arm) -> Interval:
        def parts(arm: Arm) -> tuple[list[float], list[float]]:
            return [float(one.count) for one in arm.answers], [one.seconds for one in arm.answers]

        return paired_ratio(*parts(self), *parts(base))


def prompt_of(shape: str, *, with_schema: bool) -> str:
    text, schema = SHAPES[shape]
    return f"{text} Answer as JSON by this schema: {json.dumps(schema)}" if with_schema else f"{text} Answer as JSON."


def engine_arm(name: str, engine: LlamaCpp, constrained: str, max_tokens: int, with_schema: bool) -> Arm:
    """`constrained` is the field of Sampling that gets the constraint, or "" for none."""

    def answer(shape: str, sampling: Sampling) -> Answered:
        schema = json.dumps(SHAPES[shape][1])
        if constrained == "grammar":
            sampling = replace(sampling, grammar=json_schema_to_gbnf(schema))
        elif constrained:
            sampling = replace(sampling, json_schema=schema)
        message = {"role": "user", "content": prompt_of(shape, with_schema=with_schema)}
        found = engine.generate(Request(engine.model.chat_prompt([message]), max_tokens, sampling))
        return Answered(found.tokens, len(found.tokens) - 1, found.decode_seconds)

    return Arm(name, answer)


def server_arm(address: str, max_tokens: int, with_schema: bool) -> Arm:
    """An OpenAI server. Its own time for the answer is taken where it reports it, as llama-server does."""

    def answer(shape: str, sampling: Sampling) -> Answered:
        body = {
            "messages": [{"role": "user", "content": prompt_of(shape, with_schema=with_schema)}],
            "max_tokens": max_tokens,
            "temperature": sampling.temperature,
            "seed": sampling.seed or 0,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": SHAPES[shape][1], "strict": True},
            },
        }
        address_of = f"{address.rstrip('/')}/v1/chat/completions"
        request = HttpRequest(address_of, json.dumps(body).encode(), {"Content-Type": "application/json"})
        began = perf_counter()
        with urlopen(request, timeout=600) as response:
            found = json.load(response)
        seconds = perf_counter() - began
        timings = found.get("timings") or {}
        count = int(timings.get("predicted_n", found["usage"]["completion_tokens"])) - 1
        return Answered([], count, float(timings.get("predicted_ms", seconds * 1000.0)) / 1000.0)

    return Arm("server", answer)


def measure(args: argparse.Namespace, ref: str, name: str, model: Model, console: Console) -> dict[str, Any]:
    """The figures of one model with one way to sample."""
    shapes = list(SHAPES)[: QUICK_SHAPES if args.quick else None]
    max_tokens = QUICK_TOKENS if args.quick else args.max_tokens
    default = profile.load("default")
    # A cache type under which passes of all shapes round alike, so that the texts can be compared.
    base = replace(profile.load("serve"), runtime=replace(profile.load("serve").runtime, threads=args.threads))

    def with_methods(*methods: str) -> Profile:
        return replace(base, proposers=tuple(map(ProposerSpec, methods)))

    with ExitStack() as stack:

        def opened(arm: str, one: Profile, constrained: str) -> Arm:
            engine = stack.enter_context(LlamaCpp(model, one))
            engines[arm] = engine
            return engine_arm(arm, engine, constrained, max_tokens, args.schema_in_prompt)

        engines: dict[str, LlamaCpp] = {}
        arms = [
            opened("before", with_methods("none"), "grammar"),
            opened("before, drafts", with_methods(*LOOKUPS), "grammar"),
            opened("mask", with_methods("none"), "json_schema"),
            opened("grammar", replace(base, proposers=default.proposers), "json_schema"),
            opened("free", with_methods("none"), ""),
        ]
        if args.server:
            arms.append(server_arm(args.server, max_tokens, args.schema_in_prompt))
        rejected = count_rejected(engines["grammar"].loop.speculator.table)
        for arm in arms:  # opens what is opened once
            arm.answer(shapes[-1], SAMPLINGS[name])
        for repeat in range(args.repeats):
            for number, shape in enumerate(shapes):
                sampling = replace(SAMPLINGS[name], seed=(SAMPLINGS[name].seed or 0) + repeat)
                for offset in range(len(arms)):
                    arm = arms[(number + repeat + offset) % len(arms)]
                    arm.answers.append(arm.answer(shape, sampling))
        table = engines["grammar"].loop.speculator.table
        forced = next(place for place, one in enumerate(table.buckets) if one.name.endswith(" forced"))
        steps = engines["grammar"].loop.counters
        result = {
            "model": ref,
            "sampling": name,
            "requests": len(arms[0].answers),
            "tokens_per_second": {arm.name: round(arm.tokens_per_second, 2) for arm in arms},
            "over_before": {arm.name: arm.over(arms[0]).as_mapping() for arm in arms[1:]},
            "over_free": {arm.name: arm.over(arms[4]).as_mapping() for arm in arms if arm.name != "free"},
            "grammar_equals_mask": sum(
                one.tokens == other.tokens for one, other in zip(arms[2].answers, arms[3].answers, strict=True)
            ),
            "tokens_per_pass": round(steps.mean_acceptance_length, 3),
            "forced_all_accepted": not rejected[forced],
        }
    print_result(console, result)
    return result


def count_rejected(table: AcceptanceTable) -> Counter[int]:
    """The draft tokens of each bucket that the target rejects from now on."""
    rejected: Counter[int] = Counter()
    learn = table.count

    def count(bucket: int, hits: int, misses: int) -> None:
        rejected[bucket] += misses
        learn(bucket, hits, misses)

    table.count = count  # type: ignore[method-assign]
    return rejected


def print_result(console: Console, result: dict[str, Any]) -> None:
    table = Table(
        "arm", "tokens/s", "over before", "over free", box=None, title=f"{result['model']}, {result['sampling']}"
    )

    def words(found: dict[str, float] | None) -> str:
        return f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})" if found else "1"

    for arm, speed in result["tokens_per_second"].items():
        table.add_row(arm, f"{speed:.1f}", words(result["over_before"].get(arm)), words(result["over_free"].get(arm)))
    console.print(table)
    console.print(
        f"grammar emitted the tokens of mask in {result['grammar_equals_mask']} of {result['requests']} answers, "
        f"{result['tokens_per_pass']} tokens per pass; forced draft tokens were "
        f"{'all' if result['forced_all_accepted'] else 'not all'} accepted"
    )


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=[DEMO])
    parser.add_argument("--sampling", nargs="+", choices=[*SAMPLINGS], default=[*SAMPLINGS])
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--schema-in-prompt", action="store_true", help="tell the model the schema")
    parser.add_argument("--server", help="address of an OpenAI server with the same model, such as a llama-server")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SHAPES} shapes of {QUICK_TOKENS} tokens")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    args = parser.parse_args(given)
    console = Console(width=120)
    fingerprint = hardware.fingerprint()
    console.print(fingerprint)
    sampling_module.constraint_of = complete_list  # type: ignore[attr-defined]
    results = []
    for ref in args.model:
        with open_model(resolve(ref)) as model:
            results += [measure(args, ref, name, model, console) for name in args.sampling]
    if args.json is not None:
        args.json.write_text(json.dumps({"machine": fingerprint, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
