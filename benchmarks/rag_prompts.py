"""Long prompts like those of a retrieval pipeline: passages of this repository's own documents, then a question.

The same documents always yield the same prompts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from specplug.engines.llama_cpp.model import Model
from specplug.errors import UsageError

DOCUMENTS = Path(__file__).resolve().parents[1] / "docs"

FEWEST_WORDS, MOST_WORDS = 30, 180
"""Words of a passage; a longer section is divided between paragraphs, and a single longer paragraph is kept whole."""

FEWEST_TOKENS = 48
"""A prompt that lacks fewer tokens than this gets no further passage."""

BEGINNING = "Answer the question from the documents below.\n\n"


@dataclass(frozen=True, slots=True)
class Passage:
    """A part of one section of a document."""

    page: str
    heading: str
    text: str


def rag_prompts(model: Model, tokens: int, count: int, folder: Path = DOCUMENTS) -> list[str]:
    """`count` prompts of about `tokens` tokens each, without the chat template.

    Every prompt has other passages, until all are used; then all are used again in another order. Raises UsageError
    where `tokens` is too few for a passage, or more than all documents have.
    """
    supply = passages(folder)
    waiting: list[Passage] = []
    order = 0
    prompts = []
    for number in range(count):
        chosen: list[Passage] = []
        parts: list[str] = []
        left = tokens - _length(model, BEGINNING + _question(1, supply[0]))
        if left < FEWEST_TOKENS:
            raise UsageError(f"a prompt of {tokens} tokens has no room for a passage; use at least 150")
        while left >= FEWEST_TOKENS:
            passage = next((one for one in waiting if one not in chosen), None)
            if passage is None and len(chosen) == len(supply):
                raise UsageError(f"{folder.name} has fewer than {tokens} tokens; ask for shorter prompts")
            if passage is None:
                waiting += sorted(supply, key=lambda one: sha256(f"{order} {one}".encode()).digest())
                order += 1
                continue
            waiting.remove(passage)
            chosen.append(passage)
            text = f"Document {len(chosen)}: {passage.page}, {passage.heading}\n\n{passage.text}\n\n"
            ids = model.tokenize(text, add_special=False)[:left]
            parts.append(model.text(ids.tolist()))
            left -= len(ids)
        whole = chosen[:-1] or chosen  # the last passage may be cut
        place = number % len(whole)
        prompts.append(BEGINNING + "".join(parts).rstrip() + "\n\n" + _question(place + 1, whole[place]))
    return prompts


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
