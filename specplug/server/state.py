"""The state that all requests to one server share."""

from __future__ import annotations

from dataclasses import dataclass

from specplug.server.engine_protocol import Engine
from specplug.server.metrics import Metrics
from specplug.server.worker import Worker


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of the operator.

    name         the model's name in the API
    queue_limit  how many answers may wait for a slot
    deadline     seconds per answer if the request sets none; None is no limit
    log_prompts  True writes prompts and answers to the log
    private      True if nothing of any request may be kept when the server ends
    suffix_first True puts the suffix before the prefix in prompts for fill-in-the-middle
    strict       True refuses fields that have no meaning here, as OpenAI does; otherwise they are ignored
    """

    name: str
    queue_limit: int = 64
    deadline: float | None = None
    log_prompts: bool = False
    private: bool = False
    strict: bool = False
    suffix_first: bool = False


@dataclass(slots=True)
class State:
    """The objects that the routes share.

    has_key  True if every request has sent the server's API key
    closing  True once the server accepts no new requests
    """

    engine: Engine
    settings: Settings
    worker: Worker
    metrics: Metrics
    has_key: bool = False
    closing: bool = False
