"""Compares greedy answers of vLLM's V2 model runner with specplug's drafts and without them, on a CPU.

    python benchmarks/v2_equality.py
    python benchmarks/v2_equality.py --layers 4 --proposers '{method: early_exit, exits: [1, 2, 3]}'
    python benchmarks/v2_equality.py --layers 4 --least-prompt 60 \
        --proposers '{method: short_context, first: 4, recent: 32, retrieved: 16, chunk: 16}'

Triton's interpreter runs vLLM's kernels, so this shows that answers are equal, and nothing about speed. The model is
tiny and random; the run with a JSON schema uses the packaged model. Each run is a process of its own. Prints, per
setting, how many of the answers are equal to those without drafts at the same number of requests at once, also with a
corpus of every second answer; and for sampled text a permutation test of tokens against the plain engine's. With
--proposers, these draft instead, for the tiny model alone, of which half of the layers add nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from corpora import write_documents

from specplug.core import int_array

INTERPRETED = Path(__file__).parents[1] / "tests" / "vllm_v2"
PROPOSERS = "suffix, token_recycling"
K = 4
SAMPLES = 3000
SCHEMA = {
    "type": "object",
    "properties": {"names": {"type": "array", "items": {"enum": ["Peter", "Anna"]}, "minItems": 3, "maxItems": 3}},
    "required": ["names"],
    "additionalProperties": False,
}

RUNS: dict[str, dict[str, Any]] = {
    "1 at once": {"max_num_seqs": 1},
    "4 at once": {"max_num_seqs": 4},
    "16 at once": {"max_num_seqs": 16},
    "4 at once, synchronous": {"max_num_seqs": 4, "async_scheduling": False},
    "4 at once, tensor parallel 2": {"max_num_seqs": 4, "tensor_parallel_size": 2},
}

WITH_CORPUS = ("4 at once", "4 at once, tensor parallel 2")
"""Runs that are repeated with a corpus of every second answer."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--proposers", help="a list as in a profile, without its brackets")
    parser.add_argument("--least-prompt", type=int, help="tokens of the shortest prompt; the longest has 31 more")
    parser.add_argument(
        "--run", action="append", choices=RUNS, help="with --proposers: this run alone, greedy text only"
    )
    parser.add_argument("--family", choices=("Llama", "Qwen2", "Qwen3"), default="Llama", help="of the tiny model")
    parser.add_argument("--layers", type=int, default=2, help="of the tiny model")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print("RESULT " + json.dumps(child(json.loads(arguments.child))))
        return
    with TemporaryDirectory() as folder:
        (Path(folder) / "sitecustomize.py").write_text("import interpreted\n")
        model = os.fspath(Path(folder) / "tiny")
        shape = {"layers": arguments.layers, "family": arguments.family}
        run(folder, {"make": model, "padded": arguments.proposers is not None, **shape})
        print("| run | scheduling | answers | equal | accepted draft tokens |\n|---|---|---|---|---|")
        if arguments.proposers is not None:
            for name in arguments.run or RUNS:
                task = {"model": model, "settings": RUNS[name], "prompts": arguments.prompts}
                task["least_prompt"] = arguments.least_prompt
                report(name, run(folder, task), run(folder, task | {"proposers": arguments.proposers}))
            if not arguments.run:
                compare_sampled(folder, model, arguments.proposers, arguments.least_prompt)
            return
        corpus = f"{folder}/corpus/"
        with_corpus = f"{PROPOSERS}, {{method: datastore, corpora: ['{corpus}']}}"
        for name, settings in RUNS.items():
            task = {"model": model, "settings": settings, "prompts": arguments.prompts}
            plain = run(folder, task)
            report(name, plain, run(folder, task | {"proposers": PROPOSERS}))
            if not Path(corpus).exists():
                write_documents(Path(corpus), list(map(int_array, plain["answers"][::2])), 64)
            if name in WITH_CORPUS:
                report(f"{name}, a corpus", plain, run(folder, task | {"proposers": with_corpus}))
        task = {"packaged": True, "settings": {"max_num_seqs": 4}, "prompts": 6}
        plain = run(folder, task)
        report("SmolLM2", plain, run(folder, task | {"proposers": PROPOSERS}))
        report("SmolLM2, trimmed drafter", plain, run(folder, task | {"rows": 16384}))
        task["schema"] = SCHEMA
        report("SmolLM2, JSON schema", run(folder, task), run(folder, task | {"proposers": PROPOSERS}))
        compare_sampled(folder, model, PROPOSERS)


def compare_sampled(folder: str, model: str, proposers: str, least_prompt: int | None = None) -> None:
    task = {"model": model, "settings": {"max_num_seqs": 16}, "prompts": SAMPLES, "sampled": True}
    task["least_prompt"] = least_prompt
    plain, drafted = run(folder, task), run(folder, task | {"proposers": proposers})
    accepted = f"{drafted['accepted']} draft tokens accepted"
    print(f"\nsampled text: {compared(plain['answers'], drafted['answers'])}, {accepted}")


def report(name: str, plain: dict[str, Any], drafted: dict[str, Any]) -> None:
    equal = sum(one == other for one, other in zip(plain["answers"], drafted["answers"], strict=True))
    scheduling = "asynchronous" if drafted["async"] else "synchronous"
    print(f"| {name} | {scheduling} | {len(plain['answers'])} | {equal} | {drafted['accepted']} |", flush=True)


def compared(plain: list[list[int]], drafted: list[list[int]], rounds: int = 2000) -> str:
    """A permutation test of whether the second and third tokens have one distribution, by the chi-square statistic.

    Rare pairs of tokens are counted together.
    """
    import numpy as np

    pairs = [tuple(answer[1:3]) for answer in (*plain, *drafted)]
    frequent = {pair: place for place, (pair, count) in enumerate(Counter(pairs).items()) if count >= 20}
    cells = np.array([frequent.get(pair, len(pairs)) for pair in pairs])
    _, cells = np.unique(cells, return_inverse=True)
    expected = np.bincount(cells) * len(plain) / len(cells)

    def statistic(order: Any) -> float:
        counts = np.bincount(cells[order[: len(plain)]], minlength=len(expected))
        return float(((counts - expected) ** 2 / expected).sum())

    random = np.random.default_rng(0)
    found = statistic(np.arange(len(cells)))
    larger = sum(statistic(random.permutation(len(cells))) >= found for _ in range(rounds))
    return f"{len(plain)} answers, {len(expected)} cells, p = {(1 + larger) / (1 + rounds):.3f}"


def run(folder: str, task: dict[str, Any]) -> dict[str, Any]:
    """The result of a task in a process of its own."""
    paths = [folder, os.fspath(INTERPRETED), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TRITON_INTERPRET": "1",
    }
    if task.get("settings", {}).get("tensor_parallel_size", 1) == 1:
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(task | {"folder": folder})],
        env=environment,
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(f"{task}\n{done.stderr[-3000:]}")
    return dict(json.loads(lines[-1].removeprefix("RESULT ")))


def child(task: dict[str, Any]) -> dict[str, Any]:
    import interpreted

    if "make" in task:
        identity_from = task["layers"] // 2 if task["padded"] else None
        shape = {"layers": task["layers"], "family": task["family"]}
        interpreted.write_tiny_model(Path(task["make"]), identity_from=identity_from, **shape)
        return {}
    import numpy as np
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    from specplug import profile as profiles
    from specplug.engines.vllm.runner_choice import settings_for

    interpreted.keep_asynchronous()
    interpreted.sort_instead_of_triton()
    settings = {"dtype": "float32", "enforce_eager": True, "seed": 1, "max_model_len": 128} | task["settings"]
    if "proposers" in task:
        text = (
            f"schema: 1\nname: test\nengine: vllm\nproposers: [{task['proposers']}]\n"
            f"vllm: {{num_speculative_tokens: {K}, runner: v2}}\n"
        )
        path = Path(task["folder"]) / "profile.yaml"
        path.write_text(text)
        settings |= settings_for(profiles.load(os.fspath(path)), os.fspath(path))
    random = np.random.default_rng(0)
    params: dict[str, Any] = {"temperature": 0.0, "max_tokens": 32, "ignore_eos": True}
    prompts: list[Any] = [
        {"prompt_token_ids": random.integers(0, 64, 3 + 3 * n % 17).tolist() * (1 + n % 3)}
        for n in range(task["prompts"])
    ]
    if task.get("least_prompt"):
        sizes = [task["least_prompt"] + n % 32 for n in range(task["prompts"])]
        prompts = [{"prompt_token_ids": random.integers(0, 64, size).tolist()} for size in sizes]
    if task.get("packaged"):
        from specplug.engines.vllm.located_model import located_model

        model = os.fspath(located_model("demo:smollm2"))
        params = {"temperature": 0.0, "max_tokens": 40}
        if "schema" in task:
            params["structured_outputs"] = StructuredOutputsParams(json=task["schema"])
        prompts = [f"Names of the {n} members, as JSON: " for n in range(task["prompts"])]
        if "rows" in task:
            drafter = Path(task["folder"]) / "drafter"
            trimmed_drafter(Path(model), drafter, task["rows"])
            settings["speculative_config"] = {
                "method": "draft_model",
                "model": os.fspath(drafter),
                "num_speculative_tokens": K,
            }
    else:
        model = task["model"]
        settings["skip_tokenizer_init"] = True
        params["detokenize"] = False
    if task.get("sampled"):
        prompts = [prompts[0]] * task["prompts"]
        params |= {"temperature": 1.0, "max_tokens": 3}
    llm = LLM(model, gpu_memory_utilization=0.2, disable_log_stats=False, **settings)
    outputs = llm.generate(prompts, SamplingParams(**params), use_tqdm=False)
    accepted = sum(one.value for one in llm.get_metrics() if one.name == "vllm:spec_decode_num_accepted_tokens")
    return {
        "answers": [list(output.outputs[0].token_ids) for output in outputs],
        "async": llm.llm_engine.vllm_config.scheduler_config.async_scheduling,
        "accepted": accepted,
    }


def trimmed_drafter(checkpoint: Path, folder: Path, rows: int) -> None:
    """The model as its own drafter, with a head for the first ids only."""
    import numpy as np

    from specplug.transforms.checkpoint_head import trim, vocabulary
    from specplug.transforms.kept_ids import by_size

    known = vocabulary(checkpoint)
    trim(checkpoint, by_size(np.zeros(len(known.pieces), np.int64), known.always_kept(), rows), folder)


if __name__ == "__main__":
    main()
