import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specplug.bench.workloads import Prompt, categories, limit, load_workload, parse_workload
from specplug.errors import UsageError

CATEGORIES = ["chat", "qa", "code_edit", "summarise_with_quotes", "translation", "maths", "rag"]


def line(**entry: object) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def test_spec_bench_files_are_read_unchanged() -> None:
    content = line(question_id=81, category="writing", turns=["Write.", "Now shorter."], reference=[1])
    content += line(question_id=82, category="math", turns=["Add."])
    assert parse_workload(content, "w") == [
        Prompt("81", "writing", ("Write.", "Now shorter.")),
        Prompt("82", "math", ("Add.",)),
    ]


def test_prompt_is_one_turn_and_a_missing_id_is_the_line() -> None:
    content = b"\n" + line(category="a", prompt="one") + b"  \r\n" + line(category="b", prompt="two", id="x")
    assert parse_workload(content, "w") == [Prompt("2", "a", ("one",)), Prompt("x", "b", ("two",))]


def test_byte_order_marks_and_crlf_line_ends_are_accepted() -> None:
    content = b"\xef\xbb\xbf" + line(category="a", prompt="é\u2028x").replace(b"\n", b"\r\n")
    assert parse_workload(content, "w") == [Prompt("1", "a", ("é\u2028x",))]


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (b"{", "not JSON"),
        (b'{"category": "a", "prompt": "\xff"}', "byte 29 is not UTF-8"),
        (b"[1]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"{}", "no category among its keys (none)"),
        (line(categroy="a", prompt="x"), "no category among its keys (categroy, prompt)"),
        (line(category=3, prompt="x"), "category is not text"),
        (line(category=" ", prompt="x"), "category is not text"),
        (line(category="a"), "neither turns nor prompt"),
        (line(category="a", prompt="x", turns=["x"]), "both turns and prompt"),
        (line(category="a", turns="x"), "turns is not a list"),
        (line(category="a", turns=[]), "turns is not a list"),
        (line(category="a", turns=["x", ""]), "a turn or prompt is empty or not text"),
        (line(category="a", turns=[["x"]]), "a turn or prompt is empty or not text"),
        (line(category="a", prompt=None), "a turn or prompt is empty or not text"),
        (line(category="a", prompt="x", id=[1]), "the id [1] is neither text nor"),
        (line(category="a", prompt="x", id=True), "the id True is neither text nor"),
        (line(category="a", prompt="\ud800"), "half a surrogate pair"),
    ],
)
def test_a_broken_line_is_named_by_number(broken: bytes, complaint: str) -> None:
    content = line(category="a", prompt="fine") + b"\n" + broken
    with pytest.raises(UsageError) as caught:
        parse_workload(content, "some.jsonl")
    message = str(caught.value)
    assert message.startswith("some.jsonl: line 3: ")
    assert complaint in message
    assert "\n" not in message


def test_an_id_that_is_used_twice_is_refused() -> None:
    content = line(category="a", prompt="x", id=7) + line(category="a", prompt="y", id="7")
    with pytest.raises(UsageError, match="line 2: id 7 was used on line 1"):
        parse_workload(content, "w")


@given(st.binary() | st.text().map(str.encode))
def test_any_bytes_yield_prompts_or_a_usage_error(content: bytes) -> None:
    try:
        prompts = parse_workload(content, "w")
    except UsageError:
        return
    assert len(prompts) <= content.count(b"\n") + 1


def test_files_without_prompts_or_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl"
    for content in (b"", b"\n \n"):
        path.write_bytes(content)
        with pytest.raises(UsageError, match="holds no prompts"):
            load_workload(path)
    with pytest.raises(UsageError, match="no such workload"):
        load_workload(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(UsageError, match="cannot be read"):
        load_workload(tmp_path)
    with pytest.raises(UsageError, match="cannot be read"):
        load_workload("a\0b")


def test_limit_takes_the_first_of_every_category_in_order() -> None:
    prompts = [Prompt(str(i), category, ("x",)) for i, category in enumerate("abacab")]
    assert [prompt.id for prompt in limit(prompts, 1)] == ["0", "1", "3"]
    assert [prompt.id for prompt in limit(prompts, 2)] == ["0", "1", "2", "3", "5"]
    assert limit(prompts, 9) == prompts
    assert categories(prompts) == ["a", "b", "c"]


class TestBuiltIn:
    def test_it_has_four_prompts_of_every_category(self) -> None:
        prompts = load_workload("builtin")
        assert categories(prompts) == CATEGORIES
        assert set(Counter(prompt.category for prompt in prompts).values()) == {4}
        assert len({turn for prompt in prompts for turn in prompt.turns}) >= 28

    def test_code_edits_contain_a_complete_function_to_copy(self) -> None:
        for prompt in load_workload("builtin"):
            if prompt.category == "code_edit":
                code = re.findall(r"```\w+\n(.*?)```", prompt.turns[0], re.DOTALL)
                assert len(code) == 1
                assert 20 <= len(code[0].strip().splitlines()) <= 40
                assert "Change nothing else" in prompt.turns[0]

    def test_rag_and_quoting_prompts_ask_for_words_of_the_prompt(self) -> None:
        for prompt in load_workload("builtin"):
            if prompt.category in ("rag", "summarise_with_quotes"):
                assert "word for word" in prompt.turns[0]
                assert len(prompt.turns[0]) > 400
