"""Opens the arms of a comparison on vLLM: one engine per arm, each in a separate process, all open at once.

The module does not depend on workloads, and writes only the head of the document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from specplug.bench.arms import Result, plain
from specplug.bench.stage import Stage
from specplug.core import IntArray
from specplug.engines.vllm.configure import write_profile
from specplug.engines.vllm.offline import Vllm, open_vllm
from specplug.engines.vllm.rounding import explain
from specplug.engines.vllm.switch import SWITCH
from specplug.engines.vllm.v2.scheduled_lengths import use_lengths
from specplug.errors import UsageError
from specplug.generation.answers import Request, Sampling
from specplug.machine import fingerprint, hardware
from specplug.profile import Profile, VllmSettings


class VllmArm:
    """A profile on vLLM.

    The seconds of an answer are those of its own request, divided by the number of requests at once. The time in which
    a finished request waits for the longest one of its group counts for no answer.
    """

    def __init__(self, name: str, engine: Vllm, sampling: Sampling) -> None:
        self.name = self.profile = name
        self.engine = engine
        self._sampling = sampling

    def answer(self, prompts: Sequence[IntArray], max_tokens: int) -> list[Result]:
        requests = [Request(prompt, max_tokens, self._sampling) for prompt in prompts]
        answers, per_token = self.engine.generate_all(requests)
        # A request without tokens after the prefill has no time per token, and gets the median of the others.
        typical = median([seconds for seconds in per_token if seconds] or [0.0])
        return [
            Result(a.tokens, (seconds or typical) * (len(a.tokens) - 1) / len(answers), a.counters)
            for a, seconds in zip(answers, per_token, strict=True)
        ]

    def reset(self) -> None:
        self.engine.llm.reset_prefix_cache()

    def close(self) -> None:
        """Nothing to do: the caller that opened the engine closes it."""


class SwitchedArm(VllmArm):
    """A profile on an engine that several profiles share in turn. What it has learned is kept until a reset."""

    def __init__(self, name: str, engine: Vllm, ref: str, sampling: Sampling) -> None:
        """`ref`: the path of the profile's file. The engine must have been opened with SWITCH."""
        super().__init__(name, engine, sampling)
        self._ref = ref
        self._fresh = True

    def answer(self, prompts: Sequence[IntArray], max_tokens: int) -> list[Result]:
        self.engine.llm.collective_rpc("specplug_use", args=(self._ref, self._fresh))
        self._fresh = False
        return super().answer(prompts, max_tokens)

    def reset(self) -> None:
        super().reset()
        self._fresh = True


class ScheduledArm(SwitchedArm):
    """A profile on an engine of the V2 runner that profiles share in turn, with its own table of draft tokens."""

    def __init__(
        self, name: str, engine: Vllm, ref: str, sampling: Sampling, *, lengths: Sequence[tuple[int, int, int]]
    ) -> None:
        """lengths  as `tokens_per_batch_size` of a profile; none leaves the number to vLLM's adaptive verification"""
        super().__init__(name, engine, ref, sampling)
        self._lengths = lengths

    def answer(self, prompts: Sequence[IntArray], max_tokens: int) -> list[Result]:
        if self._lengths:
            use_lengths(self.engine.llm, self._lengths)
        return super().answer(prompts, max_tokens)


@contextmanager
def vllm_stage(
    profiles: Sequence[Profile], sampling: Sampling, concurrency: int, notify: Callable[[str], None]
) -> Iterator[Stage]:
    """Open everything, and close it at the end. Plain decoding is vLLM with its default settings."""
    first = profiles[0]
    if first.model is None:
        raise UsageError(f"profile {first.name}: no model; name one with --model")
    shared = replace(first.vllm, max_num_seqs=max(concurrency, first.vllm.max_num_seqs or 0))
    drafting = [replace(p, vllm=with_shared_settings(p.vllm, shared)) for p in profiles if p.speculates]
    base = replace(plain(first), vllm=shared)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="specplug-bench-")))
        arms: list[VllmArm] = []
        for p in (base, *drafting):
            notify(f"starting vLLM for {p.name}")
            ours = is_ours(p)
            further = {"worker_extension_cls": SWITCH} if ours else {}
            engine = stack.enter_context(open_vllm(first.model, p, notify=notify, engines=1 + len(drafting), **further))
            if ours:
                arms.append(SwitchedArm(p.name, engine, write_profile(engine.profile, folder), sampling))
            else:
                arms.append(VllmArm(p.name, engine, sampling))
        plain_engine = arms[0].engine

        def is_rounding(prompt: IntArray, plain: list[int], other: list[int]) -> bool:
            mismatch = explain(plain_engine, prompt, plain, other) if sampling.temperature <= 0 else None
            return mismatch is not None and mismatch.is_rounding

        measured = next((arm.engine.profile.measured for arm in arms if arm.engine.profile.measured), None)
        yield Stage(
            arms,
            plain_engine.chat_prompt,
            plain_engine.text,
            is_rounding,
            {
                "model": f"{first.model} ({plain_engine.description})",
                "engine": "vllm",
                "hardware": hardware.fingerprint() | {"threads": None},
                "versions": fingerprint.versions("vllm"),
                "cost_curve": {"by_sequences": [asdict(curve) for curve in measured.batch_curves] if measured else []},
            },
        )


def is_ours(profile: Profile) -> bool:
    """Whether the profile drafts with specplug's proposers inside vLLM: it is neither plain nor a built-in method."""
    return profile.speculates and all(spec.method != "builtin" for spec in profile.proposers)


def with_shared_settings(own: VllmSettings, shared: VllmSettings) -> VllmSettings:
    """The engine settings that all arms share, with the profile's own settings for drafts."""
    return replace(
        shared,
        num_speculative_tokens=own.num_speculative_tokens,
        runner=own.runner,
        uniform=own.uniform,
        adaptive_verification=own.adaptive_verification,
        tokens_per_batch_size=own.tokens_per_batch_size,
    )
