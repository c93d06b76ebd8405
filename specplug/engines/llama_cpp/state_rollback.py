"""Removes the rejected rows of a pass from a recurrent state, which holds no cells that could be dropped.

`Snapshots` lets llama.cpp keep the states before the last rows of each pass, where it can. `Fork` evaluates a draft on
a copy of the sequence, and drops the copy where a part of the draft was rejected. Both verify chains only.
Source: llama.cpp's src/llama-memory-recurrent.cpp. It reports a rollback beyond the rows of the last pass as done
although the state is then wrong, and copies the state from before a rollback that is pending; neither happens here.
"""

from __future__ import annotations

from specplug.core import DraftLimits
from specplug.engines.llama_cpp.context import Context
from specplug.engines.llama_cpp.state_cells import StateCells
from specplug.engines.llama_cpp.tree_batch import Tree


class Snapshots:
    """Takes back up to `depth` rows of the last pass, once per pass, at no further cost.

    All sequences of a pass have equally many rows, and prompts are read in passes of their own: llama.cpp divides other
    batches, and loses the snapshots of the first parts.
    """

    has_states = True

    def __init__(self, depth: int) -> None:
        """`depth` 0: for plain decoding, which takes nothing back."""
        self.snapshots = depth
        self.limits = DraftLimits(trees=False, depth=depth, even=True)

    def num_ids(self, slots: int, max_nodes: int) -> int:
        return slots

    def cells(self, context: Context, slots: int) -> StateCells:
        return StateCells(context, slots=slots, message_token=context.model.chat.message_token)

    def branch(self, context: Context, seq: int, rows: int) -> int:
        return seq

    def keep(self, cells: StateCells, tree: Tree, seq: int, root: int, position: int, rows: int) -> int:
        stop = _append(cells, tree, seq, root, position)
        rejected = position + tree.num_rows - stop
        assert rejected <= min(self.snapshots, tree.num_rows - 1), "more rows are rejected than can be taken back"
        if rejected:
            cells.context.drop(seq, stop)
        return stop

    @property
    def is_incomplete(self) -> bool:
        return False

    def complete(self, context: Context) -> None:
        """The next pass starts from the snapshots."""

    def forget(self) -> None:
        """Nothing is kept here."""


class Fork:
    """Evaluates the rows of a draft on a copy of the sequence, which replaces it where all of them are accepted.

    Else the copy is dropped, and the rows that were right are evaluated once more. A copy shares the state until the
    pass writes its own. The copy of slot n has the sequence id slots + n.
    """

    has_states = True
    snapshots = 0
    limits = DraftLimits(trees=False, even=True, rereads=True)

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._rereads: list[tuple[int, int, list[int]]] = []
        """Sequences whose copy was dropped: the slot, its position, and the tokens that follow there."""

    def num_ids(self, slots: int, max_nodes: int) -> int:
        return 2 * slots

    def cells(self, context: Context, slots: int) -> StateCells:
        return StateCells(context, slots=slots, message_token=context.model.chat.message_token)

    def branch(self, context: Context, seq: int, rows: int) -> int:
        if rows == 1:
            return seq
        copy = self._slots + seq
        context.drop(copy)  # of a pass that failed
        context.copy(seq, copy)
        return copy

    def keep(self, cells: StateCells, tree: Tree, seq: int, root: int, position: int, rows: int) -> int:
        stop = _append(cells, tree, seq, root, position)
        if tree.num_rows == 1:
            return stop
        context, copy = cells.context, self._slots + seq
        if stop == position + tree.num_rows:
            context.drop(seq)
            context.copy(copy, seq)
        else:
            self._rereads.append((seq, position, cells.tokens[seq][position:]))
        context.drop(copy)
        return stop

    @property
    def is_incomplete(self) -> bool:
        return bool(self._rereads)

    def complete(self, context: Context) -> None:
        for seq, position, tokens in self._rereads:
            context.clear_batch()
            context.add_span(tokens, position, seq, wanted=False)
            context.decode()
        self._rereads.clear()

    def forget(self) -> None:
        self._rereads.clear()


def _append(cells: StateCells, tree: Tree, seq: int, root: int, position: int) -> int:
    """Record the root and the accepted nodes; returns how many tokens the sequence now holds."""
    kept = [root, *tree.draft.tokens[tree.accepted].tolist()]
    cells.append(seq, kept, range(len(kept)))
    return position + len(kept)
