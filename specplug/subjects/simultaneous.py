"""Several questions that one subject is asked at the same time."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, wait
from threading import Thread

from specplug.subjects.subject import Question, RefusedQuestion, Reply, Subject
from specplug.subjects.waking import awake


def ask_at_once(subject: Subject, questions: Sequence[Question]) -> list[Reply]:
    """The replies to all questions, of a subject that is awake only meanwhile.

    Where some fail, the error of the first of these is raised once all others have ended. When interrupted, it waits
    for none: neither does Python at its end, for daemon threads. The answers end with whoever computes them.
    """
    return [reply.result() for reply in _ended(subject, questions)]


def ask_each(subject: Subject, questions: Sequence[Question]) -> list[Reply | RefusedQuestion]:
    """As `ask_at_once`, with its refusal in the place of the reply to each question that is refused."""
    return [
        error if isinstance(error := reply.exception(), RefusedQuestion) else reply.result()
        for reply in _ended(subject, questions)
    ]


def _ended(subject: Subject, questions: Sequence[Question]) -> list[Future[Reply]]:
    replies: list[Future[Reply]] = [Future() for _ in questions]
    with awake(subject):
        if len(questions) == 1:
            _ask(subject, questions[0], replies[0])
        else:
            for question, reply in zip(questions, replies, strict=True):
                Thread(target=_ask, args=(subject, question, reply), daemon=True).start()
            wait(replies)
    return replies


def _ask(subject: Subject, question: Question, reply: Future[Reply]) -> None:
    try:
        reply.set_result(subject.ask(question))
    except BaseException as error:  # whoever waits for the reply raises it
        reply.set_exception(error)
