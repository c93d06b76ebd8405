"""What it costs to take drafts back from a recurrent state: snapshots, copies and checkpoints, by architecture.

    python benchmarks/recurrent_memory.py [--rounds 20] [--json FILE]
    python benchmarks/recurrent_memory.py --stress 400

The models have random weights, the widths of published models but for two KV heads, few layers and a vocabulary of
2,048 tokens, so a pass takes less time than theirs and the shares here are upper bounds. Times are CPU time of one
thread, in interleaved rounds, the least of each. `--stress` runs the test of streams that come and go on every tiny
architecture, with so many streams each, and counts the texts that are wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import process_time_ns
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import tiny_architectures
import tiny_gguf
import tiny_layers
from reporting import positive_int, run_benchmark
from reporting import write as write_json

from specplug.engines.llama_cpp.cache_fill import hashed_tokens
from specplug.engines.llama_cpp.context import Context, open_context
from specplug.engines.llama_cpp.model import Model, open_model
from specplug.profile import Runtime

RUNTIME = Runtime(threads=1, context=2048, kv_type="f16", flash_attention=True)
ROWS = (1, 2, 5, 9)
SNAPSHOTS = (0, 8, 16)
FILL = 64

WIDTHS: dict[str, dict[str, Any]] = {
    "qwen35": {"width": 1024, "layers": 8, "HEADS": 8, "HEAD": 128, "FEED_FORWARD": 3584, "STATE": 128,
               "SSM_HEADS": 16},
    "nemotron_h": {"width": 2048, "layers": 9, "HEADS": 16, "HEAD": 128, "FEED_FORWARD": 8192,
                   "STATE": 128, "SSM_HEADS": 64},
    "lfm2": {"width": 1024, "layers": 8, "HEADS": 16, "HEAD": 64, "FEED_FORWARD": 4608},
    "granitehybrid": {"width": 1536, "layers": 8, "HEADS": 12, "HEAD": 128, "FEED_FORWARD": 4096,
                      "STATE": 128, "SSM_HEADS": 48},
    "mamba2": {"width": 1024, "layers": 8, "STATE": 128, "SSM_HEADS": 32},
}  # fmt: skip
"""Widths as in models of 0.4 to 4 billion weights; every second layer, or two of three, have a state."""


def write(name: str, path: Path) -> Path:
    options = dict(WIDTHS[name])
    common = {"width": options.pop("width"), "layers": options.pop("layers")}
    for module in (tiny_gguf, tiny_layers, tiny_architectures):
        for constant, value in options.items():
            if hasattr(module, constant):
                setattr(module, constant, value)
    return tiny_architectures.ARCHITECTURES[name](path, weights="q8_0", **common)


def cpu_ms(work: Callable[[], object]) -> float:
    began = process_time_ns()
    work()
    return (process_time_ns() - began) / 1e6


class Passes:
    """Passes over one sequence of a context, which grows by the rows that are not taken back."""

    def __init__(self, model: Model, snapshots: int) -> None:
        self.context: Context = open_context(
            model, RUNTIME, cells=2048, num_ids=2, max_rows=max(ROWS), snapshots=snapshots
        )
        self.snapshots = snapshots
        self.refill()

    def refill(self) -> None:
        self.context.read(hashed_tokens(0, FILL, self.context.model.num_tokens))
        self.held = FILL

    def time(self, rows: int) -> float:
        """A pass in place, of which all rows but the first are taken back where there are snapshots."""
        if self.held > 1024:
            self.refill()
        context = self.context
        context.clear_batch()
        context.add_span(
            hashed_tokens(self.held, self.held + rows, context.model.num_tokens), self.held, 0, wanted=True
        )
        ms = cpu_ms(context.decode)
        if 1 < rows <= self.snapshots + 1:
            ms += cpu_ms(lambda: context.drop(0, self.held + 1))
            self.held += 1
        else:
            self.held += rows
        return ms

    def forked(self, rows: int) -> float:
        """A pass on a copy, which is then dropped."""

        def work() -> None:
            context.copy(0, 1)
            context.clear_batch()
            context.add_span(
                hashed_tokens(self.held, self.held + rows, context.model.num_tokens), self.held, 1, wanted=True
            )
            context.decode()
            context.drop(1)

        context = self.context
        return cpu_ms(work)


def costs(name: str, rounds: int) -> dict[str, Any]:
    with TemporaryDirectory() as folder, open_model(write(name, Path(folder) / "model.gguf"), RUNTIME) as model:
        kinds = [count for count in SNAPSHOTS if not count or name in tiny_architectures.SNAPSHOTS]
        passes = {count: Passes(model, count) for count in kinds}
        times: dict[tuple[str, int], list[float]] = {}
        for _ in range(rounds):
            for rows in ROWS:
                for count, one in passes.items():
                    times.setdefault((f"{count} snapshots", rows), []).append(one.time(rows))
                times.setdefault(("copy", rows), []).append(passes[0].forked(rows))
        saved = passes[0].context.recurrent_state(0)
        held = passes[0].held
        save = [cpu_ms(lambda: passes[0].context.recurrent_state(0)) for _ in range(rounds)]
        load = [cpu_ms(lambda: passes[0].context.return_to(0, held, saved)) for _ in range(rounds)]
        for one in passes.values():
            one.context.close()
    return {
        "state_mib": len(saved) / (1 << 20),
        "ms": {f"{kind}, {rows} rows": min(found) for (kind, rows), found in times.items()},
        "save_ms": median(save),
        "load_ms": median(load),
    }


def report(name: str, found: dict[str, Any]) -> None:
    ms = found["ms"]
    line = [f"| {name} | {found['state_mib']:.2f} | {9 * found['state_mib']:.1f} "]
    line += [f"| {ms[f'0 snapshots, {rows} rows']:.1f} " for rows in ROWS]
    for kind in ("8 snapshots", "16 snapshots", "copy"):
        shares = [ms.get(f"{kind}, {rows} rows", 0) / ms[f"0 snapshots, {rows} rows"] for rows in ROWS]
        line.append("| " + (" / ".join(f"{share:.2f}" for share in shares) if all(shares) else "-") + " ")
    print("".join(line) + f"| {found['save_ms']:.2f} / {found['load_ms']:.2f} |", flush=True)


def stress(streams: int) -> dict[str, Any]:
    from test_recurrent_memory import RECURRENT, wrong_texts

    counted = {}
    with TemporaryDirectory() as folder:
        for name in RECURRENT:
            path = tiny_architectures.ARCHITECTURES[name](Path(folder) / f"{name}.gguf")
            with open_model(path, RUNTIME) as model:
                wrong, together = wrong_texts(model, streams)
            counted[name] = {"wrong": wrong, "steps_of_several": together}
            print(f"{name}: {wrong} of {streams} texts are wrong, {together} steps had several sequences", flush=True)
    return counted


def run(args: argparse.Namespace, document: dict[str, Any]) -> None:
    if args.stress:
        document["stress"] = stress(args.stress)
    else:
        print(
            f"rows: {', '.join(map(str, ROWS))}; times with snapshots and on a copy relative to those in place without"
        )
        head = ["architecture", "state MiB", "8 snapshots MiB", *(f"T({rows}) ms" for rows in ROWS)]
        head += ["8 snapshots", "16 snapshots", "copy", "save / load ms"]
        print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
        document["costs"] = {}
        for name in WIDTHS:
            document["costs"][name] = costs(name, args.rounds)
            report(name, document["costs"][name])
    write_json(args.json, document)


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive_int, default=20)
    parser.add_argument("--stress", type=positive_int, metavar="STREAMS")
    parser.add_argument("--json", type=Path)
    parser.set_defaults(run=run)
    run_benchmark("recurrent_memory.py", parser.parse_args())


if __name__ == "__main__":
    main()
