"""Trimming the output matrix that MTP layers share with their GGUF model: what the layer drafts, and what it costs.

The module does not depend on how tokens are counted or which size is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from specplug.build.head_sizes import LONGEST, Costs, Hits, added, hits_in_each
from specplug.build.llama_cpp import CELLS, ROUNDS, SAMPLE, GgufSource, longest
from specplug.build.source import Progress
from specplug.core import IntArray
from specplug.models.drafter_folders import Manifest
from specplug.registry import ProposerSpec
from specplug.transforms.gguf_mtp_head import check_trimmable, mtp_head_shape, trim_mtp
from specplug.transforms.head_shape import HeadShape
from specplug.tune.trace import Answer

if TYPE_CHECKING:
    from specplug.engines.llama_cpp.context import Context
    from specplug.engines.llama_cpp.drafters.head_drafter import HeadDrafter
    from specplug.engines.llama_cpp.model import Model


class MtpSource(GgufSource):
    """See `Source`. The model that is trimmed is one with MTP layers, which draft for the target."""

    def __init__(self, model: Path, target: Path, *, quantize: str | None, threads: int | None) -> None:
        """Raises the errors of the base class, and those of `check_trimmable`."""
        check_trimmable(model)
        super().__init__(model, target, quantize=quantize, threads=threads, any_head=True)

    def _open_target(self) -> Model:
        from specplug.engines.llama_cpp.model import open_model

        return open_model(self._target, mtp=self._model == self._target)

    def shape(self, workplace: Path) -> HeadShape:
        return mtp_head_shape(self._model, self._all_rows(workplace))

    def hits(
        self, answers: Sequence[Answer], nested: Sequence[IntArray], workplace: Path, progress: Progress
    ) -> list[list[Hits]]:
        parts = added(nested)
        all_hits: list[list[Hits]] = [[] for _ in nested]
        ids = self.ids_with_rows()
        with ExitStack() as stack:
            target = stack.enter_context(self._target_context(longest(answers), rows=1))
            head = stack.enter_context(self._drafter(target, self._all_rows(workplace)))
            for done, answer in enumerate(answers, start=1):
                logits = (row[None] for row in head.logits_along(answer.prompt, answer.tokens))
                for hits, found in zip(all_hits, hits_in_each(logits, parts, ids, answer.tokens), strict=True):
                    hits.append(found)
                progress(done / len(answers))
        return all_hits

    def costs(self, ids: IntArray, workplace: Path) -> Costs:
        from specplug.engines.llama_cpp.measure import PassTimer

        heads = {self._target_model.num_tokens: self._all_rows(workplace)}
        if len(ids) < self._target_model.num_tokens:
            self.trim(ids, workplace / SAMPLE, {})
            heads[len(ids)] = workplace / SAMPLE
        with ExitStack() as stack:
            context = stack.enter_context(self._target_context(CELLS, rows=LONGEST + 1))
            timer = PassTimer(context)
            timer.fill(CELLS // 2)
            drafting = [stack.enter_context(self._drafter(context, folder)) for folder in heads.values()]
            passes: list[list[float]] = []
            steps: list[list[float]] = []
            for _ in range(ROUNDS):
                passes.append([(timer.time(rows), timer.time(rows))[1] for rows in range(1, LONGEST + 2)])
                for head in drafting:
                    head.warm_up()
                steps.append([head.pass_ms(1) for head in drafting])
        target_ms, step_ms = ([median(line) for line in zip(*times, strict=True)] for times in (passes, steps))
        return Costs(target_ms, list(zip(heads, step_ms, strict=True)))

    def trim(self, ids: IntArray, out: Path, built: Mapping[str, Any]) -> Manifest:
        threads = self.profile.runtime.threads or 1
        return trim_mtp(self._model, ids, out, quantize=self._quantize, threads=threads, built=built)

    def _proposer(self, folder: Path | None) -> ProposerSpec:
        options: dict[str, Any] = {"max_draft": LONGEST}
        options |= {} if folder is None else {"head": str(folder)}
        options |= {} if self._model == self._target else {"model": str(self._model)}
        return ProposerSpec("mtp", options)

    def _all_rows(self, workplace: Path) -> Path | None:
        """A folder with all rows in the format of the drafter; None where that is the model's."""
        return None if self._quantize is None else self._full_drafter(workplace)

    @contextmanager
    def _target_context(self, cells: int, *, rows: int) -> Iterator[Context]:
        from specplug.engines.llama_cpp.context import open_context

        cells = -(-cells // 256) * 256
        with open_context(self._target_model, self.profile.runtime, cells=cells, num_ids=2, max_rows=rows) as context:
            yield context

    @contextmanager
    def _drafter(self, target: Context, folder: Path | None) -> Iterator[HeadDrafter]:
        """The MTP layer with the rows in a folder of `trim`, or with all of them."""
        from dataclasses import replace

        from specplug import registry
        from specplug.engines.llama_cpp.drafters.head_finding import find_head
        from specplug.engines.llama_cpp.drafters.head_opening import open_head
        from specplug.proposers.mtp import Mtp

        (source,) = registry.build_sources([self._proposer(folder)])
        assert isinstance(source, Mtp)
        runtime = replace(self.profile.runtime, context=target.cells)
        head, own = open_head(source, find_head(source, self._target), target, runtime, slots=1)
        try:
            yield head
        finally:
            head.close()
            if own is not None:
                own.close()
