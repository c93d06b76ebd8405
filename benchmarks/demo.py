"""Answers two prompts with plain decoding and with a profile, side by side; `make demo` runs it.

    python benchmarks/demo.py [--model REF] [--profile NAME] [--max-tokens N] [--runs N]

Streams the first run of each, with accepted draft tokens in green. Then prints a table of the medians over all runs,
which alternate. Every run starts with nothing learned.
"""

from __future__ import annotations

import argparse
from statistics import median

from rich.console import Console
from rich.table import Table
from rich.text import Text

from specplug import profile as profiles
from specplug.bench.arms import plain
from specplug.engines.llama_cpp.engine import LlamaCpp
from specplug.engines.llama_cpp.model import open_model
from specplug.generation.answers import Answer, Request
from specplug.machine import hardware
from specplug.models.references import DEMO, resolve

PROMPTS = {
    "copy-heavy": """Here is a function:

def invoice(items, tax):
    total = 0
    for name, price, count in items:
        line = price * count
        print(name, count, "x", price, "=", line)
        total = total + line
    print("tax", total * tax)
    print("total", total * (1 + tax))
    return total * (1 + tax)

Write the whole function again, and rename the parameter tax to rate.""",
    "free text": "Why is the sky blue in the day and red in the evening? Explain it to a child.",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO, help="a .gguf path or a demo model")
    parser.add_argument("--profile", default="default")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    console = Console(highlight=False)
    profile = profiles.load(args.profile)
    table = Table("prompt", "arm", "tokens/s", "tokens per pass", "speedup", "same output", box=None)
    with (
        open_model(resolve(args.model)) as model,
        LlamaCpp(model, plain(profile)) as plain_engine,
        LlamaCpp(model, profile, notify=console.print) as drafting_engine,
    ):
        arms = {"plain": plain_engine, profile.name: drafting_engine}
        busy = hardware.busy_warning()
        if busy:
            console.print(busy)
        console.print(f"{args.model} ({model.description}), profile {profile.name}")
        for kind, prompt in PROMPTS.items():
            request = Request(model.chat_prompt([{"role": "user", "content": prompt}]), args.max_tokens)
            answers: dict[str, list[Answer]] = {name: [] for name in arms}
            for run in range(args.runs):
                for name, engine in arms.items():
                    engine.reset()
                    if run == 0:
                        console.print(f"\n[bold]{kind}, {name}[/bold]")
                    answer = Answer()
                    for released in engine.stream(request, answer):
                        for segment in released if run == 0 else ():
                            console.print(Text(segment.text, style="green" if segment.drafted else ""), end="")
                    if run == 0:
                        console.print()
                    answers[name].append(answer)
            (base, *_), (other, *_) = answers.values()
            seconds = {name: median(a.decode_seconds for a in done) for name, done in answers.items()}
            for name, done in answers.items():
                a = done[0]
                speed = (len(a.tokens) - 1) / seconds[name]
                base_speed = (len(base.tokens) - 1) / seconds["plain"]
                first = name == "plain"
                table.add_row(
                    kind if first else "",
                    name,
                    f"{speed:.1f}",
                    f"{a.counters.mean_acceptance_length:.2f}",
                    "" if first else f"{speed / base_speed:.2f}",
                    "" if first else ("yes" if other.tokens == base.tokens else "no; see specplug verify"),
                )
    console.print()
    console.print(table)


if __name__ == "__main__":
    main()
