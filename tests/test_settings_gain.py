"""The choice of engine settings for plain decoding, and what settings and drafting give, on invented figures."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from specplug.bench.arms import Result
from specplug.bench.interleaved import Tally
from specplug.bench.llama_stage import STOCK_NAME, plain_arms
from specplug.bench.plain_settings import chosen, contexts_for, request_lengths
from specplug.bench.settings_gain import ArmSettings, settings_document, whole_request_ratio
from specplug.core import IntArray, int_array
from specplug.planning.request_time import SettingCosts
from specplug.profile import Runtime
from specplug_cli.bench import settings_lines

ON_F16 = Runtime(threads=2, flash_attention=True, kv_type="f16")
ON_BF16 = replace(ON_F16, kv_type="bf16")
OFF_F16 = replace(ON_F16, flash_attention=False)


def costs(ms: float, prompt_ms: float = 1.0) -> SettingCosts:
    return SettingCosts((256,), (1,), ((ms,),), (prompt_ms,), 1)


# -- the choice ------------------------------------------------------------------------------------------------------


def test_the_fastest_setting_for_the_whole_request_is_chosen() -> None:
    """100 prompt tokens and 10 new ones take 100 x 1 + 10 x 10 = 200 ms, or 100 x 2 + 10 x 5 = 250 ms; with 100 new
    ones 1100 ms and 700 ms."""
    table = {ON_BF16: costs(30.0, 3.0), ON_F16: costs(10.0, 1.0), OFF_F16: costs(5.0, 2.0)}
    assert chosen(table, ON_BF16, ON_F16, 100, 10, many=False) == ON_F16
    assert chosen(table, ON_BF16, ON_F16, 100, 100, many=False) == OFF_F16


@pytest.mark.parametrize(("own_ms", "expected"), [(10.1, ON_BF16), (10.3, OFF_F16)])
def test_the_profiles_setting_is_taken_where_it_is_as_good(own_ms: float, expected: Runtime) -> None:
    table = {ON_BF16: costs(own_ms), ON_F16: costs(20.0), OFF_F16: costs(10.0)}
    assert chosen(table, ON_BF16, ON_F16, 0, 50, many=False) == expected


def test_llama_cpps_defaults_come_next() -> None:
    table = {ON_BF16: costs(15.0), ON_F16: costs(10.1), OFF_F16: costs(10.0)}
    assert chosen(table, ON_BF16, ON_F16, 0, 50, many=False) == ON_F16


def test_several_sequences_need_flash_attention() -> None:
    table = {OFF_F16: costs(1.0), ON_F16: costs(20.0), ON_BF16: costs(10.0)}
    assert chosen(table, OFF_F16, ON_F16, 0, 50, many=True) == ON_BF16
    assert chosen({OFF_F16: costs(1.0)}, OFF_F16, ON_F16, 0, 50, many=True) == OFF_F16


def test_nothing_measured_leaves_the_profiles_setting() -> None:
    assert chosen({}, ON_BF16, ON_F16, 100, 50, many=False) == ON_BF16


def test_later_prompts_hold_the_earlier_turns_and_answers() -> None:
    def encode(messages: Sequence[dict[str, str]]) -> IntArray:
        assert len(messages) == 1, "some templates refuse two messages of the user in a row"
        return int_array(list(range(len(messages[0]["content"]))))

    assert request_lengths([("abc", "de"), ("f",)], encode, 100) == [3, 105, 1]


@pytest.mark.parametrize(
    ("tokens", "expected"), [(1, [256]), (256, [256]), (257, [256, 512]), (3000, [256, 4096]), (9000, [256, 4096])]
)
def test_the_contexts_cover_the_longest_request(tokens: int, expected: list[int]) -> None:
    assert contexts_for(tokens) == expected


def test_an_arm_is_opened_for_every_setting_that_differs() -> None:
    assert plain_arms(ON_F16, ON_F16, ON_F16) == {"none": ON_F16}
    assert plain_arms(ON_BF16, ON_BF16, ON_F16) == {"none": ON_BF16, STOCK_NAME: ON_F16}
    own = "none, flash attention on, bf16 cache"
    assert plain_arms(ON_F16, ON_BF16, ON_F16) == {"none": ON_F16, own: ON_BF16}
    assert plain_arms(OFF_F16, ON_BF16, ON_F16) == {"none": OFF_F16, own: ON_BF16, STOCK_NAME: ON_F16}


# -- the gain --------------------------------------------------------------------------------------------------------


class Named:
    """An arm of which only the names matter."""

    def __init__(self, name: str, profile: str | None) -> None:
        self.name = name
        self.profile = profile

    def answer(self, prompts: Sequence[IntArray], max_tokens: int) -> list[Result]:
        raise AssertionError

    def reset(self) -> None:
        raise AssertionError

    def close(self) -> None:
        raise AssertionError


def tally(seconds: float, prompt: float | None = 1.0, tokens: int = 10) -> Tally:
    """One answer; the first arm's has 10 tokens in 2 s."""
    return Tally([tokens], [seconds], [10], [2.0], prompt_seconds=[prompt])


ALL = [Named("none", "none"), Named("own", "none"), Named("stock", "none"), Named("a", "a"), Named("b", "b")]
PEER = Named("llama-cpp-python:plain", None)


def test_settings_and_drafting_by_hand() -> None:
    """Whole requests take 4 + 2 s under the defaults and 1 + 2 s under the best setting. Of the drafting arms b is the
    faster one, 1.6 times as fast as the first arm; the peer, faster still, is no profile. Plain tokens take 2.5 / 2
    times as long under the profiles' setting."""
    sums = [tally(2.0), tally(2.5), tally(2.0, 4.0), tally(1.6), tally(1.25), tally(0.5)]
    document = settings_document(ArmSettings(list("xyzyyy"), 1, 2, "z"), [*ALL, PEER], sums)
    assert document == {
        "plain": "x",
        "profiles": "y",
        "stock": "z",
        "settings_speedup": {"median": 2.0, "low": 2.0, "high": 2.0},
        "drafting_arm": "b",
        "drafting_speedup": {"median": 1.6, "low": 1.6, "high": 1.6},
        "profiles_slowdown": {"median": 1.25, "low": 1.25, "high": 1.25},
    }


def test_the_best_setting_against_itself_gives_one() -> None:
    document = settings_document(ArmSettings(["x"], 0, 0, "x"), ALL[:1], [tally(2.0)])
    assert document["settings_speedup"] == document["profiles_slowdown"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert document["drafting_arm"] is None and document["drafting_speedup"] is None


def test_without_the_defaults_there_is_no_gain_of_settings() -> None:
    document = settings_document(ArmSettings(["x"], 0, None, "z"), ALL[:1], [tally(2.0)])
    assert document["settings_speedup"] is None and document["stock"] == "z"


def test_answers_of_other_lengths_count_by_the_time_of_a_token() -> None:
    """20 tokens in 8 s are 4 s for the 10 tokens of the other answer: (1 + 4) / (1 + 2)."""
    found = whole_request_ratio(tally(2.0), tally(8.0, tokens=20))
    assert found is not None and found.median == pytest.approx(5 / 3)


def test_whole_requests_need_tokens_and_the_time_of_prompts() -> None:
    assert whole_request_ratio(tally(2.0), tally(2.0, None)) is None
    assert whole_request_ratio(tally(2.0), tally(0.0, tokens=0)) is None


# -- the words -------------------------------------------------------------------------------------------------------


def ratio(median: float, low: float, high: float) -> dict[str, float]:
    return {"median": median, "low": low, "high": high}


SETTINGS = {
    "plain": "flash attention off, f16 cache",
    "profiles": "flash attention on, bf16 cache",
    "stock": "flash attention on, f16 cache",
    "settings_speedup": ratio(1.5, 1.4, 1.6),
    "drafting_arm": "default",
    "drafting_speedup": ratio(1.25, 1.2, 1.3),
    "profiles_slowdown": ratio(1.7, 1.6, 1.8),
}


def test_the_lines_name_the_gains_and_what_they_compare() -> None:
    assert settings_lines(SETTINGS) == [
        "engine settings alone: 1.50 (1.40-1.60), drafting on top: 1.25 (1.20-1.30) with default",
        "  settings: whole requests without drafts under flash attention off, f16 cache, against llama.cpp's defaults "
        "(flash attention on, f16 cache)",
        "  drafting: tokens after the first, against plain decoding under flash attention off, f16 cache",
        "the profiles' engine settings (flash attention on, bf16 cache) take 1.70 times as long per plain token as "
        "flash attention off, f16 cache; specplug tune chooses settings and drafts together",
    ]


def test_defaults_that_are_the_best_give_one_by_definition() -> None:
    stock = SETTINGS["stock"]
    same = {**SETTINGS, "plain": stock, "profiles": stock, "profiles_slowdown": ratio(1.0, 1.0, 1.0)}
    first, drafting = settings_lines(same)
    assert first.startswith("engine settings alone: 1.00 (llama.cpp's defaults are the best for plain decoding), draft")
    assert drafting.endswith("against plain decoding under flash attention on, f16 cache")


def test_what_was_not_measured_or_is_not_certain_has_no_line() -> None:
    nothing = {**SETTINGS, "settings_speedup": None, "profiles_slowdown": ratio(1.1, 0.9, 1.3)}
    assert settings_lines(nothing) == []
    plain_only = {**nothing, "settings_speedup": ratio(1.5, 1.4, 1.6), "drafting_arm": None, "drafting_speedup": None}
    first, _ = settings_lines(plain_only)
    assert first == "engine settings alone: 1.50 (1.40-1.60)"
