"""Removes the rejected rows of a pass from a model's memory.

A pass evaluates rows that verification then rejects. A `Rollback` restores the memory to its state without these rows.
Its `limits` are passed to the planner, so that no draft is verified that could not be removed again.
"""

from __future__ import annotations

from typing import Protocol

import llama_cpp.llama_cpp as ll

from specplug.core import NO_LIMITS, DraftLimits
from specplug.engines.llama_cpp.cells import Cells
from specplug.engines.llama_cpp.model import Model
from specplug.engines.llama_cpp.tree_batch import Tree
from specplug.errors import UsageError


class Rollback(Protocol):
    """Keeps accepted rows and removes rejected ones, for one kind of memory."""

    limits: DraftLimits

    def keep(self, cells: Cells, tree: Tree, seq: int, root: int, position: int, rows: int) -> int:
        """Keep the root and the accepted nodes of `tree` on sequence id `seq`; forget its other nodes.

        position  of the root
        rows      of the pass whose cells stay taken: up to the last row that any sequence keeps
        Returns how many tokens the sequence now holds.
        """


class AnyTail:
    """The KV cache of attention: any tail of any branch can be dropped, at no cost.

    A draft's first branch has the sequence's own id, so accepting it moves nothing. Cells of rejected nodes before the
    last kept row are retained, so that no later token is stored in them (cells.py).
    """

    limits = NO_LIMITS

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


def rollback_of(model: Model, *, instead: str = "use --profile none") -> Rollback:
    """The rollback for a model's memory. Raises UsageError if there is none (recurrent and hybrid models).

    instead  the advice in the message
    """
    if ll.llama_model_is_recurrent(model.handle) or ll.llama_model_is_hybrid(model.handle):
        raise UsageError(
            f"{model.path}: this architecture keeps a recurrent state that cannot take tokens back; {instead}"
        )
    return AnyTail()
