"""What the target said: its own tokens over a workload, with its top ids at every position, in one file.

Knows tokens and files. Knows no model and no proposer.
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
ALONE = -1
"""Stands for no second token in the path of an off_path_row."""


class Damaged(SpecplugError):
    """A trace file that is not what was written: it must be recorded again."""


@dataclass(frozen=True, slots=True, eq=False)
class OffPathRows:
    """What the target would say after guesses that are wrong; proposers that read top ids learn from such rows, too.

    at    int32[n]     index into the answer's tokens: the guess follows this one; ascending
    path  int32[n, 2]  the guess: one token and ALONE, or two
    topk  int32[n, k]  the target's top ids after it
    """

    at: IntArray
    path: IntArray
    topk: IntArray


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """One answer. The first of `tokens` came with reading the prompt.

    prompt  int32[p]         tokens int32[n], n >= 1
    topk    int32[n - 1, k]  row i: the target's top ids after tokens[i]
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
    """The answers in the order in which they were given; `about` says of what model and work, in plain data."""

    about: Mapping[str, Any]
    answers: tuple[Answer, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that a pass was needed for: all but the first of each answer."""
        return sum(len(answer.tokens) - 1 for answer in self.answers)

    def categories(self) -> list[str]:
        return list(dict.fromkeys(answer.category for answer in self.answers))


class Recorder:
    """A proposer that never guesses and takes down what comes. `taken` holds (tokens, topk) of ended sequences."""

    def __init__(self, k: int) -> None:
        self.requires = Requires(topk=k)
        self.buckets: tuple[Bucket, ...] = (Bucket("never", 0.5),)
        self.taken: list[tuple[IntArray, IntArray]] = []
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
        self.taken.append((int_array(tokens), np.concatenate(rows) if rows else empty))


def save(trace: Trace, path: Path) -> str:
    """Write the trace whole or not at all; returns its checksum."""
    arrays = _arrays(trace)
    found = _checksum(arrays)
    content = io.BytesIO()
    whole: dict[str, Any] = {**arrays, "checksum": np.array(found)}
    np.savez_compressed(content, **whole)
    write_atomically(path, content.getvalue())
    return found


def checksum(trace: Trace) -> str:
    """SHA-256 of all that the trace holds."""
    return _checksum(_arrays(trace))


def load(path: Path) -> Trace | None:
    """The trace in a file; None where there is none. Damaged says that it cannot be trusted."""
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Damaged(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, EOFError, TypeError, AttributeError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise Damaged(f"{path}: no trace, or a damaged one ({error})") from error
    written = arrays.pop("checksum", None)
    if written is None or str(written) != _checksum(arrays):
        raise Damaged(f"{path}: its checksum does not fit its content")
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
        "aside_lengths": int_array([len(off_path_row.at) for off_path_row in off_path_rows]),
        "prompts": _joined([a.prompt for a in answers], (0,)),
        "tokens": _joined([a.tokens for a in answers], (0,)),
        "topk": _joined([a.topk for a in answers], (0, k)),
        "aside_at": _joined([off_path_row.at for off_path_row in off_path_rows], (0,)),
        "aside_path": _joined([off_path_row.path for off_path_row in off_path_rows], (0, 2)),
        "aside_topk": _joined([off_path_row.topk for off_path_row in off_path_rows], (0, k)),
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


def _split(whole: IntArray, lengths: IntArray) -> list[IntArray]:
    return np.split(whole, np.cumsum(lengths)[:-1]) if len(lengths) else []


def _checksum(arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
