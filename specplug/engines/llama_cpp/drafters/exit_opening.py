"""Opens what lets early exits share the target's work: its cached cells, and its hidden states.

Does not depend on how an exit is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from specplug.drafts.retrieval import Span
from specplug.engines.llama_cpp.context import Context
from specplug.engines.llama_cpp.drafters.exit_drafter import ExitDrafter
from specplug.engines.llama_cpp.drafters.exit_scoring import MOST_ROWS, ExitScoring
from specplug.engines.llama_cpp.drafters.finding import Found
from specplug.engines.llama_cpp.drafters.first_layers import cut, layers_per_cache
from specplug.engines.llama_cpp.drafters.states_head import StatesHead, cells_of
from specplug.engines.llama_cpp.layer_taps import LayerTaps, why_not
from specplug.errors import SpecplugError
from specplug.profile import Runtime


def target_cells(
    found: Found, target: Context, own: Context, *, spare: int
) -> Callable[[int, Sequence[Span]], bytes] | None:
    """Returns the target's cells of parts of a sequence in the form that a drafter loads; None where their form is not
    known.

    own    the empty context of the drafter
    spare  a sequence id of the target that is used within a pass only
    """
    if found.layers is None:
        return partial(target.state_of, spare=spare)
    try:
        layers = _layers_of(own)
    except SpecplugError:
        return None
    return lambda seq, spans: cut(target.state_of(seq, spans, spare), layers)


def open_scoring(drafter: ExitDrafter, found: Found, target: Context, runtime: Runtime) -> ExitScoring | None:
    """Scoring of the exits by the target's hidden states; None where these cannot be read."""
    if found.head is None or found.ids is None or why_not(target.model) is not None:
        return None
    rows = MOST_ROWS * len(drafter.exits)
    width = target.model.width
    head = StatesHead(found.head, runtime, width=width, num_ids=len(found.ids), max_rows=rows)
    taps = LayerTaps(target, drafter.exits)
    return ExitScoring(taps, drafter.exits, head, found.ids, drafter.learn_shadow, drafter.choose)


def scoring_cells(exits: int) -> int:
    """KV cells of the context that scores so many exits."""
    return cells_of(MOST_ROWS * exits)


def _layers_of(context: Context) -> tuple[int, ...]:
    """The number of layers in each of the caches of an empty context."""
    context.clear_batch()
    context.add_span([0], 0, 0, wanted=True)
    context.decode()
    try:
        return layers_per_cache(context.state(0))
    finally:
        context.drop(0)
