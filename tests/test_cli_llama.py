"""The commands on the real model: their output, its stream, and the exit code."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from corpus_files import write_corpus

pytest.importorskip("llama_cpp")

pytestmark = pytest.mark.llama

SPECPLUG = str(Path(sys.executable).with_name("specplug"))
CURVE = "measured: {cost_curve: {contexts: [128], rows: [1, 32], ms: [[1.0, 1.01]]}}\n"
"""Invented costs at which drafts are faster, so that nothing is measured here."""


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Profiles with invented costs; no SPECPLUG_* variable is set."""
    for name in [name for name in os.environ if name.startswith("SPECPLUG_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "profiles"
    folder.mkdir()
    monkeypatch.setenv("SPECPLUG_PROFILES", str(folder))
    for name, methods in (("quick", "[suffix, token_recycling]"), ("lookup", "[ngram]"), ("plain", "[none]")):
        text = f"schema: 1\nname: {name}\nmodel: demo:smollm2\nproposers: {methods}\nplanner: {{max_nodes: 6}}\n{CURVE}"
        (folder / f"{name}.yaml").write_text(text + "runtime: {context: 1024, kv_type: bf16}\n")
    return folder


def call(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([SPECPLUG, *arguments], capture_output=True, timeout=300, input=stdin)


def refused(done: subprocess.CompletedProcess[bytes], code: int) -> str:
    """The only line on stderr of a failure with empty stdout, apart from the warning that the machine is busy."""
    assert (done.returncode, done.stdout) == (code, b""), done.stderr.decode()
    lines = [line for line in done.stderr.decode().splitlines() if "busy with other work" not in line]
    assert len(lines) == 1, lines
    return lines[0]


def test_run_prints_the_answer_and_nothing_else_on_stdout() -> None:
    arguments = ["run", "--profile", "quick", "--max-tokens", "24", "Count from one to twenty in words."]
    done = call(*arguments)
    assert (done.returncode, done.stderr) == (0, b"")
    document = json.loads(call(*arguments, "--json").stdout)
    assert done.stdout.decode() == document["text"] + "\n"
    assert document["tokens"] == 24 and document["finish"] == "length" and document["mean_acceptance_length"] >= 1
    assert call(*arguments[:-1], stdin=arguments[-1].encode()).stdout == done.stdout
    assert call("run", "--profile", "plain", *arguments[3:]).stdout == done.stdout


def test_run_colours_drafts_and_reports_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner is static, so that something is drafted on every machine, whatever its passes cost."""
    lookup = (tmp_path / "profiles" / "lookup.yaml").read_text()
    static = lookup.replace("max_nodes: 6", "mode: static, max_nodes: 6").replace("name: lookup", "name: static")
    (tmp_path / "profiles" / "static.yaml").write_text(static)
    laughs = tmp_path / "laughs.gbnf"
    laughs.write_text(f'root ::= "ha{" ha" * 20}"\n')
    arguments = ["run", "--profile", "static", "--grammar", str(laughs)]
    arguments += ["--stats", "--show-drafts", "Say ha ha ha ha ha."]
    done = call(*arguments)
    assert done.returncode == 0
    assert "tokens per pass" in done.stderr.decode()
    assert b"\x1b[" not in done.stdout, "no colours off a terminal"
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    forced = call(*arguments).stdout
    assert b"\x1b[" in forced
    assert re.sub(rb"\x1b\[[0-9;]*m", b"", forced) == done.stdout


def test_run_prints_the_text_unchanged_with_all_tabs(tmp_path: Path) -> None:
    grammar = tmp_path / "tabs.gbnf"
    grammar.write_text('root ::= "a\\tb\\r\\n\\tc" "\\t\\td"\n')
    arguments = ["run", "--profile", "quick", "--max-tokens", "40", "--grammar", str(grammar), "Say something."]
    assert call(*arguments).stdout == b"a\tb\r\n\tc\t\td\n"


def test_every_command_that_needs_a_missing_engine_reports_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = tmp_path / "stub" / "llama_cpp"
    stub.mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", str(stub.parent))
    for line, message in (
        ("raise ModuleNotFoundError(\"No module named 'llama_cpp'\")", "llama-cpp-python is not installed"),
        ("raise RuntimeError('Failed to load shared library')", "llama-cpp-python does not load"),
    ):
        (stub / "__init__.py").write_text(line + "\n")
        for command in (["run", "Hi."], ["bench", "--limit", "1"], ["verify", "--limit", "1"]):
            assert message in refused(call(command[0], "--profile", "quick", *command[1:]), 5)


def test_run_answers_a_file_line_by_line(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Say hello."}\n{"turns": ["My name is Ann.", "What is my name?"]}\n')
    done = call("run", "--profile", "quick", "--max-tokens", "8", "--jsonl", "--input", str(prompts))
    documents = [json.loads(line) for line in done.stdout.decode().splitlines()]
    assert [document["prompt"] for document in documents] == ["Say hello.", "My name is Ann.", "What is my name?"]


def test_run_obeys_stop_strings_grammars_and_schemas(tmp_path: Path) -> None:
    grammar, schema = tmp_path / "digits.gbnf", tmp_path / "schema.json"
    grammar.write_text('root ::= [0-9] [0-9] "!"')
    schema.write_text('{"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}, "required": ["n"]}')
    base = ["run", "--profile", "quick", "--max-tokens", "40"]
    assert call(*base, "--grammar", str(grammar), "A number, please.").stdout[2:] == b"!\n"
    assert set(json.loads(call(*base, "--json-schema", str(schema), "A number, please.").stdout)) == {"n"}
    assert re.fullmatch(rb"[0-9]{2}-[a-z]+!\n", call(*base, "--regex", "[0-9]{2}-[a-z]{1,9}!", "Hi.").stdout)
    lark = tmp_path / "answer.lark"
    lark.write_text('start: "Answer: " %json {"type": "integer", "maximum": 9, "minimum": 0} "."')
    assert re.fullmatch(rb"Answer: [0-9]\.\n", call(*base, "--lark", str(lark), "A number, please.").stdout)
    unstopped = call(*base, "--json", "Count: one, two, three, four.").stdout
    word = json.loads(unstopped)["text"].split()[3]
    stopped = json.loads(call(*base, "--json", "--stop", word, "Count: one, two, three, four.").stdout)
    assert stopped["finish"] == "stop" and word not in stopped["text"]


def test_piped_text_follows_the_prompt_in_the_argument(tmp_path: Path) -> None:
    base = ["run", "--profile", "plain", "--max-tokens", "1", "--json"]
    assert json.loads(call(*base, "Summarise this:", stdin=b"A pear.\n").stdout)["prompt"] == (
        "Summarise this:\n\nA pear.\n"
    )
    assert json.loads(call(*base, "-", stdin=b"A pear.\n").stdout)["prompt"] == "A pear.\n"
    assert "stdin is not UTF-8 text (byte 2)" in refused(call(*base, "Summarise this:", stdin=b"ab\xff"), 2)


def test_a_file_of_prompts_is_answered_beside_a_pipe_that_is_never_closed(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Say hello."}\n')
    read, write = os.pipe()
    try:
        arguments = ["run", "--profile", "plain", "--max-tokens", "1", "--jsonl", "--input", str(prompts)]
        done = subprocess.run([SPECPLUG, *arguments], capture_output=True, timeout=120, stdin=read)
    finally:
        os.close(read)
        os.close(write)
    assert json.loads(done.stdout)["prompt"] == "Say hello."


def test_settings_without_an_effect_are_warned_of_and_the_answer_comes() -> None:
    flags = ["--context", "8448", "--gpu-layers", "all", "--max-tokens", "1"]
    done = call("run", "--profile", "plain", *flags, "Hi.")
    assert done.returncode == 0 and done.stdout
    lines = done.stderr.decode().splitlines()
    warned = [line for line in lines if "than the 8192 that SmolLM2-135M-Instruct" in line]
    assert len(warned) == 1 and warned[0].startswith("specplug: a context of 8448 tokens is more than the 8192")
    import llama_cpp

    if not llama_cpp.llama_supports_gpu_offload():
        assert lines[0].startswith("specplug: gpu_layers all has no effect: this llama.cpp is built without GPU")


def test_inputs_that_cannot_be_answered(tmp_path: Path) -> None:
    quick = ["run", "--profile", "quick"]
    assert "stdin is not UTF-8 text (byte 2)" in refused(call(*quick, stdin=b"ab\xff"), 2)
    assert "the prompt is empty" in refused(call(*quick, " \n"), 2)
    assert "the prompt is empty" in refused(call(*quick, stdin=b""), 2)
    assert "the context 1024; raise it with --context 4096" in refused(call(*quick, "word " * 2000), 2)
    assert "the model was trained for 8192, so shorten the prompt" in refused(call(*quick, "word " * 9000), 2)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "fine"}\n{"prompt": \n')
    assert f"{broken}" in refused(call(*quick, "--input", str(broken)), 2)
    assert "line 2" in refused(call(*quick, "--input", str(broken)), 2)
    grammar = tmp_path / "bad.gbnf"
    grammar.write_text("root ::= (")
    assert "the grammar does not parse" in refused(call(*quick, "--grammar", str(grammar), "Hi."), 2)


def test_a_schema_is_enforced_against_a_bias_and_what_is_ignored_is_said(tmp_path: Path) -> None:
    """Token 198 is the line break, which a string must not contain."""
    schema = tmp_path / "schema.json"
    text = {"type": "string", "minLength": 3, "maxLength": 3}
    tags = {"type": "array", "uniqueItems": True, "maxItems": 0}
    schema.write_text(json.dumps({"type": "object", "properties": {"t": text, "tags": tags}, "required": ["t"]}))
    base = ["run", "--profile", "quick", "--json-schema", str(schema), "--logit-bias", "198=100", "--max-tokens", "60"]
    done = call(*base, "Hi.")
    assert len(json.loads(done.stdout)["t"]) == 3
    assert b"specplug: uniqueItems at #/properties/tags is not enforced\n" in done.stderr
    assert "uniqueItems at #/properties/tags" in refused(call(*base, "--strict", "Hi."), 2)


def test_constraints_that_cannot_be_kept_are_refused_before_a_model_is_opened(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"properties": {"a": {"type": "text"}}}')
    base = ["run", "--profile", "quick", "--model", str(tmp_path / "missing.gguf")]
    refusal = refused(call(*base, "--json-schema", str(schema), "Hi."), 2)
    assert "type at #/properties/a: Invalid type: text" in refusal
    assert "look-around" in refused(call(*base, "--regex", "(?=a)b", "Hi."), 2)
    assert "--json-schema and --regex were given" in refused(
        call(*base, "--json-schema", str(schema), "--regex", "a", "Hi."), 2
    )
    assert "--strict is for --json-schema" in refused(call(*base, "--strict", "Hi."), 2)


def test_models_that_cannot_be_opened(tmp_path: Path, demo_path: Path) -> None:
    missing, text, cut = tmp_path / "no.gguf", tmp_path / "text.gguf", tmp_path / "cut.gguf"
    text.write_text("this is no model")
    with demo_path.open("rb") as file:
        cut.write_bytes(file.read(3 << 20))
    for path in (missing, text, cut):
        line = refused(call("run", "--profile", "quick", "--model", str(path), "Hi."), 2)
        assert str(path) in line and line.startswith("specplug: ")


def test_ctrl_c_keeps_the_text_printed_so_far(tmp_path: Path) -> None:
    endless = tmp_path / "endless.gbnf"
    endless.write_text("root ::= [a-z ]+ root\n")
    arguments = ["run", "--profile", "quick", "--grammar", str(endless), "Tell me a story."]
    running = subprocess.Popen(
        [SPECPLUG, *arguments, "--max-tokens", "900"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert running.stdout is not None
    first = running.stdout.read(1)
    running.send_signal(signal.SIGINT)
    rest, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert errors == b"\nspecplug: interrupted\n"
    printed, expected = first + rest, call(*arguments, "--max-tokens", "24").stdout.rstrip(b"\n")
    common = min(len(printed), len(expected))
    assert printed[:common] == expected[:common]


def test_bench_writes_the_documented_json(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    done = call(
        *["bench", "--profile", "quick", "--profile", "lookup", "--peer", "llama-cpp-python:prompt-lookup"],
        *["--limit", "1", "--max-tokens", "6", "--json", "--out", str(out)],
    )
    assert done.returncode == 0, done.stderr.decode()
    document = json.loads(done.stdout)
    assert json.loads(out.read_text()) == document
    assert document["schema"] == 1 and document["engine"] == "llama-cpp"
    assert {"model", "hardware", "versions", "workload", "cost_curve", "arms"} <= set(document)
    assert {"name", "prompts", "max_tokens", "temperature"} <= set(document["workload"])
    assert len(document["cost_curve"]["rows"]) == len(document["cost_curve"]["ms"]) > 0
    names = [arm["name"] for arm in document["arms"]]
    assert names[0] == "none" and names[-3:] == ["quick", "lookup", "llama-cpp-python:prompt-lookup"]
    settings = document["engine_settings"]
    assert {arm["engine_settings"] for arm in document["arms"][-3:]} == {settings["profiles"]}
    assert document["arms"][0]["engine_settings"] == settings["plain"]
    assert settings["stock"] in {arm["engine_settings"] for arm in document["arms"]}
    assert settings["settings_speedup"]["median"] > 0 and settings["drafting_arm"] in ("quick", "lookup")
    by_name = {arm["name"]: arm for arm in document["arms"]}
    assert all(by_name[arm["reference"]]["engine_settings"] == arm["engine_settings"] for arm in document["arms"])
    assert all(arm["prompt_seconds"] > 0 for arm in document["arms"])
    figures = {
        "tokens",
        "seconds",
        "prompt_seconds",
        "tokens_per_second",
        "mean_acceptance_length",
        "steps",
        "draft_tokens",
    }
    figures |= {"accepted_tokens", "overhead_us_per_step", "speedup", "identical", "rounding", "different"}
    for arm in document["arms"]:
        assert figures | {"profile", "categories"} <= set(arm)
        assert set(arm["speedup"]) == {"median", "low", "high"}
        assert len(arm["categories"]) == document["workload"]["prompts"]
        assert all(figures <= set(kind) for kind in arm["categories"].values())
        assert arm["different"] == 0
    plain = document["arms"][0]
    assert plain["mean_acceptance_length"] == 1 and plain["speedup"]["median"] == 1


def test_bench_runs_several_prompts_at_once(tmp_path: Path) -> None:
    work = tmp_path / "work.jsonl"
    work.write_text("".join(f'{{"category": "sums", "prompt": "What is {n} and {n}?"}}\n' for n in range(4)))
    done = call(
        *["bench", "--profile", "quick", "--workload", str(work), "--max-tokens", "4", "--concurrency", "1,3"],
        "--json",
    )
    runs = json.loads(done.stdout)["runs"]
    assert [run["workload"]["concurrency"] for run in runs] == [1, 3]
    assert all(arm["tokens"] > 4 and arm["different"] == 0 for run in runs for arm in run["arms"])


def test_bench_refuses_an_output_folder_that_does_not_exist(tmp_path: Path) -> None:
    folder = tmp_path / "not a folder"
    line = refused(call("bench", "--profile", "quick", "--out", str(folder / "x.json")), 2)
    assert "its folder does not exist" in line


def test_verify_reports_the_same_output(formats: dict[str, Path]) -> None:
    done = call(
        *["verify", "--profile", "quick", "--model", str(formats["q8_0"]), "--max-tokens", "16", "--json"],
        *["--settings", "greedy,sampled-grammar,stop"],
    )
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["same_output"] and report["differences"] == []
    assert set(report["settings"]) == {"greedy", "sampled-grammar", "stop"}
    for line in report["settings"].values():
        assert line["identical"] == line["answers"] > 0
    assert sum(line["accepted_tokens"] for line in report["settings"].values()) > 0
    assert "no setting is named 'hot'" in refused(call("verify", "--profile", "quick", "--settings", "hot"), 2)


def test_a_draft_flag_adds_a_drafter_to_the_profile(formats: dict[str, Path], own_folders: Path) -> None:
    q8_0, q4_0 = str(formats["q8_0"]), str(formats["q4_0"])
    arguments = ["--profile", "quick", "--model", q8_0, "--max-tokens", "24", "Count from one to twenty in words."]
    plain, drafted = call("run", *arguments), call("run", "--draft", q4_0, *arguments)
    assert (drafted.returncode, drafted.stdout) == (0, plain.stdout)
    work = own_folders.parent / "work.jsonl"
    work.write_text('{"prompt": "Count from one to twenty in words.", "category": "a"}\n')
    arguments = ["--profile", "lookup", "--model", q8_0, "--workload", str(work), "--max-tokens", "16", "--json"]
    document = json.loads(call("bench", "--draft", q4_0, *arguments).stdout)
    names = [arm["name"] for arm in document["arms"]]
    assert names[0] == "none" and names[-2:] == ["lookup", f"lookup-{formats['q4_0'].stem.lower()}"]
    plan = json.loads(call("tune", "--draft", q4_0, "--dry-run", *arguments).stdout)
    assert "suffix + draft_model" in plan["methods"] and plan["seconds"]["drafters"] > 0
    without = json.loads(call("tune", "--dry-run", *arguments).stdout)
    assert "drafters" not in without["seconds"]
    assert formats["q4_0"].name in without["drafters_beside"] and formats["q4_0"].name not in plan["drafters_beside"]


def test_drafters_that_do_not_fit_are_refused(formats: dict[str, Path], tmp_path: Path) -> None:
    q8_0 = str(formats["q8_0"])
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(formats["q4_0"].read_bytes()[:100_000])
    for ref, message in ((str(damaged), "truncated"), ("none.gguf", "no such file"), (str(tmp_path), "directory")):
        for command in ("run", "bench", "verify", "tune", "serve"):
            model = [q8_0] if command == "serve" else ["--model", q8_0]
            done = call(command, *model, "--profile", "quick", "--draft", ref, *(["x"] if command == "run" else []))
            assert message in refused(done, 2).split("specplug: ", 1)[1], command


def test_answers_are_remembered_until_they_are_forgotten(
    tmp_path: Path, own_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run drafts from the first one's answer, so that its passes emit more; the text is the same. Every step
    drafts, whatever it costs on this machine."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    text = (own_folders / "quick.yaml").read_text().replace("max_nodes: 6", "mode: static, max_nodes: 6")
    (own_folders / "always.yaml").write_text(text.replace("name: quick", "name: always"))
    arguments = ["run", "--profile", "always", "--max-tokens", "96", "--json", "Describe a small harbour town at dawn."]
    before = json.loads(call(*arguments).stdout)
    runs = [call(*arguments, "--remember", "towns") for _ in range(2)]
    first, second = (json.loads(done.stdout) for done in runs)
    assert [done.stderr.decode().count("remembering answers in corpus towns") for done in runs] == [1, 1]
    assert first["text"] == second["text"] == before["text"]
    assert second["mean_acceptance_length"] > 1.5 * first["mean_acceptance_length"]
    shown = json.loads(call("corpus", "show", "towns", "--json").stdout)
    assert shown["documents"] == 1 and shown["tokens"] == 96 + 8 + 1
    private = call(*arguments[:-1], "--remember", "towns", "--private", "Name three rivers.")
    assert private.stderr == b"" and json.loads(call("corpus", "show", "towns", "--json").stdout) == shown
    assert call("corpus", "remove", "towns").returncode == 0
    assert "corpus towns: no corpus is there" in refused(call("corpus", "show", "towns"), 2)


def test_a_memory_of_another_model_is_refused_before_anything_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    write_corpus(tmp_path / "data" / "specplug" / "corpora" / "towns", [[1, 2, 3]], 100)
    arguments = ("run", "--profile", "quick", "--max-tokens", "4", "--remember")
    assert "built from documents" in refused(call(*arguments, "towns", "Hello"), 2)
    assert "no name of a corpus" in refused(call(*arguments, "../towns", "Hello"), 2)
