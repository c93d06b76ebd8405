"""Compares the number of draft tokens that vLLM's adaptive verification admits with the choice of specplug's planner.

    python benchmarks/v2_budget.py texts.jsonl

Runs in the environment with vLLM; `benchmarks/v2_acceptance.py` says how to record texts. The steps are those of
replayed answers, 16 at once, with specplug's probabilities. Both see the same cost of a pass by rows: a constant time
up to some rows and a straight line from there on, as weights and arithmetic limit it. vLLM decides on the host with the
probabilities of an earlier step, so the last column has those of the step before.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from v2_acceptance import ARMS, replay_device
from vllm.v1.worker.gpu.spec_decode.adaptive_verification import (
    AdaptiveVerificationManager,
    build_cost_tables_from_curves,
)

from specplug.core import FloatArray
from specplug.planning.batch_speculator import best_count, ranked
from specplug.planning.constants import MIN_SPEEDUP

AT_ONCE, K = 16, 8
ROWS = AT_ONCE * (1 + K)
COSTS = {
    "flat": lambda rows: 10.0,
    "flat up to 64 rows": lambda rows: max(10.0, 10.0 * rows / 64),
    "flat up to 24 rows": lambda rows: max(10.0, 10.0 * rows / 24),
    "steep": lambda rows: 2.0 + 0.5 * rows,
}
"""Milliseconds of a pass by rows."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    lines = [json.loads(line) for line in parser.parse_args().texts.read_text().splitlines()]
    texts = [(line["prompt"], line["out"]) for line in lines if len(line["out"]) > 1]
    num_tokens = 1 + max(max(*prompt, *out) for prompt, out in texts)
    steps = replay_device(texts, ARMS["suffix + token_recycling"], K, AT_ONCE, num_tokens).confidences
    print(f"{len(steps)} steps, up to {AT_ONCE} answers at once, {K} draft tokens for each\n")
    print("| cost of a pass | draft tokens | the same | without the least speedup | with the step before |")
    print("|---|---|---|---|---|")
    for name, cost in COSTS.items():
        ms = np.array([cost(rows) for rows in range(1, ROWS + 1)])
        same = plain = late = total = late_steps = 0
        for before, step in zip([None, *steps], steps, strict=False):
            ours, stock = planned(step, ms, MIN_SPEEDUP), admitted(step, ms)
            same += ours == stock
            plain += planned(step, ms, 1.0) == stock
            total += stock
            if before is not None and len(before) == len(step):
                late += ours == admitted(before, ms)
                late_steps += 1
        shares = f"{same / len(steps):.3f} | {plain / len(steps):.3f} | {late / late_steps:.3f}"
        print(f"| {name} | {total / len(steps):.1f} | {shares} |")


def planned(confidence: FloatArray, ms: FloatArray, least_speedup: float) -> int:
    """The planner's number of draft tokens."""
    n = len(confidence)
    _, probability = ranked(confidence.cumprod(1), len(ms) - n)
    return best_count(probability, n, ms, least_speedup)


def admitted(confidence: FloatArray, ms: FloatArray) -> int:
    """vLLM's number of draft tokens; its own code calculates it."""
    n = len(confidence)
    ids = [str(row) for row in range(n)]
    manager: Any = AdaptiveVerificationManager.__new__(AdaptiveVerificationManager)
    manager.req_states = SimpleNamespace(
        req_id_to_index={one: row for row, one in enumerate(ids)},
        num_computed_tokens_np=np.full(n, 50, dtype=np.int32),
        prefill_len=SimpleNamespace(np=np.full(n, 10, dtype=np.int32)),
    )
    manager.num_speculative_steps = K
    manager.num_bonus_tokens = 1
    manager._max_total_logits = 1 << 20
    manager._stale_confidences, manager._stale_idx = [SimpleNamespace(np=confidence.astype(np.float32))], 0
    curve: Sequence[tuple[int, float]] = [(rows, float(ms[rows - 1])) for rows in range(1, ROWS + 1)]
    manager.cost_tables = build_cost_tables_from_curves([(1, 0.0), (n + 1, 0.0)], list(curve), n, ROWS)
    manager.get_num_tokens(dict.fromkeys(ids, 1 + K), dict.fromkeys(ids, [-1] * K))
    return int(manager._batch_budget[2])


if __name__ == "__main__":
    main()
