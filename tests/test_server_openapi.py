"""Schemathesis reads the OpenAPI document and sends requests that it allows and requests that it forbids."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

pytest.importorskip("fastapi")
pytest.importorskip("schemathesis")

import schemathesis
from toy_serving import ToyEngine, serving

POSTS = ["/v1/chat/completions", "/v1/completions", "/v1/corpora", "/tokenize", "/detokenize", "/completion", "/infill"]
OTHERS = ["/v1/responses", "/v1/messages", "/v1/messages/count_tokens", "/api/chat", "/api/generate", "/api/show"]
OTHERS += ["/completion", "/infill"]
"""Their bodies are large, so that few are made here; test_server_interfaces.py makes more."""
GETS = ["/v1/models", "/v1/models/{model}", "/v1/corpora", "/health", "/metrics", "/specplug/stats"]
GETS += ["/api/tags", "/api/ps", "/api/version", "/version", "/props", "/slots"]
CASES = [(path, "POST", mode) for path in POSTS + OTHERS for mode in ("positive", "negative")]
CASES += [(path, "GET", "positive") for path in GETS]
CASES += [("/v1/corpora/{name}", "DELETE", "positive")]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(ToyEngine()) as server_url:
        yield server_url


@pytest.fixture(scope="module")
def document(url: str) -> Any:
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


def test_the_document_has_every_route(document: Any) -> None:
    found = {(operation.ok().path, operation.ok().method.upper()) for operation in document.get_all_operations()}
    assert found == {(path, method) for path, method, _ in CASES}


@pytest.mark.parametrize(("path", "method", "mode"), CASES, ids=[" ".join(case[::-1]) for case in CASES])
def test_no_generated_request_causes_a_server_error(document: Any, url: str, path: str, method: str, mode: str) -> None:
    generation_mode = schemathesis.GenerationMode(mode)

    @settings(
        max_examples=6 if path in OTHERS else 60, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
    )
    @given(case=document[path][method].as_strategy(generation_mode=generation_mode))
    def send(case: Any) -> None:
        answer = case.call(base_url=url, timeout=20)
        assert answer.status_code < 500, answer.text

    send()
