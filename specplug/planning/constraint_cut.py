"""Removes from a draft the tokens that the constraint of its sequence forbids, as they cannot be accepted.

Works on a tree of tokens and a `TokenConstraint`, and does not depend on who drafted it or what is planned with it.
Source: our own; vLLM's scheduler cuts chains in the same way.
"""

from __future__ import annotations

from specplug.core import ROOT, Draft, TokenConstraint


def allowed_part(draft: Draft, constraint: TokenConstraint) -> Draft:
    """The nodes that a constraint allows after those before them; the draft itself where all are allowed.

    It asks the constraint once per branch, and not at all about branches below a node that is known to be forbidden.
    """
    tokens, parents = draft.tokens.tolist(), draft.parents.tolist()
    inner, forbidden = {*parents}, set[int]()
    allowed: set[int] = set()
    for leaf in range(len(tokens)):
        if leaf in inner:
            continue
        path, node = [], leaf
        while node != ROOT:
            path.append(node)
            node = parents[node]
        if not forbidden.isdisjoint(path):
            continue
        path.reverse()
        count = constraint.allowed([tokens[node] for node in path])
        allowed.update(path[:count])
        forbidden.update(path[count : count + 1])
    return draft if len(allowed) == len(tokens) else draft.select(sorted(allowed))
