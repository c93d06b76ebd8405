"""A server's command as messages show it: quoted for a shell, with its keys hidden."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from specplug.profile.server_programs import launch_words

HIDDEN = "***"

_KEYS = ("--api-key", "-hft", "--hf-token")
"""Flags of llama-server and vLLM whose values are keys. vLLM takes several after `--api-key`."""

_KEY_VARIABLE = re.compile(r"\w*(KEY|TOKEN|SECRET|PASSWORD)\w*=", re.IGNORECASE)


def shown(argv: Sequence[str]) -> str:
    """The command for a shell, which would start the server but for the hidden keys."""
    return " ".join(word if word == HIDDEN else shlex.quote(word) for word in launch_words(without_keys(argv)))


def without_keys(argv: Sequence[str]) -> list[str]:
    """The words, with HIDDEN in place of each API key and access token."""
    found: list[str] = []
    flag = ""
    for word in argv:
        name, assigned, _ = word.partition("=")
        if flag and (found[-1] == flag or not word.startswith("-")):
            found.append(HIDDEN)
            continue
        flag = word if word.replace("_", "-") in _KEYS else ""
        secret = bool(assigned) and (name.replace("_", "-") in _KEYS or _KEY_VARIABLE.match(word) is not None)
        found.append(f"{name}={HIDDEN}" if secret else word)
    return found
