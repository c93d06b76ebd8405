"""Compares llama.cpp's speed under specplug in two checkouts, in turn on the same machine.

python benchmarks/before_after.py BEFORE AFTER --model some.gguf [--figures plain overhead] [--pairs 24]

BEFORE and AFTER are checkouts with an environment in `.venv`. Each runs one worker process and one server, which stay
open, and every figure is measured in turn, in an order that alternates from pair to pair:

  raw       a loop of llama.cpp's C calls (raw_loop.py): tokens/s, in the worker of AFTER only
  plain     one answer of the profile `none`: tokens/s
  overhead  suffix lookup and token recycling with seven draft tokens in every pass: microseconds per pass
  eight     eight answers at once of the profile `none`: tokens/s
  serve     eight streamed answers at once from `specplug serve`: tokens/s

It prints the median in both checkouts, and the median of the ratio after / before with a 95% interval over the pairs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter

FIGURES = ("plain", "overhead", "eight", "serve")
STREAMS = 8
PROMPT = "Tell me a long story about a lighthouse keeper and a whale."
TOPICS = ("the sea", "a forest", "a city at night", "snow", "a desert", "an old train", "a market", "the moon")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--figures", nargs="+", choices=FIGURES, default=FIGURES)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    from specplug.bench.statistics import median_interval
    from specplug.machine import hardware

    with ExitStack() as stack:
        sides = {
            name: stack.enter_context(Side(checkout.resolve(), args))
            for name, checkout in (("before", args.before), ("after", args.after))
        }
        arms = [(name, figure) for figure in args.figures for name in sides]
        arms.insert(0, ("after", "raw"))
        measured: dict[tuple[str, str], list[float]] = {arm: [] for arm in arms}
        for pair in range(args.pairs + 1):
            for arm in arms if pair % 2 else [arms[0], *arms[:0:-1]]:
                value = sides[arm[0]].measure(arm[1])
                if pair:  # the first pair warms up
                    measured[arm].append(value)
    print(f"{hardware.fingerprint()}, {args.threads} threads, {Path(args.model).name}, {args.pairs} pairs")
    print(f"raw loop: {median(measured['after', 'raw']):.1f} tokens/s")
    for figure in args.figures:
        before, after = measured["before", figure], measured["after", figure]
        ratio = median_interval([b / a for a, b in zip(before, after, strict=True)])
        print(
            f"{figure:9s} before {median(before):8.1f}  after {median(after):8.1f}  "
            f"after/before {ratio.median:.3f} ({ratio.low:.3f}-{ratio.high:.3f})"
        )
    for name in sides if "plain" in args.figures else ():
        ratio = median_interval([b / a for a, b in zip(measured["after", "raw"], measured[name, "plain"], strict=True)])
        print(f"plain, {name}, of the raw loop: {ratio.median:.3f} ({ratio.low:.3f}-{ratio.high:.3f})")


class Side:
    """One checkout: its worker and its server. Use it in a `with` statement."""

    def __init__(self, checkout: Path, args: argparse.Namespace) -> None:
        self._checkout = checkout
        self._python = str(checkout / ".venv/bin/python")
        self._args = args
        self._stack = ExitStack()

    def __enter__(self) -> Side:
        from openai_endpoint import Endpoint
        from serve_speed import serving

        settings = [self._args.model, str(self._args.tokens), str(self._args.threads)]
        self._worker = subprocess.Popen(
            [self._python, __file__, "--worker", *settings], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._stack.callback(self._worker.kill)
        command = [
            "specplug_cli.main",
            "serve",
            str(Path(self._args.model).resolve()),
            "--profile",
            "none",
            "--slots",
            str(STREAMS),
        ]
        port, _ = self._stack.enter_context(serving(command, self._python, self._checkout))
        self._endpoint = Endpoint(f"http://127.0.0.1:{port}")
        self._pool = self._stack.enter_context(ThreadPoolExecutor(STREAMS))
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def measure(self, figure: str) -> float:
        if figure == "serve":
            return self._serve()
        assert self._worker.stdin and self._worker.stdout
        self._worker.stdin.write(figure + "\n")
        self._worker.stdin.flush()
        return float(json.loads(self._worker.stdout.readline()))

    def _serve(self) -> float:
        from openai_endpoint import answer

        texts = [f"Write a long text about {topic}." for topic in TOPICS]
        began = perf_counter()
        tokens = self._pool.map(lambda text: answer(self._endpoint, text, self._args.tokens).tokens, texts)
        return sum(tokens) / (perf_counter() - began)


def work(model_path: str, tokens: int, threads: int) -> None:
    """Answer each line of stdin, the name of a figure, by its value. Runs in both checkouts, so imports follow both."""
    from specplug import profile
    from specplug.engines.llama_cpp.engine import LlamaCpp
    from specplug.engines.llama_cpp.model import open_model
    from specplug.profile import CostPoints, PlannerSettings
    from specplug.registry import ProposerSpec

    try:
        from specplug.generation.answers import Request
    except ModuleNotFoundError:  # the layout before 2026-11-28
        from specplug.answers import Request  # type: ignore[import-not-found,no-redef]
    none = profile.load("none")
    none = replace(none, runtime=replace(none.runtime, threads=threads, context=1024, flash_attention=True))
    specs = (ProposerSpec("suffix"), ProposerSpec("token_recycling"))
    drafting = replace(none, proposers=specs, planner=PlannerSettings(mode="static", max_nodes=7))
    cost = CostPoints((128,), (1, 9), ((1.0, 1.001),))
    with open_model(Path(model_path)) as model, ExitStack() as stack:
        prompt = model.chat_prompt([{"role": "user", "content": PROMPT}])
        texts = [model.chat_prompt([{"role": "user", "content": f"Write a long text about {t}."}]) for t in TOPICS]
        single = stack.enter_context(LlamaCpp(model, none))
        raw: list[Callable[[list[int], int], tuple[list[int], float]]] = []
        drafts = stack.enter_context(LlamaCpp(model, drafting, cost=cost))
        eight = stack.enter_context(LlamaCpp(model, none, slots=STREAMS))

        def plain() -> float:
            single.loop.forget_prompts()
            answer = single.generate(Request(prompt, tokens))
            return (len(answer.tokens) - 1) / answer.decode_seconds

        def overhead() -> float:
            drafts.reset()
            drafts.generate(Request(prompt, tokens))
            return float(drafts.loop.counters.overhead_us_per_step or 0.0)

        def at_once() -> float:
            eight.reset()
            began = perf_counter()
            answers = eight.generate_all([Request(text, tokens) for text in texts])
            seconds = perf_counter() - began - sum(a.counters.prompt_ns for a in answers) / 1e9
            return sum(len(a.tokens) - 1 for a in answers) / seconds

        def by_c_calls() -> float:
            if not raw:
                from raw_loop import raw_loop

                raw.append(raw_loop(Path(model_path), threads, 1024))
            found, seconds = raw[0](prompt.tolist(), tokens)
            return (len(found) - 1) / seconds

        figures: dict[str, Callable[[], float]] = {
            "raw": by_c_calls,
            "plain": plain,
            "overhead": overhead,
            "eight": at_once,
        }
        for line in sys.stdin:
            print(json.dumps(figures[line.strip()]()), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
