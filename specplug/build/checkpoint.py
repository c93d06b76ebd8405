"""A Hugging Face checkpoint to trim, or an EAGLE-3 head; the target answers in vLLM.

Knows folders. Imports vLLM only where the target has to answer. Tries no drafts: a head in this format runs inside vLLM
alone, where `specplug bench` measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from specplug.build.source import Progress
from specplug.core import IntArray
from specplug.errors import UsageError
from specplug.models.drafter_folders import Manifest
from specplug.profile import Profile
from specplug.registry import ProposerSpec
from specplug.transforms import checkpoint_head
from specplug.transforms.checkpoint_text import tokenize
from specplug.transforms.head_shape import HeadShape
from specplug.transforms.kept_ids import Vocabulary
from specplug.tune.subject import Subject
from specplug.tune.trace import Answer

AT_ONCE = 16
"""Answers that vLLM is opened for."""


TOKENIZER = "tokenizer.json"
"""An EAGLE-3 head comes without one, and reads its target's."""


class CheckpointSource:
    """See `Source`."""

    batched = True

    def __init__(self, model: Path, target: Path, *, notify: Callable[[str], None]) -> None:
        """UsageError for a model that cannot be trimmed."""
        self._model, self._target = model, target
        self._of_text = model if (model / TOKENIZER).is_file() else target
        if not (self._of_text / TOKENIZER).is_file():
            raise UsageError(f"{self._of_text}: has no {TOKENIZER}; name with --target the model that it drafts for")
        self._notify = notify
        self.profile = Profile("target", engine="vllm", model=str(target), proposers=(ProposerSpec("none"),))
        self._shape = checkpoint_head.head_shape(model, target=target)

    def vocabulary(self) -> Vocabulary:
        return checkpoint_head.vocabulary(self._of_text)

    def guessable(self) -> IntArray:
        return checkpoint_head.guessable(self._model)

    def tokenize(self, texts: Sequence[str]) -> list[IntArray]:
        return tokenize(self._of_text, texts)

    @contextmanager
    def answering(self) -> Iterator[Subject]:
        from specplug.engines.vllm.versions import require

        require()
        from specplug.tune.vllm import VllmSubject

        subject = VllmSubject(str(self._target), self.profile, most=AT_ONCE, notify=self._notify)
        try:
            yield subject
        finally:
            subject.close()

    def expected(self, answers: Sequence[Answer], progress: Progress) -> None:
        """vLLM tells the likeliest tokens of a place, not all."""

    def shape(self, workplace: Path) -> HeadShape:
        return self._shape

    def target_bytes(self) -> int:
        try:
            shape = checkpoint_head.head_shape(self._target)
        except UsageError:
            return sum(path.stat().st_size for path in self._target.glob("*.safetensors"))
        return shape.step_bytes(shape.num_tokens)

    def can_judge(self) -> str | None:
        return "drafts of a checkpoint run inside vLLM alone; specplug bench with the drafter's profile measures them"

    def hits(self, *_: object) -> NoReturn:
        raise AssertionError(self.can_judge())

    costs = measure = hits

    def trim(self, ids: IntArray, out: Path, built: Mapping[str, Any]) -> Manifest:
        return checkpoint_head.trim(self._model, ids, out, built=built, target=self._target)

    def close(self) -> None:
        """Nothing is open between calls."""
