"""Isolates vLLM's engine from faults of proposers: a fault becomes an empty draft and is counted, never raised.

Three things would stop the engine: an exception in `propose`, more tokens than vLLM asked for, and an id outside the
vocabulary. A slow proposer would stall it. This module does not depend on vLLM.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from math import isfinite
from time import monotonic, perf_counter_ns

from specplug.core import Configurable, IntArray, SequenceOptions
from specplug.drafts.chains import ChainProposer, Chains, ChainSteps
from specplug.errors import UsageError

STALL_NS = 200_000_000
"""A call that takes longer is a fault, because the entire batch waits for it. Nanoseconds."""

MAX_FAULTS = 5
"""After this number of faults, a proposer is disabled for the rest of the process."""

LOG_INTERVAL_SECONDS = 60.0
"""The least time between two log lines about the same proposer."""


ADAPTER = "adapter"
"""The name under which faults of the adapter to vLLM's runner are counted, beside those of proposers."""


class Faults:
    """Counts faults by proposer and kind, logs each proposer's at most once a minute, and disables faulty proposers."""

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = monotonic) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.disabled: set[str] = set()
        self._logger = logger
        self._clock = clock
        self._logged: dict[str, float] = {}

    def record(self, name: str, kind: str, details: str) -> None:
        self.counts[name, kind] += 1
        total = sum(count for (proposer, _), count in self.counts.items() if proposer == name)
        now = self._clock()
        if total >= MAX_FAULTS and name not in self.disabled:
            self.disabled.add(name)
            self._logger.error(
                "specplug: %s failed %d times and is disabled until the next start; last fault: %s",
                name,
                total,
                details,
            )
        elif now - self._logged.get(name, -LOG_INTERVAL_SECONDS) >= LOG_INTERVAL_SECONDS:
            self._logger.warning("specplug: %s %s (%s); answers are not affected", name, kind, details)
        else:
            return
        self._logged[name] = now


class GuardedProposer:
    """Passes on a proposer's drafts where they are valid, and replaces them by empty ones where they are not."""

    def __init__(
        self,
        proposer: ChainProposer,
        name: str,
        faults: Faults,
        *,
        num_tokens: int,
        clock: Callable[[], int] = perf_counter_ns,
    ) -> None:
        """`num_tokens` is the size of the vocabulary. UsageError for a bucket whose prior is not a probability."""
        self.proposer = proposer
        self.name = name
        self.faults = faults
        self.requires = proposer.requires
        self.buckets = proposer.buckets
        self._num_tokens = num_tokens
        self._clock = clock
        for bucket in proposer.buckets:
            if not (isfinite(bucket.prior) and 0.0 <= bucket.prior <= 1.0):
                raise UsageError(
                    f"proposer {name}: bucket {bucket.name!r} has prior {bucket.prior}, which is not a probability; "
                    "update the package of this proposer"
                )

    @property
    def disabled(self) -> bool:
        return self.name in self.faults.disabled

    def configure(self, seq: int, options: SequenceOptions) -> None:
        if isinstance(self.proposer, Configurable):
            self._call(self.proposer.configure, seq, options)

    def begin(self, seq: int, prompt: IntArray) -> None:
        self._call(self.proposer.begin, seq, prompt)

    def observe_chains(self, steps: ChainSteps) -> None:
        self._call(self.proposer.observe_chains, steps)

    def end(self, seq: int) -> None:
        self._call(self.proposer.end, seq)

    def propose_chains(self, seqs: Sequence[int], k: int) -> Chains:
        chains: Chains | None = None
        if not self.disabled:
            try:
                began = self._clock()
                chains = self.proposer.propose_chains(seqs, k)
                taken = self._clock() - began
                chains.check(len(seqs), k, num_tokens=self._num_tokens, num_buckets=max(1, len(self.buckets)))
                if taken > STALL_NS:
                    chains = None
                    self.faults.record(self.name, "stalled", f"{taken / 1e6:.0f} ms for {len(seqs)} sequences")
            except ValueError as error:
                chains = None
                self.faults.record(self.name, "drafted nonsense", str(error))
            except Exception as error:
                chains = None
                self.faults.record(self.name, "raised", f"{type(error).__name__}: {error}")
        return Chains.empty(len(seqs), k) if chains is None else chains

    def _call(self, method: Callable[..., None], *args: object) -> None:
        if self.disabled:
            return
        began = self._clock()
        try:
            method(*args)
            taken = self._clock() - began
            if taken > STALL_NS:
                self.faults.record(self.name, "stalled", f"{taken / 1e6:.0f} ms in {method.__name__}")
        except Exception as error:
            self.faults.record(self.name, "raised", f"{type(error).__name__}: {error}")
