"""Traces on disk: they are read back unchanged, and damage is detected."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specplug.core import EMPTY, Step, int_array
from specplug.tune.trace import ALONE, Answer, Damaged, OffPathRows, Recorder, Trace, checksum, load, save

K = 3


def answer(seed: int, tokens: int, off_path_rows: int | None = None) -> Answer:
    draw = np.random.default_rng(seed)
    rows = [draw.integers(0, 99, (n, K)).astype(np.int32) for n in (tokens - 1, off_path_rows or 0)]
    extra = None
    if off_path_rows is not None:
        at = np.sort(draw.integers(0, tokens, off_path_rows)).astype(np.int32)
        extra = OffPathRows(at, np.full((off_path_rows, 2), ALONE, dtype=np.int32), rows[1])
    prompt, own = (draw.integers(0, 99, n).astype(np.int32) for n in (seed + 1, tokens))
    return Answer(f"p{seed}", seed % 2, "chat", prompt, own, rows[0], extra)


def same(one: Answer, two: Answer) -> bool:
    names = [(a.prompt_id, a.turn, a.category, a.off_path_rows is None) for a in (one, two)]
    pairs = [(one.prompt, two.prompt), (one.tokens, two.tokens), (one.topk, two.topk)]
    if one.off_path_rows and two.off_path_rows:
        pairs += [
            (getattr(one.off_path_rows, name), getattr(two.off_path_rows, name)) for name in ("at", "path", "topk")
        ]
    return names[0] == names[1] and all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in pairs)


@given(st.lists(st.tuples(st.integers(1, 6), st.none() | st.integers(0, 4)), max_size=5))
def test_a_saved_trace_is_read_back_unchanged(shapes: list[tuple[int, int | None]]) -> None:
    from tempfile import TemporaryDirectory

    trace = Trace({"max_tokens": 8}, tuple(answer(i, *shape) for i, shape in enumerate(shapes)))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.npz"
        save(trace, path)
        again = load(path)
    assert again is not None and again.about == trace.about and len(again.answers) == len(shapes)
    assert all(same(one, two) for one, two in zip(trace.answers, again.answers, strict=True))
    assert again.num_tokens == sum(tokens - 1 for tokens, _ in shapes)


def test_a_missing_file_has_no_trace(tmp_path: Path) -> None:
    assert load(tmp_path / "none.npz") is None


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text"])
def test_damage_is_detected(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "trace.npz"
    save(Trace({"max_tokens": 8}, tuple(answer(i, 30) for i in range(4))), path)
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 0xFF
    path.write_bytes({"truncated": content[:-40], "empty": b"", "text": b"hello"}.get(damage, bytes(content)))
    with pytest.raises(Damaged):
        load(path)


def test_content_that_does_not_match_its_checksum_is_refused(tmp_path: Path) -> None:
    """The archive is intact, but its tokens are not those of the checksum."""
    path = tmp_path / "trace.npz"
    save(Trace({"max_tokens": 8}, (answer(1, 5),)), path)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    arrays["tokens"] = arrays["tokens"] + np.int32(1)
    np.savez(path, **arrays)
    with pytest.raises(Damaged, match="checksum"):
        load(path)


def test_the_recorder_records_emitted_tokens_and_top_ids() -> None:
    recorder = Recorder(2)
    recorder.begin(0, int_array([7, 8]))
    recorder.begin(5, int_array([9]))
    for token in (3, 4):
        assert len(recorder.propose(0, 8)) == 0
        recorder.observe(0, Step([token], EMPTY, [], int_array([token, token + 1]).reshape(1, 2)))
    recorder.end(0)
    recorder.end(5)
    (tokens, topk), (alone, nothing) = recorder.recorded
    assert tokens.tolist() == [8, 3, 4] and topk.tolist() == [[3, 4], [4, 5]]
    assert alone.tolist() == [9] and nothing.shape == (0, 2)


def test_the_checksum_covers_everything_in_a_trace(tmp_path: Path) -> None:
    trace = Trace({"max_tokens": 8}, tuple(answer(i, 4) for i in range(3)))
    assert save(trace, tmp_path / "t.npz") == checksum(trace)
    assert checksum(Trace({"max_tokens": 9}, trace.answers)) != checksum(trace)
    assert checksum(Trace(trace.about, trace.answers[1:])) != checksum(trace)
