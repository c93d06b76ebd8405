"""Our proposers inside vLLM: greedy text is vLLM's own, drafts are accepted, nothing fails or stays."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from specplug import profile as profiles
from specplug.engines.vllm.configure import engine_settings

pytestmark = pytest.mark.vllm

PROMPTS = (
    "one two three four five six seven eight nine ten one two three four",
    "Repeat: the cat sat on the mat. The cat sat on the mat. The cat",
    "The capital of France is Paris. The capital of Italy is",
    "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return",
    "Once upon a time there was a",
    "1 + 1 = 2\n2 + 2 = 4\n3 + 3 =",
)
TOKENS = 24
SCHEMA = {
    "type": "object",
    "properties": {"names": {"type": "array", "items": {"enum": ["Anna", "Peter"]}, "minItems": 4, "maxItems": 4}},
    "required": ["names"],
    "additionalProperties": False,
}


def open_engine(checkpoint: Path, folder: Path, proposers: str) -> Any:
    from vllm import LLM

    path = folder / "profile.yaml"
    path.write_text(
        f"schema: 1\nname: test\nengine: vllm\nproposers: [{proposers}]\nplanner: {{mode: static}}\n"
        "vllm: {num_speculative_tokens: 4, max_model_len: 256, max_num_seqs: 4, dtype: float32, enforce_eager: true}\n"
    )
    # Room for about two and a half of four sequences: some are preempted, and read again.
    return LLM(
        str(checkpoint),
        **engine_settings(profiles.load(path), str(path)),
        num_gpu_blocks_override=12,
        block_size=32,
        max_num_batched_tokens=40,
        gpu_memory_utilization=0.3,
    )


def requests() -> list[tuple[str, Any]]:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    greedy = [(prompt, SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)) for prompt in PROMPTS]
    long = (PROMPTS[0] * 9, SamplingParams(temperature=0.0, max_tokens=500, ignore_eos=True))
    off = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, extra_args={"specplug": "off"})
    constrained = StructuredOutputsParams(json=SCHEMA)
    return [
        *greedy,
        greedy[0],
        long,
        (PROMPTS[1], off),
        (PROMPTS[2], SamplingParams(temperature=0.0, max_tokens=40, stop=[" Germany", "\n\n"])),
        ("As JSON: ", SamplingParams(temperature=0.0, max_tokens=60, structured_outputs=constrained)),
        (PROMPTS[3], SamplingParams(temperature=0.0, max_tokens=TOKENS, logprobs=2, prompt_logprobs=1)),
        (PROMPTS[5], SamplingParams(temperature=1.0, top_k=1, n=2, max_tokens=12)),
        (PROMPTS[4], SamplingParams(temperature=0.0, max_tokens=TOKENS, repetition_penalty=1.2, presence_penalty=0.2)),
    ]


def answers(llm: Any) -> list[list[tuple[tuple[int, ...], str, Any]]]:
    asked = requests()
    outputs = llm.generate([prompt for prompt, _ in asked], [params for _, params in asked], use_tqdm=False)
    return [[(tuple(one.token_ids), one.text, one.finish_reason) for one in output.outputs] for output in outputs]


def close(llm: Any) -> None:
    llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def plain(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[tuple[tuple[int, ...], str, Any]]]:
    llm = open_engine(checkpoint, tmp_path_factory.mktemp("plain"), "none")
    said = answers(llm)
    close(llm)
    assert len(said[7][0][0]) > 80 and said[7][0][2] == "length"  # it reached the end of its context
    assert said[9][0][2] == "stop"
    return said


@pytest.fixture(scope="module", params=["suffix, token_recycling", "ngram"])
def drafted(
    request: pytest.FixtureRequest, plain: object, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    llm = open_engine(checkpoint, tmp_path_factory.mktemp("drafted"), request.param)
    yield llm
    close(llm)


def drafter_of(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.drafter


def test_greedy_text_is_vllms_own(drafted: Any, plain: list[list[tuple[tuple[int, ...], str, Any]]]) -> None:
    assert answers(drafted) == plain
    drafter = drafter_of(drafted)
    counts = drafter.drafting.counts
    assert sum(counts.accepted_tokens.values()) > 40
    assert sum(counts.draft_tokens.values()) > sum(counts.accepted_tokens.values())
    assert not drafter.faults.counts


def test_of_aborted_and_finished_requests_nothing_stays(drafted: Any) -> None:
    from vllm import SamplingParams, TokensPrompt

    engine = drafted.llm_engine
    for name in ("goes", "stays"):
        prompt = TokensPrompt(prompt_token_ids=[504, 3575, 282, 4649, 314] * 4)
        engine.add_request(name, prompt, SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True))
    for _ in range(5):
        engine.step()
    engine.abort_request(["goes"])
    while engine.has_unfinished_requests():
        engine.step()
    drafted.generate("The last one", SamplingParams(temperature=0.0, max_tokens=3), use_tqdm=False)
    drafter = drafter_of(drafted)
    assert len(drafter.drafting.requests) <= 1 and not drafter.faults.counts
    for guarded in drafter.drafting.speculator.sources:
        source = getattr(guarded.source, "proposer", guarded.source)
        kept = getattr(source, "_running", None)
        assert len(source._last if kept is None else kept) <= 1


def test_a_request_that_wants_no_drafts_gets_none(drafted: Any) -> None:
    from vllm import SamplingParams

    counts = drafter_of(drafted).drafting.counts
    before = sum(counts.draft_tokens.values())
    for extra, more in (({"specplug": "off"}, False), (None, True)):
        params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, extra_args=extra)
        drafted.generate(PROMPTS[0], params, use_tqdm=False)
        assert (sum(counts.draft_tokens.values()) > before) is more
