"""Complete builds on the toy target: tokens counted, answers held out, the drafter written, and wrong requests."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_source import ToySource

from specplug.build import vocab_trim
from specplug.build.frequencies import held_out
from specplug.build.head_sizes import Selection
from specplug.build.vocab_trim import Request, build, check, verdict
from specplug.errors import SpecplugError, UsageError
from specplug.models import drafter_folders

PROMPTS = [{"id": f"p{i}", "category": "toy", "turns": [f"word {7 * i}", "and then"][: 1 + i % 2]} for i in range(30)]
"""Every second prompt has two turns."""


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def request_(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Request:
    """A request for the toy target, whose file has no content."""
    monkeypatch.setattr(vocab_trim, "tokenizer_hash", lambda path: "same")
    model, prompts = tmp_path / "m.gguf", tmp_path / "p.jsonl"
    model.write_bytes(b"weights")
    prompts.write_text("\n".join(map(json.dumps, PROMPTS)))
    return Request(model, model, tmp_path / "out" / "d", Selection(size=64), calibrate=str(prompts), tokens=24)


def built(request: Request, source: ToySource, messages: list[str] | None = None) -> dict[str, Any]:
    received = messages if messages is not None else []
    return build(request, notify=received.append, opener=lambda asked: source)


def test_answers_are_counted_and_held_out_answers_judge_the_drafts(request_: Request) -> None:
    source = ToySource()
    document = built(request_, source)
    held = held_out([prompt["id"] for prompt in PROMPTS])
    target = source.subject.target
    expected = {False: np.zeros(128, dtype=int), True: np.zeros(128, dtype=int)}
    judging = 0
    for prompt in PROMPTS:
        conversation: list[dict[str, str]] = []
        for turn in prompt["turns"]:
            conversation.append({"role": "user", "content": turn})
            answer = target.greedy(source.subject.encode(conversation).tolist(), 24)
            conversation.append({"role": "assistant", "content": source.subject.text(answer)})
            expected[prompt["id"] in held] += np.bincount(answer, minlength=128)
            judging += prompt["id"] in held
    assert document["calibration"]["tokens"] == expected[False].sum()
    assert document["calibration"]["held_out_tokens"] == expected[True].sum()
    assert {answer.prompt_id for answer in source.judged_by} == held and len(source.judged_by) == judging
    assert len(source.weighed) == 45 - judging and not held & {answer.prompt_id for answer in source.weighed}
    manifest, ids = drafter_folders.read(request_.out)
    kept = {0, *np.argsort(-expected[False], kind="stable")[:64].tolist()}
    assert set(ids.tolist()) <= kept and len(ids) == 64 == manifest.rows
    line = document["sizes"][0]
    assert line["rows"] == 64
    assert line["coverage"] == pytest.approx(expected[True][ids].sum() / expected[True].sum(), abs=1e-6)


def test_rows_are_chosen_by_the_targets_probabilities_where_there_are_any(request_: Request) -> None:
    document = built(request_, ToySource(expected=np.arange(128.0)))
    _, ids = drafter_folders.read(request_.out)
    assert ids.tolist() == [0, *range(65, 128)] and document["calibration"]["ranked_by"] == "likelihoods"
    by_counts = built(replace(request_, out=request_.out / "other"), ToySource())
    assert by_counts["calibration"]["ranked_by"] == "counts"
    assert by_counts["calibration"]["tokens"] == document["calibration"]["tokens"]


def test_a_drafter_with_the_full_head_is_the_target_itself(request_: Request) -> None:
    """All draft tokens are accepted: 5 passes with 4 draft tokens yield the 23 tokens after the first. A row has 10
    bytes."""
    document = built(request_, ToySource(step_ms=0.01))
    small, full = document["sizes"]
    assert (full["rows"], full["coverage"], full["acceptance"]) == (128, 1.0, 1.0)
    assert full["block_efficiency"] == pytest.approx(23 / 5)
    assert full["byte_ratio"] == pytest.approx((1000 + 1280) / 4000)
    assert full["mbsu"] == pytest.approx(23 / 5 / (4 * 0.57 + 1))
    assert full["draft_ms"] == pytest.approx(1.28)
    # drafts of 3: 6 passes of 10 + 3.84 ms; of 4: 5 of 15.12; of 5: 4 of 16.4; of 7: 3 of 18.96; of 8: 3 of 20.24
    assert (full["guesses"], full["predicted"]) == (7, pytest.approx(230 / (3 * 18.96), rel=1e-4))
    assert full["step_bytes"] - small["step_bytes"] == 640 and small["draft_ms"] == pytest.approx(0.64)


def test_a_second_run_with_another_size_reuses_all_answers(request_: Request, tmp_path: Path) -> None:
    first, second = ToySource(), ToySource()
    one = built(request_, first)
    other = built(replace(request_, out=tmp_path / "other", selection=Selection(size=32)), second)
    assert first.subject.recorded == 45 and second.subject.recorded == 0
    assert one["calibration"] == other["calibration"] and other["rows"] == 32


def test_an_interrupted_run_keeps_its_answers_and_leaves_no_folder(request_: Request) -> None:
    source, messages = ToySource(), list[str]()
    record = source.subject.record

    def interrupted(prompts: Any, max_tokens: int, k: int, slots: int, done: Any) -> None:
        if source.subject.recorded:
            record(prompts[:3], max_tokens, k, slots, done)
            raise KeyboardInterrupt
        record(prompts, max_tokens, k, slots, done)

    source.subject.record = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        built(request_, source, messages)
    assert source.closed and "the answers so far are saved: the same command goes on from there" in messages
    assert list(request_.out.parent.iterdir()) == []
    again = ToySource()
    built(request_, again)
    assert source.subject.recorded == 16 + 3 and again.subject.recorded == 45 - 19


def test_auto_takes_the_fastest_size_and_reports_when_none_pays(request_: Request, tmp_path: Path) -> None:
    auto = replace(request_, selection=Selection(auto=True))
    assert "no size beats plain decoding" in verdict(built(auto, ToySource(step_ms=1.0)))
    document = built(replace(auto, out=tmp_path / "fast"), ToySource(step_ms=0.001))
    assert document["rows"] == max(document["sizes"], key=lambda line: line["predicted"])["rows"]
    assert "times plain decoding with drafts of" in verdict(document) and document["chosen_by"] == "predicted speed"


def test_every_size_is_measured_on_held_out_prompts(request_: Request) -> None:
    source = ToySource()
    document = built(replace(request_, measure=2), source)
    held = held_out([prompt["id"] for prompt in PROMPTS])
    assert [rows for rows, _ in source.measured] == [64, 128]
    assert all(len(ids) == 2 and set(ids) <= held for _, ids in source.measured)
    assert all(line["measured"]["speedup"]["median"] == 1.5 for line in document["sizes"])


def test_raw_prompts_are_counted_and_answers_to_held_out_prompts_judge(request_: Request) -> None:
    source = ToySource()
    document = built(replace(request_, counted="raw"), source)
    held = held_out([prompt["id"] for prompt in PROMPTS])
    letters = {side: sum(len(t) for p in PROMPTS if (p["id"] in held) == side for t in p["turns"]) for side in (0, 1)}
    assert document["calibration"]["tokens"] == letters[0]
    assert document["calibration"]["held_out_tokens"] == letters[1]
    assert {answer.prompt_id for answer in source.judged_by} == held


def test_every_token_of_a_text_is_counted(request_: Request, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("some words and a line\n" * 50)
    source = ToySource()
    document = built(replace(request_, calibrate=str(text)), source)
    calibration = document["calibration"]
    assert calibration["tokens"] + calibration["held_out_tokens"] == 22 * 50 and calibration["counted"] == "text"
    assert source.judged_by and calibration["answer_tokens"] is None


def test_only_tokens_that_the_head_has_rows_for_are_kept(request_: Request) -> None:
    """EAGLE-3 heads that were trained with a part of the vocabulary are an example."""
    without_row = range(1, 128, 2)
    document = built(replace(request_, selection=Selection(size=32)), ToySource(ids_without_row=without_row))
    _, ids = drafter_folders.read(request_.out)
    assert len(ids) == 32 and not set(ids.tolist()) & set(without_row)
    assert [line["rows"] for line in document["sizes"]] == [32, 64] and document["sizes"][1]["coverage"] < 1


def test_without_trial_drafts_the_size_must_be_named(request_: Request, tmp_path: Path) -> None:
    document = built(request_, ToySource(not_judged="no engine"))
    assert document["sizes"][0]["acceptance"] is None and document["why_not_judged"] == "no engine"
    assert document["sizes"][0]["coverage"] > 0 and verdict(document).startswith("64 of 128 rows")
    for changed, flag in ((Selection(auto=True), "--auto"), (request_.selection, "--measure")):
        asked = replace(request_, out=tmp_path / "no", selection=changed, measure=1)
        with pytest.raises(UsageError, match=f"{flag}: no engine; use --size or --coverage"):
            built(asked, ToySource(not_judged="no engine"))


def test_an_impossible_size_is_refused_before_the_target_answers(request_: Request) -> None:
    source = ToySource()
    with pytest.raises(UsageError, match="size 4096: use 1 to 128"):
        built(replace(request_, selection=Selection(size=4096)), source)
    assert source.subject.recorded == 0 and source.closed


def test_wrong_requests_are_refused(request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(**changes: Any) -> str:
        with pytest.raises(UsageError) as found:
            check(replace(request_, **changes))
        return str(found.value)

    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    assert "exists already" in wrong(out=taken) and "exists already" in wrong(out=request_.model)
    assert "has no prompts to answer" in wrong(calibrate="t.txt", counted="target")
    assert "at least 8" in wrong(tokens=7)
    assert "the other a folder" in wrong(target=taken)
    (taken / "tokenizer.json").write_text("{}")
    assert "only GGUF files are quantised" in wrong(model=taken, target=taken, quantize="q4_0")
    monkeypatch.setattr(vocab_trim, "tokenizer_hash", lambda path: f"{path.name:>40}"[::-1])
    message = wrong(target=tmp_path / "other.gguf")
    assert "m.gguf"[::-1] in message and "other.gguf"[::-1] in message and "family" in message


def test_a_folder_that_cannot_be_created_is_reported_in_one_line(request_: Request, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SpecplugError, match="cannot be written"):
        built(replace(request_, out=tmp_path / "file" / "d"), ToySource())


def test_the_page_shows_every_size_and_escapes_tags(request_: Request) -> None:
    pytest.importorskip("plotly")
    from specplug.reports.trim_report import page

    document = built(replace(request_, measure=1), ToySource(), [])
    text = page(document)
    assert text.count("<tr") > len(document["sizes"]) and 'id="coverage"' in text and 'id="speed"' in text
    tag = "<script>alert(1)</script>"
    calibration = {**document["calibration"], "source": tag}
    assert tag not in page({**document, "command": tag, "chosen_by": tag, "calibration": calibration})
    not_judged = {**document, "why_not_judged": tag, "costs": None}
    assert tag not in page(not_judged) and 'id="speed"' not in page(not_judged)
    for key in ("sizes", "calibration", "rows", "model"):
        with pytest.raises(UsageError, match="not what build vocab-trim writes"):
            page({name: value for name, value in document.items() if name != key})
