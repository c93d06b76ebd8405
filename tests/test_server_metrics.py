"""Metrics under the names of vLLM and llama-server, and the Grafana dashboard that queries them, on a toy engine."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from prometheus_client.parser import text_string_to_metric_families
from test_server_http import ask, chat
from toy_serving import ToyEngine, serving

DASHBOARD = json.loads((Path(__file__).parents[1] / "docs/grafana.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
FUNCTIONS = {"sum", "by", "rate", "histogram_quantile"}
ANSWERS = 3
TEXT = "abcde"
TOKENS = len(TEXT) + 1
"""Tokens of an answer: the text again, and the end token."""


@pytest.fixture(scope="module")
def samples() -> Iterator[dict[str, float]]:
    """Sums over the labels, after some answers by drafting."""
    found: dict[str, float] = {}
    with serving(ToyEngine()) as url:
        for _ in range(ANSWERS):
            assert ask(url, body=chat(TEXT))[0] == 200
        for family in text_string_to_metric_families(ask(url, "/metrics")[1]):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0) + sample.value
                if sample.name.startswith("vllm:"):
                    assert sample.labels["model_name"] == "toy"
    yield found


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vllm:prompt_tokens_total", ANSWERS * len(TEXT)),
        ("vllm:generation_tokens_total", ANSWERS * TOKENS),
        ("vllm:num_requests_running", 0),
        ("vllm:num_requests_waiting", 0),
        ("vllm:time_to_first_token_seconds_count", ANSWERS),
        ("vllm:e2e_request_latency_seconds_count", ANSWERS),
        # The first token of an answer ends the pass over its prompt; the others come in steps of two.
        ("vllm:spec_decode_num_drafts_total", ANSWERS * 2),
        ("vllm:spec_decode_num_draft_tokens_total", ANSWERS * 2),
        ("vllm:spec_decode_num_accepted_tokens_total", ANSWERS * 2),
        ("vllm:spec_decode_num_accepted_tokens_per_pos_total", ANSWERS * 2),
        ("llamacpp:prompt_tokens_total", ANSWERS * len(TEXT)),
        ("llamacpp:tokens_predicted_total", ANSWERS * TOKENS),
        ("llamacpp:requests_processing", 0),
        ("llamacpp:requests_deferred", 0),
        ("llamacpp:spec_decode_num_drafts_total", ANSWERS * 2),
        ("specplug_generated_tokens_total", ANSWERS * TOKENS),
        ("specplug_prompt_tokens_total", ANSWERS * len(TEXT)),
    ],
)
def test_a_shared_name_has_the_servers_count(samples: dict[str, float], name: str, value: float) -> None:
    assert samples[name] == value


@pytest.mark.parametrize("name", ["llamacpp:prompt_seconds_total", "llamacpp:tokens_predicted_seconds_total"])
def test_times_are_counted(samples: dict[str, float], name: str) -> None:
    assert 0 < samples[name] < 60


@pytest.mark.parametrize("query", QUERIES)
def test_every_metric_of_the_dashboard_exists(samples: dict[str, float], query: str) -> None:
    plain = re.sub(r"by \([^)]*\)|\{[^}]*\}|\[[^]]*\]", " ", query)
    names = set(re.findall(r"[a-zA-Z_:][a-zA-Z0-9_:]*", plain)) - FUNCTIONS
    assert names and names <= samples.keys()
