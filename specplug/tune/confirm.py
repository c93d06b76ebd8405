"""Runs settings live against plain decoding, answer by answer, until the outcome is clear or the time is over.

This module depends on arms and on paired measurements, not on an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter

from specplug.bench.arms import Arm
from specplug.tune.candidates import PLAIN, Setting
from specplug.tune.replay import grouped
from specplug.tune.selection import Pairs, is_decided, undecided
from specplug.tune.trace import Answer, Trace

MOST_ROUNDS = 4
"""Most rounds over all answers. Repeats do not add answers: more of them would measure the machine, not the work."""

Measurements = Mapping[str, Sequence[Sequence[float]]]
"""For one group of answers, the (tokens, seconds) of each, by the name of the setting; plain decoding is included."""

IDLE = "at rest"
"""Stands for a setting's name in measurements of the drafting engine with drafting disabled. Journals have this key."""


def confirm(
    arms: Mapping[Setting, Arm],
    trace: Trace,
    size: int,
    *,
    left: Callable[[], float],
    idle: Arm | None = None,
    earlier: Sequence[Measurements] = (),
    store: Callable[[Measurements], object] = lambda measured: None,
    progress: Callable[[Mapping[Setting, Pairs]], None] = lambda pairs: None,
    rounds: int = MOST_ROUNDS,
    until_clear: bool = True,
) -> dict[Setting, Pairs]:
    """Measure each setting in pairs with PLAIN, whose arm is among `arms`; `size` prompts at a time, in trace order.

    left     returns the seconds that remain
    idle     the drafting engine with drafting disabled, where plain decoding has an engine of its own
    earlier  the groups that were measured before an interruption, from the first one on
    store    receives the measurements of each new group
    rounds   most rounds over all answers

    With `until_clear`, a setting that can no longer win is not measured any further, and measuring ends when the
    outcome is clear. That is checked only after complete rounds: with more frequent checks, noise would end it.
    """
    groups = list(grouped(trace.answers, size))
    categories = trace.categories()
    max_tokens: int = trace.about["max_tokens"]
    if idle is not None:  # older versions did not measure the idle engine: such groups are measured again
        earlier = [measured for measured in earlier if IDLE in measured]
    pairs = {setting: Pairs() for setting in arms if setting != PLAIN}
    for index, measured in enumerate(earlier):
        _add(pairs, groups[index % len(groups)], measured)
    open_ = list(pairs)
    longest = 0.0
    every = {setting.name: arm for setting, arm in arms.items()} | ({IDLE: idle} if idle is not None else {})
    if left() > 0:
        for arm in every.values():  # the first passes of a context are slow
            arm.answer([trace.answers[0].prompt], 4)
    for index in range(len(earlier), rounds * len(groups)):
        new_round = index % len(groups) == 0
        if until_clear and index and (new_round or index % len(categories) == 0):
            open_ = undecided({setting: pairs[setting] for setting in open_}, categories)
            if not open_ or (new_round and is_decided(pairs, open_)):
                break
        if left() <= longest:
            break
        if new_round or index == len(earlier):
            for arm in every.values():
                arm.reset()
        began = perf_counter()
        group = groups[index % len(groups)]
        running = [PLAIN.name, *(setting.name for setting in open_), *([IDLE] if idle is not None else [])]
        found: dict[str, list[list[float]]] = {}
        for place in range(len(running)):
            name = running[(place + index) % len(running)]
            results = every[name].answer([answer.prompt for answer in group], max_tokens)
            found[name] = [[len(r.tokens) - 1, r.seconds] for r in results]
        longest = max(longest, perf_counter() - began)
        store(found)
        _add(pairs, group, found)
        progress(pairs)
    return pairs


def _add(pairs: Mapping[Setting, Pairs], group: Sequence[Answer], measured: Measurements) -> None:
    name = " ".join(_key(answer) for answer in group)
    for setting, line in pairs.items():
        idles = measured.get(IDLE, [()] * len(group))
        for answer, own, plain, idle in zip(
            group, measured.get(setting.name, ()), measured[PLAIN.name], idles, strict=False
        ):
            line.add(name, answer.category, _key(answer), [*own, *plain, *idle])


def _key(answer: Answer) -> str:
    return f"{answer.prompt_id}/{answer.turn}"
