"""The request for a tune of a server, its checks, and what must stay the same for it to be continued.

This module measures nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specplug.bench.workloads import Prompt
from specplug.errors import UsageError
from specplug.machine import fingerprint, hardware
from specplug.machine.files import check_writable
from specplug.machine.folders import reason
from specplug.models.gguf_header import parts_of
from specplug.profile.shown_command import without_keys
from specplug.subjects.server_command import ServerCommand
from specplug.tune.budget import FEWEST_TOKENS, in_words
from specplug.tune.journal import Journal
from specplug.tune.selection import FEWEST_ANSWERS
from specplug.tune.tune_request import deciding_level, workload_hash

SERVER_SCHEMA = 2

FASTEST_BYTES_S = 1e12
"""No machine reads weights faster than this, so an answer takes at least their size over it for every token."""

FASTEST_START_S = 0.2
"""No server starts faster."""

MOST_AT_ONCE = 64

VARIABLES = "LLAMA_ARG_"
"""Beginning of the names of environment variables that stand for flags of llama-server."""


@dataclass(frozen=True, slots=True)
class ServerRequest:
    """The request.

    command      the user's words of --server
    model        the file of the model; None where it is none on this disk
    workload     the name of the prompts' source
    name, out    the profile to write, and its file
    budget       seconds
    concurrency  numbers of requests at once, ascending
    drafters     models to try as drafters, as the server's flag names them
    heads        kind and file of heads, as for `llama_candidates` or `vllm_candidates`
    own_engine   whether specplug's own engine is measured as well
    invoked      the command line of this tune, for the evidence
    """

    command: ServerCommand
    model: Path | None
    prompts: Sequence[Prompt]
    workload: str
    name: str
    out: Path
    budget: float
    max_tokens: int = 128
    objective: str = "latency"
    concurrency: tuple[int, ...] = (1,)
    resume: bool = False
    drafters: tuple[str, ...] = ()
    heads: tuple[tuple[str, str | None], ...] = ()
    own_engine: bool = False
    invoked: str = ""

    @property
    def level(self) -> int:
        """The deciding concurrency: the smallest for latency, the largest for throughput."""
        return deciding_level(self.concurrency, self.objective)

    @property
    def fewest_answers(self) -> int:
        """Recorded answers without which no candidate can win, or a concurrency is not measured."""
        return max(FEWEST_ANSWERS * self.level, *self.concurrency)

    @property
    def fewest_times(self) -> int:
        """How many times that of one answer those take, and FEWEST_ANSWERS groups of two servers."""
        return self.fewest_answers + 2 * FEWEST_ANSWERS

    def identity(self) -> dict[str, Any]:
        """The values that must be the same for a journal to be continued."""
        return {
            "command": without_keys(self.command.argv),
            "version": self.command.version,
            "workload": workload_hash(self.prompts),
            "budget": self.budget,
            "max_tokens": self.max_tokens,
            "objective": self.objective,
            "concurrency": list(self.concurrency),
            "drafters": [[name, fingerprint.model_identity(Path(name))] for name in self.drafters],
            "heads": [
                [kind, file, None if file is None else fingerprint.model_identity(Path(file))]
                for kind, file in self.heads
            ],
            "environment": {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)},
        }

    def fingerprint(self) -> dict[str, Any]:
        """That of this machine, of the server's build, and of the model where it is on this disk."""
        model = {} if self.model is None else {"model": fingerprint.model_identity(self.model)}
        versions = {"server": self.command.version} if self.command.version else {}
        return {**hardware.fingerprint(), "engine": "server", "versions": versions, **model}

    def model_bytes(self) -> int:
        """Of all parts of the model; 0 where it is not on this disk."""
        if self.model is None:
            return 0
        files = [one for one in self.model.rglob("*") if one.is_file()] if self.model.is_dir() else parts_of(self.model)
        return sum(one.stat().st_size for one in files)


def least_seconds(request: ServerRequest) -> float:
    """What starting two servers and the fewest answers take on the fastest machine."""
    answer = request.max_tokens * request.model_bytes() / FASTEST_BYTES_S
    return 2 * FASTEST_START_S + request.fewest_times * answer


def check_server_request(request: ServerRequest) -> None:
    """Raise UsageError for a request that could only fail after measuring."""
    if request.max_tokens < FEWEST_TOKENS:
        raise UsageError(
            f"answers of {request.max_tokens} tokens are too short to judge drafts; use --max-tokens {FEWEST_TOKENS} "
            "or more"
        )
    most = max(request.concurrency)
    if most > MOST_AT_ONCE:
        raise UsageError(f"--concurrency {most}: at most {MOST_AT_ONCE} requests run at once; lower it")
    turns = sum(len(prompt.turns) for prompt in request.prompts)
    if request.fewest_answers > turns:
        needs = f"a winner needs {FEWEST_ANSWERS} different groups of {request.level}"
        if request.fewest_answers > FEWEST_ANSWERS * request.level:
            needs = f"--concurrency {most} asks {most} of them at once"
        raise UsageError(
            f"{request.workload} has prompts for {turns} answers, and {needs}; pass --workload with "
            f"{request.fewest_answers} or more, or lower --concurrency"
        )
    check_budget(request, least_seconds(request), "on the fastest machine")
    if request.out.exists() and not request.out.is_file():
        raise UsageError(f"{request.out}: this is not a file; use another --out")
    try:
        check_writable(request.out)
    except OSError as error:
        raise UsageError(
            f"{request.out}: cannot be written ({reason(request.out, error)}); use another --out"
        ) from None


def check_budget(request: ServerRequest, needed: float, where: str) -> None:
    """Raise UsageError where the budget cannot hold what a winner needs.

    It names three times as much, so that there is something to choose from.
    """
    if request.budget < needed:
        raise UsageError(
            f"the budget of {request.budget:g} s is too small: starting the server twice, {request.fewest_answers} "
            f"plain answers, and {FEWEST_ANSWERS} with and without drafts take {needed:.1f} s {where}; "
            f"say --budget {in_words(3 * needed)}"
        )


def check_server_journal(journal: Journal, request: ServerRequest) -> None:
    """Raise UsageError unless the journal was begun for this request, on this machine and with this model."""
    begun = journal.entries[0]
    if begun["kind"] != "begun" or "server" not in begun or begun["schema"] != SERVER_SCHEMA:
        raise UsageError(f"{journal.path}: this is the journal of another kind of tune; run without --resume")
    for key, value in request.identity().items():
        if begun["server"].get(key) != value:
            raise UsageError(f"{journal.path}: the unfinished tune had another {key}; run without --resume")
    changed = fingerprint.changes(begun["fingerprint"], request.fingerprint())
    if changed:
        raise UsageError(
            f"{journal.path}: begun under other conditions ({'; '.join(changed)}); run without --resume to measure "
            "again"
        )
