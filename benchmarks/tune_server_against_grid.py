"""Measures the regret of `specplug tune --server` against the best of its candidates, and the error of its predictions.

    python benchmarks/tune_server_against_grid.py "llama-server -m MODEL.gguf -t 2" [--draft FILE] [--budget 300]
        [--every 7] [--answers 7] [--max-tokens 64] [--rounds 6] [--json FILE]

First the tune, as the command runs it. Then its choice, the best ones by prediction, each lookup type at the server's
own sizes, and every N-th of all candidates run live beside plain decoding, question by question in turns, one process
for each. The fastest of these then run side by side with the choice, over all prompts of the workload, in rounds with
new processes, until the 95% interval of each one's speed relative to the choice is no wider than 6 points. The regret
is from this second run alone, because the best of many noisy figures is an overestimate. Prints the tune's verdict, a
table of all that ran, the errors of the predictions, and the regret; the file of --json is written after each part. The
machine must be idle.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from reporting import positive_int, run_benchmark, write

from specplug.bench.statistics import Interval
from specplug.bench.workloads import limit, load_workload
from specplug.errors import UsageError
from specplug.models.references import drafters_beside
from specplug.subjects.launched import LaunchedServer
from specplug.subjects.opening import open_subject
from specplug.subjects.server_command import ServerCommand
from specplug.subjects.subject import Subject
from specplug.tune.server_flags.live_servers import LiveServers
from specplug.tune.server_flags.llama_candidates import chained
from specplug.tune.server_flags.offered_candidates import candidates_of
from specplug.tune.server_flags.recorded_questions import AskedQuestion, turns_of
from specplug.tune.server_flags.server_candidates import PLAIN, Candidate
from specplug.tune.server_flags.server_document import server_verdict
from specplug.tune.server_flags.server_request import ServerRequest
from specplug.tune.server_flags.server_session import tune_server
from specplug.tune.server_flags.successive_elimination import CandidateRun, SuccessiveElimination

WIDTH = 0.06
"""The widest interval of the regret that ends the second run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", help="the command of a llama-server, model included, without a port")
    parser.add_argument("--draft", type=Path, action="append", default=[], help="a model that drafts")
    parser.add_argument("--workload", default="builtin")
    parser.add_argument("--limit", type=positive_int, help="prompts of a category, for the tune")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds for the tune")
    parser.add_argument("--every", type=positive_int, default=7, help="of the candidates")
    parser.add_argument("--answers", type=positive_int, default=7, help="answers of each candidate")
    parser.add_argument("--max-tokens", type=positive_int, default=64)
    parser.add_argument("--best", type=positive_int, default=6, help="candidates that run because of their predictions")
    parser.add_argument("--finalists", type=positive_int, default=3, help="the fastest ones, which run again")
    parser.add_argument("--rounds", type=positive_int, default=6, help="rounds of the second run, at most")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.set_defaults(run=run)
    run_benchmark("tune_server_against_grid.py", parser.parse_args())


def run(args: argparse.Namespace, document: dict[str, Any]) -> None:
    server = open_subject(args.server)
    if not isinstance(server, LaunchedServer) or server.command.model is None:
        raise UsageError('give a command with its model, such as "llama-server -m some.gguf"')
    model = Path(server.command.model)
    prompts = load_workload(args.workload)
    prompts = prompts if args.limit is None else limit(prompts, args.limit)
    with TemporaryDirectory() as folder:
        request = ServerRequest(
            command=server.command,
            model=model,
            prompts=prompts,
            workload=args.workload,
            name="tuned",
            out=Path(folder) / "tuned.yaml",
            budget=args.budget,
            max_tokens=args.max_tokens,
            drafters=tuple(map(str, args.draft or drafters_beside(model))),
            own_engine=True,
        )
        found = tune_server(request, notify=notify).document
    print(f"{server_verdict(found)}; {found['seconds']:.0f} s of {args.budget:g} s\n", flush=True)

    document["tune"] = found
    write(args.json, document)

    chosen = candidate_named(request, found["chosen"])
    guessed = {row["name"]: row["predicted"]["speedup"] for row in found["rows"] if row["predicted"] is not None}
    runs = [CandidateRun(one) for one in to_run(request, chosen, guessed, args.best, args.every)]
    questions = first_questions(request)[: args.answers]
    for number, run in enumerate(runs, start=1):
        measure(request, PLAIN, run, questions)
        document.setdefault("live", {})[run.candidate.name] = as_mapping(run)
        write(args.json, document)
        notify(f"{number} of {len(runs)}: {run.candidate.name} {shown(run.speedup)}")
    ranked = sorted((one for one in runs if one.speedup is not None), key=lambda one: -one.median)
    rivals = [one.candidate for one in ranked[: args.finalists] if one.candidate != chosen]
    if chosen != PLAIN:
        rivals.append(replace(PLAIN, family="beside the choice"))  # PLAIN itself is the base of a measurement
    second = second_run(replace(request, prompts=load_workload(args.workload)), chosen, rivals, args.rounds)
    document["over the choice"] = {one.candidate.name: as_mapping(one) for one in second}
    document["answers over the choice"] = {one.candidate.name: answers_of(one) for one in second}

    print("| candidate | predicted | live | over the choice |\n|---|---|---|---|")
    over = {one.candidate.name: one.speedup for one in second}
    errors = []
    for run in ranked:
        name, guess = run.candidate.name, guessed.get(run.candidate.name)
        if guess is not None:
            errors.append(abs(guess / run.median - 1))
        mark = ", chosen" if name == chosen.name else ""
        prediction = "-" if guess is None else f"{guess:.2f}"
        print(f"| {name}{mark} | {prediction} | {shown(run.speedup)} | {shown(over.get(name))} |")
    print(f"| {PLAIN.name} | - | - | {shown(over.get(PLAIN.name))} |")
    engine = next((row for row in found["rows"] if row["name"] == "specplug"), None)
    if engine is not None and engine.get("speedup"):
        print(f"| specplug's own engine, in the tune | - | {shown(Interval(**engine['speedup']))} | - |")
    within = sum(error <= 0.07 for error in errors)
    print(f"\npredictions within 7% of live: {within} of {len(errors)}; median error {median(errors):.3f}")
    best = max(second, key=lambda one: one.median)
    print(
        f"the choice is {chosen.name}; of the others {best.candidate.name} is the fastest: {shown(best.speedup)} of it"
    )
    print(f"regret {max(0.0, best.median - 1):.3f}")
    document["errors"] = errors
    document["regret"] = max(0.0, best.median - 1)
    write(args.json, document)


def first_questions(request: ServerRequest) -> list[AskedQuestion]:
    """The first turn of each prompt, categories in turns."""
    turns = [turn for turn in turns_of(request.prompts) if len(turn.texts) == 1]
    return [turn.question([], request.max_tokens) for turn in turns]


def candidate_named(request: ServerRequest, name: str) -> Candidate:
    """A candidate, or a chain of two, by its name; plain decoding where it was chosen."""
    tried, _ = candidates_of(request)
    if name == PLAIN.name:
        return PLAIN
    chains = [chained(a, b) for a in tried for b in tried if a.family != b.family and f"{a.name} + {b.name}" == name]
    return next(one for one in [*tried, *chains] if one is not None and one.name == name)


def to_run(
    request: ServerRequest, chosen: Candidate, guessed: Mapping[str, float], count: int, every: int
) -> list[Candidate]:
    """The choice, `count` of the best by prediction, the first candidate of each family, and every N-th of all."""
    tried, _ = candidates_of(request)
    first = {one.family: one for one in reversed(tried)}
    best = sorted((one for one in tried if one.name in guessed), key=lambda one: -guessed[one.name])[:count]
    kept = [one for number, one in enumerate(tried) if number % every == 0 or first[one.family] is one or one in best]
    return kept if chosen == PLAIN or chosen in kept else [chosen, *kept]


class FixedFlagsServer(LaunchedServer):
    """A server that has the same flags at every start, whatever is asked for."""

    def __init__(self, command: ServerCommand, flags: Sequence[str]) -> None:
        super().__init__(command)
        self._flags = flags

    def start(self, flags: Sequence[str] = ()) -> None:
        super().start(self._flags)


def second_run(request: ServerRequest, chosen: Candidate, rivals: Sequence[Candidate], most: int) -> list[CandidateRun]:
    """Each rival beside the choice, over all prompts: its speedup is that over the choice."""
    runs = [CandidateRun(one) for one in rivals]
    for number in range(1, most + 1):
        for run in runs:
            if run.speedup is None or run.speedup.high - run.speedup.low > WIDTH:
                measure(request, chosen, run, first_questions(request))
                notify(f"round {number}: {run.candidate.name} {shown(run.speedup)} of {chosen.name}")
    return runs


def measure(request: ServerRequest, base: Candidate, run: CandidateRun, questions: Sequence[AskedQuestion]) -> None:
    """Ask two new servers each question in turns: one with the flags of the candidate, the other with those of base."""

    def opened(candidate: Candidate) -> Subject:
        return FixedFlagsServer(request.command, base.flags) if candidate == PLAIN else LaunchedServer(request.command)

    servers = LiveServers(opened, together=True)
    groups = [[one] for one in questions]
    try:
        SuccessiveElimination(servers, groups, left=lambda: 1e9, start_s=0.0, group_s=0.0).measure(run, groups)
    finally:
        servers.close()
    if run.failure is not None:
        notify(f"{run.candidate.name} failed: {run.failure}")


def answers_of(run: CandidateRun) -> dict[str, list[list[float]]]:
    """By kind of work: tokens and seconds of each answer, and those of the base."""
    return {kind: [line[:4] for line in answers.values()] for kind, answers in run.pairs.answers.items()}


def as_mapping(run: CandidateRun) -> dict[str, float] | None:
    return None if run.speedup is None else run.speedup.as_mapping()


def shown(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.median:.3f} ({interval.low:.3f} to {interval.high:.3f})"


def notify(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
