"""The recorded answers of the target to a workload: its tokens, with its top ids at every position, in one file.

This module depends on tokens and files, not on a model or a proposer.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from specplug.core import EMPTY, Bucket, Draft, IntArray, Requires, Step, int_array
from specplug.errors import SpecplugError
from specplug.machine.files import write_atomically

SCHEMA = 1
TRACES = "traces"
"""The folder of recorded traces, in the cache folder."""

ALONE = -1
"""Stands for the second token in the path of an off-path row that has only one."""


class Damaged(SpecplugError):
    """A trace file that cannot be used: the trace must be recorded again."""


@dataclass(frozen=True, slots=True, eq=False)
class OffPathRows:
    """The target's rows after tokens that are not in its answer. Proposers that read top ids learn from these, too.

    at    int32[n]     index into the answer's tokens of the token before the path; ascending
    path  int32[n, 2]  the tokens off the answer: one token and ALONE, or two tokens
    topk  int32[n, k]  the target's top ids after the path
    """

    at: IntArray
    path: IntArray
    topk: IntArray


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """One answer.

    prompt  int32[p]
    tokens  int32[n]         n >= 1; prefill produces the first one
    topk    int32[n - 1, k]  row i holds the target's top ids after tokens[i]
    """

    prompt_id: str
    turn: int
    category: str
    prompt: IntArray
    tokens: IntArray
    topk: IntArray
    off_path_rows: OffPathRows | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """The answers in recorded order. `about` describes the model, the workload and the settings, in plain data."""

    about: Mapping[str, Any]
    answers: tuple[Answer, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that decoding emits: all but the first of each answer."""
        return sum(len(answer.tokens) - 1 for answer in self.answers)

    def categories(self) -> list[str]:
        return list(dict.fromkeys(answer.category for answer in self.answers))


class Recorder:
    """A proposer that records what it observes and proposes nothing.

    recorded  (tokens, topk) of the sequences that have ended
    """

    def __init__(self, k: int) -> None:
        self.requires = Requires(topk=k)
        self.buckets: tuple[Bucket, ...] = (Bucket("never", 0.5),)
        self.recorded: list[tuple[IntArray, IntArray]] = []
        self._running: dict[int, tuple[list[int], list[IntArray]]] = {}

    def begin(self, seq: int, prompt: IntArray) -> None:
        self._running[seq] = ([int(prompt[-1])], [])

    def propose(self, seq: int, budget: int) -> Draft:
        return EMPTY

    def observe(self, seq: int, step: Step) -> None:
        assert step.topk is not None
        tokens, rows = self._running[seq]
        tokens += step.emitted
        rows.append(step.topk)

    def end(self, seq: int) -> None:
        tokens, rows = self._running.pop(seq)
        empty = np.zeros((0, self.requires.topk), dtype=np.int32)
        self.recorded.append((int_array(tokens), np.concatenate(rows) if rows else empty))


def save(trace: Trace, path: Path) -> str:
    """Write the trace to the file in one step; returns its checksum."""
    arrays = _arrays(trace)
    digest = _checksum(arrays)
    content = io.BytesIO()
    with_checksum: dict[str, Any] = {**arrays, "checksum": np.array(digest)}
    np.savez_compressed(content, **with_checksum)
    write_atomically(path, content.getvalue())
    return digest


def checksum(trace: Trace) -> str:
    """SHA-256 of everything in the trace."""
    return _checksum(_arrays(trace))


def load(path: Path) -> Trace | None:
    """The trace in a file; None where there is no file. Raises Damaged for a file that cannot be used."""
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Damaged(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, EOFError, TypeError, AttributeError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise Damaged(f"{path}: this is not a trace, or it is damaged ({error})") from error
    written = arrays.pop("checksum", None)
    if written is None or str(written) != _checksum(arrays):
        raise Damaged(f"{path}: the checksum does not match the content")
    about = json.loads(str(arrays["about"]))
    if about.pop("schema", None) != SCHEMA:
        raise Damaged(f"{path}: written by another version of specplug")
    return Trace(about, tuple(_answers(arrays)))


def _arrays(trace: Trace) -> dict[str, npt.NDArray[Any]]:
    answers = trace.answers
    k = answers[0].topk.shape[1] if answers else 1
    names = [[a.prompt_id, a.turn, a.category, a.off_path_rows is not None] for a in answers]
    off_path_rows = [a.off_path_rows for a in answers if a.off_path_rows is not None]
    return {
        "about": np.array(json.dumps({"schema": SCHEMA, **trace.about}, sort_keys=True)),
        "names": np.array(json.dumps(names)),
        "prompt_lengths": int_array([len(a.prompt) for a in answers]),
        "token_lengths": int_array([len(a.tokens) for a in answers]),
        "aside_lengths": int_array([len(rows.at) for rows in off_path_rows]),
        "prompts": _joined([a.prompt for a in answers], (0,)),
        "tokens": _joined([a.tokens for a in answers], (0,)),
        "topk": _joined([a.topk for a in answers], (0, k)),
        "aside_at": _joined([rows.at for rows in off_path_rows], (0,)),
        "aside_path": _joined([rows.path for rows in off_path_rows], (0, 2)),
        "aside_topk": _joined([rows.topk for rows in off_path_rows], (0, k)),
    }


def _answers(arrays: Mapping[str, npt.NDArray[Any]]) -> list[Answer]:
    names = json.loads(str(arrays["names"]))
    prompts = _split(arrays["prompts"], arrays["prompt_lengths"])
    tokens = _split(arrays["tokens"], arrays["token_lengths"])
    topk = _split(arrays["topk"], arrays["token_lengths"] - 1)
    off_path_rows = iter(
        [
            OffPathRows(*parts)
            for parts in zip(
                *(_split(arrays[f"aside_{name}"], arrays["aside_lengths"]) for name in ("at", "path", "topk")),
                strict=True,
            )
        ]
    )
    return [
        Answer(prompt_id, turn, category, prompt, own, top, next(off_path_rows) if has_off_path else None)
        for (prompt_id, turn, category, has_off_path), prompt, own, top in zip(
            names, prompts, tokens, topk, strict=True
        )
    ]


def _joined(parts: Sequence[IntArray], empty: tuple[int, ...]) -> IntArray:
    return np.concatenate(parts).astype(np.int32) if parts else np.zeros(empty, dtype=np.int32)


def _split(joined: IntArray, lengths: IntArray) -> list[IntArray]:
    return np.split(joined, np.cumsum(lengths)[:-1]) if len(lengths) else []


def _checksum(arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
