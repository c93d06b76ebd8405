"""Measures what a new user sees: the time to the first byte, and the speed while costs are still being learned.

    python benchmarks/first_answers.py start MODEL... [--busy 0 1 2] [--repeats 3]
    python benchmarks/first_answers.py speed MODEL [--busy 0] [--tokens 2000] [--max-tokens 96] [--repeats 1]
    python benchmarks/first_answers.py threads MODEL [--busy 0 1 2] [--seconds 6]
    python benchmarks/first_answers.py curve MODEL...

start    Seconds from the start of `specplug run` to the first byte of its answer with the profile `default`, no costs
         remembered and the native library tried before, beside the profile `none`; and until `specplug serve` accepts
         connections, beside the time that loading takes. Runs of both alternate.
speed    Tokens per second of answers to the built-in prompts, until every arm has emitted --tokens tokens: a fully
         measured cost curve, one that is learned from nothing, and plain decoding. Every prompt is answered by all
         arms in turn; the interval of a ratio is over prompts. Each repeat begins with nothing learned.
threads  Plain decoding with a fixed number of threads, and with one that follows the free cores, in turns.
curve    T(n) / T(1) for every row count: the best of four passes, flash attention off, bf16 cache of 128 tokens.

--busy N  so many processes compute all the time, in another process each
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, sleep
from typing import Any

from reporting import positive_int, run_benchmark

from specplug import profile
from specplug.bench.arms import ProfileArm, plain
from specplug.bench.statistics import median_interval, paired_ratio
from specplug.bench.workloads import BUILTIN, Prompt, load_workload
from specplug.engines.llama_cpp.context import open_context
from specplug.engines.llama_cpp.drafters.opening import open_target
from specplug.engines.llama_cpp.engine import LlamaCpp
from specplug.engines.llama_cpp.measure import PassTimer, cost_points
from specplug.engines.llama_cpp.model import open_model
from specplug.engines.llama_cpp.settings_choice import with_settings
from specplug.generation.answers import Request, Sampling
from specplug.machine import hardware
from specplug.models.references import resolve
from specplug.profile import Runtime
from specplug.tune.verdict import interval_text

SPECPLUG = Path(sys.executable).with_name("specplug")

PROMPT = "Name three rivers."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(required=True)
    for name, run in (("start", start), ("speed", speed), ("threads", threads), ("curve", curve)):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument("models", nargs="+" if name in ("start", "curve") else 1)
        command.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2] if name != "speed" else [0])
        command.add_argument("--repeats", type=positive_int, default=3 if name == "start" else 1)
        command.add_argument("--tokens", type=positive_int, default=2000)
        command.add_argument("--max-tokens", type=positive_int, default=96)
        command.add_argument("--seconds", type=float, default=6.0)
        command.add_argument("--profile", default="default")
    run_benchmark("first_answers.py", parser.parse_args())


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that compute while the block runs."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        sleep(0.5 if count else 0.0)
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def start(args: argparse.Namespace, document: dict[str, Any]) -> None:
    print("| model | busy | run, `none` | run, `default` | added | serve, `default` | loading |")
    print("|---|---|---|---|---|---|---|")
    for name in args.models:
        path = resolve(name)
        for count in args.busy:
            times: dict[str, list[float]] = defaultdict(list)
            with TemporaryDirectory() as folder:
                environment = os.environ | {"XDG_CACHE_HOME": folder, "SPECPLUG_MODEL": str(path)}
                first_byte(environment, "default")  # the library is tried here
                with busy(count):
                    for _ in range(args.repeats):
                        for method in ("none", "default"):
                            shutil.rmtree(Path(folder) / "specplug" / "cost", ignore_errors=True)
                            times[method].append(first_byte(environment, method))
                        shutil.rmtree(Path(folder) / "specplug" / "cost", ignore_errors=True)
                        times["serve"].append(listening(environment))
                        began = perf_counter()
                        subprocess.run(
                            [sys.executable, "-c", LOAD, str(path)], env=environment, check=True, capture_output=True
                        )
                        times["load"].append(perf_counter() - began)
            cells = [f"{median(times[key]):.2f} ({min(times[key]):.2f}-{max(times[key]):.2f})" for key in times]
            added = median(times["default"]) - median(times["none"])
            print(
                f"| {path.name} | {count} | {cells[0]} | {cells[1]} | {added:+.2f} | {cells[2]} | {cells[3]} |",
                flush=True,
            )


LOAD = """
import sys
from pathlib import Path
from specplug.engines.llama_cpp.model import load_model
from specplug.profile import Runtime
load_model(Path(sys.argv[1]), Runtime())
"""
"""What loading takes, with the start of Python and the imports."""


def first_byte(environment: dict[str, str], method: str) -> float:
    """Seconds from the start of a command to the first byte of its answer."""
    began = perf_counter()
    command = [str(SPECPLUG), "run", "--profile", method, "--max-tokens", "8", PROMPT]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as running:
        assert running.stdout is not None
        if not running.stdout.read(1):
            raise SystemExit(f"error: {' '.join(command)} printed nothing")
        seconds = perf_counter() - began
        running.stdout.read()
    return seconds


def listening(environment: dict[str, str]) -> float:
    """Seconds from the start of a server until it accepts a connection."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = perf_counter()
    with subprocess.Popen(
        [str(SPECPLUG), "serve", "--port", str(port)],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as running:
        try:
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    return perf_counter() - began
                except OSError:
                    if running.poll() is not None:
                        raise SystemExit("error: the server ended") from None
                    sleep(0.01)
        finally:
            running.terminate()


def speed(args: argparse.Namespace, document: dict[str, Any]) -> None:
    path, prompts = resolve(args.models[0]), load_workload(BUILTIN)
    base = profile.load(args.profile)
    for count in args.busy:
        with ExitStack() as stack:
            model = stack.enter_context(open_target(path, [base], base.runtime, lambda text: None))
            chosen = with_settings(base, model)
            cost = cost_points(model, chosen.runtime, chosen.planner.max_nodes + 1, seconds=12.0)
            arms = {
                "plain": ProfileArm(model, plain(chosen), Sampling(), follow_free_cores=True),
                "measured": ProfileArm(
                    model, replace(chosen, name="measured"), Sampling(), cost=cost, follow_free_cores=True
                ),
                "learned": ProfileArm(model, replace(chosen, name="learned"), Sampling(), follow_free_cores=True),
            }
            for arm in arms.values():
                stack.callback(arm.close)
            stack.enter_context(busy(count))
            compare(args, path.name, count, model, arms, prompts)


def compare(
    args: argparse.Namespace,
    name: str,
    count: int,
    model: Any,
    arms: dict[str, ProfileArm],
    prompts: Sequence[Prompt],
) -> None:
    """Print the speed of every arm over its first tokens."""
    tokens: dict[str, list[float]] = defaultdict(list)
    seconds: dict[str, list[float]] = defaultdict(list)
    kinds: list[str] = []
    for _ in range(args.repeats):
        for arm in arms.values():
            arm.reset()
        emitted = 0.0
        for number in range(10_000):
            prompt = prompts[(number * 5) % len(prompts)]  # kinds in turns
            asked = model.chat_prompt([{"role": "user", "content": prompt.turns[0]}])
            order = list(arms)[number % len(arms) :] + list(arms)[: number % len(arms)]
            for key in order:
                (result,) = arms[key].answer([asked], args.max_tokens)
                tokens[key].append(len(result.tokens) - 1)
                seconds[key].append(result.seconds)
            kinds.append(prompt.category)
            emitted += tokens["learned"][-1]
            if emitted >= args.tokens:
                break
    print(f"\n{name}, {count} busy, {len(kinds)} answers, {sum(tokens['learned']):.0f} tokens\n")
    print("| kind | plain, tokens/s | measured / plain | learned / plain | learned / measured |\n|---|---|---|---|---|")
    for kind in ["all", *sorted(set(kinds))]:
        chosen = [i for i, one in enumerate(kinds) if kind in ("all", one)]

        def ratio(one: str, other: str, chosen: list[int] = chosen) -> str:
            lists = ([values[key][i] for i in chosen] for key in (one, other) for values in (tokens, seconds))
            found = paired_ratio(*lists)
            return interval_text(found.as_mapping())

        rate = sum(tokens["plain"][i] for i in chosen) / sum(seconds["plain"][i] for i in chosen)
        pairs = (("measured", "plain"), ("learned", "plain"), ("learned", "measured"))
        print(f"| {kind} | {rate:.1f} | {' | '.join(ratio(*pair) for pair in pairs)} |", flush=True)


def threads(args: argparse.Namespace, document: dict[str, Any]) -> None:
    path = resolve(args.models[0])
    most = hardware.usable_cores()
    print("| model | busy | threads | tokens/s (95%) |\n|---|---|---|---|")
    for count in args.busy:
        with ExitStack() as stack:
            base = profile.load("none")
            model = stack.enter_context(open_target(path, [base], base.runtime, lambda text: None))
            arms = {"follows": stack.enter_context(LlamaCpp(model, base, follow_free_cores=True))}
            for fixed in range(1, most + 1):
                one = replace(base, runtime=replace(base.runtime, threads=fixed))
                arms[str(fixed)] = stack.enter_context(LlamaCpp(model, one))
            asked = model.chat_prompt([{"role": "user", "content": "Write a long story about a lighthouse."}])
            stack.enter_context(busy(count))
            rates: dict[str, list[float]] = defaultdict(list)
            began = perf_counter()
            while perf_counter() - began < args.seconds * len(arms):
                for key, engine in arms.items():
                    answer = engine.generate(Request(asked, 24))
                    rates[key].append((len(answer.tokens) - 1) / answer.decode_seconds)
            for key in rates:
                found = median_interval(rates[key])
                print(f"| {path.name} | {count} | {key} | {interval_text(found.as_mapping())} |", flush=True)


def curve(args: argparse.Namespace, document: dict[str, Any]) -> None:
    rows = [*range(1, 26), 32]
    print(f"| model | threads | T(1), ms | {' | '.join(map(str, rows[1:]))} |\n|{'---|' * (len(rows) + 2)}")
    for name in args.models:
        path = resolve(name)
        for count in range(hardware.usable_cores(), 0, -1):
            runtime = Runtime(threads=count, flash_attention=False, kv_type="bf16")
            with (
                open_model(path) as model,
                open_context(model, runtime, cells=1024, num_ids=3, max_rows=max(rows) + 1) as context,
            ):
                timer = PassTimer(context)
                timer.fill(128)
                timer.time(1)
                first, *others = (min(timer.time(n) for _ in range(4)) for n in rows)
            ratios = " | ".join(f"{ms / first:.1f}" for ms in others)
            print(f"| {path.name} | {count} | {first:.1f} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
