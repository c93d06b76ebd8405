"""A model, a context for many streams and the profile's proposers: what a server asks of llama.cpp.

Knows profiles and how the parts are opened. Knows neither HTTP nor queues.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from specplug.core import IntArray
from specplug.engines.llama_cpp.batch_loop import BatchLoop, batch_ids_needed
from specplug.engines.llama_cpp.cells import SPARE_SHARE
from specplug.engines.llama_cpp.context import open_context
from specplug.engines.llama_cpp.drafters.opening import Drafters
from specplug.engines.llama_cpp.engine import fitting_cost_points, fitting_sources, resolved
from specplug.engines.llama_cpp.model import Message, Model
from specplug.engines.llama_cpp.sampling import Sampler
from specplug.errors import UsageError
from specplug.generation.answers import Sampling
from specplug.planning.cost import CostCurve
from specplug.planning.fusion import Fusion
from specplug.planning.speculator import Speculator
from specplug.profile import CostPoints, Profile


def open_batch_engine(
    model: Model, profile: Profile, *, slots: int, kv_tokens: int | None, notify: Callable[[str], None]
) -> BatchEngine:
    """A BatchEngine whose loop will run in another thread than this one.

    OpenMP keeps a team for every thread that ever computed. With two teams there are more threads than cores, and all
    barriers sleep: passes take twice as long on 2 cores. So passes are timed in a thread that has ended afterwards.
    """
    with ThreadPoolExecutor(1) as opening:
        return opening.submit(BatchEngine, model, profile, slots=slots, kv_tokens=kv_tokens, notify=notify).result()


class BatchEngine:
    """One context for up to `slots` streams. Use it in a `with` statement; the model stays its owner's.

    kv_tokens  tokens that may be in the cache at once, of all streams together
    """

    def __init__(
        self,
        model: Model,
        profile: Profile,
        *,
        slots: int,
        kv_tokens: int | None = None,
        cost: CostPoints | None = None,
        notify: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Raises UsageError for a profile that does not fit this engine or model.

        kv_tokens  a full context for every slot where None
        cost       T(rows, context) of this machine; taken from the profile, or measured, where None
        """
        self.profile = profile = resolved(profile, model, many=slots > 1)
        if profile.exact:
            raise UsageError(
                f"profile {profile.name}: exact is for one sequence at a time; with q8_0 or q4_0 weights and "
                "runtime: {kv_type: bf16} a batch is as exact"
            )
        model.check_rollback()
        self.model = model
        self.slots = slots
        self.max_context = profile.runtime.context
        self.kv_tokens = kv_tokens or slots * self.max_context
        if self.kv_tokens < self.max_context:
            raise UsageError(
                f"a KV cache of {self.kv_tokens} tokens is less than one context ({self.max_context}); "
                "lower runtime: context"
            )
        sources = fitting_sources(profile, model.path, slots=slots)
        max_nodes = profile.planner.max_nodes if profile.speculates else 0
        if cost is None or not profile.speculates:
            cost = fitting_cost_points(model, profile, slots=slots, limit=max_nodes + slots, notify=notify)
        max_rows = max_nodes + 2 * slots  # trees, and the last rows of prompts
        needed = (self.kv_tokens + max(profile.runtime.batch, max_rows)) * SPARE_SHARE // (SPARE_SHARE - 1)
        self.context = open_context(
            model,
            profile.runtime,
            cells=-(-needed // 256) * 256,
            num_ids=batch_ids_needed(slots, max_nodes),
            max_rows=max_rows,
        )
        learned = profile.measured.acceptance if profile.measured else None
        curve = CostCurve(cost.contexts, cost.rows, cost.ms, cost.change_ms)
        self._drafters = Drafters()
        try:
            self._drafters.open(sources, self.context, profile.runtime, slots=slots)
        except BaseException:
            self.close()
            raise
        fusion = Fusion(self._drafters.in_place(sources))
        self.speculator = Speculator(fusion, curve, profile, learned=learned)
        self.loop = BatchLoop(self.context, self.speculator, slots=slots)

    def __enter__(self) -> BatchEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._drafters.close()
        self.context.close()

    @property
    def num_tokens(self) -> int:
        """Size of the vocabulary."""
        return self.model.num_tokens

    @property
    def end_tokens(self) -> frozenset[int]:
        return self.model.end_tokens

    @property
    def carries_tools(self) -> bool:
        return self.model.carries_tools

    @property
    def source_names(self) -> list[str]:
        """The proposers, as the loop counts them."""
        return [spec.method for spec in self.profile.proposers]

    @property
    def knows_plain_ms(self) -> bool:
        """Whether there is a cost curve; plain decoding needs none."""
        return self.profile.speculates

    def sampler(self, sampling: Sampling) -> Sampler:
        """Raises UsageError for what cannot be sampled from. It belongs to the caller until a stream begins with it."""
        return Sampler(self.model, sampling, coupled=self.profile.runtime.coupled)

    def tokenize(self, text: str, *, add_special: bool = True) -> IntArray:
        return self.model.tokenize(text, add_special=add_special)

    def chat_prompt(self, messages: Sequence[Message], tools: Sequence[Message] = ()) -> IntArray:
        try:
            return self.model.chat_prompt(messages, tools)
        except UsageError as error:  # its own words name the file, which is nobody's business
            raise UsageError(f"the model's chat template failed: {error.__cause__}") from error

    def piece(self, token: int) -> bytes:
        """The bytes that a token prints."""
        return self.model.piece(token)

    def text(self, tokens: Sequence[int]) -> str:
        return self.model.text(tokens)
