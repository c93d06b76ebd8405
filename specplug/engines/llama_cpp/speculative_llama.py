"""`llama_cpp.Llama` with drafts: the same class for scripts, with another `generate`.

The base class reads prompts, samples tokens and saves states; only the passes that decode are those of the step loop.
So completions, chats, streams, grammars and tools work unchanged.
"""

from __future__ import annotations

import atexit
import sys
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from weakref import ref

import llama_cpp
import numpy as np
from llama_cpp import Llama

from specplug import profile as profiles
from specplug.core import ROOT, IntArray, Proposer, TokenConstraint
from specplug.engines.llama_cpp.alignment import aligned_rows
from specplug.engines.llama_cpp.constraint_processor import constraint_after, create_constrained
from specplug.engines.llama_cpp.context import KV_TYPES, Context, set_state_params, set_tree_params
from specplug.engines.llama_cpp.drafters.head_finding import loads_mtp
from specplug.engines.llama_cpp.drafters.opening import Drafters, check_drafters
from specplug.engines.llama_cpp.engine import fitting_sources
from specplug.engines.llama_cpp.engine_settings import can_offload
from specplug.engines.llama_cpp.exact_passes import measure_exact_passes
from specplug.engines.llama_cpp.library_check import check_model
from specplug.engines.llama_cpp.measure import own_cost_points
from specplug.engines.llama_cpp.model import Model
from specplug.engines.llama_cpp.pass_costs import PassCosts
from specplug.engines.llama_cpp.rollback import Rollback
from specplug.engines.llama_cpp.slots import common_prefix
from specplug.engines.llama_cpp.state_memory import rollback_for
from specplug.engines.llama_cpp.step_loop import StepLoop
from specplug.engines.llama_cpp.stream import Stream
from specplug.engines.llama_cpp.thread_following import follow, thread_count
from specplug.errors import EngineError, UsageError
from specplug.generation.counters import Counters
from specplug.machine import hardware
from specplug.planning.fusion import Fusion
from specplug.planning.speculator import Speculator
from specplug.profile import Profile, Runtime


class SpeculativeLlama(Llama):  # type: ignore[misc]
    """`llama_cpp.Llama`, which answers faster where drafting pays. Takes the same arguments, and a profile.

        llm = SpeculativeLlama("model.gguf", n_ctx=4096)
        answer = llm.create_chat_completion([{"role": "user", "content": "..."}], stream=True)
        print(llm.counters.emitted_tokens / llm.counters.steps)  # tokens per target pass; plain decoding has 1.0

    Each token is sampled by the base class's own sampler chain, in emission order, so the text is that of `Llama` with
    the same seed, up to rounding where two tokens tie. With `exact: true` in the profile it is, to the last bit, the
    text that this class gives without drafts (profile with `proposers: [none]` and `exact: true`).
    With `logits_all=True` or `embedding=True` the base class decodes, without drafts.
    State: the proposers learn over all calls; `counters` are sums over all finished generations.
    """

    n_tokens: int
    """Tokens in the cache, by the base class."""

    n_batch: int
    """Tokens of one pass, by the base class."""

    def __init__(
        self,
        model_path: str,
        *,
        profile: str | Path | Profile = "default",
        verbose: bool = False,
        **options: Any,
    ) -> None:
        """
        profile  its name, its file, or a Profile; only its proposers, planner, `exact` and measurements are used
        verbose  print on stderr what is measured, and llama.cpp's log; the base class does so by default
        options  those of `llama_cpp.Llama`; n_threads and n_threads_batch default to the cores that can be used
        Raises UsageError for a profile that does not fit, EngineError for a library that cannot compute it, and
        ValueError for options that the base class refuses.
        """
        self._stack = ExitStack()  # the base class closes it also where its own __init__ never ran
        if options.get("draft_model") is not None:
            raise UsageError("draft_model: SpeculativeLlama drafts itself; name a profile instead")
        self.profile = profiles.for_own_engine(profile if isinstance(profile, Profile) else profiles.load(profile))
        if self.profile.exact:
            self._check_exact(options)
        self._loop: StepLoop | None = None
        self._rollback: Rollback | None = None
        self._parting = 0
        """Leading tokens of the last prompt that were in the cache."""
        self._under_way: Generator[int, Sequence[int] | None, None] | None = None
        self._aligned = b"", 0
        """The parameters of the context, and the number of rows with logits that aligns its tensors."""
        base_decodes = options.get("logits_all") or options.get("embedding")
        self._decodes = not base_decodes and (self.profile.speculates or self.profile.exact)
        self._max_nodes = self.profile.planner.max_nodes if self.profile.speculates else 0
        sources = fitting_sources(self.profile, Path(model_path), slots=1)
        self._loads_mtp = any(loads_mtp(source, Path(model_path)) for source in sources)
        offloads = bool(options.get("n_gpu_layers")) and can_offload()
        check_drafters(Path(model_path), [self.profile], offloads=offloads, notify=self._notify_always)
        asked = Runtime(gpu_layers=options.get("n_gpu_layers", 0), flash_attention=bool(options.get("flash_attn")))
        self._way = check_model(Path(model_path), asked, self._notify_always)
        if options.get("flash_attn") and not self._way.flash_attention:
            if self.profile.exact or KV_TYPES["q8_0"] in (options.get("type_k"), options.get("type_v")):
                raise EngineError("exact and a q8_0 cache need flash attention, which ends the process here")
            options["flash_attn"] = False
        options.setdefault("n_threads", hardware.usable_cores())
        options.setdefault("n_threads_batch", options["n_threads"])
        super().__init__(model_path, verbose=verbose, **options)
        if self._decodes:
            self._loop = self._open_loop(sources)

    @property
    def counters(self) -> Counters:
        """Sums over all finished generations."""
        return self._loop.counters if self._loop else Counters()

    # -- methods that the base class calls ------------------------------------------------------------------------

    @property
    def context_params(self) -> Any:
        """The base class's parameters of its context, with room for trees."""
        params = self._context_params
        if self._decodes and not hasattr(self, "_ctx"):  # once `_ctx` exists, the parameters describe the open context
            if not hasattr(self, "_model"):
                return params
            rollback = self._choose_rollback()
            set_tree_params(params, rollback.num_ids(1, self._max_nodes), self._max_nodes + 2)
            if rollback.has_states:
                set_state_params(params, rollback.snapshots)
                self.n_batch = min(self.n_batch, params.n_batch)  # the base class divides texts by it
            if not self.model_params.n_gpu_layers:
                if self._aligned[0] != bytes(params):
                    rows = aligned_rows(self._model.model, params, params.n_outputs_max)
                    self._aligned = bytes(params), rows
                params.n_outputs_max = self._aligned[1]
        return params

    @context_params.setter
    def context_params(self, params: Any) -> None:
        self._context_params = params

    @property
    def model_params(self) -> Any:
        """The base class's parameters of its model, with the MTP layer where the profile names it, and without repacked
        weights where the library cannot use them."""
        return self._model_params

    @model_params.setter
    def model_params(self, params: Any) -> None:
        params.use_extra_bufts = params.use_extra_bufts and self._way.repack
        params.load_mtp = self._loads_mtp
        self._model_params = params

    def save_state(self) -> Any:
        self._leave()
        return super().save_state()

    def load_state(self, state: Any) -> None:
        self._leave()
        super().load_state(state)
        if self._loop:
            self._loop.cells.follow_load(0, self._cached())

    def eval(self, tokens: Sequence[int]) -> None:
        if self._loop is None:
            super().eval(tokens)
            return
        self._leave()
        cells = self._loop.cells
        if self.n_tokens <= len(cells.tokens[0]):
            cells.follow_truncation(0, self.n_tokens)
        else:  # something else has filled the cache, such as a handler for images
            cells.follow_load(0, self._cached())
        text = np.append(self._cached(), np.asarray(list(tokens), dtype=np.int32))
        places = cells.places(text, self.n_tokens, self._parting)
        for stop in (*places, len(text)):
            before = self.n_tokens
            try:
                super().eval(text[before:stop].tolist())
            finally:  # if a pass fails, the passes before it have still filled cells
                read = self.n_tokens - before
                cells.append(0, text[before : before + read].tolist(), range(read))
                cells.end_pass(read)
            if stop in places:
                cells.make_checkpoint(0)

    def generate(
        self, tokens: Sequence[int], *args: Any, stopping_criteria: Any = None, **options: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        """As `llama_cpp.Llama.generate`, with several tokens per pass where drafts are accepted.

        A generator of an earlier call that was not finished ends here.
        """
        self._leave()
        if self._loop and options.get("reset", True):
            if self.profile.exact:
                self.reset()  # every prompt is read from its beginning, in the same passes
            elif self._choose_rollback().has_states:
                self._return_to_shared(self._loop, np.asarray(list(tokens), dtype=np.int32))
        base = super().generate(tokens, *args, stopping_criteria=stopping_criteria, **options)
        if self._loop is None:
            yield from base
            return
        token = next(base, None)
        base.close()
        if token is not None:
            _refuse((yield token))
            constraint = constraint_after(token, options.get("logits_processor"))
            self._under_way = self._decode(self._loop, token, constraint, stopping_criteria)
            yield from self._under_way

    def create_chat_completion(self, messages: Any, *args: Any, **options: Any) -> Any:
        """As `llama_cpp.Llama.create_chat_completion`; `response_format` takes OpenAI's form, too, and is always kept.

        An answer that is not streamed has a field `specplug` with `warnings`: what of the schema is not enforced.
        """
        create = partial(super().create_chat_completion, messages, *args)
        return create_constrained(create, self._described.guidance, options)

    @cached_property
    def _described(self) -> Model:
        """The base class's model, for tokens and constraints."""
        model = Model(Path(self.model_path), self._model.model, has_mtp=self._loads_mtp)
        self._stack.callback(model.guidance.close)
        return model

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"profile": self.profile}  # type: ignore[no-any-return]

    # -- passes of the step loop ----------------------------------------------------------------------------------

    def _decode(
        self, loop: StepLoop, token: int, constraint: TokenConstraint | None, stopping_criteria: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        """Yield the tokens after `token`."""
        stream = loop.adopt(self._cached(), token, constraint)
        try:
            while stream.finish is None:
                yield from self._pass(loop, stream, stopping_criteria)
        finally:
            if loop.interrupted:
                self.reset()
            loop.finish(stream)

    def _leave(self) -> None:
        """Close the generator of an earlier call, if it is still open: its cells are needed now."""
        if self._under_way is not None:
            self._under_way.close()
            self._under_way = None

    def _pass(
        self, loop: StepLoop, stream: Stream, stopping_criteria: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        """One target pass; its tokens are sampled one by one, as late as the base class would."""
        stream.left = self._n_ctx - self.n_tokens
        if stream.left < (2 if loop.padded else 1):
            raise RuntimeError(f"llama_decode: the context of {self._n_ctx} tokens is full")
        passed = loop.evaluate([stream])
        (tree,) = passed.trees
        child = tree.children()
        node, row, token = ROOT, tree.first, stream.root
        stream.fresh = []
        try:
            while True:
                self.input_ids[self.n_tokens : self.n_tokens + 1] = token
                self.n_tokens += 1
                self._requires_eval = True  # the last row of this pass need not be that of the last token
                token = int(self._sampler.sample(self._ctx, row - len(passed.logits)))
                stream.fresh.append(token)
                if stopping_criteria is not None and stopping_criteria(self._input_ids, passed.logits[row]):
                    stream.finish = "stop"
                    return
                _refuse((yield token))
                following = child.get((node, token))
                if following is None:
                    return
                tree.accepted.append(following)
                node, row = following, tree.row_of[following]
        finally:
            # Also when the caller closes the generator or a sampler fails: the tokens sampled so far are emitted.
            if stream.fresh:
                del tree.accepted[len(stream.fresh) - 1 :]
                loop.settle(passed)

    def _return_to_shared(self, loop: StepLoop, prompt: IntArray) -> None:
        """Cut a recurrent state to a checkpoint within what it has in common with a prompt.

        The base class would have llama.cpp cut it anywhere, which it reports as done although it is not.
        """
        cells = loop.cells
        self._parting = shared = min(common_prefix(self._cached(), prompt), len(prompt) - 1)
        length = cells.reusable(0, shared) if len(cells.tokens[0]) == self.n_tokens else 0
        if length:
            cells.truncate(0, length)
            self.n_tokens = length
        else:
            self.reset()

    def _choose_rollback(self) -> Rollback:
        if self._rollback is None:
            params = self._context_params
            flash = params.flash_attn_type == llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
            limit = self.profile.runtime.snapshot_mib
            runtime = Runtime(threads=1, flash_attention=flash, gpu_layers=self.model_params.n_gpu_layers)
            own = replace(self.profile, runtime=replace(runtime, snapshot_mib=limit))
            self._rollback = rollback_for(self._described, own, slots=1, notify=self._notify)
        return self._rollback

    def _cached(self) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        """int32[n_tokens]: the tokens in the cache."""
        return np.array(self.input_ids[: self.n_tokens], dtype=np.int32)

    def _open_loop(self, sources: Sequence[Proposer]) -> StepLoop:
        model = self._described
        rollback = self._choose_rollback()
        max_nodes = min(self._max_nodes, self.n_batch - 1)
        context = Context(model, self._ctx.ctx, num_ids=rollback.num_ids(1, self._max_nodes), max_rows=max_nodes + 2)
        runtime = self._runtime()
        # A batch holds the root and all nodes, whatever a profile's own curve covers.
        fitting = replace(self.profile, runtime=runtime, planner=replace(self.profile.planner, max_nodes=max_nodes))
        exact = None
        if fitting.exact:
            exact, fitting = measure_exact_passes(context, fitting, slots=1, notify=self._notify)
        measured = own_cost_points(model, fitting, slots=1, notify=self._notify)
        costs = PassCosts(
            model, runtime, self._max_nodes + 1, measured=measured, padded=exact is not None and exact.padded
        )
        if fitting.speculates:
            self._stack.callback(costs.keep)
            atexit.register(_keep, ref(costs))  # most scripts end without closing the model
        drafters = Drafters()
        self._stack.callback(drafters.close)
        static = fitting.planner.mode == "static"
        drafters.open(sources, context, runtime, slots=1, static=static, notify=self._notify_always)
        fusion = Fusion(drafters.in_place(sources))
        learned = self.profile.measured.acceptance if self.profile.measured else None
        curve = costs.curve(self.n_threads, self.n_threads_batch)
        speculator = Speculator(fusion, curve, fitting, limits=rollback.limits, learned=learned)
        follows = partial(follow, thread_count(runtime), runtime, context, drafters, costs, speculator)
        return StepLoop(
            context,
            speculator,
            slots=1,
            rollback=rollback,
            exact=exact,
            before_pass=None if fitting.exact else follows,
            after_pass=drafters.after_pass if drafters.files else None,
        )

    def _check_exact(self, options: dict[str, Any]) -> None:
        """UsageError for options of the base class with which passes cannot be exact."""
        problem = None
        if not options.get("flash_attn"):
            problem = "exact needs flash attention; pass flash_attn=True"
        elif options.get("n_batch", 2) < 2:
            problem = "exact needs passes of two rows; pass n_batch=2 or more"
        elif options.get("chat_handler") is not None:
            problem = "exact reads every prompt again, which a chat handler for images does not allow; leave it out"
        if problem:
            raise UsageError(f"profile {self.profile.name}: {problem}")

    def _notify(self, text: str) -> None:
        if self.verbose:
            self._notify_always(text)

    def _notify_always(self, text: str) -> None:
        print(f"specplug: {text}", file=sys.stderr)

    def _runtime(self) -> Runtime:
        """The settings that the base class was opened with, as the key of a cached cost curve."""
        params = self._context_params
        kinds = {number: name for name, number in KV_TYPES.items()}
        return Runtime(
            threads=self.n_threads,
            threads_batch=self.n_threads_batch,
            context=self._n_ctx,
            batch=self.n_batch,
            gpu_layers=self.model_params.n_gpu_layers,
            flash_attention=params.flash_attn_type == llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
            kv_type=kinds.get(params.type_k, str(params.type_k)),
        )


def _keep(costs: ref[PassCosts]) -> None:
    found = costs()
    if found is not None:
        found.keep()


def _refuse(sent: Sequence[int] | None) -> None:
    """The base class, too, only takes tokens through `send` where it keeps all logits."""
    if sent:
        raise UsageError("tokens were sent into generate; open the model with logits_all=True for that")
