"""Compares specplug in vLLM's V2 model runner with stock vLLM on a GPU, in at most twelve minutes.

    python benchmarks/vllm_gpu.py --model PATH --out RESULT.json
    python benchmarks/vllm_gpu.py --tiny     # tries the benchmark itself on a CPU; its figures mean nothing

Without `--model` a Llama with 16 layers and random weights is made here: its text is no text, so acceptance is that of
repetitions only, but the cost of steps is right. Every arm is an engine in a process of its own, one after the other;
each answers the same prompts at 1, 8 and 64 streams. Arms that do not fit into the time are left out, and named.
Prints one table: tokens per second, the ratio to stock vLLM with its defaults, the CUDA graphs in use, accepted tokens
per step; and then what drafting costs on the device apart from the engine, and whether a step reads anything back.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

INTERPRETED = Path(__file__).parents[1] / "tests" / "vllm_v2"
BUDGET_SECONDS = 720.0
STREAMS = (1, 8, 64)
K = 4
NGRAM = {"method": "ngram_gpu", "num_speculative_tokens": K, "prompt_lookup_min": 2, "prompt_lookup_max": 4}


def arms(gpus: int, fa2: bool) -> dict[str, dict[str, Any]]:
    """Settings of the arms, the most important first. `profile` has keys of a profile's section `vllm`."""
    chosen: dict[str, dict[str, Any]] = {
        "stock vLLM": {},
        "specplug, K = 4": {"profile": {"adaptive_verification": False}},
        "specplug, adaptive": {"profile": {"adaptive_verification": True}},
        "vLLM's n-gram, K = 4": {"settings": {"speculative_config": NGRAM}},
        "specplug, K = 0": {"profile": {"tokens_per_batch_size": [[1, 1024, 0]], "adaptive_verification": False}},
        "specplug on V1": {"profile": {"runner": "v1"}},
    }
    if fa2:
        chosen["specplug, adaptive"]["settings"] = {"attention_backend": "TRITON_ATTN"}
        chosen["stock vLLM, TRITON_ATTN"] = {"settings": {"attention_backend": "TRITON_ATTN"}}
    if gpus > 1:
        chosen["stock vLLM, 2 GPUs"] = {"settings": {"tensor_parallel_size": 2}}
        chosen["specplug, K = 4, 2 GPUs"] = {
            "settings": {"tensor_parallel_size": 2},
            "profile": {"adaptive_verification": False},
        }
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--out", type=Path, help="also write all figures as JSON")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        task = json.loads(arguments.child)
        print("RESULT " + json.dumps(drafting_cost(task) if task.get("cost") else answered(task)))
        return
    began = perf_counter()
    streams: Sequence[int] = (2,) if arguments.tiny else STREAMS
    found: dict[str, Any] = {"streams": list(streams), "arms": {}}
    with TemporaryDirectory() as folder:
        (Path(folder) / "sitecustomize.py").write_text("import interpreted\n" if arguments.tiny else "")
        base = {"folder": folder, "tiny": arguments.tiny, "streams": list(streams), "model": None}
        first = run(base | {"cost": True, "make": arguments.model is None})
        if "error" in first:
            sys.exit(f"drafting could not be timed: {first['error']}")
        found["cost"] = first["cost"]
        base["model"] = os.fspath(arguments.model) if arguments.model else first["model"]
        capability = first["capability"]
        every = arms(first["gpus"], capability is not None and capability[0] == 8)
        if arguments.tiny:
            every = {name: every[name] for name in ("stock vLLM", "specplug, K = 4", "specplug, K = 0")}
        print("| arm | graphs | " + " | ".join(f"{n} streams" for n in streams) + " |")
        print("|---|---" + "|---" * len(streams) + "|")
        stock: dict[str, Any] | None = None
        for name, arm in every.items():
            if perf_counter() - began > BUDGET_SECONDS * 0.85:
                print(f"| {name} | left out: no time | " + " | ".join("" for _ in streams) + " |")
                continue
            result = run(base | arm | {"name": name}, timeout=BUDGET_SECONDS - (perf_counter() - began))
            found["arms"][name] = result
            if "error" in result:
                print(f"| {name} | {result['error'][:120]} | " + " | ".join("" for _ in streams) + " |", flush=True)
                continue
            stock = stock or result
            cells = [cell(result["rates"][str(n)], stock["rates"][str(n)]) for n in streams]
            print(f"| {name} | {result['graphs']} | " + " | ".join(cells) + " |", flush=True)
    print("\n| on the device | ms |\n|---|---|")
    for name, value in found["cost"].items():
        print(f"| {name} | {value} |")
    print(f"\nGPU: {first['device']}; took {perf_counter() - began:.0f} s")
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1))


def cell(rate: dict[str, float], stock: dict[str, float]) -> str:
    ratio = rate["tokens_per_second"] / stock["tokens_per_second"]
    return f"{rate['tokens_per_second']:.0f} tok/s, {ratio:.2f} of stock, {rate['per_step']:.2f} per step"


def run(task: dict[str, Any], timeout: float = BUDGET_SECONDS) -> dict[str, Any]:
    """The result of a task in a process of its own; {"error": text} where it fails."""
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"}
    if task["tiny"]:
        environment |= {
            "PYTHONPATH": os.pathsep.join([task["folder"], os.fspath(INTERPRETED)]),
            "TRITON_INTERPRET": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
    command = [sys.executable, __file__, "--child", json.dumps(task)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"error": "no time left"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        errors = [line for line in done.stderr.splitlines() if "Error" in line]
        return {"error": errors[-1] if errors else f"exit code {done.returncode}"}
    return dict(json.loads(lines[-1].removeprefix("RESULT ")))


def answered(task: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second of one arm by streams."""
    import numpy as np

    if task["tiny"]:
        import interpreted

        interpreted.keep_asynchronous()
    from vllm import LLM, SamplingParams

    from specplug import profile as profiles
    from specplug.engines.vllm.runner_choice import settings_for

    settings: dict[str, Any] = {"max_model_len": 2048, "skip_tokenizer_init": True}
    settings["max_num_seqs"] = max(task["streams"])
    if task["tiny"]:
        settings |= {"max_model_len": 128, "dtype": "float32", "enforce_eager": True, "gpu_memory_utilization": 0.2}
    settings |= task.get("settings", {})
    if "profile" in task:
        keys = {"num_speculative_tokens": K} | task["profile"]
        path = Path(task["folder"]) / "profile.yaml"
        path.write_text(
            f"schema: 1\nname: gpu\nengine: vllm\nproposers: [suffix, token_recycling]\nvllm: {json.dumps(keys)}\n"
        )
        settings |= settings_for(profiles.load(os.fspath(path)), os.fspath(path))
    llm = LLM(task["model"], disable_log_stats=False, **settings)
    config = llm.llm_engine.vllm_config
    random = np.random.default_rng(0)
    length, tokens = (24, 8) if task["tiny"] else (256, 256)
    rates = {}
    for streams in task["streams"]:
        prompts = [
            {"prompt_token_ids": random.integers(0, config.model_config.get_vocab_size(), length).tolist()}
            for _ in range(streams)
        ]
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        llm.generate(prompts, params, use_tqdm=False)  # compiles, captures, fills the prefix cache
        before = counted(llm)
        began = perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        seconds = perf_counter() - began
        drafts, accepted = (after - earlier for after, earlier in zip(counted(llm), before, strict=True))
        rates[streams] = {
            "tokens_per_second": streams * tokens / seconds,
            "per_step": 1 + accepted / drafts if drafts else 1.0,
        }
    scheduling = "async" if config.scheduler_config.async_scheduling else "synchronous"
    runner = "V2" if config.use_v2_model_runner else "V1"
    mode = config.compilation_config.cudagraph_mode
    return {"rates": rates, "graphs": f"{runner}, {scheduling}, {getattr(mode, 'name', mode)}"}


def counted(llm: Any) -> tuple[float, float]:
    """Drafts and accepted draft tokens so far."""
    values = {one.name: one.value for one in llm.get_metrics() if hasattr(one, "value")}
    return (
        values.get("vllm:spec_decode_num_drafts", 0.0),
        values.get("vllm:spec_decode_num_accepted_tokens", 0.0),
    )


def drafting_cost(task: dict[str, Any]) -> dict[str, Any]:
    """What a step of drafting costs on the device, and the model to use."""
    import torch
    from v2_cost import step_of, timed

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    vocabulary = 1000 if task["tiny"] else 128_256
    cost: dict[str, str] = {}
    for n in task["streams"]:
        step, operations = step_of(n, vocabulary, 256 if task["tiny"] else 2048, K, device)

        def finished(call: Any = step) -> None:
            call()
            if cuda:
                torch.cuda.synchronize()

        cost[f"a step for {n} sequences, {operations} operations"] = timed(finished, 30)
        logits = torch.randn(n * (K + 1), vocabulary, device=device)
        cost[f"likeliest ids of {n * (K + 1)} rows"] = timed(lambda rows=logits: finished(lambda: rows.argmax(-1)), 30)
        cost[f"top 8 of {n * (K + 1)} rows"] = timed(lambda rows=logits: finished(lambda: rows.topk(8)), 30)
    if cuda:
        step, _ = step_of(task["streams"][0], vocabulary, 2048, K, device)
        step()
        try:
            torch.cuda.set_sync_debug_mode("error")
            step()
            cost["waiting of the host in a step"] = "none"
        except RuntimeError as error:
            cost["waiting of the host in a step"] = str(error)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {
        "cost": cost,
        "model": made_model(Path(task["folder"]), task["tiny"]) if task["make"] else None,
        "gpus": torch.cuda.device_count() if cuda else 0,
        "capability": list(torch.cuda.get_device_capability()) if cuda else None,
        "device": torch.cuda.get_device_name() if cuda else "none",
    }


def made_model(folder: Path, tiny: bool) -> str:
    """A Llama with random weights: 1.2 billion, or hardly any."""
    if tiny:
        import interpreted

        return os.fspath(interpreted.write_tiny_model(folder / "model"))
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "model", safe_serialization=True)
    return os.fspath(folder / "model")


if __name__ == "__main__":
    main()
