"""What is said to do about a text that is longer than the context."""

import pytest

from specplug.generation.context_advice import ROOM, context_advice


@pytest.mark.parametrize(
    ("tokens", "trained", "advice"),
    [
        (1024, 0, "raise it with --context 2048"),
        (1024, 8192, "raise it with --context 2048"),
        (2048 - ROOM, 8192, "raise it with --context 2048"),
        (2048 - ROOM + 1, 8192, "raise it with --context 4096"),
        (5000, 6144, "raise it with --context 6144"),  # and not 8192, which the model was not trained for
        (6143, 6144, "raise it with --context 6144"),
        (6144, 6144, "the model was trained for 6144, so shorten the prompt"),
        (9000, 6144, "the model was trained for 6144, so shorten the prompt"),
        (9000, 0, "raise it with --context 16384"),
    ],
)
def test_the_advice_is_a_context_that_holds_the_text_or_says_that_there_is_none(
    tokens: int, trained: int, advice: str
) -> None:
    assert context_advice(tokens, trained) == advice
