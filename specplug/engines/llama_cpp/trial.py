"""Tries the native library in this process, which may not survive it; `library_check.py` runs it as a child.

Decodes a few rows with a tiny model of given tensor types, or with a model file, and compares attention kernels on it.
Reads one JSON request from its argument, and prints one JSON line per finished part.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from dataclasses import replace
from math import sqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

MARK = "specplug-trial:"
"""Prefix of the lines for the parent, since the library may print lines of its own."""

ROWS = (1, 2, 33)
"""Row counts of the passes: the kernels of one row, of few and of many."""

CONTEXT = 4096
"""Tokens in the cache when kernels are compared: at a few hundred they hardly differ."""

CHECK_CONTEXT = 1024
"""Tokens in the cache when roundings are compared: enough for flash attention to split a row's sum."""

TIMED_ROWS, ROUNDS = (1, 4), 4
"""Row counts that are timed for each kernel, and how often."""

SECONDS = 1.0
"""Comparing kernels stops after this time."""


def main() -> None:
    request = json.loads(sys.argv[1])
    if request["imports"]:
        import llama_cpp  # noqa: F401

        _tell({"imports": True})
        return
    from specplug.engines.llama_cpp.model import load_model
    from specplug.engines.llama_cpp.tiny_model import Shape, write_tiny_model
    from specplug.profile import Runtime

    runtime = Runtime(**request["runtime"])
    with ExitStack() as stack:
        path = Path(request["file"])
        if request["types"] is not None and not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            folder = stack.enter_context(TemporaryDirectory(dir=path.parent))
            written = Path(folder) / path.name
            write_tiny_model(written, request["types"], Shape(**request["shape"]))
            written.rename(path)
        model = stack.enter_context(load_model(path, runtime))
        _decode(model, runtime)
        _tell({"decodes": True})
        if request["types"] is not None and request["compares"]:
            alone = replace(runtime, threads=1)  # several threads would wait for each other on a busy machine
            _tell({"equal_rows": _equal_rows(model, alone)})
            _tell({"kernels": _kernels(model, alone)})


def _decode(model: Any, runtime: Any) -> None:
    from specplug.engines.llama_cpp.cache_fill import hashed_tokens
    from specplug.engines.llama_cpp.context import open_context

    with open_context(model, runtime, cells=256, num_ids=2, max_rows=max(ROWS)) as context:
        for rows in ROWS:
            context.clear()
            context.clear_batch()
            context.add_span(hashed_tokens(0, rows, model.num_tokens), 0, 0, wanted=True)
            context.decode()
            context.logits(rows)


def _equal_rows(model: Any, runtime: Any) -> int:
    """The most rows that round alike with the settings under which attention always does."""
    from specplug.engines.llama_cpp.context import open_context
    from specplug.engines.llama_cpp.engine_settings import CHECKED_ROWS
    from specplug.engines.llama_cpp.exact_passes import rows_that_agree
    from specplug.engines.llama_cpp.measure import PassTimer

    equal = replace(runtime, flash_attention=True, kv_type="bf16")
    with open_context(model, equal, cells=CHECK_CONTEXT + 256, num_ids=2, max_rows=max(CHECKED_ROWS)) as context:
        PassTimer(context).fill(CHECK_CONTEXT)
        return rows_that_agree(context, CHECK_CONTEXT, CHECKED_ROWS)


def _kernels(model: Any, runtime: Any) -> list[tuple[bool, str, float]]:
    """Attention kernel, cache type and milliseconds for every pair of 16 bits; the geometric mean over TIMED_ROWS."""
    from specplug.engines.llama_cpp.context import open_context
    from specplug.engines.llama_cpp.engine_settings import attention_settings
    from specplug.engines.llama_cpp.measure import PassTimer

    began = perf_counter()
    with ExitStack() as stack:
        timers = {}
        for one in attention_settings(replace(runtime, flash_attention=None, kv_type=None)):
            if one.kv_type == "f32":
                continue
            context = open_context(model, one, cells=CONTEXT + 256, num_ids=2, max_rows=max(TIMED_ROWS))
            timers[bool(one.flash_attention), str(one.kv_type)] = timer = PassTimer(stack.enter_context(context))
            timer.fill(CONTEXT)
        times: dict[tuple[tuple[bool, str], int], list[float]] = {}
        for round_ in range(ROUNDS):
            if round_ and perf_counter() - began > SECONDS:
                break
            for rows in TIMED_ROWS:
                for pair, timer in timers.items():
                    timer.time(rows)
                    times.setdefault((pair, rows), []).append(timer.time(rows))
    few, many = TIMED_ROWS
    return [(*pair, sqrt(min(times[pair, few]) * min(times[pair, many]))) for pair in timers]


def _tell(part: dict[str, Any]) -> None:
    print(MARK + json.dumps(part), flush=True)


if __name__ == "__main__":
    main()
