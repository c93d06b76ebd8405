"""Builds drafters with the first layers of a model: report what every exit costs, then choose rows and write them.

The module fixes the order of these stages and the document of `build early-exit --json`. It does not depend on a
terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np

from specplug import __version__
from specplug.bench import workloads
from specplug.build.exit_costs import ExitCosts, Line, line, lookup_line, pays
from specplug.build.frequencies import count
from specplug.build.llama_cpp import GgufSource
from specplug.build.recorded_answers import Stages, answers_of
from specplug.build.workplace import workplace_beside
from specplug.core import IntArray
from specplug.errors import UsageError
from specplug.machine import fingerprint, hardware
from specplug.models import drafter_folders
from specplug.transforms.gguf_exits import check_exits, file_of, layers_of, trims_head, write_exits
from specplug.transforms.kept_ids import by_size
from specplug.tune.trace import Answer

SCHEMA = 1

ROWS = 16384
"""Rows of the head where the user names no number, or the full vocabulary if that is smaller. Chosen."""

ANSWERED = 2
"""Prompts of each category that are answered. Chosen."""

TOKENS = 256
"""Most tokens of an answer: as many as `build vocab-trim` records, so that both share answers."""


TRIED = "tried"
"""Name of the folder of the exits while their agreement is measured."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request to build early exits of a GGUF model.

    exits     numbers of layers, ascending
    size      rows of the head; ROWS where None
    quantize  the weight format of the drafters; that of `model` where None
    measure   whether the agreement of every exit with the model's own answers is measured before
    anyway    whether exits are also written where none is expected to save time
    command   the command line, for the document
    """

    model: Path
    out: Path
    exits: tuple[int, ...]
    size: int | None = None
    quantize: str | None = None
    measure: bool = False
    anyway: bool = False
    threads: int | None = None
    command: str = ""


def check(request: Request) -> None:
    """Raise the errors that would otherwise occur only after something was measured."""
    if request.model.is_dir():
        raise UsageError(
            f"{request.model}: a folder; exits are built of a .gguf file, for llama.cpp: convert the checkpoint to "
            "GGUF and name that file; on vLLM exits need no files: a profile names them as exits: [4, 8]"
        )
    if request.size is not None and not trims_head(request.model):
        raise UsageError(f"{request.model}: heads of its architecture are not trimmed; leave --size out")
    check_exits(request.exits, layers_of(request.model), request.model)
    drafter_folders.check_new(request.out)


def build(
    request: Request,
    *,
    notify: Callable[[str], None] = lambda text: None,
    progress: Stages = lambda stage, share: None,
) -> dict[str, Any]:
    """Measure, write the folder unless no exit is expected to save time, and return the document of `--json`.

    The folder appears at the end, completely or not at all.
    """
    check(request)
    began = monotonic()
    busy = hardware.busy_warning()
    if busy:
        notify(busy)
    with ExitStack() as stack:
        source = stack.enter_context(
            closing(GgufSource(request.model, request.model, quantize=None, threads=request.threads, any_head=True))
        )
        vocabulary, num_tokens = source.vocabulary(), len(source.ids_with_rows())
        always = vocabulary.always_kept()
        most = ROWS if trims_head(request.model) else num_tokens
        size = min(most, num_tokens) if request.size is None else request.size
        any_ids = by_size(np.ones(num_tokens, dtype=np.int64), always, size)  # refuses an impossible size
        workplace = workplace_beside(stack, request.out)
        progress("costs", 0.0)
        costs = _costs(request, source, any_ids, workplace)
        lines = [_line(layers, costs) for layers in request.exits]
        beside: list[Line] = []
        judged: list[Answer] = []
        ids: IntArray | None = None
        if request.measure or request.anyway or any(one.can_pay for one in lines):
            answers, held = _answers(request, source, notify, progress)
            weights = source.expected_counts(answers, lambda share: progress("likelihoods", share))
            ids = by_size(weights, always, size)
        if request.measure:
            assert ids is not None
            judged = held
            lines, beside = _measured(request, source, ids, costs, judged, workplace, progress)
        worthwhile = pays(lines) if request.measure else any(one.can_pay for one in lines)
        built = ids is not None and (worthwhile or request.anyway)
        document = {
            "schema": SCHEMA,
            "out": str(request.out),
            "built": built,
            "pays": worthwhile,
            "rows": size if ids is None else len(ids),
            "num_tokens": num_tokens,
            "model": fingerprint.model_identity(request.model),
            "layers": layers_of(request.model),
            "quantize": request.quantize,
            "exits": [one.as_mapping() for one in lines],
            "beside": [one.as_mapping() for one in beside],
            "judged_by": {"answers": len(judged), "tokens": sum(len(answer.tokens) - 1 for answer in judged)},
            "costs": costs.as_mapping(),
            "hardware": hardware.fingerprint() | {"threads": source.profile.runtime.threads},
            "versions": fingerprint.versions(source.profile.engine),
            "date": date.today().isoformat(),
            "command": request.command,
        }
        if built:
            assert ids is not None
            kept = {key: document[key] for key in BUILT} | {"specplug": __version__}
            if request.measure:  # then they are written already
                drafter_folders.move(workplace / TRIED, request.out, kept)
            else:
                _write(request, request.exits, ids, request.out, kept, lambda share: progress("writing", share))
    size_of = sum(path.stat().st_size for path in request.out.iterdir()) if built else 0
    return document | {"bytes": size_of, "seconds": round(monotonic() - began, 1)}


BUILT = ("layers", "quantize", "exits", "beside", "judged_by", "costs", "date", "command")
"""The keys of the document that the folder's manifest keeps."""


def verdict(document: Mapping[str, Any]) -> str:
    """One line that says whether an exit pays here, and what was written."""
    written = f"written to {document['out']}" if document["built"] else "nothing was written; to build it, add --anyway"
    exits = document["exits"]
    if document["beside"]:
        best = max(exits, key=lambda one: one["predicted"])
        figures = f"{best['predicted']:.2f} times plain decoding after {best['layers']} layers"
        if document["pays"]:
            return f"the best exit is predicted to reach {figures}; {written}"
        return f"does not pay: the best exit is predicted to reach {figures}; {written}"
    if not document["pays"]:
        return f"does not pay: even exits that are always right would save next to nothing here; {written}"
    least = min((one for one in exits if one["needed"]["1.0"]), key=lambda one: one["needed"]["1.0"])
    right = f"{least['needed']['1.0']:.0%} of its tokens are right, which --measure finds out"
    return f"an exit after {least['layers']} layers pays where {right}; {written}"


def _costs(request: Request, source: GgufSource, ids: IntArray, workplace: Path) -> ExitCosts:
    """The times of the target and of two exits, the first and the last of those to build."""
    every = layers_of(request.model)
    few, many = request.exits[0], request.exits[-1]
    if few == many:
        few, many = (few // 2, many) if few > 1 else (few, min(2, every - 1))
    _write(request, sorted({few, many}), ids, workplace / "timed")
    timed = sorted({few, many})
    target_ms, step_ms = source.times([(workplace / "timed", file_of(layers)) for layers in timed])
    return ExitCosts(target_ms, list(zip(timed, step_ms, strict=True)))


def _line(layers: int, costs: ExitCosts, hits: Any = None) -> Line:
    return line(f"exit {layers}", layers, costs, costs.draft_ms(layers), hits)


def _answers(
    request: Request, source: GgufSource, notify: Callable[[str], None], progress: Stages
) -> tuple[list[Answer], list[Answer]]:
    """Answers by which the rows are chosen, and held-out answers."""
    workload = workloads.load_workload(workloads.BUILTIN, category="all")
    prompts = workloads.limit(workload, ANSWERED)
    answers = answers_of(source, request.model, workload, prompts, TOKENS, notify, progress)
    documents: dict[str, list[IntArray]] = {}
    for answer in answers:
        documents.setdefault(answer.prompt_id, []).append(answer.tokens)
    held = count(documents, len(source.ids_with_rows())).held_out_names
    return (
        [answer for answer in answers if answer.prompt_id not in held],
        [answer for answer in answers if answer.prompt_id in held],
    )


def _measured(
    request: Request,
    source: GgufSource,
    ids: IntArray,
    costs: ExitCosts,
    answers: Sequence[Answer],
    workplace: Path,
    progress: Stages,
) -> tuple[list[Line], list[Line]]:
    """The figures of every exit by the answers, and those of the drafters that need no exit."""
    lines = []
    rows = np.arange(len(ids), dtype=np.int32)
    folder = workplace / TRIED
    _write(request, request.exits, ids, folder)
    for done, layers in enumerate(request.exits):

        def report(share: float, done: int = done) -> None:
            progress("agreement", (done + share) / len(request.exits))

        (hits,) = source.drafter_hits(folder, file_of(layers), ids, answers, [rows], report)
        lines.append(_line(layers, costs, hits))
    # A drafter with all layers computes the target's own logits, of the rows that its head has.
    kept = [np.isin(answer.tokens[1:], ids) for answer in answers]
    every = layers_of(request.model)
    own = [line("vocab-trim of itself", None, costs, costs.draft_ms(every), kept)] if trims_head(request.model) else []
    return lines, [*own, lookup_line(answers, costs)]


def _write(
    request: Request,
    exits: Sequence[int],
    ids: IntArray,
    out: Path,
    built: Mapping[str, Any] | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> None:
    threads = request.threads or hardware.usable_cores()
    write_exits(
        request.model, exits, ids, out, quantize=request.quantize, threads=threads, built=built, progress=progress
    )
