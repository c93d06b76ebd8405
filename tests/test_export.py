"""Exporting profiles as flags of llama-server and vLLM."""

import json
import shlex
from dataclasses import replace
from itertools import pairwise

import pytest

from specplug import profile as profiles
from specplug.profile import CostPoints, Measured, PlannerSettings, Profile, Runtime
from specplug.profile.export import Exported, export
from specplug.registry import ProposerSpec


def made(
    *methods: str, mode: str = "measured", ms: list[float] | None = None, right: float = 0.7, **options: object
) -> Profile:
    curve = CostPoints((256,), tuple(range(1, len(ms) + 1)), (tuple(ms),)) if ms else None
    return Profile(
        "p",
        model="m.gguf",
        proposers=tuple(ProposerSpec(method, options) for method in methods),
        planner=PlannerSettings(mode=mode, max_nodes=8),
        measured=Measured(cost_curve=curve) if ms else None,
        evidence={
            "chosen": "this",
            "settings": [{"name": "this", "predicted": {"accepted_at": [right**n for n in range(1, 9)]}}],
        }
        if ms
        else {},
    )


def flags(found: Exported) -> dict[str, str]:
    rest = found.argv[1:]
    return {name: value for name, value in pairwise(rest) if name.startswith("-")}


def config(found: Exported) -> dict[str, object]:
    loaded: dict[str, object] = json.loads(found.argv[-1])
    return loaded


def test_plain_decoding_is_exported_as_such() -> None:
    assert export(made("none"), "llama-server").argv[-2:] == ["--spec-type", "none"]
    assert export(made("none"), "vllm", "org/m").argv == ["vllm", "serve", "org/m"]


def test_lookup_becomes_the_lookup_of_llama_server() -> None:
    found = flags(export(made("ngram", mode="static", max_match=4, max_draft=24), "llama-server"))
    assert found["--spec-type"] == "ngram-simple" and found["-m"] == "m.gguf"
    assert (found["--spec-ngram-simple-size-n"], found["--spec-ngram-simple-size-m"]) == ("4", "8")


def test_engine_settings_are_exported() -> None:
    runtime = Runtime(threads=6, context=9000, gpu_layers=-1, flash_attention=True, kv_type="q8_0")
    found = flags(export(Profile("p", runtime=runtime), "llama-server", "x.gguf"))
    assert found["--threads"] == "6" and found["--ctx-size"] == "9000" and found["--n-gpu-layers"] == "all"
    assert found["--flash-attn"] == "on" and found["--cache-type-k"] == found["--cache-type-v"] == "q8_0"


def test_the_length_is_the_fastest_one() -> None:
    """Seven of ten draft tokens are accepted. Where rows are free, the length is the longest allowed. Where a row costs
    a tenth of a pass, the speedups by hand are 1.7/1.1, 2.19/1.2, 2.53/1.3, 2.77/1.4 and 2.94/1.5: the best is near 5.
    Where a row costs an entire pass, nothing is drafted."""
    flat = flags(export(made("ngram", ms=[10.0] * 20), "llama-server"))
    assert flat["--spec-ngram-simple-size-m"] == "8"
    tenth = [10.0 + n for n in range(20)]
    speeds = {n: sum(0.7**i for i in range(n + 1)) / (1 + n / 10) for n in range(9)}
    some = flags(export(made("ngram", ms=tenth), "llama-server"))
    assert int(some["--spec-ngram-simple-size-m"]) == max(speeds, key=speeds.__getitem__) == 4
    expensive = export(made("ngram", ms=[10.0 * n for n in range(1, 20)]), "llama-server")
    assert expensive.argv[-2:] == ["--spec-type", "none"] and "no fixed draft length is faster" in expensive.lost[0]
    assert "--speculative-config" not in export(made("ngram", ms=[10.0 * n for n in range(1, 20)]), "vllm").argv


def test_vllm_gets_a_config_and_a_schedule_by_batch_size() -> None:
    """Eight rows cost as much as one, and each further row costs an entire pass: one request drafts 7 tokens, two draft
    3, three and four draft 1, more draft nothing."""
    ms = [10.0] * 8 + [10.0 * n for n in range(2, 20)]
    found = config(export(made("ngram", ms=ms, min_match=2, right=0.9), "vllm", "org/m"))
    assert found["method"] == "ngram" and (found["prompt_lookup_min"], found["prompt_lookup_max"]) == (2, 3)
    assert found["num_speculative_tokens"] == 7
    schedule = found["num_speculative_tokens_per_batch_size"]
    assert schedule == [[1, 1, 7], [2, 2, 3], [3, 4, 1], [5, 512, 0]]


def test_suffix_becomes_the_suffix_decoding_of_vllm() -> None:
    found = config(export(made("suffix", max_draft=6), "vllm", "org/m"))
    assert found["method"] == "suffix" and found["suffix_decoding_max_tree_depth"] == 6


@pytest.mark.parametrize("target", ["llama-server", "vllm"])
def test_losses_are_reported(target: str) -> None:
    found = export(made("suffix", "token_recycling"), target, "m")
    assert any("token_recycling has no counterpart" in line for line in found.lost)
    assert export(made("token_recycling"), target, "m").lost == ["token_recycling has no counterpart and is dropped"]
    lines = str(found).splitlines()
    assert lines[:-1] == [f"# {line}" for line in found.lost] and shlex.split(lines[-1]) == found.argv


@pytest.mark.parametrize("target", ["llama-server", "vllm"])
def test_the_loss_of_coupled_sampling_is_reported(target: str) -> None:
    profile = replace(made("suffix"), runtime=Runtime(coupled=True))
    line = "coupled sampling exists in specplug only: a seed yields another text there"
    assert line in export(profile, target, "m").lost
    assert line not in export(made("suffix"), target, "m").lost


@pytest.mark.parametrize("target", ["llama-server", "vllm"])
def test_every_shipped_profile_can_be_exported(target: str) -> None:
    for listed in profiles.list_profiles():
        assert export(profiles.load(listed.name), target, "m").argv
