"""Checks on llama.cpp that a profile's output equals plain decoding's, under several sampling settings.

Every answer is compared token by token; the engine's rounding rule explains differences. The module also builds the
document of `verify --json`, for vLLM too. It does not depend on a terminal.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from specplug.bench.arms import plain
from specplug.bench.workloads import Prompt
from specplug.errors import UsageError
from specplug.generation.answers import Answer, Request, Sampling
from specplug.profile import Profile
from specplug.verification.mismatch import Mismatch

GRAMMAR = 'root ::= sentence+\nsentence ::= [A-Z] [a-z ,]* ("." | "!" | "?") " "?\n'
"""Sentences of letters: a grammar that free text can follow for a long time."""

SCHEMA = json.dumps(
    {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {"sentence": {"type": "string", "maxLength": 80}, "words": {"type": "integer", "minimum": 1}},
            "required": ["sentence", "words"],
        },
        "minItems": 4,
    }
)
"""A list of objects: parts that are forced, in turn with text that is free."""

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.8},
    "penalties": {"repeat_penalty": 1.2, "frequency_penalty": 0.1, "presence_penalty": 0.1},
    "grammar": {"grammar": GRAMMAR},
    "sampled-grammar": {"temperature": 0.8, "grammar": GRAMMAR},
    "schema": {"json_schema": SCHEMA},
    "sampled-schema": {"temperature": 0.8, "json_schema": SCHEMA},
    "stop": {},
}
"""Sampling settings by name; `stop` adds the stop strings below to greedy decoding."""

GREEDY = tuple(name for name, how in SETTINGS.items() if not how.get("temperature"))
"""Names of the settings whose output vLLM can reproduce with drafts."""

STOP = (". ", "\n")


@dataclass(frozen=True, slots=True)
class Difference:
    """An answer that differs from plain decoding's, and why; see `Mismatch`.

    position     index of the first differing token; -1 where the rounding rule does not apply
    plain, other the text of the differing tokens; the complete answers where position is -1
    """

    setting: str
    prompt: str
    position: int
    plain: str
    other: str
    gap: float
    shape_difference: float
    verdict: str


class Verdicts:
    """Counts of identical and differing answers per setting, and the differences found."""

    def __init__(self, settings: Sequence[str]) -> None:
        counted = ("answers", "identical", "rounding", "different", "accepted_tokens")
        self._counts = {name: dict.fromkeys(counted, 0) for name in settings}
        self._differences: list[Difference] = []

    def add(
        self,
        setting: str,
        prompt_id: str,
        plain: Answer,
        other: Answer,
        mismatch: Mismatch | None,
        text: Callable[[int], str],
    ) -> None:
        """Count one answer.

        mismatch  the first difference of the tokens; None where they are equal or the rounding rule does not apply
        text      turns a token into text
        """
        counts = self._counts[setting]
        counts["answers"] += 1
        counts["accepted_tokens"] += other.counters.accepted_tokens
        if plain.tokens == other.tokens and plain.text == other.text:
            counts["identical"] += 1
            return
        verdict = "rounding" if mismatch is not None and mismatch.is_rounding else "different"
        counts[verdict] += 1
        if mismatch is None:
            difference = Difference(setting, prompt_id, -1, plain.text, other.text, 0.0, 0.0, verdict)
        else:
            a, b = ("" if t is None else text(t) for t in (mismatch.plain_token, mismatch.other_token))
            difference = Difference(
                setting, prompt_id, mismatch.position, a, b, mismatch.gap, mismatch.shape_difference, verdict
            )
        self._differences.append(difference)

    def document(
        self, profile: Profile, *, model: str, planner: str, padded: bool, kv_type: str, max_tokens: int
    ) -> dict[str, Any]:
        """The document of `verify --json`."""
        return {
            "schema": 1,
            "model": model,
            "profile": profile.name,
            "planner": planner,
            "exact": profile.exact,
            "padded": padded,
            "kv_type": kv_type,
            "max_tokens": max_tokens,
            "settings": self._counts,
            "differences": [asdict(difference) for difference in self._differences],
            "same_output": all(difference.verdict != "different" for difference in self._differences),
        }


def as_verified(profile: Profile, as_is: bool) -> Profile:
    """The profile with a planner that verifies every draft, unless `as_is` keeps its planner."""
    return profile if as_is else replace(profile, planner=replace(profile.planner, mode="static"))


def check_settings(names: Iterable[str], valid: Collection[str]) -> None:
    """UsageError for a setting that is unknown, or that cannot be compared on this engine."""
    for name in names:
        if name not in valid:
            why = (
                f"setting {name!r} cannot be compared on vLLM" if name in SETTINGS else f"no setting is named {name!r}"
            )
            raise UsageError(f"{why}; use some of {', '.join(valid)}")


def prove(
    model_path: Path,
    profile: Profile,
    prompts: Sequence[Prompt],
    *,
    settings: Sequence[str],
    max_tokens: int,
    seed: int = 0,
    as_is: bool = False,
    notify: Callable[[str], None] = lambda text: None,
    progress: Callable[[str, int], None] = lambda what, steps: None,
) -> dict[str, Any]:
    """The document of `verify --json`. The first turn of every prompt is answered under every setting.

    as_is  keep the profile's planner. Otherwise every draft is verified, whether it pays or not: a stricter test
    """
    check_settings(settings, SETTINGS)
    from specplug.engines.llama_cpp import require

    require()
    from specplug.engines.llama_cpp.drafters.head_finding import with_own_heads
    from specplug.engines.llama_cpp.drafters.opening import open_target
    from specplug.engines.llama_cpp.engine import LlamaCpp
    from specplug.engines.llama_cpp.rounding import explain
    from specplug.engines.llama_cpp.settings_choice import with_settings

    verdicts = Verdicts(settings)
    profile = with_own_heads(profile, model_path)
    with ExitStack() as stack:
        model = stack.enter_context(open_target(model_path, [profile], profile.runtime, notify))
        profile = with_settings(profile, model)
        tried = as_verified(profile, as_is)
        plain_engine = stack.enter_context(LlamaCpp(model, plain(profile)))
        drafting_engine = stack.enter_context(LlamaCpp(model, tried, notify=notify))
        for name in settings:
            sampling = Sampling(seed=seed, **SETTINGS[name])
            stop = STOP if name == "stop" else ()
            for prompt in prompts:
                tokens = model.chat_prompt([{"role": "user", "content": prompt.turns[0]}])
                request = Request(tokens, max_tokens, sampling, stop)
                for engine in (plain_engine, drafting_engine):
                    engine.loop.forget_prompts()
                baseline, drafted = plain_engine.generate(request), drafting_engine.generate(request)
                progress(name, 1)
                mismatch = explain(
                    model,
                    plain_engine.profile.runtime,
                    tokens,
                    baseline.tokens,
                    drafted.tokens,
                    sampling,
                    padded=plain_engine.padded,
                    shared_cache=False,
                )
                verdicts.add(
                    name,
                    prompt.id,
                    baseline,
                    drafted,
                    mismatch,
                    lambda token: model.piece(token).decode("utf-8", "replace"),
                )
        return verdicts.document(
            profile,
            model=f"{model_path.name} ({model.description})",
            planner=tried.planner.mode,
            padded=plain_engine.padded,
            kv_type=str(plain_engine.profile.runtime.kv_type),
            max_tokens=max_tokens,
        )
