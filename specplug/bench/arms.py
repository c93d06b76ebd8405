"""The arms of a comparison on llama.cpp: profiles on our engine, and reference engines that work without specplug.

Defines `TimedArm`, the interface of everything that is timed, and opens the arms of llama.cpp. It does not depend on
workloads or statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Protocol, TypeVar

from specplug.core import IntArray
from specplug.generation.counters import Counters
from specplug.profile import CostPoints, Profile, Runtime
from specplug.profile.with_drafter import reads_prompts
from specplug.subjects.subject import RefusedQuestion

if TYPE_CHECKING:
    from specplug.engines.llama_cpp.model import Model
    from specplug.generation.answers import Sampling

REFERENCE_ENGINES = {
    "llama-cpp-python:prompt-lookup": 10,
    "llama-cpp-python:prompt-lookup-2": 2,
    "llama-cpp-python:plain": 0,
}
"""The names that `--peer` accepts, with the draft tokens of llama-cpp-python's prompt lookup: 10 is its default, 2 is
its advice for CPUs, and 0 drafts nothing."""


@dataclass(frozen=True, slots=True)
class Result:
    """One answer: its tokens, and the seconds that all tokens but the first took.

    The prefill yields the first token, and drafts do not change the prefill. When several prompts are answered at once,
    each answer is charged the share of the time that its tokens have. `counters` is None where an arm reports none.

    prompt_seconds  time of the prefill and the first token; None where an arm does not measure it
    """

    tokens: list[int]
    seconds: float
    counters: Counters | None
    prompt_seconds: float | None = None

    @property
    def content(self) -> list[int]:
        return self.tokens

    @property
    def length(self) -> int:
        return len(self.tokens)


Content = TypeVar("Content", covariant=True)
"""What answers are compared by: tokens of one tokenizer, or text."""

Asked = TypeVar("Asked", contravariant=True)
"""What an arm is asked: the tokens of a prompt, or a conversation."""


class Timed(Protocol[Content]):
    """One answer of any arm, with the times and counters of `Result`. `length` is its number of tokens."""

    @property
    def content(self) -> Content: ...

    @property
    def length(self) -> int: ...

    @property
    def seconds(self) -> float: ...

    @property
    def counters(self) -> Counters | None: ...

    @property
    def prompt_seconds(self) -> float | None: ...


class TimedArm(Protocol[Asked, Content]):
    """Something that answers prompts and can be timed. `reset` discards everything learned from earlier prompts.

    `answer` has a RefusedQuestion in the place of the answer to each prompt that is refused. `answer` and `reset` raise
    SubjectError where it cannot answer any more. specplug's own engines do neither.
    """

    @property
    def name(self) -> str: ...

    @property
    def profile(self) -> str | None: ...

    def answer(self, prompts: Sequence[Asked], max_tokens: int) -> Sequence[Timed[Content] | RefusedQuestion]: ...

    def reset(self) -> None: ...

    def close(self) -> None: ...


class Arm(TimedArm[IntArray, list[int]], Protocol):
    """An arm of an engine in this process: it takes and returns tokens."""

    def answer(self, prompts: Sequence[IntArray], max_tokens: int) -> list[Result]: ...


class PromptStates:
    """Saved KV cache states after the prefill of a prompt, shared by arms that answer the same prompts in turn.

    Another attention kernel or cache type computes another state, so each state belongs to one engine setting.
    """

    def __init__(self, limit: int = 1 << 30) -> None:
        """`limit`: total bytes. The oldest states are dropped first; the latest one is always kept."""
        self._limit = limit
        self._states: dict[tuple[Runtime | None, bytes], bytes] = {}

    def of(self, prompt: IntArray, setting: Runtime | None = None) -> bytes | None:
        return self._states.get((setting, prompt.tobytes()))

    def keep(self, prompt: IntArray, state: bytes, setting: Runtime | None = None) -> None:
        self._states[setting, prompt.tobytes()] = state
        while len(self._states) > 1 and sum(map(len, self._states.values())) > self._limit:
            del self._states[next(iter(self._states))]


class ProfileArm:
    """A profile on llama.cpp that answers `slots` prompts at a time."""

    def __init__(
        self,
        model: Model,
        profile: Profile,
        sampling: Sampling,
        *,
        slots: int = 1,
        cost: CostPoints | None = None,
        notify: Callable[[str], None] = lambda text: None,
        prompts: PromptStates | None = None,
        name: str | None = None,
        follow_free_cores: bool = False,
    ) -> None:
        """Arms share `prompts`, so that only the first arm with the same engine settings prefills each prompt.

        A profile that `reads_prompts` prefills all of them.
        name               the profile's where None
        follow_free_cores  see `LlamaCpp`
        """
        from specplug.engines.llama_cpp.engine import LlamaCpp

        self.name = name or profile.name
        self.profile = profile.name
        self._sampling = sampling
        self._prompts = None if reads_prompts(profile) else prompts
        self.engine = LlamaCpp(
            model, profile, slots=slots, cost=cost, follow_free_cores=follow_free_cores, notify=notify
        )

    def answer(self, prompts: Sequence[IntArray], max_tokens: int) -> list[Result]:
        from specplug.generation.answers import Request

        requests = [Request(prompt, max_tokens, self._sampling) for prompt in prompts]
        self.engine.loop.forget_prompts()  # so that every arm prefills the same prompts in the same passes
        if self._prompts is not None:
            setting = self.engine.profile.runtime
            for prompt in prompts:
                state = self.engine.loop.preload(prompt, self._prompts.of(prompt, setting))
                self._prompts.keep(prompt, state, setting)
        began = perf_counter()
        answers = self.engine.generate_all(requests)
        prefill_seconds = sum(a.counters.prompt_ns for a in answers) / 1e9
        per_token = (perf_counter() - began - prefill_seconds) / max(1, sum(len(a.tokens) - 1 for a in answers))
        return [
            Result(
                a.tokens,
                per_token * (len(a.tokens) - 1),
                a.counters,
                a.counters.prompt_ns / 1e9 if self._prompts is None else None,  # else only its last token is read here
            )
            for a in answers
        ]

    def reset(self) -> None:
        self.engine.reset()

    def close(self) -> None:
        self.engine.close()


class PromptLookupReference:
    """A reference engine: llama-cpp-python's `Llama` with its own prompt lookup, opened as its users open it."""

    profile = None

    def __init__(self, model: Model, profile: Profile, name: str, sampling: Sampling) -> None:
        """Open the model a second time, with the profile's threads, context, KV type and attention.

        name  a key of REFERENCE_ENGINES
        """
        from specplug.engines.llama_cpp.reference_engine import open_peer

        self.name = name
        self._generate, self._close = open_peer(model, profile, REFERENCE_ENGINES[name], sampling)

    def answer(self, prompts: Sequence[IntArray], max_tokens: int) -> list[Result]:
        results = []
        for prompt in prompts:
            began = perf_counter()
            tokens, seconds = self._generate(prompt, max_tokens)
            results.append(Result(tokens, seconds, None, perf_counter() - began - seconds))
        return results

    def reset(self) -> None:
        """Nothing to do: prompt lookup keeps no state between prompts."""

    def close(self) -> None:
        self._close()


def plain(profile: Profile) -> Profile:
    """Plain decoding, the arm that all others are compared with: the same engine and settings without drafts."""
    from specplug.registry import ProposerSpec

    return replace(profile, name="none", description="plain decoding", proposers=(ProposerSpec("none"),), measured=None)
