"""Emits the target's own tokens of a sequence, out of the logits of a pass.

Each token is sampled after the one before it, so that the text is that of plain decoding, whatever was drafted.
"""

from __future__ import annotations

from collections.abc import Set

from specplug.core import ROOT
from specplug.engines.llama_cpp.context import Context, Logits
from specplug.engines.llama_cpp.stream import Stream
from specplug.engines.llama_cpp.tree_batch import Tree
from specplug.errors import SpecplugError


def emit_along(stream: Stream, tree: Tree, context: Context, logits: Logits, end_tokens: Set[int]) -> None:
    """Walk a tree along the target's own tokens; fills `fresh` and `logprobs` of the stream, and `tree.accepted`.

    A fault of the sequence's sampler becomes its `failure`.
    """
    stream.fresh, stream.logprobs, stream.drafters = [], [], []
    try:
        token = emit(stream, context, logits, tree.first, end_tokens)
        child = tree.children()
        node = child.get((ROOT, token))
        while node is not None and stream.finish is None:
            tree.accepted.append(node)
            token = emit(stream, context, logits, tree.row_of[node], end_tokens)
            node = child.get((node, token))
    except SpecplugError as error:  # the other sequences go on
        stream.failure = error


def emit(stream: Stream, context: Context, logits: Logits, row: int, end_tokens: Set[int]) -> int:
    """The target's own token after `row`, added to `stream.fresh`; sets `stream.finish` where it is the last one."""
    assert stream.sampler is not None
    token = stream.sampler.pick(context, logits, row)
    if stream.sampler.sampling.logprobs is not None:
        report = stream.sampler.logprobs(logits, row, token)
        if report is not None:
            stream.logprobs.append(report)
    stream.fresh.append(token)
    stream.left -= 1
    if token in end_tokens or token in stream.sampler.sampling.stop_tokens:
        stream.finish = "stop"
    elif stream.left <= 0:
        stream.finish = "length"
    return token
