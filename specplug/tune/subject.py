"""What tuning asks of an engine with a model in it.

Knows the questions. An engine answers them in a file of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from specplug.bench.arms import Arm
from specplug.core import IntArray, Requires
from specplug.profile import Profile
from specplug.tune.cost_curves import Curve, Progress
from specplug.tune.expense import Expense
from specplug.tune.prediction import Costs
from specplug.tune.trace import Answer, OffPathRows, Trace


class Subject(Protocol):
    """One model, opened once for a whole tune.

    profile  the base with the engine's own choices filled in
    trees    whether drafts may be trees
    batched  whether one plan serves a batch that changes at every step (`BatchSpeculator`), not a few sequences
    """

    profile: Profile
    provides: Requires
    trees: bool
    batched: bool

    def about(self) -> dict[str, Any]:
        """The model in words (`description`), and the context that it was trained with."""

    def use(self, *, threads: int | None = None, context: int | None = None) -> None:
        """Everything opened from now on computes with so many threads, and holds so many tokens per sequence."""

    def limits(self, sequences: int) -> tuple[bool, int]:
        """Whether a plain pass gets a second row, and how many nodes a draft can have; 0 where none can be verified."""

    def encode(self, messages: Sequence[dict[str, str]]) -> IntArray:
        """A conversation as prompt tokens, int32[n]."""

    def text(self, tokens: Sequence[int]) -> str: ...

    def choose_threads(self, seconds: float) -> tuple[int | None, dict[int, float]]:
        """The fastest number of threads, and milliseconds of a one-row pass by number; None where it is not ours."""

    def curves(self, levels: Sequence[int], seconds: float, progress: Progress) -> Iterator[Curve]:
        """What passes cost with so many sequences at once, each curve as it is done, ascending; others may be among
        them."""

    def record(
        self,
        prompts: Sequence[IntArray],
        max_tokens: int,
        k: int,
        slots: int,
        done: Callable[[int, IntArray, IntArray], None],
    ) -> None:
        """Answer greedily without drafts; `done` is told index, tokens and top ids of each answer as it ends."""

    def off_path_rows(self, answers: Sequence[Answer]) -> Iterator[OffPathRows | None]:
        """For one answer after the other, what the target says after its own runners-up."""

    def expense(self, trace: Trace, methods: Sequence[str], level: int, seconds: float) -> Expense:
        """What drafting with each method costs beside the target, `level` sequences at once."""

    def arm(self, profile: Profile, *, slots: int, costs: Costs) -> Arm:
        """A profile ready to answer `slots` prompts at a time."""

    def resting(self, *, slots: int, costs: Costs) -> Arm | None:
        """The engine of the arms that draft, with nobody drafting; None where it is plain decoding's own."""

    def close(self) -> None: ...
