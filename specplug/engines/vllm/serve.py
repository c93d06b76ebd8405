"""Builds the command line and environment of vLLM's own OpenAI server for a profile.

It starts no server: the caller replaces its own process with the command.
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

from specplug.engines.vllm.configure import server_command
from specplug.engines.vllm.environment import METRICS_VARIABLE, preload, quiet
from specplug.engines.vllm.located_model import served_name
from specplug.engines.vllm.offline import prepare
from specplug.engines.vllm.versions import require
from specplug.errors import SpecplugError, UsageError
from specplug.machine.folders import cache_folder, reason
from specplug.profile import Profile

METRICS_DAYS = 7
"""Days until an unused metrics folder is removed: a printed command may be run later, and a server may be idle."""

PROFILE_FLAGS = ("--model", "--speculative-config", "-sc", "--additional-config")
"""Flags of vLLM that the profile decides."""

SERVED_NAME = "--served-model-name"

REPLICA_PREFIX = "data_parallel"
"""The start of the names of all arguments about replicas."""


@dataclass(frozen=True, slots=True)
class Command:
    """The argument list, and the variables to add to the environment."""

    argv: list[str]
    environment: dict[str, str]


@quiet()
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
    """The command that starts the server; missing costs are measured first.

    api_key  is passed in the environment, because every user of the machine can read an argument list
    further  vLLM's own flags, which override the profile's
    UsageError for a flag that the profile decides.
    """
    check_flags(further)
    environment = dict(environment)  # a copy, because measuring changes the variables temporarily
    distribution, _ = require()
    model, settings, profile = prepare(
        ref,
        profile,
        notify=notify,
        overrides={},
        measured_with=engine_flags(further),
        replicas=_given(further).get("data_parallel_size") or 1,
    )
    public_name = served_name(ref)
    own = any(flag.split("=")[0].replace("_", "-") == SERVED_NAME for flag in further)
    flags = [
        *(["--host", host] if host else []),
        *(["--port", str(port)] if port else []),
        *([SERVED_NAME, public_name] if public_name and not own else []),
        *further,
    ]
    added = preload(environment) | ({"VLLM_API_KEY": api_key} if api_key else {})
    if profile.speculates and METRICS_VARIABLE not in environment:
        added[METRICS_VARIABLE] = str(new_metrics_folder())
    return Command(server_command(model, settings, flags, distribution=distribution), added)


def check_flags(further: Sequence[str]) -> None:
    """UsageError for a flag of vLLM that the profile decides."""
    for flag in further:
        name = flag.split("=")[0].split(".")[0]
        if name.replace("_", "-") in PROFILE_FLAGS:
            raise UsageError(f"{name}: the profile decides that; change the profile, or start vLLM without specplug")


def engine_flags(flags: Sequence[str]) -> dict[str, Any]:
    """The flags that can change the cost of a pass, as arguments of `vllm.LLM`, without those at their defaults.

    Flags about replicas are left out: each replica runs passes of its own, and `vllm.LLM` has no replicas.
    """
    without = ("disable_log_stats", "served_model_name")
    return {
        name: value
        for name, value in _given(flags).items()
        if name not in without and not name.startswith(REPLICA_PREFIX)
    }


def _given(flags: Sequence[str]) -> dict[str, Any]:
    """The flags that are arguments of an engine, without those at their defaults."""
    if not flags:
        return {}
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    defaults, given = vars(parser.parse_args([])), vars(parser.parse_known_args(list(flags))[0])
    known = {field.name for field in fields(EngineArgs)}
    return {name: value for name, value in given.items() if name in known and value != defaults.get(name)}


def new_metrics_folder() -> Path:
    """A new folder for a server's metrics. Folders without a change for METRICS_DAYS are removed."""
    parent = cache_folder() / "metrics"
    folder = parent / uuid4().hex
    try:
        for old in parent.iterdir() if parent.is_dir() else ():
            latest = max((path.stat().st_mtime for path in [old, *old.glob("*")]), default=0.0)
            if time() - latest > METRICS_DAYS * 86_400:
                shutil.rmtree(old, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise SpecplugError(f"{folder}: cannot be created ({reason(folder, error)}); make the path writable") from None
    return folder
