"""Chooses the shards of corpora that lie on the device, within the memory that they may take.

It imports no torch, because the command that starts an engine uses it, too.
"""

from __future__ import annotations

from specplug.corpora.shard import Shard
from specplug.errors import UsageError
from specplug.proposers.datastore import Datastore

BYTES_PER_TOKEN = 16
"""Bytes: 4 for the token, 4 for the suffix order, and 8 for the array that is searched."""

RANK_BITS = 31
"""Bits for the place of a suffix in the order of all shards."""

MIB = 1 << 20


def shards_within(proposer: Datastore) -> tuple[list[Shard], str]:
    """The shards that lie on the device, and a line that says so: in the order of the corpora, all that fit into what
    is left of `device_memory`. UsageError where none fits.
    """
    corpora, mib = proposer.shared_corpora, proposer.device_memory
    taken: list[Shard] = []
    left_out: list[str] = []
    size = 0
    for corpus in corpora:
        for number, shard in enumerate(corpus.shards, start=1):
            if (size + len(shard)) * BYTES_PER_TOKEN <= mib * MIB and size + len(shard) < 1 << RANK_BITS:
                size += len(shard)
                taken.append(shard)
            else:
                left_out.append(f"{corpus.name} {number} ({len(shard):,} tokens)")
    of = sum(len(corpus.shards) for corpus in corpora)
    used = f"{size * BYTES_PER_TOKEN / MIB:.0f} of {mib} MiB (device_memory)"
    if not taken:
        raise UsageError(
            f"device_memory: {mib} MiB hold no shard of {', '.join(corpus.name for corpus in corpora)}: "
            f"{', '.join(left_out)}, {BYTES_PER_TOKEN} bytes per token; raise it, or set runner: v1"
        )
    kept = f"{len(taken)} of {of} shards with {size:,} tokens lie on the device, {used}"
    return taken, f"corpora: {kept}" + (f"; left out: {', '.join(left_out)}" if left_out else "")
