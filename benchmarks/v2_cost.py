"""Times drafting on the device (vLLM's V2 runner) as PyTorch operations on one CPU core, and counts operations and
memory.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/v2_cost.py [--corpus-tokens 10000000]

`suffix` and `token_recycling` draft for every sequence in every step; texts are random and half full. An operation is
one that computes, not one that only looks at a tensor in another way: on a GPU each is a kernel. The likeliest ids of
the rows of logits are found before the step and timed apart. With --corpus-tokens, `datastore` drafts, too, from a
synthetic corpus of so many tokens, and the texts are of the corpus, with one token in twelve replaced by another; what
`datastore` takes alone is timed as thread CPU time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from logging import getLogger
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from time import perf_counter, thread_time
from typing import Any

import numpy as np
import torch
from corpora import phrases, write_documents
from torch.utils._python_dispatch import TorchDispatchMode

from specplug.engines.vllm.fault_isolation import Faults
from specplug.engines.vllm.v2.answer_ring import AnswerRing
from specplug.engines.vllm.v2.device_chains import DeviceTexts
from specplug.engines.vllm.v2.device_datastore import DeviceDatastore
from specplug.engines.vllm.v2.device_drafting import DeviceDrafting, LogitRows
from specplug.engines.vllm.v2.device_suffix import DeviceSuffix
from specplug.engines.vllm.v2.successors import Successors
from specplug.proposers.datastore import Datastore
from specplug.proposers.suffix import Suffix
from specplug.proposers.token_recycling import TokenRecycling

CPU = torch.device("cpu")


class Operations(TorchDispatchMode):
    """Counts operations that compute."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--width", type=int, default=1024, help="tokens of the longest text")
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--corpus-tokens", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.corpus_tokens:
        with TemporaryDirectory() as folder:
            with_corpus(arguments, Path(folder) / "corpus")
        return
    print("| sequences | step, ms | likeliest ids, ms | operations |\n|---|---|---|---|")
    for n in (1, 16, 64, 256):
        step, operations = step_of(n, arguments.vocabulary, arguments.width, arguments.k)
        logits = torch.randn(n * (arguments.k + 1), arguments.vocabulary)
        took, ids = timed(step, arguments.rounds), timed(lambda rows=logits: rows.argmax(-1), 5)
        print(f"| {n} | {took} | {ids} | {operations} |", flush=True)
    print("\n| vocabulary | bytes of token recycling |\n|---|---|")
    for vocabulary in (49_152, 128_256, 262_144):
        print(f"| {vocabulary} | {bytes_of(Successors(TokenRecycling(), vocabulary, 'cpu')) / 2**20:.1f} MiB |")
    print("\n| tokens of finished answers | bytes of the ring |\n|---|---|")
    for tokens in (65_536, 1_000_000):
        print(f"| {tokens} | {bytes_of(AnswerRing(tokens, 'cpu')) / 2**20:.1f} MiB |")


def with_corpus(arguments: argparse.Namespace, folder: Path) -> None:
    vocabulary, width, k = arguments.vocabulary, arguments.width, arguments.k
    text = phrases(arguments.corpus_tokens, vocabulary)
    write_documents(folder, np.split(text, np.arange(800, len(text), 800)), vocabulary)
    began = thread_time()
    datastore = DeviceDatastore(Datastore(corpora=[f"{folder}/"]), CPU)
    print(f"{datastore.summary}; loaded in {thread_time() - began:.1f} s of CPU time\n")
    print("| sequences | datastore alone, ms | step with all three, ms | operations: alone, with all three |")
    print("|---|---|---|---|")
    chooser = np.random.default_rng(1)
    for n in (1, 16, 64, 256):
        rows = np.stack([text[at : at + width] for at in chooser.integers(0, len(text) - width, n)])
        wrong = chooser.random(rows.shape) < 1 / 12
        rows[wrong] = chooser.integers(0, vocabulary, int(wrong.sum()))
        tokens = torch.from_numpy(rows)
        lengths = torch.full((n,), width // 2, dtype=torch.int32)
        all_texts = [DeviceTexts(torch.arange(n), tokens, lengths + at, width) for at in range(arguments.rounds + 3)]
        ends = iter(all_texts)
        with Operations() as counting:
            datastore.propose(all_texts[0], k)
        alone = timed(lambda ends=ends: datastore.propose(next(ends), k), arguments.rounds, thread_time)
        step, operations = step_of(n, vocabulary, width, k, tokens=tokens, more=[datastore])
        took = timed(step, arguments.rounds, thread_time)
        print(f"| {n} | {alone} | {took} | {counting.count}, {operations} |", flush=True)


def step_of(
    n: int,
    vocabulary: int,
    width: int,
    k: int,
    device: Any = CPU,
    *,
    tokens: Any = None,
    more: Sequence[DeviceDatastore] = (),
) -> tuple[Callable[[], Any], int]:
    """A step for n sequences that can be repeated, and its number of operations.

    tokens  int32[n, width]: their texts, of which the first half is there; random ones where None
    """
    if tokens is None:
        tokens = torch.randint(0, vocabulary, (n, width), dtype=torch.int32, device=device)
    proposers = (DeviceSuffix(Suffix(), device), Successors(TokenRecycling(), vocabulary, device), *more)
    drafting = DeviceDrafting(
        proposers,
        ("suffix", "token_recycling", *("datastore" for _ in more)),
        k=k,
        slots=n,
        num_tokens=vocabulary,
        device=device,
        faults=Faults(getLogger("v2_cost")),
    )
    lengths = torch.full((n,), width // 2, dtype=torch.int32, device=device)
    for slot in range(min(n, 16)):
        drafting.begin(slot, tokens[slot], width // 2)
        drafting.end(tokens[slot], 8, lengths[slot])
    texts = DeviceTexts(torch.arange(n, device=device), tokens, lengths, width)
    sampled, rejected = torch.full((n,), 2, device=device), torch.full((n,), k - 1, device=device)
    rows = LogitRows(
        torch.randint(0, vocabulary, (n * (k + 1),), device=device),
        torch.randint(0, vocabulary, (n * (k + 1),), device=device),
        torch.arange(n * (k + 1), device=device) // (k + 1),
        torch.arange(n * (k + 1), device=device) % (k + 1),
    )

    def step() -> Any:
        return drafting.step(texts, sampled, rejected, rows)

    with Operations() as counting:
        step()
    return step, counting.count


def timed(call: Callable[[], Any], rounds: int, clock: Callable[[], float] = perf_counter) -> str:
    """Median milliseconds, and what nine of ten are below."""
    times = []
    for _ in range(rounds + 3):
        began = clock()
        call()
        times.append(1000 * (clock() - began))
    return f"{median(times[3:]):.2f} ({quantiles(times[3:], n=10)[-1]:.2f})"


def bytes_of(owner: object) -> int:
    """Of all tensors that an object has, and of those that its attributes have."""
    total = 0
    for value in vars(owner).values():
        if isinstance(value, torch.Tensor):
            total += value.numel() * value.element_size()
        elif hasattr(value, "__dict__"):
            total += bytes_of(value)
    return total


if __name__ == "__main__":
    main()
