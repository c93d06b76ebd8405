"""Fixtures of the tests that send requests with other programs' clients. `make test-clients` runs them.

A client that is not installed is skipped. This folder is no package: `tests` is on the import path.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if not all(find_spec(name) for name in ("llama_cpp", "fastapi", "uvicorn", "llguidance")):
    collect_ignore_glob = ["test_*.py"]

KEY = "KEY"
"""The key in the recipes of docs/how-to/clients.md."""

PROFILE = """schema: 1
name: plain
engine: llama-cpp
proposers: [none]
runtime: {context: 8192, threads: 1}
"""

NO_CONNECTION = {
    "ANONYMIZED_TELEMETRY": "False",
    "DO_NOT_TRACK": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
}
"""Clients read these variables when they are imported."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ignore warnings of other packages. Warnings of specplug stay errors."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for ignored in ("ignore", "error:::specplug"):
                item.add_marker(pytest.mark.filterwarnings(ignored))


@pytest.fixture(scope="session", autouse=True)
def no_connection() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in NO_CONNECTION.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def server(demo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server that is open to containers, as the recipes start it."""
    from serving import served

    flags = ("--host", "0.0.0.0", "--api-key", KEY, "--name", "smollm2")
    with served(tmp_path_factory.mktemp("served"), demo_path, *flags, profile=PROFILE) as started:
        yield started
