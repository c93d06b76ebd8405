"""Checks JSON schemas that nobody here chose: are random texts along the masks valid, and what is refused?

    pip install check-jsonschema jsonschema && npm pack json-schema-test-suite && tar xzf json-schema-test-suite-*.tgz
    python benchmarks/schema_validity.py MODEL.gguf --suite package/tests/draft4 --vendored

--suite takes a folder of the JSON Schema Test Suite (draft 4), --vendored the schemas in the package check-jsonschema.
Each one is tried strictly and leniently, with random walks along the masks on the model's vocabulary, without a pass.
Every text that ends is checked by `jsonschema`. It prints how many schemas are refused strictly, by keyword, how many
texts ended and were valid, and each text that is invalid without a warning.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np

from specplug.constraints.grammar_text import grammar_text
from specplug.engines.llama_cpp.model import Model, load_model
from specplug.errors import SpecplugError, UsageError
from specplug.generation.answers import Sampling
from specplug.models.references import resolve
from specplug.profile import Runtime

DRAFT = "http://json-schema.org/draft-04/schema#"

MOST_TOKENS = 300
CLOSING = 0.6
"""Probability of a token that closes a string, a list or an object, or ends the text, where one is allowed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--suite", type=Path, action="append", default=[])
    parser.add_argument("--vendored", action="store_true")
    parser.add_argument("--walks", type=int, default=6)
    options = parser.parse_args()
    with load_model(resolve(options.model), Runtime()) as model:
        for name, schemas in _sources(options.suite, vendored=options.vendored):
            print(f"{name}: {len(schemas)} schemas")
            for strict in (True, False):
                _report(model, schemas, strict=strict, walks=options.walks)


def _sources(suites: list[Path], *, vendored: bool) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    for folder in suites:
        cases = [(file.stem, case) for file in sorted(folder.glob("*.json")) for case in json.loads(file.read_text())]
        yield (
            str(folder),
            [(f"{stem}: {case['description']}", {"$schema": DRAFT} | case["schema"]) for stem, case in cases],
        )
    if vendored:
        import check_jsonschema

        root = Path(check_jsonschema.__file__).parent / "builtin_schemas"
        files = sorted(root.glob("*/*.json"))
        yield "check-jsonschema", [(file.name, json.loads(file.read_text(encoding="utf-8"))) for file in files]


def _report(model: Model, schemas: list[tuple[str, Any]], *, strict: bool, walks: int) -> None:
    refused: Counter[str] = Counter()
    ended = valid = stuck = warned = 0
    for name, schema in schemas:
        sampling = Sampling(json_schema=json.dumps(schema), strict=strict)
        try:
            grammar = grammar_text(sampling)
            assert grammar is not None
            matcher = model.guidance.open(grammar)
        except UsageError as error:
            refused[_keyword(str(error))] += 1
            continue
        warned += bool(grammar.warnings)
        for seed in range(walks):
            try:
                text = _walk(model, matcher.copy(), random.Random(seed))
            except SpecplugError as error:
                print(f"  {name}: {error}")
                continue
            if text is None:
                stuck += 1
                continue
            ended += 1
            problem = _problem(schema, text)
            valid += problem is None
            if problem is not None and not grammar.warnings:
                print(f"  INVALID {name}: {text[:80]!r}: {problem[:100]} | {json.dumps(schema)[:160]}")
    counts = ", ".join(f"{keyword} {count}" for keyword, count in refused.most_common())
    print(
        f"  {'strict' if strict else 'lenient'}: {refused.total()} refused ({counts}); {warned} with warnings; "
        f"{valid} of {ended} texts valid, {stuck} not ended after {MOST_TOKENS} tokens"
    )


def _walk(model: Model, matcher: Any, chooser: random.Random) -> str | None:
    tokens: list[int] = []
    for _ in range(MOST_TOKENS):
        allowed = np.flatnonzero(np.unpackbits(matcher.mask(), count=model.num_tokens, bitorder="little")).tolist()
        ends = [token for token in allowed if token in model.end_tokens]
        if not ends and len(allowed) < 4000:
            ends = [token for token in allowed if model.piece(token)[:1] in (b'"', b"}", b"]")]
        elif not ends:
            ends = [token for token in model.tokenize('"', add_special=False).tolist() if token in set(allowed)]
        token = chooser.choice(ends if ends and chooser.random() < CLOSING else allowed)
        if token in model.end_tokens:
            return b"".join(map(model.piece, tokens)).decode()
        matcher.advance([token])
        tokens.append(token)
    return None


def _problem(schema: Any, text: str) -> str | None:
    """Why a text is not valid, by `jsonschema`; None where it is."""
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        value = json.loads(text)
        kind(schema).validate(value)
    except jsonschema.ValidationError as error:
        return error.message
    except ValueError as error:
        return f"no JSON: {error}"
    return None


def _keyword(error: str) -> str:
    return error.removeprefix("JSON schema: ").partition(" at #")[0]


if __name__ == "__main__":
    main()
