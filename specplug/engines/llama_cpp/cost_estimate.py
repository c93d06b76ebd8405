"""An estimate of T(rows, context) for a model that was not measured: its shape, in units of T(1).

The rows' part lies in the middle of curves measured on CPUs (docs/lab-book/first-answers.md, cost-curves.md); passes
correct it. Does not run the model.
"""

from __future__ import annotations

from specplug.engines.llama_cpp.engine_settings import can_offload
from specplug.engines.llama_cpp.model import Model
from specplug.profile import CostPoints, Runtime

CONTEXTS = (0, 4096)
"""Tokens in the cache at which the estimate is given; it is linear between and beyond them."""

SHAPES = {
    (True, True): (0.5, 0.57),
    (True, False): (0.8, 0.55),
    (False, True): (0.95, 0.68),
    (False, False): (2.0, 0.59),
}
"""By (16 or 32 bits per weight, several threads): a and b in T(n) / T(1) = 1 + a (n - 1)^b with an empty cache."""

BLOCKS = ((16, 0.75), (4, 0.88))
"""Rows, and the factor on T(n) of quantised weights where n is a multiple of them from 8 on: kernels compute rows in
blocks of 4 and 16, and left-over rows one by one."""

GPU_SHAPE = (0.02, 1.0)
"""The same where all layers are on a GPU, which is limited by memory up to many rows. Chosen, not measured."""

ATTENTION = 3.0
"""Time per cached token, attention head and number of a head, over the time per byte of the weights. Measured on
SmolLM2 q8_0 and Qwen 0.5B Q4_K_M, two threads (docs/lab-book/engine-settings.md): 2.5 to 3.3."""

ATTENTION_POWER = 0.7
"""Attention over n rows takes n to this power times as long as over one. Measured on the same: 0.6 to 0.75."""


def estimated_points(model: Model, runtime: Runtime, limit: int) -> CostPoints:
    """T(n) / T(1) for 1..limit rows."""
    on_gpu = can_offload() and not 0 <= runtime.gpu_layers < model.num_layers
    a, b = GPU_SHAPE if on_gpu else SHAPES[model.is_full_precision, (runtime.threads or 1) > 1]
    slope = ATTENTION * model.attention_width / max(1, model.num_bytes)
    rows = range(1, limit + 1)
    blocks = not (on_gpu or model.is_full_precision)
    empty = [(1.0 + a * (n - 1) ** b) * (_block_factor(n) if blocks else 1.0) for n in rows]
    ms = [
        [own + slope * context * n**ATTENTION_POWER for n, own in zip(rows, empty, strict=True)] for context in CONTEXTS
    ]
    return CostPoints(CONTEXTS, tuple(rows), tuple(map(tuple, ms)))


def _block_factor(rows: int) -> float:
    return next((factor for block, factor in BLOCKS if rows >= 8 and rows % block == 0), 1.0)
