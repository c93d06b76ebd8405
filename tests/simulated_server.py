"""Servers whose answers have 101 tokens and take as long as a test says, on a clock that only they advance."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from specplug.errors import SpecplugError
from specplug.subjects.subject import Abilities, Question, RefusedQuestion, Reply, SubjectError
from specplug.tune.server_flags.live_answers import WARM_TOKENS
from specplug.tune.server_flags.server_candidates import Candidate

TOKENS = 101
"""Of an answer; the first one does not count."""


@dataclass
class Machine:
    """What the simulated servers share.

    seconds    of an answer, by the server's name and the number of its process
    fault      of a server when it is asked; None for no fault
    start_s    seconds of a start
    refuses    whether the server of this name refuses a question
    most       servers that run at once, at most; another one does not start
    broken     names of servers that never start
    started    names, in this order
    running    names
    questions  that were asked, with the server's name
    """

    seconds: Callable[[str, int], float]
    start_s: float = 0.0
    fault: Callable[[str], SpecplugError | None] = lambda name: None
    abilities: Abilities = field(default_factory=lambda: Abilities("openai"))
    refuses: Callable[[str, Question], bool] = lambda name, question: False
    most: int = 2
    broken: frozenset[str] = frozenset()
    now: float = 0.0
    started: list[str] = field(default_factory=list)
    running: list[str] = field(default_factory=list)
    questions: list[tuple[str, Question]] = field(default_factory=list)

    def opened(self, candidate: Candidate) -> "SimulatedServer":
        return SimulatedServer(candidate.name, self)

    def clock(self) -> float:
        return self.now


class SimulatedServer:
    def __init__(self, name: str, machine: Machine) -> None:
        self.name = name
        self.abilities = machine.abilities
        self._machine = machine
        self._process = 0

    def start(self, flags: Sequence[str] = ()) -> None:
        self._process = self._machine.started.count(self.name)
        self._machine.started.append(self.name)
        self._machine.now += self._machine.start_s
        if self.name in self._machine.broken or len(self._machine.running) >= self._machine.most:
            raise SubjectError(f"{self.name}: out of memory")
        self._machine.running.append(self.name)

    def ask(self, question: Question) -> Reply:
        if (error := self._machine.fault(self.name)) is not None:
            raise error
        if self._machine.refuses(self.name, question):
            raise RefusedQuestion(f"{self.name}: the prompt is too long")
        self._machine.questions.append((self.name, question))
        if question.max_tokens == WARM_TOKENS:
            return Reply("", 1, 0.0, 0.0, 0.0)
        seconds = self._machine.seconds(self.name, self._process)
        self._machine.now += seconds
        told = (1,) if question.ids and len(self._machine.questions) > 1 else None  # not those of the first answer
        return Reply("", TOKENS, 0.0, 1000 * seconds, 1000 * seconds, prompt_ids=told, ids=told)

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def stop(self) -> None:
        if self.name in self._machine.running:
            self._machine.running.remove(self.name)
