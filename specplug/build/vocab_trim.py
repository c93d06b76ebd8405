"""Builds a drafter with a trimmed head: count tokens, weigh them, evaluate head sizes, choose one, write the drafter.

The module fixes the order of these stages and the document of `build vocab-trim --json`. It uses engines through
`Source`, and does not depend on their internals or on a terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np

from specplug import __version__
from specplug.bench import workloads
from specplug.bench.workloads import Prompt
from specplug.build import head_sizes
from specplug.build.calibration import SELF, is_text, material
from specplug.build.frequencies import Frequencies, count, held_out
from specplug.build.head_sizes import GAMMA, Costs, Hits, Selection, Size
from specplug.build.recorded_answers import Stages, answers_of
from specplug.build.source import Source
from specplug.build.workplace import workplace_beside
from specplug.core import IntArray
from specplug.errors import UsageError
from specplug.machine import fingerprint, hardware
from specplug.models import drafter_folders
from specplug.models.references import tokenizer_hash
from specplug.transforms.kept_ids import Weights, coverage
from specplug.tune.trace import Answer

SCHEMA = 1
MIN_TOKENS = 8
"""Tokens per answer at least; shorter answers are too few tokens to evaluate drafts on."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request to build a drafter.

    model, target  the model to trim, and the model that it will draft for: each a GGUF file or a checkpoint's folder
    calibrate      SELF, the path of a JSONL workload, or the path of a text file
    counted        one of COUNTED: for prompts, whether the target's answers or the prompts' own text is counted
    quantize       the weight format of the drafter; that of `model` where None
    tokens         tokens per answer at most
    measure        number of prompts that are answered with a drafter of every size, beside plain decoding
    command        the command line, for the document
    """

    model: Path
    target: Path
    out: Path
    selection: Selection
    calibrate: str = SELF
    counted: str | None = None
    quantize: str | None = None
    tokens: int = 256
    measure: int = 0
    threads: int | None = None
    command: str = ""

    @property
    def is_text(self) -> bool:
        return is_text(self.calibrate)

    @property
    def is_raw(self) -> bool:
        return self.is_text or self.counted == "raw"

    @property
    def is_checkpoint(self) -> bool:
        return self.model.is_dir()


def check(request: Request) -> None:
    """Raise the errors that would otherwise occur only after the target has answered."""
    check_settings(request.out, request.calibrate, request.counted, request.tokens)
    if request.is_checkpoint != request.target.is_dir():
        raise UsageError(
            f"{request.model} and {request.target}: one is a GGUF file, the other a folder; use the same kind for both"
        )
    if request.is_checkpoint and request.quantize is not None:
        raise UsageError(
            f"--quantize {request.quantize}: {request.model} is a checkpoint; only GGUF files are quantised"
        )
    # An EAGLE-3 head has no tokenizer and uses its target's.
    if not request.is_checkpoint or (request.model / "tokenizer.json").is_file():
        own, wanted = tokenizer_hash(request.model), tokenizer_hash(request.target)
        if own != wanted:
            raise UsageError(
                f"{request.model}: its tokenizer is {own[:12]}, that of {request.target} {wanted[:12]}; "
                "trim a model of the target's family"
            )


def check_settings(out: Path | None, calibrate: str, counted: str | None, tokens: int) -> None:
    """Raise the errors of a request that are known without its models.

    out  None where its name is made of the model's
    """
    if out is not None:
        drafter_folders.check_new(out)
    if is_text(calibrate) and counted == "target":
        raise UsageError(f"--calibrate {calibrate}: a text has no prompts to answer; use --from raw, or a .jsonl")
    if tokens < MIN_TOKENS:
        raise UsageError(f"--tokens {tokens}: too few to evaluate drafts on; use at least {MIN_TOKENS}")


def build(
    request: Request,
    *,
    notify: Callable[[str], None] = lambda text: None,
    progress: Stages = lambda stage, share: None,
    opener: Callable[[Request], Source] | None = None,
) -> dict[str, Any]:
    """Write the drafter and return the document of `build vocab-trim --json`.

    The folder appears at the end, completely or not at all. The target's answers are cached for later runs.
    opener  opens the model and its target; `open_source` where None
    """
    check(request)
    began = monotonic()
    pieces = material(request.calibrate)
    with ExitStack() as stack:
        busy = hardware.busy_warning()
        if busy:
            notify(busy)
        source = stack.enter_context(closing(opener(request) if opener else open_source(request, notify)))
        why_not = source.why_not_judged()
        if why_not and (request.selection.auto or request.measure):
            flag = "--auto" if request.selection.auto else "--measure"
            raise UsageError(f"{flag}: {why_not}; use --size or --coverage")
        vocabulary, ids = source.vocabulary(), source.ids_with_rows()
        # Below, rows are chosen by index into `ids`.
        always = np.flatnonzero(np.isin(ids, vocabulary.always_kept())).astype(np.int32)
        uniform = np.ones(len(ids), dtype=np.int64)
        request.selection.rows(uniform, always, uniform)  # refuses an impossible size before the target answers
        workplace = workplace_beside(stack, request.out)
        counted = _counted(request, source, pieces, len(vocabulary.pieces), notify, progress)
        weights = counted.weights[ids]
        wanted = request.selection.rows(weights, always, counted.frequencies.calibration[ids])
        rows = head_sizes.sizes(len(ids), len(always), wanted)
        nested = [ids[indices] for indices in head_sizes.kept(weights, always, rows)]
        table, costs = _table(request, source, counted, nested, workplace, progress)
        chosen = next((line for line in table if line.rows == wanted), None) or head_sizes.fastest(table)
        progress("writing", 0.0)
        document = {
            "schema": SCHEMA,
            "out": str(request.out),
            "rows": chosen.rows,
            "num_tokens": len(vocabulary.pieces),
            "always_kept": len(always),
            "chosen_by": _chosen_by(request.selection),
            "model": fingerprint.model_identity(request.model),
            "target": fingerprint.model_identity(request.target),
            "quantize": request.quantize,
            "calibration": _calibration(request, counted),
            "judged_by": _amount(counted.answers),
            "gamma": GAMMA,
            "sizes": [line.as_mapping() for line in table],
            "costs": None if costs is None else costs.as_mapping(),
            "why_not_judged": why_not,
            "hardware": hardware.fingerprint() | {"threads": source.profile.runtime.threads},
            "versions": fingerprint.versions(source.profile.engine),
            "date": date.today().isoformat(),
            "command": request.command,
        }
        built = {key: document[key] for key in BUILT} | {"specplug": __version__}
        manifest = source.trim(nested[table.index(chosen)], request.out, built)
    return document | {
        "tokenizer": manifest.tokenizer,
        "architecture": manifest.architecture,
        "kind": manifest.kind,
        "bytes": sum(path.stat().st_size for path in request.out.iterdir()),
        "seconds": round(monotonic() - began, 1),
    }


BUILT = ("chosen_by", "quantize", "calibration", "judged_by", "gamma", "target", "sizes", "costs", "date", "command")
"""The keys of the document that the drafter's manifest keeps."""


def verdict(document: Mapping[str, Any]) -> str:
    """One line that says what was built, and which speed to expect."""
    line = next(line for line in document["sizes"] if line["rows"] == document["rows"])
    what = f"{line['rows']} of {document['num_tokens']} rows, {line['coverage']:.2%} of held-out tokens"
    if line["predicted"] is None:
        return what
    best = max(document["sizes"], key=lambda other: other["predicted"])
    if best["predicted"] <= 1:
        return f"{what}; no size beats plain decoding here (the best, {best['rows']} rows: {best['predicted']:.2f})"
    return f"{what}; predicted {line['predicted']:.2f} times plain decoding with drafts of {line['guesses']} tokens"


def open_source(request: Request, notify: Callable[[str], None]) -> Source:
    """Open the model and its target, by their format."""
    if request.is_checkpoint:
        from specplug.build.checkpoint import CheckpointSource

        if request.threads is not None:
            notify("--threads has no effect on vLLM; set VLLM_CPU_OMP_THREADS_BIND")
        return CheckpointSource(request.model, request.target, notify=notify)
    from specplug.transforms.gguf_mtp_head import has_mtp

    if has_mtp(request.model):
        from specplug.build.mtp_head import MtpSource

        return MtpSource(request.model, request.target, quantize=request.quantize, threads=request.threads)
    from specplug.build.llama_cpp import GgufSource

    return GgufSource(request.model, request.target, quantize=request.quantize, threads=request.threads)


@dataclass(frozen=True, slots=True, eq=False)
class _Counted:
    """Token frequencies, and held-out answers of the target.

    weights  the rows are chosen by these
    answers  the target's answers that were not counted, which evaluate the drafts; `prompts` are their prompts
    """

    frequencies: Frequencies
    weights: Weights
    answers: list[Answer]
    prompts: list[Prompt]


def _counted(
    request: Request,
    source: Source,
    material: Sequence[str] | Sequence[Prompt],
    num_tokens: int,
    notify: Callable[[str], None],
    progress: Stages,
) -> _Counted:
    prompts = [one for one in material if isinstance(one, Prompt)]
    if request.is_raw:
        progress("counting", 0.0)
        if request.is_text:
            texts = {f"piece {i}": [str(piece)] for i, piece in enumerate(material)}
            others = workloads.limit(workloads.load_workload(workloads.BUILTIN), 1)
        else:
            texts = {prompt.id: list(prompt.turns) for prompt in prompts}
            held = held_out(list(texts))
            others = [prompt for prompt in prompts if prompt.id in held]
        frequencies = count({name: source.tokenize(parts) for name, parts in texts.items()}, num_tokens)
        answers = (
            answers_of(source, request.target, others, others, request.tokens, notify, progress)
            if source.why_not_judged() is None
            else []
        )
        return _Counted(frequencies, frequencies.calibration, answers, others)
    if len(prompts) < 2:
        raise UsageError(f"--calibrate {request.calibrate}: holds 1 prompt; give at least 2, because one is held out")
    answers = answers_of(source, request.target, prompts, prompts, request.tokens, notify, progress)
    documents: dict[str, list[IntArray]] = {}
    for answer in answers:
        documents.setdefault(answer.prompt_id, []).append(answer.tokens)
    frequencies = count(documents, num_tokens)
    held = frequencies.held_out_names
    progress("likelihoods", 0.0)
    calibration = [answer for answer in answers if answer.prompt_id not in held]
    weights = source.expected_counts(calibration, lambda share: progress("likelihoods", share))
    return _Counted(
        frequencies,
        frequencies.calibration if weights is None else weights,
        [answer for answer in answers if answer.prompt_id in held],
        [prompt for prompt in prompts if prompt.id in held],
    )


def _table(
    request: Request,
    source: Source,
    counted: _Counted,
    nested: Sequence[IntArray],
    workplace: Path,
    progress: Stages,
) -> tuple[list[Size], Costs | None]:
    """The figures of every nested set of ids, and the measured costs behind them.

    Where drafts cannot be tried, the figures are only those that need no drafts.
    """
    progress("weights", 0.0)
    shape, target_bytes = source.shape(workplace), source.target_bytes()
    table = [
        Size(
            len(ids),
            coverage(ids, counted.frequencies.held_out),
            shape.step_bytes(len(ids)),
            byte_ratio=shape.step_bytes(len(ids)) / target_bytes,
        )
        for ids in nested
    ]
    if source.why_not_judged() is not None:
        return table, None
    hits = source.hits(counted.answers, nested, workplace, lambda share: progress("drafts", share))
    progress("costs", 0.0)
    costs = source.costs(nested[0], workplace)
    table = [_judged(line, of_line, costs) for line, of_line in zip(table, hits, strict=True)]
    for index, ids in enumerate(nested if request.measure else ()):
        progress(f"measuring {len(ids)} rows", index / len(nested))
        figures = source.measure(ids, counted.prompts[: request.measure], request.tokens, workplace)
        table[index] = replace(table[index], measured=figures)
    return table, costs


def _judged(line: Size, hits: Sequence[Hits], costs: Costs) -> Size:
    efficiency = head_sizes.emitted_per_pass(hits, GAMMA)
    guesses, speed = head_sizes.predicted(hits, costs, line.rows)
    assert line.byte_ratio is not None
    return replace(
        line,
        acceptance=float(np.concatenate(hits).mean()),
        block_efficiency=efficiency,
        mbsu=head_sizes.mbsu(efficiency, line.byte_ratio, GAMMA),
        draft_ms=costs.draft_ms(line.rows),
        guesses=guesses,
        predicted=speed,
    )


def _amount(answers: Sequence[Answer]) -> dict[str, int]:
    """The number of answers, and of their tokens without the first of each, which the prefill yields."""
    return {"answers": len(answers), "tokens": sum(len(answer.tokens) - 1 for answer in answers)}


def _chosen_by(selection: Selection) -> str:
    if selection.size is not None:
        return f"size {selection.size}"
    return "predicted speed" if selection.auto else f"coverage {selection.coverage}"


def _calibration(request: Request, counted: _Counted) -> dict[str, Any]:
    frequencies = counted.frequencies
    return {
        "source": request.calibrate if request.calibrate == SELF else Path(request.calibrate).name,
        "counted": "text" if request.is_raw else "the target's answers",
        "ranked_by": "counts" if counted.weights is frequencies.calibration else "likelihoods",
        "answer_tokens": None if request.is_raw else request.tokens,
        "documents": frequencies.num_documents - len(frequencies.held_out_names),
        "tokens": int(frequencies.calibration.sum()),
        "different_tokens": int((frequencies.calibration > 0).sum()),
        "held_out_documents": len(frequencies.held_out_names),
        "held_out_tokens": int(frequencies.held_out.sum()),
    }
