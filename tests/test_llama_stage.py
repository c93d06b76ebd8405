"""`bench` on the real model, where plain decoding runs under another engine setting than the profile."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("llama_cpp")

from specplug.bench import llama_stage
from specplug.bench.arms import ProfileArm, Result
from specplug.bench.compare import compare
from specplug.bench.workloads import Prompt
from specplug.core import IntArray
from specplug.engines.llama_cpp.model import Model
from specplug.profile import CostPoints, PlannerSettings, Profile, Runtime

pytestmark = pytest.mark.llama

OWN = "flash attention on, bf16 cache"
"""Passes of every size round alike with it on 8-bit weights, so that drafts change nothing to the last bit."""

BEST = "flash attention on, q8_0 cache"
"""Keeps less of keys and values, so that its answers differ from those under OWN."""

QUESTIONS = ("Why do leaves turn yellow in autumn?", "Write a Python function that reverses a list.")


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[list[int]]]:
    """The tokens of every answer, by arm. The choice of the best setting is given, and no cost is measured."""

    def best(
        model: Model, runtime: Runtime, lengths: Sequence[int], max_tokens: int, **how: object
    ) -> tuple[Runtime, bool]:
        assert len(lengths) == 2 and all(10 < length < 100 for length in lengths) and max_tokens == 40
        return replace(runtime, kv_type="q8_0"), True

    seen: dict[str, list[list[int]]] = {}
    answer = ProfileArm.answer

    def recorded(arm: ProfileArm, prompts: Sequence[IntArray], max_tokens: int) -> list[Result]:
        results = answer(arm, prompts, max_tokens)
        seen.setdefault(arm.name, []).extend(result.tokens for result in results)
        return results

    monkeypatch.setattr(llama_stage, "best_plain_setting", best)
    monkeypatch.setattr("specplug.engines.llama_cpp.measure.cost_points", lambda *a, **how: FREE_ROWS)
    monkeypatch.setattr(ProfileArm, "answer", recorded)
    return seen


FREE_ROWS = CostPoints((128,), (1, 32), ((1.0, 1.001),))
"""A cost curve under which every draft pays."""


def test_an_arm_must_reproduce_plain_decoding_under_its_own_setting(
    formats: dict[str, Path], answers: dict[str, list[list[int]]]
) -> None:
    profile = Profile(
        "drafts",
        model=str(formats["q8_0"]),
        planner=PlannerSettings(mode="static", max_nodes=8),
        runtime=Runtime(threads=2, context=512, flash_attention=True, kv_type="bf16"),
    )
    prompts = [Prompt(str(place), "qa", (text,)) for place, text in enumerate(QUESTIONS)]
    document = compare([profile], [], prompts, workload="two", max_tokens=40)

    arms = {arm["name"]: arm for arm in document["arms"]}
    assert list(arms) == ["none", f"none, {OWN}", "llama.cpp defaults", "drafts"]
    assert [arm["profile"] for arm in document["arms"]] == ["none", "none", "none", "drafts"]
    labels = [BEST, OWN, "flash attention on, f16 cache", OWN]
    assert [arm["engine_settings"] for arm in document["arms"]] == labels
    assert [arm["reference"] for arm in document["arms"]] == [*list(arms)[:3], f"none, {OWN}"]

    assert answers["none"] != answers[f"none, {OWN}"]
    assert answers["drafts"] == answers[f"none, {OWN}"]
    assert arms["drafts"]["accepted_tokens"] > 0
    assert all((arm["identical"], arm["rounding"], arm["different"]) == (2, 0, 0) for arm in document["arms"])

    assert all(arm["prompt_seconds"] > 0 and arm["speedup"]["median"] > 0 for arm in document["arms"])
    settings = document["engine_settings"]
    assert (settings["plain"], settings["profiles"], settings["stock"]) == tuple(labels[:3])
    assert settings["drafting_arm"] == "drafts" and settings["drafting_speedup"] == arms["drafts"]["speedup"]
    assert settings["settings_speedup"]["low"] <= settings["settings_speedup"]["median"]
    own = arms[f"none, {OWN}"]["speedup"]["median"]
    assert settings["profiles_slowdown"]["median"] == pytest.approx(1 / own, abs=0.002)


def test_exact_compares_under_its_own_setting_only(
    formats: dict[str, Path], answers: dict[str, list[list[int]]]
) -> None:
    profile = Profile(
        "exact",
        model=str(formats["q8_0"]),
        exact=True,
        planner=PlannerSettings(max_nodes=4),
        runtime=Runtime(threads=2, context=512),
    )
    document = compare([profile], [], [Prompt("1", "qa", QUESTIONS[:1])], workload="one", max_tokens=8)
    assert [arm["name"] for arm in document["arms"]] == ["none", "exact"]
    assert {arm["engine_settings"] for arm in document["arms"]} == {OWN}
    assert document["engine_settings"]["settings_speedup"] is None
    assert answers["exact"] == answers["none"]
