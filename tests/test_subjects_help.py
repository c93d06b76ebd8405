"""What is read from `--help` of several builds, and how their drafting is spelled."""

import pytest
from recorded_help import CURRENT, EARLY_2026, IK_CURRENT, IK_OLDER, OLDER

from specplug.subjects.help_text import HelpFlag, parse_help
from specplug.subjects.spec_spelling import drafter_flags, lookup_flags


def test_a_flag_has_all_its_spellings_its_default_and_its_variable() -> None:
    found = parse_help(CURRENT)
    names = ("--spec-draft-model", "-md", "--model-draft")
    assert found.flags["-md"] == HelpFlag(names, "FNAME", "unused", "LLAMA_ARG_SPEC_DRAFT_MODEL")
    assert all(found.flags[name] is found.flags["-md"] for name in names)
    assert found.flags["-t"].names == ("-t", "--threads")
    assert found.flags["--spec-draft-backend-sampling"].value == ""
    assert found.flags["--no-spec-draft-backend-sampling"].default == "enabled"


def test_defaults_are_those_of_the_build() -> None:
    found = parse_help(CURRENT)
    names = ("--port", "--spec-draft-n-max", "--spec-draft-p-min", "--spec-ngram-simple-size-n", "--spec-type", "-c")
    assert [found.default(name) for name in names] == ["8080", "3", "0.00", "12", "none", "0, 0 = loaded from model"]
    assert found.default("-m") is None and found.default("--nonsense") is None


def test_descriptions_are_no_flags() -> None:
    assert {"-", "--", "-none", "--spec-ngram-mod-n-max or"} & set(parse_help(CURRENT).flags) == set()
    assert parse_help(CURRENT).flags["--load-mode"].value == "MODE"
    assert parse_help("").flags == {}


@pytest.mark.parametrize(
    ("text", "types"),
    [
        (
            CURRENT,
            "none draft-simple draft-eagle3 draft-mtp draft-dflash draft-dspark "
            "ngram-simple ngram-map-k ngram-map-k4v ngram-mod ngram-cache",
        ),
        (EARLY_2026, "none ngram-cache ngram-simple ngram-map-k ngram-map-k4v ngram-mod"),
        (OLDER, ""),
        (IK_CURRENT, "none draft mtp ngram-cache ngram-simple ngram-map-k ngram-map-k4v ngram-mod suffix"),
        (IK_OLDER, ""),
    ],
)
def test_types_of_drafting(text: str, types: str) -> None:
    assert parse_help(text).spec_types == tuple(types.split())


def test_removed_flags_are_known_but_not_accepted() -> None:
    found = parse_help(CURRENT)
    assert not found.accepts("--draft-max") and not found.accepts("--spec-ngram-size-n")
    assert found.spelling("--draft-max", "--spec-draft-n-max") == "--spec-draft-n-max"
    assert found.default("--draft-max") is None
    assert parse_help(OLDER).spelling("--spec-draft-n-max", "--draft-max") == "--draft-max"


def test_two_spellings_are_the_same_flag() -> None:
    found = parse_help(CURRENT)
    assert found.same("-md", "--model-draft") and found.same("--unknown", "--unknown")
    assert not found.same("-md", "-m")


SIMPLE = {"size-n": 3, "size-m": 8}
MOD = {"n-match": 3, "n-min": 1, "n-max": 8}


@pytest.mark.parametrize(
    ("text", "simple", "mod"),
    [
        (
            CURRENT,
            "--spec-type ngram-simple --spec-ngram-simple-size-n 3 --spec-ngram-simple-size-m 8",
            "--spec-type ngram-mod --spec-ngram-mod-n-match 3 --spec-ngram-mod-n-min 1 --spec-ngram-mod-n-max 8",
        ),
        (
            EARLY_2026,
            "--spec-type ngram-simple --spec-ngram-size-n 3 --spec-ngram-size-m 8",
            "--spec-type ngram-mod --spec-ngram-size-n 3 --draft-min 1 --draft-max 8",
        ),
        (
            IK_CURRENT,
            "--spec-type ngram-simple:ngram_size_n=3,ngram_size_m=8",
            "--spec-type ngram-mod:ngram_size_n=3,n_min=1,n_max=8",
        ),
        (OLDER, None, None),
        (IK_OLDER, None, None),
    ],
)
def test_lookup_in_the_spelling_of_each_build(text: str, simple: str | None, mod: str | None) -> None:
    offered = parse_help(text)
    assert lookup_flags(offered, "ngram-simple", SIMPLE) == (None if simple is None else simple.split())
    assert lookup_flags(offered, "ngram-mod", MOD) == (None if mod is None else mod.split())


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        (
            CURRENT,
            "-md d.gguf --spec-type draft-simple --spec-draft-n-max 8 --spec-draft-n-min 1 --spec-draft-p-min 0.75",
        ),
        (EARLY_2026, None),  # the excerpt has no probability
        (OLDER, "-md d.gguf --draft-max 8 --draft-min 1 --draft-p-min 0.75"),
        (IK_CURRENT, "-md d.gguf --spec-type draft:n_max=8,n_min=1,p_min=0.75"),
        (IK_OLDER, "-md d.gguf --draft-max 8 --draft-min 1 --draft-p-min 0.75"),
        ("--port PORT    port to listen", None),
    ],
)
def test_a_drafter_in_the_spelling_of_each_build(text: str, flags: str | None) -> None:
    found = drafter_flags(parse_help(text), "d.gguf", most=8, least=1, probability=0.75)
    assert found == (None if flags is None else flags.split())


def test_a_build_without_a_flag_for_a_default_still_drafts() -> None:
    assert drafter_flags(parse_help(EARLY_2026), "d.gguf", most=8) == ["-md", "d.gguf", "--draft-max", "8"]


def test_sizes_that_a_build_does_not_have_are_not_offered() -> None:
    assert lookup_flags(parse_help(CURRENT), "ngram-simple", {"n-match": 3}) is None
    assert lookup_flags(parse_help(CURRENT), "suffix", {}) is None
    assert lookup_flags(parse_help(IK_CURRENT), "suffix", {}) == ["--spec-type", "suffix"]
