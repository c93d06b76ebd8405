"""Heads as rows of tune's table: what it records of them, and predicts from that, is what they do live.

On models that count, whose heads know the next token for some tokens: tests/counting_models.py.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")

from counting_models import FIRST, counting_eagle3, counting_llama, counting_qwen35, hidden_tokens, next_tokens
from heads_anew import RUNTIME

from specplug.engines.llama_cpp.engine import LlamaCpp
from specplug.generation.answers import Request
from specplug.profile import CostPoints, PlannerSettings, Profile
from specplug.profile.with_drafter import drafter_name
from specplug.registry import ProposerSpec
from specplug.tune.candidates import Setting, grid
from specplug.tune.drafter_trace import drafter_key
from specplug.tune.expense import Expense
from specplug.tune.llama_cpp import LlamaCppSubject
from specplug.tune.prediction import Costs
from specplug.tune.replay import replay
from specplug.tune.trace import Answer, Trace

LONG, SHARE, TOKENS, CHAIN = 1000, 0.3, 60, 3
PROMPTS = [np.array([40, 41 + n, FIRST + 200 * n], dtype=np.int32) for n in range(3)]
FREE = CostPoints((1,), (1, 8), ((10.0, 10.1),))


@pytest.fixture(params=["mtp", "eagle3"])
def named(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, ProposerSpec]:
    """A model, and a head that does not know some tokens."""
    hidden = hidden_tokens(LONG, SHARE)
    if request.param == "mtp":
        return counting_qwen35(tmp_path / "model.gguf", length=LONG, hidden=hidden), ProposerSpec("mtp")
    head = counting_eagle3(tmp_path / "head.gguf", length=LONG, hidden=hidden)
    return counting_llama(tmp_path / "model.gguf", length=LONG), ProposerSpec("eagle3", {"model": str(head)})


def test_a_head_is_in_the_table_and_its_replay_takes_the_steps_of_the_live_engine(
    named: tuple[Path, ProposerSpec],
) -> None:
    path, spec = named
    base = Profile("base", runtime=replace(RUNTIME, context=512))
    answers = []
    for place, prompt in enumerate(PROMPTS):
        tokens = np.array(next_tokens(int(prompt[-1]), TOKENS, LONG), dtype=np.int32)
        answers.append(Answer(f"p{place}", 0, "toy", prompt, tokens, np.zeros((TOKENS - 1, 1), dtype=np.int32)))
    subject = LlamaCppSubject(path, base, drafters=[spec])
    try:
        rows = grid(subject.provides, trees=False, named=[spec])
        methods = {setting.method for setting in rows}
        assert {spec.method, f"suffix + {spec.method}", f"ngram + {spec.method}"} <= methods
        setting = Setting((spec,), PlannerSettings(mode="static", max_nodes=CHAIN, trees=False))
        assert setting in rows
        traced = subject.trace_drafter(spec, answers, 1, 60.0, lambda share: None)
        trace = Trace({"max_tokens": TOKENS}, tuple(answers))
        predicted = replay(setting, trace, Costs(FREE, Expense(), drafters={drafter_key(spec): traced}))
        with LlamaCpp(subject._model, setting.profile(subject.profile, "live"), cost=FREE) as engine:
            live = [engine.generate(Request(answer.prompt, TOKENS)) for answer in answers]
    finally:
        subject.close()
    assert [answer.tokens for answer in live] == [answer.tokens.tolist() for answer in answers]
    assert [sums.steps for sums in predicted.answers] == [answer.counters.steps for answer in live]
    assert 1.8 < predicted.total.mean_acceptance_length < 1 + CHAIN


def test_heads_with_different_rows_have_names_of_their_own() -> None:
    specs = [
        ProposerSpec("mtp"),
        ProposerSpec("mtp", {"head": "/folder/small"}),
        ProposerSpec("mtp", {"head": "drafter:a"}),
    ]
    assert [drafter_name(spec) for spec in specs] == ["mtp", "mtp, head small", "mtp, head drafter:a"]
    setting = Setting((specs[1],), PlannerSettings(mode="static", max_nodes=2, trees=False))
    assert setting.name == "mtp(head=small), static 2 chain"
