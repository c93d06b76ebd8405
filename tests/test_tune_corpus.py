"""Corpora in profiles and in tune."""

from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
from corpus_files import write_corpus
from toy_subject import ToySubject

from specplug import profile as profiles
from specplug.bench.workloads import Prompt
from specplug.core import Requires
from specplug.engines.tokenizer_check import check_tokenizer
from specplug.errors import UsageError
from specplug.profile import Profile
from specplug.profile.with_corpora import corpora_of, with_corpora
from specplug.registry import ProposerSpec
from specplug.tune.candidates import PRUNED, grid
from specplug.tune.session import tune
from specplug.tune.tune_request import SCHEMA, Request, check_journal


def test_corpora_are_added_beside_the_other_methods() -> None:
    plain = Profile("a", proposers=(ProposerSpec("none"),))
    assert with_corpora(plain, ["x"]).proposers == (ProposerSpec("datastore", {"corpora": ["x"]}),)
    named = Profile(
        "a", proposers=(ProposerSpec("suffix"), ProposerSpec("datastore", {"corpora": ["x"], "lookups": 2}))
    )
    changed = with_corpora(named, ["y", "z"], name="b")
    assert changed.name == "b" and corpora_of(changed) == ["y", "z"] and corpora_of(named) == ["x"]
    assert changed.proposers[1].options["lookups"] == 2 and changed.proposers[0] == named.proposers[0]


def test_a_corpus_is_tried_alone_and_with_every_other_method() -> None:
    corpus = ProposerSpec("datastore", {"corpora": ["x"]})
    methods = {setting.method for setting in grid(Requires(topk=64), named=[corpus])}
    assert {"datastore", "suffix + datastore", "token_recycling + datastore", "ngram + datastore"} <= methods
    assert not any("datastore" in setting.method for setting in grid(Requires(topk=64)))
    drafter = ProposerSpec("draft_model", {"model": "small.gguf"})
    both = [setting for setting in grid(Requires(topk=64, drafter=True), named=[drafter, corpus])]
    assert {s.planner.prune_top_k for s in both if s.method == "suffix + datastore + draft_model"} == {None, *PRUNED}


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Request, ToySubject]:
    """A tune of a toy with a corpus of the answers that it will give."""
    for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "tokenizer.json").write_text("{}")
    base = Profile("base")
    subject = ToySubject(base, lambda rows: 10.0 + 0.2 * rows)
    prompts = [Prompt(f"q{i}", f"kind {i % 2}", (f"say {i} things about {i * 7} words",)) for i in range(16)]
    answers = [subject.answer(subject.encode([{"content": p.turns[0]}]), 48) for p in prompts]
    folder = tmp_path / "corpus"
    write_corpus(folder, [[*a.prompt.tolist(), *a.tokens.tolist()] for a in answers], 128)
    manifest = folder / "corpus.json"
    manifest.write_text(manifest.read_text().replace("0" * 64, sha256(b"{}").hexdigest()))
    request = Request(
        model, base, prompts, "toy", "mine", tmp_path / "mine.yaml", budget=200.0, max_tokens=48, objective="latency",
        corpora=("./corpus",),
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    return request, subject


def test_tune_chooses_a_corpus_of_the_answers(asked: tuple[Request, ToySubject]) -> None:
    request, subject = asked
    outcome = tune(request, opener=lambda request: subject)
    assert "datastore" in outcome.document["chosen"]
    written = profiles.load(request.out)
    assert corpora_of(written) == [f"{folder_of(request)}/"], "the path leads there from every folder"
    assert "datastore" in outcome.document["expense_us"]["ask"]
    check_tokenizer(written, request.model)


def folder_of(request: Request) -> Path:
    return (Path.cwd() / request.corpora[0]).absolute()


def test_a_journal_of_a_version_without_corpora_can_be_continued(
    asked: tuple[Request, ToySubject], tmp_path: Path
) -> None:
    request = replace(asked[0], corpora=())
    subject = asked[1]
    identity = {key: value for key, value in request.identity().items() if key != "corpora"}
    begun = {"kind": "begun", "schema": SCHEMA, "request": identity, "fingerprint": request.fingerprint()}
    journal = SimpleNamespace(path=tmp_path / "x", entries=[begun])
    check_journal(journal, request)
    with pytest.raises(UsageError, match="the unfinished tune had another corpora"):
        check_journal(journal, asked[0])
    assert subject.recorded == 0


def test_a_corpus_of_another_tokenizer_is_refused(asked: tuple[Request, ToySubject]) -> None:
    request, subject = asked
    (request.model / "tokenizer.json").write_text("{ }")
    with pytest.raises(UsageError, match="build a corpus with this model"):
        tune(request, opener=lambda request: subject)
    with pytest.raises(UsageError, match="build a corpus with this model"):
        check_tokenizer(with_corpora(request.base, request.corpora), request.model)


def test_a_tune_with_another_corpus_is_another_tune(asked: tuple[Request, ToySubject], tmp_path: Path) -> None:
    request, _ = asked
    before = request.identity()
    write_corpus(tmp_path / "corpus", [[1, 2, 3]], 128)
    assert request.identity() != before
