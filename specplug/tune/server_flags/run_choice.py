"""Chooses which candidates of a server are run live, by their predictions.

Knows candidates and predicted speedups; measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from specplug.tune.server_flags.llama_candidates import LOOKUP_TYPES, chained
from specplug.tune.server_flags.server_candidates import Candidate
from specplug.tune.server_flags.server_predictions import Predicted

HOPELESS = 0.93
"""Candidates with a smaller predicted speedup are not run, where others are better: predictions err by less."""

UNPREDICTED = 1.02
"""The place among the predicted ones of a candidate that cannot be replayed."""

MOST_RUN = 8
RUN_AS_PROOF = 2
"""Candidates that are run where all are hopeless."""


def with_chains(tried: Sequence[Candidate], predictions: Mapping[str, Predicted]) -> list[Candidate]:
    """The chains of the best lookup and the best candidate of each drafter and head, on llama-server."""
    best = best_of_families(tried, predictions)
    lookups = [one for one in best if one.rules and one.drafts is None]
    drafting = [one for one in best if not one.rules and one.family not in LOOKUP_TYPES]
    if not lookups:
        return []
    made = [chained(lookups[0], one) for one in drafting]
    return [one for one in made if one is not None]


def best_of_families(tried: Sequence[Candidate], predictions: Mapping[str, Predicted]) -> list[Candidate]:
    """The best of each family by prediction, the most promising first."""
    best: dict[str, Candidate] = {}
    for candidate in tried:
        if candidate.family not in best or promise(candidate, predictions) > promise(
            best[candidate.family], predictions
        ):
            best[candidate.family] = candidate
    return sorted(best.values(), key=lambda one: -promise(one, predictions))


def to_run(tried: Sequence[Candidate], predictions: Mapping[str, Predicted], most: int) -> list[Candidate]:
    """The candidates to run live: `most` of them, but at least one, and at most MOST_RUN.

    Where there is no time for two, one of them can still have enough answers.
    """
    ranked = best_of_families(tried, predictions)
    hopeful = [one for one in ranked if promise(one, predictions) >= HOPELESS] or ranked[:RUN_AS_PROOF]
    return hopeful[: min(MOST_RUN, max(1, most))]


def promise(candidate: Candidate, predictions: Mapping[str, Predicted]) -> float:
    """The predicted speedup; without a prediction, one that puts usual sizes before others."""
    known = predictions.get(candidate.name)
    if known is not None:
        return known.speedup
    return UNPREDICTED if candidate.usual else UNPREDICTED - 0.01
