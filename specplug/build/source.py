"""The interface between building a trimmed drafter and the two model formats.

`build.llama_cpp` implements it for GGUF files, `build.checkpoint` for Hugging Face checkpoints.
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
    """A model to trim and the target that it will draft for, which may be the same model.

    profile    how the target answers, with the engine's defaults filled in
    batched    whether the target's engine batches requests by itself
    workplace  in the methods below: a folder for trial drafters, which the caller removes
    """

    profile: Profile
    batched: bool

    def vocabulary(self) -> Vocabulary: ...

    def ids_with_rows(self) -> IntArray:
        """int32[n], ascending: the ids that the head has rows for."""

    def tokenize(self, texts: Sequence[str]) -> list[IntArray]:
        """The tokens of each text (int32[n]), without special tokens around it."""

    def answering(self) -> AbstractContextManager[Subject]:
        """The target, opened to answer prompts."""

    def expected_counts(self, answers: Sequence[Answer], progress: Progress) -> Weights | None:
        """float64[V]: the sum of the target's probabilities of every token over all positions of these answers; None
        where the engine does not provide them."""

    def shape(self, workplace: Path) -> HeadShape:
        """The sizes of the drafter with its full head, in the weight format that the drafter will have."""

    def target_bytes(self) -> int:
        """Bytes of weights that a pass of the target reads; the file's size where its architecture is unknown."""

    def why_not_judged(self) -> str | None:
        """None where drafts can be tried here; otherwise the reason why they cannot."""

    def hits(
        self, answers: Sequence[Answer], nested: Sequence[IntArray], workplace: Path, progress: Progress
    ) -> list[list[Hits]]:
        """For each nested set of ids and each answer: which draft tokens of a drafter with these rows are accepted."""

    def costs(self, ids: IntArray, workplace: Path) -> Costs:
        """The time of target passes on this machine, and of draft steps with these rows and with all rows."""

    def measure(self, ids: IntArray, prompts: Sequence[Prompt], max_tokens: int, workplace: Path) -> dict[str, Any]:
        """Draft with these rows for the target, beside plain decoding; returns the figures that `bench --json` has."""

    def trim(self, ids: IntArray, out: Path, built: Mapping[str, Any]) -> Manifest:
        """Write the drafter's folder, completely or not at all."""

    def close(self) -> None: ...
