"""Replays a setting as it runs live on an engine with a few sequences: trees of draft tokens.

This module depends on traces, costs and `Speculator`. It does not depend on an engine and runs no model.
Greedy acceptance is determined by the trace. Of the rows after rejected draft tokens, the trace holds only the recorded
off-path rows; a proposer that reads top ids does not receive the others. (A substitute, such as the last known row of
the same token, misleads it.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from specplug import registry
from specplug.core import ROOT, Draft, IntArray, Proposer, Step
from specplug.planning.cost import CostCurve
from specplug.planning.even_chains import reread_ms
from specplug.planning.fusion import Fusion
from specplug.planning.speculator import Speculator
from specplug.profile import Profile
from specplug.proposers.datastore import wait_for_corpora
from specplug.tune.candidates import Setting
from specplug.tune.drafter_trace import EXITS_NAME, RecordedDrafter
from specplug.tune.exits import RecordedExits, chooses_by_layers, is_choosing, recorded_for
from specplug.tune.expense import PricedProposer, SimulatedClock
from specplug.tune.prediction import POSITIONS, Costs, Sums
from specplug.tune.trace import ALONE, Answer


@dataclass(slots=True)
class _Cursor:
    """The state of one answer.

    at            index of its last verified token
    off_path_row  index of the next off-path row
    """

    seq: int
    answer: Answer
    tokens: list[int]
    sums: Sums
    at: int = 0
    off_path_row: int = 0


class Replay:
    """The replay of one setting. What it learns from one answer, it keeps for the next."""

    def __init__(
        self,
        setting: Setting,
        costs: Costs,
        *,
        max_tokens: int,
        learned: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """`learned` holds the acceptance counts that the buckets start with."""
        self._clock = SimulatedClock()
        self._expense = expense = costs.expense
        self._drafters: list[RecordedDrafter] = []
        sources: list[Proposer] = []
        names = []
        built = registry.build_sources(setting.proposers)
        wait_for_corpora(built)
        for spec, source in zip(setting.proposers, built, strict=True):
            recorded = recorded_for(spec, costs.drafters)
            if recorded:
                own = [RecordedDrafter(one, self._clock, expense, len(setting.proposers)) for one in recorded]
                self._drafters += own
                always = setting.planner.mode == "static" and not is_choosing(spec)
                if recorded[0].exit is None or always:
                    sources.append(own[0])
                    names.append(recorded[0].name)
                else:
                    sources.append(RecordedExits(recorded, own, by_layers=chooses_by_layers(spec)))
                    names.append(EXITS_NAME)
            else:
                sources.append(PricedProposer(source, self._clock, expense, spec.method, len(setting.proposers)))
                names.append(type(source).__name__)
        fusion = Fusion(sources, clock=self._clock, names=names)
        points = costs.points
        ms = [list(line) for line in points.ms]
        profile = Profile("replay", proposers=setting.proposers, planner=setting.planner)
        curve = CostCurve(points.contexts, points.rows, ms, points.change_ms)
        self._limits = costs.limits
        self.speculator = Speculator(fusion, curve, profile, limits=costs.limits, learned=learned)
        self._cost = CostCurve(points.contexts, points.rows, ms)
        self._change_ms = points.change_ms
        self._plain_scale = costs.plain_scale
        self._last_rows = 0
        self._max_tokens = max_tokens
        self._reads_rows = fusion.requires.topk > 0

    def run(self, group: Sequence[Answer]) -> list[Sums]:
        """Replay a group of answers that run at once. The time of an answer is the share that belongs to its tokens."""
        speculator = self.speculator
        cursors = [_Cursor(seq, answer, answer.tokens.tolist(), Sums()) for seq, answer in enumerate(group)]
        for c in cursors:
            for drafter in self._drafters:
                drafter.follow(c.seq, c.answer)
            speculator.begin(c.seq, np.append(c.answer.prompt, c.answer.tokens[:1]))
        running = [c for c in cursors if len(c.tokens) > 1]
        total, plain, plain_rows = 0.0, 0.0, 0
        self._last_rows = 0
        while running:
            total += self._step(running)
            running = [c for c in running if c.at + 1 < len(c.tokens)]
        for at in range(1, max(len(c.tokens) for c in cursors)):
            left = [c for c in cursors if at < len(c.tokens)]
            fill = sum(len(c.answer.prompt) + at - 1 for c in left) // len(left)
            plain += self._cost.at(fill)[len(left) - 1] + self._expense.step.ns(len(left)) / 1e6
            plain += self._change_ms if len(left) != plain_rows else 0.0
            plain_rows = len(left)
        emitted = sum(len(c.tokens) - 1 for c in cursors)
        for c in cursors:
            speculator.end(c.seq)
            c.sums.tokens = len(c.tokens) - 1
            c.sums.ms = total * c.sums.tokens / max(1, emitted)
            c.sums.plain_ms = plain * self._plain_scale * c.sums.tokens / max(1, emitted)
        return [c.sums for c in cursors]

    def _step(self, running: Sequence[_Cursor]) -> float:
        """Draft for all sequences and make one pass; returns the milliseconds of both."""
        speculator, clock = self.speculator, self._clock
        began = clock.now
        fill = sum(len(c.answer.prompt) + c.at for c in running) // len(running)
        seqs = [c.seq for c in running]
        left = [self._max_tokens - c.at - 2 for c in running]
        drafts = speculator.plan(seqs, fill, left, [n + 1 for n in left])
        steps = [self._verify(c, draft) for c, draft in zip(running, drafts, strict=True)]
        rows = self._limits.rows(drafts)
        line = self._cost.at(fill)
        target_ms = line[min(rows, len(line)) - 1] + (self._change_ms if rows != self._last_rows else 0.0)
        self._last_rows = rows
        topk_ns = self._expense.topk.ns(rows) if speculator.wants_topk else 0
        clock.advance(topk_ns)
        speculator.observe(seqs, steps, target_ms=target_ms, topk_ns=topk_ns)
        if self._limits.rereads:
            clock.advance(round(reread_ms(steps, line) * 1e6))
        return target_ms + (clock.now - began) / 1e6 + self._expense.step.ns(rows) / 1e6

    def _verify(self, c: _Cursor, draft: Draft) -> Step:
        """Accept the path of the draft that matches the answer, and move the cursor."""
        accepted: list[int] = []
        last = len(c.tokens) - 1
        tokens, parents = draft.tokens.tolist(), draft.parents.tolist()
        node, at = ROOT, c.at
        while at + 1 < last:
            token = c.tokens[at + 1]
            follow = next((i for i in range(node + 1, len(tokens)) if parents[i] == node and tokens[i] == token), ROOT)
            if follow == ROOT:
                break
            accepted.append(follow)
            node, at = follow, at + 1
        rows = self._known_rows(c, draft, accepted) if self._reads_rows else None
        emitted = c.tokens[c.at + 1 : at + 2]
        c.at = at + 1
        sums = c.sums
        sums.steps += 1
        sums.drafted += len(tokens)
        sums.accepted += len(accepted)
        if tokens:
            depths: list[int] = []
            for parent in parents:
                depths.append(1 if parent == ROOT else depths[parent] + 1)
            for place in range(min(POSITIONS, max(depths))):
                sums.offered_at[place] += 1
                sums.accepted_at[place] += place < len(accepted)
        return Step(emitted, *(rows or (draft, accepted, None)))

    def _known_rows(
        self, c: _Cursor, draft: Draft, accepted: Sequence[int]
    ) -> tuple[Draft, list[int], IntArray | None]:
        """The part of the verified draft whose rows the trace holds; the accepted nodes in it; and these rows."""
        topk = c.answer.topk
        wanted = self.speculator.wants_topk
        off_path_rows = self._off_path_rows(c, len(accepted))
        if not wanted:
            return draft, list(accepted), None
        rows = [topk[c.at]]
        kept: list[int] = []
        place = {node: i for i, node in enumerate(accepted)}
        path_of: dict[int, tuple[int, ...]] = {ROOT: ()}
        tokens = draft.tokens.tolist()
        for node, parent in enumerate(draft.parents.tolist()):
            if parent not in path_of:
                continue
            path = (*path_of[parent], tokens[node])
            row = topk[c.at + place[node] + 1] if node in place else off_path_rows.get(path)
            if row is None:
                continue
            path_of[node] = path
            kept.append(node)
            rows.append(row)
        new_of = {old: new for new, old in enumerate(kept)}
        known = draft if len(kept) == len(draft) else draft.select(kept)
        return known, [new_of[node] for node in accepted], np.stack(rows)[:, :wanted]

    def _off_path_rows(self, c: _Cursor, num_accepted: int) -> dict[tuple[int, ...], IntArray]:
        """The off-path rows at the positions that this pass verified, by path from the root of the draft."""
        found: dict[tuple[int, ...], IntArray] = {}
        off_path_rows = c.answer.off_path_rows
        if off_path_rows is None:
            return found
        while c.off_path_row < len(off_path_rows.at) and off_path_rows.at[c.off_path_row] <= c.at + num_accepted:
            first, second = off_path_rows.path[c.off_path_row].tolist()
            off_path = (first,) if second == ALONE else (first, second)
            text = tuple(c.tokens[c.at + 1 : off_path_rows.at[c.off_path_row] + 1])
            found[(*text, *off_path)] = off_path_rows.topk[c.off_path_row]
            c.off_path_row += 1
        return found
