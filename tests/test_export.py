"""Exporting profiles as flags of llama-server and vLLM, and as code for llama-cpp-python."""

import ast
import json
import shlex
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner

from specplug import profile as profiles
from specplug.errors import UsageError
from specplug.profile import KV_TYPES, CostPoints, Measured, PlannerSettings, Profile, Runtime, VllmSettings
from specplug.profile.export import CACHE_TYPES, TARGETS, Exported, ExportedCode, export
from specplug.registry import ProposerSpec
from specplug_cli.profiles import profiles as profiles_command

NONE = (ProposerSpec("none"),)


def made(
    *methods: str, mode: str = "measured", ms: list[float] | None = None, right: float = 0.7, **options: object
) -> Profile:
    curve = CostPoints((256,), tuple(range(1, len(ms) + 1)), (tuple(ms),)) if ms else None
    return Profile(
        "p",
        model="m.gguf",
        proposers=tuple(ProposerSpec(method, options) for method in methods),
        planner=PlannerSettings(mode=mode, max_nodes=8),
        measured=Measured(cost_curve=curve) if ms else None,
        evidence={
            "chosen": "this",
            "settings": [{"name": "this", "predicted": {"accepted_at": [right**n for n in range(1, 9)]}}],
        }
        if ms
        else {},
    )


def flags(found: Exported) -> dict[str, str]:
    rest = found.argv[1:]
    return {name: value for name, value in pairwise(rest) if name.startswith("-")}


def config(found: Exported) -> dict[str, object]:
    loaded: dict[str, object] = json.loads(found.argv[-1])
    return loaded


def arguments(found: ExportedCode) -> dict[str, str]:
    """The arguments of the one call of Llama, as source text."""
    assigned = ast.parse(found.code).body[-1]
    assert isinstance(assigned, ast.Assign) and isinstance(assigned.value, ast.Call)
    assert ast.unparse(assigned.targets[0]) == "llm" and ast.unparse(assigned.value.func) == "llama_cpp.Llama"
    return {str(keyword.arg): ast.unparse(keyword.value) for keyword in assigned.value.keywords}


def lost_about(found: Exported | ExportedCode, word: str) -> list[str]:
    return [line for line in found.lost if word in line]


def test_plain_decoding_is_exported_as_such() -> None:
    assert export(made("none"), "llama-server").argv[-2:] == ["--spec-type", "none"]
    assert export(made("none"), "vllm", "org/m").argv == ["vllm", "serve", "org/m"]


def test_lookup_becomes_the_lookup_of_llama_server() -> None:
    found = flags(export(made("ngram", mode="static", max_match=4, max_draft=24), "llama-server"))
    assert found["--spec-type"] == "ngram-simple" and found["-m"] == "m.gguf"
    assert (found["--spec-ngram-simple-size-n"], found["--spec-ngram-simple-size-m"]) == ("4", "8")


def test_heads_become_those_of_llama_server_before_lookup() -> None:
    specs = (
        ProposerSpec("suffix"),
        ProposerSpec("mtp"),
        ProposerSpec("eagle3", {"model": "head.gguf", "max_draft": 2}),
    )
    exported = export(Profile("p", proposers=specs), "llama-server", "m.gguf")
    found = flags(exported)
    assert found["--spec-type"] == "draft-mtp,draft-eagle3,ngram-simple"
    assert found["--model-draft"] == "head.gguf"
    assert any("order of its own" in line for line in exported.lost)
    assert not any("no counterpart" in line for line in exported.lost)
    trimmed = export(Profile("p", proposers=(ProposerSpec("mtp", {"head": "drafter:a"}),)), "llama-server", "m.gguf")
    assert any("complete output matrix" in line for line in trimmed.lost)
    assert not any("complete output matrix" in line for line in exported.lost)
    alone = flags(export(Profile("p", proposers=specs[1:2]), "llama-server", "m.gguf"))
    assert alone["--spec-type"] == "draft-mtp" and alone["--spec-draft-n-max"] == "3" and "--model-draft" not in alone


def test_engine_settings_are_exported() -> None:
    runtime = Runtime(threads=6, context=9000, gpu_layers=-1, flash_attention=True, kv_type="q8_0")
    found = flags(export(Profile("p", runtime=runtime), "llama-server", "x.gguf"))
    assert found["--threads"] == "6" and found["--ctx-size"] == "9000" and found["--n-gpu-layers"] == "all"
    assert found["--flash-attn"] == "on" and found["--cache-type-k"] == found["--cache-type-v"] == "q8_0"


def test_every_engine_setting_has_a_flag_of_llama_server() -> None:
    runtime = Runtime(
        threads=2, threads_batch=3, ubatch=64, flash_attention=False, kv_type="bf16", repack=False, mmap=False
    )
    found = export(Profile("p", proposers=NONE, runtime=runtime), "llama-server", "x.gguf")
    assert found.lost == []
    named = flags(found)
    assert (named["--threads"], named["--threads-batch"], named["--ubatch-size"]) == ("2", "3", "64")
    assert named["--flash-attn"] == "off" and named["--cache-type-k"] == named["--cache-type-v"] == "bf16"
    assert "--no-repack" in found.argv and named["--load-mode"] == "none"


def test_defaults_need_no_flag() -> None:
    found = export(Profile("p", proposers=NONE), "llama-server", "x.gguf")
    assert found.argv == "llama-server -m x.gguf --ctx-size 4096 --batch-size 512 --spec-type none".split()
    code = export(Profile("p", proposers=NONE), "llama-cpp-python", "x.gguf")
    assert arguments(code) == {"model_path": "'x.gguf'", "n_ctx": "4096", "n_batch": "512"}


@pytest.mark.parametrize(("batch", "ubatch", "flag"), [(512, None, None), (900, None, "900"), (900, 100, "100")])
def test_as_many_tokens_are_computed_at_a_time(batch: int, ubatch: int | None, flag: str | None) -> None:
    """Without `ubatch` specplug computes all tokens of a pass at once; the other two stop at 512."""
    profile = Profile("p", proposers=NONE, runtime=Runtime(batch=batch, ubatch=ubatch))
    assert flags(export(profile, "llama-server")).get("--ubatch-size") == flag
    assert arguments(export(profile, "llama-cpp-python")).get("n_ubatch") == flag


@pytest.mark.parametrize("target", ["llama-server", "llama-cpp-python"])
@pytest.mark.parametrize(
    ("runtime", "said"),
    [
        (Runtime(threads=1), "flash_attention and kv_type are open: specplug chooses by measurement"),
        (Runtime(threads=1, flash_attention=True), "kv_type is open"),
        (Runtime(threads=1, kv_type="f16"), "flash_attention is open"),
        (Runtime(threads=1, flash_attention=False, kv_type="f16"), None),
        (Runtime(threads=1, kv_type="q8_0"), None),
        (Runtime(threads=1, kv_type="f32"), None),
    ],
)
def test_open_settings_are_named_in_one_sentence(target: str, runtime: Runtime, said: str | None) -> None:
    found = export(Profile("p", proposers=NONE, runtime=runtime), target)
    if said is None:
        assert found.lost == []
    else:
        (line,) = found.lost
        assert line.startswith(said)
        assert f"{target} takes its own default; specplug tune writes the choice" in line


@pytest.mark.parametrize(
    ("runtime", "exact", "flash", "cache"),
    [
        (Runtime(kv_type="q8_0"), False, "on", "q8_0"),
        (Runtime(kv_type="f32"), False, "off", "f32"),
        (Runtime(), True, "on", "bf16"),
        (Runtime(kv_type="f16"), True, "on", "f16"),
    ],
)
def test_settings_that_follow_from_others_are_exported(runtime: Runtime, exact: bool, flash: str, cache: str) -> None:
    profile = Profile("p", proposers=NONE, exact=exact, runtime=runtime)
    found = flags(export(profile, "llama-server"))
    assert (found["--flash-attn"], found["--cache-type-k"], found["--cache-type-v"]) == (flash, cache, cache)
    exported = export(profile, "llama-cpp-python")
    assert ("# type 30 is bf16" in exported.code) == (cache == "bf16")
    code = arguments(exported)
    assert code["flash_attn"] == str(flash == "on") and code["type_k"] == code["type_v"] == CACHE_TYPES[cache]


@pytest.mark.parametrize("target", ["llama-server", "llama-cpp-python"])
def test_exact_is_lost_where_there_are_drafts(target: str) -> None:
    exact = Profile("p", exact=True, proposers=(ProposerSpec("ngram"),), runtime=Runtime(threads=2))
    assert any(line.startswith(f"exact: {target} does not") for line in export(exact, target).lost)
    assert export(replace(exact, proposers=NONE), target).lost == []


def test_settings_of_llama_cpp_are_not_open_in_a_profile_for_vllm() -> None:
    assert export(Profile("p", engine="vllm", proposers=NONE), "llama-server").lost == []


def test_a_profile_becomes_a_call_of_llama() -> None:
    runtime = Runtime(
        threads=2,
        threads_batch=3,
        context=9000,
        batch=256,
        ubatch=64,
        gpu_layers=-1,
        flash_attention=True,
        kv_type="q8_0",
        repack=False,
        mmap=False,
    )
    found = export(Profile("p", proposers=NONE, runtime=runtime), "llama-cpp-python", "it's.gguf")
    assert arguments(found) == {
        "model_path": '"it\'s.gguf"',
        "n_ctx": "9000",
        "n_batch": "256",
        "n_ubatch": "64",
        "n_threads": "2",
        "n_threads_batch": "3",
        "n_gpu_layers": "-1",
        "flash_attn": "True",
        "type_k": "llama_cpp.GGML_TYPE_Q8_0",
        "type_v": "llama_cpp.GGML_TYPE_Q8_0",
        "use_mmap": "False",
    }
    assert found.code.startswith("import llama_cpp\n\n")
    assert found.lost == ["repack: false has no argument there: the weights are repacked"]


def test_threads_of_llama_are_those_of_the_profile() -> None:
    """Where no number is given, Llama takes half of the cores for one row and all of them for several."""
    some = export(Profile("p", proposers=NONE, runtime=Runtime(threads=2)), "llama-cpp-python")
    assert (arguments(some)["n_threads"], arguments(some)["n_threads_batch"]) == ("2", "2")
    assert not lost_about(some, "threads")
    batch_only = export(Profile("p", proposers=NONE, runtime=Runtime(threads_batch=3)), "llama-cpp-python")
    assert "n_threads" not in arguments(batch_only) and arguments(batch_only)["n_threads_batch"] == "3"
    assert len(lost_about(batch_only, "threads is open")) == 1


@pytest.mark.parametrize(("method", "match"), [("ngram", 4), ("suffix", 3)])
def test_lookup_becomes_the_prompt_lookup_of_llama(method: str, match: int) -> None:
    options = {"max_match": 4} if method == "ngram" else {}
    found = export(made(method, mode="static", **options), "llama-cpp-python")
    call = arguments(found)
    assert call["draft_model"] == f"LlamaPromptLookupDecoding(max_ngram_size={match}, num_pred_tokens=8)"
    assert call["logits_all"] == "True"
    assert "from llama_cpp.llama_speculative import LlamaPromptLookupDecoding\n" in found.code
    assert f"the 8 tokens after the first match of {match} tokens or fewer" in found.lost[0]
    assert len(lost_about(found, "4 bytes for each token of the vocabulary")) == 1


def test_llama_gets_the_fastest_length_or_no_draft_model() -> None:
    some = export(made("ngram", ms=[10.0 + n for n in range(20)]), "llama-cpp-python")
    assert "num_pred_tokens=4)" in arguments(some)["draft_model"]
    none = export(made("ngram", ms=[10.0 * n for n in range(1, 20)]), "llama-cpp-python")
    assert arguments(none).keys() & {"draft_model", "logits_all"} == set() and "llama_speculative" not in none.code
    assert "no fixed draft length is faster" in none.lost[0]


def test_code_for_llama_names_the_class_that_runs_the_profile_itself() -> None:
    name = "specplug.engines.llama_cpp.speculative_llama.SpeculativeLlama"
    assert len(lost_about(export(made("token_recycling"), "llama-cpp-python"), name)) == 1
    assert lost_about(export(made("none"), "llama-cpp-python"), name) == []


@pytest.mark.llama
def test_the_code_for_llama_opens_the_demo_model_and_drafts(demo_path: Path) -> None:
    """The text is longer than a batch, which Llama drafts for only with logits_all."""
    runtime = Runtime(threads=2, context=256, batch=32, flash_attention=True, kv_type="bf16", mmap=False)
    profile = replace(made("ngram"), runtime=runtime)
    found = export(profile, "llama-cpp-python", str(demo_path))
    scope: dict[str, object] = {}
    exec(found.code.replace("    n_ctx=", "    verbose=False,\n    n_ctx="), scope)
    llm = scope["llm"]
    drafted = []
    lookup = llm.draft_model
    llm.draft_model = lambda ids: drafted.append(lookup(ids)) or drafted[-1]
    answer = llm("The cat sat on the mat. " * 10, max_tokens=16, temperature=0)
    assert "cat sat on the mat" in answer["choices"][0]["text"] and any(len(ids) for ids in drafted)
    assert (llm.n_threads, llm.n_threads_batch, llm.n_ctx(), llm.n_batch) == (2, 2, 256, 32)
    llm.close()


@pytest.mark.llama
def test_cache_types_of_the_code_are_those_of_the_engine() -> None:
    import llama_cpp

    from specplug.engines.llama_cpp import context

    assert CACHE_TYPES.keys() == set(KV_TYPES)
    assert {name: eval(code, {"llama_cpp": llama_cpp}) for name, code in CACHE_TYPES.items()} == context.KV_TYPES


def test_the_length_is_the_fastest_one() -> None:
    """Seven of ten draft tokens are accepted. Where rows are free, the length is the longest allowed. Where a row costs
    a tenth of a pass, the speedups by hand are 1.7/1.1, 2.19/1.2, 2.53/1.3, 2.77/1.4 and 2.94/1.5: the best is near 5.
    Where a row costs an entire pass, nothing is drafted."""
    flat = flags(export(made("ngram", ms=[10.0] * 20), "llama-server"))
    assert flat["--spec-ngram-simple-size-m"] == "8"
    tenth = [10.0 + n for n in range(20)]
    speeds = {n: sum(0.7**i for i in range(n + 1)) / (1 + n / 10) for n in range(9)}
    some = flags(export(made("ngram", ms=tenth), "llama-server"))
    assert int(some["--spec-ngram-simple-size-m"]) == max(speeds, key=speeds.__getitem__) == 4
    expensive = export(made("ngram", ms=[10.0 * n for n in range(1, 20)]), "llama-server")
    assert expensive.argv[-2:] == ["--spec-type", "none"] and "no fixed draft length is faster" in expensive.lost[0]
    assert "--speculative-config" not in export(made("ngram", ms=[10.0 * n for n in range(1, 20)]), "vllm").argv


def test_vllm_gets_a_config_and_a_schedule_by_batch_size() -> None:
    """Eight rows cost as much as one, and each further row costs an entire pass: one request drafts 7 tokens, two draft
    3, three and four draft 1, more draft nothing."""
    ms = [10.0] * 8 + [10.0 * n for n in range(2, 20)]
    found = config(export(made("ngram", ms=ms, min_match=2, right=0.9), "vllm", "org/m"))
    assert found["method"] == "ngram" and (found["prompt_lookup_min"], found["prompt_lookup_max"]) == (2, 3)
    assert found["num_speculative_tokens"] == 7
    schedule = found["num_speculative_tokens_per_batch_size"]
    assert schedule == [[1, 1, 7], [2, 2, 3], [3, 4, 1], [5, 512, 0]]


def test_vllm_gets_its_own_settings_as_flags() -> None:
    settings = VllmSettings(
        max_model_len=2048, max_num_seqs=8, gpu_memory_utilization=0.5, dtype="bfloat16", enforce_eager=True
    )
    found = export(Profile("p", engine="vllm", proposers=NONE, vllm=settings), "vllm", "org/m")
    expected = "--max-model-len 2048 --max-num-seqs 8 --gpu-memory-utilization 0.5 --dtype bfloat16 --enforce-eager"
    assert found.argv == ["vllm", "serve", "org/m", *expected.split()] and found.lost == []
    drafting = export(replace(made("suffix"), vllm=settings), "vllm", "org/m")
    assert drafting.argv[3:-2] == expected.split() and config(drafting)["method"] == "suffix"


@pytest.mark.parametrize(("threads", "cores"), [(1, "such as 0"), (6, "such as 0-5")])
def test_vllm_is_told_about_threads_by_its_environment(threads: int, cores: str) -> None:
    found = export(Profile("p", proposers=NONE, runtime=Runtime(threads=threads)), "vllm")
    (line,) = found.lost
    assert line.startswith(f"threads: {threads} ") and "VLLM_CPU_OMP_THREADS_BIND" in line and line.endswith(cores)


def test_settings_of_llama_cpp_are_lost_on_vllm() -> None:
    runtime = Runtime(threads_batch=4, ubatch=8, flash_attention=False, kv_type="f16", repack=False, mmap=False)
    for methods in (["none"], ["ngram"], ["suffix"]):
        lost = lost_about(export(replace(made(*methods), runtime=runtime), "vllm"), "llama.cpp's settings")
        assert len(lost) == 1
        assert lost[0].startswith("threads_batch, ubatch, flash_attention, kv_type, repack, mmap: ")
        assert "--kv-cache-dtype" in lost[0]
    assert export(made("none"), "vllm").lost == []


def test_suffix_becomes_the_suffix_decoding_of_vllm() -> None:
    found = config(export(made("suffix", max_draft=6), "vllm", "org/m"))
    assert found["method"] == "suffix" and found["suffix_decoding_max_tree_depth"] == 6


@pytest.mark.parametrize("target", ["llama-server", "vllm"])
def test_losses_are_reported(target: str) -> None:
    found = export(made("suffix", "token_recycling"), target, "m")
    assert any("token_recycling has no counterpart" in line for line in found.lost)
    alone = export(made("token_recycling"), target, "m").lost
    assert alone[0] == "token_recycling has no counterpart and is dropped" and len(alone) == 1 + (target != "vllm")
    lines = str(found).splitlines()
    assert lines[:-1] == [f"# {line}" for line in found.lost] and shlex.split(lines[-1]) == found.argv


def test_losses_are_comments_before_the_code() -> None:
    found = export(made("ngram"), "llama-cpp-python", "m")
    assert str(found) == "\n".join([*(f"# {line}" for line in found.lost), found.code])
    assert found.lost and isinstance(ast.parse(str(found)), ast.Module)


@pytest.mark.parametrize("target", TARGETS)
def test_the_loss_of_coupled_sampling_is_reported(target: str) -> None:
    profile = replace(made("suffix"), runtime=Runtime(coupled=True))
    line = "coupled sampling exists in specplug only: a seed yields another text there"
    assert line in export(profile, target, "m").lost
    assert line not in export(made("suffix"), target, "m").lost


@pytest.mark.parametrize("target", TARGETS)
def test_every_shipped_profile_can_be_exported(target: str) -> None:
    for listed in profiles.list_profiles():
        found = export(profiles.load(listed.name), target, "m")
        assert arguments(found) if isinstance(found, ExportedCode) else found.argv


@pytest.mark.parametrize("target", TARGETS)
def test_the_command_prints_what_is_exported(target: str, tmp_path: Path) -> None:
    profiles.save(Profile("mine", proposers=NONE, runtime=Runtime(threads=2)), tmp_path / "mine.yaml")
    call = ["export", str(tmp_path / "mine.yaml"), "--to", target]
    expected = export(Profile("mine", proposers=NONE, runtime=Runtime(threads=2)), target)
    assert CliRunner().invoke(profiles_command, call).output == f"{expected}\n"
    assert json.loads(CliRunner().invoke(profiles_command, [*call, "--json"]).output) == asdict(expected)


@pytest.mark.parametrize("target", ["llama-server", "llama-cpp-python"])
def test_a_missing_model_is_an_error_where_a_file_is_needed(target: str) -> None:
    done = CliRunner().invoke(profiles_command, ["export", "none", "--to", target, "--model", "missing.gguf"])
    assert done.exception is not None and "model missing.gguf: no such file" in str(done.exception)


@pytest.mark.parametrize(
    "ref, target, words",
    [
        ("hf:o/r:Q8_0", "llama-server", ["llama-server", "-hf", "o/r:Q8_0", "--ctx-size"]),
        ("hf:o/r:a/m.gguf", "llama-server", ["llama-server", "--hf-repo", "o/r", "--hf-file", "a/m.gguf"]),
        ("hf:o/r", "llama-server", ["llama-server", "-hf", "o/r", "--ctx-size"]),
        ("hf:o/r@v1:Q8_0", "llama-server", None),
        ("hf:o/r:safetensors", "llama-server", None),
        ("hf:o/r", "vllm", ["vllm", "serve", "o/r"]),
        ("hf:o/r@v1:safetensors", "vllm", ["vllm", "serve", "o/r", "--revision", "v1"]),
        ("hf:o/r:Q8_0", "vllm", None),
    ],
)
def test_a_model_on_the_hub_is_named_as_the_program_takes_it(ref: str, target: str, words: list[str] | None) -> None:
    """The flags are those of llama.cpp's common/arg.cpp and of vLLM's EngineArgs."""
    if words is None:
        with pytest.raises(UsageError, match=ref):
            export(Profile("p", model=ref), target)
        return
    made = export(Profile("p", model=ref), target)
    assert isinstance(made, Exported) and made.argv[: len(words)] == words
