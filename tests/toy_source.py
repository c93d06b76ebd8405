"""The toy target as a model to trim: the drafter proposes the target's most likely token among the kept ones."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from toy_subject import ToySubject

from specplug.bench.workloads import Prompt
from specplug.build.head_sizes import Costs, Hits
from specplug.build.source import Progress
from specplug.core import IntArray, int_array
from specplug.models import drafter_folders
from specplug.models.drafter_folders import Manifest
from specplug.profile import Profile, Runtime
from specplug.registry import ProposerSpec
from specplug.transforms.head_shape import HeadShape
from specplug.transforms.kept_ids import Vocabulary, Weights
from specplug.tune.subject import Subject
from specplug.tune.trace import Answer


class ToySource:
    """A `Source` without an engine. A pass of the target takes 10 ms, whatever its rows.

    step_ms          milliseconds of a draft step per row of the head
    not_judged       the reason why drafts cannot be tried; None where they can
    ids_without_row  ids that the head lacks
    expected         the result of `expected_counts`
    """

    batched = False

    def __init__(
        self,
        *,
        step_ms: float = 0.01,
        not_judged: str | None = None,
        ids_without_row: Sequence[int] = (),
        expected: Weights | None = None,
    ) -> None:
        none = (ProposerSpec("none"),)
        self.profile = Profile("toy", proposers=none, runtime=Runtime(threads=1, context=256, flash_attention=True))
        self.subject = ToySubject(self.profile, lambda rows: 10.0)
        self.num_tokens = self.subject.target.vocab
        self.workplace = Path()
        self.measured: list[tuple[int, list[str]]] = []
        self.judged_by: list[Answer] = []
        self.weighed: list[Answer] = []
        self._expected = expected
        self.closed = False
        self._step_ms, self._not_judged, self._ids_without_row = step_ms, not_judged, ids_without_row

    def vocabulary(self) -> Vocabulary:
        return Vocabulary([b"x"] * self.num_tokens, frozenset({0}))

    def ids_with_rows(self) -> IntArray:
        return int_array([id for id in range(self.num_tokens) if id not in self._ids_without_row])

    def tokenize(self, texts: Sequence[str]) -> list[IntArray]:
        return [int_array([ord(char) % self.num_tokens for char in text]) for text in texts]

    @contextmanager
    def answering(self) -> Iterator[Subject]:
        yield self.subject

    def expected_counts(self, answers: Sequence[Answer], progress: Progress) -> Weights | None:
        self.weighed = list(answers)
        return self._expected

    def shape(self, workplace: Path) -> HeadShape:
        self.workplace = workplace
        return HeadShape(self.num_tokens, 1, True, 10, 1000)

    def target_bytes(self) -> int:
        return 4000

    def why_not_judged(self) -> str | None:
        return self._not_judged

    def hits(
        self, answers: Sequence[Answer], nested: Sequence[IntArray], workplace: Path, progress: Progress
    ) -> list[list[Hits]]:
        assert self._not_judged is None and workplace.is_dir()
        self.judged_by = list(answers)
        found: list[list[Hits]] = []
        for ids in nested:
            lines = []
            for answer in answers:
                text = [*answer.prompt.tolist(), *answer.tokens.tolist()]
                first = len(answer.prompt) + 1
                best = [ids[self.subject.target.logits(text[:at])[ids].argmax()] for at in range(first, len(text))]
                lines.append(np.array(best) == answer.tokens[1:])
            found.append(lines)
        progress(1.0)
        return found

    def costs(self, ids: IntArray, workplace: Path) -> Costs:
        return Costs([10.0] * 9, [(self.num_tokens, self.num_tokens * self._step_ms), (1, self._step_ms)])

    def measure(self, ids: IntArray, prompts: Sequence[Prompt], max_tokens: int, workplace: Path) -> dict[str, Any]:
        self.measured.append((len(ids), [prompt.id for prompt in prompts]))
        return {"speedup": {"median": 1.5, "low": 1.4, "high": 1.6}}

    def trim(self, ids: IntArray, out: Path, built: Mapping[str, Any]) -> Manifest:
        manifest = Manifest("gguf", "model", "toy", "0" * 64, self.num_tokens, len(ids), built=dict(built))
        with drafter_folders.writing(out) as partial:
            return drafter_folders.finish(partial, manifest, ids)

    def close(self) -> None:
        self.closed = True
