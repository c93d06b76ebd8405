"""Generation with llama.cpp from a profile: prompts in, answers out, one at a time or several at once.

Opens the parts of the engine: context, drafters, planner and step loop. Depends neither on the command line nor on
files beside the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from time import perf_counter

from specplug import registry
from specplug.core import IntArray, Proposer, Requires, SequenceOptions
from specplug.engines.llama_cpp.cells import SPARE_SHARE
from specplug.engines.llama_cpp.chat_template import NO_TEMPLATE, Message
from specplug.engines.llama_cpp.context import MAX_SEQUENCE_IDS, open_context
from specplug.engines.llama_cpp.drafters import remembered_experience
from specplug.engines.llama_cpp.drafters.model_drafter import ModelDrafter
from specplug.engines.llama_cpp.drafters.opening import Drafters
from specplug.engines.llama_cpp.exact_passes import ExactPasses, measure_exact_passes
from specplug.engines.llama_cpp.measure import own_cost_points
from specplug.engines.llama_cpp.model import Model
from specplug.engines.llama_cpp.pass_costs import PassCosts
from specplug.engines.llama_cpp.rollback import AnyTail
from specplug.engines.llama_cpp.sampling import Sampler
from specplug.engines.llama_cpp.settings_choice import with_settings
from specplug.engines.llama_cpp.state_memory import rollback_for
from specplug.engines.llama_cpp.step_loop import StepLoop
from specplug.engines.llama_cpp.stream import Stream
from specplug.engines.llama_cpp.thread_following import follow, thread_count, threads_now
from specplug.engines.tokenizer_check import check_tokenizer
from specplug.errors import SpecplugError, UsageError
from specplug.generation.answers import Answer, Request, Sampling, with_stop_tokens
from specplug.generation.context_advice import context_advice
from specplug.generation.text import Segment, TextStream
from specplug.planning.experience import Experience
from specplug.planning.fusion import Fusion
from specplug.planning.speculator import Speculator
from specplug.profile import CostPoints, Profile
from specplug.profile.with_drafter import drafter_name
from specplug.proposers.datastore import wait_for_corpora
from specplug.proposers.model_options import ModelOptions

NAME = "llama-cpp"
PROVIDES = Requires(topk=1 << 30, drafter=True, constraint=True)


class LlamaCpp:
    """One context with its proposers, ready to answer. Several may share one Model. Use it in a `with` statement.

    slots      sequences at once
    kv_tokens  tokens that may be cached at once, of all sequences together
    """

    def __init__(
        self,
        model: Model,
        profile: Profile,
        *,
        slots: int = 1,
        kv_tokens: int | None = None,
        cost: CostPoints | None = None,
        remember: bool = False,
        learned: Mapping[str, Sequence[float]] | None = None,
        follow_free_cores: bool = False,
        notify: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Raises UsageError for a profile that does not fit this engine or model.

        kv_tokens  a full context for every slot where None
        cost       T(rows, context) of this machine; taken from the profile, or learned from passes, where None
        remember   continue what was learned of costs and drafters from the user's cache folder, and keep it there
        learned    (hits, misses) by bucket to start from, instead of those of the profile
        follow_free_cores
                   compute with fewer threads while other programs keep cores busy
        """
        self.profile = profile = with_settings(profile, model, many=slots > 1)
        self._notify, self._warned = notify, False
        self.model = model
        self.slots = slots
        self.kv_tokens = kv_tokens or slots * profile.runtime.context
        if self.kv_tokens < profile.runtime.context:
            raise UsageError(
                f"a KV cache of {self.kv_tokens} tokens is less than one context ({profile.runtime.context}); "
                "lower runtime: context"
            )
        sources = fitting_sources(profile, model.path, slots=slots)
        if not remember:  # a comparison
            wait_for_corpora(sources)
        self._rollback = rollback_for(model, profile, slots=slots, notify=notify)
        max_nodes = profile.planner.max_nodes if profile.speculates else 0
        if cost is None:
            cost = own_cost_points(model, profile, slots=slots, notify=notify)
        # Trees, and the last rows of prompts or the second row of `exact`.
        max_rows = max_nodes + 2 * slots
        self.context = open_context(
            model,
            profile.runtime,
            cells=self._cells_needed(max_rows),
            num_ids=self._rollback.num_ids(slots, max_nodes),
            max_rows=max_rows,
            snapshots=self._rollback.snapshots,
        )
        self._learned = {**(profile.measured.acceptance if profile.measured else {}), **(learned or {})}
        self._drafters = Drafters()
        self._experience: dict[int, Experience] = {}
        self._experience_paths: dict[int, Path] = {}
        self._remember = False
        try:
            self._exact: ExactPasses | None = None
            if profile.exact:
                self._exact, self.profile = measure_exact_passes(self.context, profile, slots=slots, notify=notify)
            static = profile.planner.mode == "static"
            self._drafters.open(sources, self.context, profile.runtime, slots=slots, static=static, notify=notify)
            if remember:
                conditions = self.profile.runtime, self.profile.proposers, self.profile.planner, slots > 1
                for index, path in self._drafters.files.items():
                    known = remembered_experience.experience_path(model.path, path, conditions)
                    self._experience_paths[index] = known
                    self._experience[index] = remembered_experience.load(known)
            runtime = self.profile.runtime
            self._costs = PassCosts(
                model, runtime, max_nodes + slots, measured=cost, padded=self.padded, remember=remember
            )
            self._remember = remember and profile.speculates
            # Under `exact`, passes have to round alike, and some kernels divide a row's sum among the threads.
            self._threads = thread_count(runtime) if follow_free_cores and not profile.exact else None
            self.reset(sources)
            self._warn_of_drafters(notify)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        for index, path in self._experience_paths.items():
            with suppress(SpecplugError):  # then nothing is remembered, and drafting starts from what is expected
                remembered_experience.save(self._experience[index], path)
        self._experience_paths = {}
        if self._remember:
            self._remember = False
            self._costs.keep()
        self._drafters.close()
        self.context.close()

    def _warn_of_template(self) -> None:
        if not self.model.chat.is_own and not self._warned:
            self._warned = True
            self._notify(NO_TEMPLATE)

    def _warn_of_drafters(self, notify: Callable[[str], None]) -> None:
        """Say which drafters cannot save time here, by the measured costs."""
        speculator = self.speculator
        if speculator.cost.is_unscaled:
            return
        for index, use in speculator.drafter_uses.items():
            source = use.source
            windowed = isinstance(source, ModelDrafter) and source.window is not None
            context = self.profile.runtime.context if windowed else 0  # long texts are what a window is for
            if self.profile.planner.mode == "measured" and not use.can_pay(context):
                ms = speculator.cost.at(context)
                rows = min(4, len(ms))
                name, token_ms = drafter_name(self.profile.proposers[index]), source.pass_ms(1)
                notify(
                    f"the drafter {name} takes {token_ms:.1f} ms per token, the model {ms[0]:.1f} ms for one token and "
                    f"{ms[rows - 1]:.1f} ms for {rows} at once: no draft of it would save time, so it is not asked"
                )

    @property
    def padded(self) -> bool:
        """Whether passes of one row get a second one, which `exact` needs in some formats."""
        return self._exact is not None and self._exact.padded

    def reset(self, sources: Sequence[Proposer] | None = None) -> None:
        """Forget everything learned and cached, as if just opened (with fresh proposers where none are given).

        An experience that is kept between runs goes on.
        """
        profile = self.profile
        sources = sources if sources is not None else registry.build_sources(profile.proposers)
        fusion = Fusion(self._drafters.in_place(sources))
        self._costs.forget()
        curve = self._costs.curve(*threads_now(self._threads, profile.runtime))
        self.speculator = Speculator(
            fusion, curve, profile, limits=self._rollback.limits, learned=self._learned, experience=self._experience
        )
        self.context.clear()
        parts = (profile.runtime, self.context, self._drafters, self._costs, self.speculator)
        self.loop = StepLoop(
            self.context,
            self.speculator,
            slots=self.slots,
            rollback=self._rollback,
            exact=self._exact,
            before_pass=partial(follow, self._threads, *parts) if self._threads else None,
            after_pass=self._drafters.after_pass if self._drafters.files else None,
        )

    def cached_in(self, prompt: IntArray) -> int:
        """Read a prompt (int32[n], n >= 1) without answering it, and return the slot that holds it.

        No sequence may run.
        """
        self.loop.forget_prompts()
        self.loop.preload(prompt)
        return next(slot for slot, tokens in enumerate(self.loop.cells.tokens) if tokens)

    def learned(self) -> dict[str, tuple[float, float]]:
        """(hits, misses) by bucket, as learned so far."""
        return self.speculator.table.learned()

    def sampler(self, sampling: Sampling) -> Sampler:
        """A sampler, which the sequence that begins with it will own. Raises UsageError for values out of range."""
        return Sampler(self.model, sampling, coupled=self.profile.runtime.coupled)

    def _cells_needed(self, max_rows: int) -> int:
        """Cells for all tokens and the draft of a pass, and a share of them for cells that are retained."""
        cells = self.kv_tokens + max_rows
        if self.slots > 1 or self.profile.speculates:
            cells = cells * SPARE_SHARE // (SPARE_SHARE - 1)
        return -(-cells // 256) * 256

    def chat_prompt(self, messages: Sequence[Message]) -> IntArray:
        """int32[n]: a conversation in the model's own template, ready for the answer."""
        self._warn_of_template()
        return self.model.chat_prompt(messages)

    @property
    def chat_stops(self) -> tuple[str, ...]:
        """Strings that end every answer of a chat."""
        return self.model.chat.stops

    def raw_prompt(self, text: str) -> IntArray:
        """int32[n]: a text to continue; the text of a control token becomes that token."""
        return self.model.raw_prompt(text)

    def stream(self, request: Request, answer: Answer) -> Iterator[list[Segment]]:
        """Fill `answer` step by step; yields the text that each step completes. An abandoned stream frees its slot."""
        began = perf_counter()
        writer = self._start(request, answer)
        try:
            while True:
                released = writer.take()
                answer.seconds = perf_counter() - began
                yield released
                if answer.finish:
                    return
                self.loop.step([writer.stream])
        finally:
            self.loop.finish(writer.stream)

    def generate(self, request: Request) -> Answer:
        """The complete answer to one prompt."""
        answer = Answer()
        for _ in self.stream(request, answer):
            pass
        return answer

    def generate_all(
        self, requests: Sequence[Request], done: Callable[[int, Answer], None] = lambda index, answer: None
    ) -> list[Answer]:
        """Answers to all requests, `slots` at a time; when a slot becomes free, the next request gets it at once."""
        answers: list[Answer | None] = [None] * len(requests)
        waiting = list(enumerate(requests))[::-1]
        writers: dict[int, _Writer] = {}
        began: dict[int, float] = {}
        try:
            while waiting or writers:
                for index in [i for i, w in writers.items() if w.answer.finish]:
                    writer = writers.pop(index)
                    self.loop.finish(writer.stream)
                    writer.answer.seconds = perf_counter() - began[index]
                    answers[index] = writer.answer
                    done(index, writer.answer)
                while waiting and len(writers) < self.slots:
                    index, request = waiting.pop()
                    began[index] = perf_counter()
                    writers[index] = self._start(request, Answer())
                    writers[index].take()
                if writers and not any(w.answer.finish for w in writers.values()):
                    self.loop.step([w.stream for w in writers.values()])
                    for writer in writers.values():
                        writer.take()
        finally:
            for writer in writers.values():
                self.loop.finish(writer.stream)
        return [answer for answer in answers if answer is not None]

    def _start(self, request: Request, answer: Answer) -> _Writer:
        length, context = len(request.prompt), self.profile.runtime.context
        if not length:
            raise UsageError("the prompt is empty; give at least one token")
        if length >= context:
            advice = context_advice(length, self.model.train_context)
            raise UsageError(f"the prompt has {length} tokens, the context {context}; {advice}")
        if request.max_tokens < 1:
            raise UsageError(f"max_tokens is {request.max_tokens}; use at least 1")
        most = min(request.max_tokens, context - length)
        options = SequenceOptions(private=request.private)
        sampling = with_stop_tokens(request.sampling, request.stop, self.model.control_token)
        stream = self.loop.start(request.prompt, self.sampler(sampling), most, options)
        return _Writer(self.model, stream, request.stop, sampling.stop_tokens, answer)


class _Writer:
    """Turns the tokens that one sequence emits into an Answer."""

    def __init__(
        self, model: Model, stream: Stream, stop: tuple[str, ...], stop_tokens: frozenset[int], answer: Answer
    ) -> None:
        self._stop_tokens = stop_tokens
        self.stream = stream
        self.answer = answer
        answer.counters = stream.counters
        self._model = model
        self._text = TextStream(stop)

    def take(self) -> list[Segment]:
        """Move the last step's tokens into the answer; returns the text that they complete. Raises its failure."""
        stream, answer = self.stream, self.answer
        if stream.failure:
            raise stream.failure
        released: list[Segment] = []
        accepted = len(stream.fresh) - 1
        for i, token in enumerate(stream.fresh):
            answer.tokens.append(token)
            if stream.logprobs:
                answer.logprobs.append(stream.logprobs[i])
            if token not in self._model.end_tokens and token not in self._stop_tokens:
                released += self._text.feed(self._model.piece(token), i < accepted)
            if self._text.stopped:
                answer.finish = "stop"
                break
        else:
            answer.finish = stream.finish or ""
        if answer.finish:
            released += self._text.close()
        answer.segments += released
        return released


def fitting_sources(profile: Profile, model_path: Path, *, slots: int) -> list[Proposer]:
    """New proposers of the profile. UsageError if the engine does not provide what they require."""
    sources = registry.build_sources(profile.proposers)
    registry.check_requirements(sources, PROVIDES, NAME)
    check_tokenizer(profile, model_path)
    drafts_with_model = any(isinstance(one, ModelOptions) for one in sources)
    if profile.planner.prune_top_k is not None and profile.speculates and not drafts_with_model:
        raise UsageError(
            f"profile {profile.name}: planner.prune_top_k drops drafts by what a draft model finds likely, and there "
            "is none; add one, or remove the key"
        )
    most = MAX_SEQUENCE_IDS - AnyTail().num_ids(slots, 0)
    if profile.speculates and most < profile.planner.max_nodes:
        raise UsageError(f"profile {profile.name}: {slots} sequences leave {most} nodes; lower planner: max_nodes")
    return sources
