"""Compares the proposers on the device (vLLM's V2 runner) with those on the host (V1) by replaying recorded texts.

The texts are recorded with llama-cpp-python, and replayed in the environment with vLLM, on the CPU:

    python benchmarks/suffix_vs_arctic.py --record MODEL.gguf --workload specplug/bench/builtin.jsonl texts.jsonl
    python benchmarks/v2_acceptance.py texts.jsonl [--corpus]

Greedy texts: the target's likeliest id after every token is the next one of the text. All draft tokens are verified
(`mode: static` on V1), several texts are answered at once, and finished ones are kept. With --corpus, `datastore`
drafts from a corpus of every second answer, alone and with both others. Prints per proposer and per K the tokens per
step of both, their ratio with a bootstrap interval over texts, and how the probabilities of V2 compare with what was
accepted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from logging import getLogger
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from corpora import write_documents

from specplug import registry
from specplug.bench.statistics import paired_ratio
from specplug.core import int_array
from specplug.drafts.chains import NOTHING, ChainSteps, as_chains
from specplug.engines.vllm.fault_isolation import Faults
from specplug.engines.vllm.v2.device_chains import DeviceTexts
from specplug.engines.vllm.v2.device_drafting import DeviceDrafting, LogitRows
from specplug.engines.vllm.v2.device_forms import device_form
from specplug.planning.batch_speculator import BatchSpeculator, batch_cost
from specplug.profile import CostPoints
from specplug.registry import ProposerSpec

ARMS = {
    "suffix": (ProposerSpec("suffix"),),
    "suffix, own text only": (ProposerSpec("suffix", {"shared_tokens": 0}),),
    "token_recycling": (ProposerSpec("token_recycling"),),
    "suffix + token_recycling": (ProposerSpec("suffix"), ProposerSpec("token_recycling")),
}

FREE = batch_cost([CostPoints((0,), (1,), ((1.0,),))])


@dataclass
class Replayed:
    """
    steps        per text, the steps that its answer took
    points       (probability, accepted) of draft tokens
    confidences  float[n, k] per step, the probabilities of the draft tokens
    """

    steps: np.ndarray
    points: list[tuple[float, bool]] = field(default_factory=list)
    confidences: list[np.ndarray] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--k", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--corpus", action="store_true")
    arguments = parser.parse_args()
    lines = [json.loads(line) for line in arguments.texts.read_text().splitlines()]
    texts = [(line["prompt"], line["out"]) for line in lines if len(line["out"]) > 1]
    emitted = np.array([len(out) - 1 for _, out in texts])
    num_tokens = 1 + max(max(*prompt, *out) for prompt, out in texts)
    print(f"{len(texts)} texts, {emitted.sum()} tokens, {arguments.at_once} at once; tokens per step")
    with TemporaryDirectory() as folder:
        arms = ARMS
        if arguments.corpus:
            write_documents(Path(folder), [int_array(out) for _, out in texts[::2]], num_tokens)
            datastore = ProposerSpec("datastore", {"corpora": [f"{folder}/"]})
            arms = {"datastore": (datastore,), "all three": (*ARMS["suffix + token_recycling"], datastore)}
        compare(texts, arms, arguments.k, arguments.at_once, num_tokens)


def compare(
    texts: Sequence[tuple[list[int], list[int]]],
    arms: Mapping[str, Sequence[ProposerSpec]],
    lengths: Sequence[int],
    at_once: int,
    num_tokens: int,
) -> None:
    emitted = np.array([len(out) - 1 for _, out in texts])
    print("| proposers | K | V1 | V2 | V2 / V1 |\n|---|---|---|---|---|")
    calibration = ""
    for name, specs in arms.items():
        for k in lengths:
            host = replay_host(texts, specs, k, at_once)
            device = replay_device(texts, specs, k, at_once, num_tokens)
            ratio = paired_ratio(emitted, device.steps, emitted, host.steps)
            one, other = emitted.sum() / host.steps.sum(), emitted.sum() / device.steps.sum()
            interval = f"{other / one:.3f} ({ratio.low:.3f}-{ratio.high:.3f})"
            print(f"| {name} | {k} | {one:.3f} | {other:.3f} | {interval} |", flush=True)
            if len(specs) > 1:
                calibration += reliability(f"{name}, K = {k}", device.points)
    print(calibration)


def replay_host(
    texts: Sequence[tuple[list[int], list[int]]], specs: Sequence[ProposerSpec], k: int, n: int
) -> Replayed:
    sources = [as_chains(one) for one in registry.build_sources(specs)]
    speculator = BatchSpeculator(sources, [one.method for one in specs], FREE, k=k, static=True)
    steps = np.zeros(len(texts), dtype=np.int64)
    waiting, running, done = list(range(len(texts)))[::-1], [], {}
    while waiting or running:
        while waiting and len(running) < n:
            index = waiting.pop()
            running.append(index)
            done[index] = 1
            prompt, out = texts[index]
            speculator.begin(index, int_array([*prompt, out[0]]))
        speculator.should_draft()
        budgets = int_array([min(k, len(texts[index][1]) - done[index] - 1) for index in running])
        plan = speculator.plan(running, len(running), 0, np.maximum(budgets, 0))
        emitted, before, after = [], [], []
        for row, index in enumerate(running):
            out = texts[index][1]
            chain = [t for t in plan.chains.tokens[row].tolist() if t != NOTHING][: max(int(budgets[row]), 0)]
            count = 1
            while count <= len(chain) and chain[count - 1] == out[done[index] + count - 1]:
                count += 1
            new = out[done[index] : done[index] + count]
            before += [out[done[index] - 1], *new[:-1]]
            after += new
            emitted.append(new)
            done[index] += len(new)
            steps[index] += 1
        topk = int_array(after)[:, None]
        speculator.observe(ChainSteps(running, emitted, int_array(before), int_array(after), int_array(before), topk))
        for index in [one for one in running if done[one] >= len(texts[one][1])]:
            speculator.end(index)
            running.remove(index)
    return Replayed(steps)


def replay_device(
    texts: Sequence[tuple[list[int], list[int]]], specs: Sequence[ProposerSpec], k: int, n: int, num_tokens: int
) -> Replayed:
    longest = max(len(prompt) + len(out) for prompt, out in texts) + 1
    proposers = registry.build_sources(specs)
    drafting = DeviceDrafting(
        [device_form(one, num_tokens, "cpu") for one in proposers],
        [one.method for one in specs],
        k=k,
        slots=n,
        num_tokens=num_tokens,
        device="cpu",
        faults=Faults(getLogger("v2_acceptance")),
    )
    tokens, lengths = torch.zeros((n, longest), dtype=torch.int32), torch.zeros(n, dtype=torch.int32)
    steps = np.zeros(len(texts), dtype=np.int64)
    points: list[tuple[float, bool]] = []
    confidences: list[np.ndarray] = []
    waiting, slots, done = list(range(len(texts)))[::-1], {}, {}
    drafts: dict[int, tuple[list[int], list[float]]] = {}
    while waiting or slots:
        new_slots = [slot for slot in range(n) if slot not in slots]
        for slot in new_slots[: len(waiting)]:
            index = slots[slot] = waiting.pop()
            prompt, _ = texts[index]
            tokens[slot, : len(prompt)] = torch.tensor(prompt, dtype=torch.int32)
            lengths[slot] = len(prompt)
            done[index] = 0
            drafts[slot] = ([], [])
            drafting.begin(slot, tokens[slot], len(prompt))
        order = sorted(slots)
        sampled, rejected, read, top, of_slot, depth = [], [], [], [], [], []
        for slot in order:
            index = slots[slot]
            out = texts[index][1]
            chain, probability = drafts[slot]
            chain = chain[: max(0, len(out) - done[index] - 1)]
            count = 1
            while count <= len(chain) and chain[count - 1] == out[done[index] + count - 1]:
                count += 1
            for place, chance in enumerate(probability[: min(count, len(chain))]):
                if chance > 0:
                    points.append((chance, place < count - 1))
            new = out[done[index] : done[index] + count]
            length = int(lengths[slot])
            for place, token in enumerate(new):
                read.append(int(tokens[slot, length + place - 1]))
                top.append(token)
                of_slot.append(slot)
                depth.append(place)
                tokens[slot, length + place] = token
            steps[index] += done[index] > 0
            done[index] += count
            lengths[slot] += count
            sampled.append(count)
            rejected.append(len(chain) - count + 1)
        drafted, confidence = drafting.step(
            DeviceTexts(torch.tensor(order), tokens, lengths, longest),
            torch.tensor(sampled),
            torch.tensor(rejected),
            LogitRows(*(torch.tensor(one) for one in (read, top, of_slot, depth))),
        )
        confidences.append(confidence.double().numpy())
        for row, slot in enumerate(order):
            drafts[slot] = drafted[row].tolist(), confidence[row].tolist()
        for slot in [one for one in order if done[slots[one]] >= len(texts[slots[one]][1])]:
            drafting.end(tokens[slot], len(texts[slots[slot]][0]), lengths[slot])
            del slots[slot]
    return Replayed(steps, points, confidences)


def reliability(title: str, points: list[tuple[float, bool]]) -> str:
    """What was accepted of the draft tokens with about one probability."""
    lines = [f"\n{title}\n\n| probability | draft tokens | mean probability | accepted |\n|---|---|---|---|"]
    chance, accepted = np.array([p for p, _ in points]), np.array([a for _, a in points])
    for low in np.arange(0, 1, 0.1):
        among = (chance >= low) & (chance < low + 0.1)
        if among.any():
            shares = f"{chance[among].mean():.3f} | {accepted[among].mean():.3f}"
            lines.append(f"| {low:.1f} to {low + 0.1:.1f} | {among.sum()} | {shares} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
