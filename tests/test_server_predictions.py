"""The time of passes from whole answers, and what is predicted from it; the expectations are sums done by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from llama_flags import help_text
from recorded_help import EARLY_2026, IK_CURRENT, OLDER

from specplug.subjects.help_text import parse_help
from specplug.tune.server_flags.answer_replay import RecordedAnswer, Replayed
from specplug.tune.server_flags.drafter_guesses import AnswerGuesses
from specplug.tune.server_flags.llama_candidates import chained, llama_candidates, lookup_probe
from specplug.tune.server_flags.offered_candidates import python_of
from specplug.tune.server_flags.pass_times import PassTimes, fitted, plain_scales, usual_rows
from specplug.tune.server_flags.run_choice import to_run, with_chains
from specplug.tune.server_flags.server_candidates import Candidate, Drafts, RuleSizes
from specplug.tune.server_flags.server_predictions import Predicted, drafter_pass_ms, passes_ms, predicted
from specplug.tune.server_flags.vllm_candidates import VllmInstallation, vllm_candidates

TIMES = PassTimes((1, 5), (10.0, 14.0))


def test_times_are_those_that_make_up_the_answers() -> None:
    answers = [({1: 10}, 100.0), ({1: 5, 5: 5}, 120.0), ({5: 10}, 140.0)]
    found = fitted(answers, (1, 5))
    assert found.rows == (1, 5) and found.ms == pytest.approx((10.0, 14.0))
    assert [found.at(rows) for rows in (1, 3, 5, 9)] == pytest.approx([10.0, 12.0, 14.0, 18.0])
    assert found.of(Replayed(0, 0, 0, {1: 2, 3: 1})) == pytest.approx(32.0)


def test_between_knots_times_are_linear() -> None:
    # T: 10 at 1, 10 at 4, 16 at 8, so 13 at 6
    answers = [({1: 10}, 100.0), ({4: 10}, 100.0), ({8: 10}, 160.0), ({6: 10, 1: 1}, 140.0)]
    assert fitted(answers, (1, 4, 8)).ms == pytest.approx((10.0, 10.0, 16.0))


def test_a_pass_never_takes_less_with_more_rows() -> None:
    # the smallest squared relative error with T(5) = T(1) = t: t = (0.1 + 0.125) / (0.1**2 + 0.125**2)
    found = fitted([({1: 10}, 100.0), ({5: 10}, 80.0)], (1, 5))
    assert found.ms == pytest.approx((8.7805, 8.7805), abs=1e-3)


def test_rows_beyond_the_measured_ones_are_never_free() -> None:
    assert PassTimes((1, 5, 9), (10.0, 14.0, 22.0)).at(11) == pytest.approx(22.0 + 2 * 2.0), "as between 5 and 9"
    assert PassTimes((1, 5, 9), (10.0, 14.0, 14.0)).at(11) == pytest.approx(14.0 + 2 * 0.5), "4 ms for 8 rows"
    assert PassTimes((1, 5), (10.0, 10.0)).at(7) == pytest.approx(10.0 + 2 * 2.0), "10 ms for 5 rows"
    assert PassTimes((1,), (10.0,)).at(3) == pytest.approx(30.0)


def test_answers_without_passes_say_nothing() -> None:
    assert fitted([({1: 4}, 40.0), ({}, 3.0)], (1, 8)) == PassTimes((1,), (pytest.approx(10.0),))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no answer has passes"):
        fitted([({}, 3.0)], (1,))


SIMPLE = Candidate("s", "ngram-simple", (), (RuleSizes("ngram-simple", (2, 3)),))
ANSWER = RecordedAnswer((9, 1, 2, 3, 4, 5, 1), (2, 3, 4, 7, 6), 16)


def test_a_speedup_is_the_time_of_plain_passes_over_that_of_the_replay() -> None:
    found = predicted(SIMPLE, [ANSWER], TIMES)
    assert found is not None and found.replay.passes == {4: 1, 1: 1}
    assert found.speedup == pytest.approx(4 * 10.0 / (13.0 + 10.0))


def test_several_requests_have_the_rows_of_all_of_them_in_a_pass() -> None:
    # one request: passes of 4 and of 1 row, 2.5 in the mean; two of them: 2 passes of 5 rows
    assert passes_ms(Replayed(5, 3, 2, {4: 1, 1: 1}), TIMES, 2) == pytest.approx(28.0)
    found = predicted(SIMPLE, [ANSWER], TIMES, level=2)
    assert found is not None and found.speedup == pytest.approx(4 * 11.0 / 28.0)


def test_a_drafter_costs_what_its_answers_took_beyond_the_passes() -> None:
    # five passes of 10 ms, and five of 14 ms: 120 ms, and 60 in an answer whose passes take half as long
    measured = [
        (Replayed(10, 20, 5, {1: 5, 5: 5}, 30), 150.0, 1.0),
        (Replayed(10, 20, 5, {1: 5, 5: 5}, 20), 110.0, 0.5),
    ]
    assert drafter_pass_ms(measured, TIMES) == pytest.approx((30.0 + 50.0) / 50)
    assert drafter_pass_ms([(Replayed(3, 0, 0, {1: 2}), 30.0, 1.5)], TIMES) == 0.0


SURE = AnswerGuesses(np.array([3, 9, 9, 6, 0], dtype=np.int32), np.array([0.9, 0.9, 0.9, 0.9, 0.9]))
UNSURE = AnswerGuesses(SURE.tokens, np.array([0.9, 0.4, 0.4, 0.4, 0.4]))


def test_a_draft_that_ends_because_the_drafter_is_unsure_is_not_free() -> None:
    """The answer is 2 3 4 7 6. After 2, the guess 3 is accepted and 9 not; after 4, 9 is not, and after 7, 6 is."""
    drafting = Candidate("d", "d", drafts=Drafts("d", 2))
    found = predicted(drafting, [ANSWER], TIMES, guesses={"d": [SURE]}, drafter_ms={"d": 1.0})
    # three passes of 3 rows; each has two passes of the drafter for the draft, and one for the rows of the target
    assert found is not None and found.replay.passes == {3: 3} and found.replay.drafter_passes == 3 * 2 + 3
    assert found.speedup == pytest.approx(40.0 / (3 * 12.0 + 9 * 1.0))
    careful = Candidate("d", "d", drafts=Drafts("d", 2, 0.5))
    found = predicted(careful, [ANSWER], TIMES, guesses={"d": [UNSURE]}, drafter_ms={"d": 1.0})
    # 3 alone is drafted, in two passes; then nothing, twice in one pass; and one each for three passes of the target
    assert found is not None and found.replay.passes == {2: 1, 1: 2} and found.replay.drafter_passes == 2 + 1 + 1 + 3
    assert found.speedup == pytest.approx(40.0 / (11.0 + 2 * 10.0 + 7 * 1.0))


def test_in_a_chain_the_drafter_is_charged_for_its_own_drafts_only() -> None:
    chain = Candidate("c", "c", (), (RuleSizes("ngram-simple", (2, 3)),), Drafts("d", 3))
    found = predicted(chain, [ANSWER], TIMES, guesses={"d": [SURE]}, drafter_ms={"d": 1.0})
    # the lookup drafts 3 4 5; after 7, the drafter 6 and the guess behind it, in three passes; two of the target
    assert found is not None and found.replay.passes == {4: 1, 3: 1} and found.replay.drafted == 5
    assert found.replay.drafter_passes == 3 + 2
    assert found.speedup == pytest.approx(40.0 / (13.0 + 12.0 + 5 * 1.0))


def test_nothing_is_predicted_from_passes_of_one_row() -> None:
    assert predicted(SIMPLE, [ANSWER], PassTimes((1,), (10.0,))) is None


def test_what_cannot_be_replayed_is_not_predicted() -> None:
    assert predicted(Candidate("head", "mtp"), [ANSWER], TIMES) is None
    drafting = Candidate("d", "d", drafts=Drafts("d.gguf", 3))
    assert predicted(drafting, [ANSWER], TIMES) is None


HELP = """
--spec-draft-model, -md, --model-draft FNAME
                                        draft model for speculative decoding (default: unused)
--spec-draft-n-max N                    number of tokens to draft (default: 3)
--spec-type none,draft-simple,draft-mtp,ngram-simple,ngram-mod
                                        comma-separated list of types of speculative decoding to use (default: none)
--spec-ngram-simple-size-n N            length of lookup n-gram (default: 12)
--spec-ngram-simple-size-m N            length of draft m-gram (default: 40)
"""


def test_candidates_are_what_the_build_offers() -> None:
    found, missing = llama_candidates(
        parse_help(HELP), drafters=["small.gguf"], heads=[("mtp", None), ("eagle3", "head.gguf")]
    )
    families = {one.family for one in found}
    assert families == {"ngram-simple", "ngram-mod", "small.gguf", "mtp"}
    assert [line.split(":")[0] for line in missing] == ["ngram-map-k", "ngram-map-k4v", "ngram-cache", "draft-eagle3"]
    own = [one for one in found if one.flags == ("--spec-type", "ngram-simple")]
    assert [one.rules for one in own] == [(RuleSizes("ngram-simple", (12, 40)),)], "the build's own sizes"
    mods = [one for one in found if one.family == "ngram-mod"]
    assert [(one.flags, one.rules) for one in mods] == [(("--spec-type", "ngram-mod"), ())], "its sizes have no flags"
    drafting = [one for one in found if one.family == "small.gguf"]
    assert drafting[0].flags == (*("-md", "small.gguf", "--spec-type", "draft-simple", "--spec-draft-n-max", "1"),)
    assert all("p-min" not in " ".join(one.flags) for one in drafting), "this build has no such flag"


def families(text: str, *drafters: str) -> tuple[dict[str, list[Candidate]], list[str]]:
    found, missing = llama_candidates(parse_help(text), drafters=drafters)
    return {family: [one for one in found if one.family == family] for family in {one.family for one in found}}, missing


def flags_of(candidates: list[Candidate], *sizes: int) -> str:
    return " ".join(next(one for one in candidates if one.rules and one.rules[0].sizes == sizes).flags)


def test_builds_with_shared_flags_are_tried_in_every_size_and_replayed() -> None:
    found, missing = families(EARLY_2026, "d.gguf")
    assert set(found) == {"ngram-simple", "ngram-map-k", "ngram-map-k4v", "ngram-mod", "ngram-cache", "d.gguf"}
    assert missing == []
    assert flags_of(found["ngram-simple"], 12, 48) == "--spec-type ngram-simple", "the build's own sizes"
    assert flags_of(found["ngram-map-k"], 3, 8) == "--spec-type ngram-map-k --spec-ngram-size-n 3 --spec-ngram-size-m 8"
    assert flags_of(found["ngram-map-k4v"], 3, 8, 2).endswith("--spec-ngram-size-m 8 --spec-ngram-min-hits 2")
    assert len(found["ngram-simple"]) == 5 * 9, "its own are among them"
    assert found["d.gguf"][0].flags == ("-md", "d.gguf", "--draft-max", "1")
    assert chained(found["ngram-simple"][0], found["d.gguf"][0]) is None, "a drafter takes the place of a lookup type"


def test_builds_with_settings_inside_a_type_are_tried_in_every_size_and_replayed() -> None:
    found, missing = families(IK_CURRENT, "d.gguf")
    assert set(found) == {"ngram-simple", "ngram-map-k", "ngram-map-k4v", "ngram-mod", "ngram-cache", "d.gguf"}
    assert missing == []
    assert flags_of(found["ngram-mod"], 3, 1, 8) == "--spec-type ngram-mod:ngram_size_n=3,n_min=1,n_max=8"
    assert found["ngram-mod"][0].name == "ngram-mod, the server's own sizes" and found["ngram-mod"][0].rules == ()
    assert [one.flags for one in found["d.gguf"] if one.usual] == [
        ("-md", "d.gguf", "--spec-type", "draft:n_max=3,p_min=0")
    ]
    assert chained(found["ngram-simple"][1], found["d.gguf"][0]) is None
    probe = lookup_probe(parse_help(IK_CURRENT), 6)
    assert probe is not None and probe.flags == ("--spec-type", "ngram-simple:ngram_size_n=1,ngram_size_m=6")
    assert probe.rules == (RuleSizes("ngram-simple", (1, 6)),)


def test_builds_without_lookup_have_drafters_and_the_others_a_line() -> None:
    found, missing = families(OLDER, "d.gguf")
    assert set(found) == {"d.gguf"} and len(missing) == 5
    assert found["d.gguf"][0].flags == ("-md", "d.gguf", "--draft-max", "1", "--draft-p-min", "0")
    assert lookup_probe(parse_help(OLDER), 6) is None
    assert families("--port PORT    port to listen", "/m/d.gguf")[1][-1] == (
        "d.gguf: this build has no flags for a model that drafts"
    )


def test_of_each_type_one_is_the_usual_one() -> None:
    found, _ = families(help_text(), "d.gguf")
    usual = [(family, [one.name for one in own if one.usual]) for family, own in sorted(found.items())]
    assert usual == [
        ("d.gguf", ["d.gguf, 3 drafted"]),
        ("ngram-cache", ["ngram-cache"]),
        ("ngram-map-k", ["ngram-map-k 3, 8 drafted"]),
        ("ngram-map-k4v", ["ngram-map-k4v 3, 8 drafted"]),
        ("ngram-mod", ["ngram-mod 3, 1 to 8 drafted"]),
        ("ngram-simple", ["ngram-simple 3, 8 drafted"]),
    ]
    heads, _ = llama_candidates(parse_help(help_text()), heads=[("mtp", None)])
    assert [one.name for one in heads if one.family == "mtp" and one.usual] == ["mtp, 2 drafted"]


def test_the_best_lookup_is_chained_with_each_drafter_in_one_spec_type() -> None:
    found, _ = llama_candidates(parse_help(HELP), drafters=["small.gguf"])
    lookup = next(one for one in found if one.rules == (RuleSizes("ngram-simple", (3, 8)),))
    drafting = next(one for one in found if one.drafts is not None and one.drafts.length == 4)
    nothing = Replayed(1, 0, 0, {1: 1})
    known = {lookup.name: Predicted(nothing, 1.3), drafting.name: Predicted(nothing, 1.2)}
    (chain,) = with_chains(found, known)
    assert chain.flags == (
        *("--spec-type", "ngram-simple,draft-simple"),
        *("--spec-ngram-simple-size-n", "3", "--spec-ngram-simple-size-m", "8"),
        *("-md", "small.gguf", "--spec-draft-n-max", "4"),
    )
    assert chain.rules == lookup.rules and chain.drafts == drafting.drafts


def test_the_best_of_each_family_is_run_but_no_hopeless_one() -> None:
    nothing = Replayed(1, 0, 0, {1: 1})
    tried = [Candidate(name, name[0]) for name in ("a1", "a2", "b1", "c1")]
    known = {name: Predicted(nothing, speed) for name, speed in (("a1", 1.1), ("a2", 1.4), ("b1", 0.8), ("c1", 1.2))}
    assert [one.name for one in to_run(tried, known, 8)] == ["a2", "c1"]
    slow = {name: Predicted(nothing, 0.5) for name in known}
    assert len(to_run(tried, slow, 8)) == 2, "two are run, as proof, where none is hopeful"


def test_vllms_candidates_depend_on_what_is_installed() -> None:
    bare, missing = vllm_candidates(VllmInstallation())
    assert {one.family for one in bare} == {"ngram"} and len(missing) == 2
    full = VllmInstallation(
        frozenset({"num_speculative_tokens_per_batch_size"}),
        suffix=True,
        plugin=(("suffix", 3, ("--speculative-config", "{}")),),
    )
    found, missing = vllm_candidates(full, drafters=["org/small"], levels=(1, 8))
    assert {one.family for one in found} == {*("ngram", "ngram, by batch size", "suffix", "specplug's suffix", "small")}
    assert missing == []
    three = next(one for one in found if one.rules == (RuleSizes("vllm-ngram", (3, 2, 4)),))
    assert three.flags == (
        "--speculative-config",
        '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 2, "prompt_lookup_max": 4}',
    )
    assert not three.bounded
    usual = {one.family: one.name for one in found if one.usual}
    assert usual == {
        "ngram": "ngram 2-3, 3 drafted",
        "ngram, by batch size": "ngram 2-3, 3 drafted, by batch size",
        "suffix": "suffix, 8 drafted",
        "specplug's suffix": "specplug's suffix, 3 drafted",
        "small": "small, 3 drafted",
    }
    small = next(one for one in found if one.family == "small")
    assert json.loads(small.flags[1]) == {"model": "org/small", "num_speculative_tokens": 1}, "vLLM finds the method"
    with_heads, _ = vllm_candidates(full, heads=[("eagle3", "/head"), ("mtp", None)])
    heads = {one.name: json.loads(one.flags[1]) for one in with_heads if one.family in ("eagle3", "mtp") and one.usual}
    assert heads == {
        "eagle3, 2 drafted": {"method": "eagle3", "model": "/head", "num_speculative_tokens": 2},
        "mtp, 2 drafted": {"method": "mtp", "num_speculative_tokens": 2},
    }
    unknown, missing = vllm_candidates(None)
    assert unknown == bare and len(missing) == 1 and missing[0].endswith("the Python of this vLLM was not found")


@pytest.mark.parametrize(
    ("begin", "found"),
    [
        ("#!{python} -I", True),
        ("#!/usr/bin/env -S python3 -I", True),
        ("#!/usr/bin/env LANG=C python3", True),
        ("#!/bin/sh\n'''exec' \"{python}\" \"$0\" \"$@\"\n' '''", True),
        ("#!/bin/sh\n'''exec' {python} \"$0\" \"$@\"", True),
        ("#!/bin/sh\nexport A=1", False),
        ("#!/usr/bin/env bash", False),
        ("#!/usr/bin/env", False),
        ("#!", False),
        ("", False),
    ],
)
def test_the_python_of_a_vllm_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begin: str, found: bool) -> None:
    python, script = tmp_path / "python3", tmp_path / "vllm"
    for path, text in ((python, ""), (script, begin.format(python=python))):
        path.write_text(text)
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    expected = str(python) if found else None
    assert python_of(["vllm", "serve", "org/name"]) == expected
    assert python_of([str(script), "serve", "org/name"]) == expected
    assert python_of(["python3", "-m", "vllm"]) == str(python), "as the command itself says"
    assert python_of(["python-config", str(script)]) == expected, "the first word is no Python"


def test_an_answer_counts_with_what_its_own_plain_passes_take() -> None:
    # ANSWER has 4 plain passes, and in the replay one of 4 rows and one of 1 row; the other one has no repetition
    unlike = RecordedAnswer((9,), (1, 2, 3, 4, 5, 6), 16)
    found = predicted(SIMPLE, [ANSWER, unlike], TIMES, scales=[3.0, 0.5])
    assert found is not None
    assert found.speedup == pytest.approx((3 * 40.0 + 0.5 * 50.0) / (3 * 23.0 + 0.5 * 50.0))


def test_scales_are_the_passes_of_an_answer_over_the_mean_of_all() -> None:
    # 300 ms for 20 passes: 15 ms in the mean; an answer without a pass says nothing
    assert plain_scales([(10, 100.0), (10, 200.0), (0, 0.0)]) == (15.0, pytest.approx([2 / 3, 4 / 3, 1.0]))
    with pytest.raises(ValueError, match="no answer has passes"):
        plain_scales([(0, 1.0)])


def test_the_rows_of_a_probe_are_those_of_most_of_its_drafts() -> None:
    assert usual_rows({1: 40, 3: 2, 4: 9}) == 4 and usual_rows({1: 5}) == 1
