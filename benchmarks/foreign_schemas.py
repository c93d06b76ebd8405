"""Checks JSON schemas that nobody here chose: are answers under the mask valid, and what is refused?

    pip install check-jsonschema 'jsonschema[format-nongpl]'
    npm pack json-schema-test-suite && tar xzf json-schema-test-suite-*.tgz
    python benchmarks/foreign_schemas.py demo:smollm2 --vendored --suite package/tests [--answers 12] [--json FILE]

--vendored  the schemas in the package check-jsonschema
--suite     a folder of the JSON Schema Test Suite with a folder per draft, such as draft4: schemas with values that are
            valid or not

Each schema is tried strictly and leniently: it is refused, or `--walks` texts are made of random tokens that the masks
leave, on the model's vocabulary and without a pass. `--answers` schemas, spread over all of them, are also answered by
the model, greedily. Every text that ends is checked by `jsonschema`, formats included. A text that is not valid is a
fault, unless the schema's warnings name a keyword that the text violates.

The values of the suite are read under the mask, as JSON with Python's spacing. A valid one that is refused is counted
by what makes it acceptable: another order of its properties, integers without a fraction, open objects, no format, no
bound beyond 10^18, or no keywords beside `$ref`. An invalid one that is accepted is a fault, unless a warning names a
keyword that it violates. Values about which `jsonschema` and the suite disagree count as disputed.

Prints a table by group (a keyword in the suite), the refusals by keyword, and every fault; exits with 1 after faults.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, permutations
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
from referencing.exceptions import Unresolvable

from specplug import profile
from specplug.constraints.grammar_text import grammar_text
from specplug.constraints.schema_numbers import FARTHEST
from specplug.constraints.schema_walk import everywhere
from specplug.engines.llama_cpp.engine import LlamaCpp
from specplug.engines.llama_cpp.model import Model, open_model
from specplug.engines.llama_cpp.token_matcher import TokenMatcher
from specplug.errors import SpecplugError, UsageError
from specplug.generation.answers import Request, Sampling
from specplug.models.references import resolve

META_SCHEMAS = {
    "draft3": "http://json-schema.org/draft-03/schema#",
    "draft4": "http://json-schema.org/draft-04/schema#",
    "draft6": "http://json-schema.org/draft-06/schema#",
    "draft7": "http://json-schema.org/draft-07/schema#",
    "draft2019-09": "https://json-schema.org/draft/2019-09/schema",
    "draft2020-12": "https://json-schema.org/draft/2020-12/schema",
}
"""What `$schema` is in the schemas of each folder of the suite, which leave it out."""

MOST_TOKENS = 400
IN_STRING = 4000
"""Where more tokens than this are allowed, a text is inside a string or before any value."""

NAMED = {"then": "if", "else": "if", "oneOf": "anyOf"}
"""The keyword under which `jsonschema` may report another one."""


@dataclass(frozen=True, slots=True)
class Case:
    """A schema, and values with whether they are valid."""

    source: str
    group: str
    name: str
    schema: dict[str, Any]
    values: Sequence[tuple[Any, bool]] = ()


@dataclass(slots=True)
class Counts:
    """What was found for the schemas of a group in one way."""

    schemas: int = 0
    warned: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    texts: Counter[str] = field(default_factory=Counter)
    values: Counter[str] = field(default_factory=Counter)


def cases(suite: Path | None, *, vendored: bool) -> Iterator[Case]:
    if vendored:
        import check_jsonschema

        root = Path(check_jsonschema.__file__).parent / "builtin_schemas"
        for file in sorted(root.glob("*/*.json")):
            yield Case("check-jsonschema", "vendored", file.stem, json.loads(file.read_text(encoding="utf-8")))
    for draft, meta in META_SCHEMAS.items() if suite else ():
        for file in sorted((suite / draft).glob("**/*.json")):
            for case in json.loads(file.read_text(encoding="utf-8")):
                if not isinstance(schema := case["schema"], dict):
                    continue
                values = [(test["data"], test["valid"]) for test in case["tests"]]
                yield Case(draft, file.stem, case["description"], {"$schema": meta} | schema, values)


class Checker:
    """Tries schemas under the masks of one model."""

    def __init__(self, model: Model, walks: int) -> None:
        self.model = model
        self.walks = walks
        self.faults: list[str] = []
        pieces = [model.piece(token) for token in range(model.num_tokens)]
        self._closes = np.array([piece[:1] in (b"}", b"]") for piece in pieces])
        self._quotes = np.array([piece[:1] == b'"' for piece in pieces])
        self._ends = np.isin(np.arange(model.num_tokens), list(model.end_tokens))

    def check(self, case: Case, counts: Counts, *, strict: bool) -> None:
        counts.schemas += 1
        try:
            matcher, warnings = self._open(case.schema, strict=strict)
        except UsageError as error:
            counts.refused[str(error).removeprefix("JSON schema: ").partition(" at #")[0]] += 1
            return
        counts.warned += bool(warnings)
        for seed in range(self.walks):
            try:
                text = self._walk(matcher.copy(), random.Random(seed))
            except SpecplugError as error:
                self._fault(case, strict, f"a walk ends with {error}")
                continue
            counts.texts["cut" if text is None else self.judged(case, text, warnings, strict=strict)] += 1
        for value, valid in case.values:
            counts.values[self._read(case, value, valid, matcher, warnings, strict=strict)] += 1

    def judged(self, case: Case, text: str, warnings: Sequence[str], *, strict: bool) -> str:
        """Whether a text is valid; where it is not and no warning says so, that is a fault."""
        try:
            value = json.loads(text)
        except ValueError as error:
            self._fault(case, strict, f"{text[:80]!r} is no JSON: {error}")
            return "invalid"
        violated = violations(case.schema, value)
        if violated is None:
            return "not judged"
        if not violated:
            return "valid"
        if all(keywords & named(warnings) for keywords in violated):
            return "invalid, warned"
        self._fault(case, strict, f"{text[:80]!r} violates {violated}; warnings: {list(warnings)}")
        return "invalid"

    def _open(self, schema: dict[str, Any], *, strict: bool) -> tuple[TokenMatcher, Sequence[str]]:
        grammar = grammar_text(Sampling(json_schema=json.dumps(schema), strict=strict))
        assert grammar is not None
        return self.model.guidance.open(grammar), grammar.warnings

    def _walk(self, matcher: TokenMatcher, chooser: random.Random) -> str | None:
        """A text of random tokens that the masks allow; None after MOST_TOKENS. The longer, the sooner it closes."""
        tokens: list[int] = []
        while len(tokens) < MOST_TOKENS:
            allowed = np.unpackbits(matcher.mask(), count=self.model.num_tokens, bitorder="little").astype(bool)
            kinds = [allowed & self._ends, allowed & self._closes]
            kinds += [allowed & self._quotes] if allowed.sum() > IN_STRING else []
            closing = next((kind for kind in kinds if kind.any()), None)
            if closing is not None and chooser.random() < 0.5 + len(tokens) / MOST_TOKENS:
                allowed = closing
            token = int(chooser.choice(np.flatnonzero(allowed)))
            if token in self.model.end_tokens:
                return b"".join(map(self.model.piece, tokens)).decode()
            matcher.advance([token])
            tokens.append(token)
        return None

    def _read(
        self, case: Case, value: Any, valid: bool, matcher: TokenMatcher, warnings: Sequence[str], *, strict: bool
    ) -> str:
        """What becomes of a value of the suite under the mask."""
        if self._accepts(matcher, value):
            if valid:
                return "valid, accepted"
            violated = violations(case.schema, value)
            if not violated:
                return "disputed"
            if all(keywords & named(warnings) for keywords in violated):
                return "invalid, accepted with a warning"
            self._fault(case, strict, f"{json.dumps(value)[:80]} is accepted; warnings: {list(warnings)}")
            return "invalid, accepted"
        if not valid:
            return "invalid, refused"
        if violations(case.schema, value) != []:
            return "disputed"
        if any(self._accepts(matcher, one) for one in reordered(value)):
            return "valid, order of properties"
        if any(self._accepts(matcher, one) for one in reordered(whole(value))):
            return "valid, fraction of an integer"
        for name, wider in WIDER.items():
            if self._accepts(self._open(wider(case.schema), strict=False)[0], value):
                return f"valid, {name}"
        if warnings:
            return "valid, refused with a warning"
        self._fault(case, strict, f"the valid {json.dumps(value)[:80]} is refused")
        return "valid, refused"

    def _accepts(self, matcher: TokenMatcher, value: Any) -> bool:
        text = json.dumps(value, ensure_ascii=False)
        tokens = self.model.tokenize(text, add_special=False).tolist()
        try:
            matcher.copy().advance([*tokens, min(self.model.end_tokens)])
        except ValueError:
            return False
        return True

    def _fault(self, case: Case, strict: bool, what: str) -> None:
        self.faults.append(
            f"{case.source}, {case.group}, {case.name} ({'strict' if strict else 'lenient'}): {what} | "
            f"{json.dumps(case.schema)[:200]}"
        )


def violations(schema: dict[str, Any], value: Any) -> list[set[str]] | None:
    """For each error of a value the keywords that lead to it or are part of it; None where `jsonschema` fails."""
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        errors = list(kind(schema, format_checker=kind.FORMAT_CHECKER).iter_errors(value))
    except (re.error, RecursionError, Unresolvable):
        return None
    return [set(_keywords(error)) for error in errors]


def _keywords(error: jsonschema.ValidationError) -> Iterator[str]:
    for step in error.absolute_schema_path:
        if isinstance(step, str):
            yield step
    for inner in error.context or ():
        yield from _keywords(inner)


def named(warnings: Sequence[str]) -> set[str]:
    """The keywords that warnings name, and those under which `jsonschema` reports them."""
    keywords = {warning.split(" ", 1)[0] for warning in warnings}
    return keywords | {NAMED[keyword] for keyword in keywords & NAMED.keys()}


def reordered(value: Any) -> Iterator[Any]:
    """A value, and it with other orders of its outermost properties."""
    if not isinstance(value, dict):
        yield value
        return
    yield from (dict(items) for items in islice(permutations(value.items()), 120))


def whole(value: Any) -> Any:
    """A value with integers in place of whole numbers with a fraction."""
    if isinstance(value, dict):
        return {key: whole(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [whole(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def opened(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema that says of each object that it is open, which is what JSON Schema means where it says nothing."""
    copied: dict[str, Any] = json.loads(json.dumps(schema))
    for node in list(everywhere(copied)):
        if "properties" in node:
            node.setdefault("additionalProperties", True)
    return copied


def without_formats(schema: dict[str, Any]) -> dict[str, Any]:
    copied: dict[str, Any] = json.loads(json.dumps(schema))
    for node in everywhere(copied):
        node.pop("format", None)
    return copied


def without_far_bounds(schema: dict[str, Any]) -> dict[str, Any]:
    copied: dict[str, Any] = json.loads(json.dumps(schema))
    for node in everywhere(copied):
        for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            if isinstance(node.get(key), int | float) and abs(node[key]) > FARTHEST:
                del node[key]
    return copied


def without_siblings(schema: dict[str, Any]) -> dict[str, Any]:
    copied: dict[str, Any] = json.loads(json.dumps(schema))
    for node in everywhere(copied):
        if "$ref" in node and node is not copied:
            reference = node["$ref"]
            node.clear()
            node["$ref"] = reference
    return copied


WIDER = {
    "closed object": opened,
    "format": without_formats,
    "far bound": without_far_bounds,
    "beside $ref": without_siblings,
}
"""What makes a schema wider, by what is narrower here than in JSON Schema."""


def ask(engine: LlamaCpp, checker: Checker, chosen: Sequence[Case], max_tokens: int) -> dict[str, Counter[str]]:
    """Greedy answers of the model to schemas, by way of treating them."""
    found: dict[str, Counter[str]] = {"strict": Counter(), "lenient": Counter()}
    prompt = engine.model.chat_prompt([{"role": "user", "content": "Give a short example as JSON."}])
    for case in chosen:
        for way, counts in found.items():
            strict = way == "strict"
            sampling = Sampling(json_schema=json.dumps(case.schema), strict=strict)
            try:
                answer = engine.generate(Request(prompt, max_tokens, sampling))
            except UsageError:
                counts["refused"] += 1
                continue
            if answer.finish != "stop":
                counts["cut"] += 1
                continue
            grammar = grammar_text(sampling)
            assert grammar is not None
            counts[checker.judged(case, answer.text, grammar.warnings, strict=strict)] += 1
    return found


def table(found: dict[tuple[str, str, str], Counts]) -> list[str]:
    """A Markdown table: a row for each group and way."""
    lines = [
        "| source | group | way | schemas | refused | with warnings | texts valid | invalid, warned | cut "
        "| valid values taken | narrower: order, fraction, closed, format, bound, $ref | invalid refused "
        "| taken, warned | disputed |",
        "|---" * 14 + "|",
    ]
    for (source, group, way), one in found.items():
        values, texts = one.values, one.texts
        narrower = [values[f"valid, {why}"] for why in ("order of properties", "fraction of an integer", *WIDER)]
        valid = sum(count for name, count in values.items() if name.startswith("valid"))
        invalid = sum(count for name, count in values.items() if name.startswith("invalid"))
        lines.append(
            f"| {source} | {group} | {way} | {one.schemas} | {one.refused.total()} | {one.warned} "
            f"| {texts['valid']} of {texts.total() - texts['cut']} | {texts['invalid, warned']} | {texts['cut']} "
            f"| {values['valid, accepted']} of {valid} | {', '.join(map(str, narrower))} "
            f"| {values['invalid, refused']} of {invalid} | {values['invalid, accepted with a warning']} "
            f"| {values['disputed']} |"
        )
    return lines


def sums(found: dict[tuple[str, str, str], Counts]) -> dict[tuple[str, str, str], Counts]:
    """The counts of each source and way."""
    total: dict[tuple[str, str, str], Counts] = {}
    for (source, _, way), one in found.items():
        into = total.setdefault((source, "all", way), Counts())
        into.schemas += one.schemas
        into.warned += one.warned
        into.refused += one.refused
        into.texts += one.texts
        into.values += one.values
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--suite", type=Path)
    parser.add_argument("--vendored", action="store_true")
    parser.add_argument("--walks", type=int, default=4)
    parser.add_argument("--answers", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=100, help="of an answer of the model")
    parser.add_argument("--json", type=Path, help="write the counts to this file, too")
    args = parser.parse_args()
    every = list(cases(args.suite, vendored=args.vendored))
    found: dict[tuple[str, str, str], Counts] = {}
    answers: dict[str, Counter[str]] = {}
    with open_model(resolve(args.model)) as model:
        checker = Checker(model, args.walks)
        for case in every:
            for way in ("strict", "lenient"):
                counts = found.setdefault((case.source, case.group, way), Counts())
                checker.check(case, counts, strict=way == "strict")
        if args.answers:
            with LlamaCpp(model, profile.load("none")) as engine:
                chosen = every[:: max(1, len(every) // args.answers)][: args.answers]
                answers = ask(engine, checker, chosen, args.max_tokens)
    total = sums(found)
    print("\n".join(table(found | total)), end="\n\n")
    for (source, _, way), one in total.items():
        print(f"refused, {source}, {way}: {', '.join(f'{name} {n}' for name, n in one.refused.most_common())}")
    for way, texts in answers.items():
        print(f"answers of the model, {way}: {', '.join(f'{name} {n}' for name, n in sorted(texts.items()))}")
    print("\n".join(["", f"{len(checker.faults)} faults", *checker.faults]))
    if args.json is not None:
        rows = [
            {"source": source, "group": group, "way": way, "schemas": one.schemas, "with warnings": one.warned}
            | {"refused": one.refused, "texts": one.texts, "values": one.values}
            for (source, group, way), one in found.items()
        ]
        document = {"counts": rows, "answers": answers, "faults": checker.faults}
        args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return int(bool(checker.faults))


if __name__ == "__main__":
    sys.exit(main())
