"""The values of --model and --draft as the servers' own programs take them. No server is started."""

import json
from pathlib import Path

import pytest
from subject_stubs import COMMAND, running
from test_hub_cache import CHECKPOINT, OLD, cache, store
from test_models import write_gguf

from specplug.errors import UsageError
from specplug.models import references
from specplug.models.checkpoint_heads import brings_mtp_layers, is_eagle3_head
from specplug.subjects.launched import LaunchedServer
from specplug_cli.main import main
from specplug_cli.servers import give_model, open_servers

__all__ = ["cache"]


@pytest.fixture
def vllm(tmp_path: Path) -> str:
    """A program of this name, which does nothing."""
    script = tmp_path / "bin" / "vllm"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\nexit 1\n")
    script.chmod(0o755)
    return str(script)


def folder(path: Path, **config: object) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


def named(server: str, model: str) -> list[str]:
    """The words after the program that start it with --model."""
    servers = open_servers([server])
    give_model(servers, model)
    assert isinstance(servers[0], LaunchedServer)
    return list(servers[0].command.argv[len(server.split()) :])


def test_vllm_gets_the_folder_of_a_model_on_this_disk_and_else_the_name_that_it_downloads(
    vllm: str, cache: Path, tmp_path: Path
) -> None:
    for reference in ("org/away", "hf:org/away"):
        assert named(vllm, reference) == ["serve", "org/away"]
    snapshot = store(cache, "org/here", OLD, CHECKPOINT)
    for reference in ("org/here", "hf:org/here"):
        assert named(vllm, reference) == ["serve", str(snapshot)]
    own = folder(tmp_path / "own")
    assert named(vllm, str(own)) == ["serve", str(own)]
    with pytest.raises(UsageError, match="not on this disk yet"):
        named(vllm, "hf:org/away@v1")


def test_llama_server_gets_the_file_of_a_reference(cache: Path, tmp_path: Path) -> None:
    snapshot = store(cache, "org/quants", OLD, ["m-Q4_K_M.gguf"])
    write_gguf(snapshot / "m-Q4_K_M.gguf")
    assert named(COMMAND, "hf:org/quants") == ["-m", str(snapshot / "m-Q4_K_M.gguf")]
    assert named(COMMAND, "demo:smollm2") == ["-m", str(references.resolve("demo:smollm2"))]
    with pytest.raises(UsageError, match="not on this disk yet; to download it, run"):
        named(COMMAND, "hf:org/away")
    with pytest.raises(UsageError, match=r"llama-server takes a GGUF file, and .* is a folder"):
        named(COMMAND, str(folder(tmp_path / "own")))


def test_heads_are_known_by_a_models_configuration(tmp_path: Path) -> None:
    heads = {
        "a": {"num_nextn_predict_layers": 1},
        "b": {"text_config": {"mtp_num_hidden_layers": 1}},
        "c": {"num_nextn_predict_layers": 0},
        "d": {"architectures": ["LlamaForCausalLMEagle3"]},
        "e": {"speculators_model_type": "eagle3"},
        "f": {"architectures": ["LlamaForCausalLM"]},
    }
    folders = {name: folder(tmp_path / name, **config) for name, config in heads.items()}
    assert [name for name, path in folders.items() if brings_mtp_layers(path)] == ["a", "b"]
    assert [name for name, path in folders.items() if is_eagle3_head(path)] == ["d", "e"]
    assert not brings_mtp_layers(tmp_path / "none") and not is_eagle3_head(tmp_path / "none")


def tuned(server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str, str]:
    """The exit code of a tune that only plans, and what it prints."""
    lines = [json.dumps({"category": "work", "prompt": f"say {i}"}) for i in range(5)]
    (work := tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    out = ["--workload", str(work), "--out", str(tmp_path / "out.yaml"), "--dry-run", "--json"]
    code = main(["tune", "--server", server, *out, *more])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_drafters_and_heads_of_vllm_are_candidates(
    vllm: str, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshot = store(cache, "org/large", OLD, CHECKPOINT)
    (snapshot / "config.json").write_text('{"num_nextn_predict_layers": 1}')
    head = folder(tmp_path / "head", architectures=["LlamaForCausalLMEagle3"])
    drafts = ["--draft", "hf:org/away", "--draft", str(head)]
    code, out, _ = tuned(f"{vllm} serve org/large", tmp_path, capsys, *drafts)
    assert code == 0
    assert json.loads(out)["candidates"] == {"ngram": 20, "away": 4, "eagle3": 3, "mtp": 3}


def test_a_command_without_a_model_is_refused_with_the_ways_to_name_one(
    vllm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = tuned(f"{vllm} serve", tmp_path, capsys)
    assert code == 2 and "vllm has no model; add MODEL after `vllm serve`, or --model MODEL" in err
    code, _, err = tuned(COMMAND, tmp_path, capsys)
    assert code == 2 and "has no model; add -m MODEL to the command, or --model MODEL" in err
    for named in ("-hf owner/name", "-mu http://host/m.gguf", "-dr ai/name"):
        assert tuned(f"{COMMAND} {named}", tmp_path, capsys)[0] == 0, named

    monkeypatch.setenv("LLAMA_ARG_HF_REPO", "owner/name")
    assert tuned(COMMAND, tmp_path, capsys)[0] == 0, "the help names the variable"


def test_an_address_of_several_models_cannot_be_tuned_either(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running("--kind", "ollama", "-m", "one", "--more-models", "two") as address:
        code, _, err = tuned(address, tmp_path, capsys)
    assert code == 2 and "pass the command that starts it, such as --server 'llama-server -m MODEL.gguf'" in err


def test_the_dry_run_refuses_a_command_that_drafts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = tuned(f"{COMMAND} -m stub.gguf -md small.gguf", tmp_path, capsys)
    assert code == 2 and "the command has -md, which drafts" in err


def test_a_format_that_cannot_hold_a_candidate_is_refused_before_it_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "llama-server"
    script.write_text(f'#!/bin/sh\nexec {COMMAND} "$@"\n')
    script.chmod(0o755)
    drafter = write_gguf(tmp_path / "a;b.gguf")
    for draft, code in (([], 0), (["--draft", str(drafter)], 2)):
        out = ["--dry-run", "--format", "ini", "--out", str(tmp_path / "out.yaml")]
        assert main(["tune", "--server", f"{script} -m stub.gguf", *out, *draft]) == code
    assert "a;b.gguf', has a character that ends or changes a value in a preset" in capsys.readouterr().err
