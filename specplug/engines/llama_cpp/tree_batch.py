"""A draft as rows of one batch.

Source: one llama.cpp sequence id per leaf; a node carries the ids of all leaves below it, so that shared prefixes are
evaluated once and attention sees exactly a node's ancestors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from specplug.core import ROOT, Draft
from specplug.engines.llama_cpp.context import Context


@dataclass(slots=True)
class Tree:
    """A draft in the batch of the pass under way.

    root     token of the root
    first    batch row of the root
    row_of   batch row of each node
    leaf_of  sequence id that carries each node's branch to a leaf
    extra    the sequence ids used beside the slot's own
    num_rows rows of the root, of the nodes, and of those that fill a chain up
    accepted the nodes accepted so far, root to leaf
    """

    draft: Draft
    root: int
    first: int
    row_of: list[int]
    leaf_of: list[int]
    extra: list[int]
    num_rows: int
    accepted: list[int] = field(default_factory=list)

    @property
    def rows(self) -> list[int]:
        """The rows of the root and of every node."""
        return [self.first, *self.row_of]

    def children(self) -> dict[tuple[int, int], int]:
        """The node that follows (node or ROOT, token)."""
        draft = self.draft
        if not len(draft):
            return {}
        places = zip(draft.parents.tolist(), draft.tokens.tolist(), strict=True)
        return {place: node for node, place in enumerate(places)}


def lay_out(
    context: Context, draft: Draft, root: int, position: int, seq: int, leaf_ids: Iterator[int], least_rows: int = 1
) -> Tree:
    """Add the rows of the root and of the draft to the batch: the likeliest branch first, on the slot's id `seq`.

    least_rows  a chain with fewer rows is filled up to them, with the root's token; these rows are no nodes
    """
    first = context.rows
    n = len(draft)
    filler = max(0, least_rows - 1 - n)
    if not n and not filler:
        context.add(root, position, (seq,))
        return Tree(draft, root, first, _NO_NODES, _NO_NODES, _NO_NODES, 1)
    parents = draft.parents.tolist()
    if parents == list(range(-1, n - 1)):
        context.add_span([root, *draft.tokens.tolist(), *[root] * filler], position, seq, wanted=True)
        return Tree(draft, root, first, list(range(first + 1, first + 1 + n)), [seq] * n, [], 1 + n + filler)
    assert not filler, "only chains are filled up"
    order, ids, leaf_of, extra = _branches(parents, seq, leaf_ids)
    for leaf in extra:
        context.copy(seq, leaf)
    context.add(root, position, [seq, *extra])
    tokens, depths = draft.tokens.tolist(), draft.depths().tolist()
    row_of = [0] * n
    for node in order:
        row_of[node] = context.rows
        context.add(tokens[node], position + depths[node], ids[node])
    return Tree(draft, root, first, row_of, leaf_of, extra, 1 + n)


_NO_NODES: list[int] = []


def _branches(
    parents: list[int], seq: int, leaf_ids: Iterator[int]
) -> tuple[list[int], list[list[int]], list[int], list[int]]:
    """Assigns sequence ids to the branches; the first one keeps the slot's own id. Returns

    order    the nodes, depth first
    ids      for each node the ids of the leaves below it; the last list is the root's
    leaf_of  for each node one of its ids
    extra    the ids used beside `seq`
    """
    n = len(parents)
    children: list[list[int]] = [[] for _ in range(n + 1)]  # the last list, index ROOT, is the root's
    for node, parent in enumerate(parents):
        children[parent].append(node)
    order: list[int] = []
    ids: list[list[int]] = [[] for _ in range(n + 1)]
    extra: list[int] = []
    leaf = seq
    stack = children[ROOT][::-1]
    while stack:
        node = stack.pop()
        order.append(node)
        if children[node]:
            stack.extend(reversed(children[node]))
        else:
            ids[node] = [leaf]
            if stack:
                leaf = next(leaf_ids)
                extra.append(leaf)
    for node in reversed(order):
        ids[parents[node]] = ids[node] + ids[parents[node]]
    return order, ids, [line[0] for line in ids[:n]], extra
