"""What a tune is asked for, and whether a journal was begun for the same.

Knows prompts, a base profile and the journal's first entry. Measures nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from platformdirs import user_state_dir

from specplug import profile as profiles
from specplug.bench.workloads import Prompt
from specplug.errors import UsageError
from specplug.machine import fingerprint
from specplug.profile import Profile
from specplug.tune.budget import FEWEST_TOKENS
from specplug.tune.journal import Journal

SCHEMA = 1
OBJECTIVES = ("latency", "throughput")


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for. `command` is how, for the evidence."""

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
    command: str = ""

    @property
    def level(self) -> int:
        """The concurrency at which settings compete: the smallest for latency, the largest for throughput."""
        return min(self.concurrency) if self.objective == "latency" else max(self.concurrency)

    def fingerprint(self) -> dict[str, Any]:
        """Of this machine and model, as far as the base profile uses them."""
        return fingerprint.of(self.model, engine=self.base.engine, threads=None, gpu=fingerprint.uses_gpu(self.base))

    def identity(self) -> dict[str, Any]:
        """What a journal must have been begun with to be continued."""
        return {
            "base": hashlib.sha256(profiles.dumps(self.base).encode()).hexdigest(),
            "workload": workload_hash(self.prompts),
            "budget": self.budget,
            "max_tokens": self.max_tokens,
            "objective": self.objective,
            "concurrency": list(self.concurrency),
        }


def journal_path(out: Path) -> Path:
    """Where the journal of a tune that writes `out` is."""
    key = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:12]
    return Path(user_state_dir("specplug")) / "tune" / f"{out.stem}-{key}.journal"


def workload_hash(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of what is asked, in order."""
    return hashlib.sha256(json.dumps([[p.id, p.category, p.turns] for p in prompts]).encode()).hexdigest()


def check(request: Request) -> None:
    """Raise what would otherwise be found only after measuring."""
    base = request.base
    if request.max_tokens < FEWEST_TOKENS:
        raise UsageError(f"answers of {request.max_tokens} tokens say nothing of drafts; use at least {FEWEST_TOKENS}")
    if base.exact and max(request.concurrency) > 1:
        raise UsageError(f"profile {base.name}: exact runs one sequence at a time; use a concurrency of 1")
    if max(request.concurrency) > len(request.prompts):
        raise UsageError(
            f"{max(request.concurrency)} at once: {request.workload} has {len(request.prompts)} prompts; give it "
            "more, or lower the concurrency"
        )
    if request.out.exists() and not request.out.is_file():
        raise UsageError(f"{request.out}: not a file; name another profile to write")
    try:
        request.out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=request.out.parent):
            pass
    except OSError as error:
        raise UsageError(f"{request.out}: cannot be written ({error.strerror or error}); use another --out") from None


def check_journal(journal: Journal, request: Request) -> None:
    """Raise UsageError unless the journal was begun for this request, on this machine, with this model."""
    begun = journal.entries[0]
    if begun["kind"] != "begun" or begun["schema"] != SCHEMA:
        raise UsageError(f"{journal.path}: written by another version; run without --resume")
    now = json.loads(json.dumps(request.identity()))
    for key, value in now.items():
        if begun["request"].get(key) != value:
            raise UsageError(f"{journal.path}: the unfinished tune had another {key}; run without --resume")
    changed = fingerprint.changes(begun["fingerprint"], request.fingerprint())
    if changed:
        raise UsageError(
            f"{journal.path}: begun under other conditions ({'; '.join(changed)}); run without --resume to measure anew"
        )
