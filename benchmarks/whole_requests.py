"""Times whole requests with long prompts under several engine settings of llama.cpp.

    python benchmarks/whole_requests.py MODEL --rag 2000 --count 8 --max-tokens 128
                                        --settings on,f16 off,f16 [--profile NAME] [--json FILE]

Each request is answered under every setting in changing order: the prompt is read from nothing, then tokens follow,
without drafts. `--profile` adds an arm that drafts as this profile says, under the last setting, and keeps what it has
learned from one prompt to the next. The prompts come from a workload file (`--prompts`), or from this repository's
documents (`--rag`). Prints Markdown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from statistics import mean
from typing import Any

from rag_prompts import rag_prompts
from reporting import positive_int, run_benchmark, threads_text, write

from specplug import profile
from specplug.bench.statistics import paired_ratio
from specplug.bench.workloads import load_workload
from specplug.core import IntArray
from specplug.engines.llama_cpp.engine import LlamaCpp
from specplug.engines.llama_cpp.measure import PROMPT_ROWS
from specplug.engines.llama_cpp.model import Model, open_model
from specplug.engines.llama_cpp.settings_table import label
from specplug.errors import UsageError
from specplug.generation.answers import Answer, Request
from specplug.machine import fingerprint, hardware
from specplug.models.references import resolve
from specplug.profile.settings import KV_TYPES
from specplug.tune.verdict import interval_text

Setting = tuple[bool | None, str | None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(run=run_request)
    parser.add_argument("model", metavar="MODEL")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompts", help="a workload: a JSONL file, or builtin")
    prompts.add_argument("--rag", type=positive_int, metavar="TOKENS", help="about so many tokens in each prompt")
    parser.add_argument("--count", type=positive_int, default=8, help="prompts")
    parser.add_argument("--max-tokens", type=positive_int, default=128)
    parser.add_argument("--settings", nargs="+", type=_setting, default=[(True, "f16"), (False, "f16")])
    parser.add_argument("--profile")
    parser.add_argument("--threads", type=positive_int, default=hardware.usable_cores())
    parser.add_argument("--json", type=Path)
    run_benchmark("whole_requests.py", parser.parse_args())


def _setting(text: str) -> Setting:
    kernel, _, kv_type = text.partition(",")
    if kernel not in ("on", "off") or kv_type not in KV_TYPES:
        raise argparse.ArgumentTypeError(f"{text!r}: write on or off, a comma and one of {', '.join(KV_TYPES)}")
    return kernel == "on", kv_type


def run_request(args: argparse.Namespace, document: dict[str, Any]) -> None:
    with open_model(resolve(args.model)) as model, ExitStack() as stack:
        if args.rag:
            texts = rag_prompts(model, args.rag, args.count)
        else:
            texts = [one.turns[0] for one in load_workload(args.prompts, category="prompt")[: args.count]]
        prompts = [model.chat_prompt([{"role": "user", "content": text}]) for text in texts]
        cells = -(-(max(map(len, prompts)) + args.max_tokens) // 256) * 256
        engines: dict[str, LlamaCpp] = {}
        for name, setting in [("none", one) for one in args.settings] + [(args.profile, args.settings[-1])]:
            if name is not None:
                arm, engine = _engine(model, name, setting, args.threads, cells)
                if arm in engines:
                    engine.close()
                    raise UsageError(f"{arm}: named twice; name each setting once")
                engines[arm] = stack.enter_context(engine)
        answers = ask_all(engines, prompts, args.max_tokens)
    report = {
        "model": fingerprint.model_identity(model.path),
        "threads": args.threads,
        "max_tokens": args.max_tokens,
        "prompts": {
            "tokens": [len(prompt) for prompt in prompts],
            "sha256": sha256(b"".join(prompt.tobytes() for prompt in prompts)).hexdigest(),
        },
        "arms": request_figures(answers),
    }
    document["request"] = report
    write(args.json, document)
    print("\n".join(request_lines(report)))


def _engine(model: Model, name: str, setting: Setting, threads: int, cells: int) -> tuple[str, LlamaCpp]:
    """An engine with a profile under a setting, and the words that name it."""
    chosen = profile.load(name)
    kernel, kv_type = setting
    runtime = replace(chosen.runtime, threads=threads, context=cells, flash_attention=kernel, kv_type=kv_type)
    arm = label(runtime) if name == "none" else f"{label(runtime)}, drafts of {chosen.name}"
    engine = LlamaCpp(model, replace(chosen, runtime=runtime), notify=lambda text: print(text, file=sys.stderr))
    return arm, engine


def ask_all(engines: dict[str, LlamaCpp], prompts: Sequence[IntArray], max_tokens: int) -> dict[str, list[Answer]]:
    """The answers of every engine to every prompt, which it reads from its first token; the order of engines changes.

    A short request before them is not counted.
    """
    answers: dict[str, list[Answer]] = {arm: [] for arm in engines}
    for engine in engines.values():
        engine.generate(Request(prompts[0][:PROMPT_ROWS], 4))
        engine.reset()
    arms = list(engines)
    for number, prompt in enumerate(prompts):
        start = number % len(arms)
        order = arms[start:] + arms[:start]
        for arm in order[:: -1 if number // len(arms) % 2 else 1]:
            engines[arm].loop.forget_prompts()
            answers[arm].append(engines[arm].generate(Request(prompt, max_tokens)))
    return answers


def request_figures(answers: dict[str, list[Answer]]) -> dict[str, dict[str, Any]]:
    """The figures of every arm, by its name; the first arm is the base of all ratios.

    speedup         time of a whole request in the base over that in the arm, for as many tokens as the base's answer
                    has: answers can differ in length, since settings round differently
    decode_speedup  tokens per second after the prompt, over the base's
    """
    base = next(iter(answers.values()))
    lengths = [len(one.tokens) for one in base]
    found = {}
    for arm, line in answers.items():
        decoded = [len(one.tokens) - 1 for one in line]  # reading the prompt yields the first token
        pairs = list(zip(line, base, strict=True))
        found[arm] = {
            "prompt_seconds": [round(_prompt_seconds(one), 5) for one in line],
            "token_seconds": [round(one.decode_seconds, 5) for one in line],
            "tokens": [len(one.tokens) for one in line],
            "speedup": paired_ratio(
                lengths, [_seconds_for(one, len(other.tokens)) for one, other in pairs],
                lengths, [one.seconds for one in base],
            ).as_mapping(),
            "decode_speedup": None,
            "identical": sum(one.tokens == other.tokens for one, other in pairs),
            "tokens_per_pass": round(mean(one.counters.mean_acceptance_length for one in line), 3),
        }  # fmt: skip
        if any(min(pair) > 0 for pair in zip(decoded, (length - 1 for length in lengths), strict=True)):
            found[arm]["decode_speedup"] = paired_ratio(
                decoded, [one.decode_seconds for one in line],
                [length - 1 for length in lengths], [one.decode_seconds for one in base],
            ).as_mapping()  # fmt: skip
    return found


def _prompt_seconds(answer: Answer) -> float:
    return answer.counters.prompt_ns / 1e9


def _seconds_for(answer: Answer, tokens: int) -> float:
    """Seconds of the request if its answer had so many tokens, each taking as long as those it has."""
    decoded = len(answer.tokens) - 1
    scale = (tokens - 1) / decoded if decoded else 1.0
    return _prompt_seconds(answer) + scale * answer.decode_seconds


def request_lines(report: dict[str, Any]) -> list[str]:
    """The figures in Markdown: a line per arm, with seconds per request."""
    lengths, count = report["prompts"]["tokens"], len(report["prompts"]["tokens"])
    lines = [
        f"{report['model']['file']}, {threads_text(report['threads'])}; {count} prompts of {min(lengths)} to "
        f"{max(lengths)} tokens, at most {report['max_tokens']} new tokens; seconds are means per request; "
        "speedups are over the first line, for answers of equal length",
        "",
        "| setting | prompt, s | tokens, s | total, s | new tokens | tokens/s | tokens per pass "
        "| speedup of the request (95%) | speedup after the prompt (95%) | answers as the first line's |",
        "|---" * 10 + "|",
    ]
    for arm, one in report["arms"].items():
        prompt, tokens = mean(one["prompt_seconds"]), mean(one["token_seconds"])
        decoded = sum(one["tokens"]) - count
        rate = f"{decoded / sum(one['token_seconds']):.1f}" if decoded else "-"
        lines.append(
            f"| {arm} | {prompt:.2f} | {tokens:.2f} | {prompt + tokens:.2f} | {mean(one['tokens']):.0f} | {rate} "
            f"| {one['tokens_per_pass']:.2f} | {interval_text(one['speedup'])} "
            f"| {interval_text(one['decode_speedup'])} | {one['identical']} of {count} |"
        )
    return lines


if __name__ == "__main__":
    main()
