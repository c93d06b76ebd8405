"""Log probabilities of a prompt's tokens: those of one pass over the complete text, however it is divided."""

from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")

from tiny_architectures import ARCHITECTURES

from specplug.core import IntArray, int_array
from specplug.engines.llama_cpp.context import open_context
from specplug.engines.llama_cpp.model import Model, load_model
from specplug.engines.llama_cpp.prompt_scores import scored_rows
from specplug.engines.llama_cpp.serving_engine import ServingEngine
from specplug.engines.llama_cpp.stream import Stream
from specplug.generation.answers import Sampling, TokenLogprobs
from specplug.profile import CostPoints, PlannerSettings, Profile, Runtime
from specplug.registry import ProposerSpec

RUNTIME = Runtime(threads=1, context=256, kv_type="f32", flash_attention=False)
PROFILE = Profile(
    "scored",
    proposers=(ProposerSpec("suffix"),),
    planner=PlannerSettings(mode="static", max_nodes=4),
    runtime=RUNTIME,
)
COST = CostPoints((128,), (1, 16), ((1.0, 1.001),))
PROMPTS = [int_array(np.random.default_rng(seed).integers(0, 2000, size)) for seed, size in ((1, 61), (2, 30), (3, 1))]


@pytest.fixture(scope="module", params=["llama", "lfm2", "mamba2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = tmp_path_factory.mktemp("scored") / "model.gguf"
    ARCHITECTURES[request.param](path, seed=5, layers=2)
    with load_model(path, RUNTIME) as opened:
        yield opened


def direct(model: Model, text: IntArray) -> list[float]:
    """By one pass with logits for every row."""
    rows = len(text)
    with open_context(model, RUNTIME, cells=256, num_ids=1, max_rows=rows) as context:
        context.add_span(text, 0, 0, wanted=True)
        context.decode()
        logits = context.logits(rows).astype(np.float64)
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)
    return [float(np.log(probs[at, token])) for at, token in enumerate(text[1:].tolist())]


def test_scores_are_those_of_a_direct_evaluation_beside_running_answers(model: Model) -> None:
    with ServingEngine(model, PROFILE, slots=4, cost=COST) as engine:
        loop = engine.loop
        assert engine.loop.context.max_rows < len(PROMPTS[0]), "the longest prompt needs several passes"
        greedy, scoring = Sampling(), Sampling(prompt_logprobs=2)
        other = loop.start(PROMPTS[0], engine.sampler(greedy), 200)
        streams = [loop.begin(prompt, engine.sampler(scoring), 1, 4) for prompt in PROMPTS]
        while reading := [stream for stream in streams if stream.reading]:
            loop.step([other], reading)
        for prompt, stream in zip(PROMPTS, streams, strict=True):
            assert stream.failure is None and stream.finish == "length"
            assert [one.logprob for one in stream.prompt_logprobs] == pytest.approx(direct(model, prompt), abs=1e-3)
            assert all(
                len(one.top) == 2 and one.top[0][1] >= max(one.logprob, one.top[1][1]) for one in stream.prompt_logprobs
            )
            assert _sampled_alike(stream, prompt, model)
        for stream in (*streams, other):
            loop.finish(stream)


def _sampled_alike(stream: Stream, prompt: IntArray, model: Model) -> bool:
    """Whether the first token after a scored prompt is the likeliest one."""
    with open_context(model, RUNTIME, cells=256, num_ids=1, max_rows=1) as context:
        return int(context.read(prompt)[0].argmax()) == stream.fresh[0]


def test_a_scored_prompt_is_read_anew(model: Model) -> None:
    """Cached tokens have no logits any more."""
    with ServingEngine(model, PROFILE, slots=1, cost=COST) as engine:
        for sampling, cached in ((Sampling(), 0), (Sampling(prompt_logprobs=0), 0)):
            stream = engine.loop.start(PROMPTS[1], engine.sampler(sampling), 1)
            assert stream.cached == cached
            engine.loop.finish(stream)
        assert len(stream.prompt_logprobs) == len(PROMPTS[1]) - 1


class _Reads:
    """A stream that reads; `top` as `top_of_prompt`."""

    def __init__(self, top: int | None) -> None:
        self.top_of_prompt = top


@pytest.mark.parametrize(
    ("tops", "given", "room", "rows"),
    [
        ([None, None], [100, 50], 8, {0: 100, 1: 50}),
        ([1], [100], 8, {0: 8}),
        ([1, 1], [5, 100], 8, {0: 5, 1: 3}),
        ([1, None], [100, 50], 8, {0: 7, 1: 50}),
        ([1, 1], [8, 8], 8, {0: 8}),
        ([None, 0], [0, 9], 4, {1: 4}),
    ],
)
def test_rows_with_logits_stay_within_the_room(
    tops: list[int | None], given: list[int], room: int, rows: dict[int, int]
) -> None:
    reading = [_Reads(top) for top in tops]
    found = scored_rows(reading, given, room)  # type: ignore[arg-type]
    assert {reading.index(stream): count for stream, count in found} == rows  # type: ignore[arg-type]


def test_log_probabilities_sum_to_one() -> None:
    from specplug.engines.llama_cpp.sampling import token_logprobs

    logits = np.log(np.array([1, 2, 5], dtype=np.float32))
    found = token_logprobs(logits, 0, 3)
    assert found == TokenLogprobs(
        pytest.approx(np.log(1 / 8)), [(t, pytest.approx(np.log(p / 8))) for t, p in ((2, 5), (1, 2), (0, 1))]
    )
