"""What can be tried on a llama-server: each lookup type with its sizes, drafters, heads, and chains of two.

Knows which sizes are worth trying; how a build spells them is in `specplug.subjects.spec_spelling`. It starts nothing,
and asks only what a help text offers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from specplug.subjects.help_text import Help
from specplug.subjects.spec_spelling import DRAFTER, MOST, drafter_flags, lookup_defaults, lookup_flags
from specplug.tune.server_flags.server_candidates import Candidate, Drafts, RuleSizes, short_name

SIZES_N = (2, 3, 4, 8, 12)
"""Tokens that are looked up."""

SIZES_M = (2, 3, 4, 6, 8, 12, 16, 24, 48)
"""Draft tokens."""

MIN_HITS = (1, 2)
DRAFT_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16)
LEAST_PROBABILITIES = (0.0, 0.5, 0.75, 0.9)
HEAD_LENGTHS = (1, 2, 3)
USUAL_LOOKUP = (3, 8)
"""Tokens looked up and draft tokens of a lookup that was not predicted."""

USUAL_DRAFT, USUAL_HEAD = 3, 2
"""Draft tokens of a model, and of a head, that was not predicted."""

LOOKUP_TYPES = ("ngram-simple", "ngram-map-k", "ngram-map-k4v", "ngram-mod", "ngram-cache")
"""llama-server's, in the order in which it asks chained types. Source: common_speculative_init."""

HEAD_TYPES = {"mtp": "draft-mtp", "eagle3": "draft-eagle3"}


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
        for kind in (*LOOKUP_TYPES, *(HEAD_TYPES[head] for head, _ in heads))
        if kind not in offered.spec_types
    ]
    for kind in LOOKUP_TYPES:
        if kind in offered.spec_types:
            found += _lookups(offered, kind)
    for file in drafters:
        drafting = _drafted(offered, file)
        found += drafting
        if not drafting:
            missing.append(f"{short_name(file)}: this build has no flags for a model that drafts")
    for head, path in heads:
        if HEAD_TYPES[head] in offered.spec_types:
            found += _heads(offered, head, path)
    return found, missing


def lookup_probe(offered: Help, length: int) -> Candidate | None:
    """The lookup of one token, which drafts in most passes, with up to `length` tokens; None where it is missing."""
    flags = lookup_flags(offered, "ngram-simple", {"size-n": 1, "size-m": length})
    if flags is None:
        return None
    rules = (RuleSizes("ngram-simple", (1, length)),)
    return Candidate(_sized("ngram-simple", (1, length)), "ngram-simple", tuple(flags), rules)


def chained(lookup: Candidate, drafting: Candidate) -> Candidate | None:
    """A lookup type, and a drafter or head where it finds nothing; None where this build cannot combine them.

    It can where `--spec-type` takes several types with commas, and not where a type holds settings (ik_llama.cpp).
    """
    types = [_value(candidate.flags, "--spec-type") for candidate in (lookup, drafting)]
    if any(one is None or ":" in one for one in types):
        return None
    rest = [flag for candidate in (lookup, drafting) for flag in _without(candidate.flags, "--spec-type")]
    return replace(
        drafting,
        name=f"{lookup.name} + {drafting.name}",
        family=f"{lookup.family} + {drafting.family}",
        flags=("--spec-type", ",".join(map(str, types)), *rest),
        rules=(*lookup.rules, *drafting.rules),
    )


def _lookups(offered: Help, kind: str) -> list[Candidate]:
    """A type of lookup with all its sizes, the build's own first."""
    if kind == "ngram-cache":
        return [Candidate(kind, kind, ("--spec-type", kind), (RuleSizes(kind),), usual=True)]
    names: tuple[str, ...]
    usual: tuple[int, ...]
    sizes: list[tuple[int, ...]]
    if kind == "ngram-mod":
        names, usual = ("n-match", "n-min", "n-max"), (USUAL_LOOKUP[0], 1, USUAL_LOOKUP[1])
        sizes = [(n, least, m) for n in SIZES_N for m in SIZES_M for least in (1, m // 2)]
    elif kind == "ngram-map-k4v":
        names, usual = ("size-n", "size-m", "min-hits"), (*USUAL_LOOKUP, 1)
        sizes = [(n, m, hits) for n in SIZES_N for m in SIZES_M for hits in MIN_HITS]
    else:  # the others have a setting for min-hits, and do not read it
        names, usual = ("size-n", "size-m"), USUAL_LOOKUP
        sizes = [(n, m) for n in SIZES_N for m in SIZES_M]
    own = lookup_defaults(offered, kind, names)
    if own is None:
        found = [Candidate(f"{kind}, the server's own sizes", kind, ("--spec-type", kind))]
    else:
        found = [Candidate(_sized(kind, own), kind, ("--spec-type", kind), (RuleSizes(kind, own),), usual=own == usual)]
    for size in dict.fromkeys(sizes):
        flags = lookup_flags(offered, kind, dict(zip(names, size, strict=True)))
        if flags is not None and size != own:
            rules = (RuleSizes(kind, size),)
            found.append(Candidate(_sized(kind, size), kind, tuple(flags), rules, usual=size == usual))
    return found


def _sized(kind: str, sizes: Sequence[int]) -> str:
    if kind == "ngram-mod":
        return f"{kind} {sizes[0]}, {sizes[1]} to {sizes[2]} drafted"
    hits = f", from hit {sizes[2]}" if len(sizes) > 2 and sizes[2] > 1 else ""
    return f"{kind} {sizes[0]}, {sizes[1]} drafted{hits}"


def _drafted(offered: Help, file: str) -> list[Candidate]:
    """A model that drafts; empty where the build has no flags for it.

    The probability is given wherever the build takes one, because its own may not be 0.
    """
    short = short_name(file)
    stops = drafter_flags(offered, file, most=1, probability=0.0) is not None
    found = []
    for length in DRAFT_LENGTHS:
        for least in LEAST_PROBABILITIES if stops else (0.0,):
            if least and length < 3:
                continue
            flags = drafter_flags(offered, file, most=length, probability=least if stops else None)
            if flags is None:
                return []
            name = f"{short}, {length} drafted" + (f" from probability {least}" if least else "")
            usual = length == USUAL_DRAFT and not least
            found.append(Candidate(name, short, tuple(flags), drafts=Drafts(file, length, least), usual=usual))
    return found


def _heads(offered: Help, kind: str, file: str | None) -> list[Candidate]:
    length_flag, model = offered.spelling(*MOST), offered.spelling(*DRAFTER)
    if length_flag is None or (file is not None and model is None):
        return []
    named = (model, file) if file is not None and model is not None else ()
    return [
        Candidate(
            f"{kind}, {length} drafted",
            kind,
            ("--spec-type", HEAD_TYPES[kind], *named, length_flag, str(length)),
            usual=length == USUAL_HEAD,
        )
        for length in HEAD_LENGTHS
    ]


def _value(flags: Sequence[str], name: str) -> str | None:
    return flags[flags.index(name) + 1] if name in flags else None


def _without(flags: Sequence[str], name: str) -> list[str]:
    at = flags.index(name)
    return [*flags[:at], *flags[at + 2 :]]
