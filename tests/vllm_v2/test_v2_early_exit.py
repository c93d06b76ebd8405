"""Early exit in vLLM's V2 runner: greedy text equals that without drafts, and the exit follows what is right."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import interpreted
import pytest
import torch
from test_v2_same_output import (
    PROMPTS,
    abort,
    answers,
    core_of,
    count_preemptions,
    params_of,
    settings_of,
    speculator_of,
)
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.kv_cache_interface import FullAttentionSpec

from specplug import profile as profiles
from specplug.engines.vllm.runner_choice import settings_for
from specplug.engines.vllm.v2 import lookahead, target_model
from specplug.engines.vllm.v2.target_layers import TargetLayers
from specplug.engines.vllm.v2.target_model import TargetModel, refuse_target_settings
from specplug.errors import EngineError, UsageError

pytestmark = pytest.mark.vllm

EXIT_1 = "{method: early_exit, exits: [1], exit: 1}"

SETUPS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "batch": (EXIT_1, 12, {"block_size": 32}),
    "single": (EXIT_1, 3, {"max_num_seqs": 1}),
    # Four requests need up to 12 blocks of 32 tokens.
    "preempted": (EXIT_1, 8, {"num_gpu_blocks_override": 7, "block_size": 32}),
    "chunked": (EXIT_1, 4, {"max_num_batched_tokens": 16, "max_num_seqs": 3}),
    "beside others": ("{method: early_exit, exits: [1]}, suffix, token_recycling", 4, {}),
}
"""Proposers, prompts, and settings of vLLM."""


@pytest.fixture(scope="module")
def plain(open_engine: Callable[..., Any]) -> list[list[int]]:
    return answers(open_engine())


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four layers, of which the last two add nothing."""
    return interpreted.write_tiny_model(tmp_path_factory.mktemp("models") / "padded", layers=4, identity_from=2)


def early_exit_of(llm: Any) -> Any:
    return speculator_of(llm).drafting.proposers[0]


def check_no_faults(llm: Any) -> None:
    assert not speculator_of(llm).faults.counts, speculator_of(llm).faults.counts


@contextmanager
def checked_writes(llm: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Of every pass of a drafter, how many rows write and how many there are.

    Each place that is written is compared with vLLM's scheduler: at that time its request has to own the block in which
    the position of the token lies, and no other request of the scheduler may have that block.
    """
    stock, found = target_model.build_attn_metadata, []

    def checked(**arguments: Any) -> Any:
        scheduler, runner = core_of(llm).scheduler, runner_of(llm)
        owned = {name: scheduler.kv_cache_manager.get_block_ids(name)[0] for name in scheduler.requests}
        names = {slot: name for name, slot in runner.req_states.req_id_to_index.items()}
        target = runner.speculator._target
        positions, places = arguments["positions"].tolist(), arguments["slot_mappings"][0].tolist()
        size = target.block_size
        for slot, position, place in zip(target.slots_on_host, positions, places, strict=True):
            if place == PAD_SLOT_ID:
                continue
            name, block = names[slot], place // size
            assert owned[name][position // size] == block and place % size == position % size
            assert not any(block in blocks for other, blocks in owned.items() if other != name)
        found.append((sum(place != PAD_SLOT_ID for place in places), len(places)))
        return stock(**arguments)

    with monkeypatch.context() as patched:
        patched.setattr(target_model, "build_attn_metadata", checked)
        yield found


def runner_of(llm: Any) -> Any:
    return core_of(llm).model_executor.driver_worker.worker.model_runner


@pytest.mark.parametrize("setup", SETUPS)
def test_greedy_text_is_that_without_drafts(
    setup: str, plain: list[list[int]], open_engine: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specplug.engines.vllm.v2.device_speculator.SMALLEST_WIDTH", 16)
    proposers, count, settings = SETUPS[setup]
    llm = open_engine(**settings_of(tmp_path, proposers) | settings)
    config = llm.llm_engine.vllm_config
    assert config.use_v2_model_runner and config.scheduler_config.async_scheduling
    assert core_of(llm).scheduler.num_lookahead_tokens == 4
    preempted = count_preemptions(llm)
    with checked_writes(llm, monkeypatch) as passes:
        assert answers(llm, PROMPTS[:count]) == plain[:count]
    check_no_faults(llm)
    assert (setup == "preempted") == bool(preempted)
    assert passes and int(speculator_of(llm).drafting.accepted.sum()) > 0
    if setup == "chunked":
        assert any(writing < rows for writing, rows in passes), "prompts that are still being read are not drafted for"
    if setup != "batch":
        return
    with checked_writes(llm, monkeypatch) as passes:
        assert answers(llm, PROMPTS[:2], extra_args={"specplug": "off"}) == plain[:2]
        assert not passes, "no layers run where no request asks for drafts"
        assert answers(llm, PROMPTS[:1], extra_args={"specplug": 1}) == plain[:1]
        assert 0 < len(passes) <= len(plain[0]), "no more than the largest limit in the batch"
    check_shared_blocks(llm, plain)
    # Sampling from the likeliest token alone goes through the rejection of sampled requests.
    assert answers(llm, PROMPTS[:2], temperature=1.0, top_k=1, seed=3) == plain[:2]
    abort(llm)
    check_no_faults(llm)


def check_shared_blocks(llm: Any, expected: list[list[int]]) -> None:
    """Texts that begin like answers share their blocks, in which requests have drafted."""
    known = [(PROMPTS[n], expected[n]) for n in (5, 11)]
    prompts = [{"prompt_token_ids": [*prompt, *answer[:-4]]} for prompt, answer in known]
    outputs = llm.generate(prompts, [params_of(0, max_tokens=4)] * len(known), use_tqdm=False)
    assert [list(one.outputs[0].token_ids) for one in outputs] == [answer[-4:] for _, answer in known]
    assert all(one.num_cached_tokens > len(prompt) for one, (prompt, _) in zip(outputs, known, strict=True))


def test_an_exit_after_the_last_layer_that_adds_something_is_always_right(
    padded: Path, open_engine: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is found: the exit before is rarely right, the one behind costs more."""
    plain = answers(open_engine(padded), PROMPTS[:4])
    llm = open_engine(padded, **settings_of(tmp_path, "{method: early_exit, exits: [2], exit: 2}"))
    with checked_writes(llm, monkeypatch) as passes:
        assert answers(llm, PROMPTS[:4]) == plain
    assert all(writing == rows for writing, rows in passes)
    drafting = speculator_of(llm).drafting
    assert int(drafting.drafted.sum()) == int(drafting.accepted.sum()) > 50
    check_no_faults(llm)
    # Without blocks for draft tokens, chains end with the last block of a request.
    monkeypatch.setattr(lookahead, "_own", lambda config: 0)
    llm = open_engine(padded, block_size=32, **settings_of(tmp_path, "{method: early_exit, exits: [1, 2, 3]}"))
    with checked_writes(llm, monkeypatch) as passes:
        assert steps_until(llm, lambda: early_exit_of(llm).current == 2) <= 20
        assert answers(llm, PROMPTS[:4]) == plain
    assert any(writing < rows for writing, rows in passes)
    assert early_exit_of(llm).current == 2
    costs = early_exit_of(llm).draft_costs
    assert 0 < costs[0] < costs[1] < costs[2] < 1
    check_no_faults(llm)


def steps_until(llm: Any, is_reached: Callable[[], bool]) -> int:
    """Steps of two requests until something has happened; they are answered then."""
    engine = llm.llm_engine
    for n, prompt in enumerate(PROMPTS[:2]):
        engine.add_request(f"steps-{n}", {"prompt_token_ids": prompt}, params_of(n, max_tokens=60))
    reached, steps = 0, 0
    while engine.has_unfinished_requests():
        engine.step()
        steps += 1
        if not reached and is_reached():
            reached = steps
    assert reached
    return reached


def test_exits_that_are_rarely_right_stop_drafting(
    plain: list[list[int]], open_engine: Callable[..., Any], tmp_path: Path
) -> None:
    llm = open_engine(**settings_of(tmp_path, "{method: early_exit, exits: [1]}"))
    assert answers(llm, PROMPTS[:4]) == plain[:4]
    proposer, drafting = early_exit_of(llm), speculator_of(llm).drafting
    assert proposer.current is None and int(proposer._counts.sum()) > 0
    drafted = int(drafting.drafted.sum())
    assert answers(llm, PROMPTS[:2]) == plain[:2]
    assert int(drafting.drafted.sum()) == drafted, "no layers run"
    check_no_faults(llm)


def test_exits_beyond_the_layers_are_refused(open_engine: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"exits after 2 and 7 layers, but this model has 2; choose numbers below 2$"):
        open_engine(**settings_of(tmp_path, "{method: early_exit, exits: [1, 2, 7]}"))


def test_models_and_settings_with_which_layers_cannot_run_apart_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class MambaForCausalLM:
        pass

    with pytest.raises(UsageError, match=r"^early_exit: the layers of MambaForCausalLM cannot be run apart on vLLM"):
        TargetLayers(MambaForCausalLM(), "early_exit")
    parallel = SimpleNamespace(pipeline_parallel_size=2, decode_context_parallel_size=1)
    config = SimpleNamespace(
        lora_config=None,
        parallel_config=parallel,
        kv_transfer_config=None,
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        model_config=SimpleNamespace(enable_sleep_mode=True),
    )
    with pytest.raises(UsageError, match=r"early_exit runs .* does not work with --pipeline-parallel-size; remove one"):
        refuse_target_settings(config, ["early_exit"])
    parallel.pipeline_parallel_size = 1
    refuse_target_settings(config, ["early_exit"])
    with pytest.raises(UsageError, match=r"early_exit and short_context .* does not work with --enable-sleep-mode"):
        refuse_target_settings(config, ["early_exit", "short_context"])
    config.lora_config = object()
    with pytest.raises(UsageError, match=r"does not work with --enable-lora; remove one"):
        refuse_target_settings(config, ["early_exit"])
    monkeypatch.setattr(target_model, "installed", lambda: ("vllm", "0.33.0"))
    with pytest.raises(EngineError, match=r"early_exit: vllm 0\.33\.0 is outside of the versions 0\.32 to below 0\.33"):
        refuse_target_settings(config, ["early_exit"])
    spec = {"block_size": 16, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    windowed = FullAttentionSpec(**spec, sliding_window=64)
    chunked = FullAttentionSpec(**spec, attention_chunk_size=64)
    runner = SimpleNamespace(
        vllm_config=None,
        model=type("LlamaForCausalLM", (), {"model": SimpleNamespace(layers=[])})(),
        device="cpu",
        max_model_len=1,
        max_num_reqs=1,
    )
    for specs in ([None, None], [windowed], [chunked]):
        groups = [SimpleNamespace(kv_cache_spec=one) for one in specs]
        runner.kv_cache_config = SimpleNamespace(kv_cache_groups=groups)
        with pytest.raises(UsageError, match=r"^early_exit: this model has several kinds of KV cache"):
            TargetModel(runner, "early_exit")


@pytest.mark.parametrize("backend", ["FLASHINFER", "FLASH_ATTN"])
def test_builders_are_made_for_the_first_pass_and_a_backend_that_may_wait_is_named(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, said = [], []
    group = SimpleNamespace(backend=SimpleNamespace(get_name=lambda: backend))

    def init_attn_backend(*args: Any, active_layer_names: set[str]) -> Any:
        made.append(active_layer_names)
        return [[group]], None, None

    monkeypatch.setattr(target_model, "init_attn_backend", init_attn_backend)
    monkeypatch.setattr(target_model.logger, "warning", lambda *args: said.append(args[0] % args[1:]))
    layer = SimpleNamespace(self_attn=SimpleNamespace(attn=SimpleNamespace(layer_name="model.layers.0")))
    spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=8, dtype=torch.float32)
    runner = SimpleNamespace(
        vllm_config=None,
        model=type("LlamaForCausalLM", (), {"model": SimpleNamespace(layers=[layer])})(),
        device="cpu",
        max_model_len=1,
        max_num_reqs=1,
        block_tables=None,
        kv_cache_config=SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)]),
    )
    target = TargetModel(runner, "early_exit")
    assert not made, "short_context has no such passes"
    assert target._attention_groups() is target._attention_groups()
    assert made == [{"model.layers.0"}]
    assert [line.split()[1] for line in said] == (["FLASHINFER"] if backend == "FLASHINFER" else [])


def test_another_runner_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "profile.yaml"
    text = "schema: 1\nname: test\nengine: vllm\nproposers: [{method: early_exit, exits: [1]}]\n"
    path.write_text(f"{text}vllm: {{runner: v1}}\n")
    with pytest.raises(
        UsageError, match=r"early_exit drafts on vLLM in its V2 runner alone .*; remove it, or runner: v1$"
    ):
        settings_for(profiles.load(str(path)), str(path))
    path.write_text(text)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(
        UsageError, match=r"early_exit drafts on vLLM in its V2 runner alone .*, but stock vLLM runs V1 here"
    ):
        settings_for(profiles.load(str(path)), str(path))
