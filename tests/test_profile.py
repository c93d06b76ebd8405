import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specplug import profile
from specplug.errors import SpecplugError, UsageError
from specplug.profile import CostPoints, Measured, PlannerSettings, Profile, Runtime
from specplug.profile.with_grammar import for_engine, with_grammar
from specplug.registry import ProposerSpec

HEAD = "schema: 1\nname: mine\n"
SHIPPED = {
    "default", "none", "ngram", "suffix", "recycling", "early-exit", "exact", "serve",
    "recycling-paper", "ngram-static", "suffix-static", "recycling-static",
    "vllm", "vllm-none", "vllm-builtin-ngram", "vllm-builtin-suffix",
    "llama3-vocabtrim", "llama3-vocabtrim-cpu", "gemma3-vocabtrim-self", "qwen-coder-pair", "rapid", "mtp", "eagle3",
}  # fmt: skip


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "own"
    folder.mkdir()
    monkeypatch.setenv("SPECPLUG_PROFILES", str(folder))
    return folder


# -- reading a profile -----------------------------------------------------------------------------------------------


def test_every_key_is_read() -> None:
    text = """
schema: 1
name: tuned.2
description: "for one laptop: bf16"
engine: vllm
model: demo:smollm2
proposers:
- suffix
- {method: token_recycling, shape: paper}
planner: {mode: static, max_nodes: 7, trees: false}
exact: true
runtime:
  {threads: 2, threads_batch: 3, context: 1024, batch: 64, ubatch: 32, gpu_layers: -1, flash_attention: false,
   kv_type: q8_0, repack: false, mmap: false, coupled: true}
measured:
  hardware: {cpu: X, cores: 2}
  cost_curve: {contexts: [0, 512], rows: [1, 2, 4], ms: [[1, 2, 3], [2, 3.5, 5]]}
  acceptance: {"suffix 3": [10, 2.5]}
evidence: {date: 2026-11-21, runs: [1, 2], won: yes}
"""
    assert profile.loads(text, "t") == Profile(
        name="tuned.2",
        description="for one laptop: bf16",
        engine="vllm",
        model="demo:smollm2",
        proposers=(ProposerSpec("suffix"), ProposerSpec("token_recycling", {"shape": "paper"})),
        planner=PlannerSettings("static", 7, False),
        exact=True,
        runtime=Runtime(
            threads=2,
            threads_batch=3,
            context=1024,
            batch=64,
            ubatch=32,
            gpu_layers=-1,
            flash_attention=False,
            kv_type="q8_0",
            repack=False,
            mmap=False,
            coupled=True,
        ),
        measured=Measured(
            {"cpu": "X", "cores": 2},
            CostPoints((0, 512), (1, 2, 4), ((1.0, 2.0, 3.0), (2.0, 3.5, 5.0))),
            {"suffix 3": (10.0, 2.5)},
        ),
        evidence={"date": "2026-11-21", "runs": [1, 2], "won": True},
    )


def test_defaults_are_those_of_the_documentation() -> None:
    found = profile.loads(HEAD, "t")
    assert (found.engine, found.model, found.exact, found.measured) == ("llama-cpp", None, False, None)
    assert [spec.method for spec in found.proposers] == ["suffix", "token_recycling"]
    assert found.planner == PlannerSettings(mode="measured", max_nodes=24, trees=True)
    assert found.runtime == Runtime(
        threads=None,
        threads_batch=None,
        context=4096,
        batch=512,
        ubatch=None,
        gpu_layers=0,
        flash_attention=None,
        kv_type=None,
        repack=True,
        mmap=True,
        coupled=False,
    )


@pytest.mark.parametrize(
    "written",
    [
        "[{method: fusion, proposers: [ngram, {method: suffix}]}]",
        "[ngram, {method: fusion, proposers: [suffix]}]",
        "[ngram, suffix]",
    ],
)
def test_a_fusion_is_the_list_of_its_parts(written: str) -> None:
    found = profile.loads(f"{HEAD}proposers: {written}", "t")
    assert found.proposers == (ProposerSpec("ngram"), ProposerSpec("suffix"))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "not a mapping of settings"),
        ("- 1", "not a mapping of settings"),
        ("name: mine", "schema: missing"),
        ("schema: 2\nname: mine", "schema: 2 is not supported"),
        ("schema: true\nname: mine", "schema: True is not supported"),
        ("schema: 1", "name: missing"),
        ("schema: 1\nname: Mine", "name: 'Mine' is not a name"),
        ("schema: 1\nname: ../x", "name: '../x' is not a name"),
        (HEAD + "modle: x", "modle: unknown key; did you mean model?"),
        (HEAD + "qqqqq: x", "qqqqq: unknown key; valid: name, description, engine"),
        (HEAD + "1: x", "1: unknown key"),
        (HEAD + "engine: llamacpp", "did you mean llama-cpp"),
        (HEAD + "engine: [vllm]", "engine: ['vllm'] is not one of"),
        (HEAD + "model: 3", "model: 3 is not text"),
        (HEAD + "exact: 1", "exact: 1 is not true or false"),
        (HEAD + "planner: fast", "planner: 'fast' is not a mapping"),
        (HEAD + "planner: {max_nods: 1}", "planner.max_nods: unknown key; did you mean max_nodes"),
        (HEAD + "planner: {max_nodes: 0}", "planner.max_nodes: 0 is out of range; use 1 to"),
        (HEAD + "planner: {prune_top_k: 9}", "planner.prune_top_k: 9 is out of range; use 1 to 8"),
        (HEAD + "planner: {max_nodes: 2.0}", "planner.max_nodes: 2.0 is not a whole number"),
        (HEAD + "planner: {max_nodes: true}", "planner.max_nodes: True is not a whole number"),
        (HEAD + "planner: {mode: dynamic}", "planner.mode: 'dynamic' is not one of measured, static"),
        (HEAD + "runtime: {threads: 0}", "runtime.threads: 0 is out of range"),
        (HEAD + "runtime: {threads_batch: 0}", "runtime.threads_batch: 0 is out of range; use 1 to 1024"),
        (HEAD + "runtime: {threads_batch: 1025}", "runtime.threads_batch: 1025 is out of range; use 1 to 1024"),
        (HEAD + "runtime: {ubatch: 0}", "runtime.ubatch: 0 is out of range; use 1 to 1048576"),
        (HEAD + "runtime: {ubatch: 1048577}", "runtime.ubatch: 1048577 is out of range; use 1 to 1048576"),
        (HEAD + "runtime: {ubatch: 8.5}", "runtime.ubatch: 8.5 is not a whole number"),
        (HEAD + "runtime: {repack: 1}", "runtime.repack: 1 is not true or false"),
        (HEAD + "runtime: {repack: null}", "runtime.repack: None is not true or false"),
        (HEAD + "runtime: {mmap: 0}", "runtime.mmap: 0 is not true or false"),
        (HEAD + "runtime: {ubach: 8}", "runtime.ubach: unknown key; did you mean ubatch or batch?"),
        (HEAD + "runtime: {kv_type: f64}", "runtime.kv_type: 'f64' is not one of f16, bf16, f32, q8_0"),
        (HEAD + "proposers: suffix", "proposers: 'suffix' is not a list"),
        (HEAD + "proposers: []", "proposers: no proposer is named"),
        (HEAD + "proposers: [3]", "proposers[0]: 3 is not a method's name"),
        (HEAD + "proposers: [{shape: paper}]", "proposers[0]: {'shape': 'paper'} is not a method's name"),
        (HEAD + "proposers: [none, sufix]", "proposers[1].method: 'sufix' is not registered; did you mean suffix?"),
        (HEAD + "proposers: [os.path]", "proposers[0].method: 'os.path' is not registered"),
        (HEAD + "proposers: ['specplug.proposers.none:NoDraft']", "is not registered"),
        (HEAD + "proposers: [{method: none, longest: 3}]", "proposers[0].longest: none has no such option"),
        (
            HEAD + "proposers: [{method: token_recycling, shap: paper}]",
            "proposers[0].shap: token_recycling has no such",
        ),
        (HEAD + "proposers: [none, suffix]", "proposers: none cannot be combined"),
        (HEAD + "proposers: [suffix, suffix]", "proposers: suffix is listed twice"),
        (HEAD + "proposers: [{method: fusion}]", "proposers[0]: fusion takes proposers"),
        (HEAD + "proposers: [{method: fusion, proposers: [x]}]", "proposers[0].proposers[0].method: 'x'"),
        (HEAD + "measured: {cost_curve: {rows: [1]}}", "measured.cost_curve: not a mapping of contexts, rows and ms"),
        (HEAD + "measured: {cost_curve: {contexts: [0], rows: [2], ms: [[1]]}}", "rows: starts at 2, not at 1"),
        (HEAD + "measured: {cost_curve: {contexts: [0], rows: [1, 1], ms: [[1, 1]]}}", "rows: does not ascend"),
        (HEAD + "measured: {cost_curve: {contexts: [0], rows: [1, 2], ms: [[1]]}}", "ms: needs one list per context"),
        (HEAD + "measured: {cost_curve: {contexts: [0], rows: [1], ms: [[0]]}}", "a value that is not above 0"),
        (HEAD + "measured: {cost_curve: {contexts: [0], rows: [1], ms: [[.inf]]}}", "inf is not a number"),
        (HEAD + "measured: {acceptance: {a: [1]}}", "measured.acceptance.a: [1] is not a pair [hits, misses]"),
        (HEAD + "measured: {acceptance: {a: [1, -1]}}", "measured.acceptance.a: a count is below 0"),
        (HEAD + "engine: server", "server: missing; give the command that engine server starts"),
        (HEAD + "server: {command: [a]}", "server: engine llama-cpp starts no command; leave it out"),
        (HEAD + "engine: server\nserver: llama-server", "server: 'llama-server' is not a mapping"),
        (HEAD + "engine: server\nserver: {flags: [a]}", "server.command: empty; give a program"),
        (HEAD + "engine: server\nserver: {command: ['']}", "server.command: empty; give a program"),
        (HEAD + "engine: server\nserver: {command: a b}", "server.command: 'a b' is not a list"),
        (HEAD + "engine: server\nserver: {command: [a, 8080]}", "server.command[1]: 8080 is not text"),
        (HEAD + "engine: server\nserver: {command: [a], flags: [1]}", "server.flags[0]: 1 is not text"),
        (
            HEAD + 'engine: server\nserver: {command: ["a\\nb"]}',
            r"server.command[0]: character 2, '\n', cannot be printed",
        ),
        (HEAD + 'engine: server\nserver: {command: [a, "\\0"]}', r"server.command[1]: character 1, '\x00', cannot be"),
        (
            HEAD + 'engine: server\nserver: {command: [a], flags: ["\\e[2K"]}',
            r"server.flags[0]: character 1, '\x1b', c",
        ),
        (
            HEAD + 'engine: server\nserver: {command: ["\\u202E"]}',
            r"server.command[0]: character 1, '\u202e', cannot be",
        ),
        (
            HEAD + "engine: server\nserver: {command: [a], shell: true}",
            "server.shell: unknown key; valid: command, flags",
        ),
        (HEAD + "evidence: [1]", "evidence: [1] is not a mapping"),
        (HEAD + "evidence: {a: .nan}", "evidence.a: nan is not a finite number"),
        (HEAD + "evidence: {a: {1: 2}}", "evidence.a: key 1 is not text"),
        (HEAD + "name: mine", "line 3: name: written twice"),
        (HEAD + "evidence: {a: &x [1], b: *x}", "line 3: an alias (*) is not allowed"),
        (HEAD + "evidence: !!python/object/apply:os.getcwd []", "line 3: a tag (!) is not allowed"),
        (HEAD + "evidence: {a: !!bool perhaps}", "line 3: a tag (!) is not allowed"),
        (HEAD + "evidence: {[1]: 2}", "line 3: a key must be plain text"),
        (HEAD + "evidence: {", "line 3: not valid YAML"),
        (HEAD + "evidence: \x00", "not valid YAML"),
        ("schema: 1\n---\nschema: 1", "not valid YAML"),
        (HEAD + "evidence: " + "[" * 5000, "nested too deep"),
        (HEAD + "evidence: {a: " + "9" * 5000 + "}", "a value cannot be read"),
    ],
)
def test_an_invalid_profile_is_refused_in_one_line_with_the_key(text: str, complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        profile.loads(text, "some.yaml")
    message = str(caught.value)
    assert message.startswith("some.yaml: ")
    assert complaint in message
    assert "\n" not in message


@given(st.text() | st.text(alphabet="{}[]:,-&*!|>'\"#%@` \nab1~?.").map(lambda text: HEAD + text))
def test_any_text_is_a_profile_or_a_usage_error(text: str) -> None:
    try:
        found = profile.loads(text, "t")
    except UsageError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(found, Profile)


def test_aliases_cannot_blow_up_a_small_file() -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60)]
    with pytest.raises(UsageError, match="alias"):
        profile.loads("\n".join(lines), "t")


# -- writing ---------------------------------------------------------------------------------------------------------

plain_data = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
counts = st.floats(0, 1e12)
ascending = st.sets(st.integers(2, 5000), max_size=5).map(lambda found: tuple(sorted(found)))


@st.composite
def cost_points(draw: st.DrawFn) -> CostPoints:
    contexts, rows = (0, *draw(ascending)), (1, *draw(ascending))
    line = st.tuples(*[st.floats(1e-6, 1e6) for _ in rows])
    return CostPoints(contexts, rows, draw(st.tuples(*[line for _ in contexts])))


methods = st.just((ProposerSpec("none"),)) | st.lists(
    st.sampled_from(
        [ProposerSpec("ngram"), ProposerSpec("suffix"), ProposerSpec("token_recycling", {"shape": "paper"})]
    ),
    min_size=1,
    unique_by=lambda spec: spec.method,
).map(tuple)
profiles = st.builds(
    Profile,
    name=st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True),
    description=st.text(),
    engine=st.sampled_from(["llama-cpp", "vllm"]),
    model=st.none() | st.text(),
    proposers=methods,
    planner=st.builds(
        PlannerSettings,
        mode=st.sampled_from(["measured", "static"]),
        max_nodes=st.integers(1, 1024),
        trees=st.booleans(),
        prune_top_k=st.none() | st.integers(1, 8),
    ),
    exact=st.booleans(),
    runtime=st.builds(
        Runtime,
        threads=st.none() | st.integers(1, 1024),
        threads_batch=st.none() | st.integers(1, 1024),
        context=st.integers(16, 1 << 20),
        batch=st.integers(1, 1 << 16),
        ubatch=st.none() | st.integers(1, 1 << 20),
        gpu_layers=st.integers(-1, 100),
        flash_attention=st.none() | st.booleans(),
        kv_type=st.none() | st.sampled_from(["f16", "bf16", "f32", "q8_0"]),
        repack=st.booleans(),
        mmap=st.booleans(),
        coupled=st.booleans(),
    ),
    measured=st.none()
    | st.builds(
        Measured,
        hardware=st.dictionaries(st.text(), plain_data, max_size=3),
        cost_curve=st.none() | cost_points(),
        acceptance=st.dictionaries(st.text(), st.tuples(counts, counts), max_size=3),
    ),
    evidence=st.dictionaries(st.text(), plain_data, max_size=4),
)


@given(profiles)
def test_a_written_profile_reads_back_equal(written: Profile) -> None:
    assert profile.loads(profile.dumps(written), "t") == written


def test_a_profile_keeps_which_settings_are_open() -> None:
    assert profile.loads(profile.dumps(Profile("p")), "t").runtime == Runtime()
    mapping = profile.as_mapping(Profile("p"))["runtime"]
    open_keys = [key for key, value in mapping.items() if value is None]
    assert open_keys == ["threads", "threads_batch", "ubatch", "flash_attention", "kv_type"]
    assert "kv_type: null" in profile.dumps(Profile("p"))


def test_save_writes_what_load_reads_and_replaces_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "p.yaml"
    for description in ("first", "second"):
        written = Profile("p", description=description)
        profile.save(written, path)
        assert profile.load(path) == written
    assert os.listdir(path.parent) == ["p.yaml"]


def test_save_refuses_a_profile_that_load_would_refuse(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"planner.max_nodes: 0"):
        profile.save(Profile("p", planner=PlannerSettings(max_nodes=0)), tmp_path / "p.yaml")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_a_full_disk_leaves_only_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    old = Profile("p", description="old")
    profile.save(old, path)
    program = f"""
import resource
from specplug import profile
from specplug.errors import SpecplugError
from specplug.registry import ProposerSpec
NONE = (ProposerSpec("none"),)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    profile.save(profile.Profile("p", evidence={{"a": "x" * 100_000}}, proposers=NONE), {str(path)!r})
except SpecplugError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert f"{path}: cannot be written" in done.stdout
    assert profile.load(path) == old
    assert os.listdir(tmp_path) == ["p.yaml"]


def test_a_folder_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecplugError, match="cannot be written"):
        profile.save(Profile("p"), tmp_path / "file" / "p.yaml")


# -- finding ---------------------------------------------------------------------------------------------------------


def test_the_shipped_profiles_load_under_their_file_names() -> None:
    for name in SHIPPED:
        assert profile.load(name).name == name


def test_the_shipped_profiles_match_their_names() -> None:
    def of(name: str) -> tuple[list[str], str]:
        found = profile.load(name)
        return [spec.method for spec in found.proposers], found.planner.mode

    assert of("default") == (["suffix", "token_recycling", "grammar"], "measured")
    assert of("none")[0] == ["none"]
    assert of("ngram") == (["ngram"], "measured")
    assert of("ngram-static") == (["ngram"], "static")
    assert of("recycling-static") == (["token_recycling"], "static")
    assert replace(profile.load("exact"), name="", description="", exact=False, runtime=Runtime()) == replace(
        profile.load("default"), name="", description="", own_heads=False
    )
    assert profile.load("exact").exact
    paper = profile.load("recycling-paper")
    assert paper.proposers == (ProposerSpec("token_recycling", {"shape": "paper"}),)
    assert paper.planner == PlannerSettings("static", 80, True)


def test_a_users_profile_hides_the_shipped_one(own_folder: Path) -> None:
    shipped = profile.load("suffix")
    profile.save(Profile("suffix", description="mine"), own_folder / "suffix.yaml")
    assert profile.load("suffix").description == "mine"
    assert profile.load("suffix") != shipped
    listed = [entry for entry in profile.list_profiles() if entry.name == "suffix"]
    assert [(entry.description, entry.source) for entry in listed] == [("mine", str(own_folder / "suffix.yaml"))]


def test_the_list_holds_all_profiles_and_marks_unusable_ones(own_folder: Path) -> None:
    (own_folder / "bad.yaml").write_text("schema: 1\nname: bad\nengin: vllm\n")
    (own_folder / "no profile.yaml").write_text("")
    listed = {entry.name: entry for entry in profile.list_profiles()}
    assert listed.keys() == SHIPPED | {"bad"}
    assert "engin: unknown key; did you mean engine?" in str(listed["bad"].problem)
    assert [name for name, entry in listed.items() if entry.problem] == ["bad"]


def test_profiles_are_loaded_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile.save(Profile("x", description="here"), tmp_path / "x.yaml")
    (tmp_path / "odd").write_text(HEAD)
    monkeypatch.chdir(tmp_path)
    for ref in ("x.yaml", "./x.yaml", str(tmp_path / "x.yaml"), Path("x.yaml")):
        assert profile.load(ref).description == "here"
    assert profile.load("./odd").name == "mine"
    with pytest.raises(UsageError, match="no profile is named odd"):
        profile.load("odd")


@pytest.mark.parametrize("ref", ["nowhere.yaml", "./nowhere", "a\0b.yaml", "sufix", "Bad Name", ""])
def test_a_missing_profile_is_a_usage_error(ref: str) -> None:
    with pytest.raises(UsageError) as caught:
        profile.load(ref)
    assert "\n" not in str(caught.value)


def test_a_wrong_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"no profile is named sufix; did you mean suffix"):
        profile.load("sufix")


def test_files_that_are_binary_or_too_large_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_bytes(b"schema: 1\nname: \xff\n")
    with pytest.raises(UsageError, match="byte 16 is not UTF-8"):
        profile.load(path)
    path.write_bytes(b"#" * (2 << 20))
    with pytest.raises(UsageError, match="larger than 1 MiB"):
        profile.load(path)
    with pytest.raises(UsageError, match="cannot be read"):
        profile.load(tmp_path.with_suffix("") / ".")


# -- the method for constraints ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("methods", "engine", "expected"),
    [
        (["suffix"], "llama-cpp", ["suffix", "grammar"]),
        (["grammar", "suffix"], "llama-cpp", ["grammar", "suffix"]),
        (["none"], "llama-cpp", ["none"]),
        (["suffix"], "vllm", ["suffix"]),
    ],
)
def test_grammar_is_added_once_where_the_engine_provides_constraints(
    methods: list[str], engine: str, expected: list[str]
) -> None:
    made = with_grammar(Profile("x", engine=engine, proposers=tuple(map(ProposerSpec, methods))))
    assert [spec.method for spec in made.proposers] == expected


def test_a_profile_for_llama_cpp_loses_grammar_on_vllm() -> None:
    moved = for_engine(profile.load("default"), "vllm")
    assert ([spec.method for spec in moved.proposers], moved.engine) == (["suffix", "token_recycling"], "vllm")
    assert for_engine(profile.load("default"), "llama-cpp") == profile.load("default")
    # Without other methods it stays, so that vLLM refuses it by name.
    alone = Profile("x", proposers=(ProposerSpec("grammar"),))
    assert for_engine(alone, "vllm").proposers == alone.proposers
