"""The flags with which servers draft: which ones turn it on, and which ones set it."""

from __future__ import annotations

from collections.abc import Sequence

from specplug.subjects.help_text import Help

LLAMA_SWITCHES = frozenset(
    "--spec-type --spec-default "
    "--spec-draft-model --model-draft -md "
    "--spec-draft-hf --hf-repo-draft -hfd -hfrd "
    "-mtp --multi-token-prediction".split()
)
"""Flags of llama-server and its forks that turn drafting on."""

LLAMA_SETTINGS = frozenset(
    "--draft --draft-n --draft-max --draft-min --draft-n-min --draft-p-min --draft-p-split --draft-params "
    "-td --threads-draft -tbd --threads-batch-draft -cd --ctx-size-draft -ngld --gpu-layers-draft "
    "--n-gpu-layers-draft -devd --device-draft -ctkd --cache-type-k-draft -ctvd --cache-type-v-draft "
    "-otd --override-tensor-draft -ncmoed --n-cpu-moe-draft -cmoed --cpu-moe-draft "
    "-lcs --lookup-cache-static -lcd --lookup-cache-dynamic".split()
)
"""Flags that have an effect on drafting only where it is on, beside all that begin with `--spec-` or `--no-spec-`."""

VLLM_SWITCHES = frozenset("--speculative-config -sc --speculative-model --spec-method --spec-model".split())
VLLM_SETTINGS = frozenset("--num-speculative-tokens --spec-tokens".split())


def is_switch(kind: str, name: str) -> bool:
    """Whether a flag turns drafting on. kind: of the server, as `ServerCommand.kind`."""
    if kind == "vllm":
        return name in VLLM_SWITCHES or name.startswith(("--speculative-config.", "--speculative_config"))
    return kind == "llama-server" and name in LLAMA_SWITCHES


def is_drafting(kind: str, name: str) -> bool:
    """Whether a flag has an effect on drafting only."""
    if kind == "vllm":
        return is_switch(kind, name) or name in VLLM_SETTINGS
    return kind == "llama-server" and (
        name in LLAMA_SWITCHES or name in LLAMA_SETTINGS or name.startswith(("--spec-", "--no-spec-"))
    )


def drafting_words(kind: str, words: Sequence[str], offered: Help | None) -> list[int]:
    """The places of all drafting flags and their values in a command line.

    offered  the flags of a llama-server's build, which say which of them take a value; one that is not in it takes one
    """
    found = []
    for at, word in enumerate(words):
        name, assigned, _ = word.partition("=")
        name = flag_name(kind, name)
        if not word.startswith("-") or not is_drafting(kind, name):
            continue
        found.append(at)
        alone = offered is not None and name in offered.flags and not offered.flags[name].value
        if not assigned and not alone and at + 1 < len(words):
            found.append(at + 1)
    return found


def flag_name(kind: str, name: str) -> str:
    """The name as the help has it: both servers read `_` in a long flag as `-`."""
    return name.replace("_", "-") if name.startswith("--") and kind in ("llama-server", "vllm") else name
