"""Tokens sampled at temperature 1 have the target's own distribution, with drafts and without.

The target is so small that the exact probability of every continuation of three tokens can be computed.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from specplug import profile as profiles
from specplug.core import int_array
from specplug.engines.vllm.configure import engine_settings
from specplug.transforms.checkpoint_head import trim

pytestmark = pytest.mark.vllm

FloatArray = npt.NDArray[np.float64]

VOCABULARY = 16
K = 4
DRAWN = 3
"""Tokens of an answer whose joint distribution is tested."""

SAMPLES = 4000
FALSE_ALARM = 1e-6
"""The probability of a false alarm in one chi-square test. Five runs are tested three times each, so
any false alarm has a probability of 1 in 60,000."""

WRONG_TEMPERATURE = 1.25
"""The test has to reject samples drawn at this temperature."""

MIN_CELL = 10.0
"""The least number of samples expected in a cell; rare continuations share a cell."""


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    """Every token occurs and is followed by another, so that there is a draft after any token."""
    random = np.random.default_rng(1)
    tokens = [*random.permutation(VOCABULARY), *random.permutation(VOCABULARY), *random.integers(0, VOCABULARY, 4)]
    return [int(token) for token in tokens]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer with random weights, scaled so that some tokens are much more likely than others."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = LlamaForCausalLM(config).float()
        with torch.no_grad():
            for name, weights in model.named_parameters():
                if "norm" not in name:
                    weights.normal_(0.0, 0.25 if "lm_head" in name else 0.5)
    path = tmp_path_factory.mktemp("tiny") / "model"
    model.save_pretrained(path, safe_serialization=True)
    return path


@pytest.fixture(scope="module")
def exact(tiny: Path, prompt: list[int]) -> FloatArray:
    """float64[V, V, V]: the probability of each continuation, by transformers in float64."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float64)
    contexts, joint = np.array([prompt]), np.ones(1)
    for _ in range(DRAWN):
        with torch.no_grad():
            logits = model(torch.from_numpy(contexts)).logits[:, -1]
        after = torch.softmax(logits, dim=-1).numpy()
        joint = (joint[:, None] * after).ravel()
        contexts = np.repeat(contexts, VOCABULARY, axis=0)
        contexts = np.column_stack([contexts, np.tile(np.arange(VOCABULARY), len(contexts) // VOCABULARY)])
    assert joint.sum() == pytest.approx(1.0)
    return joint.reshape((VOCABULARY,) * DRAWN)


def p_value(counts: npt.NDArray[np.int64], probabilities: FloatArray) -> float:
    """The p-value of Pearson's chi-square test. The samples have no influence on which rare cells are joined."""
    import torch

    expected = probabilities.ravel() * counts.sum()
    order = np.argsort(expected, kind="stable")
    cells = np.zeros(len(order), dtype=np.int64)
    filled, cell = 0.0, 0
    for place in order:
        if filled >= MIN_CELL:
            filled, cell = 0.0, cell + 1
        cells[place] = cell
        filled += expected[place]
    observed = np.bincount(cells, counts.ravel(), minlength=cell + 1)
    wanted = np.bincount(cells, expected, minlength=cell + 1)
    if wanted[-1] < MIN_CELL:  # the last continuations do not fill a cell
        observed, wanted = np.append(observed[:-2], observed[-2:].sum()), np.append(wanted[:-2], wanted[-2:].sum())
    assert len(wanted) > 3
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    freedom, distance = torch.tensor([len(wanted) - 1, statistic], dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, distance / 2))


def least_p_value(answers: list[tuple[int, ...]], joint: FloatArray) -> float:
    """The least p-value over the first token, the first two and all three."""
    counts = np.zeros(joint.shape, dtype=np.int64)
    np.add.at(counts, tuple(np.array(answers).T), 1)
    axes = range(1, DRAWN + 1)
    return min(p_value(counts.sum(axis=tuple(range(n, DRAWN))), joint.sum(axis=tuple(range(n, DRAWN)))) for n in axes)


def drawn_from(joint: FloatArray, seed: int) -> list[tuple[int, ...]]:
    """SAMPLES continuations, by NumPy."""
    flat = np.random.default_rng(seed).choice(joint.size, SAMPLES, p=joint.ravel() / joint.sum())
    return list(zip(*(axis.tolist() for axis in np.unravel_index(flat, joint.shape)), strict=True))


def at_temperature(joint: FloatArray, temperature: float) -> FloatArray:
    """The distribution at another temperature, token by token."""
    found = np.ones_like(joint)
    for n in range(1, DRAWN + 1):
        marginal = joint.sum(axis=tuple(range(n, DRAWN)))
        after = marginal / marginal.sum(axis=-1, keepdims=True)
        after = after ** (1 / temperature)
        after /= after.sum(axis=-1, keepdims=True)
        found *= after.reshape(after.shape + (1,) * (DRAWN - n))
    return found


def with_wrong_acceptance(joint: FloatArray, prompt: list[int], share: float) -> FloatArray:
    """The distribution if a share of the second tokens were taken from the prompt: drafts are accepted too often."""
    found = joint.copy()
    for first in range(VOCABULARY):
        draft = prompt[max(i for i in range(len(prompt) - 1) if prompt[i] == first) + 1]
        total = joint[first].sum()
        followed = joint[first, draft] / joint[first, draft].sum()
        found[first] *= 1 - share
        found[first, draft] += share * total * followed
    return found


@contextmanager
def opened(model: Path, folder: Path, proposer: str) -> Iterator[Any]:
    from vllm import LLM

    path = folder / "profile.yaml"
    path.write_text(
        f"schema: 1\nname: test\nengine: vllm\nproposers: [{proposer}]\nplanner: {{mode: static}}\n"
        f"vllm: {{num_speculative_tokens: {K}, max_model_len: 128, max_num_seqs: 64, dtype: float32, "
        "enforce_eager: true}\n"
    )
    llm = LLM(
        str(model),
        **engine_settings(profiles.load(str(path)), str(path)),
        skip_tokenizer_init=True,
        gpu_memory_utilization=0.3,
        disable_log_stats=False,
        seed=11,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def answers_of(llm: Any, prompt: list[int], seeded: bool) -> list[tuple[int, ...]]:
    """The first tokens of many answers, each long enough for full drafts."""
    from vllm import SamplingParams, TokensPrompt

    params = [
        SamplingParams(
            temperature=1.0,
            max_tokens=DRAWN + K,
            ignore_eos=True,
            detokenize=False,
            seed=1000 + number if seeded else None,
        )
        for number in range(SAMPLES)
    ]
    outputs = llm.generate([TokensPrompt(prompt_token_ids=prompt)] * SAMPLES, params, use_tqdm=False)
    answers = [tuple(output.outputs[0].token_ids) for output in outputs]
    assert {len(answer) for answer in answers} == {DRAWN + K}
    return [answer[:DRAWN] for answer in answers]


def draft_counters(llm: Any) -> dict[str, int]:
    """vLLM's own counters of speculation. In one process, a later engine may continue an earlier engine's counts."""
    names = {f"vllm:spec_decode_num_{name}": name for name in ("drafts", "draft_tokens", "accepted_tokens")}
    sums = dict.fromkeys(names.values(), 0)
    for found in llm.get_metrics():
        if found.name in names:
            sums[names[found.name]] += int(found.value)
    return sums


def increase(llm: Any, before: dict[str, int]) -> dict[str, int]:
    return {name: value - before[name] for name, value in draft_counters(llm).items()}


def test_the_model_is_suitable(exact: FloatArray, prompt: list[int]) -> None:
    """Its distribution is neither uniform nor certain, and drafts from the prompt are accepted sometimes."""
    assert set(prompt[:-1]) == set(range(VOCABULARY))
    first = exact.sum(axis=(1, 2))
    assert 0.1 < first.max() < 0.7
    assert np.count_nonzero(exact * SAMPLES > MIN_CELL) > 50


@pytest.mark.parametrize("seed", range(5))
def test_the_test_accepts_the_right_distribution(exact: FloatArray, seed: int) -> None:
    assert least_p_value(drawn_from(exact, seed), exact) > FALSE_ALARM


@pytest.mark.parametrize("seed", range(3))
def test_the_test_rejects_wrong_distributions(exact: FloatArray, prompt: list[int], seed: int) -> None:
    """The wrong ones are a higher temperature, and drafts of which 1 in 20 is accepted wrongly."""
    for wrong in (at_temperature(exact, WRONG_TEMPERATURE), with_wrong_acceptance(exact, prompt, 0.05)):
        assert wrong.sum() == pytest.approx(1.0)
        assert least_p_value(drawn_from(wrong, seed), exact) < FALSE_ALARM


def test_plain_decoding_samples_from_the_target(
    tiny: Path, exact: FloatArray, prompt: list[int], tmp_path: Path
) -> None:
    with opened(tiny, tmp_path, "none") as llm:
        before = draft_counters(llm)
        answers = answers_of(llm, prompt, seeded=False)
        assert increase(llm, before)["draft_tokens"] == 0
    assert least_p_value(answers, exact) > FALSE_ALARM


@pytest.mark.parametrize(("proposer", "seeded"), [("ngram", False), ("ngram", True), ("suffix", False)])
def test_drafts_do_not_change_the_distribution(
    tiny: Path, exact: FloatArray, prompt: list[int], tmp_path: Path, proposer: str, seeded: bool
) -> None:
    with opened(tiny, tmp_path, proposer) as llm:
        before = draft_counters(llm)
        answers = answers_of(llm, prompt, seeded)
        drafter = llm.llm_engine.model_executor.driver_worker.worker.model_runner.drafter
        sums = increase(llm, before)
        accepted, verified = drafter.drafting.counters.accepted_tokens.total(), sums["drafts"]
        assert accepted == sums["accepted_tokens"]
        assert not drafter.faults.counts
    assert verified >= SAMPLES
    assert SAMPLES / 20 < accepted < verified * (K - 1), "drafts were not both accepted and rejected"
    assert least_p_value(answers, exact) > FALSE_ALARM
    assert least_p_value(answers, at_temperature(exact, WRONG_TEMPERATURE)) < FALSE_ALARM


def test_a_trimmed_drafter_does_not_change_the_distribution(
    tiny: Path, exact: FloatArray, prompt: list[int], tmp_path: Path
) -> None:
    """The target drafts for itself with half of its rows: tokens without a row must be as frequent as before."""
    (tiny / "tokenizer.json").write_text("{}")  # only its hash is used
    trim(tiny, int_array(range(0, VOCABULARY, 2)), tmp_path / "drafter")
    with opened(tiny, tmp_path, f"{{method: vocab_trim, model: {tmp_path / 'drafter'}}}") as llm:
        before = draft_counters(llm)
        answers = answers_of(llm, prompt, seeded=False)
        sums = increase(llm, before)
    accepted, verified = sums["accepted_tokens"], sums["drafts"]
    assert SAMPLES / 20 < accepted < verified * (K - 1), "drafts were not both accepted and rejected"
    assert least_p_value(answers, exact) > FALSE_ALARM
    assert least_p_value(answers, at_temperature(exact, WRONG_TEMPERATURE)) < FALSE_ALARM
