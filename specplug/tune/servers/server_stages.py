"""The stages of a tune of a server: what each asks of which process, and what it leaves in the journal.

Their order is in server_session.py. This module starts servers through LiveServers, and writes no document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from specplug.errors import EngineError, SpecplugError, UsageError
from specplug.subjects.subject import Abilities, Question, Reply, SubjectError
from specplug.tune.budget import Budget
from specplug.tune.journal import Journal
from specplug.tune.servers.answer_replay import UNKNOWN, RecordedAnswer, Replayed
from specplug.tune.servers.drafter_guesses import AnswerGuesses, guesses_of
from specplug.tune.servers.live_servers import LiveServers, asked
from specplug.tune.servers.pass_times import PassTimes, fitted
from specplug.tune.servers.race import AskedQuestion, Race, Racer, Timed, timed
from specplug.tune.servers.server_candidates import PLAIN, Candidate
from specplug.tune.servers.server_predictions import Predicted, drafter_token_ms, predicted, replay_of
from specplug.tune.servers.server_request import ServerRequest, check_budget

RECORD_SHARE, COST_SHARE, REPLAY_SHARE = 0.22, 0.15, 0.1
"""Shares of the budget: plain answers, answers that show what passes cost, and replaying."""

OTHER_LEVEL_SHARE, ENGINE_SHARE = 0.1, 0.1
"""What is kept back for each further concurrency, and for specplug's own engine."""

KNOTS = (1, 2, 4, 8, 16, 32)
"""Rows between which the time of a pass is taken as linear."""

COST_ANSWERS = 2
"""Answers per number of draft tokens, the longest ones."""

FEWEST_RECORDED = 2
MOST_RACERS = 8
RACE_START = 0.4
"""Share of the time for the race that its first round may take."""

HOPELESS = 0.93
"""Candidates with a smaller predicted speedup are not run, where others are better: predictions err by less."""

UNPREDICTED = 1.02
"""The place among the predicted ones of a candidate that cannot be replayed."""

Progress = Callable[[str, float, str, float], None]
"""Receives the stage, its share that is done, the best result so far, and the seconds that are left."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """One question with its plain answer; `replayable` is None where the server tells no tokens."""

    asked: AskedQuestion
    text: str
    timed: Timed
    replayable: RecordedAnswer | None


@dataclass(frozen=True, slots=True)
class Agreement:
    """Draft tokens and accepted ones of a run, as the server counted them and as the replay says."""

    name: str
    server: tuple[int, int]
    replay: tuple[int, int]


@dataclass(slots=True)
class Costs:
    """times: of passes; token_ms and guesses: of drafters, by file; agreements: replays against the server's counts."""

    times: PassTimes
    token_ms: dict[str, float] = field(default_factory=dict)
    guesses: dict[str, list[AnswerGuesses]] = field(default_factory=dict)
    agreements: list[Agreement] = field(default_factory=list)


class ServerStages:
    """One tune. notes: sentences for the user, which the document keeps."""

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
        self.plain_start_s = 0.0
        self._notify = notify
        self._progress = progress

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
        self.plain_start_s = self.servers.start_s
        if not self.abilities.timings:
            self.note("the server tells no times of its own; those of the stream are used")

    def record(self) -> list[Recorded]:
        """Plain answers to the prompts, by turns of the categories, as many as fit.

        UsageError where the budget cannot hold one plain answer and one candidate.
        """
        kept = {entry["key"]: entry for entry in self.journal.of("answer")}
        found: list[Recorded] = []
        texts: dict[str, list[str]] = {}
        slowest = 0.0
        for key, category, prompt_id, turns in self._turns():
            earlier = texts.setdefault(prompt_id, [])
            messages = [
                {"role": role, "content": text}
                for pair in zip(("user",) * len(turns), turns, strict=True)
                for role, text in [pair]
            ]
            conversation: list[dict[str, str]] = []
            for place, message in enumerate(messages):
                conversation.append(message)
                if place < len(earlier) and place < len(messages) - 1:
                    conversation.append({"role": "assistant", "content": earlier[place]})
            one = AskedQuestion(key, category, Question(tuple(conversation), self.request.max_tokens))
            if key in kept:
                recorded = _from_entry(one, kept[key], self.request.max_tokens)
            else:
                enough = len(found) >= max(FEWEST_RECORDED, max(self.request.concurrency))
                if enough and self.budget.spent + slowest > RECORD_SHARE * self.request.budget:
                    break
                began = monotonic()
                recorded = self._record(one)
                slowest = max(slowest, monotonic() - began)
                if not found:
                    needed = self.budget.spent + self.plain_start_s + slowest
                    check_budget(self.request.budget, needed, "here")
            earlier.append(recorded.text)
            found.append(recorded)
            self._progress("plain answers", min(1.0, len(found) / len(self.request.prompts)), "", self.budget.left)
        if found and found[0].replayable is None:
            self.note("the server tells no tokens, so nothing is predicted by replay")
        return found

    def measure_costs(self, recorded: Sequence[Recorded], probes: Sequence[Candidate]) -> Costs | None:
        """What passes of the server take, from live answers with lookup at several sizes; None where none is known.

        probes  candidates with known lookup rules that draft often, of ascending size
        """
        usable = [one for one in recorded if one.replayable is not None and len(one.replayable.answer) > 1]
        if not usable or not probes:
            return None
        plain = [({1: len(_replayable(one).answer) - 1}, one.timed.ms) for one in usable]
        costs = Costs(fitted(plain, KNOTS))
        samples = list(plain)
        until = self.budget.spent + COST_SHARE * self.request.budget
        for number, probe in enumerate(probes):
            measured = self._probed(probe, usable, until, costs)
            samples += [(replay.passes, ms) for replay, ms in measured]
            self._progress("the cost of a pass", (number + 1) / len(probes), "", self.budget.left)
        costs.times = fitted(samples, KNOTS)
        return costs

    def measure_drafters(self, recorded: Sequence[Recorded], tried: Sequence[Candidate], costs: Costs) -> None:
        """Guesses of the drafters along the recorded answers, and what a draft token of each costs on the server."""
        usable = [one for one in recorded if one.replayable is not None]
        answers = [_replayable(one) for one in usable]
        until = self.budget.spent + REPLAY_SHARE * self.request.budget
        for file in dict.fromkeys(one.drafts.file for one in tried if one.drafts is not None and not one.rules):
            try:
                guesses = guesses_of(Path(file), answers, lambda: self.budget.spent < until)
            except (UsageError, EngineError) as error:
                self.note(f"{Path(file).name} is tried without a prediction: {error}")
                continue
            if guesses is None:
                self.note(f"{Path(file).name} is tried without a prediction")
                continue
            costs.guesses[file] = guesses
            probe = next(one for one in tried if one.drafts is not None and one.drafts.file == file and _is_usual(one))
            measured = self._probed(probe, usable, until + 2 * self.servers.start_s, costs)
            if measured:
                costs.token_ms[file] = drafter_token_ms(measured, costs.times)

    def predict(
        self, recorded: Sequence[Recorded], tried: Sequence[Candidate], costs: Costs | None
    ) -> dict[str, Predicted]:
        """By name, the candidates whose drafts are known; those that there was time for."""
        found: dict[str, Predicted] = {}
        if costs is None:
            return found
        answers = [_replayable(one) for one in recorded if one.replayable is not None]
        until = self.budget.spent + REPLAY_SHARE * self.request.budget
        for number, candidate in enumerate(tried):
            if self.budget.spent > until:
                self.note(f"there was time to replay {number} of {len(tried)} candidates; raise --budget to try all")
                break
            one = predicted(
                candidate,
                answers,
                costs.times,
                level=self.request.level,
                guesses=costs.guesses,
                token_ms=costs.token_ms,
            )
            if one is not None:
                found[candidate.name] = one
            if number % 16 == 0:
                self._progress("replaying", number / len(tried), "", self.budget.left)
        return found

    def race(self, racers: Sequence[Racer], groups: Sequence[Sequence[AskedQuestion]], reserve: float) -> None:
        """Run racers beside plain decoding until the outcome is clear, leaving `reserve` seconds."""

        def best(found: Sequence[Racer]) -> None:
            known = [(one.speedup.median, one.candidate.name) for one in found if one.speedup is not None]
            text = f"{max(known)[1]} {max(known)[0]:.2f}" if known else ""
            self._progress("live", 1 - max(0.0, self.budget.left) / self.request.budget, text, self.budget.left)

        self._restore(racers, groups)
        self._new_race(groups, reserve, best).run(racers)

    def measure_aside(
        self, racer: Racer, groups: Sequence[Sequence[AskedQuestion]], reserve: float
    ) -> None:
        """Measure one racer once over the groups, as far as the time goes."""
        self._restore([racer], groups)
        if racer.running and racer.groups < len(groups):
            self._new_race(groups, reserve, lambda found: None).measure(racer, groups[racer.groups :])

    def racers(
        self, tried: Sequence[Candidate], predictions: Mapping[str, Predicted], group_s: float, reserve: float
    ) -> list[Racer]:
        """The best candidate of each family, the most promising first; as many as a first round has time for."""
        best: dict[str, tuple[float, Candidate]] = {}
        for candidate in tried:
            known = predictions.get(candidate.name)
            value = known.speedup if known is not None else UNPREDICTED - (0.0 if _is_usual(candidate) else 0.01)
            if candidate.family not in best or value > best[candidate.family][0]:
                best[candidate.family] = (value, candidate)
        ranked = sorted(best.values(), key=lambda one: -one[0])
        hopeful = [one for one in ranked if one[0] >= HOPELESS] or ranked[:2]
        first_round = self.plain_start_s + 5 * group_s
        most = int(RACE_START * (self.budget.left - reserve) / first_round) if first_round > 0 else MOST_RACERS
        return [
            Racer(candidate, predictions[candidate.name].speedup if candidate.name in predictions else None)
            for _, candidate in hopeful[: min(MOST_RACERS, max(2, most))]
        ]

    def _new_race(
        self,
        groups: Sequence[Sequence[AskedQuestion]],
        reserve: float,
        progress: Callable[[Sequence[Racer]], object],
    ) -> Race:
        return Race(
            self.servers,
            groups,
            left=lambda: self.budget.left - reserve,
            start_s=self.plain_start_s,
            group_s=0.0,
            store=self._store,
            failed=self._failed,
            progress=progress,
        )

    def _turns(self) -> Iterator[tuple[str, str, str, tuple[str, ...]]]:
        """Key, category, prompt and the turns so far of each question: categories take turns, a conversation does not."""
        by_category: dict[str, list[Any]] = {}
        for prompt in self.request.prompts:
            by_category.setdefault(prompt.category, []).append(prompt)
        for place in range(max(map(len, by_category.values()))):
            for category, prompts in by_category.items():
                if place < len(prompts):
                    prompt = prompts[place]
                    for turn in range(len(prompt.turns)):
                        yield f"{prompt.id}/{turn}", category, prompt.id, prompt.turns[: turn + 1]

    def _record(self, one: AskedQuestion) -> Recorded:
        try:
            (reply,) = asked(self.servers.plain(), [one.question])
        except SubjectError as error:
            raise SpecplugError(f"plain decoding cannot be measured: {error}") from None
        entry = {
            "key": one.key,
            "text": reply.text,
            "tokens": reply.tokens,
            "ms": round(reply.decode_ms, 3),
            "first_ms": round(reply.first_ms, 3),
            "gaps_ms": [round(gap, 2) for gap in reply.gaps_ms],
            "prompt_ids": None if reply.prompt_ids is None else list(reply.prompt_ids),
            "ids": None if reply.ids is None else list(reply.ids),
            "finish": reply.finish,
        }
        self.journal.add("answer", **entry, spent=self.budget.spent)
        return _from_entry(one, entry, self.request.max_tokens)

    def _probed(
        self, probe: Candidate, usable: Sequence[Recorded], until: float, costs: Costs
    ) -> list[tuple[Replayed, float]]:
        """Replays and milliseconds of a few live answers of a candidate, the longest ones; empty where it fails."""
        longest = sorted(usable, key=lambda one: -one.timed.tokens)[:COST_ANSWERS]
        guesses = {
            file: [known[usable.index(one)] for one in longest] for file, known in costs.guesses.items()
        }
        replays = replay_of(probe, [_replayable(one) for one in longest], guesses)
        if replays is None:
            return []
        kept = {(entry["name"], entry["key"]): entry for entry in self.journal.of("cost")}
        entries = [kept[probe.name, one.asked.key] for one in longest if (probe.name, one.asked.key) in kept]
        if len(entries) < len(longest):
            if self.budget.spent + self.servers.start_s > until:
                return []
            try:
                with self.servers.other(probe) as subject:
                    entries = [self._cost(probe, one, *asked(subject, [one.asked.question])) for one in longest]
            except SubjectError as error:
                self.note(f"{probe.name} failed: {error}")
                return []
        counted = [(entry["drafted"], entry["accepted"]) for entry in entries if entry["drafted"] is not None]
        if len(counted) == len(longest):
            server = (sum(one for one, _ in counted), sum(one for _, one in counted))
            replay = (sum(one.drafted for one in replays), sum(one.accepted for one in replays))
            costs.agreements.append(Agreement(probe.name, server, replay))
        return [
            (replay, entry["ms"])
            for replay, entry, one in zip(replays, entries, longest, strict=True)
            if entry["text"] == one.text  # another text had other passes
        ]

    def _cost(self, probe: Candidate, one: Recorded, reply: Reply) -> dict[str, Any]:
        entry = {
            "name": probe.name,
            "key": one.asked.key,
            "text": reply.text,
            "ms": round(reply.decode_ms, 3),
            "drafted": reply.draft_tokens,
            "accepted": reply.accepted_tokens,
        }
        self.journal.add("cost", **entry, spent=self.budget.spent)
        return entry

    def _store(
        self, racer: Racer, group: Sequence[AskedQuestion], own: Sequence[Timed], plain: Sequence[Timed]
    ) -> None:
        self.journal.add(
            "pair",
            name=racer.candidate.name,
            keys=[one.key for one in group],
            own=[_packed(one) for one in own],
            plain=[_packed(one) for one in plain],
            spent=self.budget.spent,
        )

    def _failed(self, racer: Racer) -> None:
        self.journal.add("failed", name=racer.candidate.name, why=racer.failure, spent=self.budget.spent)
        self.note(f"{racer.candidate.name} failed: {racer.failure}")

    def _restore(self, racers: Sequence[Racer], groups: Sequence[Sequence[AskedQuestion]]) -> None:
        """Add what an interrupted tune measured of these groups."""
        by_keys = {tuple(one.key for one in group): group for group in groups}
        by_name = {racer.candidate.name: racer for racer in racers}
        for entry in self.journal.entries:
            racer = by_name.get(entry.get("name", ""))
            if racer is None or racer.groups >= len(self.journal.entries):
                continue
            if entry["kind"] == "failed":
                racer.failure = entry["why"]
            elif entry["kind"] == "pair" and (group := by_keys.get(tuple(entry["keys"]))) is not None:
                racer.add(group, *([Timed(*one) for one in entry[side]] for side in ("own", "plain")))


def grouped_questions(recorded: Sequence[Recorded], size: int) -> list[list[AskedQuestion]]:
    """Questions that are asked at once: `size` of them, as often as they suffice."""
    questions = [one.asked for one in recorded]
    return [questions[at : at + size] for at in range(0, len(questions) - size + 1, size)]


def _from_entry(one: AskedQuestion, entry: Mapping[str, Any], max_tokens: int) -> Recorded:
    reply = Reply(
        entry["text"],
        entry["tokens"],
        entry["first_ms"],
        entry["ms"],
        entry["ms"],
        tuple(entry["gaps_ms"]),
        finish=entry["finish"],
    )
    replayable = None
    if entry["prompt_ids"] is not None and entry["ids"] is not None:
        untold = max(0, entry["tokens"] - len(entry["ids"]))
        answer = (*entry["ids"], *[UNKNOWN] * untold)
        replayable = RecordedAnswer(tuple(entry["prompt_ids"]), answer, max_tokens, entry["finish"] == "stop")
    return Recorded(one, entry["text"], timed(reply), replayable)


def _replayable(one: Recorded) -> RecordedAnswer:
    assert one.replayable is not None
    return one.replayable


def _packed(one: Timed) -> list[Any]:
    gaps = [round(gap, 2) for gap in one.gaps_ms]
    return [one.tokens, round(one.ms, 3), round(one.first_ms, 3), gaps, one.drafted, one.accepted]


def _is_usual(candidate: Candidate) -> bool:
    """Whether it is the one to try of a family that cannot be replayed: three tokens looked up, few drafted."""
    if candidate.drafts is not None:
        return candidate.drafts.length == 3 and not candidate.drafts.least_probability
    if candidate.rules:
        return candidate.rules[0].sizes[:2] in ((3, 8), (3, 2), (3, 1)) or candidate.rules[0].sizes in ((), (3, 2, 4))
    return ", 2 drafted" in candidate.name or ", 3 drafted" in candidate.name
