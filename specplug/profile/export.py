"""A profile for llama-server, llama-cpp-python or vLLM without specplug: the nearest built-in method, and what is lost.

The names of flags and arguments are those of llama.cpp of 2026-11, llama-cpp-python 0.3.36 and vLLM 0.32. Nothing is
run.
Source: llama.cpp's common/arg.cpp and docs/speculative.md; llama-cpp-python's llama.py and llama_speculative.py; vLLM's
vllm/config/speculative.py, vllm/envs.py and its page on dynamic speculative decoding.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specplug import registry
from specplug.errors import UsageError
from specplug.models import hub_reference
from specplug.planning.cost import CostCurve
from specplug.profile.settings import Profile, Runtime, VllmSettings
from specplug.profile.with_drafter import HEADS

TARGETS = ("llama-server", "llama-cpp-python", "vllm")

ACCEPTED_SHARE = 0.7
"""Share of draft tokens that are accepted, where it was not measured: that of a lookup of three tokens in chat and
code."""

MAX_BATCH = 512
"""The last batch size of the schedule."""

CONTEXT = 256
"""Tokens in the cache at which the cost of a pass is read from the cost curve."""

LONGEST_OF_HEAD = 3
"""Draft tokens of a head in every step, as in llama.cpp's examples, where a profile allows more."""

LARGEST_UBATCH = 512
"""Tokens that llama-server and llama-cpp-python compute at a time where no number is given."""

CACHE_TYPES = {
    "f32": "llama_cpp.GGML_TYPE_F32",
    "f16": "llama_cpp.GGML_TYPE_F16",
    "bf16": "30",
    "q8_0": "llama_cpp.GGML_TYPE_Q8_0",
}
"""The types of a KV cache as Python code; llama-cpp-python has no name for bf16."""


@dataclass(frozen=True, slots=True)
class Exported:
    """A command, and one sentence for each setting of the profile that it cannot express."""

    argv: list[str]
    lost: list[str]

    def __str__(self) -> str:
        return "\n".join([*(f"# {line}" for line in self.lost), shlex.join(self.argv)])


@dataclass(frozen=True, slots=True)
class ExportedCode:
    """Python code, and one sentence for each setting of the profile that it cannot express."""

    code: str
    lost: list[str]

    def __str__(self) -> str:
        return "\n".join([*(f"# {line}" for line in self.lost), self.code])


def export(profile: Profile, target: str, model: str | None = None) -> Exported | ExportedCode:
    """The command or code for one of TARGETS; `model` is the one to open, the profile's own where it is None.

    UsageError for the command of a server, which can only be written as it is.
    """
    if profile.server is not None:
        raise UsageError(
            f"profile {profile.name}: it is a server's own command already; leave the target and model out"
        )
    methods = {spec.method: _options(spec) for spec in profile.proposers}
    model = model or profile.model or "MODEL"
    made: Exported | ExportedCode
    if target == "llama-server":
        made = _llama_server(profile, methods, model)
    elif target == "llama-cpp-python":
        made = _llama_cpp_python(profile, methods, model)
    else:
        made = _vllm(profile, methods, model)
    if profile.runtime.coupled:
        made.lost.append("coupled sampling exists in specplug only: a seed yields another text there")
    return made


def _llama_server(profile: Profile, methods: Mapping[str, Mapping[str, Any]], model: str) -> Exported:
    runtime = profile.runtime
    flash_attention, kv_type = _attention(profile)
    argv = ["llama-server", *_llama_server_model(model)]
    argv += ["--ctx-size", str(runtime.context), "--batch-size", str(runtime.batch)]
    if (ubatch := _ubatch(runtime)) is not None:
        argv += ["--ubatch-size", str(ubatch)]
    if runtime.threads is not None:
        argv += ["--threads", str(runtime.threads)]
    if runtime.threads_batch is not None:
        argv += ["--threads-batch", str(runtime.threads_batch)]
    if runtime.gpu_layers:
        argv += ["--n-gpu-layers", "all" if runtime.gpu_layers < 0 else str(runtime.gpu_layers)]
    if flash_attention is not None:
        argv += ["--flash-attn", "on" if flash_attention else "off"]
    if kv_type is not None:
        argv += ["--cache-type-k", kv_type, "--cache-type-v", kv_type]
    if not runtime.repack:
        argv.append("--no-repack")
    if not runtime.mmap:
        argv += ["--load-mode", "none"]
    heads = [method for method in methods if method in HEADS]
    lookup, lost = _fixed_lookup(profile, methods, kept=heads)
    kinds, flags, fixed = [], [], list[str]()
    for head in heads:
        kinds.append(f"draft-{head}")
        length = min(int(methods[head]["max_draft"]), LONGEST_OF_HEAD)
        if methods[head]["model"] is not None:
            flags += ["--model-draft", str(methods[head]["model"])]
        if methods[head].get("head") is not None:
            fixed.append(f"{head} drafts with the complete output matrix: llama-server takes no part of it")
        flags += ["--spec-draft-n-max", str(length)]
        fixed.append(f"{head} drafts {length} tokens in every step: the length does not depend on measured costs")
    if lookup is not None:
        match, length = lookup
        kinds.append("ngram-simple")
        flags += ["--spec-ngram-simple-size-n", str(match), "--spec-ngram-simple-size-m", str(length)]
        fixed.append(
            f"every step matches {match} tokens and drafts {length}: the length does not depend on measured costs"
        )
    if len(kinds) > 1:
        fixed.append("llama-server asks its drafters in an order of its own, and takes the first draft")
    argv += ["--spec-type", ",".join(kinds) or "none", *flags]
    return Exported(argv, fixed + lost + _lost_settings(profile, "llama-server"))


def _llama_cpp_python(profile: Profile, methods: Mapping[str, Mapping[str, Any]], model: str) -> ExportedCode:
    runtime = profile.runtime
    flash_attention, kv_type = _attention(profile)
    arguments = [f"model_path={model!r}", f"n_ctx={runtime.context}", f"n_batch={runtime.batch}"]
    if (ubatch := _ubatch(runtime)) is not None:
        arguments.append(f"n_ubatch={ubatch}")
    if runtime.threads is not None:
        arguments.append(f"n_threads={runtime.threads}")
    threads_batch = runtime.threads_batch or runtime.threads  # its own default is every core
    if threads_batch is not None:
        arguments.append(f"n_threads_batch={threads_batch}")
    if runtime.gpu_layers:
        arguments.append(f"n_gpu_layers={runtime.gpu_layers}")
    if flash_attention is not None:
        arguments.append(f"flash_attn={flash_attention}")
    if kv_type is not None:
        arguments += [f"type_k={CACHE_TYPES[kv_type]}", f"type_v={CACHE_TYPES[kv_type]}"]
    if not runtime.mmap:
        arguments.append("use_mmap=False")
    imports = ["import llama_cpp"]
    lookup, lost = _fixed_lookup(profile, methods)
    if lookup is not None:
        match, length = lookup
        imports.append("from llama_cpp.llama_speculative import LlamaPromptLookupDecoding")
        draft_model = f"LlamaPromptLookupDecoding(max_ngram_size={match}, num_pred_tokens={length})"
        arguments += [f"draft_model={draft_model}", "logits_all=True"]
        lost = [
            f"every step drafts the {length} tokens after the first match of {match} tokens or fewer: the length does "
            "not depend on measured costs",
            "a draft model needs logits_all: logits of n_ctx tokens stay in memory, 4 bytes for each token of the "
            "vocabulary",
            *lost,
        ]
    if profile.speculates:
        lost.append(
            "specplug.engines.llama_cpp.speculative_llama.SpeculativeLlama drafts as the profile says: it takes "
            "profile, a name or a file, in place of draft_model and logits_all"
        )
    if runtime.threads is None:
        lost.append("threads is open: specplug uses every core in passes over one row, and llama-cpp-python half")
    if not runtime.repack:
        lost.append("repack: false has no argument there: the weights are repacked")
    unnamed = ["    # type 30 is bf16, for which llama_cpp has no name"] if kv_type == "bf16" else []
    code = [*imports, "", "llm = llama_cpp.Llama(", *unnamed, *(f"    {argument}," for argument in arguments), ")"]
    return ExportedCode("\n".join(code), lost + _lost_settings(profile, "llama-cpp-python"))


def _llama_server_model(model: str) -> list[str]:
    """UsageError for a revision and for a checkpoint, which llama-server cannot open."""
    if not model.startswith(hub_reference.PREFIX):
        return ["-m", model]
    reference = hub_reference.parse(model)
    if reference.revision is not None:
        raise UsageError(f"{model}: llama-server downloads the newest version only; download it, and name the file")
    if reference.tag == hub_reference.CHECKPOINT:
        raise UsageError(f"{model}: a checkpoint; llama-server opens GGUF files, so name one with --model")
    if reference.tag is not None and hub_reference.is_gguf(reference.tag):
        return ["--hf-repo", reference.repo, "--hf-file", reference.tag]
    return ["-hf", reference.repo if reference.tag is None else f"{reference.repo}:{reference.tag}"]


def _vllm_model(model: str) -> list[str]:
    """UsageError for a GGUF file on the hub."""
    if not model.startswith(hub_reference.PREFIX):
        return [model]
    reference = hub_reference.parse(model)
    if reference.tag not in (None, hub_reference.CHECKPOINT):
        raise UsageError(f"{model}: a GGUF file; vLLM opens checkpoints, so name one with --model")
    return [reference.repo, *(["--revision", reference.revision] if reference.revision else [])]


def _fixed_lookup(
    profile: Profile, methods: Mapping[str, Mapping[str, Any]], *, kept: Sequence[str] = ()
) -> tuple[tuple[int, int] | None, list[str]]:
    """(tokens to match, tokens to draft) of a lookup of fixed length, None for none; and sentences on what is lost.

    kept  further methods that have a counterpart
    """
    lookup = methods.get("ngram") or methods.get("suffix")
    if lookup is None:
        return None, _lost(methods, (*kept,))
    length = _length(profile, int(lookup["max_draft"]))
    if not length:
        return None, ["no fixed draft length is faster at the measured costs"]
    return (int(lookup.get("max_match", 3)), length), _lost(methods, ("ngram", "suffix", *kept))


def _attention(profile: Profile) -> tuple[bool | None, str | None]:
    """(flash_attention, kv_type) as the engine opens them; None for what it chooses by measurement."""
    flash_attention, kv_type = profile.runtime.flash_attention, profile.runtime.kv_type
    if profile.exact:
        return True, kv_type or "bf16"
    if flash_attention is None and kv_type in ("q8_0", "f32"):
        flash_attention = kv_type == "q8_0"
    return flash_attention, kv_type


def _ubatch(runtime: Runtime) -> int | None:
    """Tokens to compute at a time; None where the other program's own number has the same effect."""
    return runtime.batch if runtime.ubatch is None and runtime.batch > LARGEST_UBATCH else runtime.ubatch


def _lost_settings(profile: Profile, target: str) -> list[str]:
    """One sentence each on `exact`, and on what specplug would choose by measurement, where there is such a thing."""
    settings = zip(("flash_attention", "kv_type"), _attention(profile), strict=True)
    names = [name for name, value in settings if value is None]
    exact = []
    if profile.exact and profile.speculates:
        exact = [f"exact: {target} does not keep passes with drafts to sizes that round as plain decoding does"]
    if profile.engine != "llama-cpp" or not names:
        return exact
    return [
        *exact,
        f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} open: specplug chooses by measurement on the "
        f"machine, and {target} takes its own default; specplug tune writes the choice into a profile",
    ]


def _vllm(profile: Profile, methods: Mapping[str, Mapping[str, Any]], model: str) -> Exported:
    argv = ["vllm", "serve", *_vllm_model(model), *_vllm_flags(profile.vllm)]
    config: dict[str, Any] = {}
    lost = _lost_on_vllm(profile.runtime)
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
            return Exported(argv, ["no fixed draft length is faster at the measured costs", *lost])
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
        return Exported(argv, _lost(methods, ()) + lost)
    lost.append("drafts are chains of the length that the method chooses: it does not depend on measured costs")
    return Exported([*argv, "--speculative-config", json.dumps(config)], lost + _lost(methods, ("ngram", "suffix")))


def _vllm_flags(settings: VllmSettings) -> list[str]:
    """vLLM's own flags for the settings that are not left to it."""
    flags = []
    for key in ("max_model_len", "max_num_seqs", "gpu_memory_utilization", "dtype"):
        value = getattr(settings, key)
        if value not in (None, "auto"):
            flags += [f"--{key.replace('_', '-')}", str(value)]
    return [*flags, "--enforce-eager"] if settings.enforce_eager else flags


def _lost_on_vllm(runtime: Runtime) -> list[str]:
    """Sentences on the settings of llama.cpp that the profile names."""
    lost = []
    if runtime.threads is not None:
        cores = "0" if runtime.threads == 1 else f"0-{runtime.threads - 1}"
        lost.append(
            f"threads: {runtime.threads} is no flag of vLLM; on CPUs, set VLLM_CPU_OMP_THREADS_BIND to that many core "
            f"numbers, such as {cores}"
        )
    keys = ("threads_batch", "ubatch", "flash_attention", "kv_type", "repack", "mmap")
    named = [key for key in keys if getattr(runtime, key) != getattr(Runtime(), key)]
    if named:
        lost.append(
            f"{', '.join(named)}: llama.cpp's settings; vLLM chooses its kernels itself, and its cache has the number "
            "format of --dtype unless --kv-cache-dtype names another one"
        )
    return lost


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
