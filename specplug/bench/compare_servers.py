"""Compares servers with each other, and with specplug's own engines: one interleaved run, one document.

It starts the servers and stops them. The first one is what all others are compared with, by their texts and their
speed. The module does not depend on a terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import zip_longest
from os.path import commonprefix
from pathlib import PurePath
from typing import Any

import numpy as np

from specplug import __version__
from specplug.bench.arms import TimedArm
from specplug.bench.compare import open_stage, workload_document
from specplug.bench.interleaved import Tally, run_arms
from specplug.bench.subject_arms import Conversation, EngineArm, SubjectArm, TextResult
from specplug.bench.workloads import Prompt, categories
from specplug.errors import UsageError
from specplug.generation.answers import Sampling
from specplug.machine import hardware
from specplug.profile import Profile
from specplug.profile.shown_command import without_keys
from specplug.subjects.clock_check import clock_difference
from specplug.subjects.launched import LaunchedServer
from specplug.subjects.server_memory import MOST_LIVE, fit_advice, fitted_flags
from specplug.subjects.subject import Abilities, Reply, Subject, SubjectError

NAME_LENGTH = 48
"""Characters of a server's name at most, so that tables stay readable."""


def compare_servers(
    subjects: Sequence[Subject],
    profiles: Sequence[Profile],
    reference_engines: Sequence[str],
    prompts: Sequence[Prompt],
    *,
    workload: str,
    max_tokens: int,
    repeats: int = 1,
    concurrency: int = 1,
    notify: Callable[[str], None] = lambda text: None,
    progress: Callable[[str, int], None] = lambda what, steps: None,
) -> dict[str, Any]:
    """The document of `bench --server --json`.

    Every prompt is answered by all before any receives the next one; of the servers that specplug has started, those
    that are not asked sleep. No more than MOST_LIVE of them run at once: further ones are measured in rounds of their
    own, with the first one again. One that fails keeps the figures of its earlier answers, with the reason; the others
    go on. A prompt that the first one refuses is left out for all; where that one has failed, one that all others
    refuse.

    subjects                     at least one, not started yet
    profiles, reference_engines  of specplug's own engines, as in `compare`; none where `profiles` is empty
    UsageError where the first server cannot be started as its command says.
    """
    rows: dict[int, _Row] = {}
    own_rows: list[_Row] = []
    about: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for number, indices in enumerate(rounds_of(subjects)):
        with ExitStack() as stack:
            lost = rows[0].failure if number else None
            arms: list[TimedArm[Conversation, str]] = []
            found: list[Abilities | None] = []
            for index in indices:
                subject = subjects[index]
                known, failure = None, lost if index == 0 else None
                if failure is None:
                    notify(f"starting {subject.name}")
                    stack.callback(subject.stop)
                    before = zip((subjects[one] for one in indices), found, strict=False)
                    beside = [one.name for one, runs in before if runs and isinstance(one, LaunchedServer)]
                    others = [subjects[one] for one in indices if one != index] if repeats > 1 else []
                    again = [one.name for one in others if isinstance(one, LaunchedServer)]  # it starts beside these
                    if notice := _fit_notice(subject, beside or again):
                        notify(notice)
                    known, failure = _started(subject, beside, further=number > 0 or index > 0)
                if known is not None and known.slots is not None and known.slots < concurrency:
                    notify(f"{subject.name} computes {known.slots} answer(s) at once, so of {concurrency} some wait")
                arms.append(SubjectArm(subject, failure))
                found.append(known)
            if profiles and not number:
                turns = [prompt.turns for prompt in prompts]
                own = stack.enter_context(
                    open_stage(profiles, reference_engines, Sampling(), concurrency, notify, turns, max_tokens)
                )
                arms += [EngineArm(arm, own.encode, own.decode) for arm in own.arms]
                about = dict(own.about)
            outcome = run_arms(
                arms,
                prompts,
                lambda messages: [dict(message) for message in messages],
                lambda text: text,
                lambda prompt, base, text: False,  # no server reports all its logits
                max_tokens=max_tokens,
                repeats=repeats,
                concurrency=concurrency,
                progress=progress,
            )
        for prompt, why in outcome.refused.items():
            if prompt not in refused:
                notify(f"prompt {prompt} is left out for all: {why}")
        refused |= outcome.refused
        replies = [
            [one.reply for one in answers if isinstance(one, TextResult) and one.reply is not None]
            for answers in outcome.answers
        ]
        for arm, own_replies in zip(arms, replies, strict=True):
            if difference := clock_difference(arm.name, own_replies):
                notify(difference)
        made = [
            _Row(arm, tally, kinds, own_replies, outcome.failures.get(place), known)
            for place, (arm, tally, kinds, own_replies, known) in enumerate(
                zip_longest(arms, outcome.overall, outcome.categories, replies, found)
            )
        ]
        rows = dict(zip(indices, made, strict=False)) | rows  # the first server keeps its first round
        own_rows += made[len(indices) :]
    ordered = [rows[index] for index in range(len(subjects))]
    first = ordered[0].abilities
    return {
        "schema": 1,
        "model": about.get("model") or (first.model if first else ""),
        "engine": "server",
        "hardware": about.get("hardware") or hardware.fingerprint(),
        "versions": about.get("versions") or {"specplug": __version__},
        "workload": workload_document(workload, prompts, max_tokens, 0.0, repeats, concurrency),
        "cost_curve": about.get("cost_curve"),
        "engine_settings": None,
        "arms": [row.document(ordered[0], categories(prompts)) for row in (*ordered, *own_rows)],
        "servers": [_server(subject, row.abilities) for subject, row in zip(subjects, ordered, strict=True)],
        "refused": refused,
        "other_models": _other_models(subjects, [row.abilities for row in ordered]),
    }


def rounds_of(subjects: Sequence[Subject]) -> list[list[int]]:
    """The subjects that are measured together, by their indices: the first one in every round, and one that specplug
    does not start in the first round."""
    launched = [index for index, one in enumerate(subjects) if isinstance(one, LaunchedServer) and index > 0]
    each = MOST_LIVE - isinstance(subjects[0], LaunchedServer)
    groups = [launched[at : at + each] for at in range(0, len(launched), each)] or [[]]
    others = [index for index in range(1, len(subjects)) if index not in launched]
    return [sorted([0, *(others if number == 0 else []), *group]) for number, group in enumerate(groups)]


def names_apart(commands: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """A name for each server, given its own one and its command; an address has no words.

    Servers with the same name also get the words that not all of their commands have. Of names that are too long, what
    those words have in common at their beginning is left out, and then the end. Those that are still equal are
    numbered. Keys are hidden.
    """
    commands = [(name, without_keys(words)) for name, words in commands]
    own = []
    for name, words in commands:
        alike = [other for same, other in commands if same == name]
        own.append(" ".join(word for word in words if not all(word in other for other in alike)))
    names = []
    for (name, _), words in zip(commands, own, strict=True):
        alike_own = [other for (same, _), other in zip(commands, own, strict=True) if same == name and other]
        common = commonprefix(alike_own) if len(alike_own) > 1 else ""  # noqa: RUF071  of texts, not of paths
        names.append(_shortened(name, words, common))
    numbers = [names[: index + 1].count(name) for index, name in enumerate(names)]
    return [name if number == 1 else f"{name} ({number})" for name, number in zip(names, numbers, strict=True)]


def _shortened(name: str, words: str, common: str) -> str:
    """Both in at most NAME_LENGTH characters. common: what the words of all servers of this name begin with."""
    full = f"{name} {words}".strip()
    if len(full) > NAME_LENGTH and (shared := max(common.rfind(" "), common.rfind("/")) + 1):
        full = f"{name} ...{words[shared:]}"
    return full if len(full) <= NAME_LENGTH else f"{full[: NAME_LENGTH - 3]}..."


@dataclass(frozen=True, slots=True)
class _Row:
    """What was measured of one arm.

    replies    of a server, those that the tally has; none of specplug's own engine
    abilities  of a server that has started
    """

    arm: TimedArm[Conversation, str]
    tally: Tally
    by_category: Mapping[str, Tally]
    replies: Sequence[Reply]
    failure: str | None
    abilities: Abilities | None

    @property
    def counted(self) -> bool:
        """Whether all its answers were measured in tokens, not in events."""
        return all(reply.counted for reply in self.replies)

    def document(self, base: _Row, kinds: Sequence[str]) -> dict[str, Any]:
        """The keys of an arm of `compare`'s, and those of a server. Events are not compared with tokens."""
        figures = self.tally.figures()
        by_category = {kind: self.by_category.get(kind, Tally()).figures() for kind in kinds}
        if isinstance(self.arm, SubjectArm):
            figures["overhead_us_per_step"] = None  # which is the server's own affair
        if self is not base and not (self.counted and base.counted):
            for one in (figures, *by_category.values()):
                one["speedup"] = None
        return {
            "name": self.arm.name,
            "profile": self.arm.profile,
            "engine_settings": None,
            "reference": base.arm.name,
            **figures,
            "counted": self.counted,
            "first_ms": _percentiles([1000 * seconds for seconds in self.tally.measured_prompts or ()]),
            "between_ms": _percentiles([gap for reply in self.replies for gap in reply.gaps_ms]),
            "failure": self.failure,
            "categories": by_category,
        }


def _started(subject: Subject, beside: Sequence[str], *, further: bool) -> tuple[Abilities | None, str | None]:
    """What it can do, asleep; or why it did not start.

    beside   names of the servers that were started before, and take memory, too
    further  whether another one is measured, too, so that wrong input must not end the run, either
    """
    try:
        subject.start()
        found = subject.abilities
        subject.sleep()
    except SubjectError as error:
        advice = f"; it does not start beside {beside[0]}: if it does alone, measure it alone" if beside else ""
        return None, f"{error}{advice}"
    except UsageError as error:
        if not further:
            raise
        return None, str(error)
    return found, None


def _fit_notice(subject: Subject, beside: Sequence[str]) -> str | None:
    """A sentence on a server that adapts its settings to the GPU memory that others leave; None for all others.

    beside  names of the servers beside which it starts
    """
    fitted = fitted_flags(subject.command) if beside and isinstance(subject, LaunchedServer) else []
    if not fitted:
        return None
    return (
        f"{subject.name} chooses {' and '.join(fitted)} by the GPU memory that {beside[0]} leaves (--fit), so it may "
        f"be slower than alone, or refuse longer prompts; {fit_advice(fitted)}"
    )


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    p50, p95 = np.percentile(values, [50, 95])
    return {"p50": round(float(p50), 3), "p95": round(float(p95), 3)}


def _server(subject: Subject, found: Abilities | None) -> dict[str, Any]:
    """The words of its command, without keys (None for an address), and what it says of itself: None where it did not
    start."""
    return {
        "command": without_keys(subject.command.argv) if isinstance(subject, LaunchedServer) else None,
        **{key: getattr(found, key, None) for key in ("kind", "version", "model", "slots", "context")},
    }


def _other_models(subjects: Sequence[Subject], abilities: Sequence[Abilities | None]) -> list[str]:
    """Sentences on servers whose model has another name than the first one's: other texts are then no fault."""
    names = [subject.name for subject in subjects]
    first = abilities[0]
    if first is None or not first.model:
        return []
    return [
        f"{name} serves {found.model}, and {names[0]} {first.model}: their texts and tokens may differ for that reason"
        for name, found in zip(names, abilities, strict=True)
        if found is not None and found.model and _plain_name(found.model) != _plain_name(first.model)
    ]


def _plain_name(model: str) -> str:
    """A model's name without its folder, its owner and the end of its file name."""
    return PurePath(model.rstrip("/")).name.lower().removesuffix(".gguf")
