"""What a profile can say.

Knows names, types and defaults. Knows no file and no engine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from specplug.registry import ProposerSpec

SCHEMA = 1
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
ENGINES = ("llama-cpp", "vllm")
KV_TYPES = ("f16", "bf16", "f32", "q8_0")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class PlannerSettings:
    """`mode` measured: verify what the cost curve says pays. static: always the best `max_nodes` nodes."""

    mode: str = "measured"
    max_nodes: int = 24
    trees: bool = True


@dataclass(frozen=True, slots=True)
class Runtime:
    """How the engine opens the model; `threads` None is the engine's choice.

    coupled  above temperature 0, draw tokens by random numbers that a model that drafts can share: more of its guesses
             are right. A seed then gives another text than llama.cpp's own, the same whether or not anything drafts
    """

    threads: int | None = None
    context: int = 4096
    batch: int = 512
    gpu_layers: int = 0
    flash_attention: bool | None = None
    kv_type: str = "f16"
    coupled: bool = False


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """How vLLM opens the model, by its own flags' names; None is its own choice. `runtime` is llama.cpp's.

    num_speculative_tokens  longest chain of guesses for one sequence
    uniform                 so many guesses for every sequence of a batch, or none: what full CUDA graphs want
    gpu_memory_utilization  share of the memory; where several engines are open at once, of all of them together
    """

    num_speculative_tokens: int = 5
    uniform: bool = False
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    gpu_memory_utilization: float | None = None
    dtype: str = "auto"
    enforce_eager: bool = False


@dataclass(frozen=True, slots=True)
class CostPoints:
    """Milliseconds of one target pass: ms[i][j] with contexts[i] tokens per sequence in the cache and rows[j] rows.

    sequences  how many shared the pass; a curve of one says little about many, whose caches are all read
    change_ms  what a pass costs more after one of another row count
    """

    contexts: tuple[int, ...]
    rows: tuple[int, ...]
    ms: tuple[tuple[float, ...], ...]
    sequences: int = 1
    change_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Measured:
    """What was seen on one machine: its fingerprint, the cost curve, and (hits, misses) per bucket.

    batch_curves  for an engine whose batch changes: one curve per number of sequences, ascending
    """

    hardware: Mapping[str, Any] = field(default_factory=dict)
    cost_curve: CostPoints | None = None
    acceptance: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    batch_curves: tuple[CostPoints, ...] = ()


@dataclass(frozen=True, slots=True)
class Profile:
    """The only configuration object. Command-line flags are edits of one."""

    name: str
    description: str = ""
    engine: str = "llama-cpp"
    model: str | None = None
    proposers: tuple[ProposerSpec, ...] = (ProposerSpec("suffix"), ProposerSpec("token_recycling"))
    planner: PlannerSettings = PlannerSettings()
    exact: bool = False
    runtime: Runtime = Runtime()
    vllm: VllmSettings = VllmSettings()
    measured: Measured | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)

    @property
    def speculates(self) -> bool:
        """Whether any of its proposers drafts."""
        return any(spec.method != "none" for spec in self.proposers)


class Invalid(Exception):
    """What is wrong with a profile's text: `key: what; what to do`."""
