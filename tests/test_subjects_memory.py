"""The memory that a server needs, from its command line and the headers of its models."""

import os
from pathlib import Path

import pytest
from recorded_help import CURRENT
from subject_stubs import command, stub, words
from tiny_architectures import llama
from tiny_gguf import CONTEXT

from specplug.errors import UsageError
from specplug.machine.memory import AvailableMemory
from specplug.subjects import server_memory
from specplug.subjects.help_text import parse_help
from specplug.subjects.opening import open_subject
from specplug.subjects.server_command import ServerCommand
from specplug.subjects.server_memory import check_room, fitted_flags, server_bytes
from specplug.subjects.subject import SubjectError

GIB = 1 << 30
CELL_BYTES = 4 * 2 * (16 + 16) * 2
"""Of the tiny model: 4 layers, 2 heads of keys and values with 16 numbers each, 2 bytes per number."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("models") / "tiny.gguf")


def needed(words: str, *flags: str) -> int:
    return server_bytes(ServerCommand(tuple(words.split()), "llama-server", parse_help(CURRENT)), flags)


def test_weights_and_cache_count(model: Path) -> None:
    one, two = (needed(f"llama-server -m {model} -c {cells}") for cells in (1024, 2048))
    assert two - one == 1024 * CELL_BYTES
    assert one > model.stat().st_size + 1024 * CELL_BYTES


def test_the_models_own_context_counts_where_none_is_given(model: Path) -> None:
    assert needed(f"llama-server -m {model}") == needed(f"llama-server -m {model} -c {CONTEXT}")
    assert needed(f"llama-server -m {model} -c 0") == needed(f"llama-server -m {model} -c {CONTEXT}")


def test_the_default_of_a_build_counts_where_the_command_has_no_context(model: Path) -> None:
    """Before 2025, llama-server's help said 4096, and forks say it still; the tiny model was trained on as many."""
    offered = parse_help("-c,    --ctx-size N               size of the prompt context (default: 2048)\n")

    def found(flags: str) -> int:
        return server_bytes(ServerCommand(tuple(f"llama-server -m {model} {flags}".split()), "llama-server", offered))

    assert found("") == needed(f"llama-server -m {model} -c 2048")
    assert found("-c 0") == needed(f"llama-server -m {model} -c {CONTEXT}")


@pytest.mark.parametrize(
    ("kind", "block"),
    [("bf16", 64), ("q8_0", 34), ("q5_1", 24), ("q5_0", 22), ("q4_1", 20), ("q4_0", 18), ("iq4_nl", 18), ("new", 18)],
)
def test_the_type_of_the_cache_counts(model: Path, kind: str, block: int) -> None:
    """Of a cached number: 32 make a block of so many bytes. Where the types differ, the smaller one counts for both."""
    f16 = needed(f"llama-server -m {model} -c 1024")
    for flags in (f"-ctk {kind} -ctv {kind}", f"-ctk {kind}", f"--cache-type-v {kind}"):
        assert f16 - needed(f"llama-server -m {model} -c 1024 {flags}") == 1024 * CELL_BYTES * (64 - block) // 64


@pytest.mark.parametrize(
    ("flags", "has_gpu", "counts"),
    [
        ("", False, True),
        ("", True, False),
        ("-ngl 99", True, False),
        ("-ngl 0", True, True),
        ("--device none", True, True),
        ("-ngl 99", False, True),
        ("", None, True),
        ("-ngl 99", None, False),
        ("--gpu-layers 0", None, True),
    ],
)
def test_what_a_gpu_may_hold_counts_as_nothing(model: Path, flags: str, has_gpu: bool | None, counts: bool) -> None:
    argv = f"llama-server -m {model} -c 4000000 {flags}".split()
    found = server_bytes(ServerCommand(tuple(argv), "llama-server", parse_help(CURRENT), has_gpu=has_gpu))
    assert (found > 4_000_000 * CELL_BYTES) == counts and (found == 0) != counts


FITTING = """\
-ngl,  --gpu-layers, --n-gpu-layers N   max. number of layers to store in VRAM, either an exact number,
                                        'auto', or 'all' (default: auto)
                                        (env: LLAMA_ARG_N_GPU_LAYERS)
-fit,  --fit [on|off]                   whether to adjust unset arguments to fit in device memory ('on' or
                                        'off', default: 'on')
                                        (env: LLAMA_ARG_FIT)
"""
"""Of the help of a build of llama.cpp of December 2026."""


@pytest.mark.parametrize(
    ("flags", "fitted"),
    [
        ("", ["-ngl", "-c"]),
        ("-ngl auto --fit on", ["-ngl", "-c"]),
        ("--gpu-layers -1 -c 4096", ["-ngl"]),
        ("-ngl all", ["-c"]),  # which counts as set, as in `common_fit_params`
        ("-ngl 99 --ctx-size 4096", []),
        ("-ngl 99 -c 0", []),  # the model's own context, which is then kept
        ("-fit off", []),
        ("--fit=0", []),
        ("-ngl 0", []),
        ("--device none", []),
    ],
)
def test_what_a_server_chooses_by_the_gpu_memory_that_is_free(flags: str, fitted: list[str]) -> None:
    words = ("llama-server", "-m", "x.gguf", *flags.split())
    offered = parse_help(CURRENT + FITTING)
    assert fitted_flags(ServerCommand(words, "llama-server", offered, has_gpu=True)) == fitted
    assert fitted_flags(ServerCommand(words, "llama-server", offered, has_gpu=False)) == []
    assert fitted_flags(ServerCommand(words, "llama-server", parse_help(CURRENT), has_gpu=True)) == []
    assert fitted_flags(ServerCommand(("vllm", "serve", "m"), "vllm")) == []


def test_a_variable_turns_fitting_off(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ServerCommand(("llama-server",), "llama-server", parse_help(CURRENT + FITTING), has_gpu=True)
    assert fitted_flags(found) == ["-ngl", "-c"]
    monkeypatch.setenv("LLAMA_ARG_FIT", "disabled")
    assert fitted_flags(found) == []


def test_a_drafter_among_the_added_flags_counts(model: Path) -> None:
    alone = needed(f"llama-server -m {model} -c 1024")
    assert needed(f"llama-server -m {model} -c 1024", "-md", str(model)) == 2 * alone
    assert needed(f"llama-server -m {model} -c 1024", "--spec-type", "ngram-mod") == alone


@pytest.mark.parametrize("words", ["llama-server -m absent.gguf", "llama-server -hf a/b", "llama-server"])
def test_a_model_that_is_not_on_this_disk_counts_as_nothing(words: str) -> None:
    assert needed(words) == 0


def test_what_does_not_fit_is_refused_with_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_memory, "available_memory", lambda: AvailableMemory(4 * GIB))
    check_room("new", 4 * GIB, [])
    with pytest.raises(UsageError, match=r"new needs about 5.0 GiB, and 4.0 GiB are free; use a smaller -c"):
        check_room("new", 5 * GIB, [])
    # Of one that runs, what it holds already is not counted a second time: of this process a few hundred MiB.
    with pytest.raises(UsageError, match=r"needs about 3.0 GiB, with the 1 beside it 6.0 GiB, and 4\.\d GiB are free"):
        check_room("new", 3 * GIB, [(os.getpid(), 3 * GIB)])
    check_room("new", 2 * GIB, [(os.getpid(), 2 * GIB)])


def test_a_third_server_is_refused() -> None:
    with pytest.raises(SubjectError, match="2 servers run already"):
        check_room("new", 0, [(1, 0), (2, 0)])


def test_a_server_that_does_not_fit_is_not_started(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_memory, "available_memory", lambda: AvailableMemory(1000))
    server = open_subject(command("-m", str(model)))
    with pytest.raises(UsageError, match=r"stub_server.py needs about"):
        server.start()
    with stub("-m", "absent.gguf") as other:  # of which nothing is known
        assert other.ask(words(3)).tokens == 3
