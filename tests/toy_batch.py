"""A batch as vLLM's model runner lays it out, over the toy target: rows move, prompts are read in pieces, requests are
preempted and aborted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np

from specplug.core import IntArray, int_array
from specplug.engines.vllm.drafting import Drafting, Pass
from specplug.testing import ToyTarget

ROWS, WIDTH = 8, 400


@dataclass
class ToyRequest:
    """One request; `text` is its prompt and its answer so far, `read` how many of these tokens the target has read."""

    id: str
    prompt: list[int]
    max_tokens: int
    extra_args: dict[str, Any] | None = None
    text: list[int] = field(default_factory=list)
    draft: list[int] = field(default_factory=list)
    read: int = 0

    def __post_init__(self) -> None:
        self.text = list(self.prompt)

    @property
    def answer(self) -> list[int]:
        return self.text[len(self.prompt) :]

    @property
    def params(self) -> Any:
        return SimpleNamespace(max_tokens=self.max_tokens, extra_args=self.extra_args)


class ToyBatch:
    """Runs requests with drafts from `drafting` as vLLM would, and checks every draft against what vLLM allows."""

    def __init__(self, drafting: Drafting, target: ToyTarget, k: int, *, chunk: int = 1 << 20, max_len: int = WIDTH):
        self.drafting = drafting
        self.target = target
        self.k = k
        self.chunk = chunk
        self.max_len = max_len
        self.running: list[ToyRequest] = []
        self.waiting: list[ToyRequest] = []
        self.finished: list[ToyRequest] = []
        self.passes = 0
        self.accepted = 0
        self.cut: Callable[[ToyRequest], int] = lambda request: k
        """To how many tokens the scheduler shortens a draft, as a grammar or a token budget would."""

    def preempt(self, request: ToyRequest) -> None:
        """The request waits; when it returns, on any row, it is read again from the start."""
        self.running.remove(request)
        request.read, request.draft = 0, []
        self.waiting.append(request)

    def abort(self, request: ToyRequest) -> None:
        (self.running if request in self.running else self.waiting).remove(request)

    def step(self, shuffle: Random | None = None) -> None:
        while self.waiting and len(self.running) < ROWS:
            self.running.append(self.waiting.pop(0))
        if shuffle is not None:
            shuffle.shuffle(self.running)
        if not self.running:
            return
        token_ids = np.zeros((ROWS, self.max_len + 64), dtype=np.int32)
        num_tokens, num_prompt = np.zeros(ROWS, dtype=np.int32), np.zeros(ROWS, dtype=np.int32)
        sampled: list[list[int]] = []
        draft_lengths: list[int] = []
        top_rows: list[IntArray] = []
        num_read = 0
        for row, request in enumerate(self.running):
            draft = request.draft[: self.cut(request)]
            request.draft = []
            piece = min(self.chunk, len(request.text) - request.read)
            complete = request.read + piece == len(request.text)
            draft = draft if complete else []
            num_read += piece + len(draft)
            request.read += piece
            new: list[int] = []
            accepting = complete
            for place in range(len(draft) + 1):
                top_rows.append(self.target.topk([*request.text, *draft[:place]], 8))
                if accepting:
                    new.append(int(top_rows[-1][0]))
                    accepting = place < len(draft) and draft[place] == new[-1]
            draft_lengths.append(len(draft))
            if complete:
                self.accepted += len(new) - 1
                request.read += len(new) - 1
                request.text += new
            sampled.append(new)
            token_ids[row, : len(request.text)] = request.text
            num_tokens[row], num_prompt[row] = len(request.text), len(request.prompt)
        table = np.stack(top_rows)

        def top_ids(rows: IntArray, k: int) -> IntArray:
            return int_array(table[rows, :k])

        by_id = {request.id: request for request in [*self.running, *self.waiting]}
        drafts = self.drafting.step(
            Pass(
                [request.id for request in self.running],
                sampled,
                draft_lengths if any(draft_lengths) else None,
                num_tokens,
                num_prompt,
                token_ids,
                num_read,
                by_id,
                lambda request_id: by_id[request_id].params,
                top_ids if self.drafting.wants_topk else None,
            )
        )
        self.passes += 1
        assert len(drafts) == len(self.running)
        for request, new, draft in zip(list(self.running), sampled, drafts, strict=True):
            assert len(draft) <= self.k and all(0 <= token < self.target.vocab for token in draft)
            if not new:
                assert draft == []
            if len(request.answer) >= request.max_tokens or len(request.text) >= self.max_len:
                del request.text[min(len(request.prompt) + request.max_tokens, self.max_len) :]
                self.running.remove(request)
                self.finished.append(request)
            else:
                request.draft = draft

    def run(self, requests: Sequence[ToyRequest]) -> None:
        self.waiting += requests
        while self.running or self.waiting:
            self.step()
