"""Counts the operations of drafting with early exits in vLLM's V2 model runner, on a CPU.

    python benchmarks/v2_exit_cost.py

Triton's interpreter runs vLLM's kernels; the drafter uses none of its own. An operation is one that computes, as in
v2_cost.py: on a GPU each is at least a kernel, though vLLM's GPU layers and attention are made of other ones than those
of a CPU. The model is tiny and random, so that times mean nothing and are not printed. Prints, by exit and length of
the chains, the operations of a step, and what a draft token costs in passes of the target by the drafter's own model.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, os.fspath(Path(__file__).parents[1] / "tests" / "vllm_v2"))

LAYERS = 6
EXITS = (1, 2, 4)
LENGTHS = (1, 2, 4)


def main() -> None:
    import interpreted  # before vllm

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    interpreted.keep_asynchronous()
    print(f"| layers of {LAYERS} | draft tokens | operations of a step | passes per draft token |\n|---|---|---|---|")
    with TemporaryDirectory() as folder:
        model = interpreted.write_tiny_model(Path(folder) / "tiny", layers=LAYERS)
        for layers in EXITS:
            for length in LENGTHS:
                operations, cost = measured(model, Path(folder) / "profile.yaml", layers, length)
                print(f"| {layers} | {length} | {operations} | {cost:.2f} |", flush=True)
                gc.collect()


def measured(model: Path, path: Path, layers: int, length: int) -> tuple[int, float]:
    """Operations of a step that drafts, and passes of the target per draft token."""
    from v2_cost import Operations
    from vllm import LLM, SamplingParams

    from specplug import profile as profiles
    from specplug.engines.vllm.runner_choice import settings_for

    path.write_text(
        "schema: 1\nname: test\nengine: vllm\n"
        f"proposers: [{{method: early_exit, exits: [{layers}], exit: {layers}}}]\n"
        f"vllm: {{num_speculative_tokens: {length}, runner: v2}}\n"
    )
    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "max_num_seqs": 2}
    settings |= settings_for(profiles.load(os.fspath(path)), os.fspath(path))
    llm = LLM(os.fspath(model), skip_tokenizer_init=True, gpu_memory_utilization=0.2, **settings)
    prompts = [{"prompt_token_ids": [n + 1, 2, 3, 4, 5]} for n in range(2)]
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, detokenize=False)
    llm.generate(prompts, params, use_tqdm=False)
    client: Any = llm.llm_engine.engine_core
    drafting = client.engine_core.model_executor.driver_worker.worker.model_runner.speculator.drafting
    step, counts = drafting.step, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        with Operations() as operations:
            found = step(*args, **kwargs)
        counts.append(operations.count)
        return found

    drafting.step = counted
    llm.generate(prompts, params, use_tqdm=False)
    drafting.step = step
    client.shutdown()
    return max(counts), drafting.proposers[0].draft_costs[0]


if __name__ == "__main__":
    main()
