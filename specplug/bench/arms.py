"""What is compared: profiles on an engine, and peers that do the same job without us.

Knows how to open each. Knows no workload and no statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

from specplug.core import IntArray
from specplug.generation.counters import Counters
from specplug.profile import CostPoints, Profile

if TYPE_CHECKING:
    from specplug.engines.llama_cpp.model import Model
    from specplug.generation.answers import Sampling

PEERS = {
    "llama-cpp-python:prompt-lookup": 10,
    "llama-cpp-python:prompt-lookup-2": 2,
    "llama-cpp-python:plain": 0,
}
"""Peer name to the draft length of its prompt lookup: 10 is its default, 2 its advice for CPUs, 0 no draft model."""


@dataclass(frozen=True, slots=True)
class Result:
    """One answer: its tokens, and the seconds that all but the first took.

    The first token comes with reading the prompt, which drafts do not touch. Of prompts answered together, each
    bears the part of the time that belongs to its tokens. `counters` is None where an arm does not tell.
    """

    tokens: list[int]
    seconds: float
    counters: Counters | None


class Arm(Protocol):
    """Something that answers prompts. `reset` forgets all that was learned from earlier ones."""

    @property
    def name(self) -> str: ...

    @property
    def profile(self) -> str | None: ...

    def answer(self, prompts: Sequence[IntArray], max_tokens: int) -> list[Result]: ...

    def reset(self) -> None: ...

    def close(self) -> None: ...


class PromptStates:
    """What reading a prompt leaves in a cache, for arms that run the same prompts one after the other; bounded."""

    def __init__(self, limit: int = 1 << 30) -> None:
        """`limit`: bytes in all; the oldest go first, but never the latest."""
        self._limit = limit
        self._states: dict[bytes, bytes] = {}

    def of(self, prompt: IntArray) -> bytes | None:
        return self._states.get(prompt.tobytes())

    def keep(self, prompt: IntArray, state: bytes) -> None:
        self._states[prompt.tobytes()] = state
        while len(self._states) > 1 and sum(map(len, self._states.values())) > self._limit:
            del self._states[next(iter(self._states))]


class ProfileArm:
    """A profile on llama.cpp, `slots` prompts at a time."""

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
    ) -> None:
        """`prompts` is shared by arms with the same engine settings: what one has read, the others need not read."""
        from specplug.engines.llama_cpp.engine import LlamaCpp

        self.name = self.profile = profile.name
        self._sampling = sampling
        self._prompts = prompts
        self.engine = LlamaCpp(model, profile, slots=slots, cost=cost, notify=notify)

    def answer(self, prompts: Sequence[IntArray], max_tokens: int) -> list[Result]:
        from specplug.generation.answers import Request

        requests = [Request(prompt, max_tokens, self._sampling) for prompt in prompts]
        self.engine.loop.forget_prompts()  # every arm reads the same prompts in the same passes
        if self._prompts is not None:
            for prompt in prompts:
                state = self.engine.loop.preload(prompt, self._prompts.of(prompt))
                self._prompts.keep(prompt, state)
        began = perf_counter()
        answers = self.engine.generate_all(requests)
        reading = sum(a.counters.prompt_ns for a in answers) / 1e9
        share = (perf_counter() - began - reading) / max(1, sum(len(a.tokens) - 1 for a in answers))
        return [Result(a.tokens, share * (len(a.tokens) - 1), a.counters) for a in answers]

    def reset(self) -> None:
        self.engine.reset()

    def close(self) -> None:
        self.engine.close()


class PromptLookupPeer:
    """llama-cpp-python's own `Llama`, with its own prompt lookup, opened as its users open it."""

    profile = None

    def __init__(self, model: Model, profile: Profile, name: str, sampling: Sampling) -> None:
        """Opens the model a second time, with the profile's threads, context, KV type and attention."""
        from specplug.engines.llama_cpp.reference_engine import open_peer

        self.name = name
        self._generate, self._close = open_peer(model, profile, PEERS[name], sampling)

    def answer(self, prompts: Sequence[IntArray], max_tokens: int) -> list[Result]:
        return [Result(*self._generate(prompt, max_tokens), None) for prompt in prompts]

    def reset(self) -> None:
        """Prompt lookup keeps nothing between prompts."""

    def close(self) -> None:
        self._close()


def plain(profile: Profile) -> Profile:
    """The arm that everything is compared with: the same engine and settings, no drafts."""
    from specplug.registry import ProposerSpec

    return replace(profile, name="none", description="plain decoding", proposers=(ProposerSpec("none"),), measured=None)
