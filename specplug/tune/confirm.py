"""Settings live against plain decoding, answer by answer, until the outcome is clear or the time is over.

Knows arms and pairs. Knows no engine inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter

from specplug.bench.arms import Arm
from specplug.tune.candidates import PLAIN, Setting
from specplug.tune.replay import together
from specplug.tune.selection import Pairs, separated, still_open
from specplug.tune.trace import Answer, Trace

MOST_ROUNDS = 4
"""Over all answers; more would tell about the machine, not about the work."""

Seen = Mapping[str, Sequence[Sequence[float]]]
"""Of one group of answers: (tokens, seconds) of each, by setting name, plain decoding's among them."""

REST = "at rest"
"""In their place, what the engine that drafts does while nobody does."""


def confirm(
    arms: Mapping[Setting, Arm],
    trace: Trace,
    size: int,
    *,
    left: Callable[[], float],
    rest: Arm | None = None,
    seen: Sequence[Seen] = (),
    keep: Callable[[Seen], object] = lambda seen: None,
    progress: Callable[[Mapping[Setting, Pairs]], None] = lambda pairs: None,
    rounds: int = MOST_ROUNDS,
    until_clear: bool = True,
) -> dict[Setting, Pairs]:
    """Pairs of each setting with PLAIN, whose arm is among `arms`; `size` prompts at a time, in the trace's order.

    left    seconds that remain
    rest    the engine that drafts while nobody does, where it is another one than plain decoding's
    rounds  over all answers, at most
    seen    groups measured earlier, from the first on; `keep` is given each new one

    Unless `until_clear` is off, a setting that cannot win any more is measured no further, and after every round over
    all answers it is asked whether the outcome is clear: asked more often, luck would end it.
    """
    groups = list(together(trace.answers, size))
    kinds = trace.categories()
    max_tokens: int = trace.about["max_tokens"]
    if rest is not None:  # what an older version wrote knows none, and is measured again
        seen = [earlier for earlier in seen if REST in earlier]
    pairs = {setting: Pairs() for setting in arms if setting != PLAIN}
    for index, earlier in enumerate(seen):
        _add(pairs, groups[index % len(groups)], earlier)
    open_ = list(pairs)
    longest = 0.0
    every = {setting.name: arm for setting, arm in arms.items()} | ({REST: rest} if rest is not None else {})
    if left() > 0:
        for arm in every.values():  # the first passes of a context are slow
            arm.answer([trace.answers[0].prompt], 4)
    for index in range(len(seen), rounds * len(groups)):
        whole = index % len(groups) == 0
        if until_clear and index and (whole or index % len(kinds) == 0):
            open_ = still_open({setting: pairs[setting] for setting in open_}, kinds)
            if not open_ or (whole and separated(pairs, open_)):
                break
        if left() <= longest:
            break
        if whole or index == len(seen):
            for arm in every.values():
                arm.reset()
        began = perf_counter()
        group = groups[index % len(groups)]
        running = [PLAIN.name, *(setting.name for setting in open_), *([REST] if rest is not None else [])]
        told: dict[str, list[list[float]]] = {}
        for place in range(len(running)):
            name = running[(place + index) % len(running)]
            results = every[name].answer([answer.prompt for answer in group], max_tokens)
            told[name] = [[len(r.tokens) - 1, r.seconds] for r in results]
        longest = max(longest, perf_counter() - began)
        keep(told)
        _add(pairs, group, told)
        progress(pairs)
    return pairs


def _add(pairs: Mapping[Setting, Pairs], group: Sequence[Answer], told: Seen) -> None:
    name = " ".join(_key(answer) for answer in group)
    for setting, line in pairs.items():
        rests = told.get(REST, [()] * len(group))
        for answer, own, plain, rest in zip(group, told.get(setting.name, ()), told[PLAIN.name], rests, strict=False):
            line.add(name, answer.category, _key(answer), [*own, *plain, *rest])


def _key(answer: Answer) -> str:
    return f"{answer.prompt_id}/{answer.turn}"
