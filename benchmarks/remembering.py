"""What memory gains: of related calls of `specplug run`, and of answers to earlier questions of the same kinds.

    python benchmarks/remembering.py calls MODEL [--calls 30] [--tokens 96]
    python benchmarks/remembering.py answers MODEL PROMPTS.jsonl [--tokens 128] [--nodes 4 8]

`calls` starts `specplug run` once per prompt, as a shell loop does: each prompt asks for the same kind of answer about
another line of a log. Every call is made with --remember and without, in turn. Prints tokens per pass and the speed
after the prompt, and the ratios of the second half of the calls.

`answers` records the model's answers to all prompts of a file (JSONL, with `category` and `turns`). Those to the even
lines are what is remembered. Prints the tokens per pass for the odd lines, in a replay with a fixed number of draft
tokens: of suffix lookup that starts empty, of suffix lookup that has seen the even lines, and with the corpus of them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from specplug.bench.statistics import paired_ratio
from specplug.bench.workloads import load_workload
from specplug.core import IntArray
from specplug.corpora.answer_memory import Memory, answer_document
from specplug.models.references import resolve, tokenizer_hash
from specplug.profile import CostPoints, PlannerSettings, Profile, Runtime
from specplug.registry import ProposerSpec
from specplug.tune.candidates import Setting
from specplug.tune.expense import Expense
from specplug.tune.prediction import Costs
from specplug.tune.replay import replay
from specplug.tune.trace import Answer, Trace

SPECPLUG = str(Path(sys.executable).with_name("specplug"))

QUESTION = (
    "Write the following log line as a JSON object with the keys time, level, service, message, user, status and "
    "next_step. Answer with the object alone.\n\n"
)
MESSAGES = (
    "login failed for user {user}: wrong password", "user {user} uploaded report.pdf in {ms} ms",
    "connection to the database was lost, retry in {ms} ms", "payment of user {user} was declined",
    "cache miss for the profile of {user}", "user {user} changed the delivery address",
    "request of {user} took {ms} ms, which is above the limit",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    calls = commands.add_parser("calls")
    calls.add_argument("model")
    calls.add_argument("--calls", type=int, default=30)
    calls.add_argument("--tokens", type=int, default=96)
    answers = commands.add_parser("answers")
    answers.add_argument("model", type=lambda ref: resolve(ref, "gguf"))
    answers.add_argument("prompts", type=Path)
    answers.add_argument("--tokens", type=int, default=128)
    answers.add_argument("--nodes", type=int, nargs="+", default=[4, 8])
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        os.environ["XDG_DATA_HOME"] = folder
        (of_calls if arguments.command == "calls" else of_answers)(arguments)


# -- calls -----------------------------------------------------------------------------------------------------------


def log_lines(count: int) -> list[str]:
    chooser = random.Random(5)
    lines = []
    for number in range(count):
        user, ms = f"u{chooser.randrange(1000, 9999)}", chooser.randrange(20, 900)
        message = chooser.choice(MESSAGES).format(user=user, ms=ms)
        level = chooser.choice(("INFO", "WARN", "ERROR"))
        service = chooser.choice(("auth", "billing", "files", "gateway"))
        lines.append(f"2026-11-{number % 28 + 1:02d}T0{number % 10}:1{number % 7}:42Z {level} {service}: {message}")
    return lines


def of_calls(arguments: argparse.Namespace) -> None:
    arms: dict[str, list[str]] = {"without": [], "with": ["--remember", "calls"], "plain": ["--profile", "none"]}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    different = 0
    for number, line in enumerate(log_lines(arguments.calls)):
        texts = set()
        names = list(arms)
        for name in names[number % 3 :] + names[: number % 3]:
            argv = [SPECPLUG, "run", "--model", arguments.model, "--json", "--max-tokens", str(arguments.tokens)]
            done = subprocess.run([*argv, *arms[name], QUESTION + line], capture_output=True, text=True, check=True)
            document = json.loads(done.stdout)
            found[name].append(document)
            texts.add(document["text"])
        different += len(texts) > 1
    half = arguments.calls // 2
    print(f"{arguments.calls} calls, {different} answers differ between the arms\n")
    print("| | tokens per pass, first half | second half | against without memory, second half |\n|---|---|---|---|")
    for name, documents in found.items():
        passes = [
            sum(d["tokens"] for d in part) / sum(d["tokens"] / d["mean_acceptance_length"] for d in part)
            for part in (documents[:half], documents[half:])
        ]
        columns = [
            [field(d) for d in found[arm][half:]]
            for arm in (name, "without")
            for field in (lambda d: d["tokens"] - 1, lambda d: (d["tokens"] - 1) / d["tokens_per_second"])
        ]
        ratio = paired_ratio(*columns)
        cell = f"{ratio.median:.3f} ({ratio.low:.3f}-{ratio.high:.3f})"
        print(f"| {name} | {passes[0]:.2f} | {passes[1]:.2f} | {cell} |")


# -- answers ---------------------------------------------------------------------------------------------------------


def of_answers(arguments: argparse.Namespace) -> None:
    from specplug.tune.llama_cpp import LlamaCppSubject

    base = Profile("base", proposers=(ProposerSpec("none"),), runtime=Runtime(context=2048))
    subject = LlamaCppSubject(arguments.model, base)
    model = subject._model
    entries = load_workload(arguments.prompts, category="all")
    prompts = [model.chat_prompt([{"role": "user", "content": entry.turns[0]}])[-1536:] for entry in entries]
    found: dict[int, Answer] = {}

    def done(index: int, tokens: IntArray, topk: IntArray) -> None:
        found[index] = Answer(entries[index].id, 0, entries[index].category, prompts[index], tokens, topk)

    subject.record(prompts, arguments.tokens, 8, 8, done)
    subject.close()
    even, odd = ([found[index] for index in range(first, len(prompts), 2)] for first in (0, 1))
    memory = Memory("answers", arguments.model.name, "", tokenizer_hash(arguments.model), model.num_tokens, 1 << 20)
    memory.add([answer_document(answer.prompt, answer.tokens.tolist(), prompts=False) for answer in even])
    suffix, corpus = ProposerSpec("suffix"), ProposerSpec("datastore", {"corpora": ["answers"]})
    free = Costs(CostPoints((0,), (1, 256), ((1.0, 1.0),)), Expense())
    about = {"max_tokens": arguments.tokens}
    cold = Trace(about, tuple(odd))
    # The even lines come first, in a category of their own, which is not printed.
    warm = Trace(about, (*(replace(answer, category="before") for answer in even), *odd))
    kinds = sorted({answer.category for answer in odd})
    for nodes in arguments.nodes:
        print(f"\n{nodes} draft tokens\n\n| kind | suffix, empty | suffix, warm | suffix, empty, with the corpus |")
        print("|---|---|---|---|")
        planner = PlannerSettings(mode="static", max_nodes=nodes)
        sums = [
            replay(Setting(specs, planner), trace, free).by_category()
            for specs, trace in (((suffix,), cold), ((suffix,), warm), ((suffix, corpus), cold))
        ]
        for kind in kinds:
            print(f"| {kind} | {' | '.join(f'{one[kind].mean_acceptance_length:.2f}' for one in sums)} |")


if __name__ == "__main__":
    main()
