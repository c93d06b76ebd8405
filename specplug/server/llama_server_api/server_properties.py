"""Bodies of llama-server's /props and /slots.

They tell neither prompts nor answers, and of the model's path the file's name only.
Source: tools/server/README.md of github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

from specplug import __version__
from specplug.generation.answers import Sampling
from specplug.server.jobs import Job
from specplug.server.llama_server_api.answer import sampling_settings
from specplug.server.openai_format import Json
from specplug.server.state import State


def properties(state: State, default: Sampling) -> Json:
    """The body of /props; `default` is how answers are sampled whose request says nothing."""
    engine = state.engine
    return {
        "default_generation_settings": {
            "n_ctx": engine.max_context,
            "speculative": engine.profile.speculates,
            "params": {**sampling_settings(default), "n_predict": -1, "max_tokens": -1, "stop": [], "stream": False},
        },
        "total_slots": engine.slots,
        "n_ctx": engine.max_context,
        "model_alias": state.settings.name,
        "model_path": engine.description.file,
        "chat_template": engine.chat_template,
        "bos_token": engine.description.begin_text,
        "eos_token": engine.description.end_text,
        "modalities": {"vision": False, "audio": False},
        "endpoint_slots": True,
        "endpoint_props": False,
        "endpoint_metrics": True,
        "build_info": f"specplug-{__version__}",
        "is_sleeping": False,
    }


def slot_states(state: State) -> list[Json]:
    """The body of /slots."""
    engine = state.engine
    running = {job.slot: job for job in list(state.worker.scheduler.active)}
    return [_slot(state, index, running.get(index)) for index in range(engine.slots)]


def _slot(state: State, index: int, job: Job | None) -> Json:
    speculates = state.engine.profile.speculates
    slot: Json = {
        "id": index,
        "n_ctx": state.engine.max_context,
        "speculative": speculates if job is None else job.max_draft > 0 and speculates,
        "is_processing": job is not None,
        "n_past": 0,
    }
    if job is None:
        return slot
    decoded = len(job.tokens)
    slot["n_past"] = len(job.prompt) + decoded if decoded else 0
    slot["next_token"] = {"has_next_token": True, "n_remain": job.max_tokens - decoded, "n_decoded": decoded}
    return slot
