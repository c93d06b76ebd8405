"""Chooses engine settings by the time of whole requests, for plain decoding and for drafting.

Works on measured costs and recorded answers. It measures nothing, and does not depend on an engine.

Plain decoding has one output under each setting, so it takes the fastest one. Drafting gives the output of plain
decoding under the same setting to the last bit only in passes of at most `equal_rows` rows; in larger passes the
difference of two logits can change by rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from specplug.engines.llama_cpp.settings_table import label
from specplug.planning.request_time import ALL_ROWS, SettingCosts
from specplug.profile import PlannerSettings, Runtime
from specplug.registry import ProposerSpec
from specplug.tune.candidates import Setting, alone_and_in_pairs
from specplug.tune.expense import Expense
from specplug.tune.prediction import Costs
from specplug.tune.replay import replay
from specplug.tune.trace import Trace

FEWEST_EQUAL_NODES = 2
"""A setting under which fewer draft tokens leave the rounding alone counts as one that rounds."""

REPLAYED_ANSWERS = 12
"""Answers over which drafting is predicted for every setting."""

UNLIMITED = 1 << 20
"""Draft tokens where nothing limits them."""

TOLERANCE = 0.03
"""A setting that takes this share longer than the fastest one is as good, and the more usual one is taken."""

Requests = Sequence[tuple[int, int]]
"""Tokens of the prompt, and of the answer after its first token, of each request."""


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """The settings of one tune, all measured.

    table     costs of the settings that were not far slower than others, the most usual ones first
    plain     the setting with which plain decoding is fastest
    drafting  the setting under which drafts are tried
    stock     the setting that the engine takes by itself, if it was measured
    nodes     most draft tokens of a pass under `drafting`
    equal     whether passes with that many draft tokens round as plain decoding does
    drafted   predicted milliseconds of all requests with drafting, by setting
    rounding  the same for settings, and numbers of draft tokens, that may change the rounding
    """

    table: Mapping[Runtime, SettingCosts]
    requests: Requests
    plain: Runtime
    drafting: Runtime
    stock: Runtime
    nodes: int
    equal: bool
    drafted: Mapping[Runtime, float] = field(default_factory=dict)
    rounding: Mapping[Runtime, float] = field(default_factory=dict)

    @property
    def plain_scale(self) -> float:
        """Time of plain decoding under its own setting, relative to that under the setting for drafts."""
        own, other = (_token_ms(self.table[one], self.requests) for one in (self.plain, self.drafting))
        return own / other

    def pays(self, speedup: float) -> bool:
        """Whether whole requests are faster with drafts, which make tokens `speedup` times as fast as plain decoding
        under its own setting; prompts are read under the setting for drafts."""
        reading, plain_reading = (
            sum(self.table[one].reading_ms(prompt) for prompt, _ in self.requests)
            for one in (self.drafting, self.plain)
        )
        tokens = _token_ms(self.table[self.plain], self.requests)
        return reading + tokens / speedup < plain_reading + tokens

    def as_mapping(self) -> dict[str, Any]:
        """The part `engine_settings` of the document of `tune --json`; times are of the mean request."""
        count = len(self.requests)
        plain = request_ms(self.table[self.plain], self.requests)
        stock = request_ms(self.table[self.stock], self.requests) if self.stock in self.table else None
        best_rounding = min(self.rounding.values(), default=None)
        own = self.drafted.get(self.drafting)
        return {
            "plain": label(self.plain),
            "drafting": label(self.drafting),
            "stock": label(self.stock),
            "settings_speedup": None if stock is None else round(stock / plain, 4),
            "most_draft_tokens": self.nodes,
            "equal": self.equal,
            "equality_costs": round(own / best_rounding, 4) if own and best_rounding and self.equal else None,
            "request": {
                "prompt_tokens": round(sum(prompt for prompt, _ in self.requests) / count),
                "tokens": round(sum(tokens for _, tokens in self.requests) / count),
            },
            "settings": [
                {
                    "setting": label(one),
                    "equal_rows": costs.equal_rows,
                    "reading_ms": round(sum(costs.reading_ms(prompt) for prompt, _ in self.requests) / count, 1),
                    "plain_ms": round(request_ms(costs, self.requests) / count, 1),
                    "drafted_ms": _mean(self.drafted.get(one), count),
                    "rounding_ms": _mean(self.rounding.get(one), count),
                    **costs.as_mapping(),
                }
                for one, costs in sorted(self.table.items(), key=lambda item: request_ms(item[1], self.requests))
            ],
        }


def first_choice(
    table: Mapping[Runtime, SettingCosts],
    stock: Runtime,
    requests: Requests,
    *,
    base: Runtime,
    sequences: int,
    allow_rounding: bool,
) -> EngineChoice:
    """The choice by plain decoding alone: what drafting gains is not known before answers were recorded.

    base  the settings that the user named, which are kept; only the engine's own setting in `table` may differ
    """
    times = {one: request_ms(costs, requests) for one, costs in table.items() if _keeps(base, one)}
    plain = _fastest(times)
    nodes = {one: equal_nodes(table[one], sequences) for one in times}
    equal = {one: ms for one, ms in times.items() if nodes[one] >= FEWEST_EQUAL_NODES}
    if allow_rounding or not equal:
        return EngineChoice(table, requests, plain, plain, stock, UNLIMITED, False)
    drafting = _fastest(equal)
    return EngineChoice(table, requests, plain, drafting, stock, nodes[drafting], True)


def choose_with_drafts(
    choice: EngineChoice,
    trace: Trace,
    expense: Expense,
    methods: Sequence[ProposerSpec],
    *,
    base: Runtime,
    allow_rounding: bool,
) -> EngineChoice:
    """The choice by what drafting gains under each setting: every method is replayed over some recorded answers.

    methods  to try alone and in pairs

    For one sequence at a time. Without `allow_rounding`, settings and draft sizes that may change the rounding are
    taken only where there is nothing else.
    """
    short = replace(trace, answers=trace.answers[:REPLAYED_ANSWERS])
    drafted: dict[Runtime, float] = {}
    rounding: dict[Runtime, float] = {}
    for one, costs in choice.table.items():
        if not _keeps(base, one):
            continue
        nodes = equal_nodes(costs, 1)
        if nodes >= FEWEST_EQUAL_NODES:
            drafted[one] = _drafted_ms(costs, nodes, short, expense, methods, choice.requests)
        if costs.equal_rows < ALL_ROWS:
            rounding[one] = _drafted_ms(costs, UNLIMITED, short, expense, methods, choice.requests)
    options = {(one, True): ms for one, ms in drafted.items()}
    if allow_rounding or not options:
        options |= {(one, False): ms for one, ms in rounding.items()}
    drafting, equal = _fastest(options)
    nodes = equal_nodes(choice.table[drafting], 1) if equal else UNLIMITED
    return replace(choice, drafting=drafting, nodes=nodes, equal=equal, drafted=drafted, rounding=rounding)


T = TypeVar("T")


def _fastest(times: Mapping[T, float]) -> T:
    """The first one that takes at most 1 + TOLERANCE times as long as the fastest."""
    return next(one for one, ms in times.items() if ms <= (1 + TOLERANCE) * min(times.values()))


def _keeps(base: Runtime, setting: Runtime) -> bool:
    """Whether a setting has the attention kernel and the cache type that the user named."""
    return base.flash_attention in (None, setting.flash_attention) and base.kv_type in (None, setting.kv_type)


def equal_nodes(costs: SettingCosts, sequences: int) -> int:
    """The most draft tokens of a pass over `sequences` sequences that leave the rounding alone."""
    return max(0, costs.equal_rows - sequences)


def request_ms(costs: SettingCosts, requests: Requests) -> float:
    """Milliseconds of all requests without drafts."""
    return sum(costs.plain_ms(prompt, tokens) for prompt, tokens in requests)


def with_setting(runtime: Runtime, setting: Runtime) -> Runtime:
    """The runtime with the attention kernel, the cache type and the settings for weights of another one."""
    return replace(
        runtime,
        flash_attention=setting.flash_attention,
        kv_type=setting.kv_type,
        repack=setting.repack,
        mmap=setting.mmap,
        gpu_layers=setting.gpu_layers,
    )


def _token_ms(costs: SettingCosts, requests: Requests) -> float:
    """Milliseconds of all tokens after the first one of every request, without drafts."""
    return sum(costs.plain_ms(prompt, tokens) - costs.reading_ms(prompt) for prompt, tokens in requests)


def _drafted_ms(
    costs: SettingCosts,
    nodes: int,
    trace: Trace,
    expense: Expense,
    methods: Sequence[ProposerSpec],
    requests: Requests,
) -> float:
    """Predicted milliseconds of all requests with the method that gains most, or without drafts if none gains."""
    planner = PlannerSettings(max_nodes=min(nodes, costs.rows[-1] - 1, PlannerSettings().max_nodes))
    tried = [Setting(specs, planner) for specs in alone_and_in_pairs(methods)]
    speedups = [replay(setting, trace, Costs(costs.points, expense)).total.speedup for setting in tried]
    tokens = _token_ms(costs, requests)
    return request_ms(costs, requests) - tokens + tokens / max(1.0, *speedups)


def _mean(total: float | None, count: int) -> float | None:
    return None if total is None else round(total / count, 1)
