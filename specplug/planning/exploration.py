"""Trying row counts whose cost is uncertain, within a share of the time.

A row count is tried where its pass would pay if it is as fast as it may well be, and where the budget covers the time
that is lost if it is not. It does not depend on engines, proposers or a clock.
Source: optimism in the face of uncertainty, as in upper confidence bounds (Auer et al. 2002), with a budget.
State: the budget.
"""

from __future__ import annotations

from dataclasses import replace

from specplug.planning.constants import EXPLORING_GAIN, EXPLORING_RESERVE, EXPLORING_SHARE
from specplug.planning.planner import Plan, Planner


class Exploration:
    """Replaces plans by ones that show what a row count costs.

    Call `forget_trial` before every plan, and `charge` after every timed pass.
    """

    def __init__(self, planner: Planner) -> None:
        self._planner = planner
        self._budget_ms = 0.0
        """Milliseconds that trials may lose now."""
        self._ms_per_token = 0.0
        """Expected time of a token by the plan that the pass under way replaces; 0 where it replaces none."""

    def better_known(self, plan: Plan, context: int, row_ms: float, last_rows: int) -> Plan:
        """`plan`, or another one from the same candidates to try. The arguments are those of `Planner.plan`."""
        if self._budget_ms <= 0.0 or not plan.ranked:
            return plan
        fastest = self._planner.cost.optimistic(context)
        if fastest is None or self._planner.best_rows(plan, fastest) == plan.rows:
            return plan
        tried = self._planner.plan(plan.candidates, context, row_ms, last_rows, fastest)
        if tried.rows == plan.rows:
            return plan
        ms_per_token = plan.expected_ms / plan.expected_tokens
        if tried.expected_tokens * ms_per_token < EXPLORING_GAIN * tried.expected_ms:
            return plan
        expected_ms = plan.ms[tried.rows - 1] + tried.reread_ms
        if expected_ms - tried.expected_tokens * ms_per_token > self._budget_ms:
            return plan
        self._ms_per_token = ms_per_token
        return replace(tried, ms=plan.ms, expected_ms=expected_ms)

    def forget_trial(self) -> None:
        """The pass under way tries nothing; call it before every plan."""
        self._ms_per_token = 0.0

    def charge(self, tokens: int, pass_ms: float, plain_ms: float) -> None:
        """Add a share of a pass's time to the budget; subtract what the pass lost, if it was a trial.

        tokens    emitted by all sequences
        plain_ms  time of a plain pass
        """
        self._budget_ms += EXPLORING_SHARE * pass_ms
        if self._ms_per_token:
            self._budget_ms -= pass_ms - tokens * self._ms_per_token
        reserve = EXPLORING_RESERVE * plain_ms
        self._budget_ms = max(min(self._budget_ms, reserve), -reserve)  # a pause of the machine is no loss of a trial
