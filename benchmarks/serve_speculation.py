"""Measures the speedup by drafts for one stream of `specplug serve`, and for the engine that `specplug bench` uses.

    python benchmarks/serve_speculation.py MODEL.gguf [--profile serve] [--limit 2] [--tokens 128] [--slots 8]
                                           [--repeats 1]

Four arms answer the first turns of the built-in workload, greedily and in turn: the engine in this process, with plain
decoding and with the profile, and two servers, with the same two. Each arm's own clock measures the time after the
first token. Proposers that learn over answers keep what they learned, in the engine and in the server; with `--repeats
2` they have learned every answer. Prints, per arm, milliseconds per token, tokens per step, and the speedup over plain
decoding in the same engine or server, with a 95% interval over prompts.
"""

from __future__ import annotations

import argparse
import http.client
import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

from serve_speed import serving

from specplug import profile
from specplug.bench.arms import plain
from specplug.bench.statistics import paired_ratio
from specplug.bench.workloads import limit, load_workload
from specplug.engines.llama_cpp.engine import LlamaCpp
from specplug.engines.llama_cpp.model import open_model
from specplug.generation.answers import Request
from specplug.machine import hardware
from specplug.models.references import resolve
from specplug.tune.verdict import interval_text

ARMS = ("engine, plain", "engine, drafting", "server, plain", "server, drafting")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--profile", default="serve")
    parser.add_argument("--limit", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    path = resolve(args.model)
    chosen = profile.load(args.profile)
    prompts = limit(load_workload("builtin"), args.limit) * args.repeats
    tokens: dict[str, list[float]] = {arm: [] for arm in ARMS}
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    lengths: dict[str, list[float]] = {arm: [] for arm in ARMS}
    with TemporaryDirectory() as folder, ExitStack() as opened:
        model = opened.enter_context(open_model(path))
        engines, ports = {}, {}
        for name, used in (("plain", plain(chosen)), ("drafting", chosen)):
            engines[f"engine, {name}"] = opened.enter_context(LlamaCpp(model, used))
            written = Path(folder) / f"{name}.yaml"
            profile.save(replace(used, name=name), written)
            command = ["specplug_cli.main", "serve", str(path), "--profile", str(written), "--slots", str(args.slots)]
            ports[f"server, {name}"], _ = opened.enter_context(serving(command))
        for number, prompt in enumerate(prompts):
            for arm in ARMS if number % 2 else reversed(ARMS):
                if arm in engines:
                    asked = model.chat_prompt([{"role": "user", "content": prompt.turns[0]}])
                    answer = engines[arm].generate(Request(asked, args.tokens))
                    count, took, length = (
                        len(answer.tokens),
                        answer.decode_seconds,
                        answer.counters.mean_acceptance_length,
                    )
                else:
                    count, took, length = served(ports[arm], prompt.turns[0], args.tokens)
                tokens[arm].append(count - 1)  # the prefill yields the first token
                seconds[arm].append(took)
                lengths[arm].append(length)
    print(f"{hardware.fingerprint()}, {path.name}, profile {chosen.name}, {args.slots} slots")
    for arm in ARMS:
        base = arm.split(",")[0] + ", plain"
        speedup = paired_ratio(tokens[arm], seconds[arm], tokens[base], seconds[base])
        print(
            f"{arm:18s} {len(prompts)} answers, {sum(tokens[arm]):.0f} tokens, "
            f"{1000 * sum(seconds[arm]) / sum(tokens[arm]):6.2f} ms per token, "
            f"{mean(lengths[arm]):.2f} tokens per step, "
            f"speedup {interval_text(speedup.as_mapping())}"
        )


def served(port: int, text: str, tokens: int) -> tuple[int, float, float]:
    """An answer's tokens, seconds after the first token, and tokens per step, by the server's own figures."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    body = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": tokens}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    found = json.load(connection.getresponse())
    connection.close()
    figures = found["specplug"]
    return found["usage"]["completion_tokens"], figures["decode_ms"] / 1000, figures["mean_acceptance_length"]


if __name__ == "__main__":
    main()
