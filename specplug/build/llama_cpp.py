"""Trimming a GGUF model with llama.cpp: the target's answers, the drafter's hits, and the costs of both.

The module does not depend on how tokens are counted or which size is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from shutil import rmtree
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from specplug.bench.arms import Arm, ProfileArm, plain
from specplug.bench.interleaved import run_arms
from specplug.bench.workloads import Prompt
from specplug.build.head_sizes import LONGEST, Costs, Hits, added, hits_in_each
from specplug.build.source import Progress
from specplug.core import IntArray
from specplug.errors import EngineError, UsageError
from specplug.generation.answers import Sampling
from specplug.models.drafter_folders import Manifest
from specplug.models.drafter_folders import read as read_drafter
from specplug.profile import CostPoints, PlannerSettings, Profile, Runtime
from specplug.registry import ProposerSpec
from specplug.transforms.head_shape import HeadShape
from specplug.transforms.kept_ids import Vocabulary, Weights
from specplug.tune.subject import Subject
from specplug.tune.trace import Answer

if TYPE_CHECKING:
    from specplug.engines.llama_cpp.context import Context
    from specplug.engines.llama_cpp.model import Model

ROUNDS, STEPS, CELLS = 9, 9, 256
"""Costs are timed in ROUNDS rounds with STEPS draft steps each, in KV caches of CELLS cells. The target and the heads
alternate, so that a machine that slows down affects all of them alike."""

FULL, SAMPLE, TRIAL = "full", "sample", "trial"
"""Folders in the workplace: the drafter with its full head, a smaller head to time, and a head to draft with."""


class GgufSource:
    """See `Source`. The target stays open until `close`."""

    batched = False

    def __init__(
        self, model: Path, target: Path, *, quantize: str | None, threads: int | None, any_head: bool = False
    ) -> None:
        """EngineError without llama-cpp-python or gguf; UsageError, unless `any_head`, for a model whose head cannot be
        trimmed."""
        from specplug.engines.llama_cpp import require

        require()
        if find_spec("gguf") is None:
            raise EngineError(
                f"{model}: trimming needs gguf, which is not installed: pip install 'specplug[llama-cpp]'"
            )
        from specplug.engines.llama_cpp.settings_choice import with_settings
        from specplug.transforms.gguf_head import head_shape

        if not any_head:
            head_shape(model)  # raises for an architecture that cannot be trimmed
        self._model, self._target = model, target
        self._quantize = quantize
        self._costs: CostPoints | None = None
        self._target_model = self._open_target()
        base = Profile("target", proposers=(ProposerSpec("none"),), runtime=Runtime(threads=threads))
        self.profile = with_settings(base, self._target_model)

    def _open_target(self) -> Model:
        from specplug.engines.llama_cpp.model import open_model
        from specplug.engines.llama_cpp.rollback import refuse_recurrent

        model = open_model(self._target)
        refuse_recurrent(model, "a drafter of the same weights")
        return model

    def vocabulary(self) -> Vocabulary:
        from specplug.transforms.gguf_head import vocabulary

        return vocabulary(self._model)

    def ids_with_rows(self) -> IntArray:
        return np.arange(self._target_model.num_tokens, dtype=np.int32)

    def tokenize(self, texts: Sequence[str]) -> list[IntArray]:
        return [self._target_model.tokenize(text, add_special=False) for text in texts]

    @contextmanager
    def answering(self) -> Iterator[Subject]:
        from specplug.tune.llama_cpp import LlamaCppSubject

        subject = LlamaCppSubject(self._target, self.profile)
        try:
            yield subject
        finally:
            subject.close()

    def expected_counts(self, answers: Sequence[Answer], progress: Progress) -> Weights:
        from specplug.engines.llama_cpp.teacher_forcing import ROWS, teacher_forced_logits

        weights = np.zeros(self._target_model.num_tokens)
        with self._context(self._target, cells=longest(answers) + ROWS, max_rows=ROWS) as context:
            for done, answer in enumerate(answers, start=1):
                text = np.concatenate((answer.prompt, answer.tokens[:-1]))
                for logits in teacher_forced_logits(context, text, len(answer.prompt) - 1):
                    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
                    probabilities /= probabilities.sum(axis=1, keepdims=True)
                    weights += probabilities.sum(axis=0)
                progress(done / len(answers))
        return weights

    def shape(self, workplace: Path) -> HeadShape:
        from specplug.transforms.gguf_head import MODEL, head_shape

        return head_shape(self._model if self._quantize is None else self._full_drafter(workplace) / MODEL)

    def target_bytes(self) -> int:
        from specplug.transforms.gguf_head import head_shape

        try:
            return head_shape(self._target).step_bytes(self._target_model.num_tokens)
        except UsageError:
            return self._target.stat().st_size

    def why_not_judged(self) -> str | None:
        return None

    def hits(
        self, answers: Sequence[Answer], nested: Sequence[IntArray], workplace: Path, progress: Progress
    ) -> list[list[Hits]]:
        drafter = self._full_drafter(workplace)
        return self.drafter_hits(drafter, None, self.ids_with_rows(), answers, nested, progress)

    def drafter_hits(
        self,
        drafter: Path,
        file: str | None,
        ids: IntArray,
        answers: Sequence[Answer],
        nested: Sequence[IntArray],
        progress: Progress,
    ) -> list[list[Hits]]:
        """As `hits`, of a drafter that is a GGUF file, or the file `file` in a folder.

        ids     int32[rows of its head]: the token of each row
        nested  sets of rows
        """
        from specplug.engines.llama_cpp.teacher_forcing import ROWS, teacher_forced_logits

        parts = added(nested)
        all_hits: list[list[Hits]] = [[] for _ in nested]
        cells = longest(answers) + ROWS
        with self._context(drafter, cells=cells, max_rows=ROWS, file=file) as context:
            for done, answer in enumerate(answers, start=1):
                text = np.concatenate((answer.prompt, answer.tokens[:-1]))
                logits = teacher_forced_logits(context, text, len(answer.prompt))
                for hits, found in zip(all_hits, hits_in_each(logits, parts, ids, answer.tokens), strict=True):
                    hits.append(found)
                progress(done / len(answers))
        return all_hits

    def costs(self, ids: IntArray, workplace: Path) -> Costs:
        folders = {self._target_model.num_tokens: self._full_drafter(workplace)}
        if len(ids) < self._target_model.num_tokens:
            self.trim(ids, workplace / SAMPLE, {})
            folders[len(ids)] = workplace / SAMPLE
        target_ms, step_ms = self.times([(folder, None) for folder in folders.values()])
        return Costs(target_ms, list(zip(folders, step_ms, strict=True)))

    def times(self, drafters: Sequence[tuple[Path, str | None]]) -> tuple[list[float], list[float]]:
        """Milliseconds of a target pass over 1, 2, ... rows, and of a draft step of each drafter.

        drafters  GGUF files, or folders with the name of a file in them
        """
        from specplug.engines.llama_cpp.drafters.model_drafter import ModelDrafter
        from specplug.engines.llama_cpp.measure import PassTimer

        with ExitStack() as stack:
            timer = PassTimer(stack.enter_context(self._context(self._target, cells=CELLS, max_rows=LONGEST + 1)))
            timer.fill(CELLS // 2)
            drafting = [
                ModelDrafter(
                    stack.enter_context(self._context(folder, cells=CELLS, max_rows=1, file=file)),
                    None,
                    slots=1,
                    max_tokens=CELLS,
                    max_draft=LONGEST,
                    branches=1,
                )
                for folder, file in drafters
            ]
            passes: list[list[float]] = []
            steps: list[list[float]] = []
            for _ in range(ROUNDS):
                # The second of two passes counts, because a pass after one with another row count takes longer.
                passes.append([(timer.time(rows), timer.time(rows))[1] for rows in range(1, LONGEST + 2)])
                for drafter in drafting:
                    drafter.time_passes(STEPS)
                steps.append([drafter.pass_ms(1) for drafter in drafting])
        target_ms, step_ms = ([median(line) for line in zip(*times, strict=True)] for times in (passes, steps))
        return target_ms, step_ms

    def measure(self, ids: IntArray, prompts: Sequence[Prompt], max_tokens: int, workplace: Path) -> dict[str, Any]:
        from specplug.engines.llama_cpp.rounding import explain

        folder, sampling = workplace / TRIAL, Sampling()
        self.trim(ids, folder, {})
        drafting = replace(
            self.profile,
            name=f"vocab-trim-{len(ids)}",
            proposers=(self._proposer(folder),),
            planner=PlannerSettings(max_nodes=LONGEST),
        )

        def is_rounding(prompt: IntArray, plain: list[int], other: list[int]) -> bool:
            runtime = self.profile.runtime
            mismatch = explain(model, runtime, prompt, plain, other, sampling, padded=False, shared_cache=False)
            return mismatch is not None and mismatch.is_rounding

        model = self._target_model
        with ExitStack() as stack:
            arms: list[Arm] = []
            for profile in (plain(self.profile), drafting):
                arms.append(ProfileArm(model, profile, sampling, cost=self._planner_costs()))
                stack.callback(arms[-1].close)
            outcome = run_arms(arms, prompts, model.chat_prompt, model.text, is_rounding, max_tokens=max_tokens)
        rmtree(folder)
        return outcome.overall[1].figures()

    def _proposer(self, folder: Path) -> ProposerSpec:
        """The proposer that drafts with a folder of `trim`."""
        return ProposerSpec("vocab_trim", {"model": str(folder), "max_draft": LONGEST})

    def trim(self, ids: IntArray, out: Path, built: Mapping[str, Any]) -> Manifest:
        from specplug.transforms.gguf_head import trim

        threads = self.profile.runtime.threads or 1
        return trim(self._model, ids, out, quantize=self._quantize, threads=threads, built=built)

    def close(self) -> None:
        self._target_model.close()

    def _full_drafter(self, workplace: Path) -> Path:
        """The drafter with its full head: the model itself, or a folder if the drafter has another weight format."""
        if self._quantize is None:
            return self._model
        folder = workplace / FULL
        if not folder.exists():
            self.trim(self.ids_with_rows(), folder, {})
        return folder

    @contextmanager
    def _context(self, path: Path, *, cells: int, max_rows: int, file: str | None = None) -> Iterator[Context]:
        """A context of a GGUF file, or of a drafter's folder, whose input is embeddings if it has a table of them.

        file  the drafter in the folder; MODEL where None
        """
        from specplug.engines.llama_cpp.context import open_context
        from specplug.engines.llama_cpp.drafters.input_table import InputTable
        from specplug.engines.llama_cpp.model import open_model
        from specplug.transforms.gguf_head import EMBEDDINGS, MODEL

        inputs = None
        if (path / EMBEDDINGS).is_file():
            inputs = InputTable(path / EMBEDDINGS, read_drafter(path)[0].input_scale)
        cells = -(-cells // 256) * 256
        with (
            open_model(path / (file or MODEL) if path.is_dir() else path) as model,
            open_context(
                model, self.profile.runtime, cells=cells, num_ids=2, max_rows=max_rows, inputs=inputs
            ) as context,
        ):
            yield context

    def _planner_costs(self) -> CostPoints:
        """The cost curve for the planner of trial drafters; measured once."""
        from specplug.engines.llama_cpp.measure import cost_points

        if self._costs is None:
            self._costs = cost_points(self._target_model, self.profile.runtime, LONGEST + 1)
        return self._costs


def longest(answers: Sequence[Answer]) -> int:
    """The number of tokens of the longest answer and its prompt."""
    return max(len(answer.prompt) + len(answer.tokens) for answer in answers)
