"""Compares servers with each other, and with specplug's own engines: one interleaved run, one document.

It starts the servers and stops them. The first one is what all others are compared with, by their texts and their
speed. The module does not depend on a terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import PurePath
from typing import Any

import numpy as np

from specplug import __version__
from specplug.bench.arms import TimedArm
from specplug.bench.compare import open_stage, workload_document
from specplug.bench.interleaved import Outcome, Tally, run_arms
from specplug.bench.subject_arms import Conversation, EngineArm, SubjectArm
from specplug.bench.workloads import Prompt, categories
from specplug.generation.answers import Sampling
from specplug.machine import hardware
from specplug.profile import Profile
from specplug.subjects.subject import Abilities, Subject, SubjectError

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
    that are not asked sleep. One that fails keeps the figures of its earlier answers, with the reason; the others go
    on.

    subjects                     at least one, not started yet
    profiles, reference_engines  of specplug's own engines, as in `compare`; none where `profiles` is empty
    """
    with ExitStack() as stack:
        servers: list[SubjectArm] = []
        abilities: list[Abilities | None] = []
        for subject in subjects:
            notify(f"starting {subject.name}")
            stack.callback(subject.stop)
            found, failure = _started(subject)
            servers.append(SubjectArm(subject, failure))
            abilities.append(found)
        arms: list[TimedArm[Conversation, str]] = [*servers]
        about: dict[str, Any] = {}
        if profiles:
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
            lambda prompt, base, text: False,  # no server tells all its logits
            max_tokens=max_tokens,
            repeats=repeats,
            concurrency=concurrency,
            progress=progress,
        )
    names = [arm.name for arm in arms]
    known = [one for one in abilities if one is not None]
    return {
        "schema": 1,
        "model": about.get("model") or (known[0].model if known else ""),
        "engine": "server",
        "hardware": about.get("hardware") or hardware.fingerprint(),
        "versions": about.get("versions") or {"specplug": __version__},
        "workload": workload_document(workload, prompts, max_tokens, 0.0, repeats, concurrency),
        "cost_curve": about.get("cost_curve"),
        "engine_settings": None,
        "arms": [_arm(arm, names[0], index, outcome, categories(prompts)) for index, arm in enumerate(arms)],
        "servers": [_server(one) for one in abilities],
        "other_models": _other_models(names, abilities),
    }


def names_apart(commands: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """A name for each server, given its own one and its command; an address has no words.

    Servers with the same name also get the words that not all of their commands have. Those that are still equal are
    numbered.
    """
    names = []
    for name, words in commands:
        alike = [other for same, other in commands if same == name]
        own = [word for word in words if not all(word in other for other in alike)]
        full = " ".join([name, *own])
        names.append(full if len(full) <= NAME_LENGTH else f"{full[: NAME_LENGTH - 3]}...")
    numbers = [names[: index + 1].count(name) for index, name in enumerate(names)]
    return [name if number == 1 else f"{name} ({number})" for name, number in zip(names, numbers, strict=True)]


def _started(subject: Subject) -> tuple[Abilities | None, str | None]:
    """What it can do, asleep; or why it did not start."""
    try:
        subject.start()
        found = subject.abilities
        subject.sleep()
    except SubjectError as error:
        return None, str(error)
    return found, None


def _arm(
    arm: TimedArm[Conversation, str], base: str, index: int, outcome: Outcome, kinds: Sequence[str]
) -> dict[str, Any]:
    """One row of the document, with the keys of an arm of `compare`'s, and those of a server."""
    replies = arm.replies if isinstance(arm, SubjectArm) else []
    figures = outcome.overall[index].figures()
    if replies:
        figures["overhead_us_per_step"] = None  # which is the server's own affair
    return {
        "name": arm.name,
        "profile": arm.profile,
        "engine_settings": None,
        "reference": base,
        **figures,
        "first_ms": _percentiles([reply.first_ms for reply in replies]),
        "between_ms": _percentiles([gap for reply in replies for gap in reply.gaps_ms]),
        "failure": outcome.failures.get(index),
        "categories": {kind: outcome.categories[index].get(kind, Tally()).figures() for kind in kinds},
    }


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    p50, p95 = np.percentile(values, [50, 95])
    return {"p50": round(float(p50), 3), "p95": round(float(p95), 3)}


def _server(found: Abilities | None) -> dict[str, Any] | None:
    """What the server says of itself; None where it did not start."""
    if found is None:
        return None
    return {
        "kind": found.kind,
        "version": found.version,
        "model": found.model,
        "slots": found.slots,
        "context": found.context,
    }


def _other_models(names: Sequence[str], abilities: Sequence[Abilities | None]) -> list[str]:
    """Sentences on servers whose model has another name than the first one's: other texts are then no fault."""
    first = abilities[0]
    if first is None or not first.model:
        return []
    return [
        f"{name} serves {found.model}, and {names[0]} {first.model}: their texts and tokens may differ for that reason"
        for name, found in zip(names, abilities, strict=False)
        if found is not None and found.model and _plain_name(found.model) != _plain_name(first.model)
    ]


def _plain_name(model: str) -> str:
    """A model's name without its folder, its owner and the end of its file name."""
    return PurePath(model.rstrip("/")).name.lower().removesuffix(".gguf")
