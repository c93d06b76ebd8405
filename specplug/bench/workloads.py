"""Workloads: the prompts to measure with.

Reads the built-in workload, and JSONL files whose lines have `category` and either `turns` or `prompt`. Spec-Bench's
files (arXiv 2401.07851) can be used unchanged. The module does not depend on an engine.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from specplug.errors import UsageError
from specplug.machine.folders import expanded

BUILTIN = "builtin"
SIZE_LIMIT = 256 << 20
"""Bytes of a workload file at most; Spec-Bench's 480 questions have 1.5 million."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One conversation: the user's turns, which are answered one after the other."""

    id: str
    category: str
    turns: tuple[str, ...]


def load_workload(name_or_path: str | Path, *, category: str | None = None) -> list[Prompt]:
    """The prompts of `builtin`, or of a JSONL file. A UsageError names the line that is wrong.

    category  the category of prompts that name none; with None such a prompt is refused
    """
    asked = os.fspath(name_or_path)
    if asked == BUILTIN:
        content = resources.files("specplug.bench").joinpath("builtin.jsonl").read_bytes()
    else:
        content = _read(expanded(asked))
    prompts = parse_workload(content, asked, category=category)
    if not prompts:
        raise UsageError(f"{asked}: holds no prompts; write one JSON object with category and turns on each line")
    return prompts


def parse_workload(content: bytes, source: str, *, category: str | None = None) -> list[Prompt]:
    """One prompt per line of JSONL that is not blank. A prompt without an id gets its line number as id."""
    prompts: list[Prompt] = []
    first_seen: dict[str, int] = {}
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            prompt = _prompt(line, number, category)
        except _BrokenLine as wrong:
            raise UsageError(f"{source}: line {number}: {wrong}") from None
        if prompt.id in first_seen:
            raise UsageError(
                f"{source}: line {number}: id {prompt.id} was used on line {first_seen[prompt.id]}; change it"
            )
        first_seen[prompt.id] = number
        prompts.append(prompt)
    return prompts


def limit(prompts: Iterable[Prompt], n_per_category: int) -> list[Prompt]:
    """The first `n_per_category` prompts of every category, in the order of the workload."""
    taken: Counter[str] = Counter()
    kept = []
    for prompt in prompts:
        if taken[prompt.category] < n_per_category:
            taken[prompt.category] += 1
            kept.append(prompt)
    return kept


def categories(prompts: Sequence[Prompt]) -> list[str]:
    """The categories, in the order of their first prompts."""
    return list(dict.fromkeys(prompt.category for prompt in prompts))


class _BrokenLine(Exception):
    """A line that cannot be read. The message has the form `what is wrong; what to do`."""


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read(SIZE_LIMIT + 1)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such workload; name a JSONL file, or {BUILTIN}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UsageError(f"{str(path)!r}: cannot be read ({error}); name a JSONL file, or {BUILTIN}") from None
    if len(content) > SIZE_LIMIT:
        raise UsageError(f"{path}: larger than {SIZE_LIMIT >> 20} MiB; split it")
    return content


def _prompt(line: bytes, number: int, category: str | None) -> Prompt:
    try:
        entry = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _BrokenLine(f"byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise _BrokenLine(f"not JSON ({error.msg} at column {error.colno}); correct the line or drop it") from None
    except (RecursionError, ValueError):  # nested too deep; a number of thousands of digits
        raise _BrokenLine("not JSON that can be read; correct the line or drop it") from None
    if not isinstance(entry, dict):
        raise _BrokenLine("not a JSON object; write category and turns, or prompt")
    return Prompt(_id(entry, number), _category(entry, category), _turns(entry))


def _id(entry: dict[str, object], number: int) -> str:
    value = entry.get("question_id", entry.get("id", number))
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise _BrokenLine(f"the id {value!r} is neither text nor a whole number; change it")
    return str(value)


def _category(entry: dict[str, object], default: str | None) -> str:
    if "category" not in entry and default is not None:
        return default
    if "category" not in entry:
        raise _BrokenLine(f"no category among its keys ({', '.join(entry) or 'none'}); add it")
    category = entry["category"]
    if not isinstance(category, str) or not category.strip():
        raise _BrokenLine("category is not text; name the category of the prompt")
    return category


def _turns(entry: dict[str, object]) -> tuple[str, ...]:
    if ("turns" in entry) == ("prompt" in entry):
        what = "both turns and prompt; keep one" if "turns" in entry else "neither turns nor prompt; add one"
        raise _BrokenLine(what)
    turns = entry.get("turns", [entry.get("prompt")])
    if not isinstance(turns, list) or not turns:
        raise _BrokenLine('turns is not a list of texts; write ["..."]')
    for turn in turns:
        if not isinstance(turn, str) or not turn.strip():
            raise _BrokenLine("a turn or prompt is empty or not text; write the user's message")
        if not _encodes(turn):
            raise _BrokenLine("a turn or prompt holds half a surrogate pair (\\ud800 to \\udfff); correct it")
    return tuple(turns)


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
