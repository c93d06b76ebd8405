"""Settings live against plain decoding, answer by answer, until the outcome is clear or the time is over.

Knows arms and pairs. Knows no engine inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter

from specplug.bench.arms import Arm
from specplug.tune.choose import Pairs, separated, still_open
from specplug.tune.replay import together
from specplug.tune.settings import NONE, Setting
from specplug.tune.trace import Trace

MOST_ROUNDS = 4
"""Over all answers; more would tell about the machine, not about the work."""

Seen = Mapping[str, Sequence[float]]
"""Of one group of answers: (tokens, seconds) by setting name, `none` among them."""


def confirm(
    arms: Mapping[Setting, Arm],
    trace: Trace,
    size: int,
    *,
    left: Callable[[], float],
    seen: Sequence[Seen] = (),
    keep: Callable[[Seen], object] = lambda seen: None,
    rounds: int = MOST_ROUNDS,
    until_clear: bool = True,
    progress: Callable[[Mapping[Setting, Pairs]], None] = lambda pairs: None,
) -> dict[Setting, Pairs]:
    """Pairs of each setting with NONE, whose arm is among `arms`; `size` prompts at a time, in the trace's order.

    left    seconds that remain
    rounds  over all answers, at most
    seen    groups measured earlier, from the first on; `keep` is given each new one

    A setting that cannot win any more is measured no further, unless `until_clear` is off.
    """
    groups = list(together(trace.answers, size))
    kinds = len(trace.categories())
    max_tokens: int = trace.about["max_tokens"]
    pairs = {setting: Pairs() for setting in arms if setting != NONE}
    for index, earlier in enumerate(seen):
        _add(pairs, groups[index % len(groups)][0].category, earlier)
    open_ = list(pairs)
    longest = 0.0
    for arm in arms.values():  # the first passes of a context are slow
        arm.answer([trace.answers[0].prompt], 4)
        arm.reset()
    for index in range(len(seen), rounds * len(groups)):
        if until_clear and index % kinds == 0 and index:
            open_ = still_open({setting: pairs[setting] for setting in open_}, kinds)
            if separated(pairs, open_) and index >= 2 * kinds:
                break
        if left() < longest:
            break
        if index % len(groups) == 0:
            for arm in arms.values():
                arm.reset()
        began = perf_counter()
        group = groups[index % len(groups)]
        running = [NONE, *open_]
        told: dict[str, list[float]] = {}
        for place in range(len(running)):
            setting = running[(place + index) % len(running)]
            results = arms[setting].answer([answer.prompt for answer in group], max_tokens)
            told[setting.name] = [sum(len(r.tokens) - 1 for r in results), sum(r.seconds for r in results)]
        longest = max(longest, perf_counter() - began)
        keep(told)
        _add(pairs, group[0].category, told)
        progress(pairs)
    return pairs


def _add(pairs: Mapping[Setting, Pairs], kind: str, told: Seen) -> None:
    plain = told[NONE.name]
    for setting, line in pairs.items():
        if setting.name in told:
            tokens, seconds = told[setting.name]
            line.add(kind, (int(tokens), seconds), (int(plain[0]), plain[1]))
