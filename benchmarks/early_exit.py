"""Measures early exits of a model: how often each is right, what its draft tokens cost, and its speed beside plain.

    python benchmarks/early_exit.py agreement --model demo:smollm2 --exits 4,8,12,16,20,24,26,28,29
    python benchmarks/early_exit.py cost --model demo:smollm2 --exits 4,28
    python benchmarks/early_exit.py speed --model demo:smollm2 --exits 4,8,28
    python benchmarks/early_exit.py overhead --model demo:smollm2 --exits 4,28 --rows 16384

agreement  on the model's own greedy answers: by the hidden states of the target, and by a drafter with these layers
cost       milliseconds of a draft token over those of a target pass of one row, and the agreement that is needed
speed      answers beside plain decoding, interleaved: all exits with the choice by measured time, each exit alone, and
           the rules of DEL with drafts of up to 18 tokens that are always verified
overhead   processor time of a thread, which other programs hardly change: what a step takes besides the target's pass,
           with exits at hand and without

Drafters have all rows of the head, or the first `--rows`. They are written to a temporary folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import thread_time_ns

import numpy as np
from reporting import run_benchmark, write

from specplug.bench.arms import Arm, ProfileArm, plain
from specplug.bench.interleaved import run_arms
from specplug.bench.workloads import BUILTIN, limit, load_workload
from specplug.build.exit_costs import SPEEDS, ExitCosts, line
from specplug.build.llama_cpp import GgufSource
from specplug.core import IntArray
from specplug.engines.llama_cpp.context import Context, open_context
from specplug.engines.llama_cpp.drafters.input_table import InputTable
from specplug.engines.llama_cpp.drafters.states_head import StatesHead
from specplug.engines.llama_cpp.engine import LlamaCpp
from specplug.engines.llama_cpp.layer_taps import LayerTaps, why_not
from specplug.engines.llama_cpp.measure import cost_points
from specplug.engines.llama_cpp.model import open_model
from specplug.engines.llama_cpp.rounding import explain
from specplug.engines.llama_cpp.teacher_forcing import ROWS, teacher_forced_logits
from specplug.errors import UsageError
from specplug.generation.answers import GREEDY, Answer, Request
from specplug.models import drafter_folders, references
from specplug.profile import PlannerSettings, Profile, Runtime, load
from specplug.registry import ProposerSpec
from specplug.transforms.gguf_exits import file_of, layers_of, write_exits
from specplug.transforms.gguf_head import EMBEDDINGS
from specplug.transforms.gguf_states_head import NORM_AND_HEAD
from specplug.tune.verdict import interval_text

Text = tuple[IntArray, list[int]]
"""A prompt and the answer to it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, run in (("agreement", agreement), ("cost", cost), ("speed", speed), ("overhead", overhead)):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument("--model", required=True)
        command.add_argument("--exits", required=True, type=lambda text: tuple(map(int, text.split(","))))
        command.add_argument("--rows", type=int, help="rows of the head (default: all)")
        command.add_argument("--quantize", help="weight format of the drafters (default: that of the model)")
        command.add_argument("--workload", default=BUILTIN)
        command.add_argument("--limit", type=int, default=1, help="prompts per category")
        command.add_argument("--max-tokens", type=int, default=64)
        command.add_argument("--threads", type=int)
        command.add_argument("--json", type=Path)
    run_benchmark("early_exit.py", parser.parse_args())


def agreement(args: argparse.Namespace, document: dict[str, object]) -> None:
    path = references.resolve(args.model)
    with ExitStack() as stack:
        folder, ids = written(stack, args, path)
        model = stack.enter_context(open_model(path))
        if (problem := why_not(model)) is not None:
            raise UsageError(f"{path}: {problem}; use an architecture with taps")
        base = replace(load("none"), runtime=replace(load("none").runtime, threads=args.threads))
        with LlamaCpp(model, base) as engine:
            runtime = engine.profile.runtime
            texts = answered(engine, args)
        cells = -(-max(len(prompt) + len(answer) for prompt, answer in texts) // 256) * 256 + 256
        target = stack.enter_context(open_context(model, runtime, cells=cells, num_ids=1, max_rows=ROWS))
        taps = LayerTaps(target, args.exits)
        head = StatesHead(folder / NORM_AND_HEAD, runtime, width=taps.width, num_ids=len(ids), max_rows=ROWS)
        stack.callback(head.close)
        tapped: dict[int, list[IntArray]] = {layers: [] for layers in args.exits}
        for text, first in map(whole, texts):
            for logits in teacher_forced_logits(target, text, first):
                for layers in args.exits:
                    found = head.logits(taps.rows(layers, range(len(logits))))
                    tapped[layers].append(ids[found.argmax(axis=1)])
        truth = np.concatenate([answer[1:] for _, answer in texts])
        print(f"{len(texts)} answers, {len(truth)} tokens, {len(ids)} rows\n")
        print("| exit | right, by hidden states | right, by a drafter | equal guesses |\n|---|---|---|---|")
        table = InputTable(folder / EMBEDDINGS, drafter_folders.read(folder)[0].input_scale)
        for layers in args.exits:
            own: list[IntArray] = []
            with (
                open_model(folder / file_of(layers)) as exit_,
                open_context(exit_, runtime, cells=cells, num_ids=1, max_rows=ROWS, inputs=table) as context,
            ):
                for text, first in map(whole, texts):
                    own += [ids[logits.argmax(axis=1)] for logits in teacher_forced_logits(context, text, first)]
            by_taps, by_drafter = np.concatenate(tapped[layers]), np.concatenate(own)
            shares = [float((by_taps == truth).mean()), float((by_drafter == truth).mean())]
            equal = float((by_taps == by_drafter).mean())
            print(f"| {layers} | {shares[0]:.3f} | {shares[1]:.3f} | {equal:.3f} |", flush=True)
            document[f"exit {layers}"] = [*shares, equal]
    write(args.json, document)


def cost(args: argparse.Namespace, document: dict[str, object]) -> None:
    path = references.resolve(args.model)
    with ExitStack() as stack:
        folder, ids = written(stack, args, path)
        source = GgufSource(path, path, quantize=None, threads=args.threads)
        stack.callback(source.close)
        target_ms, step_ms = source.times([(folder, file_of(layers)) for layers in args.exits])
        passes = ", ".join(f"{ms / target_ms[0]:.2f}" for ms in target_ms)
        print(f"{len(ids)} rows; T(1) {target_ms[0]:.2f} ms; T(n) / T(1) for 1 to {len(target_ms)} rows: {passes}\n")
        print("| exit | ms | of a pass |", " | ".join(f"right for x{one}" for one in SPEEDS), "|")
        print("|---" * (3 + len(SPEEDS)) + "|")
        costs = ExitCosts(target_ms, list(zip(args.exits, step_ms, strict=True)))
        for layers, ms in zip(args.exits, step_ms, strict=True):
            found = line(f"exit {layers}", layers, costs, ms)
            needed = " | ".join("-" if one is None else f"{one:.2f}" for one in found.needed)
            print(f"| {layers} | {ms:.2f} | {found.share:.2f} | {needed} |")
        document |= costs.as_mapping()
    write(args.json, document)


def speed(args: argparse.Namespace, document: dict[str, object]) -> None:
    path = references.resolve(args.model)
    with ExitStack() as stack:
        folder, _ = written(stack, args, path)
        model = stack.enter_context(open_model(path))
        base = Profile("none", proposers=(ProposerSpec("none"),))
        base = replace(base, runtime=replace(base.runtime, threads=args.threads))
        with LlamaCpp(model, base) as engine:
            base = engine.profile
        points = cost_points(model, base.runtime, 25)
        drafting = [
            drafter(base, folder, "all exits"),
            *(drafter(base, folder, f"exit {layers}", exit=layers) for layers in args.exits),
            replace(
                drafter(base, folder, "DEL", rule="layers", max_draft=18),
                planner=PlannerSettings(mode="static", max_nodes=18, trees=False),
            ),
        ]

        def is_rounding(prompt: IntArray, one: list[int], other: list[int]) -> bool:
            mismatch = explain(model, base.runtime, prompt, one, other, GREEDY, padded=False, shared_cache=False)
            return mismatch is not None and mismatch.is_rounding

        arms: list[Arm] = []
        for profile in (plain(base), *drafting):
            arms.append(ProfileArm(model, profile, GREEDY, cost=points))
            stack.callback(arms[-1].close)
        prompts = limit(load_workload(args.workload, category="all"), args.limit)
        outcome = run_arms(arms, prompts, model.chat_prompt, model.text, is_rounding, max_tokens=args.max_tokens)
        print("| setting | speed over plain (95%) | tokens/pass | right draft tokens | answers as plain's |")
        print("|---|---|---|---|---|")
        for profile, result in zip((plain(base), *drafting), outcome.overall, strict=True):
            figures = result.figures()
            document[profile.name] = figures
            right = f"{figures['accepted_tokens']} of {figures['draft_tokens']}"
            same = f"{figures['identical']} of {figures['identical'] + figures['rounding'] + figures['different']}"
            print(
                f"| {profile.name} | {interval_text(figures['speedup'])} | {figures['mean_acceptance_length']:.2f} "
                f"| {right} | {same} |"
            )
    write(args.json, document)


def overhead(args: argparse.Namespace, document: dict[str, object]) -> None:
    path = references.resolve(args.model)
    with ExitStack() as stack:
        folder, _ = written(stack, args, path)
        model = stack.enter_context(open_model(path))
        base = Profile("none", proposers=(ProposerSpec("none"),), runtime=Runtime(threads=1))
        with LlamaCpp(model, base) as engine:
            base = engine.profile
        points = cost_points(model, base.runtime, 25)
        profiles = [
            plain(base),
            drafter(base, folder, "all exits"),
            *(drafter(base, folder, f"exit {layers}", exit=layers) for layers in args.exits),
        ]
        engines = [stack.enter_context(LlamaCpp(model, profile, cost=points)) for profile in profiles]
        counted = [Counted(engine) for engine in engines]
        for prompt in limit(load_workload(args.workload, category="all"), args.limit):
            asked = model.chat_prompt([{"role": "user", "content": prompt.turns[0]}])
            for one in counted:
                one.answer(Request(asked, args.max_tokens, GREEDY))
        print("| setting | steps | target passes, ms | besides, us per step | of the passes | draft tokens |")
        print("|---|---|---|---|---|---|")
        for profile, one in zip(profiles, counted, strict=True):
            besides_us = one.besides_ns / one.steps / 1e3
            share = one.besides_ns / one.target_ns
            passes_ms = one.target_ns / 1e6
            print(
                f"| {profile.name} | {one.steps} | {passes_ms:.0f} | {besides_us:.0f} | {share:.4f} | {one.drafted} |"
            )
            document[profile.name] = [one.steps, passes_ms, besides_us, share, one.drafted]
    write(args.json, document)


class Counted:
    """An engine of one thread, and the processor time of its passes and of its steps after the first token.

    target_ns   of the target's passes
    besides_ns  of everything else in these steps
    """

    def __init__(self, engine: LlamaCpp) -> None:
        self.steps = self.target_ns = self.besides_ns = self.drafted = 0
        self._engine = engine
        self._decode = engine.context.decode
        engine.context.decode = self._timed  # type: ignore[method-assign]
        self._pass_ns = 0

    def answer(self, request: Request) -> None:
        answer = Answer()
        self._engine.loop.forget_prompts()
        steps = self._engine.stream(request, answer)
        next(steps)
        while not answer.finish:
            self._pass_ns, began = 0, thread_time_ns()
            next(steps)
            taken = thread_time_ns() - began
            self.steps, self.target_ns = self.steps + 1, self.target_ns + self._pass_ns
            self.besides_ns += taken - self._pass_ns
        self.drafted += answer.counters.draft_tokens

    def _timed(self) -> None:
        began = thread_time_ns()
        self._decode()
        self._pass_ns += thread_time_ns() - began


def drafter(base: Profile, folder: Path, name: str, **options: object) -> Profile:
    spec = ProposerSpec("early_exit", {"model": str(folder), **options})
    return replace(base, name=name, proposers=(spec,), planner=PlannerSettings(max_nodes=8))


def written(stack: ExitStack, args: argparse.Namespace, path: Path) -> tuple[Path, IntArray]:
    """A temporary folder of the exits, and the tokens of its rows."""
    scratch = Path(stack.enter_context(TemporaryDirectory()))
    with open_model(path) as model:
        rows = min(args.rows or model.num_tokens, model.num_tokens)
    if args.exits[-1] >= layers_of(path):
        raise UsageError(f"{path}: it has {layers_of(path)} layers; name fewer")
    ids = np.arange(rows, dtype=np.int32)
    write_exits(path, args.exits, ids, scratch / "exits", quantize=args.quantize)
    return scratch / "exits", ids


def answered(engine: LlamaCpp, args: argparse.Namespace) -> list[Text]:
    texts = []
    for prompt in limit(load_workload(args.workload, category="all"), args.limit):
        asked = engine.chat_prompt([{"role": "user", "content": prompt.turns[0]}])
        tokens = engine.generate(Request(asked, args.max_tokens, GREEDY)).tokens
        if len(tokens) > 1:
            texts.append((asked, tokens))
    return texts


def whole(text: Text) -> tuple[IntArray, int]:
    """The prompt and the answer without its last token, and where the first guess is made."""
    prompt, answer = text
    return np.concatenate((prompt, np.array(answer[:-1], dtype=np.int32))), len(prompt)


def guesses(scoring: Context, count: int) -> Sequence[int]:
    """The likeliest row of the head for each of the given hidden states."""
    scoring.clear()
    scoring.clear_batch()
    for at in range(count):
        scoring.add_span((at,), at, 0, wanted=True)
    scoring.decode()
    found: Sequence[int] = scoring.logits(count).argmax(axis=1)
    return found


if __name__ == "__main__":
    main()
