"""Removes the rejected rows of a pass from a model's memory.

A pass evaluates rows that verification then rejects. A `Rollback` restores the memory to its state without these rows.
Its `limits` are passed to the planner, so that no draft is verified that could not be removed again.
"""

from __future__ import annotations

from typing import Any, Protocol

from specplug.core import NO_LIMITS, DraftLimits
from specplug.engines.llama_cpp.cells import Cells
from specplug.engines.llama_cpp.context import Context
from specplug.engines.llama_cpp.model import Model
from specplug.engines.llama_cpp.state_cells import StateCells
from specplug.engines.llama_cpp.tree_batch import Tree
from specplug.errors import UsageError


class Rollback(Protocol):
    """Keeps accepted rows and removes rejected ones, for one kind of memory."""

    limits: DraftLimits
    has_states: bool
    """Whether the memory keeps states, which cannot be cut; each prompt is then read in passes of its own."""
    snapshots: int
    """States that the context keeps for each sequence id (`open_context`)."""

    def num_ids(self, slots: int, max_nodes: int) -> int:
        """Sequence ids of a context with so many slots."""

    def cells(self, context: Context, slots: int) -> Cells | StateCells:
        """The record of an empty context."""

    def branch(self, context: Context, seq: int, rows: int) -> int:
        """The sequence id that the rows of a pass get, of slot `seq`; trees have further ones."""

    def keep(self, cells: Any, tree: Tree, seq: int, root: int, position: int, rows: int) -> int:
        """Keep the root and the accepted nodes of `tree` on sequence id `seq`; forget its other nodes.

        cells     what `cells` has returned
        position  of the root
        rows      of the pass whose cells stay taken: up to the last row that any sequence keeps
        Returns how many tokens the sequence now holds.
        """

    @property
    def is_incomplete(self) -> bool:
        """Whether `complete` has work to do, without which a sequence does not hold what was kept."""

    def complete(self, context: Context) -> None:
        """Bring every sequence to what was kept. Called when the results of a pass are no longer needed."""

    def forget(self) -> None:
        """The memory was emptied after a pass that did not end."""


class AnyTail:
    """The KV cache of attention: any tail of any branch can be dropped, at no cost.

    A draft's first branch has the sequence's own id, so accepting it moves nothing. Cells of rejected nodes before the
    last kept row are retained, so that no later token is stored in them (cells.py).
    """

    limits = NO_LIMITS
    has_states = False
    snapshots = 0

    def num_ids(self, slots: int, max_nodes: int) -> int:
        """One for each slot, one for retained cells, one for the second row of `exact`, and the leaves of a plan."""
        return slots + 2 + max_nodes

    def cells(self, context: Context, slots: int) -> Cells:
        return Cells(context, slots=slots, retained_id=slots)

    def branch(self, context: Context, seq: int, rows: int) -> int:
        return seq

    def keep(self, cells: Cells, tree: Tree, seq: int, root: int, position: int, rows: int) -> int:
        draft, accepted = tree.draft, tree.accepted
        start = position + 1
        stop = start + len(accepted)
        if not accepted:
            cells.append(seq, [root], [tree.first])
        else:
            accepted_rows = [tree.row_of[node] for node in accepted]
            cells.append(seq, [root, *draft.tokens[accepted].tolist()], [tree.first, *accepted_rows])
        if len(draft) == len(accepted):
            return stop
        context = cells.context
        if rows > tree.first + 1 + len(accepted):
            for node, depth in enumerate(draft.depths().tolist()):
                if tree.row_of[node] < rows and node not in accepted:
                    cells.retain(tree.leaf_of[node], position + depth, start + depth)
        winner = tree.leaf_of[accepted[-1]] if accepted else seq
        if winner == seq:
            context.drop(seq, stop)
        else:
            shared = start + sum(tree.leaf_of[node] == seq for node in accepted)
            context.drop(seq, shared)
            context.copy(winner, seq, shared, stop)
        for leaf in tree.extra:
            context.drop(leaf)
        return stop

    @property
    def is_incomplete(self) -> bool:
        return False

    def complete(self, context: Context) -> None:
        """Cells need nothing more."""

    def forget(self) -> None:
        """Nothing is kept here."""


def refuse_recurrent(model: Model, role: str) -> None:
    """UsageError for a model with a recurrent state, as a drafter or as what a drafter is built for.

    role  such as `a drafter`
    """
    if model.has_recurrent_memory:
        raise UsageError(
            f"{model.path}: {role} takes back what it drafted, which a recurrent state does not allow; "
            "use a model that has attention only"
        )
