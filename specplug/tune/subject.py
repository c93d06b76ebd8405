"""The interface between tuning and an engine with a model. Each engine implements it in a module of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from specplug.bench.arms import Arm
from specplug.core import DraftLimits, IntArray, Requires
from specplug.planning.request_time import SettingCosts
from specplug.profile import Profile, Runtime
from specplug.registry import ProposerSpec
from specplug.tune.candidates import Setting
from specplug.tune.cost_curves import Curve, Progress
from specplug.tune.device_settings import EnginePlanning
from specplug.tune.drafter_trace import DrafterTrace
from specplug.tune.expense import Expense
from specplug.tune.prediction import Costs
from specplug.tune.trace import Answer, OffPathRows, Trace


class Subject(Protocol):
    """One model, opened once for a complete tune.

    profile   the base profile with the engine's defaults filled in
    provides  what the engine provides to proposers
    batched   whether there is one plan for a batch that changes at every step (`BatchSpeculator`)
    engine_planning  how the engine itself chooses the draft tokens to verify; None where specplug's planner does
    own_drafters  those that need no model beside the target's, to try on long texts
    """

    profile: Profile
    provides: Requires
    batched: bool
    engine_planning: EnginePlanning | None
    own_drafters: Sequence[ProposerSpec]

    def settings_to_try(self, most_nodes: int, named: Sequence[ProposerSpec]) -> list[Setting]:
        """Every setting to try, most promising first, without plain decoding.

        most_nodes  draft tokens that a draft can have
        named       drafters and corpora that the user named
        """

    def about(self) -> dict[str, Any]:
        """`description` of the model in words, and `train_context`, the context length that it was trained with."""

    def use(self, *, threads: int | None = None, threads_batch: int | None = None, context: int | None = None) -> None:
        """Set the threads, and the context in tokens per sequence, of everything that is opened from now on."""

    def use_setting(self, setting: Runtime) -> None:
        """Set attention kernel, cache type and the settings for weights of everything that is opened from now on."""

    def measure_settings(
        self, contexts: Sequence[int], sequences: int, seconds: float, progress: Progress
    ) -> tuple[Mapping[Runtime, SettingCosts], Runtime, list[str]]:
        """The costs of the engine settings that the base profile leaves open, the engine's own setting, and a sentence
        on each setting that could not be measured.

        An empty mapping for an engine that has none to choose.

        contexts   tokens in the cache, ascending
        sequences  that share the cache
        """

    def limits(self, sequences: int) -> tuple[bool, int]:
        """Whether plain passes are padded to two rows, and the most nodes of a draft; 0 where none can be verified."""

    def memory_limits(self, sequences: int) -> DraftLimits:
        """The limits of the target's memory for drafts, with so many sequences."""

    def encode(self, messages: Sequence[dict[str, str]]) -> IntArray:
        """The prompt tokens of a conversation, int32[n]."""

    def text(self, tokens: Sequence[int]) -> str: ...

    def choose_threads(self, seconds: float) -> tuple[int | None, int | None, dict[int, float]]:
        """The fastest thread counts for passes of one row and of several (None: the engine sets its own), and the
        milliseconds of a one-row pass by count."""

    def measure_costs(self, levels: Sequence[int], seconds: float, progress: Progress) -> Iterator[Curve]:
        """A cost curve for each level, which is a number of sequences that run at once; ascending, each as soon as it
        is measured. Curves for other levels may be among them."""

    def record(
        self,
        prompts: Sequence[IntArray],
        max_tokens: int,
        k: int,
        slots: int,
        done: Callable[[int, IntArray, IntArray], None],
    ) -> None:
        """Answer greedily without drafts, `slots` prompts at a time.

        `done` receives the index, the tokens and the top k ids (int32[n - 1, k]) of each answer when it ends.
        """

    def record_off_path_rows(self, answers: Sequence[Answer]) -> Iterator[OffPathRows | None]:
        """For each answer in turn, the target's rows after its own runners-up; None where there are none."""

    def measure_expense(self, trace: Trace, methods: Sequence[ProposerSpec], level: int, seconds: float) -> Expense:
        """The cost of drafting with each method beside the target's passes, `level` sequences at once."""

    def trace_drafter(
        self, spec: ProposerSpec, answers: Sequence[Answer], level: int, seconds: float, progress: Progress
    ) -> DrafterTrace:
        """What a drafter drafts for these answers, in order, as many as time allows; and its costs, `level` sequences
        at once. Raises UsageError for a drafter that does not fit the model."""

    def arm(self, profile: Profile, *, slots: int, costs: Costs) -> Arm:
        """An arm that answers `slots` prompts at a time with this profile."""

    def idle_arm(self, *, slots: int, costs: Costs) -> Arm | None:
        """The engine of the arms that draft, with drafting disabled; None where plain decoding runs on that engine."""

    def close(self) -> None: ...
