"""The request for a tune, its checks, and the check that a journal was begun for the same request.

This module measures nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specplug import profile as profiles
from specplug import registry
from specplug.bench.workloads import Prompt
from specplug.corpora.folder import place, read_manifest
from specplug.errors import UsageError
from specplug.machine import fingerprint
from specplug.machine.files import check_writable
from specplug.machine.folders import cache_folder, reason, state_folder
from specplug.models.corpus_fit import check_fits
from specplug.models.references import drafters_beside
from specplug.profile import Profile
from specplug.profile.with_corpora import datastore_spec
from specplug.profile.with_drafter import drafter_name
from specplug.registry import ProposerSpec
from specplug.tune.budget import FEWEST_TOKENS
from specplug.tune.drafter_trace import drafter_key
from specplug.tune.journal import Journal
from specplug.tune.trace import TRACES

SCHEMA = 1
OBJECTIVES = ("latency", "throughput")
"""Which concurrency decides: the smallest, or the largest."""


@dataclass(frozen=True, slots=True)
class Request:
    """The request.

    base         the profile that gives the engine settings
    workload     the name of the prompts' source, for messages and documents
    name, out    the profile to write, and its file
    budget       seconds
    concurrency  numbers of prompts that run at once, ascending
    command      the command line, for the evidence
    allow_rounding
                 take engine settings and draft sizes whose passes may round differently from plain decoding
    drafters     the drafters to try, on llama.cpp
    corpora      the corpora to try together, as one method
    """

    model: Path
    base: Profile
    prompts: Sequence[Prompt]
    workload: str
    name: str
    out: Path
    budget: float
    max_tokens: int = 128
    objective: str = "latency"
    concurrency: tuple[int, ...] = (1,)
    resume: bool = False
    allow_rounding: bool = False
    drafters: tuple[ProposerSpec, ...] = ()
    corpora: tuple[str, ...] = ()
    command: str = ""

    @property
    def level(self) -> int:
        """The deciding concurrency: the smallest for latency, the largest for throughput."""
        return deciding_level(self.concurrency, self.objective)

    @property
    def retrieval(self) -> tuple[ProposerSpec, ...]:
        """The method that drafts from the corpora, if there are any."""
        return (datastore_spec(self.base, self.corpora),) if self.corpora else ()

    def fingerprint(self) -> dict[str, Any]:
        """The fingerprint of this machine and model, with those parts that the base profile uses."""
        return fingerprint.of(self.model, engine=self.base.engine, threads=None, gpu=fingerprint.uses_gpu(self.base))

    def identity(self) -> dict[str, Any]:
        """The values that must be the same for a journal to be continued."""
        return {
            "base": hashlib.sha256(profiles.dumps(self.base).encode()).hexdigest(),
            "workload": workload_hash(self.prompts),
            "budget": self.budget,
            "max_tokens": self.max_tokens,
            "objective": self.objective,
            "concurrency": list(self.concurrency),
            "allow_rounding": self.allow_rounding,
            "drafters": [drafter_key(spec) for spec in self.drafters],
            "corpora": {ref: read_manifest(place(ref), ref).digest for ref in self.corpora},
        }


def deciding_level(concurrency: Sequence[int], objective: str) -> int:
    """The concurrency that decides, for one of OBJECTIVES."""
    return min(concurrency) if objective == "latency" else max(concurrency)


def journal_path(out: Path) -> Path:
    """The journal of a tune that writes the profile `out`."""
    key = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:12]
    return state_folder() / "tune" / f"{out.stem}-{key}.journal"


def workload_hash(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of the prompts, in order."""
    return hashlib.sha256(json.dumps([[p.id, p.category, p.turns] for p in prompts]).encode()).hexdigest()


def beside(request: Request) -> list[str]:
    """The files beside the model that could draft for it and are not tried, on llama.cpp."""
    tried = {drafter_name(spec) for spec in request.drafters}
    found = drafters_beside(request.model) if request.base.engine == "llama-cpp" else []
    return [path.name for path in found if path.name not in tried]


def check(request: Request) -> None:
    """Raise UsageError for a request that could only fail after measuring."""
    base = request.base
    if request.max_tokens < FEWEST_TOKENS:
        raise UsageError(
            f"answers of {request.max_tokens} tokens are too short to judge drafts; use --max-tokens {FEWEST_TOKENS} "
            "or more"
        )
    if base.exact and max(request.concurrency) > 1:
        raise UsageError(f"profile {base.name}: tune measures `exact` for one sequence at a time; use --concurrency 1")
    if max(request.concurrency) > len(request.prompts):
        raise UsageError(
            f"{max(request.concurrency)} at once: {request.workload} has {len(request.prompts)} prompts; add "
            "prompts, or lower --concurrency"
        )
    if request.drafters and base.engine != "llama-cpp":
        raise UsageError(
            f"tune tries drafters on llama.cpp; on {base.engine}, compare profiles that name them in bench"
        )
    names = [drafter_name(spec) for spec in request.drafters]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two drafters are named {name}; leave one out, or rename its file")
    for ref in request.corpora:
        check_fits(ref, request.model)
    if request.retrieval:
        registry.build_sources(request.retrieval)  # raises for a damaged corpus, before anything is measured
    if request.out.exists() and not request.out.is_file():
        raise UsageError(f"{request.out}: this is not a file; use another --out")
    recordings = cache_folder() / TRACES / "recordings"
    for path, remedy in ((request.out, "use another --out"), (recordings, "set XDG_CACHE_HOME to another folder")):
        try:
            check_writable(path)
        except OSError as error:
            raise UsageError(f"{path}: cannot be written ({reason(path, error)}); {remedy}") from None


def check_journal(journal: Journal, request: Request) -> None:
    """Raise UsageError unless the journal was begun for this request, on this machine and with this model."""
    begun = journal.entries[0]
    if begun["kind"] != "begun" or begun["schema"] != SCHEMA:
        raise UsageError(f"{journal.path}: another version of specplug wrote this journal; run without --resume")
    now = json.loads(json.dumps(request.identity()))
    for key, value in now.items():
        if begun["request"].get(key, type(value)()) != value:  # journals of earlier versions lack some
            raise UsageError(f"{journal.path}: the unfinished tune had another {key}; run without --resume")
    changed = fingerprint.changes(begun["fingerprint"], request.fingerprint())
    if changed:
        raise UsageError(
            f"{journal.path}: begun under other conditions ({'; '.join(changed)}); run without --resume to measure "
            "again"
        )
