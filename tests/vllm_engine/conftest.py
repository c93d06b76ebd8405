"""Fixtures of the tests that need vLLM. `make test-vllm` runs them; without vLLM they are not collected.

The folder cannot be named vllm: `tests` is on the import path, where a folder of that name would hide the package.
"""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
else:  # vLLM and Hugging Face read these variables when they are imported
    for name, value in {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process, so that tests can inspect it
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }.items():
        os.environ.setdefault(name, value)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ignore warnings of other packages. Warnings of specplug stay errors."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore", "error:::specplug"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The packaged model as a float32 checkpoint, written by the code under test and never taken from the cache."""
    from specplug.transforms import dequantise

    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dequantise, "cache_folder", lambda: cache / "specplug")
        path = dequantise.checkpoint_of("demo:smollm2")
    assert cache in path.parents
    yield path
