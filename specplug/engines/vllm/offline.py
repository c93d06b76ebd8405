"""vLLM without a server: prompts in, answers out, for run, bench and verify.

Knows `vllm.LLM` and its step loop. Each engine runs in a process of its own, so several can be open at once.
"""

from __future__ import annotations

import atexit
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from time import perf_counter
from typing import Any

from platformdirs import user_cache_dir

from specplug.core import IntArray, int_array
from specplug.engines.vllm.configure import drafts_itself, engine_settings, sources_of, write_profile
from specplug.engines.vllm.counts import read_back
from specplug.engines.vllm.environment import METRICS, QUIET, preload, shared_memory
from specplug.engines.vllm.measure import with_costs
from specplug.engines.vllm.versions import check_interface, require
from specplug.engines.warm_state import check_tokenizer
from specplug.errors import EngineError, UsageError
from specplug.generation.answers import Answer, Request, Sampling, TokenLogprobs
from specplug.generation.text import Segment
from specplug.models import references
from specplug.profile import Profile
from specplug.registry import ProposerSpec

NONE = (ProposerSpec("none"),)

FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
"""Of a model on the hub, what is needed to run it."""

DRAFTED = "vllm:spec_decode_num_draft_tokens"
SENT, SPENT = "specplug:draft_tokens", "specplug:draft_milliseconds"


class Vllm:
    """One engine with one profile, ready to answer. Made by `open_vllm`."""

    def __init__(self, llm: Any, profile: Profile, figures: str) -> None:
        """`figures`: the folder that its processes publish theirs in."""
        self.llm = llm
        self.profile = profile
        self._figures = figures
        self._tokenizer = llm.get_tokenizer()
        self._ids = count()

    @property
    def description(self) -> str:
        config = self.llm.llm_engine.vllm_config
        runner = "V2" if config.use_v2_model_runner else "V1"
        scheduling = "async" if config.scheduler_config.async_scheduling else "synchronous"
        return f"vLLM, {config.model_config.dtype}, {runner} runner, {scheduling} scheduling"

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> IntArray:
        """int32[n]: a conversation in the model's own template, ready for the answer."""
        tokens = self._tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return int_array(tokens)

    def tokenize(self, text: str) -> IntArray:
        return int_array(self._tokenizer.encode(text))

    def text(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def stream(self, request: Request, answer: Answer) -> Iterator[list[Segment]]:
        """Fill `answer` step by step; yields the text of each. An abandoned stream ends its request."""
        yield from self._steps([request], [answer], lambda index: None)

    def generate_all(
        self, requests: Sequence[Request], done: Callable[[int], None] = lambda index: None
    ) -> tuple[list[Answer], list[float]]:
        """The answers, and of each the seconds per token since the last of the prompts was read; 0 where none came."""
        answers = [Answer() for _ in requests]
        early: list[tuple[int, float]] = []
        for _ in self._steps(requests, answers, done):
            if not early and all(answer.tokens for answer in answers):
                last = max(answer.seconds for answer in answers)
                early = [(len(answer.tokens), last) for answer in answers]
        if not early:  # something was asked for no tokens
            return answers, [0.0] * len(answers)
        return answers, [
            max(0.0, answer.seconds - last) / (len(answer.tokens) - count) if len(answer.tokens) > count else 0.0
            for answer, (count, last) in zip(answers, early, strict=True)
        ]

    def _steps(
        self, requests: Sequence[Request], answers: Sequence[Answer], done: Callable[[int], None]
    ) -> Iterator[list[Segment]]:
        from vllm import TokensPrompt

        engine = self.llm.llm_engine
        index_of: dict[str, int] = {}
        drafted, spent_ns = self._drafted(), self._draft_ns()
        began = perf_counter()
        try:
            for index, request in enumerate(requests):
                prompt = TokensPrompt(prompt_token_ids=request.prompt.tolist())
                # vLLM gives its own ids to requests; what comes out carries ours.
                request_id = str(next(self._ids))
                engine.add_request(request_id, prompt, sampling_params(request))
                index_of[request_id] = index
            while index_of:
                released: list[Segment] = []
                for output in engine.step():
                    index = index_of[output.request_id]
                    released += _take(answers[index], output.outputs[0], perf_counter() - began)
                    if output.finished:
                        del index_of[output.request_id]
                        done(index)
                yield released
        except ValueError as error:  # vLLM's own check of a request
            raise UsageError(" ".join(str(error).split())) from None
        finally:
            if index_of:
                engine.abort_request(list(index_of))
            answers[0].counters.draft_tokens += self._drafted() - drafted
            answers[0].counters.draft_ns += self._draft_ns() - spent_ns

    def _drafted(self) -> int:
        """Guesses so far; of vLLM's own methods only the engine that was opened last tells them."""
        ours = read_back(self._figures).get(SENT)
        if ours is not None or not self.profile.speculates:
            return round(ours or 0)
        return sum(int(metric.value) for metric in self.llm.get_metrics() if metric.name == DRAFTED)

    def _draft_ns(self) -> int:
        """What our drafting has taken so far, up to a fraction of a second ago."""
        if not self.profile.speculates:
            return 0
        return round(read_back(self._figures).get(SPENT, 0.0) * 1e6)


@contextmanager
def open_vllm(
    ref: str,
    profile: Profile,
    *,
    notify: Callable[[str], None] = lambda text: None,
    engines: int = 1,
    **further: Any,
) -> Iterator[Vllm]:
    """A profile on a model, its costs measured where they must be.

    engines  that are open at once, this one among them: they share the memory
    further  settings of `vllm.LLM` that win
    """
    memory = shared_memory(engines, profile.vllm.gpu_memory_utilization)
    model, settings, profile = prepare(ref, profile, notify=notify, further={**memory, **further})
    with open_llm(model, settings) as (llm, figures):
        yield Vllm(llm, profile, figures)


def prepare(
    ref: str,
    profile: Profile,
    *,
    notify: Callable[[str], None],
    further: Mapping[str, Any],
    measured_with: Mapping[str, Any] | None = None,
) -> tuple[str, dict[str, Any], Profile]:
    """The model as vLLM takes it, the settings to open it with, and the profile with the costs.

    Costs that nothing knows are measured here, `measured_with` settings that are given to vLLM in another way.
    """
    require()
    if profile.runtime.threads is not None:
        notify("threads are not set for vLLM: it takes VLLM_CPU_OMP_THREADS_BIND")
    sources = sources_of(profile)
    model = model_for(ref)
    plain = {**engine_settings(replace(profile, proposers=NONE), ""), **further}
    if not profile.speculates:
        return model, plain, profile
    if not drafts_itself(sources):
        folder = folder_of(model)
        check_tokenizer(profile, folder)
        check_interface()
        if profile.planner.mode != "static":
            memory = shared_memory(1, profile.vllm.gpu_memory_utilization)
            profile = with_costs(profile, model, {**memory, **plain, **(measured_with or {})}, folder, notify=notify)
    path = write_profile(profile, Path(user_cache_dir("specplug")) / "vllm")
    return model, {**engine_settings(profile, path, model), **further}, profile


def model_for(ref: str) -> str:
    """A folder for a packaged model, made where it is not yet; a path as it is; else a name that vLLM knows."""
    if ref.startswith("demo:"):
        from specplug.transforms.dequantise import checkpoint_of

        return str(checkpoint_of(ref))
    if Path(ref).expanduser().exists() or ref.startswith((".", "/", "~")) or ref.count("/") != 1:
        return str(references.resolve(ref))
    return ref


def folder_of(model: str) -> Path:
    """Where the files of what `model_for` gave are: a name's are fetched, as vLLM would. UsageError where none are."""
    if Path(model).exists():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=FILES))
    except Exception as error:  # no such name, no network, no rights: each has an exception of its own
        raise UsageError(f"{model}: cannot be fetched ({' '.join(str(error).split())[:300]})") from None


@contextmanager
def open_llm(model: str, settings: Mapping[str, Any]) -> Iterator[tuple[Any, str]]:
    """A `vllm.LLM` that is shut down at the end, and the folder in which its processes publish their figures.

    EngineError, in one line, when vLLM refuses to start.
    """
    require()
    figures = figures_folder()
    with _environment({METRICS: figures, **{k: os.environ.get(k, v) for k, v in QUIET.items()}, **preload(os.environ)}):
        from vllm import LLM

        try:
            llm = LLM(model, **settings, disable_log_stats=False, use_tqdm_on_load=False)
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            raise EngineError(f"vLLM does not start with {model}: {' '.join(str(cause).split())[:500]}") from error
        try:
            yield llm, figures
        finally:
            llm.llm_engine.engine_core.shutdown()


@contextmanager
def _environment(wanted: Mapping[str, str]) -> Iterator[None]:
    """These variables for the processes that are started inside."""
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def figures_folder() -> str:
    """A fresh folder for an engine's figures; it goes when this process ends."""
    folder = mkdtemp(prefix="specplug-")
    atexit.register(rmtree, folder, ignore_errors=True)
    return folder


def sampling_params(request: Request) -> Any:
    """vLLM's own for a request. UsageError for what it cannot do."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    how: Sampling = request.sampling
    constraint = None
    if how.grammar is not None or how.json_schema is not None:
        try:
            schema = json.loads(how.json_schema) if how.json_schema is not None else None
            constraint = StructuredOutputsParams(grammar=how.grammar, json=schema)
        except ValueError as error:
            raise UsageError(f"grammar or schema: {' '.join(str(error).split())}") from None
    sampled = how.temperature > 0
    try:
        return SamplingParams(
            temperature=how.temperature,
            top_k=how.top_k if sampled else 0,
            top_p=how.top_p if sampled else 1.0,
            min_p=how.min_p if sampled else 0.0,
            seed=how.seed if sampled else None,
            repetition_penalty=how.repeat_penalty,
            frequency_penalty=how.frequency_penalty,
            presence_penalty=how.presence_penalty,
            logit_bias=how.logit_bias or None,
            logprobs=how.logprobs,
            max_tokens=request.max_tokens,
            stop=list(request.stop) or None,
            structured_outputs=constraint,
            output_kind=RequestOutputKind.DELTA,
        )
    except ValueError as error:
        raise UsageError(" ".join(str(error).split())) from None


def _take(answer: Answer, output: Any, seconds: float) -> list[Segment]:
    """Enter what one step brought; its text."""
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
        top = sorted(((other, line.logprob) for other, line in found.items()), key=lambda pair: -pair[1])
        answer.logprobs.append(TokenLogprobs(found[token].logprob, top))
    if output.finish_reason is not None:
        answer.finish = output.finish_reason
    segments = [Segment(output.text, len(tokens) > 1)] if output.text else []
    answer.segments += segments
    return segments
