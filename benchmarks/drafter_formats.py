"""Measures a drafter's acceptance and milliseconds per draft step, by the format of its weights.

    python benchmarks/drafter_formats.py --model some-bf16.gguf --drafter drafter:full --workload prompts.jsonl

DRAFTER is a folder that `specplug build vocab-trim` built from MODEL without `--quantize`. A format is BODY/HEAD: the
formats of the layers and of the head. The prefix `plain:` quantises without least-squares block scales. Prints, per
format:

accepted       share of positions of MODEL's greedy text where the drafter's most likely token is the next one
tokens a pass  with drafts of 4 tokens
milliseconds   of a draft step, with `--threads`, with flash attention, and with one thread: medians over rounds in
               which MODEL and all formats alternate
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np

from specplug.bench.workloads import BUILTIN, limit, load_workload
from specplug.build.head_sizes import GAMMA, Hits, emitted_per_pass
from specplug.core import IntArray
from specplug.engines.llama_cpp.context import open_context
from specplug.engines.llama_cpp.drafters.input_table import InputTable
from specplug.engines.llama_cpp.drafters.model_drafter import ModelDrafter
from specplug.engines.llama_cpp.engine import LlamaCpp
from specplug.engines.llama_cpp.measure import PassTimer
from specplug.engines.llama_cpp.model import Model, open_model
from specplug.engines.llama_cpp.teacher_forcing import ROWS, teacher_forced_logits
from specplug.generation.answers import GREEDY, Request, Sampling
from specplug.machine import hardware
from specplug.models import drafter_folders, references
from specplug.profile import Runtime, load
from specplug.transforms.gguf_head import EMBEDDINGS, MODEL
from specplug.transforms.requantise import requantise

FORMATS = [
    "plain:q4_0/q4_0",
    "q4_0/q4_0",
    "plain:q4_0/q8_0",
    "q4_0/q8_0",
    "iq4_nl/q8_0",
    "q4_1/q8_0",
    "q5_0/q8_0",
    "q8_0/q8_0",
    "bf16/bf16",
]

ROUNDS, STEPS, CELLS = 15, 12, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--drafter", required=True, help="a folder that build vocab-trim wrote, or drafter:NAME")
    parser.add_argument("--workload", default=BUILTIN)
    parser.add_argument("--limit", type=int, default=2, help="prompts per category")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    args = parser.parse_args()
    folder = drafter_folders.resolve(args.drafter)
    manifest, ids = drafter_folders.read(folder)
    table = InputTable(folder / EMBEDDINGS, manifest.input_scale)
    texts, runtime = answered(references.resolve(args.model), args.workload, args.limit, args.max_tokens)
    runtime = replace(runtime, threads=args.threads)
    settings = {
        f"{args.threads} threads": runtime,
        "flash attention": replace(runtime, flash_attention=True),
        "1 thread": replace(runtime, threads=1),
    }
    with TemporaryDirectory(dir=folder.parent) as scratch, ExitStack() as stack:
        accepted: dict[str, list[Hits]] = {}
        drafting: dict[tuple[str, str], ModelDrafter] = {}
        for number, name in enumerate(args.formats):
            body, head = name.removeprefix("plain:").split("/")
            path = Path(scratch) / f"{number}.gguf"
            requantise(folder / MODEL, path, body, head=head, least_squares=not name.startswith("plain:"))
            model = stack.enter_context(open_model(path))
            accepted[name] = hits(model, texts, ids, runtime, table)
            for setting, used in settings.items():
                context = open_context(model, used, cells=CELLS, num_ids=2, max_rows=1, inputs=table)
                drafting[name, setting] = ModelDrafter(
                    stack.enter_context(context), None, slots=1, max_tokens=CELLS, max_draft=1, branches=1
                )
        target = stack.enter_context(open_model(references.resolve(args.model)))
        timer = PassTimer(stack.enter_context(open_context(target, runtime, cells=CELLS, num_ids=1, max_rows=1)))
        times: dict[tuple[str, str], list[float]] = {key: [] for key in drafting}
        target_ms: list[float] = []
        for _ in range(ROUNDS):
            target_ms.append(timer.time(1))
            for key, drafter in drafting.items():
                drafter.time_passes(STEPS)
                times[key].append(drafter.pass_ms(1))
    positions = sum(len(of_answer) for of_answer in accepted[args.formats[0]])
    print(f"{hardware.fingerprint()}, {args.model}, {len(ids)} rows, {positions} tokens; ms with {', '.join(settings)}")
    print(f"{'the target itself':18s} {'':38s} {median(target_ms):5.2f}")
    for name in args.formats:
        ms = "  ".join(f"{median(times[name, setting]):5.2f}" for setting in settings)
        share = float(np.concatenate(accepted[name]).mean())
        print(f"{name:18s} {share:.3f} accepted  {emitted_per_pass(accepted[name], GAMMA):.2f} tokens/pass  {ms}")


def answered(
    path: Path, workload: str, prompts: int, tokens: int, sampling: Sampling = GREEDY
) -> tuple[list[tuple[IntArray, list[int]]], Runtime]:
    """The model's answers with their prompts, and the engine's settings."""
    with open_model(path) as model, LlamaCpp(model, load("none")) as engine:
        texts = []
        for prompt in limit(load_workload(workload, category="all"), prompts):
            asked = model.chat_prompt([{"role": "user", "content": prompt.turns[0]}])
            answer = engine.generate(Request(asked, tokens, sampling)).tokens
            if len(answer) > 1:
                texts.append((asked, answer))
        return texts, engine.profile.runtime


def hits(
    model: Model, texts: Sequence[tuple[IntArray, list[int]]], ids: IntArray, runtime: Runtime, table: InputTable
) -> list[Hits]:
    """For every answer, which of the drafter's most likely tokens are the next token of the answer."""
    cells = -(-max(len(asked) + len(answer) for asked, answer in texts) // 256) * 256 + 256
    found = []
    with open_context(model, runtime, cells=cells, num_ids=1, max_rows=ROWS, inputs=table) as context:
        for asked, answer in texts:
            text = np.concatenate((asked, np.array(answer[:-1], dtype=np.int32)))
            best = [ids[logits.argmax(axis=1)] for logits in teacher_forced_logits(context, text, len(asked))]
            found.append(np.concatenate(best) == answer[1:])
    return found


if __name__ == "__main__":
    main()
