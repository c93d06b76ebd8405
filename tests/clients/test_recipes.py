"""The recipes of docs/how-to/clients.md, run as they stand there against a real model."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from gguf_tokenizer import write_tokenizer

from specplug.models.references import resolve

pytestmark = [pytest.mark.clients, pytest.mark.llama]

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "clients.md"
URL = "http://127.0.0.1:8000"
BINARIES = Path(sys.executable).parent


def blocks(heading: str, language: str) -> list[str]:
    """The code blocks of a section; the language of shell commands is empty."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return [
        code for tag, code in re.findall(r"^```(\w*)\n(.*?)^```", section, re.DOTALL | re.MULTILINE) if tag == language
    ]


def run(command: Sequence[str], folder: Path, **environment: str) -> str:
    """The standard output of a command that has to succeed."""
    path = f"{BINARIES}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HOME": str(folder), "NO_COLOR": "1", "COLUMNS": "200", **environment}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


ANSWERS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/api/chat")


def answered(server: Any) -> int:
    """How many requests for an answer have succeeded."""
    request = Request(f"{server.url}/metrics", headers={"authorization": "Bearer KEY"})
    text = urlopen(request).read().decode()
    counts = re.findall(r'^specplug_requests_total\{path="([^"]+)",status="200"\} (\S+)$', text, re.MULTILINE)
    return sum(int(float(count)) for path, count in counts if path in ANSWERS)


def completion(server: Any, body: dict[str, Any]) -> str:
    headers = {"authorization": "Bearer KEY", "content-type": "application/json"}
    request = Request(f"{server.url}/v1/completions", json.dumps(body).encode(), headers)
    text: str = json.load(urlopen(request))["choices"][0]["text"]
    return text


def test_each_recipe_has_the_address_and_the_key() -> None:
    """Without this, a page without recipes would pass."""
    for client in ("openai", "openai", "anthropic", "litellm", "ollama"):
        assert all(URL in code and "KEY" in code for code in blocks(client, "python")) and blocks(client, "python")


@pytest.mark.parametrize("client", ["openai", "anthropic", "litellm", "ollama"])
def test_python_recipes_print_an_answer(server: Any, client: str, tmp_path: Path) -> None:
    pytest.importorskip(client)
    for code in blocks(client, "python"):
        before = answered(server)
        assert run([sys.executable, "-c", code.replace(URL, server.url)], tmp_path).strip()
        assert answered(server) == before + 1


def shell(heading: str, server: Any, number: int = 0) -> str:
    return blocks(heading, "")[number].replace(URL, server.url)


def test_llm_by_its_command_and_from_python(server: Any, tmp_path: Path) -> None:
    pytest.importorskip("llm")
    before = answered(server)
    out = run(["bash", "-ec", shell("llm", server)], tmp_path, LLM_USER_PATH=str(tmp_path))
    assert len(out.strip().splitlines()) >= 2
    assert answered(server) == before + 2


def test_aider_sends_a_message(server: Any, tmp_path: Path) -> None:
    """The answer is constrained, since a model of this size would not end it."""
    if not (BINARIES / "aider").exists() and shutil.which("aider") is None:
        pytest.skip("aider is not installed")
    constrained = {"extra_body": {"guided_regex": "Greetings from the server[.]"}}
    (tmp_path / ".aider.model.settings.yml").write_text(
        json.dumps([{"name": "openai/any", "extra_params": constrained}])
    )
    once = "--message Hello --no-git --yes-always --no-check-update --no-show-model-warnings --map-tokens 0"
    before = answered(server)
    out = run(["bash", "-ec", f"{shell('aider', server).strip()} {once} --analytics-disable"], tmp_path)
    assert answered(server) == before + 1
    assert "Greetings from the server." in out and re.search(r"Tokens: .* sent, \d+ received", out), out


RIVERS = ["Rhine", "Danube", "Seine", "Thames"]
GENERATED = {
    "task": "rivers_generated",
    "doc_to_text": "{{river}}, {{river}}, {{river}}, {{river}},",
    "doc_to_target": " {{river}}",
    "output_type": "generate_until",
    "generation_kwargs": {"until": ["\n", ","], "max_gen_toks": 8, "temperature": 0},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
CHOSEN = {
    "task": "rivers_chosen",
    "doc_to_text": "{{river}}, {{river}}, {{river}}, {{river}},",
    "doc_to_choice": RIVERS,
    "doc_to_target": "{{answer}}",
    "output_type": "multiple_choice",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def evaluate(server: Any, number: int, tasks: Sequence[dict[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
    """Run the recipe of lm-eval with this number on tasks over RIVERS; returns the results by task."""
    pytest.importorskip("lm_eval")
    lines = [json.dumps({"river": river, "answer": index}) for index, river in enumerate(RIVERS)]
    (folder / "rivers.jsonl").write_text("\n".join(lines))
    files = {"data_files": {"test": str(folder / "rivers.jsonl")}}
    for task in tasks:
        document = {**task, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
        (folder / f"{task['task']}.yaml").write_text(json.dumps(document))
    checkpoint = write_tokenizer(resolve("demo:smollm2"), folder / "tokenizer")
    command = shell("lm-eval", server, number).strip()
    command = command.replace("TASK", ",".join(task["task"] for task in tasks)).replace("CHECKPOINT", str(checkpoint))
    run(["bash", "-ec", f"{command} --include_path {folder} --output_path {folder}/out --log_samples"], folder)
    (found,) = (folder / "out").rglob("results_*.json")
    results: dict[str, dict[str, Any]] = json.loads(found.read_text())["results"]
    return results


def test_lm_eval_by_log_likelihood_and_by_generated_answers(server: Any, tmp_path: Path) -> None:
    """A river that was named four times is more likely than another; generated answers equal the server's."""
    results = evaluate(server, 0, [CHOSEN, GENERATED], tmp_path)
    assert results["rivers_chosen"]["acc,none"] == 1.0
    (samples,) = (tmp_path / "out").rglob("samples_rivers_generated_*.jsonl")
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        asked = {"prompt": ", ".join([sample["doc"]["river"]] * 4) + ",", "max_tokens": 8, "temperature": 0}
        assert sample["resps"] == [[completion(server, {**asked, "stop": ["\n", ","]})]]


def test_lm_eval_with_the_chat_template(server: Any, tmp_path: Path) -> None:
    before = answered(server)
    assert "rivers_generated" in evaluate(server, 1, [GENERATED], tmp_path)
    assert answered(server) == before + len(RIVERS)


def test_the_tokenizer_of_the_evaluation_is_the_servers(server: Any, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(write_tokenizer(resolve("demo:smollm2"), tmp_path))
    text = "Flüsse 2026: def f(x):\n    return x<|im_end|>"
    headers = {"authorization": "Bearer KEY", "content-type": "application/json"}
    request = Request(f"{server.url}/tokenize", json.dumps({"content": text}).encode(), headers)
    assert json.load(urlopen(request))["tokens"] == tokenizer(text).input_ids


def test_a_container_reaches_the_server_by_dockers_name(server: Any) -> None:
    port = server.url.rsplit(":", 1)[1]
    headers = {"authorization": "Bearer KEY", "host": f"host.docker.internal:{port}"}
    assert json.load(urlopen(Request(f"{server.url}/v1/models", headers=headers)))["data"][0]["id"] == "smollm2"
    assert blocks("From a container", "")[0].startswith("specplug serve some.gguf --host 0.0.0.0 --api-key KEY\n")
