"""Estimates how long it takes to build a trimmed drafter, and how large it will be, from sizes alone.

Nothing is loaded or measured but the bandwidth of the memory; the estimate is for a question to the user, not for a
choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from specplug.bench.workloads import Prompt
from specplug.build.calibration import material
from specplug.build.vocab_trim import Request
from specplug.engines.llama_cpp.memory_need import weight_bytes
from specplug.machine import hardware
from specplug.models.hub_reference import weight_files

CORE_BYTES = 8e9
"""Bytes of quantised weights that one core computes per second in a pass over one row, where memory is no limit.
Measured with benchmarks/build_costs.py: 4.5e9 to 10.8e9 for four models (docs/lab-book/models.md)."""

READING = 1.8
"""Tokens of a given text that are evaluated, with the sums over all probabilities, in the time of a pass over one row.
Measured with the same: 1.7 to 2.2."""

PROMPT_TOKENS = 122
"""Mean number of tokens of the built-in prompts, by the same."""

FIXED_SECONDS = {False: 15.0, True: 90.0}
"""For opening the models, timing passes and writing; by whether the model is a checkpoint, which vLLM opens. Chosen."""

BATCH_GAIN = 4.0
"""How many times as many tokens per second vLLM generates with 16 requests at once on a CPU as with one. Chosen."""


def build_seconds(
    texts: Sequence[str] | Sequence[Prompt],
    tokens: int,
    *,
    model_bytes: int,
    target_bytes: int,
    checkpoint: bool = False,
    raw: bool = False,
) -> float | None:
    """How long a build takes on this machine where no answers were recorded yet; None on a GPU.

    texts   what is calibrated on, from `calibration.material`
    tokens  per answer
    raw     whether the texts themselves are counted, so that no answers are needed to count
    """
    if checkpoint and hardware.gpus():
        return None
    turns = sum(len(one.turns) if isinstance(one, Prompt) else 1 for one in texts)
    per_second = min(CORE_BYTES * hardware.usable_cores(), hardware.read_bandwidth() * 2**30)
    own, target = model_bytes / per_second, target_bytes / per_second
    answered = 0 if raw else turns * tokens
    if checkpoint:
        return FIXED_SECONDS[True] + answered * target / BATCH_GAIN
    evaluated = answered + turns * PROMPT_TOKENS
    return FIXED_SECONDS[False] + answered * target + evaluated * (own + target) / READING


def request_seconds(request: Request) -> float | None:
    """`build_seconds` of a request whose models are on this disk."""
    return build_seconds(
        material(request.calibrate),
        request.tokens,
        model_bytes=model_bytes(request.model),
        target_bytes=model_bytes(request.target),
        checkpoint=request.is_checkpoint,
        raw=request.is_raw,
    )


def drafter_bytes(request: Request) -> int:
    """Bytes of the drafter's folder; with all rows where their number is measured. UsageError for an unknown model."""
    if request.is_checkpoint:
        from specplug.transforms.checkpoint_head import head_shape as checkpoint_shape

        shape = checkpoint_shape(request.model, target=request.target)
        rows = request.selection.size or shape.num_tokens
        table = shape.num_tokens * shape.row_bytes  # the embeddings, which keep the full vocabulary
        return shape.step_bytes(min(rows, shape.num_tokens)) + table
    from specplug.transforms.gguf_head import trimmed_bytes
    from specplug.transforms.gguf_mtp_head import has_mtp, trimmed_mtp_bytes

    if has_mtp(request.model):
        return trimmed_mtp_bytes(request.model, request.selection.size, request.quantize)

    return trimmed_bytes(request.model, request.selection.size, request.quantize)


def model_bytes(model: Path) -> int:
    """Bytes of the weights of a GGUF model or a checkpoint."""
    if model.is_dir():
        names = weight_files(path.name for path in model.glob("*.safetensors"))
        return sum((model / name).stat().st_size for name in names)
    return weight_bytes(model)
