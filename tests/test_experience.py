"""The experience with a drafter by kind of text, in numbers worked out by hand."""

import json

import pytest

from specplug.core import int_array
from specplug.planning.constants import (
    ANSWER_LENGTH,
    MOST_KINDS,
    MOST_LENGTHS,
    MOST_SAVING_TOKENS,
    SAVING_PRIOR_TOKENS,
)
from specplug.planning.experience import Experience

TEMPLATE = [1, 2, 3]


def test_a_prompt_of_another_shape_starts_a_beginning_of_its_own() -> None:
    """A text without the chat template does not change what is known of texts with it."""
    one = Experience()
    for number in (40, 41):
        known = one.kind_of(int_array([*TEMPLATE, 7, 7, 7, number]))
        other = one.kind_of(int_array([*TEMPLATE, 8, 8, 8, number]))
    one.kind_of(int_array([1, 60, 61, 62, 63, 64, 65]))
    one.kind_of(int_array([9, 9, 9, 9, 9, 9, 9]))
    assert one.kind_of(int_array([*TEMPLATE, 7, 7, 7, 42])) == known != other
    assert one.kind_of(int_array([*TEMPLATE, 8, 8, 8, 42])) == other


def test_kinds_of_raw_prompts_differ_after_the_token_that_begins_every_text() -> None:
    one = Experience()
    one.kind_of(int_array([1, 50, 51, 52, 53, 54]))
    kinds = [one.kind_of(int_array([1, *own])) for own in ([7, 7, 7, 1, 2], [8, 8, 8, 1, 2], [7, 7, 7, 3, 4])]
    assert kinds[0] == kinds[2] != kinds[1]


def test_a_file_contains_no_tokens() -> None:
    one = Experience()
    for number in range(3):
        one.learn_length(one.kind_of(int_array([*TEMPLATE, 40_001, 40_002, 40_003, number])), 5)
    text = json.dumps(one.as_mapping())
    assert "4000" not in text


def test_kinds_are_told_apart_by_the_first_tokens_in_which_prompts_differ() -> None:
    one = Experience()
    one.kind_of(int_array([*TEMPLATE, 7, 7, 7, 40]))
    kinds = [one.kind_of(int_array([*TEMPLATE, *own])) for own in ([7, 7, 7, 41], [8, 7, 7, 42], [7, 7, 7, 43])]
    assert kinds[0] != kinds[1]
    assert one.kind_of(int_array([*TEMPLATE, 7, 7, 7, 44])) == kinds[2]


@pytest.mark.parametrize(("length", "same"), [(70, True), (250, True), (63, False), (256, False)])
def test_prompts_of_other_lengths_are_of_another_kind(length: int, same: bool) -> None:
    one = Experience()
    one.kind_of(int_array([1, 2, 5]))
    known = one.kind_of(int_array([1, 2, *[7] * 98]))
    assert (one.kind_of(int_array([1, 2, *[7] * (length - 2)])) == known) == same


def test_what_is_expected_of_a_kind_moves_from_the_prior_to_what_was_measured() -> None:
    one = Experience()
    assert one.saving("a", 0.3) == pytest.approx(0.3)
    one.learn_saving("a", -0.5, SAVING_PRIOR_TOKENS)
    # The kind counts half among kinds, beside two for the prior; and half against what is expected of kinds.
    kinds = (2 * 0.3 - 0.5 * 0.5) / 2.5
    assert one.saving("b", 0.3) == pytest.approx(kinds)
    assert one.saving("a", 0.3) == pytest.approx((kinds - 0.5) / 2)


def test_old_measurements_of_a_kind_give_way_to_new_ones() -> None:
    one = Experience()
    for _ in range(1000):
        one.learn_saving("a", -0.5, 10)
    for _ in range(200):
        one.learn_saving("a", 0.5, 10)
    assert one.saving("a", 0.0) > 0.4
    assert one.as_mapping()["kinds"]["a"]["tokens"] == MOST_SAVING_TOKENS


def test_the_rest_of_an_answer_is_that_of_longer_answers_of_its_kind() -> None:
    one = Experience()
    assert one.remaining("a", 1, 1000) == ANSWER_LENGTH
    assert one.remaining("a", 1, 5) == 5.0
    assert one.remaining("a", 100, 1000) == 100.0, "as many again, where no answer was longer"
    for length in (20, 60, 101):
        one.learn_length("a", length)
    one.learn_length("b", 500)
    # Counted beside one answer that has as many tokens left as it has now, or ANSWER_LENGTH.
    assert one.remaining("a", 50, 1000) == pytest.approx((10 + 51 + 50) / 3)
    assert one.remaining("c", 50, 1000) == pytest.approx((10 + 51 + 450 + 50) / 4), "those of all kinds"
    assert one.remaining("a", 200, 1000) == pytest.approx((300 + 200) / 2)


def test_it_is_bounded_and_survives_a_file() -> None:
    one = Experience()
    prompt = int_array([1, 2, 3])
    one.kind_of(prompt)
    for number in range(2 * MOST_KINDS):
        one.learn_length(f"kind {number}", number)
        one.learn_saving(f"kind {number}", 0.1, 5)
    for _ in range(2 * MOST_LENGTHS):
        one.learn_length(f"kind {2 * MOST_KINDS - 1}", 9)
    data = one.as_mapping()
    assert len(data["kinds"]) == MOST_KINDS and max(len(kind["lengths"]) for kind in data["kinds"].values()) == 32
    assert Experience.from_mapping(json.loads(json.dumps(data))).as_mapping() == data


@pytest.mark.parametrize(
    "wrong",
    [
        "{}",
        '{"lengths": [], "kinds": {"a": {}}}',
        '{"lengths": 3, "kinds": {}}',
        '{"lengths": [Infinity], "kinds": {}}',
        '{"lengths": [-1], "kinds": {}}',
        '{"lengths": [], "kinds": {"a": {"saving": NaN, "tokens": 1, "lengths": []}}}',
        '{"lengths": [], "kinds": {"a": {"saving": 0.1, "tokens": -24, "lengths": []}}}',
    ],
)
def test_other_data_is_refused(wrong: str) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        Experience.from_mapping(json.loads(wrong))
