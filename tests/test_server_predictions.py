"""The time of passes from whole answers, and what is predicted from it; the expectations are sums done by hand."""

import pytest

from specplug.subjects.help_text import parse_help
from specplug.tune.server_flags.answer_replay import RecordedAnswer, Replayed
from specplug.tune.server_flags.pass_times import PassTimes, fitted
from specplug.tune.server_flags.run_choice import to_run, with_chains
from specplug.tune.server_flags.server_candidates import Candidate, Drafts, RuleSizes, llama_candidates
from specplug.tune.server_flags.server_predictions import Predicted, drafter_token_ms, passes_ms, predicted
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
    measured = [(Replayed(10, 20, 5, {1: 5, 5: 5}), 150.0), (Replayed(10, 20, 5, {1: 5, 5: 5}), 170.0)]
    assert drafter_token_ms(measured, TIMES) == pytest.approx((30.0 + 50.0) / 40)
    assert drafter_token_ms([(Replayed(3, 0, 0, {1: 2}), 30.0)], TIMES) == 0.0


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
    assert drafting[0].flags == (
        *("--spec-type", "draft-simple", "--spec-draft-model", "small.gguf", "--spec-draft-n-max", "1"),
    )
    assert all("p-min" not in " ".join(one.flags) for one in drafting), "this build has no such flag"


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
        *("--spec-draft-model", "small.gguf", "--spec-draft-n-max", "4"),
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
        frozenset({"num_speculative_tokens_per_batch_size", "enable_adaptive_verification"}),
        suffix=True,
        plugin=(("suffix", 3, ("--speculative-config", "{}")),),
    )
    found, missing = vllm_candidates(full, drafters=["org/small"], levels=(1, 8))
    assert {one.family for one in found} == {
        *("ngram", "ngram, by batch size", "suffix", "specplug's suffix", "small", "small, adaptive")
    }
    assert missing == []
    three = next(one for one in found if one.rules == (RuleSizes("vllm-ngram", (3, 2, 4)),))
    assert three.flags == (
        "--speculative-config",
        '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 2, "prompt_lookup_max": 4}',
    )
    assert not three.bounded
