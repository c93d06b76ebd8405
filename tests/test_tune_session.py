"""A complete tune on the toy target: what it chooses, writes, journals, continues and refuses."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from filelock import FileLock
from toy_subject import ToySubject

from specplug import profile as profiles
from specplug.bench.workloads import Prompt
from specplug.errors import SpecplugError, UsageError
from specplug.planning.request_time import SettingCosts
from specplug.profile import Profile, Runtime
from specplug.registry import ProposerSpec
from specplug.testing import ToyTarget
from specplug.tune import journal as journals
from specplug.tune.document import evidence
from specplug.tune.drafter_trace import DrafterTrace
from specplug.tune.session import Outcome, tune
from specplug.tune.trace import Answer
from specplug.tune.tune_request import Request, check, journal_path
from specplug.tune.verdict import interval_text, other_lengths_line, settings_line, settings_rows, verdict

CHEAP: Callable[[int], float] = lambda rows: 10.0 + 0.1 * rows  # noqa: E731
EXPENSIVE: Callable[[int], float] = lambda rows: 10.0 * rows  # noqa: E731


@pytest.fixture(autouse=True)
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests may run beside this one, and tune keeps no costs of a busy machine."""
    monkeypatch.setattr("specplug.machine.hardware.too_busy", lambda: None)


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))


@pytest.fixture
def request_(tmp_path: Path) -> Request:
    """Twelve prompts in two categories, and a model file of which only the existence matters."""
    model = tmp_path / "model.gguf"
    model.write_bytes(bytes(range(256)) * 64)
    prompts = [Prompt(f"q{i}", f"kind {i % 2}", (f"say {i} things about {i * 7} words",)) for i in range(12)]
    base = Profile("base", runtime=Runtime(threads=1, context=512))
    return Request(model, base, prompts, "toy", "mine", tmp_path / "mine.yaml", budget=300.0, max_tokens=48)


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def run(
    request: Request,
    ms: Callable[[int], float] = CHEAP,
    subject: ToySubject | None = None,
    clock: Callable[[], float] = monotonic,
) -> Outcome:
    return tune(request, opener=lambda asked: subject or ToySubject(asked.base, ms), clock=clock)


def test_with_cheap_passes_the_profile_drafts(request_: Request) -> None:
    outcome = run(request_)
    written = profiles.load(request_.out)
    assert written == outcome.profile and written.name == "mine" and written.speculates
    document = outcome.document
    (chosen,) = [line for line in document["settings"] if line["name"] == document["chosen"]]
    live = chosen["confirmed"]["1"]["speedup"]
    assert document["rejected"].keys() <= {line["name"] for line in document["settings"] if line["confirmed"]}
    assert 1.0 < live["low"] <= chosen["predicted"]["speedup"] <= live["high"]
    measured = written.measured
    assert measured is not None and measured.cost_curve is not None and measured.acceptance
    assert measured.cost_curve.ms[0][0] == pytest.approx(10.1, rel=0.02)
    assert measured.hardware["threads"] == 1 and measured.hardware["model"]["file"] == "model.gguf"
    assert written.evidence["chosen"] == document["chosen"] and written.evidence["command"] == ""
    assert json.dumps(document)
    speeds = [line["predicted"]["speedup"] for line in document["settings"]]
    assert speeds == sorted(speeds, reverse=True) and len(speeds) > 100
    assert min(speeds) < max(speeds) and {"ngram", "suffix", "token_recycling"} <= {
        line["method"] for line in document["settings"]
    }


def test_a_folder_for_recordings_that_cannot_be_written_is_refused_before_anything_is_measured(
    request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("where a folder is needed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UsageError, match=r"traces/recordings: cannot be written .*; set XDG_CACHE_HOME to another"):
        check(request_)


def test_on_a_busy_machine_the_verdict_says_so_and_the_profile_keeps_no_costs(
    request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specplug.machine.hardware.too_busy", lambda: "2.0 of 2 cores")
    monkeypatch.setattr("specplug.machine.hardware.usable_cores", lambda: 2)
    asked = replace(request_, base=replace(request_.base, runtime=Runtime(context=512)))
    subject = ToySubject(asked.base, CHEAP)
    outcome = run(asked, subject=subject)
    assert verdict(outcome.document).endswith("; measured while 2.0 of 2 cores were busy: do not rely on it")
    assert not outcome.document["threads"]["one_row_ms"], "no threads were compared"
    written = profiles.load(asked.out)
    assert written.speculates and written.runtime.threads is None
    assert written.measured is not None and written.measured.cost_curve is None and written.measured.acceptance
    monkeypatch.setattr("specplug.machine.hardware.too_busy", lambda: None)
    again = run(replace(asked, resume=True), subject=ToySubject(asked.base, CHEAP))
    assert again.document["busy"] == "2.0 of 2 cores", "what is kept was measured then"
    idle = run(replace(asked, out=asked.out.with_name("idle.yaml"), name="idle"), subject=ToySubject(asked.base, CHEAP))
    assert idle.document["busy"] is None and "do not rely" not in verdict(idle.document)
    assert idle.document["threads"]["one_row_ms"]


def test_with_expensive_passes_the_profile_is_plain_decoding(request_: Request) -> None:
    outcome = run(request_, EXPENSIVE)
    assert outcome.document["chosen"] == "none" and not outcome.profile.speculates
    assert (
        profiles.load(request_.out).description.startswith("Tuned") and "plain decoding" in outcome.profile.description
    )
    assert outcome.document["oracle_speedup"]["1"] == pytest.approx(1.0, rel=0.01)


def test_an_engine_that_is_fast_without_drafts_is_no_gain(request_: Request) -> None:
    """Two processes of one engine can differ in speed for as long as they live, so a setting must also be faster than
    its own engine with drafting disabled."""
    subject = ToySubject(request_.base, EXPENSIVE)
    subject.idle_speed = 1.2
    outcome = run(request_, subject=subject)
    assert outcome.document["chosen"] == "none" and any(
        "with drafting disabled" in why for why in outcome.document["rejected"].values()
    )
    assert any(
        "ran 1.2" in note and "times as fast as plain decoding with drafting disabled" in note
        for note in outcome.document["notes"]
    )
    subject = ToySubject(request_.base, CHEAP)
    subject.idle_speed, subject.max_tokens = 0.95, request_.max_tokens  # the first tune recorded the trace
    assert run(replace(request_, out=request_.out.with_name("two.yaml")), subject=subject).profile.speculates


def test_with_unpredictable_text_the_profile_is_plain_decoding(request_: Request) -> None:
    """Every token depends on all earlier ones, so no text repeats, and drafts are rejected whatever a pass costs."""
    wild = ToySubject(request_.base, lambda rows: 10.0 + 3.0 * rows, ToyTarget(vocab=4096, order=64, branches=64))
    assert run(request_, subject=wild).document["chosen"] == "none"


@pytest.mark.parametrize("spent", [0.0, 140.0, 290.0])
def test_an_interrupted_tune_is_continued_from_its_journal(request_: Request, spent: float) -> None:
    """The tune is interrupted while confirming, with different parts of the 300 s spent: nothing is recorded again, the
    finalists stay the same, and measured pairs are kept."""
    clock = Clock()
    first = ToySubject(request_.base, CHEAP)
    answered: list[str] = []

    def on_answer(name: str) -> None:
        answered.append(name)
        if len(answered) == 5:
            clock.now += spent
        if len(answered) == 60:
            raise KeyboardInterrupt

    first.on_answer = on_answer
    with pytest.raises(KeyboardInterrupt):
        run(request_, subject=first, clock=clock)
    assert first.closed and first.recorded == 12 and not request_.out.exists()
    with journals.opened(journal_path(request_.out), resume=True) as journal:
        pairs = len(journal.of("pair"))
        names = journal.of("finalists")
        assert journal.entries[-1]["spent"] >= spent
    assert len(names) == 1
    second = ToySubject(request_.base, CHEAP)
    second.max_tokens = 48
    outcome = run(replace(request_, resume=True), subject=second)
    assert second.recorded == 0 and request_.out.is_file()
    lines = {line["name"]: line for line in outcome.document["settings"]}
    confirmed = {name for name, line in lines.items() if line["confirmed"]}
    assert confirmed == set(names[0]["names"]) and len(lines) > 50
    with journals.opened(journal_path(request_.out), resume=True) as journal:
        assert len(journal.of("pair")) >= pairs and len(journal.of("finalists")) == 1


def test_damaged_recorded_answers_are_refused(request_: Request) -> None:
    run(request_)
    path = journal_path(request_.out).with_suffix(".npz")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UsageError, match="run without --resume to record again"):
        run(replace(request_, resume=True))
    path.unlink()
    with pytest.raises(UsageError, match="not what the unfinished tune recorded"):
        run(replace(request_, resume=True))


def test_the_next_tune_uses_the_recorded_trace(request_: Request) -> None:
    run(request_)
    again = ToySubject(request_.base, CHEAP)
    run(replace(request_, name="other", out=request_.out.with_name("other.yaml")), subject=again)
    assert again.recorded == 0


def test_a_damaged_trace_is_reported_and_recorded_again(request_: Request, tmp_path: Path) -> None:
    run(request_)
    (path,) = (tmp_path / "XDG_CACHE_HOME").rglob("*.npz")
    path.write_bytes(path.read_bytes()[:-100])
    notices: list[str] = []
    subject = ToySubject(request_.base, CHEAP)
    tune(request_, notify=notices.append, opener=lambda asked: subject)
    assert subject.recorded == 12 and any("recording again" in line for line in notices)


def test_resume_refuses_another_request(request_: Request) -> None:
    with pytest.raises(UsageError, match="nothing to resume"):
        run(replace(request_, resume=True))
    run(request_)
    for other, message in (
        (replace(request_, max_tokens=32), "another max_tokens"),
        (replace(request_, prompts=request_.prompts[:4]), "another workload"),
        (replace(request_, base=replace(request_.base, exact=True)), "another base"),
    ):
        with pytest.raises(UsageError, match=message):
            run(replace(other, resume=True))


def test_resume_refuses_another_machine_or_model(request_: Request) -> None:
    run(request_)
    request_.model.write_bytes(b"another model of the same name")
    with pytest.raises(UsageError, match=r"other conditions.*model"):
        run(replace(request_, resume=True))
    path = journal_path(request_.out)
    lines = path.read_bytes().splitlines(keepends=True)
    entry = json.loads(lines[0][9:])
    entry["fingerprint"]["cpu"] = "another processor"
    path.write_bytes(journals._line(entry) + b"".join(lines[1:]))
    with pytest.raises(UsageError, match="cpu: was another processor"):
        run(replace(request_, resume=True))


def test_a_damaged_journal_is_refused_and_one_with_an_incomplete_last_line_is_continued(request_: Request) -> None:
    run(request_)
    path = journal_path(request_.out)
    complete = path.read_bytes()
    path.write_bytes(complete[:-7])
    notices: list[str] = []
    tune(replace(request_, resume=True), notify=notices.append, opener=lambda asked: ToySubject(asked.base, CHEAP))
    assert any("last line of the journal is incomplete" in line for line in notices)
    path.write_bytes(complete.replace(b'"kind":"cost"', b'"kind":"coat"'))
    with pytest.raises(UsageError, match="line 4 is damaged"):
        run(replace(request_, resume=True))


def test_two_tunes_of_one_profile_do_not_run_at_once(request_: Request) -> None:
    path = journal_path(request_.out)
    path.parent.mkdir(parents=True)
    with FileLock(f"{path}.lock"), pytest.raises(UsageError, match="another tune of this profile"):
        run(request_)
    run(request_)


def test_no_profile_is_written_when_the_model_changes_or_disappears(request_: Request) -> None:
    for change in (lambda: request_.model.write_bytes(b"else"), request_.model.unlink):
        subject = ToySubject(request_.base, CHEAP)
        subject.on_answer = lambda name, change=change: change() if request_.model.exists() else None  # type: ignore[misc]
        with pytest.raises(SpecplugError, match=r"changed while it was tuned|cannot be read"):
            run(request_, subject=subject)
        assert not request_.out.exists()


def test_a_prompt_that_does_not_fit_is_named(request_: Request) -> None:
    long = Prompt("huge", "kind 0", ("word " * 600,))
    with pytest.raises(UsageError, match=r"prompt huge takes 648 tokens.*; raise it with --context 1024, or remove"):
        run(replace(request_, prompts=[*request_.prompts, long]))


def test_every_concurrency_is_measured_and_one_decides(request_: Request) -> None:
    wanted = replace(request_, concurrency=(1, 2), objective="throughput")
    outcome = run(wanted)
    assert [curve["sequences"] for curve in outcome.document["cost"]] == [1, 2] and outcome.document["level"] == 2
    measured = outcome.profile.measured
    assert measured is not None and measured.cost_curve is not None and measured.cost_curve.sequences == 2
    chosen = next(line for line in outcome.document["settings"] if line["name"] == outcome.document["chosen"])
    assert chosen["confirmed"].keys() == {"1", "2"}


def test_progress_reports_every_stage(request_: Request) -> None:
    reported: list[tuple[str, float]] = []
    tune(
        request_,
        progress=lambda stage, share, best, left: reported.append((stage, share)),
        opener=lambda asked: ToySubject(asked.base, CHEAP),
    )
    stages = list(dict.fromkeys(stage for stage, _ in reported))
    assert stages == ["cost", "record", "off_path_rows", "expense", "replay", "confirm"]
    assert all(0.0 <= share <= 1.0 for _, share in reported)


def test_too_few_answers_never_win(request_: Request) -> None:
    """Four answers are too few, however often they are measured."""
    outcome = run(replace(request_, prompts=request_.prompts[:4]))
    assert outcome.document["chosen"] == "none"
    assert set(outcome.document["rejected"].values()) == {"too few different answers: 4, 5 are needed"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 8}, "answers of 8 tokens are too short"),
        ({"concurrency": (64,)}, "64 at once: toy has 12 prompts"),
        ({"out": Path("/proc/mine.yaml")}, "cannot be written"),
    ],
)
def test_an_impossible_request_is_refused_before_the_engine_is_opened(
    request_: Request, change: dict[str, Any], message: str
) -> None:
    def opener(asked: Request) -> ToySubject:
        raise AssertionError("opened")

    with pytest.raises(UsageError, match=message):
        tune(replace(request_, **change), opener=opener)


def test_a_refused_tune_keeps_the_old_journal(request_: Request) -> None:
    run(request_)
    before = journal_path(request_.out).read_bytes()

    def opener(asked: Request) -> ToySubject:
        raise UsageError("no such model")

    with pytest.raises(UsageError):
        tune(request_, opener=opener)
    assert journal_path(request_.out).read_bytes() == before


# -- engine settings --------------------------------------------------------------------------------------------------

STOCK = Runtime(threads=1, context=512, flash_attention=True, kv_type="f16")
OFF = replace(STOCK, flash_attention=False)
EQUAL = replace(STOCK, kv_type="bf16")


def setting_costs(one_row: float, per_row: float, equal_rows: int = 1) -> SettingCosts:
    rows = (1, 2, 4, 8, 16)
    line = tuple(one_row + per_row * (n - 1) for n in rows)
    return SettingCosts((64, 128), rows, (line, line), (0.1, 0.1), equal_rows)


def with_settings(request: Request, table: dict[Runtime, SettingCosts], ms: Callable[[int], float]) -> ToySubject:
    subject = ToySubject(request.base, ms)
    subject.settings = table
    return subject


def test_the_profile_gets_the_fastest_setting_with_equal_rounding(request_: Request) -> None:
    table = {STOCK: setting_costs(30, 0.1), OFF: setting_costs(9, 0.1), EQUAL: setting_costs(10.1, 0.1, 25)}
    subject = with_settings(request_, table, CHEAP)
    outcome = run(request_, subject=subject)
    written = profiles.load(request_.out)
    assert written.speculates and (written.runtime.flash_attention, written.runtime.kv_type) == (True, "bf16")
    engine = outcome.document["engine_settings"]
    assert (engine["plain"], engine["equal"]) == ("flash attention off, f16 cache", True)
    assert engine["settings_speedup"] == pytest.approx(30 / 9, rel=0.02)
    assert "engine settings alone: 3." in str(settings_line(outcome.document))
    assert f"on top: {interval_text(chosen_speedup(outcome))} (flash attention on, bf16 cache)" in str(
        settings_line(outcome.document)
    )
    assert subject.profile.runtime.kv_type == "bf16"
    head, rows = settings_rows(outcome.document)
    assert [len(row) for row in rows] == [len(head)] * 3 and [row[1] for row in rows] == ["no", "yes", "no"]


def lengths_document(chosen: str, *, equal: bool = False) -> dict[str, Any]:
    """A document with three settings, of which `b` is fast at 4,096 tokens and `c` at 128, but rounds differently."""
    lines = {
        "a": ([10.0, 12.0, 40.0], [30.0, 40.0, 90.0], 25),
        "b": ([10.5, 12.0, 40.0], [20.0, 30.0, 90.0], 25),
        "c": ([5.0, 6.0, 20.0], [30.0, 40.0, 90.0], 1),
    }
    settings = [
        {"setting": name, "contexts": [128, 4096], "ms": [short, long], "equal_rows": rows}
        for name, (short, long, rows) in lines.items()
    ]
    engine = {"settings": settings, "plain": "a", "drafting": "b", "equal": equal}
    return {"chosen": chosen, "engine_settings": engine}


@pytest.mark.parametrize(
    ("chosen", "equal", "said"),
    [
        (
            "none",
            True,
            "2.00 times as fast with 128 tokens in the cache (c) and "
            "1.41 times as fast with 4096 tokens in the cache (b)",
        ),
        ("suffix", False, "2.03 times as fast with 128 tokens in the cache (c)"),
        ("suffix", True, None),
    ],
)
def test_another_setting_for_other_lengths_is_named(chosen: str, equal: bool, said: str | None) -> None:
    found = other_lengths_line(lengths_document(chosen, equal=equal))
    assert found == (None if said is None else f"under another engine setting, passes would be {said}")
    assert other_lengths_line({"chosen": chosen, "engine_settings": None}) is None


def test_settings_that_could_not_be_measured_are_named(request_: Request) -> None:
    subject = with_settings(request_, {STOCK: setting_costs(30, 0.1)}, CHEAP)
    subject.unmeasured = ["flash attention on, q8_0 cache: not measured: no memory"]
    assert subject.unmeasured[0] in run(request_, subject=subject).document["notes"]


def chosen_speedup(outcome: Outcome) -> Any:
    (line,) = [line for line in outcome.document["settings"] if line["name"] == outcome.document["chosen"]]
    return line["confirmed"]["1"]["speedup"]


def test_rows_that_agree_limit_every_draft_unless_rounding_is_allowed(request_: Request) -> None:
    table = {STOCK: setting_costs(10, 0.1), EQUAL: setting_costs(10.1, 0.1, 3)}
    outcome = run(request_, subject=with_settings(request_, table, CHEAP))
    tried = {line["name"] for line in outcome.document["settings"]}
    assert any(", measured 2" in name for name in tried) and not any("measured 24" in name for name in tried)
    assert any("drafts have 2 tokens at most; --allow-rounding" in note for note in outcome.document["notes"])
    assert outcome.document["engine_settings"]["equality_costs"] > 1.2
    allowing = replace(request_, allow_rounding=True)
    allowed = run(allowing, subject=with_settings(allowing, table, CHEAP))
    assert any("measured 24" in line["name"] for line in allowed.document["settings"])
    assert any("answers can differ at ties" in note for note in allowed.document["notes"])


def test_plain_decoding_keeps_its_own_setting(request_: Request) -> None:
    table = {OFF: setting_costs(9, 9), EQUAL: setting_costs(10, 10, 25)}
    outcome = run(request_, subject=with_settings(request_, table, EXPENSIVE))
    written = profiles.load(request_.out)
    assert not written.speculates and (written.runtime.flash_attention, written.runtime.kv_type) == (False, "f16")
    assert str(settings_line(outcome.document)).endswith("drafting on top: nothing")


def test_drafts_are_rejected_where_their_setting_reads_prompts_too_slowly(request_: Request) -> None:
    slow = replace_prompt(setting_costs(10.1, 0.1, 25), 1000.0)
    outcome = run(request_, subject=with_settings(request_, {OFF: setting_costs(10, 0.1), EQUAL: slow}, CHEAP))
    assert outcome.document["chosen"] == "none"
    assert all("slower in whole requests" in why for why in outcome.document["rejected"].values())


def replace_prompt(costs: SettingCosts, ms: float) -> SettingCosts:
    return replace(costs, prompt_ms=(ms, ms))


def test_a_continued_tune_keeps_its_settings(request_: Request) -> None:
    table = {STOCK: setting_costs(30, 0.1), EQUAL: setting_costs(10.1, 0.1, 25)}
    subject = with_settings(request_, table, CHEAP)

    def stop(name: str) -> None:
        raise KeyboardInterrupt

    subject.on_answer = stop
    with pytest.raises(KeyboardInterrupt):
        run(request_, subject=subject)
    continued = with_settings(request_, {}, CHEAP)  # measuring again would find nothing to choose
    outcome = run(replace(request_, resume=True), subject=continued)
    assert outcome.document["engine_settings"]["drafting"] == "flash attention on, bf16 cache"


DRAFTER = ProposerSpec("draft_model", {"model": "/models/small.gguf"})


@pytest.mark.parametrize(("rate", "token_ms", "wins"), [(0.9, 0.5, True), (0.9, 30.0, False), (0.5, 12.0, False)])
def test_a_drafter_is_chosen_where_it_is_faster_and_its_rows_are_listed_where_it_is_not(
    request_: Request, rate: float, token_ms: float, wins: bool
) -> None:
    """The target's text is unpredictable from tokens alone."""
    subject = ToySubject(request_.base, CHEAP, ToyTarget(vocab=4096, order=64, branches=64))
    subject.drafter_rate, subject.drafter_ms = rate, token_ms
    document = run(replace(request_, drafters=(DRAFTER,)), subject=subject).document
    listed = {line["method"] for line in evidence(document)["settings"]}
    assert {"draft_model", "suffix + draft_model", "suffix + token_recycling + draft_model"} <= listed
    assert ("draft_model" in document["chosen"]) == wins
    if wins:
        written = profiles.load(request_.out)
        assert DRAFTER in written.proposers and "small.gguf" in document["chosen"]
        assert written.proposers[-1] == ProposerSpec("grammar"), "for requests with a constraint, which no trace has"
        assert any(name.startswith("ModelDrafter") for name in written.measured.acceptance)  # type: ignore[union-attr]


def test_a_drafter_that_was_not_run_over_all_answers_does_not_draft_for_the_others(request_: Request) -> None:
    subject = ToySubject(request_.base, CHEAP, ToyTarget(vocab=4096, order=64, branches=64))
    complete = subject.trace_drafter

    def partly(spec: ProposerSpec, answers: Sequence[Answer], *further: Any) -> DrafterTrace:
        return complete(spec, answers[:3], *further)

    subject.trace_drafter = partly  # type: ignore[method-assign]
    document = run(replace(request_, drafters=(DRAFTER,)), subject=subject).document
    assert "small.gguf: 3 of 12 answers were read" in " ".join(document["notes"])
    (line,) = [one for one in document["settings"] if one["method"] == "draft_model" and "static 4 " in one["name"]]
    assert 1.0 < line["predicted"]["mean_acceptance_length"] < 2.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": Profile("v", engine="vllm"), "drafters": (DRAFTER,)}, "tune tries drafters on llama.cpp"),
        (
            {"drafters": (DRAFTER, ProposerSpec("vocab_trim", {"model": "x/small.gguf"}))},
            "two drafters are named",
        ),
    ],
)
def test_drafters_that_cannot_be_tried_are_refused(request_: Request, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(replace(request_, **changes))
