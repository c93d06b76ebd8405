"""Opening the engine that a profile names, ready to generate.

An engine's modules are imported only when a profile chooses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

from specplug.core import IntArray
from specplug.errors import UsageError
from specplug.generation.answers import Answer, Request
from specplug.generation.text import Segment
from specplug.models import references
from specplug.profile import Profile, for_own_engine


class OpenEngine(Protocol):
    """An engine with a model and a profile loaded."""

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> IntArray:
        """int32[n]: the conversation in the model's chat template, followed by the start of the answer."""

    @property
    def chat_stops(self) -> Sequence[str]:
        """Strings that end every answer of a chat."""

    def raw_prompt(self, text: str) -> IntArray:
        """int32[n]: a text to continue; the text of a control token becomes that token."""

    def stream(self, request: Request, answer: Answer) -> Iterator[list[Segment]]:
        """Fill `answer` step by step; yields the text that each step completed."""

    def learned(self) -> Mapping[str, Sequence[float]]:
        """(hits, misses) by bucket, as learned so far; empty for an engine that does not tell."""


@contextmanager
def open_engine(
    profile: Profile, notify: Callable[[str], None], *, learned: Mapping[str, Sequence[float]] | None = None
) -> Iterator[OpenEngine]:
    """UsageError for a model or profile that cannot be used, EngineError where the engine is missing.

    learned  (hits, misses) by bucket to start from, on llama.cpp; those of the profile where None
    """
    for_own_engine(profile)
    if profile.model is None:
        raise UsageError(f"profile {profile.name}: engine {profile.engine} has no model; name one with --model")
    if profile.engine == "vllm":
        from specplug.engines.vllm.offline import open_vllm

        with open_vllm(profile.model, profile, notify=notify, max_num_seqs=1) as engine:
            yield engine
        return
    path = references.resolve(profile.model, "gguf")
    from specplug.engines.llama_cpp import require

    require()
    from specplug.engines.llama_cpp.drafters.head_finding import with_own_heads
    from specplug.engines.llama_cpp.drafters.opening import open_target
    from specplug.engines.llama_cpp.engine import LlamaCpp

    profile = with_own_heads(profile, path)
    with (
        open_target(path, [profile], profile.runtime, notify) as model,
        LlamaCpp(model, profile, remember=True, learned=learned, follow_free_cores=True, notify=notify) as llama,
    ):
        yield llama
