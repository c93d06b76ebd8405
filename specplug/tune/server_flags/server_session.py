"""A complete tune of a server, from the request to the written profile: the order of the stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any

from specplug import profile as profiles
from specplug.machine import hardware
from specplug.machine.memory import available_memory, gib
from specplug.profile import Profile
from specplug.subjects.connection import SILENCE_S
from specplug.subjects.launched import START_S, LaunchedServer
from specplug.subjects.server_command import ServerCommand
from specplug.subjects.server_memory import GPU_LAYERS, fit_advice, fitted_flags, may_offload, server_bytes
from specplug.subjects.subject import Subject
from specplug.tune import journal as journals
from specplug.tune.budget import Budget, Progress
from specplug.tune.server_flags.live_servers import LiveServers, Opener
from specplug.tune.server_flags.offered_candidates import checked_candidates, probes_of
from specplug.tune.server_flags.recorded_questions import AskedQuestion, further_questions, grouped
from specplug.tune.server_flags.run_choice import best_of_families, to_run, with_chains
from specplug.tune.server_flags.server_candidates import ENGINE_NAME, PLAIN, Candidate
from specplug.tune.server_flags.server_document import ServerFindings, server_document, server_profile
from specplug.tune.server_flags.server_predictions import Predicted
from specplug.tune.server_flags.server_request import (
    SERVER_SCHEMA,
    ServerRequest,
    check_server_journal,
    check_server_request,
)
from specplug.tune.server_flags.server_stages import ENGINE_SHARE, OTHER_LEVEL_SHARE, ServerStages
from specplug.tune.server_flags.successive_elimination import CandidateRun, selection_share
from specplug.tune.tune_request import journal_path

SILENCE_SHARE = 0.15
"""Of the budget, so much silence makes a server count as hung."""

SHORTEST_SILENCE_S = 10.0
START_TIMES = 4
"""A server that has not started after so many times what plain decoding took counts as failed."""

SHORTEST_START_S = 20.0
"""It has at least so long, such as for a drafter that is not in the disk's cache."""

ENGINE_ANSWERS = 8
"""Answers of specplug's own engine; it is one row of the table, and no candidate."""

FEWEST_BEFORE_ENGINE = 2
"""Candidates for which there must be time before specplug's own engine gets some."""

LEVEL_GROUPS = 3
"""Groups of answers at each further concurrency."""


@dataclass(frozen=True, slots=True)
class ServerOutcome:
    """The profile as written, the document of `tune --json`, and the command that was found."""

    profile: Profile
    document: dict[str, Any]
    argv: list[str]


def tune_server(
    request: ServerRequest,
    *,
    notify: Callable[[str], None] = lambda text: None,
    progress: Progress = lambda stage, share, best, left: None,
    opener: Opener | None = None,
    clock: Callable[[], float] = monotonic,
    check: Callable[[Sequence[str]], object] = lambda argv: None,
) -> ServerOutcome:
    """Find the fastest flags and write the profile. An interrupted tune can be continued with `resume`.

    opener  makes the subject of a candidate; by default a process of the command
    check   as for `checked_candidates`
    UsageError for a request that cannot be tuned; SpecplugError where plain decoding fails. A fault of a candidate is a
    row of the result.
    """
    check_server_request(request)
    tried, missing = checked_candidates(request, check)
    with ExitStack() as stack:
        path = journal_path(request.out)
        journal = stack.enter_context(journals.opened(path, resume=request.resume, notify=notify))
        if journal.entries:
            check_server_journal(journal, request)
        budget = Budget(request.budget, journal.spent, clock)
        busy = hardware.too_busy()  # before a server makes the machine busy
        if not journal.entries:
            journal.add(
                "begun",
                schema=SERVER_SCHEMA,
                server=request.identity(),
                fingerprint=request.fingerprint(),
                spent=0.0,
            )
        simulated = opener is not None
        opener = opener or _opener(
            request, lambda: start_limit(servers.plain_start_s, budget.left), lambda: budget.left
        )
        servers = LiveServers(opener, together=False, clock=clock)
        stack.callback(servers.close)
        stages = ServerStages(request, servers, journal, budget, notify, progress)
        if busy:
            stages.note(f"{busy} are busy with other work, so measured speeds are not reliable")
        for sentence in missing:
            stages.note(sentence)
        servers.note = stages.note
        servers.together = simulated or _together(request, stages.note)
        return _run(stages, tried, busy)


def _run(stages: ServerStages, tried: list[Candidate], busy: str | None) -> ServerOutcome:
    request, budget = stages.request, stages.budget
    stages.start_plain()
    recorded = stages.record()
    probes = probes_of(request)
    costs = stages.measure_costs(recorded, probes)
    if costs is not None:
        stages.measure_drafters(recorded, tried, costs)
    predictions = stages.predict(recorded, tried, costs)
    if chains := with_chains(tried, predictions):
        tried += chains
        predictions |= stages.predict(recorded, chains, costs)

    others = [level for level in request.concurrency if level != request.level]
    reserve = budget.seconds * OTHER_LEVEL_SHARE * len(others)
    chosen, engine_s = _selected(stages, tried, predictions, reserve)
    reserve += engine_s
    questions = [one.asked for one in recorded]
    further = further_questions(request.prompts, recorded, request.max_tokens)
    questions += [one for one in further if one.key not in stages.refused]
    groups = grouped(questions, request.level)
    runs = [CandidateRun(one, predictions[one.name].speedup if one.name in predictions else None) for one in chosen]
    stages.run_live(runs, groups, reserve)

    winner = next((one for one in runs if one.wins), None)
    shown = winner or max((one for one in runs if one.own), key=lambda one: one.median, default=None)
    levels: dict[int, CandidateRun] = {}
    for number, level in enumerate(others):
        if shown is not None:
            levels[level] = CandidateRun(shown.candidate)
            left_over = reserve - budget.seconds * OTHER_LEVEL_SHARE * (number + 1)
            stages.measure_aside(levels[level], grouped(questions, level)[:LEVEL_GROUPS], left_over)
    engine = _own_engine(stages, groups) if engine_s else None

    findings = ServerFindings(
        request=request,
        abilities=stages.abilities,
        answers=len(recorded),
        tokens=sum(one.timed.tokens + 1 for one in recorded),
        costs=costs,
        tried=tried,
        predictions=predictions,
        runs=runs,
        levels=levels,
        engine=engine,
        winner=winner,
        busy=busy,
        seconds=budget.spent,
        notes=stages.notes,
    )
    document = server_document(findings)
    written = server_profile(findings, document)
    profiles.save(written, request.out)
    stages.journal.add("done", path=str(request.out), spent=budget.spent)
    return ServerOutcome(written, document, request.command.with_flags(document["flags"]))


def _selected(
    stages: ServerStages, tried: Sequence[Candidate], predictions: Mapping[str, Predicted], reserve: float
) -> tuple[list[Candidate], float]:
    """The candidates to run live, and the seconds that are kept for specplug's own engine.

    A tune that is continued has those of the interrupted one, which had more time left.
    reserve  seconds that are kept for other things
    """
    engine_s = ENGINE_SHARE * stages.request.budget
    if (kept := stages.journal.last("selected")) is not None:
        known = {one.name: one for one in tried}
        return [known[name] for name in kept["names"] if name in known], engine_s if kept["engine"] else 0.0
    share = selection_share(one.name in predictions for one in best_of_families(tried, predictions))
    if not _own_engine_fits(stages.request, stages.note):
        engine_s = 0.0
    elif stages.most_to_run(reserve + engine_s, share) < FEWEST_BEFORE_ENGINE:
        stages.note("specplug's own engine is not measured, so that there is time for the candidates; raise --budget")
        engine_s = 0.0
    chosen = to_run(tried, predictions, stages.most_to_run(reserve + engine_s, share))
    names = [one.name for one in chosen]
    stages.journal.add("selected", names=names, engine=engine_s > 0, spent=stages.budget.spent)
    return chosen, engine_s


def _own_engine(stages: ServerStages, groups: Sequence[Sequence[AskedQuestion]]) -> CandidateRun:
    """specplug's own engine beside the plain server, as one more row."""
    run = CandidateRun(Candidate(ENGINE_NAME, ENGINE_NAME))
    stages.measure_aside(run, groups[:ENGINE_ANSWERS], 0.0)
    return run


def _own_engine_fits(request: ServerRequest, note: Callable[[str], None]) -> bool:
    """Whether specplug's own engine is asked for, and computes where the server does."""
    if not request.own_engine or not may_offload(request.command):
        return request.own_engine
    from specplug.engines.llama_cpp.engine_settings import can_offload

    if not can_offload():
        note(
            "specplug's own engine is not measured: the server may use a GPU, and the installed llama-cpp-python is "
            "built without GPU support (docs/how-to/gpu.md)"
        )
        return False
    return True


def start_limit(plain_start_s: float, left: float) -> float:
    """Seconds that the server of a candidate may take to start, with so many left of the budget."""
    usual = max(SHORTEST_START_S, START_TIMES * plain_start_s)
    return min(START_S, usual, max(left, plain_start_s))


def answer_limit(candidate: Candidate, silence: float, left: float, budget: float) -> float:
    """Seconds that an answer of the candidate's server may take, with so many left of the budget.

    One that begins at the end of the budget may take longer than what is left by as long as a server may be silent.
    Plain decoding has the whole budget for each: its failure ends the tune, with all that was measured.
    """
    return budget + silence if candidate == PLAIN else max(0.0, left) + silence


def _opener(request: ServerRequest, limit: Callable[[], float], left: Callable[[], float]) -> Opener:
    """Subjects from the user's command, and specplug's own engine.

    limit  returns the seconds that a candidate may take to start
    left   returns the seconds that are left of the budget
    """
    silence = min(SILENCE_S, max(SHORTEST_SILENCE_S, SILENCE_SHARE * request.budget))

    def opened(candidate: Candidate) -> Subject:
        if candidate.name == ENGINE_NAME:
            from specplug.subjects.engine_subject import EngineSubject

            assert request.model is not None
            profile = engine_profile(profiles.load("default"), request.command)
            return EngineSubject(profile, request.model, slots=request.level, name=ENGINE_NAME)
        if candidate == PLAIN:
            label, start_s = request.command.program, min(START_S, request.budget)
        else:
            label, start_s = candidate.name, limit()
        return LaunchedServer(
            request.command,
            name=label,
            start_s=start_s,
            silence_s=silence,
            answer_s=lambda: answer_limit(candidate, silence, left(), request.budget),
        )

    return opened


def engine_profile(profile: Profile, command: ServerCommand) -> Profile:
    """The profile with the context, the threads and the GPU layers of the server's command, as far as that names some.

    All layers where the server has a GPU and chooses their number itself.
    """
    runtime = profile.runtime
    if command.context:
        runtime = replace(runtime, context=command.context // (command.slots or 1))
    if command.threads:
        runtime = replace(runtime, threads=command.threads)
    if may_offload(command):
        layers = command.value(GPU_LAYERS) or ""
        runtime = replace(runtime, gpu_layers=int(layers) if layers.isdecimal() else -1)
    return replace(profile, runtime=runtime)


def _together(request: ServerRequest, note: Callable[[str], None]) -> bool:
    """Whether two servers may run at once: each has a port of its own, and there is memory for the second one, which
    does not choose its settings by what is left."""
    if request.command.port is not None:
        note("the command names its port, so one server runs at a time; leave out --port for two side by side")
        return False
    if fitted := fitted_flags(request.command):
        note(
            f"one server runs at a time: a second one would choose {' and '.join(fitted)} by the GPU memory that is "
            f"left (--fit); for two side by side, {fit_advice(fitted)}"
        )
        return False
    needed = server_bytes(request.command)
    available = available_memory()
    if 2 * needed > available.free:
        note(f"one server runs at a time: two need {gib(2 * needed)} GiB, and {available}")
        return False
    return True
