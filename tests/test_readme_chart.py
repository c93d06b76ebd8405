"""The README's picture, drawn from a small document whose positions are worked out by hand."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "readme_chart.py"
SVG = "{http://www.w3.org/2000/svg}"

DOCUMENT: dict[str, Any] = {
    "schema": 1,
    "model": "small <1B> Q4_K_M",
    "hardware": {"cpu": "Toy & Co", "cores": 2, "threads": 2},
    "workload": {"name": "builtin", "prompts": 3, "max_tokens": 96, "temperature": 0.0, "repeats": 1, "concurrency": 1},
    "arms": [
        {
            "name": "none",
            "speedup": {"median": 1.0, "low": 1.0, "high": 1.0},
            "categories": {},
        },
        {
            "name": "default",
            "speedup": {"median": 1.5, "low": 1.25, "high": 1.75},
            "categories": {
                "qa": {"speedup": {"median": 0.9, "low": 0.9, "high": 0.9}},
                "code_edit": {"speedup": {"median": 3.0, "low": 2.5, "high": 3.4}},
                "rag": {"speedup": None},
            },
        },
    ],
}


def draw(tmp_path: Path, document: dict[str, Any], *options: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "bench.json").write_text(json.dumps(document), encoding="utf-8")
    command = [sys.executable, str(SCRIPT), str(tmp_path / "bench.json"), str(tmp_path / "out.svg"), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def picture(tmp_path: Path) -> ElementTree.Element:
    done = draw(tmp_path, DOCUMENT)
    assert done.returncode == 0, done.stderr
    return ElementTree.parse(tmp_path / "out.svg").getroot()


def texts(picture: ElementTree.Element) -> list[str]:
    return [node.text or "" for node in picture.iter(f"{SVG}text")]


def test_the_categories_follow_all_prompts_with_the_fastest_first(picture: ElementTree.Element) -> None:
    shown = [text for text in texts(picture) if text in ("all prompts", "code edits", "question answering", "RAG")]
    assert shown == ["all prompts", "code edits", "question answering"]  # rag has no speedup


def test_a_bar_is_as_long_as_its_speedup_on_the_axis_of_the_line_for_plain_decoding(
    picture: ElementTree.Element,
) -> None:
    """The axis goes from 0 at x = 180 to 3.5 at x = 690, so 1.0 lies at 180 + 510 / 3.5 = 325.7."""
    bars: dict[str, list[float]] = {"faster": [], "slower": []}
    for node in picture.iter(f"{SVG}rect"):
        if node.get("class") in bars:
            bars[node.attrib["class"]].append(float(node.attrib["width"]))
    assert bars == {"faster": [218.6, 437.1], "slower": [131.1]}
    plain = [node.attrib["d"] for node in picture.iter(f"{SVG}path") if node.get("class") == "plain"]
    assert len(plain) == 1 and plain[0].startswith("M325.7 ")
    assert "plain decoding = 1.0" in texts(picture)


def test_the_interval_is_drawn_unless_it_has_no_width(picture: ElementTree.Element) -> None:
    ranges = [node.attrib["d"] for node in picture.iter(f"{SVG}path") if node.get("class") == "range"]
    assert [line.split("M")[1].split(" ")[0] for line in ranges] == ["362.1", "544.3"]  # of 1.25 and of 2.5
    assert [line.split("H")[1].split("M")[0] for line in ranges] == ["435.0", "675.4"]  # of 1.75 and of 3.4


def test_values_and_the_measurement_are_readable_as_text(picture: ElementTree.Element) -> None:
    found = texts(picture)
    assert {"1.50", "3.00", "0.90", "Speed with profile default, times plain decoding"} <= set(found)
    assert "small <1B> Q4_K_M, 2 threads of Toy & Co" in found
    description = picture.find(f"{SVG}desc")
    assert description is not None and description.text == "all prompts 1.50; code edits 3.00; question answering 0.90"


def test_it_has_colours_for_light_and_dark_and_needs_no_other_file(picture: ElementTree.Element) -> None:
    style = picture.find(f"{SVG}style")
    assert style is not None and style.text is not None and "prefers-color-scheme: dark" in style.text
    assert not any("href" in name for node in picture.iter() for name in node.attrib)


def test_an_arm_can_be_named(tmp_path: Path) -> None:
    document = copy.deepcopy(DOCUMENT)
    document["arms"].append({**document["arms"][1], "name": "ngram"})
    assert draw(tmp_path, document, "--arm", "ngram").returncode == 0
    assert "Speed with profile ngram" in (tmp_path / "out.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("document", "options", "message"),
    [
        (DOCUMENT, ["--arm", "suffix"], "no arm suffix; the document has default"),
        ({**DOCUMENT, "arms": DOCUMENT["arms"][:1]}, [], "no arm beside none; the document has only none"),
        ({"schema": 1, "runs": [DOCUMENT]}, [], "several concurrencies in one document"),
    ],
)
def test_a_document_that_cannot_be_drawn_is_refused(
    tmp_path: Path, document: dict[str, Any], options: list[str], message: str
) -> None:
    done = draw(tmp_path, document, *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "out.svg").exists()
