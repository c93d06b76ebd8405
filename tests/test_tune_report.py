"""The report: what the page contains, and that a browser shows it without loading anything else."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from toy_subject import ToySubject

from specplug.bench.workloads import Prompt
from specplug.errors import UsageError
from specplug.profile import Profile, Runtime, user_folder
from specplug.tune.document import evidence
from specplug.tune.session import tune
from specplug.tune.tune_request import Request
from specplug.tune.verdict import interval_text, verdict

pytest.importorskip("plotly")


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The document of a tune of the toy target."""
    folder = tmp_path_factory.mktemp("tune")
    patch = pytest.MonkeyPatch()
    for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME"):
        patch.setenv(name, str(folder / name))
    (folder / "m.gguf").write_bytes(b"weights")
    prompts = [Prompt(str(i), f"kind {i % 2}", (f"word {i * 5}",)) for i in range(6)]
    base = Profile("base", runtime=Runtime(threads=1, context=256))
    request = Request(folder / "m.gguf", base, prompts, "toy", "mine", folder / "mine.yaml", 300.0, max_tokens=40)
    outcome = tune(request, opener=lambda asked: ToySubject(asked.base, lambda rows: 10.0 + 0.5 * rows))
    patch.undo()
    return outcome.document


def test_the_page_contains_all_settings_and_results(document: dict[str, Any]) -> None:
    from specplug.reports.tune_report import page

    text = page(document)
    assert document["chosen"] in text and text.count("<tr") > len(document["settings"])
    assert all(line["name"] in text for line in document["settings"])
    short = page(evidence(document))
    assert len(short) < len(text) and "further settings were replayed" in short


def test_the_page_explains_every_column_and_gives_the_next_step(document: dict[str, Any]) -> None:
    from specplug.reports.tune_report import COLUMNS, page

    text = page(document)
    for name in COLUMNS:
        assert f"<th>{name}</th>" in text and f"<b>{name}</b>" in text
    assert f"specplug run --profile {document['path']}" in text
    plain = page({**document, "chosen": "none", "rejected": {document["chosen"]: "not faster"}})
    assert "no setting was shown to be faster" in plain and f"{document['chosen']}: " in plain and "--budget" in plain
    assert f"<p>{document['chosen']}</p>" in plain, (
        "charts show the setting with the best prediction, not plain decoding"
    )


def test_the_verdict_gives_the_result_of_every_finalist_and_the_next_step() -> None:
    speedup = {"median": 1.104, "low": 0.94, "high": 1.45}
    line = {"name": "suffix, measured 8", "confirmed": {"1": {"speedup": speedup, "over_rest": None}}}
    lost = {
        "chosen": "none",
        "level": 1,
        "settings": [line],
        "rejected": {line["name"]: "not shown to be faster"},
        "fingerprint": {"engine": "llama-cpp"},
        "workload": {"answers": 15},
        "budget_s": 90.0,
        "command": "specplug tune --model m.gguf --budget=90s",
    }
    assert verdict(lost).startswith(
        "plain decoding: no setting was shown to be faster, with 15 different answers "
        "(suffix, measured 8: 1.10 (0.94-1.45), not shown to be faster); "
        "to time more answers: specplug tune --model m.gguf --budget 6m, or "
    )
    few = {**line, "confirmed": {"1": {"speedup": speedup, "answers": 4, "over_rest": None}}}
    assert "(suffix, measured 8: 1.10 (-), not shown to be faster)" in verdict({**lost, "settings": [few]})
    untimed = {**lost, "settings": [{**line, "confirmed": {"1": {"speedup": None}}}]}
    assert "no setting could be run live in this budget" in verdict(untimed)
    assert "specplug run --profile default remains right" in verdict(lost)
    on_vllm = verdict({**lost, "fingerprint": {"engine": "vllm"}})
    assert "--profile default" not in on_vllm and on_vllm.endswith("use vLLM without specplug: vllm serve MODEL")
    won = {**lost, "chosen": line["name"], "rejected": {}, "path": "/my profiles/p.yaml"}
    assert verdict(won) == (
        "suffix, measured 8: 1.10 times as fast as plain decoding (95% interval 0.94-1.45); "
        "use it with: specplug run --profile '/my profiles/p.yaml'"
    )
    own = {**won, "path": str(user_folder() / "mine.yaml")}
    assert verdict(own).endswith("use it with: specplug run --profile mine")


def test_an_interval_of_a_single_answer_is_a_dash() -> None:
    assert interval_text({"median": 1.06, "low": 1.06, "high": 1.06}) == "1.06 (-)"
    assert interval_text({"median": 1.24, "low": 1.16, "high": 1.33}) == "1.24 (1.16-1.33)"
    assert interval_text(None) == "-"
    assert interval_text({"median": 1.24, "low": 1.16, "high": 1.33}, 4) == "1.24 (-)"
    assert interval_text({"median": 1.24, "low": 1.16, "high": 1.33}, 5) == "1.24 (1.16-1.33)"


def test_losing_settings_stay_in_the_evidence(document: dict[str, Any]) -> None:
    kept = {line["name"] for line in evidence(document)["settings"]}
    assert document["settings"][-1]["name"] in kept
    assert any("static" in name for name in kept)


TAG = "<script>alert(1)</script>"


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from leaves(inner, (*path, key))
    if not isinstance(value, dict | list):
        yield path


def with_leaf(document: dict[str, Any], path: tuple[Any, ...], value: object) -> dict[str, Any]:
    changed = copy.deepcopy(document)
    inner: Any = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


@pytest.mark.parametrize("value", [TAG, 0, -1, None, [TAG], {TAG: TAG}], ids=str)
def test_values_from_a_document_become_text_or_are_refused(
    document: dict[str, Any], value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any value at any place of the evidence: the page does not contain its tags, or the document is refused."""
    from specplug.reports import tune_report

    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "")
    brief = {**document, "settings": [document["settings"][i] for i in (0, 1, -1)]}
    paths = [path for path in leaves(brief) if not (path[0] == "settings" and path[1] == 1)]
    keys = {path[:2] if path[0] != "settings" else path: path for path in paths}  # one leaf of each type
    for path in keys.values():
        try:
            assert TAG not in tune_report.page(with_leaf(brief, path, value)), path
        except UsageError as error:
            assert "not what a tune writes" in str(error)


@pytest.mark.parametrize("key", ["settings", "cost", "workload", "chosen", "fingerprint"])
def test_a_document_that_tune_did_not_write_is_refused(document: dict[str, Any], key: str) -> None:
    from specplug.reports.tune_report import page

    for wrong in ({k: v for k, v in document.items() if k != key}, {"a": 1}):
        with pytest.raises(UsageError, match="not what a tune writes"):
            page(wrong)


@pytest.mark.parametrize("width", [1200, 400])
def test_a_browser_shows_it(document: dict[str, Any], tmp_path: Path, browser: Any, width: int) -> None:
    from specplug.reports.tune_report import page as written

    path = tmp_path / "report.html"
    path.write_text(written(document), encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": 900})
    problems: list[str] = []
    requested: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: requested.append(request.url))
    page.goto(path.as_uri())
    for name in ("cost", "settings", "acceptance", "what-if"):
        page.wait_for_selector(f"#{name} .main-svg", state="visible")
        assert page.locator(f"#{name} .trace").count() >= 1
    assert page.locator("#verdict").inner_text().startswith(document["chosen"])
    assert page.locator("tr.chosen").count() == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    before = page.evaluate("document.getElementById('what-if').data[0].y")
    handle = page.locator("#what-if .slider-grip-rect")
    handle.scroll_into_view_if_needed()
    box = handle.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.25 * width, box["y"] + box["height"] / 2, steps=5)
    page.mouse.up()
    page.wait_for_timeout(500)
    after = page.evaluate("document.getElementById('what-if').data[0].y")
    assert len(before) == len(after) and after[-1] > before[-1]
    assert problems == [] and requested == [path.as_uri()]
    page.close()
