"""Prompts for fill-in-the-middle: their order, what is cut, and the tokens that a model's file names."""

from pathlib import Path

import numpy as np
import pytest

from specplug.core import IntArray, int_array
from specplug.generation.fill_in import SNIPPET, FillInTokens, OtherFile, fitted, in_order, other_files

ALL = FillInTokens(prefix=1000, suffix=1001, middle=1002, repository=1003, file=1004, begin=1005)
THREE = FillInTokens(prefix=1000, suffix=1001, middle=1002)


def tokens(text: str) -> IntArray:
    return int_array(list(text.encode()))


@pytest.mark.parametrize(
    ("marks", "suffix_first", "expected"),
    [
        (THREE, False, [9, 1000, 1, 2, 1001, 3, 1002]),
        (THREE, True, [9, 1001, 3, 1000, 1, 2, 1002]),
        (ALL, False, [9, 1005, 1000, 1, 2, 1001, 3, 1002]),
    ],
)
def test_the_marks_stand_before_their_parts(marks: FillInTokens, suffix_first: bool, expected: list[int]) -> None:
    assert in_order(marks, [1, 2], [3], suffix_first=suffix_first, before=[9]).tolist() == expected


def test_other_files_have_names_where_the_model_has_marks_for_them() -> None:
    files = [OtherFile("x = 1", "a.py"), OtherFile("y", "b.py")]
    named = [1003, *b"myproject\n", 1004, *b"a.py\nx = 1", 1004, *b"b.py\ny", 1004, *b"filename\n"]
    assert other_files(ALL, files, tokens).tolist() == named
    assert other_files(THREE, files, tokens).tolist() == [*SNIPPET.encode(), *b"x = 1", *SNIPPET.encode(), *b"y"]
    assert other_files(THREE, [], tokens).tolist() == []


@pytest.mark.parametrize(
    ("context", "answer", "lengths"),
    [
        # A window of 2,048 tokens: 1,536 of the prefix, and of the suffix 512 without the prompt's 10 and 2 more.
        (8192, 100, (1546, 500, 6042)),
        # A window of 996: 747 of the prefix, 249 - 12 of the suffix, and the other files have what is left.
        (1100, 100, (757, 237, 2)),
        (110, 100, (13, 0, 0)),
        (100, 100, (10, 0, 0)),
    ],
)
def test_what_does_not_fit_is_cut(context: int, answer: int, lengths: tuple[int, int, int]) -> None:
    prefix, prompt, suffix, extra = (np.arange(size, dtype=np.int32) for size in (3000, 10, 3000, 9000))
    before, after, others = fitted(prefix, prompt, suffix, extra, context=context, answer=answer)
    assert (len(before), len(after), len(others)) == lengths
    assert before[-10:].tolist() == list(range(10)), "all of the prompt"
    if len(before) > 10:
        assert before[-11] == 2999, "the end of the prefix"
    assert after[:2].tolist() == [0, 1][: len(after)] and others[-1:].tolist() == [8999][: len(others)]


def test_short_parts_are_kept_whole() -> None:
    parts = [tokens(text) for text in ("def f(", "x", "): pass", "other")]
    before, after, others = fitted(*parts, context=512, answer=64)
    assert [bytes(one.tolist()) for one in (before, after, others)] == [b"def f(x", b"): pass", b"other"]


@pytest.mark.parametrize(
    ("control", "found"),
    [
        ((), None),
        (("<|fim_prefix|>", "<|fim_suffix|>"), None),
        (("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"), (0, 1, 2, None, None)),
        (("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|repo_name|>", "<|file_sep|>"), (0, 1, 2, 3, 4)),
    ],
)
def test_the_files_own_marks_are_found(
    control: tuple[str, ...], found: tuple[int | None, ...] | None, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    from tiny_architectures import llama

    from specplug.engines.llama_cpp.described_model import description_of, fill_in_tokens_of
    from specplug.engines.llama_cpp.model import load_model
    from specplug.profile import Runtime

    path = llama(tmp_path / "tiny.gguf", layers=1, control=control)
    with load_model(path, Runtime(threads=1, context=256)) as model:
        marks, described = fill_in_tokens_of(model), description_of(model)
    first = described.num_tokens - 2 - len(control)
    if found is None:
        assert marks is None
    else:
        assert marks == FillInTokens(*(None if place is None else first + place for place in found))
    assert (described.file, described.num_tokens, described.width) == ("tiny.gguf", 2048, 64)
    assert described.created == int(path.stat().st_mtime) and 0 < described.num_bytes < path.stat().st_size
    assert (described.begin_text, described.end_text, described.train_context) == ("<|start|>", "<|end|>", 4096)
    assert (described.architecture, described.weight_format) == ("llama", "F32")
