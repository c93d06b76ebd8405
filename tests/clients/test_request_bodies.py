"""Requests of the form that programs without a client for Python send: Continue, Cline and Open WebUI.

The forms for OpenAI's interface follow these programs' sources (Continue: core/llm/llms/OpenAI.ts; Cline:
src/core/api/providers/openai.ts; Open WebUI: backend/open_webui/routers); those for Ollama's follow its documentation.
The texts are invented.
"""

import json
from typing import Any
from urllib.request import Request, urlopen

import pytest

pytestmark = [pytest.mark.clients, pytest.mark.llama]

READ = {
    "type": "function",
    "function": {
        "name": "read_file",
        "description": "Read a file.",
        "strict": False,
        "parameters": {
            "type": "object",
            "properties": {
                "path": {"type": "string", "maxLength": 20, "description": "The path"},
                "task_progress": {"type": "string", "maxLength": 20},
            },
            "required": ["path"],
            "additionalProperties": False,
        },
    },
}
SYSTEM = "You are a programmer's assistant. " + "Explain what you do before each step. " * 20
CALL = {"id": "call_1", "type": "function", "function": {"name": "read_file", "arguments": '{"path": "a.py"}'}}

FIM_STOPS = [
    *("<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>"),
    *("<|file_sep|>", "<|im_start|>", "<|im_end|>", "/src/", "#- coding: utf-8", "```"),
]

OPENAI: dict[str, tuple[str, dict[str, Any]]] = {
    "Continue's chat": (
        "/v1/chat/completions",
        {
            "messages": [
                {"role": "system", "content": "<important_rules>\n  Be brief.\n</important_rules>"},
                {"role": "user", "content": [{"type": "text", "text": "```a.py (1-2)\nx = 1\n```\nExplain."}]},
            ],
            "model": "any",
            "max_tokens": 12,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    ),
    "Continue's agent": (
        "/v1/chat/completions",
        {
            "messages": [
                {"role": "user", "content": "Explain a.py."},
                {"role": "assistant", "content": " ", "tool_calls": [CALL]},
                {"role": "tool", "content": "x = 1", "tool_call_id": "call_1"},
            ],
            "model": "any",
            "max_tokens": 12,
            "temperature": 0,
            "stream": True,
            "tools": [READ],
            "parallel_tool_calls": False,
        },
    ),
    "Continue's autocomplete": (
        "/v1/completions",
        {
            "model": "any",
            "max_tokens": 12,
            "temperature": 0.01,
            "stream": True,
            "stop": FIM_STOPS,
            "prompt": "<|fim_prefix|>def add(a, b):\n    return <|fim_suffix|>\n\nprint(add(1, 2))<|fim_middle|>",
        },
    ),
    "Cline's first request": (
        "/v1/chat/completions",
        {
            "model": "any",
            "messages": [
                {"role": "system", "content": SYSTEM},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "<task>\nAdd a test.\n</task>"},
                        {
                            "type": "text",
                            "text": "<environment_details>\n# Current Mode\nACT MODE\n</environment_details>",
                        },
                    ],
                },
            ],
            "temperature": 0,
            "max_tokens": 12,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    ),
    "Cline's request with a result": (
        "/v1/chat/completions",
        {
            "model": "any",
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": [{"type": "text", "text": "Add a test."}]},
                {"role": "assistant", "content": "I read the file.", "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "call_1", "content": "x = 1"},
                {"role": "user", "content": [{"type": "text", "text": "<environment_details></environment_details>"}]},
            ],
            "temperature": 0,
            "max_tokens": 12,
            "stream": True,
            "stream_options": {"include_usage": True},
            "tools": [READ],
            "tool_choice": "auto",
        },
    ),
    "Open WebUI's chat": (
        "/v1/chat/completions",
        {
            "stream": True,
            "model": "smollm2",
            "messages": [
                {"role": "system", "content": "User Context:\n\nToday is Monday."},
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": '<details type="reasoning" done="true">\n</details>\nHi.'},
                {"role": "user", "content": "And now?"},
            ],
            "max_tokens": 12,
            "frequency_penalty": 0,
            "stop": [],
            "seed": None,
            "stream_options": {"include_usage": True},
        },
    ),
    "Open WebUI's title": (
        "/v1/chat/completions",
        {
            "model": "smollm2",
            "messages": [{"role": "user", "content": '### Task:\nGenerate a title. JSON format: { "title": "..." }'}],
            "stream": False,
            "max_completion_tokens": 12,
        },
    ),
}

OLLAMA: dict[str, tuple[str, dict[str, Any]]] = {
    "Continue's chat": (
        "/api/chat",
        {
            "model": "smollm2",
            "messages": [{"role": "user", "content": "Hello"}],
            "raw": False,
            "keep_alive": 1800,
            "options": {"num_predict": 12, "num_ctx": 4096, "stop": ["</s>"], "temperature": 0, "num_thread": 1},
            "stream": True,
        },
    ),
    "Continue's autocomplete": (
        "/api/generate",
        {
            "model": "smollm2",
            "prompt": "def add(a, b):\n    return ",
            "raw": True,
            "keep_alive": 1800,
            "options": {"num_predict": 12, "stop": FIM_STOPS, "temperature": 0.01},
            "stream": True,
        },
    ),
    "Open WebUI's chat": (
        "/api/chat",
        {
            "model": "smollm2:latest",
            "messages": [{"role": "user", "content": "Hello", "images": []}],
            "options": {"num_predict": 12, "temperature": 0.8, "mirostat": 0, "repeat_last_n": 64, "num_keep": 4},
            "format": None,
            "template": None,
            "stream": True,
            "keep_alive": "5m",
            "tools": None,
        },
    ),
}


def post(server: Any, path: str, body: dict[str, Any]) -> str:
    headers = {"content-type": "application/json", "authorization": "Bearer KEY", "api-key": "KEY"}
    with urlopen(Request(server.url + path, json.dumps(body).encode(), headers)) as response:
        text: str = response.read().decode()
        return text


def get(server: Any, path: str) -> Any:
    return json.load(urlopen(Request(server.url + path, headers={"authorization": "Bearer KEY"})))


@pytest.mark.parametrize("name", OPENAI)
def test_openai_shaped_requests_are_answered(server: Any, name: str) -> None:
    path, body = OPENAI[name]
    text = post(server, path, body)
    if not body["stream"]:
        assert json.loads(text)["choices"][0]["message"]["content"]
        return
    *lines, end = (line.removeprefix("data: ") for line in text.strip().split("\n\n"))
    chunks = [json.loads(line) for line in lines]
    assert end == "[DONE]" and not any("error" in chunk for chunk in chunks)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    assert any(choice.get("text") or choice.get("delta", {}).keys() & {"content", "tool_calls"} for choice in choices)
    if "stream_options" in body:
        assert 0 < chunks[-1]["usage"]["completion_tokens"] <= 12


@pytest.mark.parametrize("name", OLLAMA)
def test_ollama_shaped_requests_are_answered(server: Any, name: str) -> None:
    path, body = OLLAMA[name]
    lines = [json.loads(line) for line in post(server, path, body).splitlines()]
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    text = "".join(line["message"]["content"] if path == "/api/chat" else line["response"] for line in lines)
    assert text and 0 < lines[-1]["eval_count"] <= 12


def test_models_are_listed_as_open_webui_and_continue_ask(server: Any) -> None:
    assert [model["id"] for model in get(server, "/v1/models")["data"]] == ["smollm2"]
    assert [model["name"].split(":")[0] for model in get(server, "/api/tags")["models"]] == ["smollm2"]
    assert get(server, "/api/version")["version"]
    assert json.loads(post(server, "/api/show", {"name": "smollm2"}))
