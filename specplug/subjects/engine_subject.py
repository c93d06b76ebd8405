"""specplug's own llama.cpp engine in this process, as a Subject.

It answers as the server does, with the same scheduler, but without HTTP; see `engine_thread.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from specplug import __version__
from specplug.errors import SpecplugError, UsageError
from specplug.generation.answers import Sampling, TokenLogprobs
from specplug.profile import Profile
from specplug.subjects.subject import Abilities, Question, RefusedQuestion, Reply, SubjectError

if TYPE_CHECKING:
    from specplug.subjects.engine_thread import EngineAnswer, EngineThread

NO_LIMIT = 1 << 20
"""Draft tokens per step; the planner has its own limit."""


class EngineSubject:
    """One engine with a model, opened by `start` and closed by `stop`."""

    def __init__(
        self,
        profile: Profile,
        model_path: Path,
        *,
        slots: int = 1,
        name: str | None = None,
        notify: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Open nothing yet.

        slots   answers at once
        name    the profile's where None
        notify  receives the engine's messages, one line each
        """
        self.name = name or profile.name
        self._profile = profile
        self._model_path = model_path
        self._slots = slots
        self._notify = notify
        self._thread: EngineThread | None = None

    @property
    def abilities(self) -> Abilities:
        engine = self._running().engine
        return Abilities(
            "specplug",
            __version__,
            self._model_path.name,
            slots=engine.slots,
            context=engine.max_context,
            token_ids=True,
            timings=True,
            counters=True,
            logprobs=True,
            per_request=True,
        )

    def start(self, flags: Sequence[str] = ()) -> None:
        """Open the engine. UsageError for flags, as a profile says what it does; and for a profile or model that cannot
        be used."""
        if flags:
            raise UsageError(f"{self.name}: specplug's own engine takes a profile, not the flags {' '.join(flags)}")
        self.stop()
        from specplug.engines.llama_cpp import require

        with self._errors_as_results(UsageError):
            require()
            from specplug.subjects.engine_thread import EngineThread

            self._thread = EngineThread(self._profile, self._model_path, self._slots, self._notify)

    def ask(self, question: Question) -> Reply:
        thread = self._running()
        with self._errors_as_results():
            answered = thread.answer(
                thread.engine.chat_prompt(_messages(question)),
                question.max_tokens,
                Sampling(logprobs=question.top or None),
                NO_LIMIT if question.drafting else 0,
            )
        return _reply(thread, answered, question.top)

    def sleep(self) -> None:
        """Nothing to do: the engine computes only while it is asked."""

    def wake(self) -> None:
        """Nothing to do."""

    def stop(self) -> None:
        if self._thread is not None:
            self._thread.close()
            self._thread = None

    def _running(self) -> EngineThread:
        if self._thread is None:
            raise SubjectError(f"{self.name} was not started; `start` comes first")
        return self._thread

    @contextmanager
    def _errors_as_results(self, *raised: type[SpecplugError]) -> Iterator[None]:
        """All errors of the engine but those `raised` are SubjectErrors, as those of a server are. A UsageError, such
        as that for a prompt that is too long, is a RefusedQuestion."""
        try:
            yield
        except raised:
            raise
        except SpecplugError as error:
            refused = isinstance(error, UsageError)
            raise (RefusedQuestion if refused else SubjectError)(f"{self.name}: {error}") from error


def _messages(question: Question) -> list[dict[str, str]]:
    return [dict(message) for message in question.messages]


def _reply(thread: EngineThread, answered: EngineAnswer, top: int) -> Reply:
    job, deltas = answered.job, answered.deltas
    report = deltas[-1].report
    assert report is not None
    times = [1000 * seconds for seconds, delta in zip(answered.seconds, deltas, strict=True) if delta.tokens]
    likeliest = [one for delta in deltas for one in delta.logprobs]
    return Reply(
        text="".join(segment.text for delta in deltas for segment in delta.segments),
        tokens=len(job.tokens),
        first_ms=times[0],
        decode_ms=report.decode_ms,
        stream_ms=times[-1] - times[0],
        gaps_ms=tuple(b - a for a, b in pairwise(times)),
        prompt_ids=tuple(job.prompt.tolist()),
        ids=tuple(job.tokens),
        draft_tokens=report.counters.draft_tokens,
        accepted_tokens=report.counters.accepted_tokens,
        top=tuple(_texts(thread, one) for one in likeliest) if top else (),
        finish=deltas[-1].finish,
    )


def _texts(thread: EngineThread, one: TokenLogprobs) -> dict[str, float]:
    return {thread.engine.text([token]): logprob for token, logprob in one.top}
