"""MTP layers whose output matrix has some of its rows: they draft what the complete ones would, of the kept tokens."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")

from heads_anew import RUNTIME, HeadAnew
from test_heads import FREE_ROWS, LENGTH, Watched, answers_of, chats, check
from test_step_loop import answer_all
from tiny_architectures import ARCHITECTURES, qwen35
from tiny_gguf import NUM_TOKENS
from tiny_mtp import MTP_MODELS

from specplug.build.head_sizes import Selection
from specplug.build.vocab_trim import Request as BuildRequest
from specplug.build.vocab_trim import build, open_source
from specplug.build.vocab_trim import check as check_build
from specplug.core import IntArray
from specplug.engines.llama_cpp.context import open_context
from specplug.engines.llama_cpp.drafters.finding import find
from specplug.engines.llama_cpp.drafters.head_drafter import HeadDrafter
from specplug.engines.llama_cpp.drafters.head_finding import find_head, num_mtp_layers
from specplug.engines.llama_cpp.drafters.head_opening import head_need, open_head
from specplug.engines.llama_cpp.engine import LlamaCpp
from specplug.engines.llama_cpp.model import Model, load_model
from specplug.engines.llama_cpp.serving_engine import ServingEngine
from specplug.errors import UsageError
from specplug.generation.answers import Request, Sampling
from specplug.models.model_facts import MTP_STATES_WITH_LOGITS
from specplug.profile import PlannerSettings, Profile
from specplug.proposers.mtp import Mtp
from specplug.proposers.vocab_trim import VocabTrim
from specplug.registry import ProposerSpec
from specplug.transforms.gguf_head import trim
from specplug.transforms.gguf_mtp_head import trim_mtp, trimmed_mtp_bytes

KEPT: IntArray = np.sort(np.random.default_rng(6).permutation(NUM_TOKENS)[:1024]).astype(np.int32)
TRIMMED = [name for name in MTP_MODELS if name not in MTP_STATES_WITH_LOGITS]


class Trimmed:
    """A model, the kept rows of its output matrix, and the reference for drafts."""

    def __init__(self, path: Path, folder: Path, model: Model, anew: HeadAnew) -> None:
        self.path, self.folder, self.model, self.anew = path, folder, model, anew

    def profile(self, slots: int = 1, **runtime: object) -> Profile:
        spec = ProposerSpec("mtp", {"head": str(self.folder), "max_draft": LENGTH})
        planner = PlannerSettings(mode="static", max_nodes=slots * LENGTH)
        return Profile("trimmed", proposers=(spec,), planner=planner, runtime=replace(RUNTIME, **runtime))  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=TRIMMED)
def trimmed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trimmed]:
    folder = tmp_path_factory.mktemp("trimmed")
    path = MTP_MODELS[request.param](folder / "model.gguf", seed=2)
    trim_mtp(path, KEPT, folder / "head")
    layers = num_mtp_layers(path)
    with load_model(path, RUNTIME, mtp=True) as model, HeadAnew(path, path, mtp=True, layers=layers) as anew:
        yield Trimmed(path, folder / "head", model, anew)


def test_drafts_are_the_likeliest_of_the_kept_tokens(trimmed: Trimmed, monkeypatch: pytest.MonkeyPatch) -> None:
    """So they are the complete matrix's wherever its likeliest token is kept. The text stays that of plain decoding."""
    profile = trimmed.profile(slots=2, batch=16)
    requests = [Request(prompt, 20) for prompt in chats(trimmed.model)]
    expected = answers_of(trimmed.model, profile, requests)
    watched = Watched(monkeypatch, expected)
    with ServingEngine(trimmed.model, profile, slots=2, cost=FREE_ROWS) as engine:
        found, _ = answer_all(engine, requests)
    assert found == [tokens for _, tokens in expected]
    check(watched, trimmed.anew, 12, KEPT)
    drafted = [token for _, tokens in watched.drafted for token in tokens]
    assert np.isin(drafted, KEPT).all()


def test_logits_are_those_of_the_complete_matrix(trimmed: Trimmed) -> None:
    """So that the head is as sure of a token, up to what is not kept."""
    text = chats(trimmed.model)[0]
    source = Mtp(head=str(trimmed.folder))
    with ExitStack() as stack:
        target = stack.enter_context(open_context(trimmed.model, RUNTIME, cells=256, num_ids=1, max_rows=1))
        head, _ = open_head(source, trimmed.path, target, RUNTIME, slots=1)
        stack.callback(head.close)
        found = [row.copy() for row in head.logits_along(text[:-3], text[-3:])]
    for at, row in zip((-2, -1), found, strict=True):
        trimmed.anew.draft(text[:at].tolist(), 1)
        np.testing.assert_allclose(row, trimmed.anew.logits[KEPT], rtol=2e-3, atol=2e-2)  # states are kept to 11 bits


def test_the_rest_of_the_contract_knows_the_kept_tokens(trimmed: Trimmed) -> None:
    with LlamaCpp(trimmed.model, trimmed.profile(), cost=FREE_ROWS) as engine:
        (head,) = engine.speculator.fusion.sources
        assert isinstance(head, HeadDrafter) and head.drafted_ids is not None
        assert head.drafted_ids.tolist() == KEPT.tolist()
        assert [head.knows(token) for token in range(NUM_TOKENS)] == np.isin(np.arange(NUM_TOKENS), KEPT).tolist()
        stream = engine.loop.start(chats(trimmed.model)[0], engine.sampler(Sampling()), 100)
        while len(head._texts[0].tokens) < head._texts[0].num_prompt + 12:
            engine.loop.step([stream])
        text, first = list(head._texts[0].tokens), head._texts[0].num_prompt
        right = sum(trimmed.anew.draft(text[:at], 1, KEPT) == [text[at]] for at in range(first, len(text)))
        assert head.score(0) == (right, len(text) - first)


@pytest.mark.parametrize("coupled", [False, True])
def test_sampled_texts_stay_the_same(coupled: bool, trimmed: Trimmed, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = trimmed.profile(coupled=coupled)
    requests = [Request(prompt, 15, Sampling(temperature=0.8, seed=3)) for prompt in chats(trimmed.model)]
    expected = answers_of(trimmed.model, profile, requests)
    Watched(monkeypatch, expected)
    with LlamaCpp(trimmed.model, profile, cost=FREE_ROWS) as engine:
        assert [engine.generate(request).tokens for request in requests] == [tokens for _, tokens in expected]


# -- building ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ARCHITECTURES["qwen35_mtp"](tmp_path_factory.mktemp("built") / "tiny.gguf", weights="q8_0", seed=3)


def read_prompts(out: Path) -> Path:
    path = out.parent / "prompts.jsonl"
    prompts = [{"id": f"p{n}", "category": "toy", "turns": [f"word {7 * n}"]} for n in range(6)]
    path.write_text("\n".join(map(json.dumps, prompts)))
    return path


def request_of(model: Path, out: Path, **options: object) -> BuildRequest:
    chosen = Selection(size=1024)
    options = {"selection": chosen, "calibrate": str(read_prompts(out)), "tokens": 12, "threads": 1} | options
    return BuildRequest(model=model, target=options.pop("target", model), out=out, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("quantize", "measure"), [(None, 1), ("q4_0", 0)])
def test_a_head_is_built_compared_and_used(quantize: str | None, measure: int, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "head"
    request = request_of(model, out, quantize=quantize, measure=measure)
    check_build(request)
    document = build(request)
    assert (document["kind"], document["rows"]) == ("mtp-head", 1024)
    sizes = {line["rows"]: line for line in document["sizes"]}
    assert sizes[NUM_TOKENS]["step_bytes"] > sizes[1024]["step_bytes"]
    assert all(bool(line["measured"]) == bool(measure) for line in sizes.values())
    assert all(line["draft_ms"] > 0 and 0 <= line["acceptance"] <= 1 for line in sizes.values())
    assert document["bytes"] < 1.2 * trimmed_mtp_bytes(model, 1024, quantize) + 150_000
    source = Mtp(head=str(out))
    assert find_head(source, model) == model
    more = head_need(source, model, model, RUNTIME, 0).weights - head_need(Mtp(), model, model, RUNTIME, 0).weights
    assert more == (out / "norm-and-head.gguf").stat().st_size


def test_rows_of_a_layer_in_a_file_of_its_own(tmp_path: Path) -> None:
    target, layer = qwen35(tmp_path / "a.gguf"), qwen35(tmp_path / "b.gguf", mtp_layers=1, alone=True)
    trim_mtp(layer, KEPT, tmp_path / "head")
    source = Mtp(model=str(layer), head=str(tmp_path / "head"))
    with ExitStack() as stack:
        model = stack.enter_context(load_model(target, RUNTIME))
        context = stack.enter_context(open_context(model, RUNTIME, cells=256, num_ids=1, max_rows=1))
        head, own = open_head(source, find_head(source, target), context, RUNTIME, slots=1)
        head.close()
        assert own is not None and head.drafted_ids is not None and len(head.drafted_ids) == len(KEPT)
        own.close()


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_head_of_another_model_or_kind_is_refused(model: Path, tmp_path: Path) -> None:
    trim_mtp(model, KEPT, tmp_path / "head")
    other = ARCHITECTURES["qwen35_mtp"](tmp_path / "other.gguf", seed=9)
    with pytest.raises(UsageError, match=r"made from tiny\.gguf, not from other\.gguf; build it again"):
        find_head(Mtp(head=str(tmp_path / "head")), other)
    with pytest.raises(UsageError, match="name it as the head of the method mtp"):
        find(VocabTrim(model=str(tmp_path / "head")), model)
    trim(ARCHITECTURES["llama"](tmp_path / "llama.gguf"), KEPT, tmp_path / "drafter")
    with pytest.raises(UsageError, match="no head of an MTP layer; build one: specplug build vocab-trim tiny"):
        find_head(Mtp(head=str(tmp_path / "drafter")), model)
    with pytest.raises(UsageError, match="none: not built yet; build it first"):
        find_head(Mtp(head=str(tmp_path / "none")), model)
    (tmp_path / "head" / "norm-and-head.gguf").write_bytes(b"damaged")
    with pytest.raises(UsageError, match="its SHA-256 is"):
        find_head(Mtp(head=str(tmp_path / "head")), model)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        *((name, {}, f"architecture {name} llama.cpp gives the states of MTP layers only together with all logits")
          for name in MTP_STATES_WITH_LOGITS),
        ("hy_v3", {"own_output": True}, "have output matrices of their own; only a shared one is trimmed"),
    ],
)  # fmt: skip
def test_a_matrix_that_cannot_be_trimmed_is_refused(
    name: str, options: dict[str, bool], message: str, tmp_path: Path
) -> None:
    path = MTP_MODELS[name](tmp_path / "model.gguf", **options)
    with pytest.raises(UsageError, match=message):
        open_source(request_of(path, tmp_path / "head"), lambda text: None)
    assert not (tmp_path / "head").exists()
