"""MTP layers of all architectures of which llama.cpp can run them, and several of them in one model, on tiny models.

Each text is plain decoding's, and each draft that of layers that read the whole text anew. More about heads:
tests/test_heads.py.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")

from heads_anew import RUNTIME, HeadAnew
from test_heads import FREE_ROWS, LENGTH, Watched, answers_of, chats, check, profile_of
from test_step_loop import answer_all
from tiny_mtp import MTP_MODELS, SEVERAL

from specplug.core import Draft
from specplug.engines.llama_cpp.drafters import head_context, head_finding
from specplug.engines.llama_cpp.drafters.head_context import HeadContext
from specplug.engines.llama_cpp.drafters.head_drafter import HeadDrafter
from specplug.engines.llama_cpp.drafters.head_finding import find_head, num_mtp_layers
from specplug.engines.llama_cpp.drafters.head_opening import head_need
from specplug.engines.llama_cpp.drafters.mtp_layers_drafter import MtpLayersDrafter
from specplug.engines.llama_cpp.engine import LlamaCpp
from specplug.engines.llama_cpp.model import Model, load_model
from specplug.engines.llama_cpp.serving_engine import ServingEngine
from specplug.errors import UsageError
from specplug.generation.answers import Request, Sampling
from specplug.models.gguf_header import read_header
from specplug.models.model_facts import MTP_ARCHITECTURES, SEVERAL_MTP_LAYERS, has_mtp_layer
from specplug.profile import Profile
from specplug.proposers.mtp import Mtp


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("mtp")
    return {name: write(folder / f"{name}.gguf", seed=2) for name, write in MTP_MODELS.items()}


def test_the_tried_architectures_are_those_that_are_allowed() -> None:
    assert set(MTP_MODELS) == set(MTP_ARCHITECTURES) and set(SEVERAL) == set(SEVERAL_MTP_LAYERS)


class Opened:
    """A model, and the reference for its drafts."""

    def __init__(self, name: str, path: Path, model: Model, anew: HeadAnew) -> None:
        self.path, self.model, self.anew = path, model, anew
        self.layers = num_mtp_layers(path)
        self.files = {"mtp": path}

    def profile(self, batch: int = 512, slots: int = 1) -> Profile:
        return profile_of("mtp", self.files, batch=batch, max_nodes=LENGTH * slots)


@pytest.fixture(scope="module", params=MTP_MODELS)
def opened(request: pytest.FixtureRequest, files: dict[str, Path]) -> Iterator[Opened]:
    path = files[request.param]
    layers = num_mtp_layers(path)
    with load_model(path, RUNTIME, mtp=True) as model, HeadAnew(path, path, mtp=True, layers=layers) as anew:
        yield Opened(request.param, path, model, anew)


@pytest.mark.parametrize("slots", [1, 3])
def test_texts_are_those_of_plain_decoding_and_drafts_those_of_layers_that_read_anew(
    slots: int, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With prompts in pieces of a few rows, after accepted and rejected drafts."""
    profile = opened.profile(batch=16, slots=slots)
    requests = [Request(prompt, 30) for prompt in chats(opened.model) * 2]
    expected = answers_of(opened.model, profile, requests)
    watched = Watched(monkeypatch, expected)
    with ServingEngine(opened.model, profile, slots=slots, cost=FREE_ROWS) as engine:
        found, _ = answer_all(engine, requests)
    assert found == [tokens for _, tokens in expected]
    check(watched, opened.anew, 40)


def test_after_a_cached_beginning_drafts_are_those_of_layers_that_read_anew(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversation that goes on, one that is cut, and one that begins like that of another slot."""
    profile, first = opened.profile(slots=2), chats(opened.model)[0]
    ((_, answer),) = answers_of(opened.model, profile, [Request(first, 20)])
    longer = np.concatenate([first, np.array([*answer, 300, 301, 302], dtype=np.int32)])
    prompts = [first, longer, longer[: len(first) + 7], np.append(longer[: len(first) + 4], np.int32(40))]
    requests = [Request(prompt, 12) for prompt in prompts]
    expected = answers_of(opened.model, profile, requests)
    watched = Watched(monkeypatch, expected)
    with ServingEngine(opened.model, profile, slots=2, cost=FREE_ROWS) as engine:
        found = [answer_all(engine, [request])[0][0] for request in requests[:3]]
        found += answer_all(engine, [requests[3], requests[1]])[0]
    assert found == [tokens for _, tokens in (*expected, expected[1])]
    check(watched, opened.anew, 15)


def test_a_layer_whose_depth_is_not_reached_reads_later(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short drafts at first, then long ones; the layers for the depths of those have much to read."""
    prompt = chats(opened.model)[0]
    with LlamaCpp(opened.model, opened.profile(), cost=FREE_ROWS) as engine:
        (head,) = engine.speculator.fusion.sources
        assert isinstance(head, HeadDrafter) and isinstance(head, MtpLayersDrafter) == (opened.layers > 1)
        stream = engine.loop.start(prompt, engine.sampler(Sampling()), 100)
        inner = HeadDrafter.propose_batch
        with monkeypatch.context() as patch:
            patch.setattr(HeadDrafter, "propose_batch", lambda self, seqs, budgets: inner(self, seqs, [1] * len(seqs)))
            while len(head._texts[0].tokens) < len(prompt) + 40:
                engine.loop.step([stream])
        text = list(head._texts[0].tokens)
        assert head.propose(0, LENGTH).tokens.tolist() == opened.anew.draft(text, LENGTH)


def test_after_an_interrupted_pass_of_any_layer_the_same_is_drafted(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = chats(opened.model)[0]
    with LlamaCpp(opened.model, opened.profile(), cost=FREE_ROWS) as engine:
        (head,) = engine.speculator.fusion.sources
        assert isinstance(head, HeadDrafter)
        engine.loop.start(prompt, engine.sampler(Sampling()), 100)
        expected = opened.anew.draft(list(head._texts[0].tokens), LENGTH)
        decode = HeadContext.decode
        for last in range(1, LENGTH + 1):
            passes = iter(range(1, LENGTH + 1))

            def interrupted(context: HeadContext, last: int = last, passes: Iterator[int] = passes) -> None:
                decode(context)
                if next(passes) == last:
                    raise KeyboardInterrupt

            with monkeypatch.context() as patch:
                patch.setattr(HeadContext, "decode", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    head.propose(0, LENGTH)
            draft: Draft = head.propose(0, LENGTH)
            assert draft.tokens.tolist() == expected, f"after the interrupt of pass {last}"


@pytest.mark.parametrize("name", ["qwen3next", "step35"])
def test_states_of_rows_without_logits_which_would_end_the_process(name: str, files: dict[str, Path]) -> None:
    """In a child process, as llama.cpp aborts where all rows' states of these layers are asked for."""
    command = [sys.executable, "-m", "specplug_cli.main", "run", "--model", str(files[name]), "--profile", "mtp"]
    command += ["--max-tokens", "12", "--threads", "1", "--context", "512", "a long prompt " * 20]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0 and ended.stdout.strip(), ended.stderr


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEVERAL)
def test_a_file_that_lacks_one_of_its_layers_is_refused(
    name: str, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    header = read_header(files[name])
    last = [tensor for tensor in header.tensors if tensor.endswith(head_finding.MTP_TENSOR)][-1]
    broken = type(header)(
        **{field: getattr(header, field) for field in header.__slots__} | {"tensors": header.tensors - {last}}
    )
    monkeypatch.setattr(head_finding, "read_header", lambda path: broken)
    with pytest.raises(UsageError, match=r"names \d MTP layers and has \d; convert the model again"):
        find_head(Mtp(), files[name])


def test_a_library_that_runs_the_first_layer_only_is_named(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_context, "missing", lambda names: [n for n in names if n == head_context.CHOOSE_LAYER])
    with pytest.raises(UsageError, match=r"2 MTP layers, and this build of llama\.cpp does not export"):
        find_head(Mtp(), files["hy_v3"])
    assert find_head(Mtp(), files["qwen35"]) == files["qwen35"]


def test_the_memory_of_every_layer_counts(files: dict[str, Path], tmp_path: Path) -> None:
    """Each layer's context has cells for all of them."""
    one, three = (MTP_MODELS["step35"](tmp_path / f"{n}.gguf", mtp_layers=n) for n in (1, 3))
    needs = [head_need(Mtp(), path, path, RUNTIME, 1024) for path in (one, three)]
    states = 1024 * 2 * 64
    assert needs[1].cache - states == pytest.approx(9 * (needs[0].cache - states), rel=1e-3)
    assert has_mtp_layer(read_header(three))
