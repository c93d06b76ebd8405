"""Answers prompts with `vllm.LLM` and its step loop, without a server: for run, bench, tune and verify.

Each engine runs in a process of its own, so several can be open at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from time import perf_counter
from typing import Any

from specplug.constraints.grammar_text import grammar_text, json_document
from specplug.core import IntArray, int_array
from specplug.engines.tokenizer_check import check_tokenizer
from specplug.engines.vllm.configure import (
    engine_settings,
    is_vllm_method,
    proposers_of,
    runs_model,
    write_profile,
)
from specplug.engines.vllm.draft_counters import read_counters
from specplug.engines.vllm.engine_process import open_llm
from specplug.engines.vllm.environment import quiet, shared_memory
from specplug.engines.vllm.located_model import located_model
from specplug.engines.vllm.measure import with_costs
from specplug.engines.vllm.runner_choice import PLAIN, on_v2, runs_on_v2
from specplug.engines.vllm.v2.adaptive import is_adaptive
from specplug.engines.vllm.v2.device_forms import running_the_target
from specplug.engines.vllm.v2.device_memory import shards_within
from specplug.engines.vllm.v2.v2_interface import check_v2_interface
from specplug.engines.vllm.v2.verified_lengths import with_verified_lengths
from specplug.engines.vllm.versions import check_interface, require
from specplug.errors import UsageError
from specplug.generation.answers import Answer, Request, Sampling, TokenLogprobs
from specplug.generation.text import Segment
from specplug.machine import hardware
from specplug.machine.folders import cache_folder
from specplug.profile import Profile
from specplug.proposers.datastore import Datastore

VLLM_DRAFT_TOKENS = "vllm:spec_decode_num_draft_tokens"
DRAFT_TOKENS, DRAFT_MILLISECONDS = "specplug:draft_tokens", "specplug:draft_milliseconds"


class Vllm:
    """One engine with one profile, ready to answer. `open_vllm` creates it."""

    def __init__(self, llm: Any, profile: Profile, metrics_folder: str) -> None:
        """`metrics_folder` is the folder where the engine's processes write their metrics."""
        self.llm = llm
        self.profile = profile
        self._metrics_folder = metrics_folder
        self._tokenizer = llm.get_tokenizer()
        self._ids = count()

    @property
    def description(self) -> str:
        config = self.llm.llm_engine.vllm_config
        runner = "V2" if config.use_v2_model_runner else "V1"
        scheduling = "async" if config.scheduler_config.async_scheduling else "synchronous"
        return f"vLLM, {config.model_config.dtype}, {runner} runner, {scheduling} scheduling"

    def learned(self) -> dict[str, tuple[float, float]]:
        return {}

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> IntArray:
        """int32[n]: a conversation in the model's chat template, up to the start of the answer."""
        tokens = self._tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return int_array(tokens)

    chat_stops: tuple[str, ...] = ()

    def raw_prompt(self, text: str) -> IntArray:
        return int_array(self._tokenizer.encode(text))

    def text(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def stream(self, request: Request, answer: Answer) -> Iterator[list[Segment]]:
        """Fill `answer` step by step, and yield the text of each step. Closing the stream aborts the request."""
        yield from self._steps([request], [answer], lambda index: None)

    def generate_all(
        self, requests: Sequence[Request], done: Callable[[int], None] = lambda index: None
    ) -> tuple[list[Answer], list[float]]:
        """The answers, and for each the seconds per token after all prompts were processed.

        The seconds are 0 for an answer that got no token after that.
        """
        answers = [Answer() for _ in requests]
        decode_start: list[tuple[int, float]] = []  # by answer: tokens, and the time when all prompts were processed
        for _ in self._steps(requests, answers, done):
            if not decode_start and all(answer.tokens for answer in answers):
                start = max(answer.seconds for answer in answers)
                decode_start = [(len(answer.tokens), start) for answer in answers]
        if not decode_start:  # a request was for no tokens
            return answers, [0.0] * len(answers)
        return answers, [
            max(0.0, answer.seconds - start) / (len(answer.tokens) - count) if len(answer.tokens) > count else 0.0
            for answer, (count, start) in zip(answers, decode_start, strict=True)
        ]

    def _steps(
        self, requests: Sequence[Request], answers: Sequence[Answer], done: Callable[[int], None]
    ) -> Iterator[list[Segment]]:
        from vllm import TokensPrompt

        engine = self.llm.llm_engine
        index_of: dict[str, int] = {}
        draft_tokens, draft_ns = self._draft_tokens(), self._draft_ns()
        began = perf_counter()
        try:
            for index, request in enumerate(requests):
                prompt = TokensPrompt(prompt_token_ids=request.prompt.tolist())
                # vLLM uses ids of its own inside; its outputs have the id that is passed here.
                request_id = str(next(self._ids))
                engine.add_request(request_id, prompt, sampling_params(request))
                index_of[request_id] = index
            while index_of:
                released: list[Segment] = []
                for output in engine.step():
                    index = index_of[output.request_id]
                    released += _append_output(answers[index], output.outputs[0], perf_counter() - began)
                    if output.finished:
                        del index_of[output.request_id]
                        done(index)
                yield released
        except ValueError as error:  # vLLM rejected a request
            raise UsageError(" ".join(str(error).split())) from None
        finally:
            if index_of:
                engine.abort_request(list(index_of))
            answers[0].counters.draft_tokens += self._draft_tokens() - draft_tokens
            answers[0].counters.draft_ns += self._draft_ns() - draft_ns

    def _draft_tokens(self) -> int:
        """Draft tokens so far. For vLLM's own methods, only the engine that was opened last reports them."""
        on_v2 = self.llm.llm_engine.vllm_config.use_v2_model_runner  # our counters are up to a step late there
        ours = None if on_v2 else read_counters(self._metrics_folder).get(DRAFT_TOKENS)
        if ours is not None or not self.profile.speculates:
            return round(ours or 0)
        return sum(int(metric.value) for metric in self.llm.get_metrics() if metric.name == VLLM_DRAFT_TOKENS)

    def _draft_ns(self) -> int:
        """Time spent on our drafting so far; the value is up to a fraction of a second old."""
        if not self.profile.speculates:
            return 0
        return round(read_counters(self._metrics_folder).get(DRAFT_MILLISECONDS, 0.0) * 1e6)


@contextmanager
def open_vllm(
    ref: str,
    profile: Profile,
    *,
    notify: Callable[[str], None] = lambda text: None,
    engines: int = 1,
    **overrides: Any,
) -> Iterator[Vllm]:
    """An engine for a model with a profile; the costs of passes are measured first if necessary.

    engines    number of engines that are open at once, including this one: they share the memory
    overrides  settings of `vllm.LLM` that override the profile's
    """
    memory = shared_memory(engines, profile.vllm.gpu_memory_utilization)
    model, settings, profile = prepare(ref, profile, notify=notify, overrides={**memory, **overrides})
    with open_llm(model, settings) as (llm, metrics_folder):
        yield Vllm(llm, profile, metrics_folder)


@quiet()
def prepare(
    ref: str,
    profile: Profile,
    *,
    notify: Callable[[str], None],
    overrides: Mapping[str, Any],
    measured_with: Mapping[str, Any] | None = None,
    replicas: int = 1,
) -> tuple[str, dict[str, Any], Profile]:
    """The path of the model, the settings to open it with, and the profile with costs.

    Missing costs are measured here.

    overrides      settings that override the profile's
    measured_with  further settings for measuring, which the caller passes to vLLM in another way
    replicas       engines that share the requests
    """
    require()
    if profile.runtime.threads is not None:
        notify("specplug does not set the number of threads for vLLM; set VLLM_CPU_OMP_THREADS_BIND instead")
    proposers = proposers_of(profile)
    folder = located_model(ref)
    model = str(folder)
    plain = {**engine_settings(replace(profile, proposers=PLAIN), ""), **overrides}
    if not profile.speculates:
        return model, plain, profile
    v2 = adaptive = False
    opened_with = {**plain, **(measured_with or {})}
    if is_vllm_method(proposers):
        # Without a GPU, vLLM need not be imported to know.
        on_gpu = runs_model(proposers) and bool(hardware.gpus())
        adaptive = on_gpu and on_v2(model, opened_with) and is_adaptive(profile, opened_with, notify)
    else:
        check_tokenizer(profile, folder)
        v2 = runs_on_v2(profile, model, opened_with, replicas=replicas, notify=notify)
        if v2:
            check_v2_interface()
            for one in proposers:
                if isinstance(one, Datastore):
                    notify(shards_within(one)[1])
            adaptive = is_adaptive(profile, opened_with, notify)
            is_open = not adaptive and not profile.vllm.tokens_per_batch_size and profile.planner.mode != "static"
            if is_open and running_the_target(proposers):
                notify(
                    f"{running_the_target(proposers)[0]}: how many of its draft tokens are right depends on the model, "
                    "so num_speculative_tokens are verified in every step; tokens_per_batch_size changes that"
                )
            elif is_open:
                memory = shared_memory(1, profile.vllm.gpu_memory_utilization)
                ref = write_profile(profile, cache_folder() / "vllm")
                profile = with_verified_lengths(profile, model, {**memory, **opened_with}, folder, ref, notify=notify)
                if not profile.speculates:
                    return model, plain, profile
        else:
            check_interface()
            if profile.planner.mode != "static":
                memory = shared_memory(1, profile.vllm.gpu_memory_utilization)
                profile = with_costs(profile, model, {**memory, **opened_with}, folder, notify=notify)
    path = write_profile(profile, cache_folder() / "vllm")
    settings = engine_settings(profile, path, model, v2=v2, adaptive=adaptive)
    return model, {**settings, **overrides}, profile


def sampling_params(request: Request) -> Any:
    """vLLM's sampling parameters for a request. UsageError for values that vLLM rejects."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    sampling: Sampling = request.sampling
    constraint = None
    grammar_text(sampling)
    try:
        if sampling.json_schema is not None:
            schema, _ = json_document(sampling.json_schema, strict=sampling.strict)
            constraint = StructuredOutputsParams(json=schema)
        elif sampling.regex is not None:
            constraint = StructuredOutputsParams(regex=sampling.regex)
        elif sampling.constraints:
            constraint = StructuredOutputsParams(grammar=sampling.lark or sampling.grammar)
    except ValueError as error:
        raise UsageError(f"constraint: {' '.join(str(error).split())}") from None
    random = sampling.temperature > 0
    try:
        return SamplingParams(
            temperature=sampling.temperature,
            top_k=sampling.top_k if random else 0,
            top_p=sampling.top_p if random else 1.0,
            min_p=sampling.min_p if random else 0.0,
            seed=sampling.seed if random else None,
            repetition_penalty=sampling.repeat_penalty,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            logit_bias=sampling.logit_bias or None,
            logprobs=sampling.logprobs,
            max_tokens=request.max_tokens,
            stop=list(request.stop) or None,
            stop_token_ids=sorted(sampling.stop_tokens) or None,
            min_tokens=min(sampling.min_tokens, request.max_tokens),
            structured_outputs=constraint,
            output_kind=RequestOutputKind.DELTA,
        )
    except ValueError as error:
        raise UsageError(" ".join(str(error).split())) from None


def _append_output(answer: Answer, output: Any, seconds: float) -> list[Segment]:
    """Append one step's output to the answer, and return its text."""
    tokens = list(output.token_ids)
    if not answer.tokens:
        answer.counters.prompt_ns = round(seconds * 1e9)
    elif tokens:
        answer.counters.steps += 1
        answer.counters.emitted_tokens += len(tokens)
        answer.counters.accepted_tokens += len(tokens) - 1
    answer.tokens += tokens
    answer.seconds = seconds
    for token, found in zip(tokens, output.logprobs or (), strict=False):
        top = sorted(((other, entry.logprob) for other, entry in found.items()), key=lambda pair: -pair[1])
        answer.logprobs.append(TokenLogprobs(found[token].logprob, top))
    if output.finish_reason is not None:
        answer.finish = output.finish_reason
    segments = [Segment(output.text, len(tokens) > 1)] if output.text else []
    answer.segments += segments
    return segments
