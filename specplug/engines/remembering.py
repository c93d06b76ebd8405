"""What a profile remembers from one process to the next: answers, in a corpus, and the learned acceptance.

It opens no engine. Whoever generates passes it the answers.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from specplug.core import IntArray
from specplug.corpora.answer_memory import Acceptance, Memory, answer_document
from specplug.corpora.folder import read_manifest
from specplug.errors import SpecplugError, UsageError
from specplug.machine import fingerprint
from specplug.models.references import tokenizer_hash, vocabulary_size
from specplug.profile import Profile, Remember
from specplug.profile.with_corpora import corpora_of, may_add_corpora, with_corpora


class Remembered:
    """The answers of one process that are to be remembered, and the memory that they go to, if any.

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
        """Guards these two, as a server takes answers in one thread and writes them in another."""
        if profile.remember is not None:
            self.memory = _memory(profile.remember, find_model())
            self._draft_from(self.memory, reopened)

    @property
    def name(self) -> str:
        """The name of the corpus; empty where nothing is remembered."""
        return self.memory.ref if self.memory is not None else ""

    def _draft_from(self, memory: Memory, reopened: bool) -> None:
        size = read_manifest(memory.folder, memory.ref).size if memory.check() else 0
        if size or reopened:
            if may_add_corpora(self.profile):
                known = [ref for ref in corpora_of(self.profile) if ref != memory.ref]
                self.profile = with_corpora(self.profile, [*known, *([memory.ref] if size else [])])
            elif self.profile.speculates:
                self._notify(
                    f"profile {self.profile.name} cannot draft from corpora beside its method: answers are only kept"
                )
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

    def write(self) -> bool:
        """Keep what was taken; whether there was something, and it was kept. A problem is reported."""
        with self._lock:
            answers, self._answers, learned = self._answers, [], self._learned
        if self.memory is None or not answers:
            return False
        try:
            self.memory.add(answers)
            self.memory.keep_learned(learned)
        except SpecplugError as error:
            self._notify(f"not remembered: {error}")
            return False
        return True


@contextmanager
def remembering(
    profile: Profile, find_model: Callable[[], Path], notify: Callable[[str], None], *, reopened: bool = False
) -> Iterator[Remembered]:
    """Answers that are taken inside are written at the end, also after an error or an interruption."""
    remembered = Remembered(profile, find_model, notify, reopened=reopened)
    try:
        yield remembered
    finally:
        remembered.write()


def _memory(remember: Remember, model: Path) -> Memory:
    num_tokens = vocabulary_size(model)
    if num_tokens is None:
        raise UsageError(f"{model}: its files do not tell the size of the vocabulary; leave remember out")
    identity = str(fingerprint.model_identity(model)["sample_sha256"])
    return Memory(remember.corpus, model.name, identity, tokenizer_hash(model), num_tokens, remember.max_tokens)
