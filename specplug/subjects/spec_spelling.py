"""How builds of llama-server spell the same drafting: lookup types with their sizes, and drafters.

Three spellings are known: flags for each type (llama.cpp since spring 2026), flags that all types share (before), and
keys within the value of `--spec-type` (ik_llama.cpp since 2026). What a build cannot express is None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from specplug.subjects.help_text import Help

KEYS = {
    "size-n": "ngram_size_n",
    "size-m": "ngram_size_m",
    "min-hits": "ngram_min_hits",
    "n-match": "ngram_size_n",
    "n-min": "n_min",
    "n-max": "n_max",
    "p-min": "p_min",
}
"""ik_llama.cpp's keys by the ends of llama.cpp's flags."""

SHARED = {"n-match": "--spec-ngram-size-n", "n-min": "--draft-min", "n-max": "--draft-max"}
"""Flags that all types shared, where their names are not `--spec-ngram-` and the same end."""

DRAFTER = ("-md", "--spec-draft-model", "--model-draft")
DRAFTER_TYPES = ("draft-simple", "draft")
MOST = ("--spec-draft-n-max", "--draft-max", "--draft-n", "--draft")
LEAST = ("--spec-draft-n-min", "--draft-min", "--draft-n-min")
LIKELY = ("--spec-draft-p-min", "--draft-p-min")


def lookup_flags(offered: Help, kind: str, sizes: Mapping[str, int]) -> list[str] | None:
    """The flags of a lookup type, such as `ngram-simple`.

    sizes  by the end of llama.cpp's flag: `size-n`, `size-m`, `min-hits`; for ngram-mod `n-match`, `n-min`, `n-max`
    """
    if kind not in offered.spec_types:
        return None
    if offered.spec_keys:
        keys = {KEYS[name]: number for name, number in sizes.items()}
        return None if set(keys) - set(offered.spec_keys) else ["--spec-type", _with_keys(kind, keys)]
    flags = ["--spec-type", kind]
    for name, number in sizes.items():
        spelled = _spelled(offered, kind, name)
        if spelled is None:
            return None
        flags += [spelled, str(number)]
    return flags


def lookup_defaults(offered: Help, kind: str, names: Sequence[str]) -> tuple[int, ...] | None:
    """The sizes that a lookup type has without flags, by names as in `lookup_flags`; None where the help has none."""
    texts = [offered.default(_spelled(offered, kind, name) or "") for name in names]
    known = [int(text) for text in texts if text is not None and text.isdecimal()]
    return tuple(known) if len(known) == len(names) else None


def drafter_flags(
    offered: Help, file: str, *, most: int, least: int | None = None, probability: float | None = None
) -> list[str] | None:
    """The flags of a drafter.

    file         the model that drafts
    most, least  draft tokens; probability: below it, it stops; the build's own where None
    """
    model = offered.spelling(*DRAFTER)
    if model is None:
        return None
    values = {"n-max": most, "n-min": least, "p-min": probability}
    if offered.spec_keys:
        kind = next((one for one in DRAFTER_TYPES if one in offered.spec_types), None)
        keys = {KEYS[name]: value for name, value in values.items() if value is not None}
        return None if kind is None else [model, file, "--spec-type", _with_keys(kind, keys)]
    kinds = [one for one in DRAFTER_TYPES if one in offered.spec_types]
    flags = [model, file, *(["--spec-type", kinds[0]] if kinds else [])]
    for names, value in ((MOST, most), (LEAST, least), (LIKELY, probability)):
        if value is None:
            continue
        spelled = offered.spelling(*names)
        if spelled is None:
            return None
        flags += [spelled, f"{value:g}"]
    return flags


def _spelled(offered: Help, kind: str, name: str) -> str | None:
    """The flag for one size: the type's own, or the one that all types share."""
    return offered.spelling(f"--spec-{kind}-{name}", SHARED.get(name, f"--spec-ngram-{name}"))


def _with_keys(kind: str, keys: Mapping[str, float | None]) -> str:
    return f"{kind}:{','.join(f'{key}={value:g}' for key, value in keys.items())}" if keys else kind
