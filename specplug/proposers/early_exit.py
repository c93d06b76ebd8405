"""The proposer `early_exit`: it names drafters with the first layers of the target, which the engine opens to draft.

This module holds the options; it drafts nothing itself.
"""

from __future__ import annotations

from typing import Literal

from specplug.proposers.model_options import MAX_DRAFT, ModelOptions

AUTO = "auto"
"""The value of `exit` that stands for all exits."""


class EarlyExit(ModelOptions):
    """Drafters that `specplug build early-exit` wrote: the target's own first layers, with a trimmed head.

    Source: DEL (arXiv 2504.05598) and LayerSkip (arXiv 2404.16710). They pay where the model was trained for early
    exits; others rarely agree with themselves before their last layers. State, requires and cost per step are those of
    DraftModel. llama.cpp only.

    model      the folder, or `drafter:NAME`
    exit       auto chooses among all exits of the folder, and plain decoding, by measured time; a number of layers
               uses that exit alone
    rule       measured, or layers: the rule of DEL, which compares exits by tokens per layer, ends a draft by its
               confidence and never stops drafting; for comparisons, with max_draft 18 and a static planner
    The other options are those of DraftModel.
    """

    def __init__(
        self,
        *,
        model: str,
        exit: int | Literal["auto"] = "auto",
        rule: Literal["measured", "layers"] = "measured",
        max_draft: int = MAX_DRAFT,
        branches: int = 1,
    ) -> None:
        super().__init__(max_draft, branches, None)
        self.model = model
        if isinstance(exit, int) and exit < 1:
            raise ValueError(f"exit is {exit}; use auto, or a number of layers")
        if rule == "layers" and isinstance(exit, int):
            raise ValueError(f"rule layers chooses among exits, and exit is {exit}; leave one of them out")
        self.exit = exit
        self.rule = rule
