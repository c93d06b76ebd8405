"""What can be tried on `vllm serve`: its own methods, and specplug's as its plugin.

Knows vLLM's `--speculative-config`; starts nothing.
Source: vLLM's vllm/config/speculative.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from specplug.tune.server_flags.server_candidates import Candidate, RuleSizes, short_name

LENGTHS = (2, 3, 4, 5, 8)
LOOKUPS = ((1, 2), (2, 3), (2, 4), (3, 5))
"""prompt_lookup_min and prompt_lookup_max."""

USUAL = LOOKUPS[1]
USUAL_LENGTH = 3
"""Draft tokens of the one to run of each kind that was not predicted."""

DRAFTER_LENGTHS = (1, 2, 3, 5)
HEAD_LENGTHS, USUAL_HEAD = (1, 2, 3), 2
SUFFIX_LENGTHS = (8, 24)
TABLE = "num_speculative_tokens_per_batch_size"
"""A setting that not every version has."""


@dataclass(frozen=True, slots=True)
class VllmInstallation:
    """What is installed beside a `vllm` program.

    settings  the names of settings in `--speculative-config` that this version knows, of those that are asked for
    suffix    whether arctic-inference is there, which its suffix decoding needs
    plugin    of specplug's plugin: methods, draft tokens, and the flags
    """

    settings: frozenset[str] = frozenset()
    suffix: bool = False
    plugin: tuple[tuple[str, int, tuple[str, ...]], ...] = ()


def vllm_candidates(
    installed: VllmInstallation | None,
    *,
    drafters: Sequence[str] = (),
    heads: Sequence[tuple[str, str | None]] = (),
    levels: Sequence[int] = (1,),
) -> tuple[list[Candidate], list[str]]:
    """All candidates of `vllm serve` but plain decoding; and one sentence for each kind that is not there.

    installed  None where it is not known
    drafters   models, of which vLLM itself finds out what they are
    heads      kind of a head, as vLLM's setting `method` names it, and its folder; None for layers of the model itself
    levels     numbers of requests at once; where there are several, tables by batch size are tried
    """
    found = [_ngram(length, lookup) for length in LENGTHS for lookup in LOOKUPS]
    if installed is None:
        missing = ["suffix, specplug's own methods and tables by batch size: the Python of this vLLM was not found"]
        installed = VllmInstallation()
    else:
        missing = _lacking(installed)
    if max(levels) > 1 and TABLE in installed.settings:
        for length in LENGTHS[1:]:
            table = [[1, 4, length], [5, 512, max(1, length // 2)]]
            config = _ngram_config(length, USUAL) | {TABLE: table}
            name = f"ngram {USUAL[0]}-{USUAL[1]}, {length} drafted, by batch size"
            usual = length == USUAL_LENGTH
            found.append(Candidate(name, "ngram, by batch size", _config(config), usual=usual))
    if installed.suffix:
        for length in SUFFIX_LENGTHS:
            config = {"method": "suffix", "num_speculative_tokens": length}
            usual = length == SUFFIX_LENGTHS[0]
            found.append(Candidate(f"suffix, {length} drafted", "suffix", _config(config), usual=usual))
    for methods, length, flags in installed.plugin:
        name, family = f"specplug's {methods}, {length} drafted", f"specplug's {methods}"
        found.append(Candidate(name, family, flags, usual=length == USUAL_LENGTH))
    for model in drafters:
        short = short_name(model)
        for length in DRAFTER_LENGTHS:
            config = {"model": model, "num_speculative_tokens": length}
            usual = length == USUAL_LENGTH
            found.append(Candidate(f"{short}, {length} drafted", short, _config(config), usual=usual))
    for kind, folder in heads:
        for length in HEAD_LENGTHS:
            config = {"method": kind, "num_speculative_tokens": length}
            config |= {} if folder is None else {"model": folder}
            found.append(Candidate(f"{kind}, {length} drafted", kind, _config(config), usual=length == USUAL_HEAD))
    return found, missing


def vllm_probes() -> list[Candidate]:
    """Lookups that draft often, of several lengths, from which the cost of passes is learned."""
    return [_ngram(length, (1, 1)) for length in (2, 5)]


def _lacking(installed: VllmInstallation) -> list[str]:
    lacking = [] if installed.suffix else ["suffix: arctic-inference is not installed beside this vLLM"]
    if not installed.plugin:
        lacking.append("specplug's own methods: specplug is not installed beside this vLLM, or does not fit it")
    return lacking


def _ngram(length: int, lookup: tuple[int, int]) -> Candidate:
    rules = (RuleSizes("vllm-ngram", (length, *lookup)),)
    name = f"ngram {lookup[0]}-{lookup[1]}, {length} drafted"
    usual = (length, lookup) == (USUAL_LENGTH, USUAL)
    return Candidate(name, "ngram", _config(_ngram_config(length, lookup)), rules, bounded=False, usual=usual)


def _ngram_config(length: int, lookup: tuple[int, int]) -> dict[str, Any]:
    return {
        "method": "ngram",
        "num_speculative_tokens": length,
        "prompt_lookup_min": lookup[0],
        "prompt_lookup_max": lookup[1],
    }


def _config(config: dict[str, Any]) -> tuple[str, ...]:
    return ("--speculative-config", json.dumps(config))
