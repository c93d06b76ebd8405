"""Whatever a proposer does inside the engine becomes an empty draft: faults are counted by kind, and never raised.

Knows sources and faults. Knows no vLLM: what kills its engine is an exception in `propose`, more tokens than it asked
for, or an id outside the vocabulary.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from math import isfinite
from time import monotonic, perf_counter_ns

from specplug.core import IntArray
from specplug.drafts.chains import ChainProposer, Chains, ChainSteps
from specplug.errors import UsageError

STALL_NS = 200_000_000
"""A source that takes longer than this for a step stalls the whole batch."""

FAULTS = 5
"""So many faults, and the source is off for the rest of the process."""

LOG_SECONDS = 60.0


class Faults:
    """What went wrong, by source and kind; each source's faults are logged once a minute."""

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = monotonic) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.off: set[str] = set()
        self._logger = logger
        self._clock = clock
        self._logged: dict[str, float] = {}

    def trip(self, name: str, kind: str, what: str) -> None:
        self.counts[name, kind] += 1
        total = sum(count for (source, _), count in self.counts.items() if source == name)
        now = self._clock()
        if total >= FAULTS and name not in self.off:
            self.off.add(name)
            self._logger.error("specplug: %s failed %d times and is off now; the last time: %s", name, total, what)
        elif now - self._logged.get(name, -LOG_SECONDS) >= LOG_SECONDS:
            self._logger.warning("specplug: %s %s (%s); its drafts are left out", name, kind, what)
        else:
            return
        self._logged[name] = now


class Guarded:
    """A source that cannot hurt: its own drafts where they are sound, empty ones where they are not."""

    def __init__(
        self,
        source: ChainProposer,
        name: str,
        faults: Faults,
        *,
        num_tokens: int,
        clock: Callable[[], int] = perf_counter_ns,
    ) -> None:
        """`num_tokens`: the vocabulary. UsageError when its buckets make no sense."""
        self.source = source
        self.name = name
        self.faults = faults
        self.requires = source.requires
        self.buckets = source.buckets
        self._num_tokens = num_tokens
        self._clock = clock
        for bucket in source.buckets:
            if not (isfinite(bucket.prior) and 0.0 <= bucket.prior <= 1.0):
                raise UsageError(
                    f"proposer {name}: bucket {bucket.name!r} has prior {bucket.prior}; update its package"
                )

    @property
    def off(self) -> bool:
        return self.name in self.faults.off

    def begin(self, seq: int, prompt: IntArray) -> None:
        self._call(self.source.begin, seq, prompt)

    def observe_chains(self, steps: ChainSteps) -> None:
        self._call(self.source.observe_chains, steps)

    def end(self, seq: int) -> None:
        self._call(self.source.end, seq)

    def propose_chains(self, seqs: Sequence[int], k: int) -> Chains:
        chains: Chains | None = None
        if not self.off:
            try:
                began = self._clock()
                chains = self.source.propose_chains(seqs, k)
                taken = self._clock() - began
                chains.check(len(seqs), k, num_tokens=self._num_tokens, num_buckets=max(1, len(self.buckets)))
                if taken > STALL_NS:
                    chains = None
                    self.faults.trip(self.name, "stalled", f"{taken / 1e6:.0f} ms for {len(seqs)} sequences")
            except ValueError as error:
                chains = None
                self.faults.trip(self.name, "drafted nonsense", str(error))
            except Exception as error:
                chains = None
                self.faults.trip(self.name, "raised", f"{type(error).__name__}: {error}")
        return Chains.empty(len(seqs), k) if chains is None else chains

    def _call(self, method: Callable[..., None], *args: object) -> None:
        if self.off:
            return
        began = self._clock()
        try:
            method(*args)
            taken = self._clock() - began
            if taken > STALL_NS:
                self.faults.trip(self.name, "stalled", f"{taken / 1e6:.0f} ms in {method.__name__}")
        except Exception as error:
            self.faults.trip(self.name, "raised", f"{type(error).__name__}: {error}")
