"""Embeddings: the server on a toy embedder, and the engine on a tiny embedding model with random weights."""

import base64
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from serving import served
from test_server_http import ask, is_error
from toy_serving import ToyEngine, running, serving

from specplug.core import IntArray, int_array
from specplug.errors import SpecplugError, UsageError
from specplug.generation.model_description import ModelDescription
from specplug.server.embeddings_api.embedding_app import GENERATING, make_embedding_app
from specplug.server.state import Settings

EMBEDDINGS = "/v1/embeddings"
WIDTH = 3


class ToyEmbedder:
    """A text's tokens are its bytes; its vector is (number of tokens, first token, 1).

    passes  the texts of each pass
    hold    a pass waits until it is set
    """

    description = ModelDescription("toy.gguf", 1_700_000_000, 1000, 4000, WIDTH, 256, 3, 512)
    num_tokens, width, max_tokens, batch_tokens, batch_texts = 256, WIDTH, 16, 20, 4

    def __init__(self) -> None:
        self.passes: list[list[str]] = []
        self.hold = threading.Event()
        self.hold.set()
        self.fail: Exception | None = None

    def tokenize(self, text: str) -> IntArray:
        return int_array(list(text.encode()))

    def embed(self, texts: Sequence[IntArray]) -> npt.NDArray[np.float32]:
        self.passes.append([bytes(text.tolist()).decode() for text in texts])
        self.hold.wait(10)
        if self.fail is not None:
            error, self.fail = self.fail, None
            raise error
        return np.array([(len(text), text[0], 1) for text in texts], dtype=np.float32)


@pytest.fixture
def toy() -> ToyEmbedder:
    return ToyEmbedder()


@pytest.fixture
def own_url(toy: ToyEmbedder) -> Iterator[str]:
    """That of a server of `toy`."""
    with running(make_embedding_app(toy, Settings("vectors", queue_limit=2))) as server_url:
        yield server_url


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running(make_embedding_app(ToyEmbedder(), Settings("vectors"))) as server_url:
        yield server_url


def vectors(body: Any) -> list[Any]:
    assert [one["index"] for one in body["data"]] == list(range(len(body["data"])))
    return [one["embedding"] for one in body["data"]]


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ("abc", [[3, 97, 1]]),
        (["abc", "b"], [[3, 97, 1], [1, 98, 1]]),
        ([98, 99], [[2, 98, 1]]),
        ([[98, 99], [100]], [[2, 98, 1], [1, 100, 1]]),
    ],
)
@pytest.mark.parametrize("path", [EMBEDDINGS, "/embeddings", "/v1/embedding"])
def test_each_text_has_its_vector(url: str, path: str, sent: Any, expected: list[list[int]]) -> None:
    status, body, _ = ask(url, path, {"input": sent, "model": "any"})
    tokens = sum(one[0] for one in expected)
    assert status == 200 and vectors(body) == expected
    assert (body["object"], body["model"]) == ("list", "vectors")
    assert body["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


def test_base64_holds_little_endian_floats(url: str) -> None:
    (encoded,) = vectors(ask(url, EMBEDDINGS, {"input": "abc", "encoding_format": "base64"})[1])
    assert np.frombuffer(base64.b64decode(encoded), dtype="<f4").tolist() == [3, 97, 1]


def test_llama_servers_path_has_its_own_shape(url: str) -> None:
    assert ask(url, "/embedding", {"content": "abc"})[1] == [{"index": 0, "embedding": [[3, 97, 1]]}]


def test_the_openai_client_gets_vectors(url: str) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    answer = client.embeddings.create(model="any", input=["abc", "b"])  # the client asks for base64
    assert [one.embedding for one in answer.data] == [[3, 97, 1], [1, 98, 1]]
    assert [model.id for model in client.models.list()] == ["vectors"]


def test_passes_hold_as_many_texts_as_fit(toy: ToyEmbedder, own_url: str) -> None:
    """Four texts or twenty tokens, of all requests together."""
    toy.hold.clear()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(ask, own_url, EMBEDDINGS, {"input": "a"})
        while not toy.passes:
            pass
        second = threads.submit(ask, own_url, EMBEDDINGS, {"input": ["b" * 12, "c" * 8, "d", "e", "f", "g"]})
        while "specplug_waiting_texts 6.0" not in ask(own_url, "/metrics")[1]:
            pass
        toy.hold.set()
        assert first.result()[0] == second.result()[0] == 200
    assert toy.passes == [["a"], ["b" * 12, "c" * 8], ["d", "e", "f", "g"]]


def test_a_full_queue_says_when_to_retry(toy: ToyEmbedder, own_url: str) -> None:
    toy.hold.clear()
    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(ask, own_url, EMBEDDINGS, {"input": "a"})]
        while not toy.passes:
            pass
        waiting.append(threads.submit(ask, own_url, EMBEDDINGS, {"input": ["b"] * 8}))
        while "specplug_waiting_texts 8.0" not in ask(own_url, "/metrics")[1]:
            pass
        status, body, headers = ask(own_url, EMBEDDINGS, {"input": "c"})
        toy.hold.set()
        assert (status, body["error"]["code"]) == (429, "queue_full") and int(headers["retry-after"]) >= 1
        assert [one.result()[0] for one in waiting] == [200, 200]


@pytest.mark.parametrize("error", [SpecplugError("no memory"), ValueError("a bug")])
def test_a_failed_pass_is_one_error_and_the_server_goes_on(toy: ToyEmbedder, own_url: str, error: Exception) -> None:
    toy.fail = error
    status, body, _ = ask(own_url, EMBEDDINGS, {"input": "a"})
    assert (status, body["error"]["code"]) == (503, "engine_failed")
    assert ask(own_url, EMBEDDINGS, {"input": "a"})[0] == 200


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "input"),
        ({"input": ""}, "empty text"),
        ({"input": []}, "send 1 to"),
        ({"input": ["a", ""]}, "empty text"),
        ({"input": [256]}, "there is no token 256"),
        ({"input": [-1]}, "input"),
        ({"input": "a" * 17}, "text 0 has 17 tokens; this server takes 16"),
        ({"input": "a", "dimensions": 2}, "dimensions: vectors of this model have 3 numbers"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
    ],
)
def test_bad_input_is_one_line(url: str, body: dict[str, Any], named: str) -> None:
    status, answer, _ = ask(url, EMBEDDINGS, body)
    assert status == 400 and is_error(answer) and named in answer["error"]["message"]


def test_unknown_fields_are_named_or_refused(toy: ToyEmbedder, url: str) -> None:
    sent = {"input": "a", "truncate": True, "dimensions": WIDTH}
    status, _, headers = ask(url, EMBEDDINGS, sent)
    assert (status, headers["specplug-warnings"]) == (200, "ignored: truncate")
    with running(make_embedding_app(toy, Settings("vectors", strict=True))) as strict:
        status, body, _ = ask(strict, EMBEDDINGS, sent)
        assert status == 400 and body["error"]["message"] == "Unrecognized request argument supplied: truncate"


@pytest.mark.parametrize("path", GENERATING)
def test_an_embedding_model_refuses_to_generate_by_name(url: str, path: str) -> None:
    status, body, _ = ask(url, path, {"prompt": "a"})
    assert status == 400
    assert body["error"]["message"].startswith("this server makes embeddings with vectors and generates no text")


@pytest.mark.parametrize("path", [EMBEDDINGS, "/v1/embedding", "/embeddings", "/embedding"])
def test_a_generating_model_refuses_embeddings_by_name(path: str) -> None:
    with serving(ToyEngine()) as url:
        status, body, _ = ask(url, path, {"input": "a"})
        assert status == 400 and body["error"]["message"].startswith("toy generates text, and this server has no embed")


def test_other_paths_describe_the_server(url: str) -> None:
    listed = ask(url, "/v1/models")[1]["data"]
    assert listed == [ask(url, "/v1/models/vectors")[1]] == ask(url, "/models")[1]["data"]
    assert (listed[0]["created"], listed[0]["max_model_len"], listed[0]["meta"]["n_embd"]) == (1_700_000_000, 16, WIDTH)
    assert ask(url, "/v1/models/other")[0] == 404
    assert ask(url, "/health")[1] == ask(url, "/v1/health")[1] == {"status": "ok"}
    assert set(ask(url, "/openapi.json")[1]["paths"]) == {
        EMBEDDINGS, "/embedding", "/v1/models", "/v1/models/{model}", "/health", "/version", "/metrics",
    }  # fmt: skip


# -- the engine -------------------------------------------------------------------------------------------------------

TEXTS = ["Why do leaves turn yellow?", "a", "Größe, 北京"]


@pytest.fixture(scope="module", params=["bert, mean", "bert, first", "llama"])
def embedder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    from tiny_architectures import bert, llama

    from specplug.engines.llama_cpp.embedding_engine import EmbeddingEngine
    from specplug.profile import Runtime

    path = tmp_path_factory.mktemp("embedder") / "model.gguf"
    if request.param == "llama":
        llama(path, layers=2)
    else:
        bert(path, pooling=1 if "mean" in request.param else 2)
    with EmbeddingEngine(path, Runtime(threads=1, context=128)) as opened:
        yield opened


def test_vectors_do_not_depend_on_the_other_texts_of_a_pass(embedder: Any) -> None:
    texts = [embedder.tokenize(text) for text in TEXTS]
    together = embedder.embed(texts)
    assert together.shape == (len(TEXTS), embedder.width) and np.isfinite(together).all()
    assert np.linalg.norm(together, axis=1) == pytest.approx(np.ones(len(TEXTS)), abs=1e-5)
    alone = np.concatenate([embedder.embed([text]) for text in reversed(texts)])[::-1]
    assert together == pytest.approx(alone, abs=2e-3)
    assert (np.abs(together @ together.T)[np.triu_indices(3, 1)] < 0.99).all(), "different texts, different vectors"


def test_a_pass_takes_the_largest_text_and_the_most_texts(embedder: Any) -> None:
    longest = int_array(np.arange(embedder.max_tokens) % 1000)
    assert embedder.embed([longest]).shape == (1, embedder.width)
    many = [int_array([7, seq]) for seq in range(embedder.batch_texts)]
    assert len(np.unique(embedder.embed(many).round(4), axis=0)) == embedder.batch_texts


def test_embedding_models_are_told_from_others(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from tiny_architectures import bert, llama

    from specplug.models.references import check_gguf, embedding_model

    model, other, ranking = tmp_path / "bert.gguf", tmp_path / "llama.gguf", tmp_path / "rank.gguf"
    bert(model)
    llama(other, layers=1)
    bert(ranking, pooling=4)
    assert embedding_model(str(model)) == model and embedding_model(str(other)) is None
    with pytest.raises(UsageError, match="bert ranks texts, which is not supported"):
        embedding_model(str(ranking))
    with pytest.raises(UsageError, match="generates no text; name a language model, or serve this one with: specplug"):
        check_gguf(model)


@pytest.mark.parametrize("flag", [(), ("--embeddings",)], ids=["bert", "llama"])
def test_the_command_serves_embeddings(flag: tuple[str, ...], tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    from tiny_architectures import bert, llama

    model = (llama if flag else bert)(tmp_path / "tiny.gguf", layers=1)
    with served(tmp_path, model, *flag) as server:
        body = ask(server.url, EMBEDDINGS, {"input": TEXTS})[1]
        assert np.linalg.norm(vectors(body), axis=1) == pytest.approx(np.ones(len(TEXTS)), abs=1e-5)
        assert body["model"] == "tiny" and ask(server.url, "/v1/models")[1]["data"][0]["max_model_len"] == 1024
        assert ask(server.url, "/v1/chat/completions", {"messages": []})[0] == 400
        assert server.terminate() == 0
    assert "embeddings of 64 numbers, texts of up to 1024 tokens" in server.log.read_text()


@pytest.mark.parametrize("command", [("run", "hello"), ("bench",)])
def test_other_commands_refuse_an_embedding_model_by_name(command: tuple[str, ...], tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    from tiny_architectures import bert

    model = bert(tmp_path / "tiny.gguf", layers=1)
    arguments = [sys.executable, "-m", "specplug_cli.main", command[0], "--model", str(model), *command[1:]]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    said = f"{model}: bert is an embedding model, which generates no text; name a language model, or serve this one"
    assert done.stderr.splitlines()[-1].startswith(f"specplug: error: {said}")
