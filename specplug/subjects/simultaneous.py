"""Several questions that one subject is asked at the same time."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, wait
from threading import Thread

from specplug.subjects.subject import Question, Reply, Subject
from specplug.subjects.waking import awake


def ask_at_once(subject: Subject, questions: Sequence[Question]) -> list[Reply]:
    """The replies to all questions, of a subject that is awake only meanwhile.

    Where some fail, the error of the first of these is raised once all others have ended. When interrupted, it waits
    for none: neither does Python at its end, for daemon threads. The answers end with whoever computes them.
    """
    with awake(subject):
        if len(questions) == 1:
            return [subject.ask(questions[0])]
        replies: list[Future[Reply]] = [Future() for _ in questions]
        for question, reply in zip(questions, replies, strict=True):
            Thread(target=_ask, args=(subject, question, reply), daemon=True).start()
        wait(replies)
    return [reply.result() for reply in replies]


def _ask(subject: Subject, question: Question, reply: Future[Reply]) -> None:
    try:
        reply.set_result(subject.ask(question))
    except BaseException as error:  # whoever waits for the reply raises it
        reply.set_exception(error)
