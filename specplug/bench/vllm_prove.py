"""Proof on vLLM that a profile says what plain decoding says, answer by answer, under greedy sampling settings.

Knows the vLLM engine and its rounding rule. Knows no terminal. Sampled text is not compared: vLLM draws other random
numbers when it verifies drafts, so that only the distribution is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from specplug.bench.arms import plain
from specplug.bench.prove import SETTINGS, STOP, Difference
from specplug.bench.workloads import Prompt
from specplug.engines.vllm.offline import Vllm, open_vllm
from specplug.engines.vllm.rounding import explain
from specplug.errors import UsageError
from specplug.generation.answers import Answer, Request, Sampling
from specplug.profile import Profile

GREEDY = tuple(name for name, how in SETTINGS.items() if not how.get("temperature"))


def prove_vllm(
    profile: Profile,
    prompts: Sequence[Prompt],
    *,
    settings: Sequence[str],
    max_tokens: int,
    as_is: bool = False,
    notify: Callable[[str], None] = lambda text: None,
    progress: Callable[[str, int], None] = lambda what, steps: None,
) -> dict[str, Any]:
    """The document of `verify --json`; see `bench.prove.prove`. All prompts of a setting are answered at once."""
    unknown = [name for name in settings if name not in GREEDY]
    if unknown:
        why = "draws other random numbers with drafts" if unknown[0] in SETTINGS else "is no setting"
        raise UsageError(f"{unknown[0]!r} {why} in vLLM; there are {', '.join(GREEDY)}")
    if profile.model is None:
        raise UsageError(f"profile {profile.name}: no model; name one with --model")
    tried = profile if as_is else replace(profile, planner=replace(profile.planner, mode="static"))
    differences: list[Difference] = []
    sums = {}
    with (
        open_vllm(profile.model, plain(profile), notify=notify, engines=2) as plainly,
        open_vllm(profile.model, tried, notify=notify, engines=2) as speculating,
    ):
        for name in settings:
            line = {"answers": 0, "identical": 0, "rounding": 0, "different": 0, "accepted_tokens": 0}
            sums[name] = line
            sampling, stop = Sampling(**SETTINGS[name]), STOP if name == "stop" else ()
            tokens = [plainly.chat_prompt([{"role": "user", "content": prompt.turns[0]}]) for prompt in prompts]
            requests = [Request(one, max_tokens, sampling, stop) for one in tokens]
            pairs = [engine.generate_all(requests)[0] for engine in (plainly, speculating)]
            for prompt, read, one, other in zip(prompts, tokens, *pairs, strict=True):
                progress(name, 1)
                line["answers"] += 1
                line["accepted_tokens"] += other.counters.accepted_tokens
                found = _difference(plainly, name, prompt.id, read, one, other)
                line[found.verdict if found else "identical"] += 1
                if found:
                    differences.append(found)
        description = plainly.description
    return {
        "schema": 1,
        "model": f"{profile.model} ({description})",
        "profile": profile.name,
        "planner": tried.planner.mode,
        "exact": profile.exact,
        "padded": False,
        "kv_type": profile.vllm.dtype,
        "max_tokens": max_tokens,
        "settings": sums,
        "differences": [asdict(difference) for difference in differences],
        "same_output": not any(difference.verdict == "different" for difference in differences),
    }


def _difference(plain: Vllm, name: str, prompt: str, read: Any, one: Answer, other: Answer) -> Difference | None:
    if one.tokens == other.tokens and one.text == other.text:
        return None
    found = explain(plain, read, one.tokens, other.tokens) if SETTINGS[name] == {} else None
    if found is None:
        return Difference(name, prompt, -1, one.text, other.text, 0.0, 0.0, "different")
    a, b = ("" if token is None else plain.text([token]) for token in (found.plain_token, found.other_token))
    verdict = "rounding" if found.is_rounding else "different"
    return Difference(name, prompt, found.position, a, b, found.gap, found.shape_difference, verdict)
