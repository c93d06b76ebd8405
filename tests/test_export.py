"""Profiles as flags of other engines."""

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


def test_plain_decoding_is_said_plainly() -> None:
    assert export(made("none"), "llama-server").argv[-2:] == ["--spec-type", "none"]
    assert export(made("none"), "vllm", "org/m").argv == ["vllm", "serve", "org/m"]


def test_lookup_becomes_the_servers_own() -> None:
    found = flags(export(made("ngram", mode="static", max_match=4, max_draft=24), "llama-server"))
    assert found["--spec-type"] == "ngram-simple" and found["-m"] == "m.gguf"
    assert (found["--spec-ngram-simple-size-n"], found["--spec-ngram-simple-size-m"]) == ("4", "8")


def test_engine_settings_come_along() -> None:
    runtime = Runtime(threads=6, context=9000, gpu_layers=-1, flash_attention=True, kv_type="q8_0")
    found = flags(export(Profile("p", runtime=runtime), "llama-server", "x.gguf"))
    assert found["--threads"] == "6" and found["--ctx-size"] == "9000" and found["--n-gpu-layers"] == "all"
    assert found["--flash-attn"] == "on" and found["--cache-type-k"] == found["--cache-type-v"] == "q8_0"


def test_the_length_is_the_one_that_pays() -> None:
    """Right 7 times in 10. Flat costs: as long as allowed. Each row a tenth: by hand 1.7/1.1, 2.19/1.2, 2.53/1.3,
    2.77/1.4, 2.94/1.5: best at 5 or so. Each row a whole pass: none."""
    flat = flags(export(made("ngram", ms=[10.0] * 20), "llama-server"))
    assert flat["--spec-ngram-simple-size-m"] == "8"
    tenth = [10.0 + n for n in range(20)]
    speeds = {n: sum(0.7**i for i in range(n + 1)) / (1 + n / 10) for n in range(9)}
    some = flags(export(made("ngram", ms=tenth), "llama-server"))
    assert int(some["--spec-ngram-simple-size-m"]) == max(speeds, key=speeds.__getitem__) == 4
    dear = export(made("ngram", ms=[10.0 * n for n in range(1, 20)]), "llama-server")
    assert dear.argv[-2:] == ["--spec-type", "none"] and "no draft of fixed length pays" in dear.lost[0]
    assert "--speculative-config" not in export(made("ngram", ms=[10.0 * n for n in range(1, 20)]), "vllm").argv


def test_vllm_gets_a_config_and_a_schedule_by_batch_size() -> None:
    """Up to 8 rows cost nothing, then each a pass: one request drafts 7, two draft 3, three and four 1, more none."""
    ms = [10.0] * 8 + [10.0 * n for n in range(2, 20)]
    found = config(export(made("ngram", ms=ms, min_match=2, right=0.9), "vllm", "org/m"))
    assert found["method"] == "ngram" and (found["prompt_lookup_min"], found["prompt_lookup_max"]) == (2, 3)
    assert found["num_speculative_tokens"] == 7
    schedule = found["num_speculative_tokens_per_batch_size"]
    assert schedule == [[1, 1, 7], [2, 2, 3], [3, 4, 1], [5, 512, 0]]


def test_suffix_is_vllms_own_too() -> None:
    found = config(export(made("suffix", max_draft=6), "vllm", "org/m"))
    assert found["method"] == "suffix" and found["suffix_decoding_max_tree_depth"] == 6


@pytest.mark.parametrize("target", ["llama-server", "vllm"])
def test_what_is_lost_is_said(target: str) -> None:
    found = export(made("suffix", "token_recycling"), target, "m")
    assert any("token_recycling has no counterpart" in line for line in found.lost)
    assert export(made("token_recycling"), target, "m").lost == ["token_recycling has no counterpart and is dropped"]
    lines = str(found).splitlines()
    assert lines[:-1] == [f"# {line}" for line in found.lost] and shlex.split(lines[-1]) == found.argv


@pytest.mark.parametrize("target", ["llama-server", "vllm"])
def test_coupled_sampling_is_lost(target: str) -> None:
    profile = replace(made("suffix"), runtime=Runtime(coupled=True))
    line = "coupled sampling is specplug's own: a seed gives another text there"
    assert line in export(profile, target, "m").lost
    assert line not in export(made("suffix"), target, "m").lost


@pytest.mark.parametrize("target", ["llama-server", "vllm"])
def test_every_shipped_profile_can_be_exported(target: str) -> None:
    for listed in profiles.list_profiles():
        assert export(profiles.load(listed.name), target, "m").argv
