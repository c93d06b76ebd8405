"""One way to run a server: its flags, and the lookup rule that says what it would draft.

Knows no server's flags; those are in llama_candidates.py and vllm_candidates.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specplug.errors import SpecplugError
from specplug.tune.server_flags.lookup_rules import Chain, LookupRule, NgramSimple, VllmNgram
from specplug.tune.server_flags.ngram_cache_rule import NgramCache
from specplug.tune.server_flags.ngram_map_rule import NgramMap
from specplug.tune.server_flags.ngram_mod_rule import NgramMod

PLAIN_NAME = "none"
ENGINE_NAME = "specplug"
"""The row of specplug's own engine, which no flag of the server stands for."""


@dataclass(frozen=True, slots=True)
class RuleSizes:
    """A lookup method, and its sizes in the order of the flags: two numbers, for some a third."""

    method: str
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Drafts:
    """A drafter's file, up to how many tokens it drafts, and the probability below which it stops."""

    file: str
    length: int
    least_probability: float = 0.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run the server.

    family  those of which the best by prediction is run live
    flags   after the user's own
    rules   the lookup that the flags mean, in the order in which the server asks; empty where it is not known
    drafts  the drafter, asked after the rules; None without one
    bounded whether drafts end before the limit of an answer's length
    usual   whether it is the one of its family to run where none of them was predicted
    """

    name: str
    family: str
    flags: tuple[str, ...] = ()
    rules: tuple[RuleSizes, ...] = ()
    drafts: Drafts | None = None
    bounded: bool = True
    usual: bool = False


PLAIN = Candidate(PLAIN_NAME, PLAIN_NAME)


def open_rule(sizes: Sequence[RuleSizes]) -> LookupRule:
    """The rule, with an empty memory."""
    rules = [_rule(one) for one in sizes]
    return rules[0] if len(rules) == 1 else Chain(rules)


def short_name(model: str) -> str:
    """The last part of a path or reference."""
    return model.rstrip("/").rpartition("/")[2]


def _rule(one: RuleSizes) -> LookupRule:
    match one.method, one.sizes:
        case "ngram-simple", (n, m):
            return NgramSimple(n, m)
        case "ngram-map-k", (n, m):
            return NgramMap(n, m, key_only=True)
        case "ngram-map-k4v", (n, m, hits):
            return NgramMap(n, m, key_only=False, min_hits=hits)
        case "ngram-mod", (match_length, shortest, longest):
            return NgramMod(match_length, shortest, longest)
        case "ngram-cache", ():
            return NgramCache()
        case "vllm-ngram", (length, shortest, longest):
            return VllmNgram(length, shortest, longest)
    raise SpecplugError(f"{one.method}: no rule with {len(one.sizes)} sizes is known")
