"""Finding out what a running server is and can do, by its own descriptions and by one short answer.

What a server does not report is left unknown. Sources: tools/server/README.md of github.com/ggml-org/llama.cpp,
vllm/entrypoints, docs/api.md of github.com/ollama/ollama, lmstudio.ai/docs/api/rest-api.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from specplug.errors import UsageError
from specplug.subjects.asking import hear_chat
from specplug.subjects.connection import Connection, Json
from specplug.subjects.heard import Extras, Heard
from specplug.subjects.llama_server import Completions
from specplug.subjects.server_text import one_line
from specplug.subjects.subject import Abilities, Question, SubjectError
from specplug.subjects.vllm_server import spec_counts

GREETING = [{"role": "user", "content": "Say hello."}]
"""The conversation of the short answer. It also has the server read its model before anything is timed."""

SHORT = 2
"""Tokens of that answer."""

MOST_NAMED = 5
"""Models that a message names at most."""


@dataclass(frozen=True, slots=True)
class Found:
    """Abilities, what each answer has beside its text, and whether llama-server's own interface can be used."""

    abilities: Abilities
    extras: Extras
    completions: bool = False


def find_abilities(connection: Connection, name: str, model: str | None = None) -> Found:
    """Ask a running server. SubjectError where it does not answer a chat.

    name   what messages call it
    model  that requests shall name; the server's first one where None
    """
    described = _described(connection, name, model)
    completions = Completions(connection, name, described.extras)
    if described.completions and not _has_template(completions):
        described = replace(described, completions=False)  # a build before 2025, or a fork

    def answered(top: int) -> Heard:
        question = Question(GREETING, SHORT, top=top)
        if described.completions:
            return completions.hear(question)
        return hear_chat(connection, name, described.abilities.model, question, described.extras)

    try:
        heard = answered(top=1)
    except SubjectError:
        heard = answered(top=0)  # of a server that refuses to report log probabilities
    return _with_answer(described, heard)


def _described(connection: Connection, name: str, model: str | None) -> Found:
    """What the server says of itself, before any answer."""
    listed = connection.get("/v1/models")
    entry = _entry([one for one in _list(listed, "data") if isinstance(one, dict)], name, model)
    model = model or _field(entry, "id")
    owner = entry.get("owned_by", "")
    props = connection.get("/props")
    if isinstance(props, dict) and "default_generation_settings" in props:
        return _llama_server(connection, props, model)
    if owner == "vllm":
        version = _field(connection.get("/version"), "version")
        abilities = Abilities("vllm", version, model, context=_whole(entry.get("max_model_len")), token_ids=True)
        counted = spec_counts(connection.text("/metrics") or "") is not None
        return Found(replace(abilities, counters=counted), Extras(ids=True))
    local = connection.get("/api/v0/models")
    if isinstance(local, dict):
        loaded: Json = next((one for one in _list(local, "data") if _field(one, "id") == model), {})
        context = _whole(loaded.get("loaded_context_length")) or _whole(loaded.get("max_context_length"))
        return Found(Abilities("lm-studio", model=model, context=context), Extras())
    if version := _field(connection.get("/api/version"), "version"):
        return Found(Abilities("ollama", version, model), Extras())
    if not model:
        raise SubjectError(f"{name}: /v1/models lists no model; is this the address of an OpenAI server, without /v1?")
    return Found(Abilities("openai", model=model), Extras())


def _entry(entries: Sequence[Json], name: str, model: str | None) -> Json:
    """The entry of /v1/models that describes the model of the requests; empty where the server lists none."""
    ids = [_field(one, "id") for one in entries]
    listed = ", ".join(ids[:MOST_NAMED]) + (" and others" if len(ids) > MOST_NAMED else "")
    if model is not None and ids and model not in ids:
        raise UsageError(f"{name} has no model {model}; it lists {listed}")
    if model is None and len(ids) > 1 and entries[0].get("owned_by") != "vllm":  # the others are its LoRA adapters
        raise UsageError(f"{name} has {len(ids)} models ({listed}); name one with --model")
    return next((one for one in entries if _field(one, "id") == model), entries[0] if entries else {})


def _llama_server(connection: Connection, props: Json, model: str) -> Found:
    version = _field(props, "build_info")
    settings = props.get("default_generation_settings")
    context = _whole(settings.get("n_ctx")) if isinstance(settings, dict) else None
    slots = _whole(props.get("total_slots"))
    if slots is None:
        states = connection.get("/slots")
        slots = len(states) if isinstance(states, list) else None
    if version.startswith("specplug-"):
        return Found(
            Abilities("specplug", version.removeprefix("specplug-"), model, slots, context, per_request=True),
            Extras(switching=True),
        )
    return Found(Abilities("llama-server", version, model, slots, context), Extras(), completions=True)


def _has_template(completions: Completions) -> bool:
    try:
        return bool(completions.prompt(GREETING))
    except SubjectError:
        return False


def _with_answer(described: Found, heard: Heard) -> Found:
    """What the short answer had. It is a streamed one, since some servers leave out the usage of those alone."""
    abilities, extras = described.abilities, described.extras
    timings, ids = heard.timings is not None, bool(heard.ids)
    return replace(
        described,
        abilities=replace(
            abilities,
            token_ids=ids,
            timings=timings,
            counters=abilities.counters or timings,
            logprobs=any(heard.top),
        ),
        extras=replace(extras, usage=heard.tokens is not None, timings=timings, ids=ids and not described.completions),
    )


def _list(body: object, key: str) -> list[Any]:
    found = body.get(key) if isinstance(body, dict) else None
    return found if isinstance(found, list) else []


def _field(body: object, key: str) -> str:
    """A text, empty where there is none."""
    found = body.get(key) if isinstance(body, dict) else None
    return one_line(found) if isinstance(found, str) else ""


def _whole(number: object) -> int | None:
    return number if isinstance(number, int) and number > 0 else None
