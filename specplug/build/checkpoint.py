"""Trimming a Hugging Face checkpoint or an EAGLE-3 head, with the target's answers from vLLM.

vLLM is imported only when the target has to answer. Drafts are not tried here: a head in this format runs only inside
vLLM, where `specplug bench` measures it.
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
from specplug.models.hub_reference import weight_files
from specplug.profile import Profile
from specplug.registry import ProposerSpec
from specplug.transforms import checkpoint_head
from specplug.transforms.checkpoint_text import tokenize
from specplug.transforms.head_shape import HeadShape
from specplug.transforms.kept_ids import Vocabulary
from specplug.tune.subject import Subject
from specplug.tune.trace import Answer

AT_ONCE = 16
"""Sequences that vLLM answers at once."""

TOKENIZER = "tokenizer.json"
"""An EAGLE-3 head has no tokenizer and uses its target's."""


class CheckpointSource:
    """See `Source`."""

    batched = True

    def __init__(self, model: Path, target: Path, *, notify: Callable[[str], None]) -> None:
        """UsageError for a model that cannot be trimmed."""
        self._model, self._target = model, target
        self._with_tokenizer = model if (model / TOKENIZER).is_file() else target
        if not (self._with_tokenizer / TOKENIZER).is_file():
            raise UsageError(
                f"{self._with_tokenizer}: has no {TOKENIZER}; name with --target the model that it drafts for"
            )
        self._notify = notify
        self.profile = Profile("target", engine="vllm", model=str(target), proposers=(ProposerSpec("none"),))
        self._shape = checkpoint_head.head_shape(model, target=target)

    def vocabulary(self) -> Vocabulary:
        return checkpoint_head.vocabulary(self._with_tokenizer)

    def ids_with_rows(self) -> IntArray:
        return checkpoint_head.ids_with_rows(self._model)

    def tokenize(self, texts: Sequence[str]) -> list[IntArray]:
        return tokenize(self._with_tokenizer, texts)

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

    def expected_counts(self, answers: Sequence[Answer], progress: Progress) -> None:
        """None: vLLM returns only the most likely tokens of a position, not the probabilities of all."""

    def shape(self, workplace: Path) -> HeadShape:
        return self._shape

    def target_bytes(self) -> int:
        try:
            shape = checkpoint_head.head_shape(self._target)
        except UsageError:
            names = weight_files(path.name for path in self._target.glob("*.safetensors"))
            return sum((self._target / name).stat().st_size for name in names)
        return shape.step_bytes(shape.num_tokens)

    def why_not_judged(self) -> str | None:
        return "a checkpoint's drafts run only inside vLLM; specplug bench with the drafter's profile measures them"

    def hits(self, *_: object) -> NoReturn:
        raise AssertionError(self.why_not_judged())

    costs = measure = hits

    def trim(self, ids: IntArray, out: Path, built: Mapping[str, Any]) -> Manifest:
        return checkpoint_head.trim(self._model, ids, out, built=built, target=self._target)

    def close(self) -> None:
        """Nothing to do: nothing stays open between calls."""
