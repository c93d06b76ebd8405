"""Tuning in vLLM's V2 runner, as far as it can be tested without vLLM."""

import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from specplug.bench.vllm_stage import ScheduledArm
from specplug.engines.vllm.v2 import adaptive, scheduled_lengths
from specplug.errors import UsageError
from specplug.profile import PlannerSettings, Profile, VllmSettings
from specplug.registry import ProposerSpec
from specplug.tune import vllm, vllm_runner, vllm_v2
from specplug.tune.candidates import LONGEST, Setting
from specplug.tune.expense import Expense
from specplug.tune.prediction import Costs

BASE = Profile("base", engine="vllm", vllm=VllmSettings(max_model_len=512))
FREE = Costs(vllm._FREE, Expense(), (vllm._FREE,))


class FakeEngine:
    """An engine with a scheduler, both in this process."""

    def __init__(self, profile: Profile, **further: Any) -> None:
        self.profile, self.further = profile, further
        self.description = "fake"
        self.closed = False
        config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=512))
        self.scheduler = SimpleNamespace(dynamic_sd_lookup=[0] * 17)
        client = SimpleNamespace(engine_core=SimpleNamespace(scheduler=self.scheduler))
        self.used: list[str] = []

        def collective_rpc(method: str, args: tuple[str, bool]) -> None:
            self.used.append(args[0])

        self.llm = SimpleNamespace(
            llm_engine=SimpleNamespace(vllm_config=config, engine_core=client), collective_rpc=collective_rpc
        )

    def generate_all(self, requests: Any) -> tuple[list[Any], list[float]]:
        return [], []


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[FakeEngine]:
    engines: list[FakeEngine] = []

    @contextmanager
    def open_fake(model: str, profile: Profile, **further: Any) -> Iterator[FakeEngine]:
        engine = FakeEngine(profile, **further)
        engines.append(engine)
        yield engine
        engine.closed = True

    monkeypatch.setattr(vllm, "open_vllm", open_fake)
    monkeypatch.setattr(adaptive, "gpu_capability", lambda: None)
    return engines


def subject(profile: Profile = BASE) -> tuple[vllm_v2.V2Subject, list[str]]:
    notes: list[str] = []
    return vllm_v2.V2Subject("model", profile, most=2, notify=notes.append), notes


def test_the_drafting_engine_has_graphs_for_every_number_of_draft_tokens(opened: list[FakeEngine]) -> None:
    one, notes = subject()
    assert one.engine_planning == "batch_size"
    assert any(note.startswith("not tried, because it drafts on the host: ngram") for note in notes)
    assert {setting.method for setting in one.settings_to_try(8, ())} == {
        "suffix", "token_recycling", "suffix + token_recycling", "builtin",
    }  # fmt: skip
    three = Setting((ProposerSpec("suffix"),), PlannerSettings(max_nodes=3, trees=False), ((1, 4, 3), (5, 1024, 0)))
    arm = one.arm(three.profile(one.profile, "three"), slots=1, costs=FREE)
    idle = one.idle_arm(slots=1, costs=FREE)
    assert isinstance(arm, ScheduledArm) and isinstance(idle, ScheduledArm)
    plain, drafting = opened
    table = drafting.profile.vllm.tokens_per_batch_size
    assert {length for _, _, length in table} == {*range(LONGEST + 1)} and not plain.profile.speculates
    assert drafting.profile.vllm.num_speculative_tokens == LONGEST
    for each, expected in ((arm, [0, 3, 3, 3, 3, *[0] * 12]), (idle, [0] * 17), (arm, [0, 3, 3, 3, 3, *[0] * 12])):
        each.answer([], 4)
        assert drafting.scheduler.dynamic_sd_lookup == expected
    assert drafting.used[0] == drafting.used[2] != drafting.used[1]
    one.close()
    assert plain.closed and drafting.closed


def test_adaptive_verification_chooses_where_it_is_possible(
    opened: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adaptive, "gpu_capability", lambda: (9, 0))
    one, _ = subject()
    with closing(one):
        assert one.engine_planning == "adaptive" and one.idle_arm(slots=1, costs=FREE) is None
        (setting, *_) = one.settings_to_try(8, ())
        arm = one.arm(setting.profile(one.profile, "x"), slots=1, costs=FREE)
        arm.answer([], 4)
        assert opened[1].scheduler.dynamic_sd_lookup == [0] * 17, "the number is left to vLLM"
        assert not opened[1].profile.vllm.tokens_per_batch_size


def test_nothing_is_opened_where_the_profile_demands_what_is_not_possible(opened: list[FakeEngine]) -> None:
    with pytest.raises(UsageError, match="demands adaptive_verification, but it needs CUDA graphs"):
        subject(replace(BASE, vllm=replace(BASE.vllm, adaptive_verification=True)))
    assert opened == []


def test_the_runner_decides_which_subject_is_opened(opened: list[FakeEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Profile] = []

    def runs_on_v2(profile: Profile, *rest: Any, **further: Any) -> bool:
        asked.append(profile)
        return all(spec.method != "datastore" for spec in profile.proposers)

    monkeypatch.setattr(vllm_runner, "runs_on_v2", runs_on_v2)
    monkeypatch.setattr(vllm_runner, "require", lambda: ("vllm", "0.32.0"))
    monkeypatch.setattr(vllm_runner, "located_model", lambda ref: ref)
    first = vllm_runner.vllm_subject("model", BASE, named=(), most=1, notify=lambda text: None)
    assert isinstance(first, vllm_v2.V2Subject) and first.profile.vllm.runner == "v2"
    corpus = ProposerSpec("datastore", {"corpora": ["x"]})
    second = vllm_runner.vllm_subject("model", BASE, named=(corpus,), most=1, notify=lambda text: None)
    assert not isinstance(second, vllm_v2.V2Subject) and second.profile.vllm.runner == "v1"
    assert corpus in asked[1].proposers
    first.close()
    second.close()


def test_a_corpus_is_tried_and_drafts_while_steps_are_timed(
    opened: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = ProposerSpec("datastore", {"corpora": ["x"]})
    one = vllm_v2.V2Subject("model", BASE, named=(corpus,), most=2, notify=lambda text: None)
    timed: list[str] = []

    def steps(model: str, settings: Any, ref: str, *rest: Any, **further: Any) -> list[Any]:
        timed.append(Path(ref).read_text())
        return [(1, n, 64.0, 10.0) for n in range(LONGEST + 1) for _ in range(3)]

    monkeypatch.setattr(vllm_v2, "steps_by_length", steps)
    with closing(one):
        own = {setting.method for setting in one.settings_to_try(2, (corpus,)) if setting.lengths}
        assert own == {
            "suffix", "token_recycling", "datastore", "suffix + token_recycling", "suffix + datastore",
            "token_recycling + datastore",
        }  # fmt: skip
        one._timed([1], [1], 1.0, lambda share: None)
        setting = one.settings_to_try(2, (corpus,))[0]
        one.arm(setting.profile(one.profile, "x"), slots=1, costs=FREE).answer([], 1)
        assert corpus in opened[1].profile.proposers and "datastore" in timed[0]


def test_a_plan_counts_the_settings_of_the_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_runner, "require", lambda: ("vllm", "0.32.0"))
    monkeypatch.setattr(vllm_runner, "located_model", lambda ref: ref)
    monkeypatch.setattr(adaptive, "gpu_capability", lambda: None)
    counts = []
    for v2 in (True, False):
        monkeypatch.setattr(vllm_runner, "runs_on_v2", lambda *rest, v2=v2, **further: v2)
        settings = vllm_runner.vllm_settings("model", BASE, named=(ProposerSpec("datastore", {"corpora": ["x"]}),))
        assert any(setting.method == "suffix + datastore" for setting in settings)
        counts.append((len(settings), sum(bool(setting.lengths) for setting in settings)))
    assert counts[0] == (6 * LONGEST + 6, 6 * LONGEST) and counts[1][0] > 100 and not counts[1][1]


def test_a_scheduler_in_another_process_is_reached_by_a_method_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class EngineCore:
        scheduler = SimpleNamespace(dynamic_sd_lookup=[0] * 5)

    monkeypatch.setitem(sys.modules, scheduled_lengths.CORE, SimpleNamespace(EngineCore=EngineCore))
    scheduled_lengths.install()
    core = EngineCore()
    client = SimpleNamespace(call_utility=lambda method, *args: getattr(core, method)(*args))
    llm = SimpleNamespace(llm_engine=SimpleNamespace(engine_core=client))
    scheduled_lengths.use_lengths(llm, ((1, 2, 4), (3, 9, 1)))
    assert core.scheduler.dynamic_sd_lookup == [0, 4, 4, 1, 1]
