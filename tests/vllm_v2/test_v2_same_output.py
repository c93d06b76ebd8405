"""specplug's proposers in vLLM's V2 runner, asynchronously: greedy text equals that without drafts, whatever
happens."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from corpus_files import write_corpus

from specplug import profile as profiles
from specplug.corpora import writing
from specplug.engines.vllm.fault_isolation import MAX_FAULTS
from specplug.engines.vllm.runner_choice import settings_for
from specplug.engines.vllm.v2.scheduled_lengths import use_lengths
from specplug.engines.vllm.v2.timed_steps import STEPS, timed_run, timed_steps, timing_settings
from specplug.errors import EngineError

pytestmark = pytest.mark.vllm

K = 4
PROMPTS = [np.random.default_rng(n).integers(0, 64, 3 + 3 * n % 17).tolist() * (1 + n % 3) for n in range(12)]

SETUPS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "both": ("suffix, token_recycling", {}, {}),
    # Four requests need up to 12 blocks of 32 tokens.
    "preempted": ("suffix, token_recycling", {}, {"num_gpu_blocks_override": 7, "block_size": 32}),
    "chunked": ("suffix, token_recycling", {}, {"max_num_batched_tokens": 16, "max_num_seqs": 3}),
    "by batch size": ("suffix", {"tokens_per_batch_size": [[1, 1, 4], [2, 3, 2], [4, 4, 0]]}, {}),
}
"""Proposers, keys of the profile, and settings of vLLM."""


def settings_of(folder: Path, proposers: str, **vllm: Any) -> dict[str, Any]:
    path = folder / "profile.yaml"
    path.write_text(
        f"schema: 1\nname: test\nengine: vllm\nproposers: [{proposers}]\n"
        f"vllm: {json.dumps({'num_speculative_tokens': K, **vllm})}\n"
    )
    return settings_for(profiles.load(str(path)), str(path))


def params_of(n: int, **params: Any) -> Any:
    from vllm import SamplingParams

    asked = {"temperature": 0, "max_tokens": 24 + n % 5, "ignore_eos": True, "detokenize": False}
    return SamplingParams(**asked | params)


def answers(llm: Any, prompts: list[list[int]] = PROMPTS, **params: Any) -> list[list[int]]:
    asked = [params_of(n, **params) for n in range(len(prompts))]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], asked, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def core_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core


def speculator_of(llm: Any) -> Any:
    return core_of(llm).model_executor.driver_worker.worker.model_runner.speculator


@pytest.fixture(scope="module")
def plain(open_engine: Callable[..., Any]) -> dict[str, list[list[int]]]:
    """The answers without drafts: greedy ones, and those with penalties."""
    llm = open_engine()
    assert llm.llm_engine.vllm_config.use_v2_model_runner
    return {"greedy": answers(llm), "penalties": answers(llm, **PENALTIES)}


PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.2}


@pytest.mark.parametrize("setup", SETUPS)
def test_greedy_text_is_that_without_drafts(
    setup: str,
    plain: dict[str, list[list[int]]],
    open_engine: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Prompts that are read in pieces are then longer than the texts that are looked at.
    monkeypatch.setattr("specplug.engines.vllm.v2.device_speculator.SMALLEST_WIDTH", 16)
    proposers, keys, settings = SETUPS[setup]
    llm = open_engine(**settings_of(tmp_path, proposers, **keys) | settings)
    config = llm.llm_engine.vllm_config
    assert config.use_v2_model_runner and config.scheduler_config.async_scheduling
    preempted = count_preemptions(llm)
    assert answers(llm) == plain["greedy"]
    speculator = speculator_of(llm)
    assert type(speculator).__name__ == "DeviceSpeculator" and not speculator.faults.counts, speculator.faults.counts
    assert int(speculator.drafting.accepted.sum()) > 0
    assert (setup == "preempted") == bool(preempted)
    if setup != "both":
        return
    assert answers(llm, **PENALTIES) == plain["penalties"]
    abort(llm)
    check_options(llm, plain["greedy"])
    check_faults(llm, plain["greedy"])


def count_preemptions(llm: Any) -> list[str]:
    scheduler, preempted = core_of(llm).scheduler, []
    stock = scheduler._preempt_request

    def preempt(request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.request_id)
        return stock(request, *args, **kwargs)

    scheduler._preempt_request = preempt
    return preempted


def abort(llm: Any) -> None:
    """Requests that are aborted while others run leave their slots, and the others are answered."""
    engine = llm.llm_engine
    for n, prompt in enumerate(PROMPTS[:6]):
        engine.add_request(f"abort-{n}", {"prompt_token_ids": prompt}, params_of(n, max_tokens=20))
    finished = []
    for step in range(200):
        if step == 6:
            engine.abort_request(["abort-1", "abort-4"])
        finished += [one.request_id for one in engine.step() if one.finished]
        if not engine.has_unfinished_requests():
            break
    assert sorted(finished) == ["abort-0", "abort-2", "abort-3", "abort-5"]


def check_options(llm: Any, expected: list[list[int]]) -> None:
    """Requests that ask for no draft tokens get filler: none is counted as drafted."""
    drafting = speculator_of(llm).drafting
    before = int(drafting.drafted.sum())
    assert answers(llm, PROMPTS[:4], extra_args={"specplug": "off"}) == expected[:4]
    assert int(drafting.drafted.sum()) == before
    assert answers(llm, PROMPTS[:4], extra_args={"specplug": {"max_draft": 1}}) == expected[:4]
    assert before < int(drafting.drafted.sum())


def check_faults(llm: Any, expected: list[list[int]]) -> None:
    """An exception anywhere in a step leaves filler; after a few of them drafting stops, and answers go on."""
    speculator = speculator_of(llm)

    def fails(*args: Any) -> None:
        raise RuntimeError("on purpose")

    speculator.drafting.step = fails
    assert answers(llm, PROMPTS[:4]) == expected[:4]
    assert speculator.faults.counts["adapter", "raised"] == MAX_FAULTS and "adapter" in speculator.faults.disabled


def test_a_corpus_drafts_also_when_it_is_removed_meanwhile(
    plain: dict[str, list[list[int]]], open_engine: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the answers are in the corpus, in two shards. It is removed before the first request."""
    texts = [[*prompt, *answer] for prompt, answer in zip(PROMPTS[::2], plain["greedy"][::2], strict=True)]
    write_corpus(tmp_path / "corpus", texts, 64, shard_tokens=256)
    monkeypatch.setattr("specplug.engines.vllm.v2.device_speculator.logger", logger := Mock())
    llm = open_engine(**settings_of(tmp_path, f'suffix, {{method: datastore, corpora: ["{tmp_path}/corpus/"]}}'))
    assert any("2 of 2 shards" in str(call) for call in logger.info.call_args_list)
    writing.remove(tmp_path / "corpus")
    assert answers(llm) == plain["greedy"]
    speculator = speculator_of(llm)
    assert not speculator.faults.counts, speculator.faults.counts
    suffix, datastore, _ = zip(speculator.drafting.drafted.tolist(), speculator.drafting.accepted.tolist(), strict=True)
    assert datastore[0] >= datastore[1] > 2 * suffix[1]


def test_stock_methods_are_left_alone(plain: dict[str, list[list[int]]], open_engine: Callable[..., Any]) -> None:
    """Without specplug's key in the configuration, vLLM's own speculator drafts."""
    ngram = {"method": "ngram_gpu", "num_speculative_tokens": K, "prompt_lookup_min": 2, "prompt_lookup_max": 3}
    llm = open_engine(speculative_config=ngram)
    assert type(speculator_of(llm)).__name__ == "NgramGPUSpeculator"
    assert answers(llm) == plain["greedy"]


def test_steps_are_timed_by_draft_tokens(open_engine: Callable[..., Any], tmp_path: Path) -> None:
    """The scheduler schedules the number of draft tokens that is set, and they are wrong on purpose."""
    found = settings_of(tmp_path, "suffix, token_recycling")
    ref = found["additional_config"]["specplug"]["profile"]
    llm = open_engine(**timing_settings({}, ref, range(1, 3), [2]))
    assert speculator_of(llm)._timing
    for length in (1, 2):
        steps = timed_run(llm, 2, length, 8)
        assert len(steps) >= STEPS // 2
        assert {(sequences, drafted) for sequences, drafted, _, _ in steps} == {(2, length)}
        assert all(8 < tokens < 48 and ms > 0 for _, _, tokens, ms in steps)


def test_steps_are_timed_in_a_process_of_their_own(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With drafts, and by an engine that does not speculate; and what fails there is one line."""
    (tmp_path / "sitecustomize.py").write_text("import interpreted\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(__file__).parent)]))
    ref = settings_of(tmp_path, "token_recycling")["additional_config"]["specplug"]["profile"]
    settings = {"skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True, "gpu_memory_utilization": 0.2}
    settings |= {"max_model_len": 64}
    for lengths in ([], [1]):
        steps = timed_steps(str(tiny), settings, ref, lengths, batches=[1], contexts=[8], seconds=60.0)
        assert len(steps) >= STEPS // 2 and {(one[0], one[1]) for one in steps} == {(1, len(lengths))}
    with pytest.raises(EngineError, match="could not be timed"):
        timed_steps(str(tmp_path / "none"), settings, ref, [1], batches=[1], contexts=[8], seconds=60.0)


def test_an_engine_can_change_the_profile_between_requests(
    plain: dict[str, list[list[int]]], open_engine: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    llm = open_engine(**settings_of(tmp_path, "suffix"))
    settings_of(tmp_path / "other", "token_recycling", num_speculative_tokens=2)
    speculator = speculator_of(llm)
    speculator.use_profile(str(tmp_path / "other" / "profile.yaml"), fresh=False)
    assert answers(llm, PROMPTS[:4]) == plain["greedy"][:4]
    assert speculator.drafting.names == ("token_recycling",), "also where no request ran before"
    other = speculator.drafting
    speculator.use_profile("", fresh=False)
    assert answers(llm, PROMPTS[:4]) == plain["greedy"][:4]
    assert speculator.drafting.names == ("suffix",) and int(other.drafted.sum()) > 0
    speculator.use_profile(str(tmp_path / "other" / "profile.yaml"), fresh=False)
    assert speculator.drafting is other


def test_an_engine_can_change_the_number_of_draft_tokens_between_requests(
    plain: dict[str, list[list[int]]], open_engine: Callable[..., Any], tmp_path: Path
) -> None:
    every = [[size, size, size] for size in range(1, 4)]
    llm = open_engine(**settings_of(tmp_path, "token_recycling", num_speculative_tokens=3, tokens_per_batch_size=every))
    drafted = []
    for length in (0, 2, 0):
        use_lengths(llm, [(1, 64, length)])
        assert answers(llm, PROMPTS[:4]) == plain["greedy"][:4]
        drafted.append(int(speculator_of(llm).drafting.drafted.sum()))
    assert 0 == drafted[0] < drafted[1] == drafted[2]
