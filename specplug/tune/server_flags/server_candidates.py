"""What can be tried on a llama-server: names, flags, and the lookup rule that says what each would draft.

Knows the flags of llama-server. It starts nothing, and asks only what a help text offers. A candidate of another server
is a Candidate, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from specplug.errors import SpecplugError
from specplug.subjects.help_text import Help
from specplug.tune.server_flags.lookup_rules import Chain, LookupRule, NgramSimple, VllmNgram
from specplug.tune.server_flags.ngram_cache_rule import NgramCache
from specplug.tune.server_flags.ngram_map_rule import NgramMap
from specplug.tune.server_flags.ngram_mod_rule import NgramMod

PLAIN_NAME = "none"
ENGINE_NAME = "specplug"
"""The row of specplug's own engine, which no flag of the server stands for."""

SIZES_N = (2, 3, 4, 8, 12)
"""Tokens that are looked up."""

SIZES_M = (2, 3, 4, 6, 8, 12, 16, 24, 48)
"""Draft tokens."""

MIN_HITS = (1, 2)
DRAFT_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16)
LEAST_PROBABILITIES = (0.0, 0.5, 0.75, 0.9)
HEAD_LENGTHS = (1, 2, 3)
LOOKUP_TYPES = ("ngram-simple", "ngram-map-k", "ngram-map-k4v", "ngram-mod", "ngram-cache")
"""llama-server's, in the order in which it asks chained types. Source: common_speculative_init."""

HEAD_TYPES = {"mtp": "draft-mtp", "eagle3": "draft-eagle3"}


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
    """

    name: str
    family: str
    flags: tuple[str, ...] = ()
    rules: tuple[RuleSizes, ...] = ()
    drafts: Drafts | None = None
    bounded: bool = True


PLAIN = Candidate(PLAIN_NAME, PLAIN_NAME)


def open_rule(sizes: Sequence[RuleSizes]) -> LookupRule:
    """The rule, with an empty memory."""
    rules = [_rule(one) for one in sizes]
    return rules[0] if len(rules) == 1 else Chain(rules)


def llama_candidates(
    offered: Help, *, drafters: Sequence[str] = (), heads: Sequence[tuple[str, str | None]] = ()
) -> tuple[list[Candidate], list[str]]:
    """All candidates of a llama-server but plain decoding; and one sentence for each kind that this build lacks.

    drafters  files of models that can draft
    heads     kind of a head (`mtp` or `eagle3`) and its file, None for a layer of the model's own file
    """
    found: list[Candidate] = []
    missing = [
        f"{kind}: this build has no such --spec-type"
        for kind in (*LOOKUP_TYPES, *(["draft-simple"] if drafters else []), *(HEAD_TYPES[head] for head, _ in heads))
        if kind not in offered.spec_types and not (kind == "draft-simple" and _draft_flag(offered))
    ]
    for kind in LOOKUP_TYPES:
        if kind in offered.spec_types:
            found += _lookups(offered, kind)
    for file in drafters:
        found += _drafted(offered, file)
    for head, path in heads:
        if HEAD_TYPES[head] in offered.spec_types:
            found += _heads(offered, head, path)
    return found, missing


def chained(lookup: Candidate, drafting: Candidate) -> Candidate | None:
    """A lookup type of llama-server, and a drafter or head where it finds nothing; None where flags do not combine."""
    types = [_value(candidate.flags, "--spec-type") for candidate in (lookup, drafting)]
    if None in types:
        return None
    rest = [flag for candidate in (lookup, drafting) for flag in _without(candidate.flags, "--spec-type")]
    return replace(
        drafting,
        name=f"{lookup.name} + {drafting.name}",
        family=f"{lookup.family} + {drafting.family}",
        flags=("--spec-type", ",".join(map(str, types)), *rest),
        rules=(*lookup.rules, *drafting.rules),
    )


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


def _lookups(offered: Help, kind: str) -> list[Candidate]:
    """One type of lookup with all its sizes, the build's own first."""
    if kind == "ngram-cache":
        return [Candidate(kind, kind, ("--spec-type", kind), (RuleSizes(kind),))]
    names: tuple[str, ...]
    sizes: list[tuple[int, ...]]
    if kind == "ngram-mod":
        names = ("--spec-ngram-mod-n-match", "--spec-ngram-mod-n-min", "--spec-ngram-mod-n-max")
        sizes = [(n, least, m) for n in SIZES_N for m in SIZES_M for least in (1, m // 2)]
    elif kind == "ngram-map-k4v":
        names = tuple(f"--spec-{kind}-{part}" for part in ("size-n", "size-m", "min-hits"))
        sizes = [(n, m, hits) for n in SIZES_N for m in SIZES_M for hits in MIN_HITS]
    else:  # the others have a flag for min-hits, and do not read it
        names = tuple(f"--spec-{kind}-{part}" for part in ("size-n", "size-m"))
        sizes = [(n, m) for n in SIZES_N for m in SIZES_M]
    defaults = tuple(_number(offered.default(name)) for name in names)
    if None in defaults:
        return [Candidate(f"{kind}, the server's own sizes", kind, ("--spec-type", kind))]
    own = tuple(number for number in defaults if number is not None)
    found = [Candidate(_sized(kind, own), kind, ("--spec-type", kind), (RuleSizes(kind, own),))]
    for size in dict.fromkeys(sizes):
        if size != own:
            flags = [word for name, number in zip(names, size, strict=True) for word in (name, str(number))]
            found.append(Candidate(_sized(kind, size), kind, ("--spec-type", kind, *flags), (RuleSizes(kind, size),)))
    return found


def _sized(kind: str, sizes: Sequence[int]) -> str:
    if kind == "ngram-mod":
        return f"{kind} {sizes[0]}, {sizes[1]} to {sizes[2]} drafted"
    hits = f", from hit {sizes[2]}" if len(sizes) > 2 and sizes[2] > 1 else ""
    return f"{kind} {sizes[0]}, {sizes[1]} drafted{hits}"


def _draft_flag(offered: Help) -> str | None:
    return offered.spelling("--spec-draft-model", "--model-draft", "-md")


def _drafted(offered: Help, file: str) -> list[Candidate]:
    model = _draft_flag(offered)
    length_flag = offered.spelling("--spec-draft-n-max", "--draft-max")
    if model is None or length_flag is None:
        return []
    kind = ("--spec-type", "draft-simple") if "draft-simple" in offered.spec_types else ()
    least_flag = offered.spelling("--spec-draft-p-min", "--draft-p-min")
    found = []
    for length in DRAFT_LENGTHS:
        for least in LEAST_PROBABILITIES if least_flag else (0.0,):
            if least and length < 3:
                continue
            stop = (least_flag, str(least)) if least_flag else ()
            name = f"{short_name(file)}, {length} drafted" + (f" from probability {least}" if least else "")
            flags = (*kind, model, file, length_flag, str(length), *stop)
            found.append(Candidate(name, short_name(file), flags, drafts=Drafts(file, length, least)))
    return found


def _heads(offered: Help, kind: str, file: str | None) -> list[Candidate]:
    length_flag = offered.spelling("--spec-draft-n-max", "--draft-max")
    model = _draft_flag(offered)
    if length_flag is None or (file is not None and model is None):
        return []
    named = (model, file) if file is not None and model is not None else ()
    return [
        Candidate(
            f"{kind}, {length} drafted", kind, ("--spec-type", HEAD_TYPES[kind], *named, length_flag, str(length))
        )
        for length in HEAD_LENGTHS
    ]


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None


def short_name(model: str) -> str:
    """The last part of a path or reference."""
    return model.rstrip("/").rpartition("/")[2]


def _value(flags: Sequence[str], name: str) -> str | None:
    return flags[flags.index(name) + 1] if name in flags else None


def _without(flags: Sequence[str], name: str) -> list[str]:
    at = flags.index(name)
    return [*flags[:at], *flags[at + 2 :]]
