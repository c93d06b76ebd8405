"""Heads that know what their model says next: how much is accepted, and what the planner makes of it.

tests/counting_models.py says which draft tokens are right.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")

from counting_models import FIRST, counting_eagle3, counting_llama, counting_qwen35, hidden_tokens, next_tokens
from heads_anew import RUNTIME
from tiny_architectures import eagle3, qwen35_mtp

from specplug.engines.llama_cpp.drafters.head_drafter import HeadDrafter
from specplug.engines.llama_cpp.engine import LlamaCpp
from specplug.engines.llama_cpp.model import load_model
from specplug.generation.answers import Request, Sampling
from specplug.generation.counters import Counters
from specplug.profile import CostPoints, PlannerSettings, Profile
from specplug.registry import ProposerSpec

FREE_ROWS = CostPoints((128,), (1, 64), ((30.0, 30.1),))
"""A cost curve under which every draft pays, beside passes of a head that are many times shorter."""

CHEAP_PASSES = CostPoints((128,), (1, 64), ((0.02, 0.021),))
"""One under which a pass costs less than a pass of any head."""

COSTLY_ROWS = CostPoints((128,), (1, 64), ((30.0, 660.0),))
"""One under which a draft token costs a third of a pass."""

LENGTH = 4
"""Tokens of a draft."""

LONG = 1000
"""Tokens of a cycle that no answer here sees twice, so that a lookup knows nothing of it."""

SHORT = 60
"""Tokens of a cycle that an answer sees several times."""

PROMPT = np.array([40, 41, 42, FIRST + 7], dtype=np.int32)
METHODS = ("mtp", "eagle3")


class Files:
    """Models and heads in one folder, written once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def of(self, method: str, length: int = LONG, share: float = 0.0) -> tuple[Path, ProposerSpec]:
        """The model that counts to `length`, and a head to which this share of the tokens is hidden."""
        hidden = hidden_tokens(length, share)
        if method == "mtp":
            path = self.folder / f"mtp-{length}-{share}.gguf"
            if not path.exists():
                counting_qwen35(path, length=length, hidden=hidden)
            return path, ProposerSpec("mtp", {"max_draft": LENGTH})
        path, head = self.folder / f"llama-{length}.gguf", self.folder / f"eagle3-{length}-{share}.gguf"
        if not head.exists():
            counting_llama(path, length=length)
            counting_eagle3(head, length=length, hidden=hidden)
        return path, ProposerSpec("eagle3", {"model": str(head), "max_draft": LENGTH})

    def random(self, method: str) -> tuple[Path, ProposerSpec]:
        """A random model with a random head, which is never right."""
        if method == "mtp":
            return qwen35_mtp(self.folder / "random.gguf", seed=1), ProposerSpec("mtp")
        head = eagle3(self.folder / "random-head.gguf", seed=3)
        return self.of(method)[0], ProposerSpec("eagle3", {"model": str(head)})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("counting"))


def profile_of(*specs: ProposerSpec, mode: str = "static", trees: bool = True) -> Profile:
    planner = PlannerSettings(mode=mode, max_nodes=2 * LENGTH, trees=trees)
    return Profile("head", proposers=specs, planner=planner, runtime=replace(RUNTIME, context=1024))


@contextmanager
def opened(path: Path, profile: Profile, cost: CostPoints) -> Iterator[LlamaCpp]:
    mtp = profile.proposers[-1].method == "mtp"
    with load_model(path, profile.runtime, mtp=mtp) as model, LlamaCpp(model, profile, cost=cost) as engine:
        yield engine


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize(("method", "branches"), [("mtp", 1), ("eagle3", 1), ("eagle3", 2)])
def test_as_many_tokens_are_accepted_as_the_head_knows(method: str, branches: int, share: float, files: Files) -> None:
    """Chains of a hybrid model and of one with attention, and trees of that, which have what is hidden from a chain."""
    path, spec = files.of(method, share=share)
    spec = replace(spec, options={**spec.options, "branches": branches})
    profile, hidden = profile_of(spec), set(hidden_tokens(LONG, share))
    found, expected = [], []
    with opened(path, profile, FREE_ROWS) as engine:
        stream = engine.loop.start(PROMPT, engine.sampler(Sampling()), 1000)
        token = stream.fresh[-1]
        for _ in range(40):
            following = next_tokens(token, LENGTH + 1, LONG)
            right = next((depth for depth, one in enumerate(following[:-1]) if one in hidden), LENGTH)
            expected.append(following[: 1 + min(LENGTH, right + branches - 1)])
            engine.loop.step([stream])
            found.append(list(stream.fresh))
            token = found[-1][-1]
    assert found == expected
    assert len({len(one) for one in found}) == (1 if not share else LENGTH + 2 - branches)


def planned(path: Path, specs: Sequence[ProposerSpec], cost: CostPoints) -> list[tuple[Counters, int]]:
    """The counters of two answers of 200 tokens under the planner, each with the passes of the head that drafted."""
    profile = profile_of(*specs, mode="measured")
    found, before = [], 0
    with opened(path, profile, cost) as engine:
        for _ in range(2):
            counters = engine.generate(Request(PROMPT, 200)).counters
            heads = [one for one in engine.speculator.fusion.sources if isinstance(one, HeadDrafter)]
            passes = sum(head.passes for head in heads)
            found.append((counters, passes - before))
            before = passes
    return found


@pytest.mark.parametrize("method", METHODS)
def test_a_head_that_is_right_is_used_where_it_costs_little(method: str, files: Files) -> None:
    path, spec = files.of(method)
    for counters, passes in planned(path, [spec], FREE_ROWS):
        assert counters.mean_acceptance_length > 4.8
        assert passes == counters.draft_tokens


@pytest.mark.parametrize("method", METHODS)
def test_a_head_that_is_right_is_not_used_where_a_pass_costs_less(method: str, files: Files) -> None:
    path, spec = files.of(method)
    later, passes = planned(path, [spec], CHEAP_PASSES)[1]
    assert later.steps == 199 and later.draft_tokens == passes == 0


@pytest.mark.parametrize("method", METHODS)
def test_of_a_head_that_is_never_right_nothing_is_verified_after_200_tokens(method: str, files: Files) -> None:
    path, spec = files.random(method)
    (first, _), (later, _) = planned(path, [spec], COSTLY_ROWS)
    assert first.draft_tokens > 0 and first.accepted_tokens == 0
    assert later.steps == 199 and later.draft_tokens == 0


@pytest.mark.parametrize("method", METHODS)
def test_a_lookup_drafts_what_it_knows_and_the_head_the_rest(method: str, files: Files) -> None:
    """Of a text that repeats itself after SHORT tokens: beside a lookup the head is needed for the first ones only."""
    path, spec = files.of(method, length=SHORT)
    suffix = ProposerSpec("suffix")
    (lookup, _), _ = planned(path, [suffix], FREE_ROWS)
    (head, head_passes), _ = planned(path, [spec], FREE_ROWS)
    (both, passes), (later, later_passes) = planned(path, [suffix, spec], FREE_ROWS)
    assert later.steps <= both.steps < min(head.steps, lookup.steps)
    assert both.accepted_tokens == both.draft_tokens
    assert SHORT - LENGTH <= passes <= SHORT + LENGTH < head_passes
    assert later_passes < SHORT / 2


@pytest.mark.parametrize("method", METHODS)
def test_beside_a_lookup_a_head_that_is_right_for_some_tokens_is_asked_for_as_many(method: str, files: Files) -> None:
    """In a text that a lookup knows nothing of, a head that knows seven of ten tokens saves what it does alone."""
    path, spec = files.of(method, share=0.3)
    alone, both = (planned(path, specs, FREE_ROWS)[0][0] for specs in ([spec], [ProposerSpec("suffix"), spec]))
    assert both.mean_acceptance_length == pytest.approx(alone.mean_acceptance_length, rel=0.1)
    assert both.mean_acceptance_length > 2
