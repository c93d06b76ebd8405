"""The settings of a profile: names, types and defaults. Reading and checking them is done elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from specplug.registry import ProposerSpec

SCHEMA = 1
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
ENGINES = ("llama-cpp", "vllm")
"""The engines that specplug drafts in."""

SERVER = "server"
"""The engine of a profile that starts another program's server: specplug does not draft there."""

KV_TYPES = ("f16", "bf16", "f32", "q8_0")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def as_name(text: str, default: str) -> str:
    """A name of at most 80 characters, made of a text; `default` where the text has nothing that a name may have."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower().removesuffix(".gguf")).strip("-._")[:80] or default


@dataclass(frozen=True, slots=True)
class PlannerSettings:
    """The planner's settings: how many draft tokens it verifies.

    mode         measured: as many as are fastest by the cost curve, down to none. static: the likeliest `max_nodes`
    max_nodes    draft tokens of one step, at most
    trees        whether a draft may branch
    prune_top_k  where a draft model has drafted: drop other drafts whose first token it can draft, but does not find
                 among so many likeliest ones. None drops none: how far such tokens are trusted is then learned
    """

    mode: str = "measured"
    max_nodes: int = 24
    trees: bool = True
    prune_top_k: int | None = None


@dataclass(frozen=True, slots=True)
class Runtime:
    """Settings with which llama.cpp opens the model. None leaves the choice to the engine.

    threads          CPU threads of passes over one row
    threads_batch    CPU threads of passes over several rows: prompts and drafts. None: as many as `threads`
    context          tokens of one sequence, prompt and answer together, at most
    batch            tokens of one pass, at most
    ubatch           tokens of a pass that llama.cpp computes at a time. None: all of them
    gpu_layers       layers on the GPU; -1 for all
    flash_attention  whether attention is computed by the flash attention kernel
    kv_type          number format of the KV cache, one of KV_TYPES
    repack           whether the CPU's kernels get a copy of the weights in a layout of their own
    mmap             whether weights are mapped into memory, instead of read into it
    coupled          above temperature 0, sample with random numbers that a draft model shares, so that more of its
                     draft tokens are accepted. A seed then yields another text than llama.cpp's own sampling, and the
                     same text with and without drafting
    snapshot_mib     MiB at most for the states that a recurrent or hybrid model's drafts need to be taken back
    """

    threads: int | None = None
    threads_batch: int | None = None
    context: int = 4096
    batch: int = 512
    ubatch: int | None = None
    gpu_layers: int = 0
    flash_attention: bool | None = None
    kv_type: str | None = None
    repack: bool = True
    mmap: bool = True
    coupled: bool = False
    snapshot_mib: int = 1024


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """Settings with which vLLM opens the model, by the names of its own flags. None leaves the choice to vLLM.

    num_speculative_tokens  draft tokens for one sequence in one step, at most
    runner                  auto, v1 or v2: the model runner that specplug's proposers draft in
    uniform                 on V1, draft the same number of tokens for every sequence of a batch, or none: full CUDA
                            graphs require that
    adaptive_verification   on V2, let vLLM choose the draft tokens to verify in each step; None where it can
    tokens_per_batch_size   on V2, (first, last, tokens): draft tokens per sequence by the number of running sequences
    gpu_memory_utilization  share of the GPU memory; several engines that are open at once divide it among them
    """

    num_speculative_tokens: int = 5
    runner: str = "auto"
    uniform: bool = False
    adaptive_verification: bool | None = None
    tokens_per_batch_size: tuple[tuple[int, int, int], ...] = ()
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    gpu_memory_utilization: float | None = None
    dtype: str = "auto"
    enforce_eager: bool = False


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """The command of a server that drafts by itself, such as llama-server.

    command  the program and the user's own arguments, as they were typed
    flags    what follows them: flags that were chosen by measurement
    """

    command: tuple[str, ...]
    flags: tuple[str, ...] = ()

    @property
    def argv(self) -> list[str]:
        """The complete command."""
        return [*self.command, *self.flags]


@dataclass(frozen=True, slots=True)
class CostPoints:
    """Milliseconds of one target pass: ms[i][j] with contexts[i] tokens per sequence in the cache and rows[j] rows.

    sequences  sequences in each pass; a curve for one does not hold for many, whose caches are all read
    change_ms  extra milliseconds of a pass that follows one with another number of rows
    """

    contexts: tuple[int, ...]
    rows: tuple[int, ...]
    ms: tuple[tuple[float, ...], ...]
    sequences: int = 1
    change_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Measured:
    """Measurements on one machine: its fingerprint, the cost curve, and (hits, misses) per bucket.

    batch_curves  for an engine whose batch size varies: one curve per number of sequences, ascending
    """

    hardware: Mapping[str, Any] = field(default_factory=dict)
    cost_curve: CostPoints | None = None
    acceptance: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    batch_curves: tuple[CostPoints, ...] = ()


@dataclass(frozen=True, slots=True)
class Remember:
    """What `run` and `serve` remember from one process to the next.

    corpus      name of the corpus that the answers are added to
    prompts     whether it also gets the prompts, which drafting then finds as well
    max_tokens  of all answers together; the oldest are dropped
    """

    corpus: str
    prompts: bool = False
    max_tokens: int = 1 << 20


@dataclass(frozen=True, slots=True)
class Profile:
    """The only configuration object. Command-line flags edit a copy of it.

    own_heads  whether layers that a model's file brings to draft for it draft as well
    server     the command of engine `server`, None for other engines. Only `name`, `description`, `evidence` and this
               have a meaning there
    """

    name: str
    description: str = ""
    engine: str = "llama-cpp"
    model: str | None = None
    proposers: tuple[ProposerSpec, ...] = (ProposerSpec("suffix"), ProposerSpec("token_recycling"))
    own_heads: bool = False
    planner: PlannerSettings = PlannerSettings()
    exact: bool = False
    runtime: Runtime = Runtime()
    vllm: VllmSettings = VllmSettings()
    server: ServerSettings | None = None
    remember: Remember | None = None
    measured: Measured | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)

    @property
    def speculates(self) -> bool:
        """Whether the profile drafts at all: false for plain decoding."""
        return any(spec.method != "none" for spec in self.proposers)


class Invalid(Exception):
    """A profile is invalid; the message has the form `key: the problem; what to do`."""
