"""The toy target as a tuning subject: traces and drafts are real, and times are computed from given costs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from specplug.bench.arms import Result
from specplug.bench.statistics import Interval
from specplug.core import NO_LIMITS, Bucket, DraftLimits, IntArray, Requires, int_array
from specplug.drafts.guesses import Guesses
from specplug.engines.vllm.measure import rows_of
from specplug.planning.request_time import SettingCosts
from specplug.profile import Profile, Runtime
from specplug.registry import ProposerSpec
from specplug.testing import ToyTarget
from specplug.tune.candidates import PLAIN, Setting, grid
from specplug.tune.cost_curves import Curve, Progress, choose_threads, measure_costs
from specplug.tune.device_settings import EnginePlanning, device_grid
from specplug.tune.drafter_trace import DrafterTrace
from specplug.tune.expense import Expense, Line
from specplug.tune.prediction import Costs
from specplug.tune.replay_batch import BatchReplay
from specplug.tune.replay_sequences import Replay
from specplug.tune.trace import Answer, OffPathRows, Trace


@dataclass
class ToyTimer:
    """A pass takes `ms(rows)` milliseconds, and a little more with more tokens in the cache."""

    ms: Callable[[int], float]
    sequences: int = 1
    even: bool = False
    filled: int = 0
    calls: list[tuple[str, int]] = field(default_factory=list)

    def fill(self, tokens: int) -> float:
        self.filled = tokens
        self.calls.append(("fill", tokens))
        return 0.1 * tokens

    def prompt_ms(self) -> float:
        return 0.1

    def time(self, rows: int) -> float:
        self.calls.append(("time", rows))
        return self.ms(rows) * (1 + self.filled / 1e5)

    def use_threads(self, threads: int) -> None:
        self.calls.append(("threads", threads))


class ToyArm:
    """Answers as the target does, in the time that a replay predicts."""

    profile = None

    def __init__(self, subject: "ToySubject", profile: Profile, costs: Costs, speed: float = 1.0) -> None:
        """`speed` is how many times faster than predicted it answers."""
        self.name = profile.name
        self._speed = speed
        self._subject = subject
        self._setting = Setting(profile.proposers, profile.planner, profile.vllm.tokens_per_batch_size)
        self._costs = replace(costs, expense=Expense())
        self.reset()

    def answer(self, prompts: Sequence[IntArray], max_tokens: int) -> list[Result]:
        self._subject.on_answer(self._setting.name)
        answers = [self._subject.answer(prompt, max_tokens) for prompt in prompts]
        noise = self._subject.noise
        return [
            Result(one.tokens.tolist(), sums.ms / 1000 / self._speed * noise.uniform(0.97, 1.03), None)
            for one, sums in zip(answers, self._replay.run(answers), strict=True)
        ]

    def reset(self) -> None:
        driver = BatchReplay if self._costs.batch else Replay
        self._replay = driver(self._setting, self._costs, max_tokens=self._subject.max_tokens)

    def close(self) -> None:
        pass


class ToySubject:
    """`ms` returns the true milliseconds of a pass with n rows; `on_answer` is called before every live answer."""

    def __init__(
        self,
        profile: Profile,
        ms: Callable[[int], float],
        target: ToyTarget | None = None,
        *,
        batched: bool = False,
    ) -> None:
        self.profile = profile
        self.provides = Requires(topk=64, builtin=batched)
        self.batched = batched
        self.engine_planning: EnginePlanning | None = None
        self.own_drafters: tuple[ProposerSpec, ...] = ()
        self.ms = ms
        self.target = target or ToyTarget(vocab=128, seed=4, order=2)
        self.noise = np.random.default_rng(0)
        self.recorded = 0
        self.settings: dict[Runtime, SettingCosts] = {}
        self.unmeasured: list[str] = []
        self.max_tokens = 0
        self.on_answer: Callable[[str], None] = lambda name: None
        self.closed = False
        self.named: dict[bytes, tuple[str, int]] = {}
        """The prompt and turn of every answer for which a drafter was recorded."""
        self.drafter_rate, self.drafter_ms = 0.9, 1.0
        """The share of a drafter's tokens that are right, and the milliseconds of each."""
        self.idle_speed: float | None = None
        """Speed of the drafting engine with drafting disabled, relative to plain decoding's engine."""

    def about(self) -> dict[str, Any]:
        return {"description": "toy", "train_context": 4096}

    def use(self, *, threads: int | None = None, threads_batch: int | None = None, context: int | None = None) -> None:
        runtime = self.profile.runtime
        runtime = replace(runtime, threads=threads or runtime.threads, context=context or runtime.context)
        self.profile = replace(self.profile, runtime=runtime)

    def settings_to_try(self, most_nodes: int, named: Sequence[ProposerSpec]) -> list[Setting]:
        if self.engine_planning is not None:
            methods = [ProposerSpec("suffix"), ProposerSpec("token_recycling"), *named]
            return device_grid(methods, self.engine_planning, most_nodes)
        return grid(self.provides, trees=not self.batched, most_nodes=most_nodes, named=named)

    def memory_limits(self, sequences: int) -> DraftLimits:
        return NO_LIMITS

    def limits(self, sequences: int) -> tuple[bool, int]:
        return False, 8 if self.batched else 256 - 2 * sequences - 1

    def encode(self, messages: Sequence[dict[str, str]]) -> IntArray:
        text = "|".join(message["content"] for message in messages)
        return int_array([sum(map(ord, part)) % self.target.vocab for part in text.split()] or [1])

    def text(self, tokens: Sequence[int]) -> str:
        return " ".join(map(str, tokens))

    def use_setting(self, setting: Runtime) -> None:
        self.profile = replace(
            self.profile,
            runtime=replace(self.profile.runtime, flash_attention=setting.flash_attention, kv_type=setting.kv_type),
        )

    def measure_settings(
        self, contexts: Sequence[int], sequences: int, seconds: float, progress: Progress
    ) -> tuple[dict[Runtime, SettingCosts], Runtime, list[str]]:
        stock = next(iter(self.settings), self.profile.runtime)
        return self.settings, stock, self.unmeasured

    def choose_threads(self, seconds: float) -> tuple[int | None, int | None, dict[int, float]]:
        return (None, None, {}) if self.batched else choose_threads(ToyTimer(self.ms), 2, seconds)

    def measure_costs(self, levels: Sequence[int], seconds: float, progress: Progress) -> Iterator[Curve]:
        if self.engine_planning is None:
            yield from measure_costs(self._timer, levels, self.profile.runtime.context, seconds, progress)
            return
        for level in levels:  # an engine that plans itself verifies the same number of draft tokens for every sequence
            rows = rows_of(level, 8)
            line = tuple(Interval(*[self.ms(max(n, level))] * 3) for n in rows)
            yield Curve(level, (256,), rows, (line,), 5, 0.1, 0.0)

    @contextmanager
    def _timer(self, sequences: int, tokens: int, limit: int) -> Iterator[ToyTimer]:
        yield ToyTimer(self.ms, sequences)

    def answer(self, prompt: IntArray, max_tokens: int) -> Answer:
        text = prompt.tolist()
        tokens = self.target.greedy(text, max_tokens)
        rows = [self.target.topk([*text, *tokens[: at + 1]], 8) for at in range(len(tokens) - 1)]
        topk = np.stack(rows) if rows else np.zeros((0, 8), np.int32)
        return Answer(*self.named.get(prompt.tobytes(), ("", 0)), "", prompt, int_array(tokens), topk)

    def record(
        self,
        prompts: Sequence[IntArray],
        max_tokens: int,
        k: int,
        slots: int,
        done: Callable[[int, IntArray, IntArray], None],
    ) -> None:
        self.max_tokens = max_tokens
        for index, prompt in enumerate(prompts):
            found = self.answer(prompt, max_tokens)
            self.recorded += 1
            done(index, found.tokens, found.topk)

    def record_off_path_rows(self, answers: Sequence[Answer]) -> Iterator[OffPathRows | None]:
        yield from [None] * len(answers)

    def measure_expense(self, trace: Trace, methods: Sequence[ProposerSpec], level: int, seconds: float) -> Expense:
        line = {spec.method: Line(20.0, 1.0) for spec in methods}
        return Expense(propose=line, observe=line, plan=Line(50.0, 1.0), step=Line(10.0, 0.0))

    def trace_drafter(
        self, spec: ProposerSpec, answers: Sequence[Answer], level: int, seconds: float, progress: Progress
    ) -> DrafterTrace:
        """Every n-th token is wrong, by which the drafter knows that it is unsure."""
        every = round(1 / (1 - self.drafter_rate))
        guesses = {}
        for answer in answers:
            self.named[answer.prompt.tobytes()] = answer.prompt_id, answer.turn
            wrong = np.arange(len(answer.tokens) - 1) % every == every - 1
            tokens = np.where(wrong, answer.tokens[1:] + 1, answer.tokens[1:])
            guesses[answer.prompt_id, answer.turn] = Guesses(int_array(tokens), int_array(wrong.astype(np.int32)))
        buckets = (Bucket("sure", 0.95), Bucket("unsure", 0.2))
        return DrafterTrace(buckets, (self.drafter_ms,) * level, 0.1, 1.0, 8, None, guesses)

    def arm(self, profile: Profile, *, slots: int, costs: Costs) -> ToyArm:
        return ToyArm(self, profile, costs, self.idle_speed or 1.0 if profile.speculates else 1.0)

    def idle_arm(self, *, slots: int, costs: Costs) -> ToyArm | None:
        if self.idle_speed is None:
            return None
        return ToyArm(self, replace(self.profile, proposers=PLAIN.proposers), costs, self.idle_speed)

    def close(self) -> None:
        self.closed = True
