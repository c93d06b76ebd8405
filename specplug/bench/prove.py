"""Proof that a profile says what plain decoding says, answer by answer, under several sampling settings.

Knows the llama.cpp engine and the rounding rule. Knows no terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from specplug.bench.arms import plain
from specplug.bench.workloads import Prompt
from specplug.errors import UsageError
from specplug.profile import Profile

GRAMMAR = 'root ::= sentence+\nsentence ::= [A-Z] [a-z ,]* ("." | "!" | "?") " "?\n'
"""Sentences of letters: a grammar that free text can follow for long."""

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.8},
    "penalties": {"repeat_penalty": 1.2, "frequency_penalty": 0.1, "presence_penalty": 0.1},
    "grammar": {"grammar": GRAMMAR},
    "sampled-grammar": {"temperature": 0.8, "grammar": GRAMMAR},
    "stop": {},
}
"""Sampling settings by name; `stop` adds the stop strings below to greedy decoding."""

STOP = (". ", "\n")


@dataclass(frozen=True, slots=True)
class Difference:
    """One answer that is not plain decoding's: where, by how much, and why."""

    setting: str
    prompt: str
    position: int
    plain: str
    other: str
    gap: float
    shape_difference: float
    verdict: str


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

    as_is  leaves the planner alone; otherwise every draft is verified, paying or not, which proves more
    """
    unknown = [name for name in settings if name not in SETTINGS]
    if unknown:
        raise UsageError(f"no setting is named {unknown[0]!r}; there are {', '.join(SETTINGS)}")
    from specplug.engines.llama_cpp import require

    require()
    from specplug.engines.llama_cpp.engine import LlamaCpp
    from specplug.engines.llama_cpp.model import open_model
    from specplug.engines.llama_cpp.rounding import explain
    from specplug.generation.answers import Request, Sampling

    tried = profile if as_is else replace(profile, planner=replace(profile.planner, mode="static"))
    base = plain(profile)
    differences: list[Difference] = []
    sums = {
        name: {"answers": 0, "identical": 0, "rounding": 0, "different": 0, "accepted_tokens": 0} for name in settings
    }
    with (
        open_model(model_path, gpu_layers=profile.runtime.gpu_layers) as model,
        LlamaCpp(model, base) as plainly,
        LlamaCpp(model, tried, notify=notify) as speculating,
    ):
        for name in settings:
            sampling = Sampling(seed=seed, **SETTINGS[name])
            stop = STOP if name == "stop" else ()
            for prompt in prompts:
                tokens = model.chat_prompt([{"role": "user", "content": prompt.turns[0]}])
                request = Request(tokens, max_tokens, sampling, stop)
                for engine in (plainly, speculating):
                    engine.loop.forget_prompts()
                one, other = plainly.generate(request), speculating.generate(request)
                progress(name, 1)
                line = sums[name]
                line["answers"] += 1
                line["accepted_tokens"] += other.counters.accepted_tokens
                found = explain(
                    model,
                    plainly.profile.runtime,
                    tokens,
                    one.tokens,
                    other.tokens,
                    sampling,
                    padded=plainly.padded,
                    holes=False,
                )
                if found is None and one.text == other.text:
                    line["identical"] += 1
                    continue
                verdict = "rounding" if found is not None and found.is_rounding else "different"
                line[verdict] += 1
                if found is None:
                    differences.append(Difference(name, prompt.id, -1, one.text, other.text, 0.0, 0.0, verdict))
                    continue
                a, b = (
                    "" if token is None else model.piece(token).decode("utf-8", "replace")
                    for token in (found.plain_token, found.other_token)
                )
                differences.append(
                    Difference(name, prompt.id, found.position, a, b, found.gap, found.shape_difference, verdict)
                )
        description, padded = model.description, plainly.padded
    return {
        "schema": 1,
        "model": f"{model_path.name} ({description})",
        "profile": profile.name,
        "planner": tried.planner.mode,
        "exact": profile.exact,
        "padded": padded,
        "kv_type": profile.runtime.kv_type,
        "max_tokens": max_tokens,
        "settings": sums,
        "differences": [asdict(difference) for difference in differences],
        "same_output": not any(difference.verdict == "different" for difference in differences),
    }
