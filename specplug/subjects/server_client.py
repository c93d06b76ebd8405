"""Questions to one running server, whatever its kind: chooses the interface by what the server can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from specplug.subjects.address import ServerAddress
from specplug.subjects.asking import ask_chat
from specplug.subjects.connection import SILENCE_S, Connection
from specplug.subjects.llama_server import Completions
from specplug.subjects.server_abilities import find_abilities
from specplug.subjects.subject import Abilities, Question, Reply, SubjectError
from specplug.subjects.vllm_server import SpecCounts, counts_of_one_answer, spec_counts


class ServerClient:
    """The connection to a running server, and what that can do. Several threads may ask at once."""

    def __init__(
        self,
        address: ServerAddress,
        name: str,
        *,
        model: str | None = None,
        silence_s: float = SILENCE_S,
        answer_s: Callable[[], float] | None = None,
    ) -> None:
        """Ask the server what it can do. SubjectError where it does not answer; parameters as for `Connection`."""
        self._name = name
        self._connection = Connection(address, name, silence_s=silence_s, answer_s=answer_s)
        try:
            self._found = find_abilities(self._connection, name, model)
        except BaseException:
            self._connection.close()
            raise
        self._completions = Completions(self._connection, name, self._found.extras) if self._found.completions else None

    @property
    def abilities(self) -> Abilities:
        return self._found.abilities

    def ask(self, question: Question) -> Reply:
        able = self._found.abilities
        if not question.drafting and not able.per_request:
            raise SubjectError(
                f"{self._name} cannot turn drafting off for one request; start it without its drafting flags"
            )
        if question.top and not able.logprobs:
            raise SubjectError(f"{self._name} does not report log probabilities")
        if question.ids and not able.token_ids:
            raise SubjectError(f"{self._name} does not report token ids")
        if self._completions is not None:
            return self._completions.ask(question)
        before = self._counts() if able.kind == "vllm" and able.counters else None
        reply = ask_chat(self._connection, self._name, able.model, question, self._found.extras)
        counted = None if before is None else counts_of_one_answer(before, reply.tokens, self._counts)
        return reply if counted is None else replace(reply, draft_tokens=counted[0], accepted_tokens=counted[1])

    def close(self) -> None:
        self._connection.close()

    def _counts(self) -> SpecCounts | None:
        return spec_counts(self._connection.text("/metrics") or "")
