"""A server at an address, which somebody else started, as a Subject."""

from __future__ import annotations

from collections.abc import Sequence

from specplug.errors import UsageError
from specplug.subjects.address import ServerAddress
from specplug.subjects.connection import SILENCE_S
from specplug.subjects.server_client import ServerClient
from specplug.subjects.subject import Abilities, Question, Reply, SubjectError


class RemoteServer:
    """It can be asked, but neither started with flags nor stopped; `sleep` and `wake` have no effect."""

    def __init__(
        self, address: ServerAddress, *, name: str | None = None, model: str | None = None, silence_s: float = SILENCE_S
    ) -> None:
        """Send nothing yet. model: that requests name; the server's first one where None. It counts from `start` on."""
        self.name = name or str(address)
        self._address = address
        self.model = model
        self._silence_s = silence_s
        self._client: ServerClient | None = None

    @property
    def abilities(self) -> Abilities:
        return self._running().abilities

    def start(self, flags: Sequence[str] = ()) -> None:
        """Connect. UsageError for flags."""
        if flags:
            raise UsageError(
                f"{self._address} was not started by specplug, which therefore cannot add {' '.join(flags)}; pass the "
                'command that starts it, such as --server "llama-server -m MODEL.gguf"'
            )
        self.stop()
        self._client = ServerClient(self._address, self.name, model=self.model, silence_s=self._silence_s)

    def ask(self, question: Question) -> Reply:
        return self._running().ask(question)

    def sleep(self) -> None:
        """Nothing to do: the process is not ours."""

    def wake(self) -> None:
        """Nothing to do: the process is not ours."""

    def stop(self) -> None:
        """Close the connection; the server goes on."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def _running(self) -> ServerClient:
        if self._client is None:
            raise SubjectError(f"{self.name} was not connected to; `start` comes first")
        return self._client
