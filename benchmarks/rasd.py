"""What a draft model gains from lookups beside it, and what judging looked-up tokens by it saves.

    python benchmarks/rasd.py MODEL.gguf TREE spec_bench.jsonl --draft SMALL.gguf [--method vocab_trim]
        [--kind summarization] [--functions 4] [--limit 2] [--tokens 128] [--keep FOLDER]

The model continues beginnings of Python functions, half of them of files in a corpus of the files below TREE, and
answers the first prompts of each kind of the workload. What the draft model drafts is recorded, too. Then settings are
replayed over the answers, so that a clock plays no part:

- how often first tokens of lookups are right, by how likely the draft model finds them, at every place of the answers;
- passes of a fixed number of draft tokens, the likeliest by what was learned: accepted draft tokens per pass;
- passes in which a row costs a fixed share of a plain pass and the planner chooses the draft tokens: accepted draft
  tokens, and verified ones that were rejected, per pass.

"not judged" merges drafts without asking the draft model about first tokens; "judged" is the default; "top k" drops
drafts by the rule of RASD (arXiv 2503.03434), `prune_top_k`. --keep keeps what was recorded, and uses it the next time.
"""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from corpora import beginnings, build_corpus
from model_drafters import chosen_prompts, drafter, tell
from reporting import positive_int, run_benchmark, write

from specplug import registry
from specplug.core import EMPTY, ROOT, IntArray, Step
from specplug.models.references import resolve
from specplug.planning.constants import JUDGED_TOP
from specplug.planning.fused_buckets import BANDS
from specplug.planning.judgement import band_of
from specplug.profile import CostPoints, PlannerSettings, Profile, Runtime
from specplug.registry import ProposerSpec
from specplug.tune.candidates import Setting
from specplug.tune.drafter_trace import DrafterTrace, drafter_key
from specplug.tune.expense import Expense
from specplug.tune.llama_cpp import LlamaCppSubject
from specplug.tune.prediction import Costs, Prediction, Sums
from specplug.tune.replay import replay
from specplug.tune.trace import Answer, Trace

HELD_OUT = "click,jinja2,networkx,sympy"

SUFFIX, CORPUS = ProposerSpec("suffix"), ProposerSpec("datastore", {"corpora": ["code"]})

MOST_PROMPT_TOKENS = 1536


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("tree", type=Path)
    parser.add_argument("workload")
    parser.add_argument("--draft", required=True)
    parser.add_argument("--method", default="draft_model")
    parser.add_argument("--kind", action="append", help="of the workload, only this kind")
    parser.add_argument("--functions", type=positive_int, default=4, help="of each kind")
    parser.add_argument("--limit", type=positive_int, default=2, help="prompts of each kind of the workload")
    parser.add_argument("--tokens", type=positive_int, default=128, help="of an answer")
    parser.add_argument("--corpus-tokens", type=positive_int, default=8_000_000)
    parser.add_argument("--nodes", type=positive_int, nargs="+", default=[8, 16])
    parser.add_argument("--row-cost", type=float, nargs="+", default=[0.02, 0.05, 0.1], help="share of a plain pass")
    parser.add_argument("--top", type=positive_int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--threads", type=positive_int)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--json", type=Path)
    parser.set_defaults(run=compare)
    run_benchmark("rasd.py", parser.parse_args())


def compare(args: argparse.Namespace, document: dict[str, Any]) -> None:
    spec = drafter(args.method, args.draft, None)
    with TemporaryDirectory() as folder:
        kept = args.keep or Path(folder)
        os.environ["XDG_DATA_HOME"] = str(kept)
        trace: Trace = once(kept / "answers.pickle", lambda: recorded_answers(args, spec))
        drafted: DrafterTrace = once(kept / "drafts.pickle", lambda: recorded_drafts(args, spec, trace))
        kinds = trace.categories()
        print(f"{Path(args.model).name}, {args.method} {Path(args.draft).name};")
        print(f"{len(trace.answers)} answers of up to {args.tokens} tokens\n")
        rows = (
            by_band(trace, drafted)
            + at_fixed_budgets(args, spec, trace, drafted, kinds)
            + with_row_costs(args, spec, trace, drafted)
        )
    write(args.json, document | {"rows": rows})


def once(path: Path, record: Callable[[], Any]) -> Any:
    """What is in a file, which is recorded where there is none."""
    if not path.exists():
        path.write_bytes(pickle.dumps(record()))
    return pickle.loads(path.read_bytes())


def opened(args: argparse.Namespace, spec: ProposerSpec) -> LlamaCppSubject:
    runtime = Runtime(context=2048, threads=args.threads)
    plain = Profile("plain", proposers=(ProposerSpec("none"),), runtime=runtime)
    return LlamaCppSubject(resolve(args.model), plain, drafters=[spec], notify=tell)


def recorded_answers(args: argparse.Namespace, spec: ProposerSpec) -> Trace:
    path = resolve(args.model)
    kinds = build_corpus(argparse.Namespace(**vars(args) | {"model": path, "held_out": HELD_OUT}))
    subject = opened(args, spec)
    prompts: list[tuple[str, IntArray]] = []
    for kind, files in kinds.items():
        texts = beginnings(files, args.functions)
        prompts += [(f"code, {kind}", subject._model.tokenize(text)[-MOST_PROMPT_TOKENS:]) for text in texts]
    for kind, prompt in chosen_prompts(args.workload, args.limit, args.kind):
        encoded = subject.encode([{"role": "user", "content": prompt.turns[0]}])
        prompts.append((kind, encoded[-MOST_PROMPT_TOKENS:]))
    answers: dict[int, Answer] = {}

    def done(index: int, tokens: IntArray, topk: IntArray) -> None:
        kind, prompt = prompts[index]
        answers[index] = Answer(str(index), 0, kind, prompt, tokens, topk)
        tell(f"answer {len(answers)} of {len(prompts)}")

    subject.record([prompt for _, prompt in prompts], args.tokens, 8, 1, done)
    subject.close()
    return Trace({"max_tokens": args.tokens}, tuple(answers[index] for index in range(len(prompts))))


def recorded_drafts(args: argparse.Namespace, spec: ProposerSpec, trace: Trace) -> DrafterTrace:
    """What the draft model would draft at every place of the answers."""
    subject = opened(args, spec)
    drafted = subject.trace_drafter(spec, trace.answers, 1, float("inf"), lambda share: None)
    subject.close()
    return drafted


def by_band(trace: Trace, drafted: DrafterTrace) -> list[str]:
    """First tokens of lookups, without those that the draft model has drafted, and how many are right."""
    print(f"| first tokens of | {' | '.join(BANDS)} | not in its head |")
    print("|---" * (len(BANDS) + 2) + "|")
    head = None if drafted.ids is None else frozenset(drafted.ids.tolist())
    rows = []
    for lookup, source in zip((SUFFIX, CORPUS), registry.build_sources((SUFFIX, CORPUS)), strict=True):
        counts = [[0, 0] for _ in (*BANDS, "not in its head")]
        for seq, answer in enumerate(trace.answers):
            guesses, tokens = drafted.guesses[answer.prompt_id, answer.turn], answer.tokens.tolist()
            source.begin(seq, np.append(answer.prompt, answer.tokens[:1]))
            for place, token in enumerate(tokens[1:]):
                draft = source.propose(seq, 16)
                (likeliest,) = guesses.at(place, 1, JUDGED_TOP)
                likely = dict(zip(likeliest.tokens.tolist(), likeliest.probabilities.tolist(), strict=True))
                for first in draft.tokens[draft.parents == ROOT].tolist():
                    if first != guesses.tokens[place]:
                        band = band_of(likely.get(first)) if head is None or first in head else -1
                        counts[band][first != token] += 1
                source.observe(seq, Step([token], EMPTY, []))
            source.end(seq)
        rows.append(f"| {lookup.method} | {' | '.join(f'{right} of {right + wrong}' for right, wrong in counts)} |")
        print(rows[-1], flush=True)
    print()
    return rows


def at_fixed_budgets(
    args: argparse.Namespace, spec: ProposerSpec, trace: Trace, drafted: DrafterTrace, kinds: Sequence[str]
) -> list[str]:
    """Accepted draft tokens per pass where every pass verifies so many of the likeliest."""
    rows = []
    for nodes in args.nodes:
        print(f"| accepted per pass, {nodes} draft tokens | all | {' | '.join(kinds)} |")
        print("|---" * (len(kinds) + 2) + "|")
        for lookups in ((SUFFIX,), (SUFFIX, CORPUS)):
            for name, specs, one, top in settings(spec, lookups, replace(drafted, max_draft=nodes), args.top):
                setting = Setting(specs, PlannerSettings("static", nodes, prune_top_k=top))
                prediction = replayed(setting, trace, one, curve())
                sums = [prediction.total, *(prediction.by_category()[kind] for kind in kinds)]
                rows.append(f"| {name} | {' | '.join(f'{accepted(one):.3f}' for one in sums)} |")
                print(rows[-1], flush=True)
        print()
    return rows


def with_row_costs(args: argparse.Namespace, spec: ProposerSpec, trace: Trace, drafted: DrafterTrace) -> list[str]:
    """Accepted and rejected draft tokens per pass where the planner chooses them by the cost of a row."""
    rows = []
    print("| cost of a row | | accepted per pass | rejected per pass | speed without drafting's time |")
    print("|---|---|---|---|---|")
    for share in args.row_cost:
        for lookups in ((SUFFIX,), (SUFFIX, CORPUS)):
            for name, specs, one, top in settings(spec, lookups, drafted, args.top):
                setting = Setting(specs, PlannerSettings(max_nodes=max(args.nodes), prune_top_k=top))
                total = replayed(setting, trace, one, curve(share)).total
                cells = [f"{share:g}", name, f"{accepted(total):.3f}", f"{rejected(total):.3f}"]
                rows.append(f"| {' | '.join(cells)} | {total.speedup:.3f} |")
                print(rows[-1], flush=True)
    return rows


def settings(
    spec: ProposerSpec, lookups: tuple[ProposerSpec, ...], drafted: DrafterTrace, tops: Sequence[int]
) -> list[tuple[str, tuple[ProposerSpec, ...], DrafterTrace, int | None]]:
    """(name, proposers, what the draft model drafts, `prune_top_k`) of each setting to compare."""
    silent = replace(
        drafted, guesses={key: replace(one, top=None, probabilities=None) for key, one in drafted.guesses.items()}
    )
    name = " + ".join(one.method for one in lookups)
    fused = (*lookups, spec)
    found = [
        (name, lookups, drafted, None),
        (f"{name} + draft model, not judged", fused, silent, None),
        (f"{name} + draft model, judged", fused, drafted, None),
        *((f"{name} + draft model, top {top}", fused, drafted, top) for top in tops),
    ]
    return found if len(lookups) > 1 else [("draft model", (spec,), drafted, None), *found]


def curve(share: float = 0.0) -> CostPoints:
    """The cost of passes in which each row beside the first costs a share of a plain pass."""
    return CostPoints((0,), (1, 64), ((1000.0, 1000.0 * (1 + 63 * share)),))


def replayed(setting: Setting, trace: Trace, drafted: DrafterTrace, points: CostPoints) -> Prediction:
    """The replay of a setting in which drafting takes no time."""
    free = replace(drafted, pass_ms=(1e-6,), read_token_ms=1e-9, retry_ms=1e-6)
    drafters: Mapping[str, DrafterTrace] = {
        drafter_key(spec): free for spec in setting.proposers if spec.method not in ("suffix", "datastore")
    }
    return replay(setting, trace, Costs(points, Expense(), drafters=drafters))


def accepted(sums: Sums) -> float:
    return sums.accepted / sums.steps


def rejected(sums: Sums) -> float:
    return (sums.drafted - sums.accepted) / sums.steps


if __name__ == "__main__":
    main()
