"""Separates what a model thinks before it answers from the answer, piece by piece.

The marks are those that chat templates use. This module depends on text alone.
Source: the templates of the families that are named below.
"""

from __future__ import annotations

from dataclasses import dataclass

from specplug.generation.text import overlap


@dataclass(frozen=True, slots=True)
class Marks:
    """The texts around reasoning."""

    opening: str
    closing: str


FAMILIES = (
    Marks("<think>", "</think>"),  # Qwen3, DeepSeek-R1, GLM-4.5, SmolLM3, MiniMax, Nemotron
    Marks("[THINK]", "[/THINK]"),  # Magistral
    Marks("<seed:think>", "</seed:think>"),  # Seed-OSS
    Marks("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
    Marks("◁think▷", "◁/think▷"),  # Kimi-VL
    Marks("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
)


def marks_of(template: str) -> Marks | None:
    """The marks that a chat template uses; None where it has none."""
    return next((marks for marks in FAMILIES if marks.closing in template), None)


class ReasoningReader:
    """Receives an answer piece by piece. Reasoning is what stands between the marks at its beginning.

    White space around the reasoning, and between it and the answer, belongs to neither.
    """

    def __init__(self, marks: Marks, *, opened: bool) -> None:
        """`opened`: the prompt ends with the opening mark, so that the answer begins with reasoning."""
        self._marks = marks
        self._held = ""
        self._place = "inside" if opened else "before"
        self._written = False
        """Whether any of the text of the present place was returned."""

    def feed(self, text: str) -> tuple[str, str]:
        """Add text; return the reasoning and the answer that are certain now."""
        self._held += text
        reasoning = ""
        if self._place == "before":
            start = self._held.lstrip()
            if start.startswith(self._marks.opening):
                self._move("inside", start[len(self._marks.opening) :])
            elif self._marks.opening.startswith(start):
                return "", ""
            else:
                self._place, self._written = "after", True
        if self._place == "inside":
            end = self._held.find(self._marks.closing)
            if end < 0:
                return self._released(overlap(self._held, self._marks.closing)), ""
            rest = self._held[end + len(self._marks.closing) :]
            self._held = self._held[:end].rstrip()
            reasoning = self._released(0)
            self._move("after", rest)
        answer = self._held if self._written else self._held.lstrip()
        self._written = self._written or bool(answer)
        self._held = ""
        return reasoning, answer

    def close(self) -> tuple[str, str]:
        """The rest, at the end of the answer."""
        held, self._held = self._held, ""
        if self._place == "inside":
            return (held if self._written else held.lstrip()).rstrip(), ""
        return "", held

    def _move(self, place: str, rest: str) -> None:
        self._place, self._held, self._written = place, rest, False

    def _released(self, keep: int) -> str:
        """Reasoning that can be shown: not the last `keep` characters, nor white space that may be the last."""
        text = self._held if self._written else self._held.lstrip()
        shown = text[: len(text) - keep].rstrip()
        self._held = text[len(shown) :]
        self._written = self._written or bool(shown)
        return shown


def opens_reasoning(marks: Marks, prompt_end: str) -> bool:
    """Whether a prompt that ends with this text has begun the reasoning."""
    return prompt_end.rstrip().endswith(marks.opening)
