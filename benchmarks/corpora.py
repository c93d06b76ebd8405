"""What drafting from a corpus gains on code, and what it costs.

    python benchmarks/corpora.py code MODEL.gguf TREE [--held-out click,networkx] [--live]
    python benchmarks/corpora.py chains MODEL.gguf TREE [--held-out click,networkx]
    python benchmarks/corpora.py cost [--tokens 10000000] [--vocabulary 151936]

`code` builds a corpus of the Python files below TREE, such as a folder of installed packages, without the held-out
packages and without copies of packages inside others. The model continues beginnings of functions greedily: of packages
in the corpus, and of those held out. Prints the tokens per pass of each combination of methods in a replay with a fixed
number of draft tokens; with --live also the speed against the same profile without the corpus, answer by answer.

`chains` follows the text of files, in the corpus and held out, and compares two ways to choose a chain among what
follows the matches: the token that most have next, again and again, which `datastore` takes; and the likeliest path of
its tree.

`cost` writes a synthetic corpus of phrases and follows texts of it in which one token in twelve is another. Prints
microseconds of thread CPU time per token, and how fast suffixes are sorted; and the time of lookups after the corpus
was dropped from the system's memory.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import resource
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from specplug.bench.statistics import paired_ratio
from specplug.build import corpus as building
from specplug.core import EMPTY, IntArray, Step
from specplug.corpora.folder import ENDINGS, Manifest, place, read_manifest
from specplug.corpora.shard import Shard
from specplug.corpora.suffix_order import suffix_order
from specplug.corpora.writing import Document, writing
from specplug.drafts.chains import NODES_PER_TOKEN, ChainSteps, likeliest_chain, num_agreeing
from specplug.profile import CostPoints, PlannerSettings, Profile, Runtime
from specplug.proposers.datastore import Datastore
from specplug.registry import ProposerSpec
from specplug.tune.candidates import Setting
from specplug.tune.expense import Expense
from specplug.tune.prediction import Costs
from specplug.tune.replay import replay
from specplug.tune.trace import Answer, Trace

COPIES = ("*/_vendor/*", "*/vendor/*", "*/vendored/*", "*/third_party/*", "*/site-packages/pip/*")
SEQUENCES = 64
"""At once, where many draft chains."""

LINES_BEFORE, LINES_OF_FUNCTION, FEWEST_LINES = 20, 3, 12
"""Lines of a prompt before the function and of its beginning, and lines of the shortest function."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    code = commands.add_parser("code")
    chains = commands.add_parser("chains")
    for command in (code, chains):
        command.add_argument("model", type=Path)
        command.add_argument("tree", type=Path)
        command.add_argument("--held-out", default="click,jinja2,networkx,sympy")
        command.add_argument("--corpus-tokens", type=int, default=15_000_000)
    chains.add_argument("--files", type=int, default=60, help="of each kind")
    code.add_argument("--included", default="", help="take functions of these packages alone")
    code.add_argument("--functions", type=int, default=40, help="of each kind")
    code.add_argument("--tokens", type=int, default=96, help="of an answer")
    code.add_argument("--nodes", type=int, nargs="+", default=[4, 8, 16])
    code.add_argument("--learned", action="store_true", help="print how often draft tokens of a kind were accepted")
    code.add_argument("--live", action="store_true")
    cost = commands.add_parser("cost")
    cost.add_argument("--tokens", type=int, default=10_000_000)
    cost.add_argument("--vocabulary", type=int, default=151_936)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        os.environ["XDG_DATA_HOME"] = folder
        {"code": on_code, "chains": on_chains, "cost": cost_of}[arguments.command](arguments)


# -- code ------------------------------------------------------------------------------------------------------------


def on_code(arguments: argparse.Namespace) -> None:
    from specplug.tune.llama_cpp import LlamaCppSubject

    kinds = build_corpus(arguments)
    if arguments.included:
        packages = arguments.included.split(",")
        kinds["included"] = [path for path in kinds["included"] if _package(path, arguments.tree) in packages]
    base = Profile("base", proposers=(ProposerSpec("none"),), runtime=Runtime(context=2048))
    subject = LlamaCppSubject(arguments.model, base)
    texts: list[tuple[str, str]] = []
    for kind, paths in kinds.items():
        texts += [(kind, text) for text in beginnings(paths, arguments.functions)]
    model = subject._model
    prompts = [model.tokenize(text)[-1024:] for _, text in texts]
    answers: dict[int, Answer] = {}

    def done(index: int, tokens: IntArray, topk: IntArray) -> None:
        answers[index] = Answer(str(index), 0, texts[index][0], prompts[index], tokens, topk)

    subject.record(prompts, arguments.tokens, 8, 1, done)
    trace = Trace({"max_tokens": arguments.tokens}, tuple(answers[index] for index in range(len(prompts))))
    corpus = ProposerSpec("datastore", {"corpora": ["code"]})
    suffix, recycling = ProposerSpec("suffix"), ProposerSpec("token_recycling")
    print("| methods | draft tokens | included | held out |\n|---|---|---|---|")
    free = Costs(CostPoints((0,), (1, 256), ((1.0, 1.0),)), Expense())
    for specs in ((suffix,), (corpus,), (suffix, corpus), (suffix, recycling), (suffix, recycling, corpus)):
        for nodes in arguments.nodes:
            setting = Setting(specs, PlannerSettings(mode="static", max_nodes=nodes))
            sums = replay(setting, trace, free).by_category()
            cells = [f"{sums[kind].mean_acceptance_length:.3f}" for kind in kinds]
            print(f"| {setting.method} | {nodes} | {' | '.join(cells)} |", flush=True)
    if arguments.learned:
        print("\n| bucket | draft tokens | accepted | prior |\n|---|---|---|---|")
        setting = Setting((suffix, corpus), PlannerSettings(mode="static", max_nodes=16))
        learned = replay(setting, trace, free).learned
        for bucket in Datastore.buckets:
            hits, misses = learned.get(f"{Datastore.__name__} {bucket.name}", (0.0, 0.0))
            if hits + misses > 20:
                print(f"| {bucket.name} | {hits + misses:.0f} | {hits / (hits + misses):.2f} | {bucket.prior} |")
    if arguments.live:
        live(subject, trace, (suffix, recycling), corpus, list(kinds))
    subject.close()


def on_chains(arguments: argparse.Namespace) -> None:
    tokenize, _ = building._open_tokenizer(arguments.model)
    kinds = build_corpus(arguments)
    texts = {kind: [text[:600] for text in tokenize(_some(paths, arguments.files))] for kind, paths in kinds.items()}
    datastore = Datastore(corpora=["code"])
    priors = [bucket.prior for bucket in datastore.buckets]
    print("| files | K | places | other chains | accepted: most frequent, likeliest | drafted: the same |")
    print("|---|---|---|---|---|---|")
    for kind, k in product(kinds, (4, 8)):
        counts = np.zeros(6, dtype=np.int64)
        line = "| {} | {} | {} | {} | {}, {} | {}, {} |"
        for text in texts[kind]:
            datastore.begin(0, text[:40])
            for at in range(40, len(text) - k):
                frequent = [token for token in datastore.propose_chains([0], k).tokens[0].tolist() if token >= 0]
                tree = datastore.propose(0, NODES_PER_TOKEN * k)
                likeliest = likeliest_chain(tree, priors).tokens[:k].tolist()
                following = text[at:].tolist()
                accepted = [num_agreeing(chain, following) for chain in (frequent, likeliest)]
                counts += (1, frequent != likeliest, *accepted, len(frequent), len(likeliest))
                datastore.observe(0, Step(following[:1], EMPTY, []))
            datastore.end(0)
        print(line.format(kind, k, *counts.tolist()), flush=True)


def build_corpus(arguments: argparse.Namespace) -> dict[str, list[Path]]:
    """Build the corpus `code`; the files that are in it, and those that are held out."""
    held_out = arguments.held_out.split(",")
    excluded = (*COPIES, *(f"{name}/*" for name in held_out))
    request = building.Request(
        arguments.model, arguments.model.name, (str(arguments.tree),), place("code"), "code",
        include=("*.py",), exclude=excluded, max_tokens=arguments.corpus_tokens,
    )  # fmt: skip
    began = time.perf_counter()
    document = building.build(request)
    print(
        f"corpus: {document['tokens']} tokens of {document['documents']} files in {time.perf_counter() - began:.0f} s\n"
    )
    return {
        "included": sorted({Path(name) for name in _names(place("code"))}),
        "held out": [path for name in held_out for path in sorted((arguments.tree / name).rglob("*.py"))],
    }


def _some(paths: Sequence[Path], count: int) -> list[str]:
    """The texts of some files of 2 to 60 KB."""
    paths = [path for path in paths if 2000 < path.stat().st_size < 60_000]
    return [path.read_text(errors="replace") for path in random.Random(0).sample(paths, min(count, len(paths)))]


def _names(folder: Path) -> Iterator[str]:
    from specplug.corpora.writing import listed_documents

    for entry in read_manifest(folder).shards:
        yield from (name for name, *_ in listed_documents(folder, entry))


def _package(path: Path, tree: Path) -> str:
    return path.relative_to(tree).parts[0]


def beginnings(paths: Sequence[Path], count: int) -> list[str]:
    """Some lines before a function, and its first lines, of functions chosen at random, one per file."""
    chooser = random.Random(7)
    found = []
    for path in chooser.sample(list(paths), len(paths)):
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (OSError, ValueError, SyntaxError, RecursionError):
            continue
        functions = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= FEWEST_LINES
        ]
        if functions:
            first = chooser.choice(functions).lineno - 1
            lines = text.split("\n")[max(0, first - LINES_BEFORE) : first + LINES_OF_FUNCTION]
            found.append("\n".join(lines) + "\n")
        if len(found) == count:
            break
    return found


def live(
    subject: Any, trace: Trace, others: Sequence[ProposerSpec], corpus: ProposerSpec, kinds: Sequence[str]
) -> None:
    """Speed with the corpus against the same methods without it, and against plain decoding, answer by answer."""
    curve = next(iter(subject.measure_costs([1], 40.0, lambda share: None))).points
    costs = Costs(curve, Expense())
    profiles = {
        "plain": replace(subject.profile, name="plain"),
        "without": replace(subject.profile, name="without", proposers=tuple(others)),
        "with": replace(subject.profile, name="with", proposers=(*others, corpus)),
    }
    arms = {name: subject.arm(profile, slots=1, costs=costs) for name, profile in profiles.items()}
    tokens = trace.about["max_tokens"]
    rates: dict[str, dict[str, list[tuple[int, float]]]] = {name: {kind: [] for kind in kinds} for name in arms}
    different = 0
    for number, answer in enumerate(trace.answers):
        order = list(arms)
        order = order[number % 3 :] + order[: number % 3]
        texts = {}
        for name in order:
            (result,) = arms[name].answer([answer.prompt], tokens)
            texts[name] = result.tokens
            rates[name][answer.category].append((len(result.tokens) - 1, result.seconds))
        different += len({tuple(text) for text in texts.values()}) > 1
    print(f"\nlive, {different} answers differ\n\n| kind | against without | against plain |\n|---|---|---|")
    for kind in kinds:
        cells = []
        for base in ("without", "plain"):
            columns = [[line[i] for line in rates[name][kind]] for name in ("with", base) for i in (0, 1)]
            ratio = paired_ratio(*columns)
            cells.append(f"{ratio.median:.3f} ({ratio.low:.3f}-{ratio.high:.3f})")
        print(f"| {kind} | {' | '.join(cells)} |")
    for arm in arms.values():
        arm.close()


# -- cost ------------------------------------------------------------------------------------------------------------


def cost_of(arguments: argparse.Namespace) -> None:
    tokens = phrases(arguments.tokens, arguments.vocabulary)
    for library in (True, False) if len(tokens) <= 20_000_000 else (True,):
        began = time.perf_counter()
        suffix_order(tokens, library=library)
        rate = len(tokens) / (time.perf_counter() - began) / 1e6
        tracemalloc.start()  # counts slow the sort down, so a part of the tokens is sorted again
        part = tokens[:2_000_000]
        suffix_order(part, library=library)
        memory = tracemalloc.get_traced_memory()[1] / len(part)
        tracemalloc.stop()
        name = "pydivsufsort" if library else "NumPy"
        print(f"sorting with {name}: {rate:.1f} M tokens/s, {memory:.0f} bytes of memory per token", flush=True)
    folder = place("cost")
    documents = np.split(tokens, np.arange(800, len(tokens), 800))
    manifest = write_documents(folder, documents, arguments.vocabulary)
    size = sum((folder / f"{entry.stem}.{ending}").stat().st_size for entry in manifest.shards for ending in ENDINGS)
    print(f"{manifest.size} tokens; shards: {len(manifest.shards)}; {size / manifest.size:.1f} bytes per token")
    before = _anonymous()
    proposer = Datastore(corpora=["cost"])
    for corpus in proposer.shared_corpora:
        for shard in corpus.shards:  # read everything once: what is measured is warm
            int(shard.tokens.astype(np.int64).sum() + shard.order.astype(np.int64).sum())
    print(f"memory beside the maps: {max(0, _anonymous() - before) / 1e6:.1f} MB")
    searching: list[float] = []
    drafting: list[float] = []
    many: list[float] = []
    for seq, text in enumerate(changed_texts(documents, arguments.vocabulary, 100)):
        proposer.begin(seq, text[:40])
        for token in text[40:].tolist():
            proposer.observe(seq, Step([token], None, []))  # type: ignore[arg-type]
            began = time.thread_time_ns()
            _, found = proposer._matches(seq)
            searching.append((time.thread_time_ns() - began) / 1000)
            began = time.thread_time_ns()
            proposer.propose(seq, 24)
            drafting.append((time.thread_time_ns() - began) / 1000 + searching[-1])
            if sum(high - low for _, (low, high) in found) >= 64:
                many.append(drafting[-1])
        proposer.end(seq)
    print("| microseconds | median | 99 of 100 below |\n|---|---|---|")
    for name, values in (
        ("search", searching), ("search and draft", drafting), ("the same, 64 occurrences or more", many),
    ):  # fmt: skip
        print(f"| {name} | {np.median(values):.0f} | {np.percentile(values, 99):.0f} |")
    texts = list(changed_texts(documents, arguments.vocabulary, SEQUENCES))
    values = steps_of_many(proposer, texts)
    share = min(1.0, proposer.lookups / SEQUENCES)
    name = f"a step of {SEQUENCES} sequences that draft chains, of which {share:.1%} look up"
    print(f"| {name} | {np.median(values):.0f} | {np.percentile(values, 99):.0f} |")
    del proposer, corpus, shard
    print("\n| pages not in memory, elapsed microseconds | median | 99 of 100 below | longest |\n|---|---|---|---|")
    for name, loaded in (("not loaded", False), ("while they are loaded", True)):
        values = cold_lookups(folder, manifest, texts, loaded=loaded)
        print(f"| {name} | {np.median(values):.0f} | {np.percentile(values, 99):.0f} | {max(values):.0f} |")


def changed_texts(documents: Sequence[IntArray], vocabulary: int, count: int) -> Iterator[IntArray]:
    """Beginnings of documents in which one token in twelve is another."""
    chooser = np.random.default_rng(1)
    for _ in range(count):
        text = documents[int(chooser.integers(len(documents) - 1))][:160].copy()
        wrong = chooser.random(len(text)) < 1 / 12
        text[wrong] = chooser.integers(0, vocabulary, int(wrong.sum()))
        yield text


def steps_of_many(proposer: Datastore, texts: Sequence[IntArray]) -> list[float]:
    """Microseconds of thread CPU time per step in which all texts draft chains."""
    seqs = range(len(texts))
    for seq, text in enumerate(texts):
        proposer.begin(seq, text[:40])
    spent = []
    for at in range(40, 160):
        began = time.thread_time_ns()
        proposer.propose_chains(seqs, 4)
        emitted = [[int(text[at])] for text in texts]
        after = np.array([tokens[0] for tokens in emitted], dtype=np.int32)
        proposer.observe_chains(ChainSteps(seqs, emitted, after, after, after[:0], None))
        spent.append((time.thread_time_ns() - began) / 1000)
    for seq in seqs:
        proposer.end(seq)
    return spent


def cold_lookups(folder: Path, manifest: Manifest, texts: Sequence[IntArray], *, loaded: bool) -> list[float]:
    """Elapsed microseconds per lookup and draft after the corpus's pages were dropped from memory."""
    for entry in manifest.shards:
        for name in entry.file_names():
            with open(folder / name, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    loads = Shard.load
    if not loaded:
        Shard.load = lambda self: self.loaded.set()  # type: ignore[method-assign]
    try:
        proposer = Datastore(corpora=["cost"])
    finally:
        Shard.load = loads  # type: ignore[method-assign]
    spent = []
    for seq, text in enumerate(texts):
        proposer.begin(seq, text[:40])
        for token in text[40:60].tolist():
            proposer.observe(seq, Step([token], None, []))  # type: ignore[arg-type]
            began = time.perf_counter_ns()
            proposer.propose(seq, 24)
            spent.append((time.perf_counter_ns() - began) / 1000)
    return spent


def write_documents(folder: Path, documents: Sequence[IntArray], vocabulary: int) -> Manifest:
    """A corpus without a tokenizer."""
    with writing(folder, Manifest("0" * 64, vocabulary, "", (), "", {}), shard_tokens=64 << 20) as writer:
        for number, document in enumerate(documents):
            writer.add(Document.complete(str(number), "", document))
        return writer.publish([])


def phrases(count: int, vocabulary: int) -> IntArray:
    """Text made of phrases of 2 to 23 words, some far more frequent than others."""
    chooser = np.random.default_rng(0)
    words = (chooser.zipf(1.2, size=200_000) % vocabulary).astype(np.int32)
    number = count // 6
    starts, lengths = chooser.integers(0, len(words) - 40, number), chooser.integers(2, 24, number)
    ranks = chooser.zipf(1.15, size=number) % number
    text = np.empty(count, dtype=np.int32)
    at = used = 0
    while at < count:
        start, length = starts[ranks[used]], min(int(lengths[used]), count - at)
        text[at : at + length] = words[start : start + length]
        at, used = at + length, used + 1
    return text


def _anonymous() -> int:
    """Bytes of the process's memory that no file holds; the peak of all memory where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().split("\n")
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
    except (OSError, StopIteration):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
