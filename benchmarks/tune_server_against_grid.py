"""Measures the regret of `specplug tune --server` against the best of its candidates, and the error of its predictions.

    python benchmarks/tune_server_against_grid.py "llama-server -m MODEL.gguf -t 2" [--draft FILE] [--budget 300]
        [--every 7] [--answers 7] [--max-tokens 64] [--rounds 6] [--json FILE]

First the tune, as the command runs it. Then its choice, the best ones by prediction, each lookup type at the server's
own sizes, and every N-th of all candidates run live beside plain decoding, question by question in turns, one process
for each. The fastest of these and the choice run again, in rounds with new processes, until the 95% interval of the
choice's regret is no wider than 6 points. The regret is from this second run alone, because the best of many noisy
figures is an overestimate. Prints the tune's verdict, a table of all that ran, the errors of the predictions, and the
regret. The machine must be idle.
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

from specplug.bench.statistics import Interval, paired_ratio
from specplug.bench.workloads import limit, load_workload
from specplug.errors import SpecplugError, UsageError
from specplug.models.references import drafters_beside
from specplug.subjects.launched import LaunchedServer
from specplug.subjects.opening import open_subject
from specplug.tune.server_flags.live_servers import LiveServers
from specplug.tune.server_flags.llama_candidates import chained
from specplug.tune.server_flags.offered_candidates import candidates_of
from specplug.tune.server_flags.recorded_questions import AskedQuestion, turns_of
from specplug.tune.server_flags.server_candidates import PLAIN, Candidate
from specplug.tune.server_flags.server_document import server_verdict
from specplug.tune.server_flags.server_request import ServerRequest
from specplug.tune.server_flags.server_session import tune_server
from specplug.tune.server_flags.successive_elimination import CandidateRun, SuccessiveElimination

BEST = 6
"""Candidates that run because their predictions are the best."""

FINAL = 3
"""The fastest candidates of the first run, which run again."""

WIDTH = 0.06
"""The widest interval of the regret that ends the second run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", help="the command of a llama-server, model included, without a port")
    parser.add_argument("--draft", type=Path, action="append", default=[], help="a model that drafts")
    parser.add_argument("--workload", default="builtin")
    parser.add_argument("--limit", type=positive_int, default=2, help="prompts of a category, for the tune")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds for the tune")
    parser.add_argument("--every", type=positive_int, default=7, help="of the candidates")
    parser.add_argument("--answers", type=positive_int, default=7, help="answers of each candidate")
    parser.add_argument("--max-tokens", type=positive_int, default=64)
    parser.add_argument("--rounds", type=positive_int, default=6, help="rounds of the second run, at most")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.set_defaults(run=run)
    run_benchmark("tune_server_against_grid.py", parser.parse_args())


def run(args: argparse.Namespace, document: dict[str, Any]) -> None:
    server = open_subject(args.server)
    if not isinstance(server, LaunchedServer) or server.command.model is None:
        raise UsageError('give a command with its model, such as "llama-server -m some.gguf"')
    model = Path(server.command.model)
    prompts = limit(load_workload(args.workload), args.limit)
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

    questions = first_questions(request, args.answers)
    chosen = candidate_named(request, found["chosen"])
    guessed = {row["name"]: row["predicted"]["speedup"] for row in found["rows"] if row["predicted"] is not None}
    runs = [CandidateRun(one) for one in to_run(request, chosen, guessed, args.every)]
    servers = LiveServers(lambda one: LaunchedServer(request.command, name=one.name), together=True)
    elimination = SuccessiveElimination(
        servers, [[one] for one in questions], left=lambda: 1e9, start_s=0.0, group_s=0.0
    )
    try:
        for number, run in enumerate(runs, start=1):
            elimination.measure(run, [[one] for one in questions])
            notify(f"{number} of {len(runs)}: {run.candidate.name} {shown(run.speedup)}")
        ranked = sorted((one for one in runs if one.speedup is not None), key=lambda one: -speed(one))
        best, regret, rounds = second_run(
            elimination, questions, [one.candidate for one in ranked], chosen, args.rounds
        )
    finally:
        servers.close()

    print("| candidate | predicted | live |\n|---|---|---|")
    errors = []
    for run in ranked:
        guess = guessed.get(run.candidate.name)
        if guess is not None:
            errors.append(abs(guess / speed(run) - 1))
        mark = ", chosen" if run.candidate.name == chosen.name else ""
        print(f"| {run.candidate.name}{mark} | {'-' if guess is None else f'{guess:.2f}'} | {shown(run.speedup)} |")
    engine = next((row for row in found["rows"] if row["name"] == "specplug"), None)
    if engine is not None and engine.get("speedup"):
        print(f"| specplug's own engine, in the tune | - | {shown(Interval(**engine['speedup']))} |")
    within = sum(error <= 0.07 for error in errors)
    print(f"\npredictions within 7% of live: {within} of {len(errors)}; median error {median(errors):.3f}")
    print(f"the choice is {chosen.name}, the best {best}; regret {shown(regret)} after {rounds} rounds")
    document |= {
        "tune": found,
        "live": {one.candidate.name: None if one.speedup is None else one.speedup.as_mapping() for one in runs},
        "errors": errors,
        "best": best,
        "regret": regret.as_mapping(),
        "rounds": rounds,
    }
    write(args.json, document)


def first_questions(request: ServerRequest, count: int) -> list[AskedQuestion]:
    """The first turn of each prompt, categories in turns."""
    turns = [turn for turn in turns_of(request.prompts) if len(turn.texts) == 1]
    return [turn.question([], request.max_tokens) for turn in turns[:count]]


def candidate_named(request: ServerRequest, name: str) -> Candidate:
    """A candidate, or a chain of two, by its name; plain decoding where it was chosen."""
    tried, _ = candidates_of(request)
    if name == PLAIN.name:
        return PLAIN
    chains = [chained(a, b) for a in tried for b in tried if a.family != b.family and f"{a.name} + {b.name}" == name]
    return next(one for one in [*tried, *chains] if one is not None and one.name == name)


def to_run(request: ServerRequest, chosen: Candidate, guessed: Mapping[str, float], every: int) -> list[Candidate]:
    """The choice, the best by prediction, the first candidate of each family, and every N-th of all."""
    tried, _ = candidates_of(request)
    first = {one.family: one for one in reversed(tried)}
    best = sorted((one for one in tried if one.name in guessed), key=lambda one: -guessed[one.name])[:BEST]
    kept = [one for number, one in enumerate(tried) if number % every == 0 or first[one.family] is one or one in best]
    return kept if chosen == PLAIN or chosen in kept else [chosen, *kept]


def second_run(
    elimination: SuccessiveElimination,
    questions: Sequence[AskedQuestion],
    ranked: Sequence[Candidate],
    chosen: Candidate,
    most: int,
) -> tuple[str, Interval, int]:
    """The fastest candidate when the best ones and the choice run again, the choice's regret, and the rounds taken."""
    finalists = list(ranked[:FINAL])
    if chosen not in finalists and chosen != PLAIN:
        finalists.append(chosen)
    again = [CandidateRun(one) for one in finalists]
    for number in range(1, most + 1):
        for run in again:
            elimination.measure(run, [[one] for one in questions])
            if run.failure is not None:
                raise SpecplugError(f"{run.candidate.name} failed: {run.failure}")
        best = max(again, key=speed)
        if speed(best) < 1.0 and chosen == PLAIN:
            return PLAIN.name, Interval(0.0, 0.0, 0.0), number
        regret = regret_of(best, next((one for one in again if one.candidate == chosen), None), len(questions))
        notify(f"round {number}: {best.candidate.name} is the best, regret {shown(regret)}")
        if regret.high - regret.low <= WIDTH:
            break
    return best.candidate.name, regret, number


def regret_of(best: CandidateRun, chosen: CandidateRun | None, questions: int) -> Interval:
    """How much faster the best is than the choice, which is plain decoding where `chosen` is None; repeats added up."""
    if chosen is best:
        return Interval(0.0, 0.0, 0.0)
    other = best.plain if chosen is None else chosen.own
    sums = [
        [sum(answer.values[part] for answer in answers[at::questions]) for at in range(questions)]
        for answers in (best.own, other)
        for part in (0, 1)
    ]
    own_tokens, own_seconds, other_tokens, other_seconds = sums
    ratio = paired_ratio(own_tokens, own_seconds, other_tokens, other_seconds)
    return replace(ratio, median=ratio.median - 1, low=ratio.low - 1, high=ratio.high - 1)


def speed(run: CandidateRun) -> float:
    return run.speedup.median if run.speedup is not None else 0.0


def shown(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.median:.3f} ({interval.low:.3f} to {interval.high:.3f})"


def notify(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
