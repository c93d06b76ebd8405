"""Measures the mean acceptance length of token recycling: specplug's against the rules of its authors' program.

    python benchmarks/recycling_vs_paper.py --model demo:smollm2 --workload spec_bench.jsonl --limit 3 --max-tokens 64

All arms decode the same prompts in the same order, and each keeps its matrix over all of them. All arms read the
target's most likely ids after a context from one oracle, which evaluates every context once. So all arms emit the same
text, and only their trees and what they learn differ. Prints acceptance lengths per category, and nodes per pass; it
measures no speed.

`Reference` follows arXiv 2408.08696 as its authors run it, and shares no code with specplug: the matrix starts with
zeros, the tree is filled rank by rank, the rows of all nodes are overwritten in node order, and nothing is learned from
the prompt or from the last step of an answer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np

from specplug.bench.workloads import Prompt, categories, limit, load_workload
from specplug.core import ROOT, Draft, Proposer, Step, int_array
from specplug.engines.llama_cpp.context import Context, open_context
from specplug.engines.llama_cpp.model import Model, open_model
from specplug.generation.topk import top_ids
from specplug.models import references
from specplug.planning.cost import CostCurve
from specplug.planning.fusion import Fusion
from specplug.planning.speculator import Speculator
from specplug.profile import PlannerSettings, Profile, Runtime
from specplug.proposers.suffix import Suffix
from specplug.proposers.token_recycling import TokenRecycling
from specplug.verification.reference import verify_tree

TOP = 8
MAX_NODES = 80
SHORT = 8
"""Tokens of text at most that are evaluated in one pass with a tree; longer text is evaluated in passes before it."""

Path = tuple[int, ...]
"""Tokens that follow the prompt: the emitted ones, then draft tokens."""


class Oracle:
    """The target's most likely ids after any continuation of a prompt. Each context is evaluated once."""

    def __init__(self, model: Model, context: Context) -> None:
        self._model = model
        self._context = context
        self._prompt: list[int] = []
        self._cached: list[int] = []
        self.answers: dict[Path, list[int]] = {}

    def start(self, prompt: Sequence[int]) -> None:
        """Begin another prompt, and discard the results and the KV cache of the last one."""
        self._prompt = list(prompt)
        self._cached = []
        self.answers = {}
        self._context.clear()

    def ask(self, emitted: Sequence[int], drafts: Sequence[Path]) -> list[list[int]]:
        """The most likely ids after prompt + emitted + draft, for each of the drafts."""
        base = tuple(emitted)
        missing = {base + draft for draft in drafts} - self.answers.keys()
        if missing:
            self._evaluate(base, sorted(missing, key=lambda path: (len(path), path)))
        return [self.answers[base + draft] for draft in drafts]

    def _evaluate(self, base: Path, wanted: Sequence[Path]) -> None:
        """One pass over the last tokens of the text and the tree of all `wanted` contexts, one sequence id per leaf."""
        context = self._context
        text = self._prompt + list(base)
        nodes = list(dict.fromkeys(path[:end] for path in wanted for end in range(len(base) + 1, len(path) + 1)))
        inner = {node[:-1] for node in nodes}
        leaves = [node for node in nodes if node not in inner]
        # The last token of the text is the root of the tree, and is always evaluated.
        start = _common(self._cached, text[:-1])
        context.drop(0, start)
        while len(text) - 1 - start > SHORT:
            stop = min(start + context.num_batch, len(text) - 1)
            context.clear_batch()
            context.add_span(text[start:stop], start, 0, wanted=False)
            context.decode()
            start = stop
        below: dict[Path, list[int]] = {}
        for seq_id, leaf in enumerate(leaves, start=1):
            context.copy(0, seq_id, 0, start)
            for end in range(len(base) + 1, len(leaf) + 1):
                below.setdefault(leaf[:end], []).append(seq_id)
        context.clear_batch()
        for position in range(start, len(text)):
            context.add(text[position], position, range(len(leaves) + 1))
        for node in nodes:
            context.add(node[-1], len(self._prompt) + len(node) - 1, below[node])
        context.decode()
        first = len(text) - start - 1
        tops = top_ids(context.logits(first + 1 + len(nodes)), TOP)[first:].tolist()
        for path, top in zip([base, *nodes], tops, strict=True):
            self.answers.setdefault(path, top)
        for seq_id in range(1, len(leaves) + 1):
            context.drop(seq_id)
        self._cached = text


@dataclass(slots=True)
class Turn:
    """One answer.

    lengths  tokens per target pass, the accepted ones and the target's own; the last pass counts in full
    """

    max_tokens: int
    end_tokens: frozenset[int]
    emitted: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    num_nodes: int = 0

    def take(self, new: Sequence[int], num_nodes: int) -> tuple[list[int], bool]:
        """Append the tokens of one pass. Returns those up to the end of the answer, and whether it has ended."""
        self.lengths.append(len(new))
        self.num_nodes += num_nodes
        over, count = False, 0
        for count, token in enumerate(new, start=1):
            over = token in self.end_tokens or len(self.emitted) + count == self.max_tokens
            if over:
                break
        self.emitted += new[:count]
        return list(new[:count]), over


class Arm(Protocol):
    name: str

    def answer(self, oracle: Oracle, prompt: Sequence[int], turn: Turn) -> None:
        """Decode into `turn` until the answer ends."""


class Reference:
    """Token recycling by the rules of its authors' program."""

    nodes: ClassVar = """
    0 1 2 3 4 5 6 7
    00 01 02 03 04 05 06 07 10 11 12 13 20 21 22 30 31 40 50 60 70
    000 001 002 003 004 005 006 007 010 011 012 020 021 030 040 050 060 070 100 101 110 200 300 400 500
    0000 0001 0002 0003 0004 0010 0011 0020 0030 0040 0100 0200 1000 2000 3000
    00000 00001 00002 00010 00020 00100 01000 10000
    000000 000001 000100
    """.split()

    def __init__(self, vocab: int) -> None:
        self.name = "authors' rules, 80"
        self.matrix = np.zeros((vocab, TOP), dtype=np.int64)

    def answer(self, oracle: Oracle, prompt: Sequence[int], turn: Turn) -> None:
        root = prompt[-1]
        while True:
            path_of: dict[str, Path] = {"": ()}
            token_of = {"": root}
            for node in self.nodes:
                token_of[node] = int(self.matrix[token_of[node[:-1]], int(node[-1])])
                path_of[node] = (*path_of[node[:-1]], token_of[node])
            nodes = list(path_of)
            top_of = dict(zip(nodes, oracle.ask(turn.emitted, [path_of[node] for node in nodes]), strict=True))
            best = ""
            for node in nodes:
                matches = all(token_of[node[:end]] == top_of[node[: end - 1]][0] for end in range(1, len(node) + 1))
                if matches and len(node) > len(best):
                    best = node
            new = [*path_of[best], top_of[best][0]]
            _, over = turn.take(new, len(self.nodes))
            if over:
                return
            for node in nodes:
                self.matrix[token_of[node]] = top_of[node]
            root = new[-1]


class Ours:
    """specplug's proposers, called as an engine calls them. Fusion learns probabilities, and all nodes are verified."""

    def __init__(self, name: str, proposers: Sequence[Proposer], budget: int) -> None:
        self.name = f"{name}, {budget}"
        flat = CostCurve([0], [1, budget + 1], [[1.0, 1.001]])
        static = Profile(name, planner=PlannerSettings(mode="static", max_nodes=budget))
        self.speculator = Speculator(Fusion(proposers), flat, static)
        self.accepted_of: dict[int, list[int]] = {}

    def answer(self, oracle: Oracle, prompt: Sequence[int], turn: Turn) -> None:
        one = self.speculator
        one.begin(0, int_array(prompt))
        over = False
        while not over:
            (draft,) = one.plan([0], len(prompt), [MAX_NODES])
            paths: list[Path] = [()]
            for parent, token in zip(draft.parents.tolist(), draft.tokens.tolist(), strict=True):
                paths.append((*paths[parent + 1], token))
            tops = oracle.ask(turn.emitted, paths)
            choices = [top[0] for top in tops]
            new, accepted = verify_tree(draft, lambda node, choices=choices: choices[node + 1])  # type: ignore[misc]
            kept, over = turn.take(new, len(draft))
            topk = np.array(tops, dtype=np.int32)[:, : one.wants_topk] if one.wants_topk else None
            one.observe([0], [Step(kept, draft, accepted, topk)], target_ms=1.0)
            self._count(draft, kept)
        one.end(0)

    def _count(self, draft: Draft, emitted: Sequence[int]) -> None:
        """Count over the full run how often each bucket was accepted; the planner's own counts decay."""
        node = ROOT
        for token in emitted:
            follow = ROOT
            for child in (draft.parents == node).nonzero()[0].tolist():
                counts = self.accepted_of.setdefault(int(draft.buckets[child]), [0, 0])
                counts[1] += 1
                if draft.tokens[child] == token:
                    counts[0] += 1
                    follow = child
            if follow == ROOT:
                return
            node = follow

    def counts(self) -> list[str]:
        buckets = self.speculator.fusion.buckets
        return [
            f"{buckets[i].name:32} {hits:5} of {drafted:5} = {hits / drafted:.3f} (prior {buckets[i].prior:.2f})"
            for i, (hits, drafted) in sorted(self.accepted_of.items())
        ]


def main() -> None:
    options = _options()
    prompts = limit(load_workload(options.workload), options.limit)
    runtime = Runtime(context=options.context, threads=options.threads, flash_attention=True)
    turns: dict[str, list[tuple[str, Turn]]] = {}
    with open_model(references.resolve(options.model)) as model:
        arms = [arm for arm in _arms(model.num_tokens) if options.only in arm.name]
        with open_context(
            model, runtime, cells=options.context, num_ids=MAX_NODES + 1, max_rows=SHORT + 1 + MAX_NODES
        ) as context:
            oracle = Oracle(model, context)
            for number, prompt in enumerate(prompts, start=1):
                print(f"{number}/{len(prompts)} {prompt.category}", file=sys.stderr, flush=True)
                for name, turn in converse(arms, oracle, model, prompt, options.max_tokens):
                    turns.setdefault(name, []).append((prompt.category, turn))
    report(turns, categories(prompts))
    if options.learned:
        for arm in arms:
            if isinstance(arm, Ours):
                print(arm.name, *arm.counts(), sep="\n")


def converse(
    arms: Sequence[Arm], oracle: Oracle, model: Model, prompt: Prompt, max_tokens: int
) -> list[tuple[str, Turn]]:
    """The answers of all arms to all turns of one prompt. Asserts that the answers are the same."""
    results = []
    messages: list[dict[str, str]] = []
    for question in prompt.turns:
        messages.append({"role": "user", "content": question})
        tokens = model.chat_prompt(messages).tolist()
        oracle.start(tokens)
        answers = []
        for arm in arms:
            turn = Turn(max_tokens, model.end_tokens)
            arm.answer(oracle, tokens, turn)
            answers.append(turn.emitted)
            results.append((arm.name, turn))
        assert all(answer == answers[0] for answer in answers), "the arms emitted different texts"
        text = b"".join(model.piece(token) for token in answers[0] if token not in model.end_tokens)
        messages.append({"role": "assistant", "content": text.decode("utf-8", "replace")})
    return results


def report(turns: dict[str, list[tuple[str, Turn]]], names: Sequence[str]) -> None:
    """Print the mean acceptance length per category and arm, over all passes, and the nodes per pass."""
    width = max(map(len, turns)) + 2
    print(f"{'':16}" + "".join(f"{name:>{width}}" for name in turns))
    for category in [*names, "all"]:
        line = f"{category:16}"
        for answered in turns.values():
            lengths = [n for of, turn in answered if category in (of, "all") for n in turn.lengths]
            line += f"{sum(lengths) / len(lengths):{width}.3f}"
        print(line)
    line = f"{'nodes per pass':16}"
    for answered in turns.values():
        passes = sum(len(turn.lengths) for _, turn in answered)
        line += f"{sum(turn.num_nodes for _, turn in answered) / passes:{width}.1f}"
    print(line)
    first = next(iter(turns.values()))
    print(f"{len(first)} answers, {sum(len(turn.emitted) for _, turn in first)} tokens")


def _arms(vocab: int) -> list[Arm]:
    arms: list[Arm] = [Reference(vocab), Ours("paper shape", [TokenRecycling(shape="paper")], MAX_NODES)]
    arms += [Ours("best first", [TokenRecycling()], budget) for budget in (MAX_NODES, 16, 8, 4)]
    for budget in (16, 8, 4):
        arms.append(Ours("suffix", [Suffix()], budget))
        arms.append(Ours("fusion", [Suffix(), TokenRecycling()], budget))
    return arms


def _common(one: Sequence[int], two: Sequence[int]) -> int:
    length = 0
    for a, b in zip(one, two, strict=False):
        if a != b:
            break
        length += 1
    return length


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo:smollm2", help="a .gguf path, or a packaged model")
    parser.add_argument("--workload", default="builtin", help="builtin, or JSONL with category and turns (Spec-Bench)")
    parser.add_argument("--limit", type=int, default=3, help="prompts per category")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens per answer")
    parser.add_argument("--only", default="", help="only the arms whose name contains this, such as 16")
    parser.add_argument("--learned", action="store_true", help="print how often each arm's buckets were accepted")
    parser.add_argument("--context", type=int, default=4096, help="KV cells")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
