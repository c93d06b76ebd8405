"""Which program a server's command starts, by the words in it. Nothing is run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PureWindowsPath

LLAMA_SERVER = "llama-server"
VLLM = "vllm"
VLLM_MODULE = "vllm.entrypoints.openai.api_server"
"""What Python starts where vLLM is installed without its command."""


def launch_words(argv: Sequence[str]) -> list[str]:
    """The words to start a process with: `NAME=value` before a program is what `env` reads."""
    return ["env", *argv] if argv and assigns(argv[0]) else list(argv)


def assigns(word: str) -> bool:
    """Whether a shell would read a word before a program as the value of a variable."""
    return re.match(r"[A-Za-z_][A-Za-z0-9_]*=", word) is not None


def program_of(argv: Sequence[str]) -> str | None:
    """LLAMA_SERVER or VLLM; None for a program whose flags are not known."""
    words = list(argv)
    name = PureWindowsPath(words[0]).name.removesuffix(".exe") if words else ""  # a path with either separator
    if name == LLAMA_SERVER:
        return LLAMA_SERVER
    if name == VLLM and words[1:2] == ["serve"]:
        return VLLM
    if name.startswith("python") and words[1:3] in (["-m", VLLM_MODULE], ["-m", "vllm.entrypoints.cli.main"]):
        return VLLM
    return None
