"""Fixtures of the tests in vLLM's V2 model runner.

They need a process of their own, because kernels have to be interpreted before vllm is imported. `make test-vllm`
starts one.
"""

import gc
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py", "interpreted.py"]
else:
    import interpreted

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine runs in this process, so that tests can inspect it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ignore warnings of other packages. Warnings of specplug stay errors."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore", "error:::specplug"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers and 64 tokens with random weights, whose greedy answers hardly repeat."""
    return interpreted.write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def open_engine(tiny: Path) -> Iterator[Callable[..., Any]]:
    """Opens `vllm.LLM` on the tiny model, or another one; all engines are closed at the end, and each before the next
    is opened."""
    from vllm import LLM

    interpreted.keep_asynchronous()
    interpreted.sort_instead_of_triton()
    opened: list[Any] = []

    def close() -> None:
        while opened:
            opened.pop().llm_engine.engine_core.shutdown()
            gc.collect()

    def open_one(model: Path = tiny, **settings: Any) -> Any:
        close()
        defaults = {"max_model_len": 128, "max_num_seqs": 4, "dtype": "float32", "enforce_eager": True, "seed": 1}
        llm = LLM(
            str(model),
            skip_tokenizer_init=True,
            disable_log_stats=False,
            gpu_memory_utilization=0.2,
            **{**defaults, **settings},
        )
        opened.append(llm)
        return llm

    yield open_one
    close()
