from hypothesis import given
from hypothesis import strategies as st

from specplug.proposers.suffix_index import LEVELS, MAX_MATCH, Occurrence, SuffixIndex, continuation

EVERY = 10_000
texts = st.lists(st.integers(0, 3), max_size=80)


def by_search(tokens: list[int], context: list[int], levels: tuple[int, ...] = LEVELS) -> list[Occurrence]:
    """The result of `find_longest` by definition: the context is compared with the text before every position."""
    found = []
    for end in range(len(tokens) - 1, 0, -1):
        length = 0
        while length < min(end, len(context), MAX_MATCH) and tokens[end - 1 - length] == context[-1 - length]:
            length += 1
        found.append((end, length))
    reached = [n for n in levels if any(length >= n for _, length in found)]
    return [(end, length) for end, length in found if length >= max(reached)] if reached else []


@given(texts)
def test_the_own_text_is_searched_completely(tokens: list[int]) -> None:
    index = SuffixIndex()
    index.append(tokens)
    assert index.find_longest(index.tokens, EVERY) == by_search(tokens, tokens)


@given(texts, texts)
def test_another_context_is_searched_completely(tokens: list[int], context: list[int]) -> None:
    index = SuffixIndex((2, 3, 5))
    index.append(tokens)
    assert index.find_longest(context, EVERY) == by_search(tokens, context, (2, 3, 5))


@given(st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=12))
def test_appending_in_pieces_gives_the_same_result(pieces: list[list[int]]) -> None:
    grown = SuffixIndex(capacity=2)
    for piece in pieces:
        grown.append(piece)
        grown.find_longest(grown.tokens, 1)
    tokens = [token for piece in pieces for token in piece]
    assert grown.find_longest(tokens, EVERY) == by_search(tokens, tokens)


@given(texts, texts, st.data())
def test_dropped_tokens_are_not_found_and_all_others_are(
    tokens: list[int], more: list[int], data: st.DataObject
) -> None:
    index = SuffixIndex(capacity=4)
    index.append(tokens)
    n = data.draw(st.integers(0, len(tokens)))
    index.drop(n)
    assert index.tokens == tokens[n:]
    assert index.find_longest(tokens, EVERY) == by_search(tokens[n:], tokens)
    index.append(more)
    kept = tokens[n:] + more
    assert index.find_longest(kept, EVERY) == by_search(kept, kept)


def test_the_most_recent_occurrences_are_kept_up_to_the_limit() -> None:
    index = SuffixIndex()
    index.append([7, 1, 8, 1, 9, 1])
    assert index.find_longest(index.tokens, 1) == [(4, 1)]
    assert index.find_longest(index.tokens, 5) == [(4, 1), (2, 1)]


def test_matches_are_measured_up_to_the_maximum() -> None:
    index = SuffixIndex()
    index.append([5] * 100)
    assert index.find_longest(index.tokens, 1) == [(99, 64)]


def test_an_empty_index_finds_nothing() -> None:
    assert SuffixIndex().find_longest([1, 2], 4) == []
    single = SuffixIndex()
    single.append([1])
    assert single.find_longest([1], 4) == []


def test_a_continuation_repeats_where_the_text_ends() -> None:
    assert continuation([1, 2, 3, 4], 1, 2) == [2, 3]
    assert continuation([1, 2, 3, 4], 2, 5) == [3, 4, 3, 4, 3]
