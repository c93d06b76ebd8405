"""`SpeculativeLlama` and the server on models with a recurrent state."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import pytest
from llama_cpp import Llama
from serving import served
from tiny_architectures import ARCHITECTURES
from tiny_gguf import NUM_TOKENS

from specplug import profile as profiles
from specplug.engines.llama_cpp.speculative_llama import SpeculativeLlama
from specplug.errors import UsageError

OPTIONS = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "flash_attn": True, "verbose": False}


def answer(llm: Llama, tokens: Sequence[int], most: int = 24, **options: float) -> list[int]:
    said = []
    for token in llm.generate(list(tokens), temp=0.0, **options):
        said.append(token)
        if len(said) == most:
            break
    return said


@pytest.mark.parametrize("name", ["lfm2", "qwen35", "mamba2", "falcon_h1"])
def test_scripts_get_the_same_tokens(tmp_path: Path, name: str) -> None:
    path = str(ARCHITECTURES[name](tmp_path / "tiny.gguf"))
    random = np.random.default_rng(0)
    first = random.integers(300, NUM_TOKENS, 120).tolist()
    plain = Llama(path, seed=0, **OPTIONS)
    profile = profiles.Profile("forced", planner=profiles.PlannerSettings(mode="static", max_nodes=5))
    drafting = SpeculativeLlama(path, profile=profile, seed=0, **OPTIONS)
    said = answer(plain, first)
    asked = [first, first, [*first, *said, *first[:9]], first[:80] + said, first[:80] + first[:20], first[:5]]
    for tokens in asked:
        plain.reset()
        assert answer(drafting, tokens) == answer(plain, tokens)
    assert drafting.counters.draft_tokens > 50, "nothing was drafted"
    drafting.close()
    plain.close()


def test_states_are_saved_and_loaded(tmp_path: Path) -> None:
    path = str(ARCHITECTURES["lfm2"](tmp_path / "tiny.gguf"))
    text = np.random.default_rng(0).integers(300, NUM_TOKENS, 700).tolist()
    profile = profiles.Profile("forced", planner=profiles.PlannerSettings(mode="static", max_nodes=5))
    # llama.cpp aborts where a batch is longer than what it evaluates at once, 512 tokens by default.
    options = OPTIONS | {"n_ctx": 2048, "n_batch": 2048}
    plain, drafting = Llama(path, seed=0, **options), SpeculativeLlama(path, profile=profile, seed=0, **options)
    first = answer(drafting, text)
    assert first == answer(plain, text)
    state = drafting.save_state()
    answer(drafting, text[:90])
    drafting.load_state(state)
    plain.reset()
    going_on = [*text, *first, 7]
    assert answer(drafting, going_on) == answer(plain, going_on)
    drafting.reset()
    drafting.eval(text[:20])
    drafting.n_tokens = 10
    with pytest.raises(UsageError, match="cannot be cut to 10 tokens"):
        drafting.eval(text[10:20])
    drafting.close()
    plain.close()


@pytest.mark.llama
@pytest.mark.parametrize("name", ["qwen35", "granitehybrid"])
def test_the_server_answers_several_at_once(tmp_path: Path, name: str) -> None:
    model = ARCHITECTURES[name](tmp_path / "tiny.gguf")
    words = ["one two three " * 12, "Say something.", "four five " * 30, "one two three " * 12 + "four"]
    with served(tmp_path, model, "--slots", "3", "--context", "512") as server:

        def said(content: str, **options: object) -> str:
            body = {
                "model": "tiny",
                "messages": [{"role": "user", "content": content}],
                "temperature": 0,
                "max_tokens": 24,
                **options,
            }
            request = Request(
                f"{server.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urlopen(request, timeout=120) as response:
                return str(json.load(response)["choices"][0]["message"]["content"])

        expected = [said(one, specplug={"mode": "off"}) for one in words]
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(said, words * 2)) == expected * 2
