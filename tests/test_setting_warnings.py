"""The warnings about settings that have no effect on this build of llama.cpp, or a bad one on this model."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("llama_cpp")

from specplug.engines.llama_cpp import setting_warnings
from specplug.engines.llama_cpp.drafters.opening import open_target
from specplug.profile import Profile, Runtime

pytestmark = pytest.mark.llama

NO_GPU = (
    "gpu_layers {} has no effect: this llama.cpp is built without GPU support (see specplug doctor and "
    "docs/how-to/gpu.md)"
)


def warnings(trained: int, **runtime: Any) -> list[str]:
    model: Any = SimpleNamespace(path=Path("folder/small.gguf"), train_context=trained)
    return setting_warnings.setting_warnings(model, Runtime(**runtime))


@pytest.mark.parametrize(("layers", "shown"), [(7, "7"), (-1, "all")])
def test_gpu_layers_are_warned_of_only_where_llama_cpp_cannot_offload(
    layers: int, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setting_warnings, "can_offload", lambda: False)
    assert warnings(8192, gpu_layers=layers) == [NO_GPU.format(shown)]
    assert warnings(8192, gpu_layers=0) == []
    monkeypatch.setattr(setting_warnings, "can_offload", lambda: True)
    assert warnings(8192, gpu_layers=layers) == []


def test_a_context_beyond_the_training_is_warned_of_with_both_lengths() -> None:
    assert warnings(8192, context=8192) == []
    assert warnings(0, context=8193) == []  # a file that does not say
    assert warnings(8192, context=32768) == [
        "a context of 32768 tokens is more than the 8192 that small.gguf was trained for: answers get worse beyond that"
    ]


def test_opening_a_target_warns_once_of_each(demo_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setting_warnings, "can_offload", lambda: False)
    said: list[str] = []
    profile = Profile("long", runtime=Runtime(context=8448, gpu_layers=3))
    with open_target(demo_path, [profile, profile], profile.runtime, said.append):
        pass
    assert said[0] == NO_GPU.format(3)
    assert said[1].startswith(f"a context of 8448 tokens is more than the 8192 that {demo_path.name} was trained for")
    assert len(said) == 2
