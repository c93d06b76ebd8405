"""The stages of a tune of a server: what each asks of which process, and what it leaves in the journal.

Their order is in server_session.py. This module starts servers through LiveServers, and writes no document.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from specplug.errors import EngineError, SpecplugError, UsageError
from specplug.subjects.clock_check import clock_difference
from specplug.subjects.simultaneous import ask_at_once
from specplug.subjects.subject import Abilities, RefusedQuestion, Reply, Subject, SubjectError
from specplug.tune.budget import Budget, Progress
from specplug.tune.journal import Journal
from specplug.tune.selection import FEWEST_ANSWERS
from specplug.tune.server_flags.answer_replay import RecordedAnswer, Replayed
from specplug.tune.server_flags.drafter_guesses import AnswerGuesses, guesses_of
from specplug.tune.server_flags.live_servers import LiveServers
from specplug.tune.server_flags.pass_times import PassTimes, fitted, plain_scales, usual_rows
from specplug.tune.server_flags.probe_replay import counts_of, probe_entry, replay_of_probe
from specplug.tune.server_flags.recorded_questions import (
    AskedQuestion,
    Recorded,
    Timed,
    as_entry,
    from_entry,
    level_of,
    turns_of,
)
from specplug.tune.server_flags.refused_questions import RefusedQuestions
from specplug.tune.server_flags.run_choice import MOST_RUN
from specplug.tune.server_flags.server_candidates import Candidate
from specplug.tune.server_flags.server_predictions import Predicted, drafter_pass_ms, predicted
from specplug.tune.server_flags.server_request import ServerRequest, check_budget
from specplug.tune.server_flags.successive_elimination import CandidateRun, SuccessiveElimination

RECORD_SHARE, COST_SHARE, REPLAY_SHARE = 0.22, 0.15, 0.1
"""Shares of the budget: plain answers, answers that show what passes cost, and replaying."""

OTHER_LEVEL_SHARE, ENGINE_SHARE = 0.1, 0.1
"""What is kept back for each further concurrency, and for specplug's own engine."""

COST_ANSWERS = 2
"""Answers per number of draft tokens: of the longest ones those with the shortest prompts."""

FIRST_ROUND_SHARE = 0.8
"""Of the time for the selection, so much its first round may take."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Draft tokens and accepted ones of answers with the recorded text: by the server, and by the replay."""

    name: str
    server: tuple[int, int]
    replay: tuple[int, int]


@dataclass(slots=True)
class ServerCosts:
    """What candidates are predicted from.

    times                of the server's passes, in an answer with the mean scale
    scales               by recorded answer with tokens: milliseconds of a plain pass of it, relative to the mean
    drafter_ms, guesses  by a drafter's file: milliseconds of its pass, and its guesses along the recorded answers
    agreements           of replays with what the server counted
    """

    times: PassTimes
    scales: list[float]
    drafter_ms: dict[str, float] = field(default_factory=dict)
    guesses: dict[str, list[AnswerGuesses]] = field(default_factory=dict)
    agreements: list[Agreement] = field(default_factory=list)


class ServerStages:
    """One tune.

    notes    sentences for the user, which the document keeps
    group_s  seconds of an answer of two servers, by the plain answers; 0 before these
    refused  what plain decoding does not answer
    """

    def __init__(
        self,
        request: ServerRequest,
        servers: LiveServers,
        journal: Journal,
        budget: Budget,
        notify: Callable[[str], None],
        progress: Progress,
    ) -> None:
        self.request = request
        self.servers = servers
        self.journal = journal
        self.budget = budget
        self.notes: list[str] = []
        self.abilities = Abilities("openai")
        self.group_s = 0.0
        self._replies: list[Reply] = []
        self._notify = notify
        self._progress = progress
        self.refused = RefusedQuestions(journal, lambda: budget.spent, self.note)

    def note(self, text: str) -> None:
        self.notes.append(text)
        self._notify(text)

    def start_plain(self) -> None:
        """Start the server without drafts, and find out what it can do. SpecplugError where it does not start."""
        self._progress("starting the server", 0.0, "", self.budget.left)
        try:
            self.abilities = self.servers.plain().abilities
        except SubjectError as error:
            raise SpecplugError(f"plain decoding cannot be measured: {error}") from None
        self._check_version()
        slots, most = self.abilities.slots, max(self.request.concurrency)
        if slots is not None and most > slots:
            self.note(f"the server answers {slots} at once, so of {most} requests some wait")
        if not self.abilities.timings:
            self.note("the server reports no times of its own; those of the stream are used")

    def record(self) -> list[Recorded]:
        """Plain answers to the prompts, by turns of the categories, as many as fit. Questions that the server refuses
        are left out, and so are the later turns of these conversations.

        UsageError where the budget cannot hold what a winner needs; SpecplugError where too few are answered.
        """
        kept = {entry["key"]: entry for entry in self.journal.of("answer")}
        found: list[Recorded] = []
        texts: dict[str, list[str]] = {}
        slowest = 0.0
        for turn in turns_of(self.request.prompts):
            earlier = texts.setdefault(turn.prompt, [])
            if turn.key in self.refused or len(earlier) < len(turn.texts) - 1:
                continue
            one = turn.question(earlier, self.request.max_tokens)
            if turn.key in kept:
                recorded = from_entry(one, kept[turn.key])
            else:
                enough = len(found) >= self.request.fewest_answers
                if enough and self.budget.spent + slowest > RECORD_SHARE * self.request.budget:
                    break
                before = self.budget.spent
                try:
                    recorded = self._record(one)
                except RefusedQuestion as error:
                    self.refused.add([one], error)
                    continue
                slowest = max(slowest, self.budget.spent - before)
                if not found:
                    needed = before + self.servers.plain_start_s + self.request.fewest_times * slowest
                    check_budget(self.request, needed, "here")
            earlier.append(recorded.text)
            found.append(recorded)
            self._progress("plain answers", min(1.0, len(found) / len(self.request.prompts)), "", self.budget.left)
        self.refused.check(len(found), self.request.fewest_answers)
        self.group_s = 2 * sum(one.timed.ms + one.timed.first_ms for one in found) / len(found) / 1000
        if difference := clock_difference("the server", self._replies):
            self.note(difference)
        unknown = sum(one.tokens is None for one in found)
        if unknown == len(found):
            self.note("the server reports no token ids, so nothing is predicted by replay")
        elif unknown:
            self.note(
                f"the server did not report the token ids of {unknown} of {len(found)} answers; these are not replayed"
            )
        return found

    def measure_costs(self, recorded: Sequence[Recorded], probes: Sequence[Candidate]) -> ServerCosts | None:
        """What passes of the server take, from live answers with lookup at several sizes; None where none is known.

        probes  candidates with known lookup rules that draft often, the most important first
        """
        usable = [one for one in recorded if one.tokens is not None]
        plain = [(len(_replayable(one).answer) - 1, one.timed.ms) for one in usable]
        if not any(passes and ms > 0 for passes, ms in plain) or not probes:
            return None
        mean_ms, scales = plain_scales(plain)
        costs = ServerCosts(PassTimes((1,), (mean_ms,)), scales)
        samples: list[tuple[Mapping[int, int], float]] = [({1: passes}, passes * mean_ms) for passes, _ in plain]
        knots = {1}
        until = self.budget.spent + COST_SHARE * self.request.budget
        for number, probe in enumerate(probes):
            for replay, ms, scale in self._probed(probe, usable, until, costs):
                samples.append((replay.passes, ms / scale))
                knots.add(usual_rows(replay.passes))
            self._progress("the cost of a pass", (number + 1) / len(probes), "", self.budget.left)
        costs.times = fitted(samples, sorted(knots))
        return costs

    def measure_drafters(self, recorded: Sequence[Recorded], tried: Sequence[Candidate], costs: ServerCosts) -> None:
        """Guesses of the drafters along the recorded answers, and what a pass of each takes on the server."""
        usable = [one for one in recorded if one.tokens is not None]
        answers = [_replayable(one) for one in usable]
        until = self.budget.spent + REPLAY_SHARE * self.request.budget
        for file in dict.fromkeys(one.drafts.file for one in tried if one.drafts is not None and not one.rules):
            try:
                # OpenMP keeps the threads of each thread that has computed, and beside them specplug's own engine,
                # which computes in another one, would run at half its speed; those of a thread that ends it ends.
                with ThreadPoolExecutor(1) as reader:
                    found = reader.submit(guesses_of, Path(file), answers, lambda: self.budget.spent < until)
                    guesses = found.result()
            except (UsageError, EngineError) as error:
                self.note(f"{Path(file).name} is tried without a prediction: {error}")
                continue
            if guesses is None:
                why = "llama-cpp-python is not installed, or there was no time"
                self.note(f"{Path(file).name} is tried without a prediction: {why}")
                continue
            costs.guesses[file] = guesses
            probe = next(one for one in tried if one.drafts is not None and one.drafts.file == file and one.usual)
            measured = self._probed(probe, usable, until + 2 * self.servers.plain_start_s, costs)
            if measured:
                costs.drafter_ms[file] = drafter_pass_ms(measured, costs.times)

    def predict(
        self, recorded: Sequence[Recorded], tried: Sequence[Candidate], costs: ServerCosts | None
    ) -> dict[str, Predicted]:
        """By name, the candidates whose drafts are known; those that there was time for."""
        found: dict[str, Predicted] = {}
        if costs is None:
            return found
        answers = [_replayable(one) for one in recorded if one.tokens is not None]
        until = self.budget.spent + REPLAY_SHARE * self.request.budget
        for number, candidate in enumerate(tried):
            if self.budget.spent > until:
                self.note(f"there was time to replay {number} of {len(tried)} candidates; raise --budget to try all")
                break
            one = predicted(
                candidate,
                answers,
                costs.times,
                scales=costs.scales,
                level=self.request.level,
                guesses=costs.guesses,
                drafter_ms=costs.drafter_ms,
            )
            if one is not None:
                found[candidate.name] = one
            if number % 16 == 0:
                self._progress("replaying", number / len(tried), "", self.budget.left)
        return found

    def run_live(self, runs: Sequence[CandidateRun], groups: Sequence[Sequence[AskedQuestion]], reserve: float) -> None:
        """Select one candidate and confirm it, leaving `reserve` seconds."""

        def best(found: Sequence[CandidateRun]) -> None:
            leader = max((one for one in found if one.own), key=lambda one: one.median, default=None)
            text = f"{leader.candidate.name} {leader.median:.2f}" if leader is not None else ""
            self._progress("live", 1 - max(0.0, self.budget.left) / self.request.budget, text, self.budget.left)

        groups = self.refused.without(groups)
        self._restore(runs, groups)
        self._new_elimination(groups, reserve, best).run(runs)

    def measure_aside(self, run: CandidateRun, groups: Sequence[Sequence[AskedQuestion]], reserve: float) -> None:
        """Measure one candidate once over the groups, as far as the time goes."""
        groups = self.refused.without(groups)
        self._restore([run], groups)
        if run.running and run.groups < len(groups):
            self._new_elimination(groups, reserve, lambda found: None).measure(run, groups[run.groups :])

    def most_to_run(self, reserve: float, share: float) -> int:
        """How many candidates the first round of a selection has time for, which has such a share of the live runs."""
        starts = 1 if self.servers.together else 3
        first_round = starts * self.servers.plain_start_s + FEWEST_ANSWERS * self.group_s
        if first_round <= 0:
            return MOST_RUN
        return int(FIRST_ROUND_SHARE * share * (self.budget.left - reserve) / first_round)

    def _new_elimination(
        self,
        groups: Sequence[Sequence[AskedQuestion]],
        reserve: float,
        progress: Callable[[Sequence[CandidateRun]], object],
    ) -> SuccessiveElimination:
        return SuccessiveElimination(
            self.servers,
            groups,
            left=lambda: self.budget.left - reserve,
            start_s=self.servers.plain_start_s,
            group_s=self.group_s,
            store=self._store,
            failed=lambda run: self._failed(run, level_of(groups)),
            refused=self.refused.add,
            progress=progress,
        )

    def _check_version(self) -> None:
        """UsageError where the tune that is continued had another version of the server."""
        version = self.abilities.version
        started = self.journal.last("started")
        if started is None:
            self.journal.add("started", version=version, spent=self.budget.spent)
        elif started["version"] != version:
            raise UsageError(
                f"{self.journal.path}: the unfinished tune had version {started['version']!r} of the server, and this "
                f"is {version!r}; run without --resume"
            )

    def _record(self, one: AskedQuestion) -> Recorded:
        try:
            (reply,) = ask_at_once(self.servers.plain(), [replace(one.question, ids=self.abilities.token_ids)])
        except RefusedQuestion:
            raise
        except SubjectError as error:
            raise SpecplugError(f"plain decoding cannot be measured: {error}") from None
        self._replies.append(reply)
        entry = as_entry(one.key, reply)
        self.journal.add("answer", **entry, spent=self.budget.spent)
        return from_entry(one, entry)

    def _probed(
        self, probe: Candidate, usable: Sequence[Recorded], until: float, costs: ServerCosts
    ) -> list[tuple[Replayed, float, float]]:
        """Replays of a few live answers of a candidate, their milliseconds, and their scales; empty where it fails."""
        longest = sorted(usable, key=lambda one: (-one.timed.tokens, len(_replayable(one).prompt)))[:COST_ANSWERS]
        kept = {(entry["name"], entry["key"]): entry for entry in self.journal.of("cost")}
        entries = [kept[probe.name, one.asked.key] for one in longest if (probe.name, one.asked.key) in kept]
        if len(entries) < len(longest):
            needed = self.servers.plain_start_s + sum(one.timed.ms + one.timed.first_ms for one in longest) / 1000
            if self.budget.spent + needed > min(until, self.budget.seconds):
                return []
            try:
                with self.servers.other(probe) as subject:
                    entries = [self._cost(probe, one, subject) for one in longest]
            except SubjectError as error:
                self.note(f"{probe.name} failed: {error}")
                return []
        found = []
        for one, entry in zip(longest, entries, strict=True):
            at = usable.index(one)
            guesses = {file: known[at] for file, known in costs.guesses.items()}
            if (replay := replay_of_probe(probe, one, entry, guesses)) is not None:
                found.append((replay, entry, costs.scales[at]))
        # a drafter's replay of another text is made of the counts, so it cannot be compared with them
        texts = {one.text for one in longest}
        own = [(replay, entry) for replay, entry, _ in found if probe.drafts is None or entry["text"] in texts]
        if own and (server := counts_of([entry for _, entry in own])) is not None:
            replayed = sum(one.drafted for one, _ in own), sum(one.accepted for one, _ in own)
            costs.agreements.append(Agreement(probe.name, server, replayed))
        return [(replay, Timed(*entry["timed"]).ms, scale) for replay, entry, scale in found]

    def _cost(self, probe: Candidate, one: Recorded, subject: Subject) -> dict[str, Any]:
        (reply,) = ask_at_once(subject, [replace(one.asked.question, ids=self.abilities.token_ids)])
        entry = probe_entry(probe, one, reply)
        self.journal.add("cost", **entry, spent=self.budget.spent)
        return entry

    def _store(
        self, run: CandidateRun, group: Sequence[AskedQuestion], own: Sequence[Timed], plain: Sequence[Timed]
    ) -> None:
        self.journal.add(
            "pair",
            name=run.candidate.name,
            confirms=run.confirmation is not None,
            keys=[one.key for one in group],
            own=[one.packed() for one in own],
            plain=[one.packed() for one in plain],
            spent=self.budget.spent,
        )

    def _failed(self, run: CandidateRun, level: int) -> None:
        self.journal.add("failed", name=run.candidate.name, level=level, why=run.failure, spent=self.budget.spent)
        self.note(f"{run.candidate.name} failed: {run.failure}")

    def _restore(self, runs: Sequence[CandidateRun], groups: Sequence[Sequence[AskedQuestion]]) -> None:
        """Add what an interrupted tune measured of these groups."""
        by_keys = {tuple(one.key for one in group): group for group in groups}
        by_name = {run.candidate.name: run for run in runs}
        for entry in self.journal.entries:
            run = by_name.get(entry.get("name", ""))
            if run is None:
                continue
            if entry["kind"] == "failed":
                if entry["level"] == level_of(groups):
                    run.failure = entry["why"]
            elif entry["kind"] == "pair" and (group := by_keys.get(tuple(entry["keys"]))) is not None:
                if entry["confirms"]:
                    run.begin_confirmation()
                run.add(group, *([Timed(*one) for one in entry[side]] for side in ("own", "plain")))


def _replayable(one: Recorded) -> RecordedAnswer:
    assert one.tokens is not None
    return one.tokens
