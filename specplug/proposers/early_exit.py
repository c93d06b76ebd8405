"""The proposer `early_exit`: the first layers of the target draft for it.

This module holds the options; it drafts nothing itself: on llama.cpp the engine opens a folder of files that hold the
first layers, on vLLM it runs the layers of the loaded target.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from specplug.proposers.model_options import MAX_DRAFT, ModelOptions

AUTO = "auto"
"""The value of `exit` that stands for all exits."""


class EarlyExit(ModelOptions):
    """The target's own first layers, with its norm and a head.

    Source: DEL (arXiv 2504.05598) and LayerSkip (arXiv 2404.16710). They pay where the model was trained for early
    exits; others rarely agree with themselves before their last layers. State, requires and cost per step are those of
    DraftModel on llama.cpp, and in `engines.vllm.v2.device_early_exit` on vLLM.

    model      llama.cpp: the folder that `specplug build early-exit` wrote, or `drafter:NAME`
    exits      vLLM: the exits, as numbers of layers of the target
    exit       auto chooses among all exits of the folder or of `exits`, and plain decoding, by time; a number of layers
               uses that exit alone
    rule       measured, or layers: the rule of DEL, which compares exits by tokens per layer, ends a draft by its
               confidence and never stops drafting; for comparisons on llama.cpp, with max_draft 18 and a static planner
    The other options are those of DraftModel.
    """

    def __init__(
        self,
        *,
        model: str | None = None,
        exits: Sequence[int] | None = None,
        exit: int | Literal["auto"] = "auto",
        rule: Literal["measured", "layers"] = "measured",
        max_draft: int = MAX_DRAFT,
        branches: int = 1,
    ) -> None:
        super().__init__(max_draft, branches, None)
        if (model is None) == (exits is None):
            raise ValueError(
                "name either model, a folder of exits for llama.cpp, or exits, layers of the target on vLLM"
            )
        if isinstance(exit, int) and exit < 1:
            raise ValueError(f"exit is {exit}; use auto, or a number of layers")
        if rule == "layers" and isinstance(exit, int):
            raise ValueError(f"rule layers chooses among exits, and exit is {exit}; leave one of them out")
        if exits is not None:
            _check_exits(exits, exit)
            if rule == "layers" or branches > 1:
                raise ValueError("rule layers and branches are for llama.cpp; leave them out beside exits")
        self.model = model
        self.exits = None if exits is None else tuple(exits)
        self.exit = exit
        self.rule = rule


def _check_exits(exits: Sequence[int], exit_: int | Literal["auto"]) -> None:
    if not exits or exits[0] < 1 or any(one >= other for one, other in pairwise(exits)):
        raise ValueError(f"exits is {list(exits)}; list numbers of layers from 1 on, in ascending order")
    if isinstance(exit_, int) and exit_ not in exits:
        raise ValueError(f"exit is {exit_}, which is not in exits; use auto, or one of {list(exits)}")
