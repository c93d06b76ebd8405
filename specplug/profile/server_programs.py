"""Which program a server's command starts, by the names in it. Nothing is run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PureWindowsPath

LLAMA_SERVER = "llama-server"
VLLM = "vllm"
VLLM_MODULE = "vllm.entrypoints.openai.api_server"
"""What Python starts where vLLM is installed without its command."""


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
