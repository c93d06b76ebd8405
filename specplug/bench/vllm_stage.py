"""The arms of a comparison on vLLM: an engine for each, in a process of its own, all open at once.

Knows the engine. Knows no workload and no document beyond its head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from specplug.bench.arms import Result, plain
from specplug.bench.compare import Stage
from specplug.core import IntArray
from specplug.engines.vllm.configure import write_profile
from specplug.engines.vllm.offline import Vllm, open_vllm
from specplug.engines.vllm.rounding import explain
from specplug.engines.vllm.switch import SWITCH
from specplug.errors import UsageError
from specplug.generation.answers import Request, Sampling
from specplug.machine import fingerprint, hardware
from specplug.profile import Profile, VllmSettings


class VllmArm:
    """A profile on vLLM.

    The seconds of an answer are those that its own request took, over as many as there were at once; the wait for the
    longest of a group is nobody's.
    """

    def __init__(self, name: str, engine: Vllm, sampling: Sampling) -> None:
        self.name = self.profile = name
        self.engine = engine
        self._sampling = sampling

    def answer(self, prompts: Sequence[IntArray], max_tokens: int) -> list[Result]:
        requests = [Request(prompt, max_tokens, self._sampling) for prompt in prompts]
        answers, per_token = self.engine.generate_all(requests)
        usual = median([seconds for seconds in per_token if seconds] or [0.0])  # of answers that came with their prompt
        return [
            Result(a.tokens, (seconds or usual) * (len(a.tokens) - 1) / len(answers), a.counters)
            for a, seconds in zip(answers, per_token, strict=True)
        ]

    def reset(self) -> None:
        self.engine.llm.reset_prefix_cache()

    def close(self) -> None:
        """The engine is closed by whoever opened it."""


class SwitchedArm(VllmArm):
    """A profile on an engine that may draft with others in turn. What it learned stays until a reset."""

    def __init__(self, name: str, engine: Vllm, ref: str, sampling: Sampling) -> None:
        """`ref`: the profile's file. The engine was opened with SWITCH."""
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


@contextmanager
def vllm_stage(
    profiles: Sequence[Profile],
    peers: Sequence[str],
    sampling: Sampling,
    concurrency: int,
    notify: Callable[[str], None],
) -> Iterator[Stage]:
    """Everything opened, and closed at the end. Plain decoding is vLLM as it is by default."""
    first = profiles[0]
    if first.model is None:
        raise UsageError(f"profile {first.name}: no model; name one with --model")
    shared = replace(first.vllm, max_num_seqs=max(concurrency, first.vllm.max_num_seqs or 0))
    drafting = [replace(p, vllm=as_first(p.vllm, shared)) for p in profiles if p.speculates]
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
        plainly = arms[0].engine

        def is_rounding(prompt: IntArray, one: list[int], other: list[int]) -> bool:
            found = explain(plainly, prompt, one, other) if sampling.temperature <= 0 else None
            return found is not None and found.is_rounding

        measured = next((arm.engine.profile.measured for arm in arms if arm.engine.profile.measured), None)
        yield Stage(
            arms,
            plainly.chat_prompt,
            plainly.text,
            is_rounding,
            {
                "model": f"{first.model} ({plainly.description})",
                "engine": "vllm",
                "hardware": hardware.fingerprint() | {"threads": None},
                "versions": fingerprint.versions("vllm"),
                "cost_curve": {"by_sequences": [asdict(curve) for curve in measured.batch_curves] if measured else []},
            },
        )


def is_ours(profile: Profile) -> bool:
    """Whether it drafts with our proposers, inside vLLM: it is neither plain nor names a drafter of vLLM's own."""
    return profile.speculates and all(spec.method != "builtin" for spec in profile.proposers)


def as_first(own: VllmSettings, shared: VllmSettings) -> VllmSettings:
    """The shared settings of the engine, the profile's own of its drafts."""
    return replace(shared, num_speculative_tokens=own.num_speculative_tokens, uniform=own.uniform)
