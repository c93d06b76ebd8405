"""Long prompts like those of a retrieval pipeline: passages of this repository's own documents, then a question.

    python benchmarks/rag_prompts.py MODEL --tokens 3500 --count 8 --out rag.jsonl
    python benchmarks/rag_prompts.py MODEL --tokens 3500 --before builtin --limit 1 --out long.jsonl

Writes a workload. `--before` puts passages in front of the first turn of another workload's prompts instead, so that
every kind of work runs over a long context. The same documents always yield the same prompts.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from reporting import positive_int

from specplug.bench.workloads import limit, load_workload
from specplug.engines.llama_cpp.model import Model, open_model
from specplug.errors import UsageError
from specplug.models.references import resolve

DOCUMENTS = Path(__file__).resolve().parents[1] / "docs"

FEWEST_WORDS, MOST_WORDS = 30, 180
"""Words of a passage; a longer section is divided between paragraphs, and a single longer paragraph is kept whole."""

FEWEST_TOKENS = 48
"""A prompt that lacks fewer tokens than this gets no further passage."""

BEGINNING = "Answer the question from the documents below.\n\n"

UNRELATED = "The documents above are for later questions. First, this one:\n\n"


@dataclass(frozen=True, slots=True)
class Passage:
    """A part of one section of a document."""

    page: str
    heading: str
    text: str


def rag_prompts(model: Model, tokens: int, count: int, folder: Path = DOCUMENTS) -> list[str]:
    """`count` prompts of about `tokens` tokens each, without the chat template: passages, then a question about one.

    Every prompt has other passages, until all are used; then all are used again in another order. Raises UsageError
    where `tokens` is too few for a passage, or more than all documents have.
    """
    supply = _Supply(folder)
    room = tokens - _length(model, BEGINNING + _question(1, supply.all[0]))
    prompts = []
    for number in range(count):
        chosen, text = supply.take(model, room)
        whole = chosen[:-1] or chosen  # the last passage may be cut
        place = number % len(whole)
        prompts.append(BEGINNING + text + "\n\n" + _question(place + 1, whole[place]))
    return prompts


def long_prompts(model: Model, tokens: int, tasks: Sequence[str], folder: Path = DOCUMENTS) -> list[str]:
    """The tasks, each after so many passages that the prompt has about `tokens` tokens. Raises as `rag_prompts`."""
    supply = _Supply(folder)
    prompts = []
    for task in tasks:
        _, text = supply.take(model, tokens - _length(model, UNRELATED + task))
        prompts.append(f"{text}\n\n{UNRELATED}{task}")
    return prompts


class _Supply:
    """All passages of a folder, handed out in a fixed order that is another one each time all were used."""

    def __init__(self, folder: Path) -> None:
        self.all = list(dict.fromkeys(passages(folder)))
        self._folder = folder
        self._waiting: list[Passage] = []
        self._order = 0

    def take(self, model: Model, tokens: int) -> tuple[list[Passage], str]:
        """Passages of about `tokens` tokens together, the last one cut where it is too long, and their text."""
        if tokens < FEWEST_TOKENS:
            raise UsageError("the prompt has no room for a passage; ask for longer prompts")
        chosen: list[Passage] = []
        parts: list[str] = []
        while tokens >= FEWEST_TOKENS:
            passage = next((one for one in self._waiting if one not in chosen), None)
            if passage is None and len(chosen) == len(self.all):
                raise UsageError(f"{self._folder.name} has fewer tokens than that; ask for shorter prompts")
            if passage is None:
                self._waiting += sorted(self.all, key=lambda one: sha256(f"{self._order} {one}".encode()).digest())
                self._order += 1
                continue
            self._waiting.remove(passage)
            chosen.append(passage)
            text = f"Document {len(chosen)}: {passage.page}, {passage.heading}\n\n{passage.text}\n\n"
            ids = model.tokenize(text, add_special=False)[:tokens]
            parts.append(model.text(ids.tolist()))
            tokens -= len(ids)
        return chosen, "".join(parts).rstrip()


def passages(folder: Path) -> list[Passage]:
    """All passages of the Markdown files in a folder, in the order of the files' paths."""
    found = []
    for path in sorted(folder.rglob("*.md")):
        page = heading = path.stem
        body: list[str] = []
        in_code = False
        for line in [*path.read_text(encoding="utf-8").splitlines(), "# end"]:
            in_code ^= line.startswith("```")
            title = re.match(r"(#+) (.+)", line)
            if in_code or title is None:
                body.append(line)
                continue
            found += [Passage(page, heading, text) for text in _divided("\n".join(body))]
            heading, body = title[2], []
            page = heading if title[1] == "#" else page
    if not found:
        raise UsageError(f"{folder}: no Markdown files with text; run the script from a checkout")
    return found


def _divided(section: str) -> list[str]:
    """The paragraphs of a section, joined into passages of at most MOST_WORDS words; short remainders are dropped."""
    parts: list[str] = []
    for paragraph in re.split(r"\n\s*\n", section.strip()):
        if parts and len(f"{parts[-1]} {paragraph}".split()) <= MOST_WORDS:
            parts[-1] += "\n\n" + paragraph
        else:
            parts.append(paragraph)
    return [part for part in parts if len(part.split()) >= FEWEST_WORDS]


def _question(place: int, passage: Passage) -> str:
    return (
        f'Question: what does document {place}, "{passage.heading}", say? Explain it in full sentences, from the '
        "documents only, with the names and figures that it gives."
    )


def _length(model: Model, text: str) -> int:
    return len(model.tokenize(text, add_special=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=positive_int, default=3500, help="tokens of a prompt")
    parser.add_argument("--count", type=positive_int, default=8, help="prompts with a question about their passages")
    parser.add_argument("--before", metavar="WORKLOAD", help="put passages before the prompts of this workload")
    parser.add_argument("--limit", type=positive_int, help="prompts per category of that workload")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with open_model(resolve(args.model)) as model:
        if args.before is None:
            texts = rag_prompts(model, args.tokens, args.count)
            lines = [{"category": "rag", "turns": [text]} for text in texts]
        else:
            tasks = load_workload(args.before)
            tasks = limit(tasks, args.limit) if args.limit else tasks
            texts = long_prompts(model, args.tokens, [task.turns[0] for task in tasks])
            lines = [{"category": task.category, "turns": [text]} for task, text in zip(tasks, texts, strict=True)]
    args.out.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
