"""Measures what llama.cpp's attention kernel and cache type cost on this machine, and how good a short look chooses.

    python benchmarks/engine_settings.py table MODEL... [--contexts 128 1024 4096] [--threads 1 2] [--rounds 4]
    python benchmarks/engine_settings.py regret MODEL... [--contexts ...] [--threads ...] [--from TABLE.json]

Prints Markdown; `--json FILE` also writes the figures as JSON.

table    For every model, number of threads, context and setting: milliseconds of passes over 1, 4, 8 and 16 rows,
         milliseconds to read a token of a prompt there, and up to how many rows passes round alike. Caches are filled
         by copying. Every round times all settings in turn.
regret   The setting of a profile that leaves the choice to specplug (a look of some seconds, made anew), and how many
         times as long its passes take as those of the fastest setting with a cache of 16 bits. Where the chosen setting
         rounds passes of all sizes alike, it competes only with settings that do so, too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import psutil
from reporting import positive_int, run_benchmark, threads_text, write

from specplug.engines.llama_cpp.context import cache_bytes, open_context
from specplug.engines.llama_cpp.engine_settings import CHECKED_ROWS, MEMORY_SHARE, attention_settings
from specplug.engines.llama_cpp.exact_passes import rows_that_agree
from specplug.engines.llama_cpp.measure import PROMPT_ROWS, PassTimer
from specplug.engines.llama_cpp.model import Model, open_model
from specplug.engines.llama_cpp.settings_choice import with_settings
from specplug.engines.llama_cpp.settings_table import label
from specplug.engines.llama_cpp.trial import CHECK_CONTEXT
from specplug.errors import SpecplugError, UsageError
from specplug.machine import fingerprint, hardware
from specplug.models.references import resolve
from specplug.profile import Profile, Runtime

ROWS = (1, 4, 8, 16)
"""Row counts that `table` times."""

COMPARED_ROWS = (1, 4)
"""Row counts at which `regret` compares settings."""

CONTEXTS = (128, 1024, 4096)
"""Tokens in the cache, where none are named."""

PROMPT_ROUNDS = 2
"""Rounds in which reading a prompt is timed: it takes as long as many passes."""

Setting = tuple[bool | None, str | None]


def main() -> None:
    run_benchmark("engine_settings.py", _parser().parse_args())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    cores = hardware.usable_cores()
    for name, run in (("table", run_table), ("regret", run_regret)):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument("models", nargs="+", metavar="MODEL")
        command.add_argument("--contexts", nargs="+", type=positive_int, metavar="TOKENS")
        command.add_argument("--threads", nargs="+", type=positive_int, default=sorted({1, cores}))
        command.add_argument("--rounds", type=positive_int, default=4)
        if name == "regret":
            command.add_argument("--from", dest="source", type=Path, help="the JSON file of an earlier `table`")
        command.add_argument("--json", type=Path)
    return parser


# -- table ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Subject:
    """One setting, opened, with all its times in milliseconds; `equal_rows` by context."""

    runtime: Runtime
    timer: PassTimer
    ms: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    prompt_ms: dict[int, list[float]] = field(default_factory=dict)
    equal_rows: dict[int, int] = field(default_factory=dict)

    def time(self, rows: int) -> None:
        """Time a pass. An uncounted one precedes it, since the first pass after another row count takes longer."""
        self.timer.time(rows)
        self.ms.setdefault((self.timer.filled, rows), []).append(self.timer.time(rows))

    def time_prompt(self) -> None:
        self.prompt_ms.setdefault(self.timer.filled, []).append(self.timer.prompt_ms())

    def compare_roundings(self, contexts: Sequence[int]) -> None:
        self.timer.fill(CHECK_CONTEXT)
        at_check = rows_that_agree(self.timer.context, CHECK_CONTEXT, CHECKED_ROWS)
        for context in contexts:
            self.timer.fill(context)
            self.equal_rows[context] = min(at_check, rows_that_agree(self.timer.context, context, CHECKED_ROWS))

    def as_mapping(self, contexts: Sequence[int]) -> dict[str, Any]:
        """Plain data: ms[i][j] with contexts[i] tokens in the cache and ROWS[j] rows; `rounds_ms` has every time."""
        return {
            "flash_attention": self.runtime.flash_attention,
            "kv_type": self.runtime.kv_type,
            "label": label(self.runtime),
            "ms": [[round(median(self.ms[context, rows]), 4) for rows in ROWS] for context in contexts],
            "prompt_ms": [round(median(self.prompt_ms[context]), 4) for context in contexts],
            "equal_rows": [self.equal_rows[context] for context in contexts],
            "rounds_ms": [[[round(ms, 4) for ms in self.ms[context, rows]] for rows in ROWS] for context in contexts],
        }


def all_settings(threads: int) -> list[Runtime]:
    """Every combination of attention kernel and cache type that llama.cpp can open."""
    found = attention_settings(Runtime(threads=threads), quantised=True)
    return [*found, Runtime(threads=threads, flash_attention=True, kv_type="f32")]


def measure(model: Model, runtimes: Sequence[Runtime], contexts: Sequence[int], rounds: int) -> dict[str, Any]:
    """The times of all settings for one model and number of threads, as plain data.

    contexts  tokens in the cache, ascending
    """
    cells = -(-(max(*contexts, CHECK_CONTEXT) + PROMPT_ROWS + 256) // 256) * 256
    subjects: list[Subject] = []
    skipped: list[str] = []
    with ExitStack() as stack:
        for runtime in runtimes:
            needed, free = cache_bytes(model, runtime, cells), psutil.virtual_memory().available
            if needed > MEMORY_SHARE * free:
                skipped.append(
                    f"{label(runtime)}: a cache of {needed / 2**30:.1f} GiB, with {free / 2**30:.1f} GiB of memory free"
                )
                continue
            try:
                opened = open_context(model, runtime, cells=cells, num_ids=2, max_rows=max(ROWS + CHECKED_ROWS))
            except SpecplugError as error:
                skipped.append(f"{label(runtime)}: {_without_folder(str(error), model.path)}")
                continue
            subjects.append(Subject(runtime, PassTimer(stack.enter_context(opened))))
        for one in subjects:
            one.compare_roundings(contexts)
        for round_ in range(rounds):
            in_turn = subjects[:: -1 if round_ % 2 else 1]
            for context in contexts:
                for one in in_turn:
                    one.timer.fill(context)
                for rows in ROWS:
                    for one in in_turn:
                        one.time(rows)
                for one in in_turn if round_ < PROMPT_ROUNDS else ():
                    one.time_prompt()
    return {
        "model": fingerprint.model_identity(model.path),
        "description": model.description,
        "threads": runtimes[0].threads,
        "contexts": list(contexts),
        "rows": list(ROWS),
        "checked_rows": CHECKED_ROWS[-1],
        "rounds": rounds,
        "settings": [one.as_mapping(contexts) for one in subjects],
        "skipped": skipped,
    }


def table_lines(table: dict[str, Any]) -> list[str]:
    """One table in Markdown: a line per setting, three columns per context; the fastest times are bold."""
    settings, contexts = table["settings"], table["contexts"]
    count = " / ".join(map(str, table["rows"]))
    lines = [
        f"{table['model']['file']} ({table['description']}), {threads_text(table['threads'])}; milliseconds of a pass "
        f"over {count} rows, milliseconds per token of a prompt, and up to how many rows passes round alike (of "
        f"{table['checked_rows']} compared), by tokens in the cache",
        "",
    ]
    if settings:
        columns = [text for c in contexts for text in (f"{c}: {count} rows", f"{c}: prompt", f"{c}: alike")]
        lines += ["| setting | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        fastest = [[min(line) for line in zip(*(one["ms"][i] for one in settings), strict=True)] for i in _at(contexts)]
        fastest_prompt = [min(one["prompt_ms"][i] for one in settings) for i in _at(contexts)]
        for one in settings:
            cells = []
            for i in _at(contexts):
                passes = (_bold(ms, best) for ms, best in zip(one["ms"][i], fastest[i], strict=True))
                cells += [" / ".join(passes), _bold(one["prompt_ms"][i], fastest_prompt[i]), str(one["equal_rows"][i])]
            lines.append(f"| {one['label']} | " + " | ".join(cells) + " |")
        spreads = [
            (max(times) - min(times)) / median(times) for one in settings for line in one["rounds_ms"] for times in line
        ]
        if table["rounds"] > 1:
            lines += [
                "",
                f"{table['rounds']} rounds; from the fastest to the slowest round a time changes by "
                f"{100 * median(spreads):.0f}% (median), {100 * max(spreads):.0f}% (largest).",
            ]
    lines += [f"\nNot measured: {text}." for text in table["skipped"]]
    return lines


def _at(values: Sequence[int]) -> range:
    return range(len(values))


def _bold(ms: float, best: float) -> str:
    text = f"{ms:.3g}" if ms < 100 else f"{ms:.0f}"
    return f"**{text}**" if ms == best else text


def _without_folder(text: str, path: Path) -> str:
    return text.replace(str(path), path.name).rstrip(".")


def run_table(args: argparse.Namespace, document: dict[str, Any]) -> None:
    document["tables"] = []
    contexts = sorted(set(args.contexts or CONTEXTS))
    for name in args.models:
        try:
            with open_model(resolve(name)) as model:
                for threads in args.threads:
                    table = measure(model, all_settings(threads), contexts, args.rounds)
                    document["tables"].append(table)
                    print("\n".join(table_lines(table)), end="\n\n", flush=True)
                    write(args.json, document)
        except SpecplugError as error:
            print(f"Not measured: {_without_folder(str(error), Path(name))}.", end="\n\n", flush=True)


# -- regret --------------------------------------------------------------------------------------------------------


def run_regret(args: argparse.Namespace, document: dict[str, Any]) -> None:
    known = _known_tables(args.source) if args.source else None
    first = next(iter(known.values()))["contexts"] if known else CONTEXTS
    contexts = sorted(set(args.contexts or first))
    document |= {"looks": [], "tables": []}
    problems = []
    for name in args.models:
        for threads in args.threads:
            try:
                with open_model(resolve(name)) as model:
                    known_table = _known_table(known, model.path, threads, contexts) if known is not None else None
                    began = perf_counter()
                    chosen = with_settings(
                        Profile("open", runtime=Runtime(threads=threads, context=max(contexts))), model
                    ).runtime
                    seconds = perf_counter() - began
                    settings = [one for one in all_settings(threads) if _is_16_bits(one.kv_type)]
                    table = known_table or measure(model, settings, contexts, args.rounds)
            except SpecplugError as error:
                problems.append(f"\nNot measured: {_without_folder(str(error), Path(name))}.")
                continue
            if known_table is None:
                document["tables"].append(table)
            document["looks"].append(
                {
                    "model": table["model"],
                    "threads": threads,
                    "flash_attention": chosen.flash_attention,
                    "kv_type": chosen.kv_type,
                    "label": label(chosen),
                    "seconds": round(seconds, 2),
                    "cells": regrets(table, (chosen.flash_attention, chosen.kv_type), contexts),
                }
            )
            write(args.json, document)
    print("\n".join(regret_lines(document["looks"], contexts) + problems))


def regrets(table: dict[str, Any], chosen: Setting, contexts: Sequence[int]) -> list[dict[str, Any]]:
    """For every context and row count: the time under `chosen` over that of the fastest setting it competes with.

    ratio      None where the chosen setting was not measured
    ratio_all  the same over the fastest setting of 16 bits, whether its passes round alike or not
    """
    settings = {(one["flash_attention"], one["kv_type"]): one for one in table["settings"]}
    cells: list[dict[str, Any]] = []
    for context in contexts:
        place = table["contexts"].index(context)
        halves = {one: line for one, line in settings.items() if _is_16_bits(one[1])}
        alike = {one: line for one, line in halves.items() if line["equal_rows"][place] == table["checked_rows"]}
        equal = chosen in alike
        for rows in COMPARED_ROWS:
            times = {one: line["ms"][place][table["rows"].index(rows)] for one, line in halves.items()}
            own = times.get(chosen)
            best = min(alike if equal else halves, key=times.__getitem__, default=None)
            cells.append(
                {
                    "context": context,
                    "rows": rows,
                    "ratio": round(own / times[best], 4) if own and best else None,
                    "ratio_all": round(own / min(times.values()), 4) if own else None,
                    "fastest": halves[best]["label"] if best else None,
                    "equal_only": equal,
                }
            )
    return cells


def regret_lines(looks: Sequence[dict[str, Any]], contexts: Sequence[int]) -> list[str]:
    """The table of `regret` in Markdown: a line per model and number of threads."""
    columns = [f"{context}: {rows} row{'s' if rows > 1 else ''}" for context in contexts for rows in COMPARED_ROWS]
    lines = [
        "Times under the chosen setting over those under the fastest setting that it competes with, by tokens in the "
        "cache and rows of the pass; the last column compares it with all settings of 16 bits",
        "",
        "| model | threads | chosen | competes with | choice, s | " + " | ".join(columns) + " | largest, against all |",
        "|---" * (len(columns) + 6) + "|",
    ]
    for one in looks:
        equal = [cell["equal_only"] for cell in one["cells"]]
        rivals = "settings that round alike" if all(equal) else "all of 16 bits" if not any(equal) else "both kinds"
        cells = []
        for cell in one["cells"]:
            other = "" if cell["fastest"] == one["label"] else f" ({cell['fastest']})"
            cells.append("not measured" if cell["ratio"] is None else f"{cell['ratio']:.2f}{other}")
        lines.append(
            f"| {one['model']['file']} | {one['threads']} | {one['label']} | {rivals} | {one['seconds']:.1f} | "
            + " | ".join(cells)
            + f" | {max((cell['ratio_all'] for cell in one['cells'] if cell['ratio_all']), default=nan):.2f} |"
        )
    ratios = [cell["ratio"] for one in looks for cell in one["cells"] if cell["ratio"] is not None]
    if ratios:
        lines += ["", f"{len(ratios)} ratios: median {median(ratios):.2f}, largest {max(ratios):.2f}."]
    return lines


def _is_16_bits(kv_type: str | None) -> bool:
    return kv_type in ("f16", "bf16")


def _known_tables(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The tables in a JSON file of this script, by model and threads. UsageError for other files and machines."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        tables = {(one["model"]["sample_sha256"], one["threads"]): one for one in document["tables"]}
        machine = document["machine"]
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); name the JSON file of `table`") from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{path}: not a JSON file of `table`; name one that `table --json` wrote") from None
    if not tables:
        raise UsageError(f"{path}: holds no tables; run `table` again")
    if machine != hardware.fingerprint():
        raise UsageError(f"{path}: measured on another machine ({machine['cpu']}); run `table` here")
    return tables


def _known_table(
    known: dict[tuple[str, int], dict[str, Any]], model: Path, threads: int, contexts: Sequence[int]
) -> dict[str, Any]:
    table = known.get((fingerprint.model_identity(model)["sample_sha256"], threads))
    if table is None:
        raise UsageError(f"the tables do not hold {model.name} with {threads_text(threads)}; run `table` for it")
    missing = [context for context in contexts if context not in table["contexts"]]
    if missing:
        raise UsageError(f"the table of {model.name} lacks contexts {missing}; run `table` again, or name others")
    return table


if __name__ == "__main__":
    main()
