"""Adds the time of a step to the sequences that ran in it. Measures nothing, and does not depend on the loop."""

from __future__ import annotations

from specplug.engines.llama_cpp.stream import Pass


def add_step(passed: Pass, verified: int, learned: int) -> None:
    """Add a step to the counters of its sequences, each of which is charged an equal share.

    verified, learned  when verification and learning ended, nanoseconds
    """
    n = len(passed.running)
    target_ns = (passed.decoded_ns - passed.drafted_ns) // n
    sample_ns = (verified - passed.decoded_ns) // n
    draft_ns = (passed.drafted_ns - passed.began_ns + learned - verified) // n
    for stream, tree in zip(passed.running, passed.trees, strict=True):
        c = stream.counters
        c.steps += 1
        c.emitted_tokens += len(stream.fresh)
        c.draft_tokens += len(tree.draft)
        c.accepted_tokens += len(tree.accepted)
        c.target_ns += target_ns
        c.sample_ns += sample_ns
        c.draft_ns += draft_ns


def compare(passed: Pass, step_ms: float, plain_ms: float) -> None:
    """Add a step, and the time that plain decoding takes for its tokens, to its sequences.

    plain_ms  time of a plain pass over all sequences
    """
    for stream in passed.running:
        stream.decode_ms += step_ms
        stream.plain_ms += plain_ms * len(stream.fresh)
