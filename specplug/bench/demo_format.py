"""Chooses the weight format of the packaged model in which drafting gains most on this machine.

Copies of the model go into the user's cache folder, where the measured times are remembered as well. Nothing here
depends on prompts or on a terminal.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median_low
from time import perf_counter
from typing import TYPE_CHECKING

from specplug.bench.other_work import OtherWork, is_too_much
from specplug.errors import SpecplugError
from specplug.machine import hardware
from specplug.machine.files import keep
from specplug.machine.folders import cache_folder, reason
from specplug.machine.remembered import measurement_path
from specplug.profile import CostPoints, Profile

if TYPE_CHECKING:
    from specplug.engines.llama_cpp.model import Model

SCHEMA = 1
"""Version of the format of remembered times."""

FOLDER = "demo"

COPIES = ("bf16", "q8_0", "q4_0")
"""Formats that are tried besides the packaged one: weights of 16 bits, and those for which llama.cpp has the fastest
kernels. The copies take 0.5 GB."""

ROWS = (1, 4, 8, 16)
"""Rows of the passes that are timed: plain decoding, a short draft, and two long ones."""

RATE = 0.8
"""Probability that a draft token is accepted if the ones before it were, in text that repeats its prompt. The mean
acceptance lengths of docs/lab-book/acceptance.md, 3.2 in code edits and 7.5 in summaries with quotes, belong to 0.69
and 0.87, by 1 / (1 - RATE)."""

TOLERANCE = 0.05
"""Ratio. A copy is taken only where its gain is larger than the packaged format's by this share. Chosen."""

CONTEXT = 128
"""Tokens in the cache when passes are timed."""

MOST_ROUNDS, SECONDS, LONGEST = 7, 3.0, 8.0
"""Rounds over all formats and row counts at most; seconds after which no further round begins, and after which a round
ends where it is, once everything was timed once."""


@dataclass(frozen=True, slots=True)
class PassTimes:
    """Milliseconds of passes over each of ROWS: the medians over some rounds."""

    ms: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """T(4) / T(1)."""
        return self.ms[ROWS.index(4)] / self.ms[0]

    @property
    def gain(self) -> float:
        """The speedup of drafting in text that repeats its prompt, at the best of the row counts; at least 1.

        A pass over n rows emits 1 + RATE + ... + RATE^(n - 1) tokens, and plain decoding takes T(1) for each of them.
        What is accepted depends on the text, which is nearly the same in every format, so formats differ in T(1) / T(n)
        only. T(4) / T(1) alone would count short drafts only, while kernels for quantised weights often compute 8 rows
        in little more time than 4; perfect drafts would always make the longest draft count. The time per token,
        T(n) over the tokens, would mostly find the format that decodes fastest, and not what drafting adds to it.
        """
        return max(
            sum(RATE**row for row in range(rows)) * self.ms[0] / ms for rows, ms in zip(ROWS, self.ms, strict=True)
        )

    def cost_points(self, limit: int) -> CostPoints:
        """The cost curve for up to `limit` rows: more rows than the most that were timed take as much time per row."""
        rows: tuple[int, ...] = ROWS
        ms = self.ms
        if limit > ROWS[-1]:
            rows, ms = (*rows, limit), (*ms, round(ms[-1] * limit / ROWS[-1], 4))
        return CostPoints((CONTEXT,), rows, (ms,))


@dataclass(frozen=True, slots=True)
class FormatChoice:
    """The format to use.

    path      the file in that format
    packaged  name of the packaged file's format
    times     of every format that was compared, by its name
    fresh     names of those that were measured just now
    """

    name: str
    path: Path
    packaged: str
    times: Mapping[str, PassTimes]
    fresh: frozenset[str] = frozenset()

    def now(self, times: PassTimes) -> FormatChoice:
        """The same choice with the times of its format that were measured just now."""
        return replace(self, times={**self.times, self.name: times}, fresh=self.fresh | {self.name})

    @property
    def why(self) -> str:
        """One line with the measured figures."""
        own, rest = self.times[self.name], [name for name in self.times if name != self.name]
        others = ", ".join(f"{name} {self.times[name].ratio:.2f}" for name in rest)
        others += "" if self.fresh.issuperset(rest) else ", measured earlier"
        if not rest:
            what = "no other weight format of this model could be tried"
        elif max(times.gain for times in self.times.values()) <= 1:
            what = "drafting pays in no weight format of this model on this machine"
        elif self.name == self.packaged:
            what = "drafting gains clearly more in no other weight format of this model on this machine"
        else:
            what = f"of its weight formats, drafting gains most in {self.name} on this machine"
        return f"{what}: a pass over 4 tokens costs {own.ratio:.2f} times a pass over one" + (
            f" ({others})" if others else ""
        )


def chosen_format(
    packaged: Path,
    profile: Profile,
    *,
    again: bool = False,
    remember: bool = True,
    notify: Callable[[str], None] = lambda text: None,
) -> FormatChoice:
    """The format of the packaged model in which `profile` should gain most.

    again     measure although times are remembered
    remember  keep what is measured now, unless other programs keep cores busy meanwhile
    notify    receives what is done, where it takes seconds, and which format cannot be tried
    """
    from specplug.engines.llama_cpp.library_check import library_key
    from specplug.engines.llama_cpp.settings_table import comparable

    threads = profile.runtime.threads or hardware.usable_cores()
    conditions = SCHEMA, ROWS, CONTEXT, library_key(), threads, comparable(profile.runtime)
    kept = measurement_path(FOLDER, packaged, conditions)
    known = None if again else _read(kept)
    if known is not None:
        name, times = known
        best = best_format(times, name)
        copies = {} if best == name else _copies(packaged, [best], notify)
        if best == name or copies:
            return FormatChoice(best, copies.get(best, packaged), name, times)
    notify(f"comparing weight formats of the packaged model (some seconds, once): {', '.join(COPIES)}")
    with ExitStack() as stack:
        from specplug.engines.llama_cpp.model import open_model

        model = stack.enter_context(open_model(packaged, profile.runtime, notify))
        name = weight_format(model)
        wanted = [copy for copy in COPIES if copy != name]
        copies = _copies(packaged, wanted, notify)
        models = {name: model}
        for copy, path in copies.items():
            models[copy] = stack.enter_context(open_model(path, profile.runtime, notify))
        others = OtherWork()
        times = pass_times(models, profile)
        disturbed = is_too_much(others.cores())
    if remember and not disturbed and len(copies) == len(wanted):
        document = {"schema": SCHEMA, "packaged": name, "ms": {f: t.ms for f, t in times.items()}}
        keep(kept, json.dumps(document).encode())
    best = best_format(times, name)
    return FormatChoice(best, copies.get(best, packaged), name, times, frozenset(times))


def best_format(times: Mapping[str, PassTimes], packaged: str) -> str:
    """The format with the largest gain; the packaged one where no other gains more by TOLERANCE."""
    best = max(times, key=lambda name: times[name].gain)
    return best if times[best].gain > (1 + TOLERANCE) * times[packaged].gain else packaged


def weight_format(model: Model) -> str:
    """llama.cpp's name of a model's weight format in small letters, such as `bf16` or `q4_k - medium`."""
    return model.description.split(maxsplit=2)[-1].lower()


def pass_times(models: Mapping[str, Model], profile: Profile) -> dict[str, PassTimes]:
    """The times of the models' passes under the settings of `profile`, in rounds that alternate between the models.

    As many threads compute as there are free cores. Each pass runs twice in a row, and the faster one counts, since a
    change of the row count takes time of its own. Of an even number of rounds the lower middle is taken: other work can
    only make a pass slower.
    """
    from specplug.engines.llama_cpp.context import open_context
    from specplug.engines.llama_cpp.measure import PassTimer
    from specplug.engines.llama_cpp.settings_choice import with_settings
    from specplug.engines.llama_cpp.thread_following import thread_count, threads_now

    with ExitStack() as stack:
        timers = {}
        runtimes = {name: with_settings(profile, model).runtime for name, model in models.items()}
        free = thread_count(next(iter(runtimes.values())))
        for name, runtime in runtimes.items():
            cells = CONTEXT + ROWS[-1] + 64
            context = stack.enter_context(
                open_context(models[name], runtime, cells=cells, num_ids=2, max_rows=ROWS[-1])
            )
            timers[name] = PassTimer(context)
            timers[name].fill(CONTEXT)
        seen: dict[tuple[str, int], list[float]] = {(name, rows): [] for rows in ROWS for name in timers}
        began = perf_counter()
        for round_ in range(MOST_ROUNDS):
            for (name, rows), times in seen.items():
                elapsed = perf_counter() - began
                if round_ and elapsed > LONGEST:
                    break
                if free.changed():
                    for other, timer in timers.items():
                        timer.context.use_threads(*threads_now(free, runtimes[other]))
                times.append(min(timers[name].time(rows), timers[name].time(rows)))
            if perf_counter() - began > SECONDS:
                break
    return {name: PassTimes(tuple(round(median_low(seen[name, rows]), 4) for rows in ROWS)) for name in timers}


def _copies(packaged: Path, formats: list[str], notify: Callable[[str], None]) -> dict[str, Path]:
    """The packaged model in these formats, written where it is missing; without those that cannot be written."""
    from specplug.transforms.requantise import requantise

    folder = cache_folder() / "models"
    written = {}
    for name in formats:
        path = folder / f"{Path(packaged.stem).stem}-{name}.gguf"
        try:
            if not path.is_file() or path.stat().st_mtime < packaged.stat().st_mtime:
                requantise(packaged, path, name)
        except OSError as error:
            notify(f"{path}: cannot be written ({reason(path, error)}), so {name} is not tried")
        except SpecplugError as error:
            notify(f"{error}, so {name} is not tried; free some space")
        else:
            written[name] = path
    return written


def _read(path: Path) -> tuple[str, dict[str, PassTimes]] | None:
    """The packaged format and the remembered times; None where the file is missing or damaged."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        name = str(data["packaged"])
        times = {str(key): PassTimes(tuple(map(float, ms))) for key, ms in data["ms"].items()}
        usable = all(len(t.ms) == len(ROWS) and min(t.ms) > 0 for t in times.values())
        known = name in times and set(times) <= {name, *COPIES}
        return (name, times) if data["schema"] == SCHEMA and usable and known else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
