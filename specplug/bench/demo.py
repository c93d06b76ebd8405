"""Compares a profile with plain decoding on three prompts in about a minute, and records when each text appeared.

Both run on one opened model, alternately. Every run starts with nothing learned but what passes cost, which is measured
first: `run` keeps that in the cache folder. Nothing here depends on a terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from specplug.bench.arms import PromptStates, plain
from specplug.bench.demo_format import ROWS, PassTimes, pass_times, weight_format
from specplug.bench.demo_prompts import PROMPTS, DemoPrompt
from specplug.bench.other_work import OtherWork
from specplug.bench.statistics import Interval, paired_ratio
from specplug.core import IntArray
from specplug.generation.counters import Counters
from specplug.machine import fingerprint, hardware
from specplug.models.packaged_models import DEMO, to_install
from specplug.profile import Profile
from specplug.profile.with_drafter import reads_prompts

if TYPE_CHECKING:
    from specplug.engines.llama_cpp.engine import LlamaCpp
    from specplug.engines.llama_cpp.model import Model

LARGE = "demo:qwen-coder"
"""The packaged model that is used where it is installed: it answers better, and drafting gains in the format it has."""

SECONDS = 74.0
"""Seconds from the start of the command to its end that runs and replays are planned for. It shall end within 90 s."""

MOST_TOKENS, USUAL_TOKENS, FEWEST_TOKENS = 128, 96, 24
"""New tokens of the longest answer: at most, those at which more runs matter more than longer answers, and at least."""

LENGTHS = sum(prompt.length for prompt in PROMPTS)
"""Tokens of one answer to each prompt, in units of the longest."""

MOST_RUNS, USUAL_RUNS, FEWEST_RUNS = 5, 3, 2
"""Runs of each prompt: at most, those that are preferred to answers longer than USUAL_TOKENS, and at least."""

SLACK = 1.1
"""Ratio. Runs are planned to take this many times as long as plain decoding did in the trial: drafts can lose time."""

TRIAL_TOKENS = 8
"""New tokens of the answers that show how fast the model is. Chosen."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of one step: seconds after the prompt was read, tokens emitted by then, and whether draft tokens gave it."""

    at: float
    tokens: int
    text: str
    drafted: bool


@dataclass(frozen=True, slots=True)
class Run:
    """One answer. `seconds` is the time of all tokens but the first, which comes with the prompt."""

    tokens: list[int]
    seconds: float
    pieces: tuple[Piece, ...]
    counters: Counters

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Plan:
    """New tokens of the longest answer at most, and runs of each prompt."""

    max_tokens: int
    runs: int

    def tokens(self, prompt: DemoPrompt) -> int:
        """New tokens of an answer to this prompt, at most."""
        return max(2, round(self.max_tokens * prompt.length))


@dataclass(slots=True)
class Comparison:
    """The runs of one prompt, those of plain decoding and of the profile in pairs.

    packaged    plain decoding of the packaged file, where another format of it is used
    busy_cores  what other programs used meanwhile
    """

    prompt: DemoPrompt
    plain: list[Run] = field(default_factory=list)
    drafting: list[Run] = field(default_factory=list)
    packaged: list[Run] = field(default_factory=list)
    busy_cores: float = 0.0

    @property
    def speedup(self) -> Interval | None:
        """Tokens per second over those of plain decoding; None where an answer has one token only."""
        numbers = [[len(run.tokens) - 1 for run in runs] for runs in (self.drafting, self.plain)]
        seconds = [[run.seconds for run in runs] for runs in (self.drafting, self.plain)]
        if not any(min(pair) > 0 for pair in zip(*numbers, strict=True)):
            return None
        return paired_ratio(numbers[0], seconds[0], numbers[1], seconds[1])

    @property
    def same_output(self) -> bool:
        return all(a.tokens == b.tokens for a, b in zip(self.plain, self.drafting, strict=True))


def default_model() -> str:
    """The larger packaged model where its packages are installed, else the small one."""
    return LARGE if to_install(LARGE) is None else DEMO


def planned(
    seconds: float,
    token_seconds: float,
    *,
    reading_seconds: float = 0.0,
    replays: bool,
    further: int = 0,
    most_tokens: int = MOST_TOKENS,
) -> Plan:
    """The runs and tokens that fit into `seconds`: the most runs with `most_tokens`, else USUAL_RUNS with fewer tokens.

    token_seconds    of plain decoding
    reading_seconds  to read a prompt, where every answer has to
    replays          whether one run of each prompt is replayed afterwards
    further          arms that answer the first prompt in every run, besides the two that answer all
    """

    def fitting(runs: int) -> int:
        answers = runs * (2 * len(PROMPTS) + further)
        decoding = runs * (2 * LENGTHS + further) * SLACK + (LENGTHS if replays else 0)
        return int((seconds - answers * reading_seconds) / (decoding * token_seconds))

    for runs in range(MOST_RUNS, USUAL_RUNS - 1, -1):
        if fitting(runs) >= most_tokens:
            return Plan(most_tokens, runs)
    runs = USUAL_RUNS if fitting(USUAL_RUNS) >= USUAL_TOKENS else FEWEST_RUNS
    return Plan(min(most_tokens, max(FEWEST_TOKENS, fitting(runs))), runs)


def median_run(runs: Sequence[Run]) -> Run:
    """The run whose tokens per second are in the middle; of two in the middle the faster one."""
    return sorted(runs, key=tokens_per_second)[len(runs) // 2]


def tokens_per_second(run: Run) -> float:
    """Of all tokens but the first; 0 where there is no other."""
    return (len(run.tokens) - 1) / run.seconds if run.seconds > 0 else 0.0


def mean_speed(runs: Sequence[Run]) -> float:
    """Tokens per second over all runs."""
    seconds = sum(run.seconds for run in runs)
    return sum(len(run.tokens) - 1 for run in runs) / seconds if seconds > 0 else 0.0


class Demo:
    """The opened arms, what they have read, and the times of the model's passes."""

    def __init__(self, model: Model, arms: Sequence[LlamaCpp], packaged: LlamaCpp | None, times: PassTimes) -> None:
        from specplug.engines.llama_cpp.settings_table import label

        self.model = model
        self.times = times
        self.format = weight_format(model)
        self.threads = arms[0].profile.runtime.threads
        self.settings = label(arms[0].profile.runtime)
        """The engine settings of plain decoding and of the profile."""
        keeps_prompts = not arms[1].profile.exact and not reads_prompts(arms[1].profile)
        states = PromptStates()
        self._arms = {
            name: _Answers(engine, states if keeps_prompts else None)
            for name, engine in zip(("plain", "drafting"), arms, strict=True)
        }
        self._packaged = None if packaged is None else _Answers(packaged, PromptStates() if keeps_prompts else None)
        self._prompts = {p: model.chat_prompt([{"role": "user", "content": p.text}]) for p in PROMPTS}

    def plan(self, seconds: float, *, replays: bool, most_tokens: int) -> Plan:
        """Read all prompts, answer the first one for trial, and plan for what is then left of `seconds` from now."""
        began = perf_counter()
        for prompt in self._prompts.values():
            self._arms["plain"].answer(prompt, 1)
        reading = self._arms["plain"].reads_again
        reading_seconds = (perf_counter() - began) / len(PROMPTS) if reading else 0.0
        first = self._prompts[PROMPTS[0]]
        further = [self._packaged] if self._packaged is not None else []
        trials = [arm.answer(first, TRIAL_TOKENS) for arm in (*self._arms.values(), *further)]
        token_seconds = max(trials[0].seconds / max(1, len(trials[0].tokens) - 1), 1e-5)
        return planned(
            seconds - (perf_counter() - began),
            token_seconds,
            reading_seconds=reading_seconds,
            replays=replays,
            further=len(further),
            most_tokens=most_tokens,
        )

    def compare(
        self, prompt: DemoPrompt, plan: Plan, seconds: float, progress: Callable[[], None] = lambda: None
    ) -> Comparison:
        """Answer a prompt with all arms in turns; the arm that goes first changes from run to run.

        seconds   after which no further run begins, but for the first FEWEST_RUNS: a machine can become busy
        progress  is called after each answer
        """
        found = Comparison(prompt)
        arms = [(found.plain, self._arms["plain"]), (found.drafting, self._arms["drafting"])]
        if self._packaged is not None and prompt is PROMPTS[0]:
            arms.append((found.packaged, self._packaged))
        began, others = perf_counter(), OtherWork()
        for number in range(plan.runs):
            if number >= FEWEST_RUNS and perf_counter() - began > seconds:
                break
            for runs, arm in arms if number % 2 == 0 else arms[::-1]:
                runs.append(arm.answer(self._prompts[prompt], plan.tokens(prompt)))
                progress()
        found.busy_cores = round(others.cores(), 2)
        return found

    def answers(self, prompt: DemoPrompt, plan: Plan) -> int:
        """How many answers `compare` asks for."""
        return plan.runs * (2 + (self._packaged is not None and prompt is PROMPTS[0]))


@contextmanager
def open_demo(
    path: Path,
    profile: Profile,
    *,
    packaged: Path | None = None,
    times: PassTimes | None = None,
    notify: Callable[[str], None] = lambda text: None,
) -> Iterator[Demo]:
    """Open a model for plain decoding and for `profile`.

    packaged  the packaged file, where `path` is a copy of it in another format
    times     of the model's passes; measured where None. Drafts are planned by them unless the profile has its own
    """
    from specplug.engines.llama_cpp.drafters.head_finding import with_own_heads
    from specplug.engines.llama_cpp.drafters.opening import open_target
    from specplug.engines.llama_cpp.engine import LlamaCpp
    from specplug.engines.llama_cpp.model import open_model

    profile = with_own_heads(profile, path)
    with ExitStack() as stack:
        model = stack.enter_context(open_target(path, [profile], profile.runtime, notify))
        if times is None:
            times = pass_times({"": model}, profile)[""]
        cost = None if profile.measured is not None else times.cost_points(profile.planner.max_nodes + 1)
        arms = [
            stack.enter_context(LlamaCpp(model, one, cost=cost, follow_free_cores=True, notify=notify))
            for one in (plain(profile), profile)
        ]
        other = None
        if packaged is not None:
            second = stack.enter_context(open_model(packaged, profile.runtime))
            other = stack.enter_context(LlamaCpp(second, plain(profile), follow_free_cores=True))
        yield Demo(model, arms, other, times)


def document(
    demo: Demo, comparisons: Sequence[Comparison], plan: Plan, *, ref: str, why: str, profile: Profile
) -> dict[str, Any]:
    """The document of `demo --json`."""
    times, packaged = demo.times, comparisons[0].packaged
    return {
        "schema": 1,
        "model": ref,
        "file": str(demo.model.path),
        "format": demo.format,
        "why": why,
        "profile": profile.name,
        "hardware": hardware.fingerprint() | {"threads": demo.threads},
        "versions": fingerprint.versions("llama-cpp"),
        "engine_settings": demo.settings,
        "max_tokens": plan.max_tokens,
        "runs": plan.runs,
        "pass_ms": {str(rows): ms for rows, ms in zip(ROWS, times.ms, strict=True)},
        "packaged_plain": _figures(packaged) if packaged else None,
        "prompts": [
            {
                "kind": found.prompt.kind,
                "prompt": found.prompt.text,
                "plain": _figures(found.plain),
                "drafting": _figures(found.drafting),
                "speedup": found.speedup.as_mapping() if found.speedup else None,
                "same_output": found.same_output,
                "busy_cores": found.busy_cores,
            }
            for found in comparisons
        ],
    }


def _figures(runs: Sequence[Run]) -> dict[str, Any]:
    """Speed and seconds of all runs; the text and the counters of the median run."""
    shown = median_run(runs)
    c = shown.counters
    return {
        "tokens_per_second": round(mean_speed(runs), 2),
        "seconds": [round(run.seconds, 4) for run in runs],
        "tokens": len(shown.tokens),
        "steps": c.steps,
        "mean_acceptance_length": round(c.mean_acceptance_length, 3),
        "draft_tokens": c.draft_tokens,
        "accepted_tokens": c.accepted_tokens,
        "overhead_us_per_step": round(c.overhead_us_per_step, 1),
        "text": shown.text,
    }


class _Answers:
    """One engine, which answers from nothing learned. Prompts are read once where `states` keeps what was read."""

    def __init__(self, engine: LlamaCpp, states: PromptStates | None) -> None:
        self.reads_again = states is None
        self._engine = engine
        self._states = states

    def answer(self, prompt: IntArray, max_tokens: int) -> Run:
        from specplug.generation.answers import Answer, Request

        engine = self._engine
        engine.reset()
        if self._states is not None:
            setting = engine.profile.runtime
            self._states.keep(prompt, engine.loop.preload(prompt, self._states.of(prompt, setting)), setting)
        answer = Answer()
        steps = []
        for released in engine.stream(Request(prompt, max_tokens), answer):
            steps.append((answer.decode_seconds, len(answer.tokens), released))
        pieces = tuple(Piece(at, count, s.text, s.drafted) for at, count, released in steps for s in released)
        return Run(answer.tokens, answer.decode_seconds, pieces, answer.counters)
