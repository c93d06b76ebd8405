"""Schemathesis reads our OpenAPI document and tries what it allows, and what it does not."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

pytest.importorskip("fastapi")
pytest.importorskip("schemathesis")

import schemathesis
from toy_serving import ToyEngine, serving

POSTS = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]
GETS = ["/v1/models", "/v1/models/{model}", "/health", "/metrics", "/specplug/stats"]
TRIED = [(path, "POST", kind) for path in POSTS for kind in ("positive", "negative")]
TRIED += [(path, "GET", "positive") for path in GETS]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(ToyEngine()) as one:
        yield one


@pytest.fixture(scope="module")
def document(url: str) -> Any:
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


def test_the_document_has_every_route(document: Any) -> None:
    found = {(one.ok().path, one.ok().method.upper()) for one in document.get_all_operations()}
    assert found == {(path, method) for path, method, _ in TRIED}


@pytest.mark.parametrize(("path", "method", "kind"), TRIED, ids=[f"{kind} {path}" for path, _, kind in TRIED])
def test_nothing_that_the_document_leads_to_is_an_error_of_ours(
    document: Any, url: str, path: str, method: str, kind: str
) -> None:
    mode = schemathesis.GenerationMode(kind)

    @settings(max_examples=60, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
    @given(case=document[path][method].as_strategy(generation_mode=mode))
    def try_it(case: Any) -> None:
        answer = case.call(base_url=url, timeout=20)
        assert answer.status_code < 500, answer.text

    try_it()
