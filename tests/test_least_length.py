"""A least length of an answer, alone and with drafts; temperatures that are zero in effect."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("llama_cpp")

from specplug import profile
from specplug.core import int_array
from specplug.engines.llama_cpp.engine import LlamaCpp
from specplug.engines.llama_cpp.least_length import LeastLength
from specplug.engines.llama_cpp.model import Model
from specplug.generation.answers import LEAST_TEMPERATURE, Request, Sampling
from specplug.profile import PlannerSettings
from specplug.registry import ProposerSpec

ENDS = {1, 3}


def test_the_tokens_that_end_an_answer_are_allowed_after_so_many_others() -> None:
    logits = np.array([0.0, 5.0, 1.0, 4.0], dtype=np.float32)
    constraint = LeastLength(ENDS, 2)
    for _ in range(2):
        assert constraint.best(logits) == 2
        assert constraint.rows(logits, None).tolist() == [0, 2]
        assert constraint.rows(logits[:2], int_array([3, 0])).tolist() == [1]
        constraint.copy().accept(2)
        constraint.accept(2)
    assert constraint.best(logits) == 1
    assert constraint.rows(logits, None).tolist() == [0, 1, 2, 3]


def test_where_only_those_are_left_there_is_no_token() -> None:
    logits = np.array([-np.inf, 5.0, -np.inf, 4.0], dtype=np.float32)
    assert LeastLength(ENDS, 1).best(logits) is None


@pytest.mark.llama
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_an_answer_is_that_long_with_drafts_and_without(q8_0: Model, temperature: float) -> None:
    prompt = q8_0.chat_prompt([{"role": "user", "content": "Say hi."}])
    texts = []
    for methods in (("none",), ("suffix", "token_recycling")):
        specs = tuple(ProposerSpec(method) for method in methods)
        chosen = replace(profile.load("none"), proposers=specs, planner=PlannerSettings(mode="static", max_nodes=6))
        with LlamaCpp(q8_0, chosen) as engine:
            sampling = Sampling(temperature=temperature, seed=5)
            least = len(engine.generate(Request(prompt, 80, sampling)).tokens) + 4
            answer = engine.generate(Request(prompt, least + 8, replace(sampling, min_tokens=least)))
            assert len(answer.tokens) > least and not set(answer.tokens[:least]) & q8_0.end_tokens
            texts.append(answer.tokens)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("temperature", [1e-38, 1e-45, LEAST_TEMPERATURE / 2])
def test_a_temperature_that_float32_cannot_divide_by_is_greedy(temperature: float) -> None:
    assert Sampling(temperature=temperature).is_argmax
    assert not Sampling(temperature=1e-6).is_argmax
