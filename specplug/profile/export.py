"""A profile as flags of llama-server or vLLM without specplug: the nearest built-in method, and what is lost.

The names of the flags are those of llama.cpp of 2026-11 and of vLLM 0.32. Nothing is run.
Source: llama.cpp's common/arg.cpp and docs/speculative.md; vLLM's vllm/config/speculative.py and its page on dynamic
speculative decoding.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from specplug import registry
from specplug.planning.cost import CostCurve
from specplug.profile.settings import Profile

TARGETS = ("llama-server", "vllm")

ACCEPTED_SHARE = 0.7
"""Share of draft tokens that are accepted, where it was not measured: that of a lookup of three tokens in chat and
code."""

MAX_BATCH = 512
"""The last batch size of the schedule."""

CONTEXT = 256
"""Tokens in the cache at which the cost of a pass is read from the cost curve."""


@dataclass(frozen=True, slots=True)
class Exported:
    """A command, and one sentence for each setting of the profile that it cannot express."""

    argv: list[str]
    lost: list[str]

    def __str__(self) -> str:
        return "\n".join([*(f"# {line}" for line in self.lost), shlex.join(self.argv)])


def export(profile: Profile, target: str, model: str | None = None) -> Exported:
    """The command for one of TARGETS; `model` is passed to the engine, the profile's own where it is None."""
    methods = {spec.method: _options(spec) for spec in profile.proposers}
    model = model or profile.model or "MODEL"
    made = _llama_server(profile, methods, model) if target == "llama-server" else _vllm(profile, methods, model)
    if profile.runtime.coupled:
        made.lost.append("coupled sampling exists in specplug only: a seed yields another text there")
    return made


def _llama_server(profile: Profile, methods: Mapping[str, Mapping[str, Any]], model: str) -> Exported:
    runtime = profile.runtime
    argv = ["llama-server", "-m", model, "--ctx-size", str(runtime.context), "--batch-size", str(runtime.batch)]
    if runtime.threads is not None:
        argv += ["--threads", str(runtime.threads)]
    if runtime.gpu_layers:
        argv += ["--n-gpu-layers", "all" if runtime.gpu_layers < 0 else str(runtime.gpu_layers)]
    if runtime.flash_attention is not None:
        argv += ["--flash-attn", "on" if runtime.flash_attention else "off"]
    if runtime.kv_type is not None:
        argv += ["--cache-type-k", runtime.kv_type, "--cache-type-v", runtime.kv_type]
    lookup = methods.get("ngram") or methods.get("suffix")
    if lookup is None:
        return Exported([*argv, "--spec-type", "none"], _lost(methods, ()))
    length = _length(profile, int(lookup["max_draft"]))
    if not length:
        return Exported([*argv, "--spec-type", "none"], ["no fixed draft length is faster at the measured costs"])
    match = int(lookup.get("max_match", 3))
    argv += ["--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", str(match)]
    argv += ["--spec-ngram-simple-size-m", str(length)]
    lost = [f"every step matches {match} tokens and drafts {length}: the length does not depend on measured costs"]
    return Exported(argv, lost + _lost(methods, ("ngram", "suffix")))


def _vllm(profile: Profile, methods: Mapping[str, Mapping[str, Any]], model: str) -> Exported:
    argv = ["vllm", "serve", model]
    config: dict[str, Any] = {}
    lost: list[str] = []
    if "suffix" in methods:
        options = methods["suffix"]
        depth = min(int(options["max_draft"]), profile.planner.max_nodes)
        config = {
            "method": "suffix",
            "num_speculative_tokens": depth,
            "suffix_decoding_max_tree_depth": depth,
            "suffix_decoding_min_token_prob": options["min_prob"],
        }
        lost.append("suffix decoding in vLLM requires: pip install arctic-inference")
    elif "ngram" in methods:
        options = methods["ngram"]
        length = _length(profile, int(options["max_draft"]))
        if not length:
            return Exported(argv, ["no fixed draft length is faster at the measured costs"])
        config = {
            "method": "ngram",
            "num_speculative_tokens": length,
            "prompt_lookup_max": options["max_match"],
            "prompt_lookup_min": options["min_match"],
        }
        schedule = _schedule(profile, length)
        if schedule:
            config["num_speculative_tokens_per_batch_size"] = schedule
            lost.append(
                "the schedule by batch size comes from the profile's cost curve; measure on the machine that will serve"
            )
    if not config:
        return Exported(argv, _lost(methods, ()))
    lost.append("drafts are chains of the length that the method chooses: it does not depend on measured costs")
    return Exported([*argv, "--speculative-config", json.dumps(config)], lost + _lost(methods, ("ngram", "suffix")))


def _lost(methods: Mapping[str, Mapping[str, Any]], kept: tuple[str, ...]) -> list[str]:
    lines = [f"{method} has no counterpart and is dropped" for method in methods if method not in (*kept, "none")]
    if "suffix" in methods and kept and "ngram" in methods:
        lines.append("suffix and ngram are merged into one method")
    return lines


def _options(spec: registry.ProposerSpec) -> dict[str, Any]:
    """The method's options with defaults filled in."""
    defaults = {key: option.default for key, option in registry.options(spec.method).items() if not option.required}
    return {**defaults, **spec.options}


def _tokens(profile: Profile, n: int) -> float:
    """Tokens per pass with a chain of n draft tokens, from the tune's replay where the profile has one."""
    accepted = _accepted_at(profile.evidence)
    total, path = 1.0, 1.0
    for i in range(n):
        path = min(path, accepted[i]) if i < len(accepted) else path * ACCEPTED_SHARE
        total += path
    return total


def _accepted_at(evidence: Mapping[str, Any]) -> list[float]:
    """By position, the share of drafts accepted up to and including it; empty where the evidence has none."""
    try:
        lines = [line for line in evidence["settings"] if line["name"] == evidence["chosen"]]
        return [min(1.0, max(0.0, float(share))) for share in lines[0]["predicted"]["accepted_at"]]
    except (LookupError, TypeError, ValueError):
        return []


def _length(profile: Profile, most: int, batch: int = 1) -> int:
    """The fastest fixed draft length, 0 for none; the longest allowed where there is no cost curve for one sequence."""
    most = min(most, profile.planner.max_nodes)
    points = profile.measured.cost_curve if profile.measured else None
    if points is None or points.sequences != 1 or profile.planner.mode == "static":
        return most
    ms = CostCurve(points.contexts, points.rows, points.ms).at(CONTEXT)
    speeds = {0: 1.0 / ms[min(batch, len(ms)) - 1]}
    for n in range(1, most + 1):
        if batch * (n + 1) > len(ms):
            break
        speeds[n] = _tokens(profile, n) / ms[batch * (n + 1) - 1]
    return max(speeds, key=speeds.__getitem__)


def _schedule(profile: Profile, most: int) -> list[list[int]]:
    """[first batch size, last, length] up to the end of the cost curve, length 0 beyond it; empty without a curve."""
    points = profile.measured.cost_curve if profile.measured else None
    if points is None or points.sequences != 1:
        return []
    ranges: list[list[int]] = []
    for batch in range(1, points.rows[-1] // 2 + 1):
        length = _length(profile, most, batch)
        if ranges and ranges[-1][2] == length:
            ranges[-1][1] = batch
        else:
            ranges.append([batch, batch, length])
    if not ranges:
        return []
    if ranges[-1][2] == 0:
        ranges[-1][1] = MAX_BATCH
    else:
        ranges.append([ranges[-1][1] + 1, MAX_BATCH, 0])
    return ranges
