"""Starts vLLM's engine in processes of its own, and shuts it down.

It does not depend on profiles: callers pass the model and the settings of `vllm.LLM`.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

from specplug.engines.vllm.environment import METRICS_VARIABLE, preload, quiet, temporary_environment
from specplug.engines.vllm.v2 import scheduled_lengths
from specplug.engines.vllm.versions import require
from specplug.errors import EngineError


@contextmanager
def open_llm(model: str, settings: Mapping[str, Any]) -> Iterator[tuple[Any, str]]:
    """A `vllm.LLM` that is shut down at the end, and the folder where its processes write their metrics.

    EngineError, in one line, when vLLM does not start.
    """
    require()
    folder = _temporary_metrics_folder()
    with quiet(), temporary_environment({METRICS_VARIABLE: folder, **preload(os.environ)}):
        from vllm import LLM

        scheduled_lengths.install()  # a forked engine does not load plugins again
        try:
            llm = LLM(model, **settings, disable_log_stats=False, use_tqdm_on_load=False)
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            raise EngineError(f"vLLM does not start with {model}: {' '.join(str(cause).split())[:500]}") from error
        try:
            yield llm, folder
        finally:
            llm.llm_engine.engine_core.shutdown()


def _temporary_metrics_folder() -> str:
    """A new folder for one engine's metrics. It is removed when this process ends."""
    folder = mkdtemp(prefix="specplug-")
    atexit.register(rmtree, folder, ignore_errors=True)
    return folder
