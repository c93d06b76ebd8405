"""What a profile remembers from one process to the next: answers, in a corpus, and the learned acceptance.

It opens no engine. Whoever generates passes it the answers.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Lock
from time import monotonic

from specplug.core import IntArray
from specplug.corpora.answer_memory import ADVICE, Acceptance, Memory, answer_document
from specplug.corpora.folder import place
from specplug.errors import SpecplugError, UsageError
from specplug.machine import fingerprint
from specplug.models.references import tokenizer_hash, vocabulary_size
from specplug.profile import Profile, Remember
from specplug.profile.with_corpora import DATASTORE, corpora_of, may_add_corpora, with_corpora
from specplug.registry import ProposerSpec

WRITE_SECONDS = 5.0
"""Time between two writes of a process that gives many answers."""

MOST_WAITING = 1000
"""Answers that wait for another attempt where they could not be written; older ones are dropped."""


class Remembered:
    """The answers of one process that are to be remembered, and the memory that they go to, if any.

    `take` and `write` may be called in two threads.

    profile  drafts from what is remembered already, where that is possible
    memory   None where the profile remembers nothing: then no method does anything
    """

    def __init__(
        self,
        profile: Profile,
        find_model: Callable[[], Path],
        notify: Callable[[str], None],
        *,
        reopened: bool = False,
    ) -> None:
        """UsageError where the memory is of another tokenizer, or the folder holds something else.

        find_model  the file or folder of the profile's model
        reopened    whether what is written is opened again while the engine runs
        """
        self.profile = profile
        self.memory: Memory | None = None
        self._prompts = profile.remember is not None and profile.remember.prompts
        self._notify = notify
        self._answers: list[IntArray] = []
        self._learned: Acceptance = {}
        self._lock = Lock()
        """Guards these two."""
        self._written_s = monotonic()
        self._problem = ""
        """The last one that was reported."""
        if profile.remember is not None:
            self.memory = _memory(profile.remember, find_model())
            self._draft_from(self.memory, reopened)

    @property
    def name(self) -> str:
        """The name of the corpus; empty where nothing is remembered."""
        return self.memory.ref if self.memory is not None else ""

    def _draft_from(self, memory: Memory, reopened: bool) -> None:
        known = memory.check()
        size = known.size if known is not None else 0
        others = [ref for ref in corpora_of(self.profile) if ref != memory.ref]
        for ref in others:
            if place(ref).resolve().name == memory.ref:
                raise UsageError(f"remember {memory.ref}: corpus {ref} has the same name; {ADVICE}")
        refs = [*others, *([memory.ref] if size else [])]
        if not may_add_corpora(self.profile):
            if size and self.profile.speculates:
                name = self.profile.name
                self._notify(f"profile {name} cannot draft from corpora beside its method: answers are only kept")
        elif refs or reopened:
            self.profile = with_corpora(self.profile, refs)
        else:
            methods = tuple(spec for spec in self.profile.proposers if spec.method != DATASTORE)
            self.profile = replace(self.profile, proposers=methods or (ProposerSpec("none"),))
        forget = f"specplug corpus remove {shlex.quote(memory.ref)}"
        self._notify(f"remembering answers in corpus {memory.ref} ({size:,} tokens so far); forget them with: {forget}")

    def learned(self) -> Acceptance | None:
        """The acceptance to start from; None where nothing is known."""
        return (self.memory.learned() if self.memory is not None else None) or None

    def take(self, prompt: IntArray, answer: Sequence[int], learned: Acceptance) -> None:
        """Remember an answer (token ids) and the acceptance learned so far when `write` is called."""
        if self.memory is not None:
            document = answer_document(prompt, answer, prompts=self._prompts)
            with self._lock:
                self._answers.append(document)
                self._learned = learned

    def write_now_and_then(self) -> None:
        """`write`, if the last time is some seconds ago."""
        if monotonic() - self._written_s > WRITE_SECONDS:
            self.write()

    def write(self) -> bool:
        """Keep what was taken; whether there was something, and it was kept. A problem is reported once."""
        with self._lock:
            answers, self._answers, learned = self._answers, [], self._learned
        if self.memory is None or not answers:
            return False
        ref = self.memory.ref
        try:
            self.memory.add(answers, lambda: self._notify(f"waiting for another process that changes {ref}"))
            self.memory.keep_learned(learned)
        except (SpecplugError, OSError, ValueError) as error:
            with self._lock:
                self._answers = [*answers, *self._answers][-MOST_WAITING:]
            if str(error) != self._problem:
                self._problem = str(error)
                self._notify(f"not remembered: {error}")
            return False
        finally:
            self._written_s = monotonic()
        self._problem = ""
        return True


@contextmanager
def remembering(
    profile: Profile, find_model: Callable[[], Path], notify: Callable[[str], None], *, reopened: bool = False
) -> Iterator[Remembered]:
    """Answers that are taken inside are written at the end, also after an exception."""
    remembered = Remembered(profile, find_model, notify, reopened=reopened)
    try:
        yield remembered
    finally:
        remembered.write()


def _memory(remember: Remember, model: Path) -> Memory:
    num_tokens = vocabulary_size(model)
    if num_tokens is None:
        raise UsageError(f"{model}: its files do not tell the size of the vocabulary; leave remember out")
    identity = fingerprint.model_identity(model)
    names = " ".join(str(identity[key]) for key in ("bytes", "sample_sha256"))
    return Memory(remember.corpus, model.name, names, tokenizer_hash(model), num_tokens, remember.max_tokens)
