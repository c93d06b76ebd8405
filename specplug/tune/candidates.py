"""Which settings are tried: every registered method, its options, pairs of methods, and drafts of fixed size.

This module depends on the names and options of methods, not on costs or a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

from specplug import registry
from specplug.core import Requires
from specplug.planning.batch_size_schedule import Range, in_words
from specplug.profile import PlannerSettings, Profile
from specplug.profile.with_drafter import DRAFTERS, drafters_of, short_option
from specplug.registry import ProposerSpec
from specplug.tune.exits import chooses_by_layers, is_choosing

OPTIONS: Mapping[str, Mapping[str, Sequence[Any]]] = {
    "ngram": {"min_match": (1, 2, 3), "max_match": (3, 6, 12), "max_draft": (4, 10, 24)},
    "suffix": {"max_draft": (8, 32), "occurrences": (1, 8), "min_prob": (0.05, 0.2)},
    "token_recycling": {"k": (4, 8)},
}
"""The values that are tried for the options of built-in methods, their defaults included. Other methods are tried with
their default options only."""

MAX_NODES = (8, 24)
"""Largest drafts, in tokens, that are tried where the planner chooses the size from measured costs."""

CHAINS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Sizes, in tokens, of the chains that are tried as drafts of fixed size."""

TREES = (2, 4, 8, 16)
"""Sizes, in tokens, of the trees that are tried as drafts of fixed size."""

PAPER_NODES = 80
"""Size, in tokens, of the tree of the Token Recycling paper (arXiv 2408.08696)."""

LONGEST = 8
"""Most draft tokens of a drafter, or for one sequence of a batch: with more of them, a pass costs more than they
save."""

WITH_DRAFTERS = (("suffix", "token_recycling"), ("suffix",), ("ngram",))
"""The methods that are tried together with a drafter; suffix lookup is tried with corpora beside it, too."""

PRUNED = (1, 2)
"""Values of `prune_top_k` that are tried where a drafter is combined with other methods. With larger ones as many
tokens are accepted as with what is learned (benchmarks/rasd.py)."""

BUILTIN_METHOD = "builtin"
"""The method that names a drafter of the engine's own."""

BUILTIN = {"name": "ngram", "prompt_lookup_min": 2, "prompt_lookup_max": 5}
"""Options of the engine's own drafter that is tried beside our methods, on engines that have one."""

BUILTIN_ON_DEVICE = {**BUILTIN, "name": "ngram_gpu"}
"""The same for vLLM's V2 runner."""


@dataclass(frozen=True, slots=True)
class Setting:
    """The part of a profile that is tuned: the proposers and the planner.

    lengths  draft tokens by the number of running sequences, where all sequences of a batch have the same number
    """

    proposers: tuple[ProposerSpec, ...]
    planner: PlannerSettings
    lengths: tuple[Range, ...] = ()

    def __hash__(self) -> int:
        return hash(self.name)  # options are mappings, which have no hash

    @property
    def method(self) -> str:
        """The methods without options, such as `suffix + token_recycling`."""
        return " + ".join(spec.method for spec in self.proposers)

    @property
    def name(self) -> str:
        """A unique and readable name, such as `ngram(min_match=2), static 4 chain`."""
        methods = []
        for spec in self.proposers:
            inside = ", ".join(f"{key}={short_option(key, value)}" for key, value in sorted(spec.options.items()))
            methods.append(f"{spec.method}({inside})" if inside else spec.method)
        planner = self.planner
        if not self.speculates:
            return "none"
        if self.lengths:
            return f"{' + '.join(methods)}, {in_words(self.lengths)}"
        shape = f"{planner.mode} {planner.max_nodes}{'' if planner.trees else ' chain'}"
        pruned = f", top {planner.prune_top_k}" if planner.prune_top_k is not None else ""
        return f"{' + '.join(methods)}, {shape}{pruned}"

    @property
    def speculates(self) -> bool:
        return any(spec.method != "none" for spec in self.proposers)

    def profile(self, base: Profile, name: str) -> Profile:
        """The base profile with these proposers and this planner."""
        vllm = base.vllm
        if base.engine == "vllm" and self.speculates:
            vllm = replace(vllm, num_speculative_tokens=self.planner.max_nodes, tokens_per_batch_size=self.lengths)
        return replace(
            base, name=name, proposers=self.proposers, planner=self.planner, vllm=vllm, measured=None, evidence={}
        )


PLAIN = Setting((ProposerSpec("none"),), PlannerSettings())
"""Plain decoding."""


def grid(
    provides: Requires, *, trees: bool = True, most_nodes: int = 1 << 20, named: Sequence[ProposerSpec] = ()
) -> list[Setting]:
    """Every setting to try on an engine, most promising first, without plain decoding.

    provides    what the engine provides to proposers
    trees       whether the engine verifies trees
    most_nodes  draft tokens that a draft can have: it limits measured planners, and excludes larger fixed drafts
    named       what the user named: drafters, to try alone and together with the methods that look up tokens; and
                corpora, to try as one more such method
    """
    methods = usable_methods(provides)
    settings: dict[str, Setting] = {}
    for setting in _all_settings(methods, trees, provides.builtin, named) if most_nodes >= 1 else ():
        planner = setting.planner
        if planner.max_nodes > most_nodes:
            if planner.mode == "static":
                continue
            setting = replace(setting, planner=replace(planner, max_nodes=most_nodes))
        settings.setdefault(setting.name, setting)
    return list(settings.values())


def _all_settings(
    methods: Sequence[str], trees: bool, builtin: bool, named: Sequence[ProposerSpec]
) -> Iterator[Setting]:
    """All settings, most promising first, so that a replay that runs out of time has tried those."""
    drafters = drafters_of(named)
    corpora = [spec for spec in named if spec not in drafters]
    combined = alone_and_in_pairs([*map(ProposerSpec, methods), *corpora])
    for nodes in reversed(MAX_NODES):
        for specs in combined:
            yield Setting(specs, PlannerSettings(max_nodes=nodes, trees=trees))
    lookups = [tuple(ProposerSpec(method) for method in found) for found in WITH_DRAFTERS if set(found) <= {*methods}]
    lookups += [(ProposerSpec("suffix"), spec) for spec in corpora if "suffix" in methods]
    for drafter in drafters:
        if chooses_by_layers(drafter):
            longest = int(drafter.options["max_draft"])
            yield Setting((drafter,), PlannerSettings(mode="static", max_nodes=longest, trees=False))
            continue
        for specs in (*lookups, ()):
            for nodes in reversed(MAX_NODES):
                yield Setting((*specs, drafter), PlannerSettings(max_nodes=nodes, trees=trees))
            for top in PRUNED if specs else ():
                yield Setting(
                    (*specs, drafter), PlannerSettings(max_nodes=max(MAX_NODES), trees=trees, prune_top_k=top)
                )
        for nodes in CHAINS if not is_choosing(drafter) else ():
            if nodes <= LONGEST:
                yield Setting((drafter,), PlannerSettings(mode="static", max_nodes=nodes, trees=False))
    for specs in combined:
        for nodes in CHAINS:
            yield Setting(specs, PlannerSettings(mode="static", max_nodes=nodes, trees=False))
        for nodes in TREES if trees else ():
            yield Setting(specs, PlannerSettings(mode="static", max_nodes=nodes))
    for nodes in CHAINS if builtin else ():
        yield Setting(
            (ProposerSpec(BUILTIN_METHOD, BUILTIN),), PlannerSettings(mode="static", max_nodes=nodes, trees=False)
        )
    for method in methods:
        for specs in _with_options(method):
            yield Setting(specs, PlannerSettings(max_nodes=max(MAX_NODES), trees=trees))
    if trees:
        for specs in combined:
            yield Setting(specs, PlannerSettings(max_nodes=max(MAX_NODES), trees=False))
    if trees and "token_recycling" in methods:
        paper = (ProposerSpec("token_recycling", {"shape": "paper"}),)
        yield Setting(paper, PlannerSettings(max_nodes=max(MAX_NODES)))
        yield Setting(paper, PlannerSettings(mode="static", max_nodes=PAPER_NODES))


def _with_options(method: str) -> Iterator[tuple[ProposerSpec, ...]]:
    """The method with every combination of the values in OPTIONS; defaults are left out of the spec."""
    values = OPTIONS.get(method, {})
    defaults = {key: option.default for key, option in registry.options(method).items()} if values else {}
    for combination in product(*values.values()):
        options = {key: value for key, value in zip(values, combination, strict=True) if value != defaults[key]}
        yield (ProposerSpec(method, options),)


def usable_methods(provides: Requires) -> list[str]:
    """The methods that can be built without options, and of which the engine provides everything that they require.

    Those that draft with a model are tried where they are named. Recorded answers have no constraints, so methods that
    require them are not tried.
    """
    provides = replace(provides, constraint=False)
    return [name for name in registry.names() if name not in ("none", *DRAFTERS) and is_usable(name, provides)]


def alone_and_in_pairs(specs: Sequence[ProposerSpec]) -> list[tuple[ProposerSpec, ...]]:
    return [*((spec,) for spec in specs), *combinations(specs, 2)]


def is_usable(method: str, provides: Requires) -> bool:
    """Whether the method can be built without options, and the engine provides everything that it requires."""
    if any(option.required for option in registry.options(method).values()):
        return False
    (proposer,) = registry.build_sources([ProposerSpec(method)])
    return not proposer.requires.missing_from(provides)
