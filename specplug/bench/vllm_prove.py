"""Checks on vLLM that a profile's output equals plain decoding's, under greedy sampling settings.

Sampled text is not compared: vLLM draws other random numbers when it verifies drafts, so that only the distribution is
the same. The module does not depend on a terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from specplug.bench.arms import plain
from specplug.bench.prove import GREEDY, SETTINGS, STOP, Verdicts, as_verified, check_settings
from specplug.bench.workloads import Prompt
from specplug.engines.vllm.offline import open_vllm
from specplug.engines.vllm.rounding import explain
from specplug.errors import UsageError
from specplug.generation.answers import Request, Sampling
from specplug.profile import Profile


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
    check_settings(settings, GREEDY)
    if profile.model is None:
        raise UsageError(f"profile {profile.name}: no model; name one with --model")
    tried = as_verified(profile, as_is)
    verdicts = Verdicts(settings)
    with (
        open_vllm(profile.model, plain(profile), notify=notify, engines=2) as plain_engine,
        open_vllm(profile.model, tried, notify=notify, engines=2) as drafting_engine,
    ):
        for name in settings:
            sampling, stop = Sampling(**SETTINGS[name]), STOP if name == "stop" else ()
            tokens = [plain_engine.chat_prompt([{"role": "user", "content": prompt.turns[0]}]) for prompt in prompts]
            requests = [Request(baseline, max_tokens, sampling, stop) for baseline in tokens]
            pairs = [engine.generate_all(requests)[0] for engine in (plain_engine, drafting_engine)]
            for prompt, prompt_tokens, baseline, drafted in zip(prompts, tokens, *pairs, strict=True):
                progress(name, 1)
                # The rounding rule covers plain greedy decoding only.
                applies = SETTINGS[name] == {}
                mismatch = explain(plain_engine, prompt_tokens, baseline.tokens, drafted.tokens) if applies else None
                verdicts.add(name, prompt.id, baseline, drafted, mismatch, lambda token: plain_engine.text([token]))
        description = plain_engine.description
    return verdicts.document(
        profile,
        model=f"{profile.model} ({description})",
        planner=tried.planner.mode,
        padded=False,
        kv_type=profile.vllm.dtype,
        max_tokens=max_tokens,
    )
