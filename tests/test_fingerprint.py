"""The fingerprint of a measurement, and the warning for conditions that have changed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specplug.errors import SpecplugError
from specplug.machine import fingerprint, hardware
from specplug.profile import Measured, Profile

HERE: dict[str, Any] = {
    "cpu": "Zen",
    "cores": 2,
    "memory_gib": 23.5,
    "system": "Linux x86_64",
    "gpus": [],
    "threads": 2,
    "engine": "llama-cpp",
    "versions": {"specplug": "1", "llama-cpp-python": "0.3.36"},
    "model": {"file": "a.gguf", "bytes": 10, "sample_sha256": "x"},
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"weights")
    return path


def test_equal_fingerprints_have_no_changes(model: Path) -> None:
    now = fingerprint.of(model, engine="llama-cpp", threads=2)
    assert fingerprint.changes(now, now) == []
    assert now["model"]["bytes"] == 7 and now["versions"]["specplug"] and now["cores"] == hardware.usable_cores()


@pytest.mark.parametrize(
    ("key", "value", "change"),
    [
        ("cpu", "Xeon", "cpu: was Xeon, is Zen"),
        ("threads", 8, "threads: was 8, is 2"),
        ("memory_gib", 64.0, "memory: was 64.0 GiB, is 23.5 GiB"),
        ("gpus", [{"name": "H200", "driver": "1"}], "gpu: was H200 (driver 1), is none"),
        ("versions", {"llama-cpp-python": "0.2"}, "llama-cpp-python: was 0.2, is 0.3.36"),
        ("model", {"file": "b.gguf", "bytes": 11, "sample_sha256": "x"}, "model: was b.gguf, is another file (a.gguf)"),
    ],
)
def test_each_change_is_reported(key: str, value: object, change: str) -> None:
    assert fingerprint.changes({**HERE, key: value}, HERE) == [change]


def test_names_that_do_not_matter_are_ignored() -> None:
    renamed = {**HERE, "model": {**HERE["model"], "file": "moved.gguf"}, "memory_gib": 23.4}
    assert fingerprint.changes({**renamed, "versions": {**HERE["versions"], "specplug": "0"}}, HERE) == []
    assert fingerprint.changes({}, HERE) == [] and fingerprint.changes({"cpu": "Zen"}, HERE) == []


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(list(HERE)), plain))
def test_a_strangers_fingerprint_breaks_nothing(then: dict[str, Any]) -> None:
    assert all(isinstance(line, str) for line in fingerprint.changes(then, HERE))


def test_weights_that_differ_in_one_place_are_another_model(tmp_path: Path) -> None:
    size = 3 * fingerprint.SAMPLE_BYTES
    path = tmp_path / "m.gguf"
    path.write_bytes(bytes(size))
    before = fingerprint.model_identity(path)
    for at in (0, size // 2 + 5, size - 1):
        content = bytearray(size)
        content[at] = 1
        path.write_bytes(content)
        assert fingerprint.model_identity(path) != before
    assert fingerprint.sha256(path) != before["sample_sha256"]


def test_folders_with_one_configuration_and_other_weights_are_other_models(tmp_path: Path) -> None:
    for name, weights in (("base", b"1"), ("tuned", b"2")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(weights * 100)
    base, tuned = (fingerprint.model_identity(tmp_path / name) for name in ("base", "tuned"))
    assert base["bytes"] == tuned["bytes"] == 102 and base["sample_sha256"] != tuned["sample_sha256"]
    assert fingerprint.changes({"model": base}, {"model": tuned}) and fingerprint.changes({"model": base}, {}) != []
    names = [fingerprint.model_identity(Path(name)) for name in ("org/a", "org/b", "org/a")]
    assert fingerprint.changes({"model": names[0]}, {"model": names[1]})
    assert not fingerprint.changes({"model": names[0]}, {"model": names[2]})


def test_a_missing_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SpecplugError, match=r"gone\.gguf: the model cannot be read"):
        fingerprint.model_identity(tmp_path / "gone.gguf")


def test_a_profile_of_another_machine_is_stale_and_explains_why(model: Path) -> None:
    here = fingerprint.of(model, engine="llama-cpp", threads=2)
    profile = Profile("tuned", measured=Measured(hardware={**here, "cpu": "Elbrus"}))
    warning = fingerprint.stale(profile, model, 2)
    assert warning is not None and "profile tuned" in warning and "cpu: was Elbrus" in warning
    assert "tune again" in warning
    assert fingerprint.stale(replace(profile, measured=Measured(hardware=here)), model, 2) is None
    assert fingerprint.stale(Profile("untuned"), model, 2) is None


def test_read_bandwidth_and_gpus_are_reported() -> None:
    assert hardware.read_bandwidth() > 0.1
    assert isinstance(hardware.gpus(), list)
