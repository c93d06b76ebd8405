import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# No deadline, since a busy machine is slow; in CI every run uses the same examples.
settings.register_profile("specplug", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("specplug")

# A process that a shell starts in the background ignores SIGINT, and so would the commands that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


BROWSERS = [found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))]
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]

FORMATS = ("f32", "bf16", "q8_0", "q4_0")


@pytest.fixture(scope="session")
def demo_path() -> Path:
    """The packaged model: SmolLM2-135M-Instruct, Q4_1."""
    from specplug.models.references import resolve

    return resolve("demo:smollm2")


@pytest.fixture(scope="session")
def formats(demo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The packaged model in other weight formats, by name."""
    from specplug.transforms.requantise import requantise

    folder = tmp_path_factory.mktemp("models")
    return {name: requantise(demo_path, folder / f"smollm2-{name}.gguf", name) for name in FORMATS}


@pytest.fixture(scope="session")
def f32(formats: dict[str, Path]) -> Iterator[object]:
    from specplug.engines.llama_cpp.model import open_model

    with open_model(formats["f32"]) as model:
        yield model


@pytest.fixture(scope="session")
def q8_0(formats: dict[str, Path]) -> Iterator[object]:
    from specplug.engines.llama_cpp.model import open_model

    with open_model(formats["q8_0"]) as model:
        yield model


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not BROWSERS and not os.environ.get("SPECPLUG_NEEDS_BROWSER"):
        pytest.skip("no Chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSERS[0], args=FLAGS)
        yield chromium
        chromium.close()
