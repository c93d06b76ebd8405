import sys
from pathlib import Path

import pytest

from specplug import registry
from specplug.core import Proposer, Requires
from specplug.errors import EngineError, SpecplugError, UsageError
from specplug.planning.fusion import Fusion
from specplug.proposers.none import NoDraft
from specplug.registry import ProposerSpec

BUILT_IN = ["none", "ngram", "suffix", "token_recycling"]

THIRD_PARTY = """
from __future__ import annotations
from typing import Literal
from specplug.core import EMPTY, Bucket, Requires


class Peeking:
    requires = Requires(topk=4)
    buckets = (Bucket("peek", 0.5),)

    def __init__(self, depth: int, *, share: float = 0.5, mode: Literal["wide", "deep"] = "wide",
                 words: list[str] | None = None, loud: bool = False, table: bytes = b"") -> None:
        if depth < 1:
            raise ValueError(f"depth is {depth}; use >= 1")
        self.got = (depth, share, mode, words, loud)

    def begin(self, seq, prompt): pass
    def propose(self, seq, budget): return EMPTY
    def observe(self, seq, step): pass
    def end(self, seq): pass


class NoProposer:
    pass
"""


def install(folder: Path, package: str, entry_points: str, module: str = "", source: str = "") -> None:
    """A package as pip installs it: a module, and metadata with entry points."""
    info = folder / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[specplug.proposers]\n{entry_points}\n")
    if module:
        (folder / f"{module}.py").write_text(source)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the import path, for packages of third parties."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("third_party"):
            del sys.modules[name]


@pytest.fixture
def peeking(site: Path) -> None:
    install(
        site,
        "peek-pack",
        "peeking = third_party_peek:Peeking\nhollow = third_party_peek:NoProposer",
        "third_party_peek",
        THIRD_PARTY,
    )


def test_names_are_the_built_in_ones_then_third_parties_in_order(site: Path) -> None:
    assert registry.names()[:4] == BUILT_IN
    install(site, "two-more", "zeta = a:B\nalpha = a:B")
    listed = registry.names()
    assert listed[:4] == BUILT_IN
    assert [name for name in listed if name in ("alpha", "zeta")] == ["alpha", "zeta"]


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_name_builds_a_proposer_known_by_that_name(name: str) -> None:
    proposer = registry.build([ProposerSpec(name)])
    assert isinstance(proposer, Proposer)
    assert type(proposer) is registry.load(name)
    assert registry.name_of(proposer) == name


def test_an_unknown_name_is_refused_with_the_nearest_valid_one() -> None:
    with pytest.raises(UsageError, match=r"'sufix'.*did you mean suffix\?"):
        registry.load("sufix")
    with pytest.raises(UsageError, match="valid: none, ngram, suffix, token_recycling"):
        registry.load("zzzzzzzz")


def test_a_dotted_path_is_only_an_unknown_name() -> None:
    with pytest.raises(UsageError):
        registry.load("specplug.proposers.none:NoDraft")
    with pytest.raises(UsageError):
        registry.load("os:getcwd")


@pytest.mark.usefixtures("peeking")
class TestOptions:
    def test_valid_options_reach_the_constructor(self) -> None:
        options = {"depth": 3, "share": 1, "mode": "deep", "words": ["a"], "loud": True}
        built = registry.build([ProposerSpec("peeking", options)])
        assert built.got == (3, 1, "deep", ["a"], True)

    def test_a_wrong_key_is_refused_with_the_nearest_valid_one(self) -> None:
        with pytest.raises(UsageError, match=r"peeking: dept: .*did you mean depth\?"):
            registry.build([ProposerSpec("peeking", {"dept": 3})])

    def test_a_method_without_options_says_so(self) -> None:
        with pytest.raises(UsageError, match=r"none: longest: none has no such option; it has none"):
            registry.build([ProposerSpec("none", {"longest": 3})])

    @pytest.mark.parametrize(
        ("key", "value", "wanted"),
        [
            ("depth", "3", "a whole number"),
            ("depth", 3.0, "a whole number"),
            ("depth", True, "a whole number"),
            ("depth", None, "a whole number"),
            ("share", "half", "a number"),
            ("share", False, "a number"),
            ("mode", "narrow", "one of wide, deep"),
            ("words", "a", "a list or null"),
            ("words", [1], "a list or null"),
            ("loud", 1, "true or false"),
        ],
    )
    def test_a_wrong_type_is_refused_with_the_right_one(self, key: str, value: object, wanted: str) -> None:
        with pytest.raises(UsageError, match=f"{key}: .* is not {wanted}"):
            registry.check(ProposerSpec("peeking", {"depth": 3, key: value}))

    def test_a_missing_option_is_named(self) -> None:
        with pytest.raises(UsageError, match="depth: peeking requires this option"):
            registry.check(ProposerSpec("peeking"))

    def test_parameters_that_yaml_cannot_express_are_no_options(self) -> None:
        assert set(registry.options("peeking")) == {"depth", "share", "mode", "words", "loud"}

    def test_a_value_error_of_the_constructor_is_bad_input(self) -> None:
        with pytest.raises(UsageError, match="proposer peeking: depth is 0; use >= 1"):
            registry.build([ProposerSpec("peeking", {"depth": 0})])

    def test_a_class_that_is_no_proposer_is_refused(self) -> None:
        with pytest.raises(SpecplugError, match="hollow: NoProposer is not a Proposer"):
            registry.build([ProposerSpec("hollow")])


def test_a_module_that_does_not_load_is_reported_with_its_package(site: Path) -> None:
    install(site, "broken-pack", "broken = third_party_broken:X", "third_party_broken", "1 / 0")
    assert "broken" in registry.names()
    with pytest.raises(SpecplugError, match=r"proposer broken: package broken-pack does not load \(ZeroDivisionError"):
        registry.load("broken")


def test_a_name_registered_by_two_packages_is_refused_with_both(site: Path) -> None:
    install(site, "first-pack", "same = third_party_one:X")
    install(site, "second-pack", "same = third_party_two:X")
    with pytest.raises(SpecplugError, match="first-pack, second-pack"):
        registry.load("same")


def test_a_built_in_name_cannot_be_replaced(site: Path) -> None:
    install(site, "replacer", "none = third_party_taker:Peeking", "third_party_taker", THIRD_PARTY)
    assert registry.load("none") is NoDraft
    assert registry.names().count("none") == 1


def test_several_specs_become_their_fusion_in_order() -> None:
    fused = registry.build([ProposerSpec("suffix"), ProposerSpec("ngram")])
    assert isinstance(fused, Fusion)
    assert [registry.name_of(source) for source in fused.sources] == ["suffix", "ngram"]
    assert registry.name_of(fused) == "fusion"


@pytest.mark.parametrize(
    ("methods", "complaint"),
    [
        ([], "no proposer is named"),
        (["suffix", "suffix"], "suffix is listed twice"),
        (["none", "suffix"], "none cannot be combined"),
    ],
)
def test_impossible_lists_are_refused(methods: list[str], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        registry.build([ProposerSpec(name) for name in methods])


@pytest.mark.usefixtures("peeking")
class TestRequirements:
    def test_a_mismatch_is_refused_with_both_names(self) -> None:
        proposer = registry.build([ProposerSpec("peeking", {"depth": 1})])
        with pytest.raises(
            EngineError, match=r"proposer peeking requires TOPK\(4\), which engine quiet does not provide"
        ):
            registry.check_requirements([proposer], Requires(topk=3), "quiet")
        registry.check_requirements([proposer], Requires(topk=4), "quiet")

    def test_in_a_fusion_the_proposer_is_named(self) -> None:
        fused = registry.build([ProposerSpec("suffix"), ProposerSpec("peeking", {"depth": 1})])
        with pytest.raises(EngineError, match="proposer peeking requires"):
            registry.check_requirements([fused], Requires(), "quiet")
        registry.check_requirements([fused], Requires(topk=8), "quiet")
