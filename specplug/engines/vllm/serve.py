"""vLLM's own OpenAI server with a profile: the command that starts it, and its environment.

Knows the command line of the server. Starts nothing itself: the caller becomes the server.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from time import time
from typing import Any
from uuid import uuid4

from platformdirs import user_cache_dir

from specplug.engines.vllm.configure import server_command
from specplug.engines.vllm.environment import METRICS, preload
from specplug.engines.vllm.offline import prepare
from specplug.engines.vllm.versions import require
from specplug.errors import SpecplugError, UsageError
from specplug.profile import Profile

KEPT_DAYS = 7
"""A command that was printed may be run later, and a server may be idle for long."""

OURS = ("--model", "--speculative-config", "-sc", "--additional-config")
"""Flags of vLLM that a profile decides."""


REPLICAS = "data_parallel"
"""What the names of their flags begin with."""


@dataclass(frozen=True, slots=True)
class Command:
    """argv, and what the environment needs beside what it has."""

    argv: list[str]
    environment: dict[str, str]


def command(
    ref: str,
    profile: Profile,
    *,
    host: str | None = None,
    port: int | None = None,
    api_key: str | None = None,
    further: Sequence[str] = (),
    environment: Mapping[str, str] = os.environ,
    notify: Callable[[str], None] = lambda text: None,
) -> Command:
    """How to start the server; costs are measured first where nothing knows them. UsageError for flags that clash.

    api_key  goes into the environment: an argument list can be read by everybody on the machine
    further  vLLM's own flags; they win over the profile's
    """
    for flag in further:
        name = flag.split("=")[0].split(".")[0]
        if name.replace("_", "-") in OURS:
            raise UsageError(f"{name}: the profile decides that; change the profile, or start vLLM itself")
    environment = dict(environment)  # measuring changes it for a while
    distribution, _ = require()
    model, settings, _ = prepare(ref, profile, notify=notify, further={}, measured_with=engine_flags(further))
    flags = [*(["--host", host] if host else []), *(["--port", str(port)] if port else []), *further]
    needed = preload(environment) | ({"VLLM_API_KEY": api_key} if api_key else {})
    if profile.speculates and METRICS not in environment:
        needed[METRICS] = str(metrics_folder())
    return Command(server_command(model, settings, flags, distribution=distribution), needed)


def engine_flags(flags: Sequence[str]) -> dict[str, Any]:
    """Those of vLLM's own flags that decide what a pass costs, as arguments of `vllm.LLM`, but for what is the default.

    Replicas are left out: each makes passes of its own, and `vllm.LLM` has none.
    """
    if not flags:
        return {}
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    usual, given = vars(parser.parse_args([])), vars(parser.parse_known_args(list(flags))[0])
    known = {field.name for field in fields(EngineArgs) if not field.name.startswith(REPLICAS)}
    known -= {"disable_log_stats", "served_model_name"}
    return {name: value for name, value in given.items() if name in known and value != usual.get(name)}


def metrics_folder() -> Path:
    """A fresh folder for a server's figures; those that nobody has written to for KEPT_DAYS are removed."""
    parent = Path(user_cache_dir("specplug")) / "metrics"
    folder = parent / uuid4().hex
    try:
        for old in parent.iterdir() if parent.is_dir() else ():
            latest = max((path.stat().st_mtime for path in [old, *old.glob("*")]), default=0.0)
            if time() - latest > KEPT_DAYS * 86_400:
                shutil.rmtree(old, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise SpecplugError(f"{folder}: cannot be made ({error.strerror}); free the place") from None
    return folder
