"""What all requests to a server share.

Knows what it is made of. Knows no HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass

from specplug.server.engine_protocol import Engine
from specplug.server.figures import Figures
from specplug.server.worker import Worker


@dataclass(frozen=True, slots=True)
class Settings:
    """name         the model's, as clients see it
    queue_limit  answers that may wait beside those under way
    deadline     seconds for an answer that names none; None is for ever
    log_prompts  whether what is asked and answered goes to the log
    """

    name: str
    queue_limit: int = 64
    deadline: float | None = None
    log_prompts: bool = False


@dataclass(slots=True)
class State:
    """What the routes share. `closing` once no new answer may begin."""

    engine: Engine
    settings: Settings
    worker: Worker
    figures: Figures
    closing: bool = False
