"""What the tests that need vLLM share. Run by `make test-vllm`; elsewhere they are not even collected.

The folder may not be called vllm: `tests` is on the import path, where a folder of that name looks like the package.
"""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
else:  # read by vLLM and Hugging Face when they are imported
    for name, value in {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, so that a test can look into it
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }.items():
        os.environ.setdefault(name, value)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Warnings of other people's packages are theirs; ours stay errors."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore", "error:::specplug"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The packaged model as a float32 checkpoint, made anew by the code under test: never an older one of the cache."""
    from specplug.transforms import dequantise

    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dequantise, "user_cache_dir", lambda name: str(cache / name))
        made = dequantise.checkpoint_of("demo:smollm2")
    assert cache in made.parents
    yield made
