"""Several questions at the same time: the order of the replies, what is raised, and Ctrl-C."""

import signal
import subprocess
import sys
from collections.abc import Sequence
from threading import Barrier

import pytest
from subject_stubs import at_address, words

from specplug.subjects.simultaneous import ask_at_once, ask_each
from specplug.subjects.subject import Abilities, Question, RefusedQuestion, Reply, SubjectError

HUNG = """
import time
from specplug.subjects.simultaneous import ask_at_once
from specplug.subjects.subject import Question

class Hung:
    def wake(self): pass
    def sleep(self): pass
    def ask(self, question):
        print("asked\\n", end="", flush=True)  # in one piece, beside that of the other thread
        time.sleep(600)

ask_at_once(Hung(), [Question([], 1)] * 2)
"""


class Meeting:
    """A subject that answers once all of three questions have been asked, refuses length 0 and fails below it."""

    name = "meeting"
    abilities = Abilities("meeting")

    def __init__(self) -> None:
        self.barrier = Barrier(3, timeout=30)
        self.awake = False
        self.states: list[bool] = []

    def start(self, flags: Sequence[str] = ()) -> None: ...

    def stop(self) -> None: ...

    def wake(self) -> None:
        self.awake = True

    def sleep(self) -> None:
        self.awake = False

    def ask(self, question: Question) -> Reply:
        self.barrier.wait()
        self.states.append(self.awake)
        if question.max_tokens == 0:
            raise RefusedQuestion("refused")
        if question.max_tokens < 0:
            raise SubjectError(f"failed at {question.max_tokens}")
        return Reply("", question.max_tokens, 1.0, 1.0, 1.0)


def test_replies_come_in_the_order_of_their_questions_of_a_subject_that_is_awake_meanwhile() -> None:
    subject = Meeting()
    assert [reply.tokens for reply in ask_at_once(subject, [words(tokens) for tokens in (3, 1, 2)])] == [3, 1, 2]
    assert subject.states == [True] * 3 and not subject.awake


def test_the_first_question_that_fails_says_why_after_all_have_ended() -> None:
    subject = Meeting()
    with pytest.raises(SubjectError, match="failed at -1"):
        ask_at_once(subject, [words(tokens) for tokens in (3, -1, -2)])
    assert len(subject.states) == 3 and not subject.awake


def test_a_refusal_is_in_the_place_of_its_reply() -> None:
    subject = Meeting()
    first, refusal, last = ask_each(subject, [words(tokens) for tokens in (3, 0, 1)])
    assert isinstance(first, Reply) and isinstance(last, Reply) and (first.tokens, last.tokens) == (3, 1)
    assert isinstance(refusal, RefusedQuestion) and not subject.awake
    with pytest.raises(SubjectError, match="failed at -1"):
        ask_each(subject, [words(tokens) for tokens in (0, -1, 2)])


def test_one_question_of_a_real_server() -> None:
    with at_address() as server:
        assert [reply.tokens for reply in ask_at_once(server, [words(4)])] == [4]


def test_ctrl_c_waits_for_no_answer() -> None:
    process = subprocess.Popen([sys.executable, "-c", HUNG], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["asked\n"] * 2
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGINT and "KeyboardInterrupt" in said
