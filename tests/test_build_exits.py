"""`specplug build early-exit`: predictions worked out by hand, complete builds of a tiny model, and wrong requests."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specplug.build.exit_costs import ExitCosts, line, lookup_line, needed_rate, pays, tokens_per_pass
from specplug.tune.trace import Answer

FLAT = [10.0] * 9
"""Milliseconds of target passes over 1 to 9 rows: further rows cost nothing."""


# -- predictions ------------------------------------------------------------------------------------------------------


def test_the_needed_agreement_is_that_of_the_best_draft_length() -> None:
    """By hand, with a flat target and draft tokens of half a pass: one token of rate a gives 1 + a tokens in 1.5
    passes, so it pays from a = 0.5; two give 1 + a + a^2 in 2 passes, which needs a = 0.618."""
    assert needed_rate(FLAT, 5.0, 1.0) == pytest.approx(0.5, abs=1e-3)
    assert needed_rate(FLAT, 0.0, 1.0) == pytest.approx(0.0, abs=1e-3)
    assert needed_rate(FLAT, 5.0, 2.0) is None, "eight right tokens give 9 in 5 passes, 1.8 times plain"
    assert needed_rate([10.0 * rows for rows in range(1, 10)], 1.0, 1.0) is None, "each row costs a pass"


@given(st.floats(0.05, 20.0), st.floats(0.0, 1.0), st.sampled_from([1.0, 1.1, 1.3]))
def test_with_the_needed_agreement_the_speed_is_reached_and_with_less_it_is_not(
    draft_ms: float, slope: float, speed: float
) -> None:
    target = [10.0 * (1 + slope * rows) for rows in range(9)]
    rate = needed_rate(target, draft_ms, speed)

    def best(a: float) -> float:
        return max(tokens_per_pass(a, n) * target[0] / (target[n] + n * draft_ms) for n in range(1, 9))

    if rate is None:
        assert best(1.0) < speed
    else:
        assert best(rate) >= speed - 1e-9 and (rate < 1e-3 or best(rate - 1e-3) < speed)


def test_layers_that_were_not_timed_are_on_a_line() -> None:
    costs = ExitCosts(FLAT, [(4, 1.0), (12, 3.0)])
    assert [costs.draft_ms(layers) for layers in (4, 8, 12, 20)] == [1.0, 2.0, 3.0, 5.0]
    assert ExitCosts(FLAT, [(4, 3.0), (12, 1.0)]).draft_ms(8) == 3.0, "more layers are not faster"


def test_a_line_predicts_by_the_runs_of_right_tokens() -> None:
    """By hand: right, right, wrong, twice over, with one token per draft: passes emit 2, 1, 2, 1 tokens of 6; with two
    per draft 3 and 3. Draft tokens cost a millisecond: 6 tokens in 2 x 12 ms against 60 ms."""
    hits = [np.array([True, True, False, True, True, False])]
    found = line("exit 4", 4, ExitCosts(FLAT, [(4, 1.0), (8, 2.0)]), 1.0, hits)
    assert (found.agreement, found.guesses) == (pytest.approx(4 / 6), 2)
    assert found.predicted == pytest.approx(60 / 24)
    assert pays([found]) and found.can_pay


def test_lookup_is_predicted_by_replaying_the_answers() -> None:
    tokens = np.array([1, 2, 3, 4, 5] * 8, dtype=np.int32)
    answer = Answer("p", "c", 0, np.array([9], dtype=np.int32), tokens, np.zeros((40, 0), dtype=np.int32), ())
    found = lookup_line([answer], ExitCosts(FLAT, [(4, 1.0)]))
    assert found.agreement == 1.0 and found.predicted is not None and found.predicted > 2


# -- complete builds --------------------------------------------------------------------------------------------------

llama = pytest.mark.llama
REAL, LAYERS = 3, 8


@pytest.fixture(scope="module")
def padded(demo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight layers, of which the last five add zero."""
    pytest.importorskip("llama_cpp")
    from tiny_models import write_gguf

    path = tmp_path_factory.mktemp("padded") / "padded.gguf"
    write_gguf(path, demo_path, width=64, layers=LAYERS, identity_from=REAL, first_tokens=2048)
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache folder for all builds, so that the model answers once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def build(cache: Path, padded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from specplug.bench import workloads
    from specplug.build import early_exit
    from specplug.build.llama_cpp import GgufSource

    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(early_exit, "TOKENS", 24)
    monkeypatch.setattr(early_exit, "ANSWERED", 1)
    monkeypatch.setattr(GgufSource, "times", lambda self, drafters: (FLAT, [1.0 + n for n in range(len(drafters))]))
    prompts = workloads.load_workload(workloads.BUILTIN, category="all")
    few = workloads.limit(prompts, 1)
    monkeypatch.setattr(workloads, "load_workload", lambda *args, **kwargs: few)

    def built(exits: tuple[int, ...], **options: Any) -> dict[str, Any]:
        request = early_exit.Request(padded, tmp_path / "out", exits, size=512, threads=1, **options)
        document = early_exit.build(request)
        assert (tmp_path / "out").exists() == document["built"]
        assert [path.name for path in tmp_path.iterdir()] == ["out"] * document["built"], "no trial is left"
        return document | {"verdict": early_exit.verdict(document)}

    return built


@llama
def test_exits_that_pay_are_written_with_what_was_measured(build: Any, tmp_path: Path) -> None:
    """Those from the third layer on are right where the head has the token, as a drafter with all layers is."""
    from specplug.models import drafter_folders

    document = build((1, 3, 5), measure=True)
    agreement = [one["agreement"] for one in document["exits"]]
    own, lookup = document["beside"]
    assert agreement[0] < 0.5 * agreement[1] and agreement[1] == agreement[2] == own["agreement"] < 1
    assert lookup["name"] == "suffix lookup" and own["draft_ms"] == 1.0 + 7 / 4
    assert document["pays"] and document["verdict"].startswith("the best exit is predicted to reach")
    manifest, ids = drafter_folders.read(tmp_path / "out")
    assert [(one.layers, one.copied) for one in manifest.exits] == [(1, 1), (3, 3), (5, 5)]
    assert len(ids) == document["rows"] == 512 and manifest.built["exits"] == document["exits"]


@llama
def test_exits_that_do_not_pay_are_reported_and_not_written(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from specplug.build.llama_cpp import GgufSource

    steep = [10.0 + 4 * rows for rows in range(9)]
    monkeypatch.setattr(GgufSource, "times", lambda self, drafters: (steep, [4.0, 5.0]))
    document = build((1, 2), measure=True)
    assert not document["pays"] and not document["built"]
    assert document["verdict"].startswith("does not pay: the best exit is predicted to reach 0.")
    assert document["verdict"].endswith("nothing was written; to build it, add --anyway")
    document = build((1, 2), measure=True, anyway=True)
    assert document["built"] and document["verdict"].startswith("does not pay")


@llama
def test_without_measuring_exits_are_written_unless_none_can_pay(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from specplug.build.llama_cpp import GgufSource

    steps: list[list[tuple[Path, str | None]]] = []

    def steep(self: object, drafters: list[tuple[Path, str | None]]) -> tuple[list[float], list[float]]:
        steps.append(drafters)
        return [10.0 * rows for rows in range(1, 10)], [1.0, 2.0]

    with monkeypatch.context() as patched:
        patched.setattr(GgufSource, "times", steep)
        document = build((4,))
    assert [file for _, file in steps[0]] == ["exit-2.gguf", "exit-4.gguf"], "a line needs two"
    assert not document["built"] and "even exits that are always right" in document["verdict"]
    document = build((4,))
    assert document["built"] and "pays where" in document["verdict"] and document["exits"][0]["agreement"] is None


# -- from the command line --------------------------------------------------------------------------------------------


def call(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SPECPLUG_")}
    environment |= {name: str(cwd / name) for name in ("XDG_CACHE_HOME", "XDG_DATA_HOME")}
    command = [sys.executable, "-m", "specplug_cli.main", "build", "early-exit", *arguments]
    return subprocess.run(command, capture_output=True, timeout=300, text=True, cwd=cwd, env=environment)


@llama
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}", "--exits", "8"], "--exits 8: padded.gguf has 8 layers; use 1 to 7"),
        (["{model}", "--exits", "0,4"], "--exits 0,4: padded.gguf has 8 layers; use 1 to 7"),
        (["{model}", "--exits", "4,2"], "in ascending order"),
        (["{model}", "--exits", "four"], "--exits four: no numbers of layers"),
        (["{model}", "--exits", "4", "--size", "0"], "size 0: use 1 to 2048"),
        (["{model}", "--exits", "4", "--out", "."], "exists already"),
        (["none.gguf", "--exits", "4"], "no such file"),
        (["{hybrid}", "--exits", "1"], "its memory is hybrid; of architecture lfm2 no first layers can be drafters"),
        (["{folder}", "--exits", "1"], "a folder; exits are built of a .gguf file"),
        (["{other}", "--exits", "4", "--size", "64"], "heads of its architecture are not trimmed; leave --size out"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, padded: Path, demo_path: Path, tmp_path: Path
) -> None:
    from tiny_models import write_gguf

    hybrid = tmp_path / "hybrid.gguf"
    if "{hybrid}" in arguments:
        write_hybrid(hybrid)
    if "{folder}" in arguments:
        (tmp_path / "checkpoint").mkdir()
        (tmp_path / "checkpoint" / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2}')
        (tmp_path / "checkpoint" / "model.safetensors").write_bytes(b"weights")
    if "{other}" in arguments:
        write_gguf(tmp_path / "other.gguf", demo_path, width=64, layers=8, first_tokens=512, architecture="internlm2")
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.iterdir())
    places = {"model": padded, "hybrid": hybrid, "folder": tmp_path / "checkpoint", "other": tmp_path / "other.gguf"}
    given = [one.format(**places) for one in arguments]
    done = call(*given, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert message in done.stderr.splitlines()[-1]
    assert [path for path in sorted(tmp_path.iterdir()) if not path.name.startswith("XDG")] == before


def write_hybrid(path: Path) -> None:
    """A file of an architecture with a recurrent state, which is refused by its name."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "lfm2")
    writer.add_block_count(2)
    writer.add_head_count(1)
    writer.add_head_count_kv([0, 1])
    writer.add_shortconv_l_cache(3)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
