"""What is trimmed, what it will draft for, and the files of each kind that do it.

Knows the questions that building asks. Each kind of model answers them in a file of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from specplug.bench.workloads import Prompt
from specplug.build.head_sizes import Costs, Hits
from specplug.core import IntArray
from specplug.models.drafter_folders import Manifest
from specplug.profile import Profile
from specplug.transforms.head_shape import HeadShape
from specplug.transforms.kept_ids import Vocabulary, Weights
from specplug.tune.subject import Subject
from specplug.tune.trace import Answer

Progress = Callable[[float], None]


class Source(Protocol):
    """A model to trim and its target, which may be the same.

    profile    with the engine's own choices filled in: how the target answers
    batched    whether its engine batches by itself
    workplace  a folder for drafters that are tried, which somebody else removes
    """

    profile: Profile
    batched: bool

    def vocabulary(self) -> Vocabulary: ...

    def guessable(self) -> IntArray:
        """int32[n], ascending: ids that the head has rows for."""

    def tokenize(self, texts: Sequence[str]) -> list[IntArray]:
        """Of each text its tokens (int32[n]), without any that a model puts around it."""

    def answering(self) -> AbstractContextManager[Subject]:
        """The target, opened to answer prompts."""

    def expected(self, answers: Sequence[Answer], progress: Progress) -> Weights | None:
        """float64[V]: how often each token was to be expected along these answers, by the probabilities that the target
        gave it; None where they are not to be had."""

    def shape(self, workplace: Path) -> HeadShape:
        """Sizes of the drafter with the whole head, in the format that it will have."""

    def target_bytes(self) -> int:
        """Weights that a pass of the target reads; its whole file, where its architecture's head is not known."""

    def can_judge(self) -> str | None:
        """None where drafts can be tried here; else why not."""

    def hits(
        self, answers: Sequence[Answer], nested: Sequence[IntArray], workplace: Path, progress: Progress
    ) -> list[list[Hits]]:
        """Of each nested set of ids and each answer, which guesses of a drafter with these rows are right."""

    def costs(self, ids: IntArray, workplace: Path) -> Costs:
        """What passes of the target take here, and draft steps with these rows and with all."""

    def measure(self, ids: IntArray, prompts: Sequence[Prompt], max_tokens: int, workplace: Path) -> dict[str, Any]:
        """Draft with these rows for the target, beside plain decoding: the figures of the arm in `bench --json`."""

    def trim(self, ids: IntArray, out: Path, built: Mapping[str, Any]) -> Manifest:
        """Write the drafter's folder, whole or not at all."""

    def close(self) -> None: ...
