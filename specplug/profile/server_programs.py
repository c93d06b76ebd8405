"""Which program a server's command starts, by the words in it. Nothing is run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PureWindowsPath

LLAMA_SERVER, VLLM, SPECPLUG = "llama-server", "vllm", "specplug"

VLLM_MODULE = "vllm.entrypoints.openai.api_server"
"""What Python starts where vLLM is installed without its command; it takes vLLM's flags without the word `serve`."""

_MODULES = {VLLM_MODULE: VLLM, "vllm.entrypoints.cli.main": VLLM, "specplug_cli.main": SPECPLUG}
_LLAMA_NAME = re.compile(r"(.*[-_.])?llama-server([-_].*)?")


def launch_words(argv: Sequence[str]) -> list[str]:
    """The words to start a process with: `NAME=value` before a program is what `env` reads."""
    return ["env", *argv] if argv and assigns(argv[0]) else list(argv)


def assigns(word: str) -> bool:
    """Whether a shell would read a word before a program as the value of a variable."""
    return re.match(r"[A-Za-z_][A-Za-z0-9_]*=", word) is not None


def program_of(argv: Sequence[str]) -> str | None:
    """LLAMA_SERVER, which includes its forks, VLLM or SPECPLUG; None for a program whose flags are not known.

    Of vLLM and specplug, only the command `serve` has a server's flags. One without any command is what a model is
    still missing from.
    """
    if not argv:
        return None
    at = program_at(argv)
    found = _program(argv[at])
    if found in (VLLM, SPECPLUG) and argv[at] != VLLM_MODULE and at + 1 < len(argv) and serve_at(argv) is None:
        return None
    return found


def program_at(argv: Sequence[str]) -> int:
    """The place of the program among words that start it, such as `taskset -c 1 llama-server` or `python server.py`."""
    for at, word in enumerate(argv):
        if _program(word) is not None or word.endswith(".py"):
            return at
    return next((at for at, word in enumerate(argv) if not assigns(word) and word != "env"), 0)


def serve_at(argv: Sequence[str]) -> int | None:
    """The place of the word `serve` after the program: its first word that is no flag. None where that is another."""
    words = enumerate(argv[program_at(argv) + 1 :], program_at(argv) + 1)
    at, word = next(((at, word) for at, word in words if not word.startswith("-")), (0, ""))
    return at if word == "serve" else None


def _program(word: str) -> str | None:
    """The program that one word names; None where it names none that is known."""
    if word.startswith("-") or assigns(word):
        return None
    name = _name(word)
    if _LLAMA_NAME.fullmatch(name):
        return LLAMA_SERVER
    return name if name in (VLLM, SPECPLUG) else _MODULES.get(word)


def _name(word: str) -> str:
    """A program's name without its folder; a path may have either separator."""
    return PureWindowsPath(word).name.lower().removesuffix(".exe")
