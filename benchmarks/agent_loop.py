"""Measures an agent's loop: the hit rate of the prompt cache, and the time to the first token of each turn.

    python benchmarks/agent_loop.py MODEL.gguf [--profile serve] [--client openai|anthropic|litellm] [--turns 20]
                                    [--tokens 64] [--file-words 150] [--no-stream] [--context 16384] [--threads N]
                                    [--peer URL] [--json FILE]

The script starts the server. In each turn but the last the model has to call a tool, and gets a text of `--file-words`
words. So the prompt grows by the call and its result in each turn, and all that the turn before had read can come from
the cache. Answers are greedy.

`--peer URL` (without /v1) runs the same loop at another server with OpenAI's API, turn by turn in alternation, through
the client `openai` or `litellm`; that server should have the same model, threads and context. Its conversation is its
own: only the tools' results are the same. llama-server needs `--jinja` for tools. It does not enforce a call with every
template; without one, the user's next message has the result, and the conversation grows alike.

Prints a table: per turn and server the tokens of the prompt, those from the cache, and milliseconds to the first text
or call (with `--no-stream`, to the whole answer); then the hit rate, which is cached tokens by prompt tokens over the
turns after the first, and the median time. A server that reports no cached tokens has none in the table. Times need an
idle machine.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any
from urllib.request import urlopen

from agent_clients import CLIENTS, Agent, Turn, connect
from reporting import positive_int, run_benchmark, write
from serve_speed import serving

from specplug.errors import SpecplugError, UsageError
from specplug.models.references import resolve

PEER = "peer"
SEED = 20
"""Of the texts that the tool returns."""

WORDS = """value index buffer token cache reader writer parser queue batch layer result model server client error
    number string list table column branch commit module import return define measure count""".split()

SYSTEM = "You are a careful programmer. Read files before you answer, one per step, and say in the end what you found."
QUESTION = "Read the files of this project one after the other. Then say in one sentence what they are about."
READ_FILE: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "read_file",
        "description": "Returns the text of a file.",
        "parameters": {
            "type": "object",
            "properties": {"path": {"type": "string", "maxLength": 24}, "from_line": {"type": "integer"}},
            "required": ["path"],
            "additionalProperties": False,
        },
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--profile", default="serve")
    parser.add_argument("--client", choices=CLIENTS, default="openai")
    parser.add_argument("--turns", type=positive_int, default=20)
    parser.add_argument("--tokens", type=positive_int, default=64, help="limit of each answer")
    parser.add_argument("--file-words", type=positive_int, default=150)
    parser.add_argument("--no-stream", dest="stream", action="store_false")
    parser.add_argument("--context", type=positive_int, default=16384)
    parser.add_argument("--threads", type=positive_int)
    parser.add_argument("--peer", metavar="URL")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.set_defaults(run=run)
    run_benchmark("agent_loop.py", parser.parse_args())


def run(args: argparse.Namespace, document: dict[str, Any]) -> None:
    if find_spec(args.client) is None:
        raise UsageError(f"--client {args.client}: the package is not installed; pip install {args.client}")
    if args.peer:
        _check_peer(args.peer, args.client)
    command = ["specplug_cli.main", "serve", str(resolve(args.model)), "--profile", args.profile]
    command += ["--context", str(args.context)]
    command += ["--threads", str(args.threads)] if args.threads else []
    loop: dict[str, Any] = {"system": SYSTEM, "question": QUESTION, "tools": [READ_FILE]}
    loop |= {"max_tokens": args.tokens, "temperature": 0}
    with ExitStack() as stack:
        port, _ = stack.enter_context(serving(command))
        urls = {"specplug": f"http://127.0.0.1:{port}"} | ({PEER: args.peer.rstrip("/")} if args.peer else {})
        agents = {name: stack.enter_context(connect(args.client, url, **loop)) for name, url in urls.items()}
        turns = run_loop(agents, args.turns, args.file_words, args.stream)
    for name, of_server in turns.items():
        document[name] = {"turns": [asdict(turn) for turn in of_server], **summary(of_server)}
    print(table(turns))
    for name in turns:
        figures = document[name]
        calls = sum(bool(turn.calls) for turn in turns[name])
        print(f"{name}: {figures['hit_rate']} of the prompts from the cache, median {figures['first_ms']} ms, ", end="")
        print(f"{calls} of {len(turns[name]) - 1} turns with a call")
    write(args.json, document)


def run_loop(agents: Mapping[str, Agent], num_turns: int, file_words: int, stream: bool) -> dict[str, list[Turn]]:
    """The turns of each agent; every turn is made with all of them before the next one begins."""
    words = random.Random(SEED)
    turns: dict[str, list[Turn]] = {name: [] for name in agents}
    for number in range(1, num_turns + 1):
        last = number == num_turns
        result = " ".join(words.choices(WORDS, k=file_words))
        for name, agent in agents.items():
            turn = agent.ask(stream=stream, must_call=not last)
            turns[name].append(turn)
            if not turn.calls and not last and name != PEER:
                raise SpecplugError(
                    f"{name}: turn {number} has no call of a tool; raise --tokens, or try another model"
                )
            if turn.calls:
                agent.give([result] * len(turn.calls))
            else:
                agent.say(result)
    return turns


def summary(turns: list[Turn]) -> dict[str, float | None]:
    """hit_rate: cached tokens by prompt tokens after the first turn; None without such turns or without a report."""
    later = turns[1:]
    known = bool(later) and all(turn.cached_tokens is not None for turn in later)
    cached, read = sum(turn.cached_tokens or 0 for turn in later), sum(turn.prompt_tokens for turn in later)
    return {
        "hit_rate": round(cached / read, 4) if known else None,
        "first_ms": round(1000 * median(turn.first_s for turn in later or turns), 1),
    }


def table(turns: Mapping[str, list[Turn]]) -> str:
    columns = ("prompt", "cached", "first ms")
    lines = ["turn" + "".join(f"{f'{name} {column}':>20}" for name in turns for column in columns)]
    for number, row in enumerate(zip(*turns.values(), strict=True), 1):
        cells = [
            cell for turn in row for cell in (turn.prompt_tokens, turn.cached_tokens, f"{1000 * turn.first_s:.1f}")
        ]
        lines.append(f"{number:>4}" + "".join(f"{'' if cell is None else cell:>20}" for cell in cells))
    return "\n".join(lines)


def _check_peer(url: str, client: str) -> None:
    if client == "anthropic":
        raise UsageError("--peer: use --client openai or litellm; the other server is asked in OpenAI's API")
    try:
        urlopen(f"{url.rstrip('/')}/v1/models", timeout=10).close()
    except (OSError, ValueError) as error:
        raise UsageError(f"--peer {url}: {error}; give the address of a running server, without /v1") from None


if __name__ == "__main__":
    main()
