"""`llama_cpp.Llama` with drafts: the same class for people's scripts, with another `generate`.

Knows the high-level class and the step loop. Prompts are read, tokens sampled and states saved by the base class; only
the passes that decode are ours, so that completions, chats, streams, grammars and tools work unchanged.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import Llama

from specplug import profile as profiles
from specplug.core import ROOT, Proposer
from specplug.engines.llama_cpp.context import KV_TYPES, Context, set_tree_params
from specplug.engines.llama_cpp.drafters.opening import Drafters
from specplug.engines.llama_cpp.engine import fitting_sources
from specplug.engines.llama_cpp.loop import SPARE_SHARE, Running, StepLoop, ids_needed
from specplug.engines.llama_cpp.measure import own_cost_points, points_on, remembered_cost_points
from specplug.engines.llama_cpp.model import Model
from specplug.errors import UsageError
from specplug.generation.counters import Counters
from specplug.planning.cost import CostCurve
from specplug.planning.fusion import Fusion
from specplug.planning.speculator import Speculator
from specplug.profile import Profile, Runtime


class SpeculativeLlama(Llama):  # type: ignore[misc]
    """Takes what `llama_cpp.Llama` takes, and a profile.

    Source: the verification rule of `specplug.verification.reference`; each token is sampled by the base class's own
    sampler chain, in emission order. With `logits_all=True` or `embedding=True` the base class decodes, without drafts.
    Keeps: the proposers' state over all calls.
    """

    def __init__(self, model_path: str, *, profile: str | Path | Profile = "default", **options: Any) -> None:
        """`options` are those of `llama_cpp.Llama`; of the profile only proposers, planner and what was measured count.

        Raises UsageError for a profile that does not fit, ValueError where the base class does.
        """
        self._stack = ExitStack()  # the base class closes it also where its own __init__ never ran
        if options.get("draft_model") is not None:
            raise UsageError("draft_model: SpeculativeLlama drafts itself; name a profile instead")
        self.profile = profile if isinstance(profile, Profile) else profiles.load(profile)
        if self.profile.exact:
            raise UsageError(f"profile {self.profile.name}: exact is not kept by SpeculativeLlama; use specplug run")
        self._loop: StepLoop | None = None
        self._under_way: Generator[int, Sequence[int] | None, None] | None = None
        self._speculates = self.profile.speculates and not (options.get("logits_all") or options.get("embedding"))
        self._max_nodes = self.profile.planner.max_nodes
        sources = fitting_sources(self.profile, Path(model_path), slots=1)
        super().__init__(model_path, **options)
        if self._speculates:
            self._loop = self._open_loop(sources)

    @property
    def counters(self) -> Counters:
        """What all finished generations did, added up."""
        return self._loop.counters if self._loop else Counters()

    # -- what the base class asks ---------------------------------------------------------------------------------

    @property
    def context_params(self) -> Any:
        """The base class's parameters of its context, with room for trees."""
        if self._speculates:
            set_tree_params(self._context_params, ids_needed(1, self._max_nodes), self._max_nodes + 1)
        return self._context_params

    @context_params.setter
    def context_params(self, params: Any) -> None:
        self._context_params = params

    def load_state(self, state: Any) -> None:
        self._leave()
        super().load_state(state)
        if self._loop:
            self._loop.free_parked(0)  # the state brings those of its own past

    def eval(self, tokens: Sequence[int]) -> None:
        if self._loop:
            self._loop.forget(0, self.n_tokens)
        super().eval(tokens)

    def generate(
        self, tokens: Sequence[int], *args: Any, stopping_criteria: Any = None, **options: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        """As `llama_cpp.Llama.generate`, several tokens per pass where drafts come true.

        A generator that was left in the middle ends here.
        """
        self._leave()
        base = super().generate(tokens, *args, stopping_criteria=stopping_criteria, **options)
        if self._loop is None:
            yield from base
            return
        token = next(base, None)
        base.close()
        if token is not None:
            _refuse((yield token))
            self._under_way = self._decode(self._loop, token, stopping_criteria)
            yield from self._under_way

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"profile": self.profile}  # type: ignore[no-any-return]

    # -- our passes -----------------------------------------------------------------------------------------------

    def _decode(self, loop: StepLoop, token: int, stopping_criteria: Any) -> Generator[int, Sequence[int] | None, None]:
        """Yield what follows `token`."""
        running = Running(0, None, frozenset(), root=token, position=self.n_tokens, left=0)
        loop.adopt(running, np.array(self.input_ids[: self.n_tokens], dtype=np.int32))
        try:
            while running.finish is None:
                yield from self._pass(loop, running, stopping_criteria)
        finally:
            if loop.interrupted:
                self.reset()
            loop.release(running)

    def _leave(self) -> None:
        """Close the generator that somebody still holds, if any: its cells are needed now."""
        if self._under_way is not None:
            self._under_way.close()
            self._under_way = None

    def _pass(
        self, loop: StepLoop, running: Running, stopping_criteria: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        """One target pass; its tokens are sampled one by one, as late as the base class would."""
        running.left = loop.room(0, self._n_ctx - self.n_tokens)
        if running.left < 1:
            raise RuntimeError(f"llama_decode: the context of {self._n_ctx} tokens is full")
        passed = loop.evaluate([running])
        (tree,) = passed.trees
        child = tree.children()
        node, row, token = ROOT, tree.first, running.root
        running.fresh = []
        try:
            while True:
                self.input_ids[self.n_tokens : self.n_tokens + 1] = token
                self.n_tokens += 1
                self._requires_eval = True  # the last row of this pass need not be that of the last token
                token = int(self._sampler.sample(self._ctx, row - len(passed.logits)))
                running.fresh.append(token)
                if stopping_criteria is not None and stopping_criteria(self._input_ids, passed.logits[row]):
                    running.finish = "stop"
                    return
                _refuse((yield token))
                following = child.get((node, token))
                if following is None:
                    return
                tree.accepted.append(following)
                node, row = following, tree.row_of[following]
        finally:
            # Also when the caller goes away or a sampler fails: what was sampled so far is true.
            if running.fresh:
                del tree.accepted[len(running.fresh) - 1 :]
                loop.settle(passed)

    def _open_loop(self, sources: Sequence[Proposer]) -> StepLoop:
        model = Model(Path(self.model_path), self._model.model)
        model.check_rollback()
        max_nodes = min(self._max_nodes, self.n_batch - 1)
        context = Context(model, self._ctx.ctx, num_ids=ids_needed(1, self._max_nodes), max_rows=max_nodes + 1)
        runtime = self._runtime()
        points = own_cost_points(model, replace(self.profile, runtime=runtime), slots=1, notify=self._notify)
        if points is None:
            key = ("Llama", runtime, self.n_threads_batch, max_nodes + 1)
            points = remembered_cost_points(model, key, lambda: points_on(context, max_nodes + 1), notify=self._notify)
            context.clear()
        drafters = Drafters()
        self._stack.callback(drafters.close)
        drafters.open(sources, context, runtime, slots=1)
        fusion = Fusion(drafters.in_place(sources))
        curve = CostCurve(points.contexts, points.rows, points.ms, points.change_ms)
        learned = self.profile.measured.acceptance if self.profile.measured else None
        # A batch holds the root and all nodes, whatever a profile's own curve covers.
        fitting = replace(self.profile, planner=replace(self.profile.planner, max_nodes=max_nodes))
        speculator = Speculator(fusion, curve, fitting, learned=learned)
        return StepLoop(context, speculator, slots=1, spare_cells=self._n_ctx // SPARE_SHARE)

    def _notify(self, text: str) -> None:
        if self.verbose:
            print(f"specplug: {text}", file=sys.stderr)

    def _runtime(self) -> Runtime:
        """What the base class was opened with, as the key of a remembered cost curve."""
        params = self._context_params
        kinds = {number: name for name, number in KV_TYPES.items()}
        return Runtime(
            threads=self.n_threads,
            context=self._n_ctx,
            batch=self.n_batch,
            gpu_layers=self.model_params.n_gpu_layers,
            flash_attention=params.flash_attn_type == llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
            kv_type=kinds.get(params.type_k, str(params.type_k)),
        )


def _refuse(sent: Sequence[int] | None) -> None:
    """The base class, too, only takes tokens through `send` where it keeps all logits."""
    if sent:
        raise UsageError("tokens were sent into generate; open the model with logits_all=True for that")
