"""The flags with which servers draft: which ones turn it on, which ones set it, and how many values each takes."""

from __future__ import annotations

from collections.abc import Sequence

LLAMA_SWITCHES = frozenset(
    "--spec-type --spec-default "
    "--spec-draft-model --model-draft -md "
    "--spec-draft-hf --hf-repo-draft -hfd -hfrd "
    "-mtp --multi-token-prediction".split()
)
"""Flags of llama-server and its forks that turn drafting on."""

LLAMA_WITHOUT_VALUE = frozenset(
    "--spec-default -mtp --multi-token-prediction "
    "--spec-draft-backend-sampling --no-spec-draft-backend-sampling "
    "--spec-draft-cpu-moe -cmoed --cpu-moe-draft".split()
)

LLAMA_SETTINGS = frozenset(
    "--draft --draft-n --draft-max --draft-min --draft-n-min --draft-p-min --draft-p-split --draft-params "
    "-td --threads-draft -tbd --threads-batch-draft -cd --ctx-size-draft -ngld --gpu-layers-draft "
    "--n-gpu-layers-draft -devd --device-draft -ctkd --cache-type-k-draft -ctvd --cache-type-v-draft "
    "-otd --override-tensor-draft -ncmoed --n-cpu-moe-draft "
    "-lcs --lookup-cache-static -lcd --lookup-cache-dynamic".split()
)
"""Flags that have an effect on drafting only where it is on, beside all that begin with `--spec-`."""

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
        name in LLAMA_SWITCHES or name in LLAMA_SETTINGS or name in LLAMA_WITHOUT_VALUE or name.startswith("--spec-")
    )


def drafting_words(kind: str, words: Sequence[str]) -> list[int]:
    """The places of all drafting flags and their values in a command line."""
    found = []
    for at, word in enumerate(words):
        name, assigned, _ = word.partition("=")
        if not word.startswith("-") or not is_drafting(kind, flag_name(kind, name)):
            continue
        found.append(at)
        if not assigned and flag_name(kind, name) not in LLAMA_WITHOUT_VALUE and at + 1 < len(words):
            found.append(at + 1)
    return found


def flag_name(kind: str, name: str) -> str:
    """The name as the help has it: both servers read `_` in a long flag as `-`."""
    return name.replace("_", "-") if name.startswith("--") and kind in ("llama-server", "vllm") else name
