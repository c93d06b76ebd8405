import os
import resource
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specplug.core import EMPTY, ROOT, Draft, IntArray, Proposer, Stateful, Step, int_array
from specplug.errors import SpecplugError, UsageError
from specplug.proposers.token_recycling import PAPER_TREE, UNKNOWN, TokenRecycling
from specplug.testing import ProposerContract, ToyTarget, replay


class TestContract(ProposerContract):
    def make(self) -> Proposer:
        return TokenRecycling()


class TestContractOfThePaperShape(ProposerContract):
    def make(self) -> Proposer:
        return TokenRecycling(shape="paper")


class TestContractWithManyRanks(ProposerContract):
    def make(self) -> Proposer:
        return TokenRecycling(k=24)


def row(*ids: int) -> list[int]:
    return [*ids, *[UNKNOWN] * (8 - len(ids))]


def ten_of(token: int) -> list[int]:
    """Eight successors that identify their parent: token 3 is followed by 30, 31, ... 37."""
    return [10 * token + rank for rank in range(8)]


def learned(proposer: TokenRecycling, rows: dict[int, list[int]], seq: int = 0) -> None:
    """Begin `seq` and verify a star of tokens after 999, none accepted, so that each has the given row."""
    proposer.begin(seq, int_array([999]))
    star = Draft.of(list(rows), [ROOT] * len(rows), [0] * len(rows))
    topk = int_array(np.array([ten_of(9990), *rows.values()]))
    proposer.observe(seq, Step([998], star, [], topk))


def known(proposer: TokenRecycling, token: int) -> list[int]:
    return list(proposer.shared_matrix[token].tolist())


def root_at(proposer: TokenRecycling, token: int, seq: int = 1) -> None:
    proposer.begin(seq, int_array([token]))


# -- the paper's tree ------------------------------------------------------------------------------------------------


def test_the_papers_tree_has_its_published_shape() -> None:
    nodes = PAPER_TREE.split()
    assert len(nodes) == len(set(nodes)) == 80
    assert [len(line.split()) for line in PAPER_TREE.split("\n") if line.strip()] == [8, 21, 25, 15, 8, 3]
    assert Counter(map(len, nodes)) == {1: 8, 2: 21, 3: 25, 4: 15, 5: 8, 6: 3}
    assert [len(node) for node in nodes] == sorted(len(node) for node in nodes), "nodes are listed level by level"
    assert all(node[:-1] in {"", *nodes} for node in nodes), "every node has its parent"
    assert len(set(nodes) - {node[:-1] for node in nodes}) == 40, "there are 40 leaves"


def test_worked_example_of_the_papers_tree() -> None:
    """If row(t) is 10 t ... 10 t + 7, the digits of a node's token are its path of ranks after the root's digit."""
    proposer = TokenRecycling(shape="paper")
    rows = {token: ten_of(token) for token in [1, *range(10, 18), *range(100, 178), *range(1000, 1778)]}
    rows |= {token: ten_of(token) for token in [10000, 10001, 10002, 100000, 100010, 11000, 12000]}
    learned(proposer, rows)
    root_at(proposer, 1)
    draft = proposer.propose(1, 80)
    path_of = {10 ** len(path) + int(path): path for path in PAPER_TREE.split()}
    paths = [path_of[token] for token in draft.tokens.tolist()]
    assert paths == [path for path in PAPER_TREE.split() if path in paths], "the authors' order"
    assert {path for path in PAPER_TREE.split() if len(path) <= 4} <= set(paths)
    for path, parent in zip(paths, draft.parents.tolist(), strict=True):
        assert path[:-1] == ("" if parent == ROOT else paths[parent])


def test_the_complete_tree_of_known_rows() -> None:
    proposer = TokenRecycling(shape="paper")
    learned(proposer, {token: [(token + rank) % 8 + 1 for rank in range(8)] for token in range(1, 9)})
    root_at(proposer, 1)
    draft = proposer.propose(1, 80)
    assert np.bincount(draft.depths()).tolist() == [0, 8, 21, 25, 15, 8, 3]
    for budget in range(80):
        smaller = proposer.propose(1, budget)
        smaller.check()
        assert len(smaller) == budget


def test_unknown_rows_are_skipped() -> None:
    """The authors' matrix of zeros would draft token 0 below every unknown row."""
    for shape in ("paper", "best_first"):
        proposer = TokenRecycling(shape=shape)  # type: ignore[arg-type]
        learned(proposer, {1: ten_of(1)})
        root_at(proposer, 1)
        draft = proposer.propose(1, 80)
        assert sorted(draft.tokens.tolist()) == ten_of(1)
        assert set(draft.parents.tolist()) == {ROOT}
        root_at(proposer, 77, seq=2)
        assert len(proposer.propose(2, 80)) == 0


# -- the update ------------------------------------------------------------------------------------------------------


def test_worked_example_of_the_update() -> None:
    """The paper's rule: the top ids after every verified token replace its row, even if the token was rejected."""
    proposer = TokenRecycling()
    proposer.begin(0, int_array([5]))
    draft = Draft.of([6, 7, 8], [ROOT, ROOT, 0], [0, 0, 0])
    topk = int_array(np.array([ten_of(5), ten_of(6), ten_of(7), ten_of(8)]))
    proposer.observe(0, Step([6, 60], draft, [0], topk))
    assert [known(proposer, token) for token in (5, 6, 7, 8)] == [ten_of(5), ten_of(6), ten_of(7), ten_of(8)]
    proposer.observe(0, Step([70], EMPTY, [], int_array(np.array([ten_of(100)]))))
    assert known(proposer, 60) == ten_of(100)
    assert known(proposer, 7) == ten_of(7), "other rows do not change"


@pytest.mark.parametrize(
    ("tokens", "parents", "accepted", "row_of_7"),
    [
        ([7, 7], [ROOT, 0], [0, 1], 2),  # both accepted: the deeper
        ([7, 7], [ROOT, 0], [0], 1),  # the deeper was rejected
        ([6, 7, 7], [ROOT, ROOT, 0], [0, 2], 3),  # the later was accepted
        ([7, 6, 7], [ROOT, ROOT, 1], [0], 1),  # the later was rejected
        ([6, 7, 7], [ROOT, ROOT, 0], [], 3),  # neither was accepted: node order
    ],
)
def test_rejected_rows_never_replace_accepted_ones(
    tokens: list[int], parents: list[int], accepted: list[int], row_of_7: int
) -> None:
    proposer = TokenRecycling()
    proposer.begin(0, int_array([5]))
    topk = int_array(np.array([ten_of(100 + i) for i in range(len(tokens) + 1)]))
    emitted = [*(tokens[node] for node in accepted), 9]
    proposer.observe(0, Step(emitted, Draft.of(tokens, parents, [0] * len(tokens)), accepted, topk))
    assert known(proposer, 7) == ten_of(100 + row_of_7)


def test_the_roots_row_counts_as_accepted() -> None:
    proposer = TokenRecycling()
    proposer.begin(0, int_array([7]))
    topk = int_array(np.array([ten_of(1), ten_of(2)]))
    proposer.observe(0, Step([9], Draft.of([7], [ROOT], [0]), [], topk))
    assert known(proposer, 7) == ten_of(1)


def test_more_and_fewer_top_ids_than_required() -> None:
    """In a fusion other proposers may require more ids, or fewer while this one is not asked."""
    proposer = TokenRecycling()
    proposer.begin(0, int_array([5]))
    proposer.observe(0, Step([6], EMPTY, [], int_array([[*ten_of(5), 91, 92]])))
    proposer.observe(0, Step([7], EMPTY, [], int_array([[61, 62]])))
    assert known(proposer, 5) == ten_of(5)
    assert known(proposer, 6) == row(61, 62)


def test_without_top_ids_the_emitted_pairs_move_to_the_front() -> None:
    proposer = TokenRecycling()
    learned(proposer, {5: ten_of(5)})
    root_at(proposer, 5)
    proposer.observe(1, Step([53, 4], EMPTY, []))
    assert known(proposer, 5) == [53, 50, 51, 52, 54, 55, 56, 57], "a known successor is moved"
    assert known(proposer, 53) == row(4), "an unknown row is begun"
    root_at(proposer, 5, seq=2)
    proposer.observe(2, Step([99], EMPTY, []))
    assert known(proposer, 5) == [99, 53, 50, 51, 52, 54, 55, 56], "for a new successor the last one is dropped"


# -- the prompt ------------------------------------------------------------------------------------------------------


def test_pairs_of_the_prompt_fill_unknown_rows_latest_first() -> None:
    proposer = TokenRecycling()
    proposer.begin(0, int_array([1, 2, 1, 3, 1, 4, 1, 2, 1]))
    assert known(proposer, 1) == row(2, 4, 3)
    assert known(proposer, 2) == row(1)
    assert proposer.propose(0, 1).tokens.tolist() == [2]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60))
def test_a_row_from_the_prompt_is_the_distinct_successors_latest_first(text: list[int]) -> None:
    proposer = TokenRecycling(k=3)
    proposer.begin(0, int_array(text))
    for token in range(6):
        followers = [text[i + 1] for i in range(len(text) - 2, -1, -1) if text[i] == token]
        expected = list(dict.fromkeys(followers))[:3]
        assert proposer._successors(token)[0] == expected


def test_the_prompt_does_not_change_learned_rows() -> None:
    proposer = TokenRecycling()
    learned(proposer, {1: ten_of(1)})
    proposer.begin(1, int_array([1, 2, 1, 3, 2]))
    assert known(proposer, 1) == ten_of(1)
    assert known(proposer, 2) == row(1)


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=40), max_size=5), st.booleans())
def test_rows_are_distinct_ids_then_unknown(texts: list[list[int]], short: bool) -> None:
    """Drafting relies on it, for any mixture of prompts, pairs and top ids."""
    proposer = TokenRecycling(k=3)
    for seq, text in enumerate(texts):
        proposer.begin(seq, int_array(text))
        proposer.observe(seq, Step(text[:2], EMPTY, []))
        topk = int_array([[text[-1], text[-1] + 1, text[-1] + 2][: 2 if short else 3]])
        proposer.observe(seq, Step(text[-1:], EMPTY, [], topk))
    for ids in proposer.shared_matrix.tolist():
        filled = [token for token in ids if token != UNKNOWN]
        assert len(set(filled)) == len(filled)
        assert ids == filled + [UNKNOWN] * (3 - len(filled))


# -- best-first growth and its counts --------------------------------------------------------------------------------


def brute_force(proposer: TokenRecycling, root: int, budget: int) -> list[float]:
    """The path probabilities of the likeliest nodes, from all paths of at most `budget` nodes."""
    found: list[float] = []
    level = [(root, 1.0)]
    for _ in range(budget):
        below = []
        for token, path in level:
            if token >= len(proposer.shared_matrix):
                continue
            kind = int(proposer.shared_kind[token])
            for rank, child in enumerate(known(proposer, token)):
                if child != UNKNOWN:
                    below.append((child, path * proposer.shared_probability[kind][rank]))
        found += [path for _, path in below]
        level = below
    return sorted(found, reverse=True)[:budget]


def test_grows_the_likeliest_nodes_first() -> None:
    proposer = TokenRecycling(k=3)
    proposer.begin(0, int_array([999]))
    rows = {1: [2, 3, 4], 2: [1, 3, 5], 3: [4, 2, 1], 4: [1, 5, 6]}
    star = Draft.of(list(rows), [ROOT] * 4, [0] * 4)
    proposer.observe(0, Step([998], star, [], int_array([[7, 8, 9], *rows.values()])))
    root_at(proposer, 1)
    priors = [bucket.prior for bucket in proposer.buckets]
    for budget in range(1, 8):
        draft = proposer.propose(1, budget)
        draft.check()
        path: list[float] = []
        for parent, bucket in zip(draft.parents.tolist(), draft.buckets.tolist(), strict=True):
            path.append(priors[bucket] * (1.0 if parent == ROOT else path[parent]))
        assert path == sorted(path, reverse=True)
        assert path == pytest.approx(brute_force(proposer, 1, budget))


def test_tokens_whose_first_rank_was_right_recently_are_more_reliable() -> None:
    """Two tokens have equal rows. After rank 0 of one was right three times, its child is likelier than the other's."""
    proposer = TokenRecycling()
    learned(proposer, {1: ten_of(1), 2: ten_of(2)})
    names = {}
    for token, emitted in ((1, 10), (2, 29)):
        for seq in range(10, 13):
            root_at(proposer, token, seq)
            proposer.observe(seq, Step([emitted], EMPTY, [], int_array([ten_of(token)])))
        root_at(proposer, token, token + 50)
        first = proposer.buckets[int(proposer.propose(token + 50, 1).buckets[0])]
        names[token] = first
    assert names[1].name == "row 3 rank 0"
    assert names[2].name == "row 0 rank 0"
    assert names[1].prior > names[2].prior


def test_buckets_name_rank_and_origin() -> None:
    proposer = TokenRecycling()
    proposer.begin(0, int_array([1, 2, 1]))
    assert proposer.buckets[int(proposer.propose(0, 1).buckets[0])].name == "pair 1 rank 0"
    assert len(proposer.buckets) == 64
    for kind in range(8):
        ranks = [bucket.prior for bucket in proposer.buckets[8 * kind : 8 * kind + 8]]
        assert ranks == sorted(ranks, reverse=True)
        assert sum(ranks) <= 1.0, "at most one of several siblings is accepted"


def test_counted_probabilities_approach_the_frequencies() -> None:
    """Rank 1 was right every time: its decayed share after n observations is 1 - (1 - prior) * 0.99 ** n."""
    proposer = TokenRecycling()
    learned(proposer, {1: ten_of(1)})
    for seq in range(10, 13):  # after three misses of rank 0 the counter is 0
        root_at(proposer, 1, seq)
        proposer.observe(seq, Step([11], EMPTY, [], int_array([ten_of(1)])))
    before = proposer.shared_probability[4][1]
    for seq in range(20, 320):
        root_at(proposer, 1, seq)
        proposer.observe(seq, Step([11], EMPTY, [], int_array([ten_of(1)])))
    assert proposer.shared_probability[4][1] == pytest.approx(1 - (1 - before) * 0.99**300)
    assert proposer.shared_probability[4][1] > 0.9


def test_acceptance_floor() -> None:
    """Every token of the toy target has three successors: three draft tokens after each root always include the next.

    With rows of eight ids, every budget of 3 or more accepts at least one draft token once the rows are known.
    """
    target = ToyTarget(64, seed=11)
    prompt = target.prompt(16)
    text = target.greedy(prompt.tolist(), 400)
    proposer = TokenRecycling()

    def topk(tokens: Sequence[int]) -> IntArray:
        return target.topk(tokens, 8)

    replay(proposer, prompt, text, 12, topk)
    warm = replay(proposer, prompt, text, 12, topk)
    assert warm.mean_acceptance_length >= 2.0
    plain = replay(TokenRecycling(shape="paper"), prompt, text, 80, topk)
    assert plain.mean_acceptance_length >= 2.0


# -- saving and loading ----------------------------------------------------------------------------------------------

HASH, OTHER = "a" * 64, "b" * 64


@pytest.fixture
def warm() -> TokenRecycling:
    proposer = TokenRecycling()
    target = ToyTarget(64, seed=5)
    prompt = target.prompt(16)
    replay(proposer, prompt, target.greedy(prompt.tolist(), 60), 12, lambda tokens: target.topk(tokens, 8))
    return proposer


def drafts(proposer: TokenRecycling) -> list[list[int]]:
    found = []
    for token in range(64):
        root_at(proposer, token, seq=token + 1000)
        draft: Draft = proposer.propose(token + 1000, 16)
        found.append([*draft.tokens.tolist(), *draft.parents.tolist(), *draft.buckets.tolist()])
        proposer.end(token + 1000)
    return found


def test_state_round_trip(warm: TokenRecycling) -> None:
    assert isinstance(warm, Stateful)
    fresh = TokenRecycling()
    fresh.load_state(warm.state())
    assert drafts(fresh) == drafts(warm)
    assert any(drafts(fresh)), "something was learned"


def test_state_with_ids_that_were_never_looked_up() -> None:
    """Top ids lie anywhere in the vocabulary, and the matrix ends where the emitted tokens do."""
    proposer = TokenRecycling()
    proposer.begin(0, int_array([5]))
    proposer.observe(0, Step([6], EMPTY, [], int_array([ten_of(4000)])))
    fresh = TokenRecycling()
    fresh.load_state(proposer.state())
    assert known(fresh, 5) == ten_of(4000)


def test_state_is_a_copy(warm: TokenRecycling) -> None:
    state = warm.state()
    before = drafts(warm)
    state["matrix"][:] = 0
    state["kind"][:] = 0
    assert drafts(warm) == before


def matrix(*rows: list[int]) -> IntArray:
    return int_array(np.array(rows))


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("matrix", np.zeros((64, 4), dtype=np.int32), "k is 8"),
        ("matrix", np.zeros((64, 8), dtype=np.float32), "float32"),
        ("matrix", matrix(row(1, 1), row(0)), "repeats an id or has a gap"),
        ("matrix", matrix(row(UNKNOWN, 1), row(0)), "repeats an id or has a gap"),
        ("matrix", matrix(row(2), row(0)), "outside its vocabulary"),
        ("matrix", matrix(row(-2), row(0)), "outside its vocabulary"),
        ("kind", np.full(2, 8, dtype=np.int8), "kind is out of range"),
        ("kind", np.full(2, -1, dtype=np.int8), "kind is out of range"),
        ("kind", np.zeros(3, dtype=np.int8), "the matrix has 2 rows"),
        ("probability", np.full((8, 8), 1.5), "probability is out of range"),
        ("probability", np.full((8, 8), np.nan), "probability is out of range"),
        ("probability", np.zeros((4, 8)), "probability is float64"),
        ("probability", None, "probability is missing"),
    ],
)
def test_states_that_do_not_fit_are_refused(name: str, value: np.ndarray | None, complaint: str) -> None:
    state = {
        "matrix": matrix(row(1), row(0)),
        "kind": np.zeros(2, dtype=np.int8),
        "probability": np.full((8, 8), 0.1),
    }
    TokenRecycling().load_state(state)
    if value is None:
        del state[name]
    else:
        state[name] = value
    proposer = TokenRecycling()
    with pytest.raises(ValueError, match=complaint):
        proposer.load_state(state)
    assert len(proposer.shared_matrix) == 0, "nothing was loaded"


def test_file_round_trip(warm: TokenRecycling, tmp_path: Path) -> None:
    path = tmp_path / "warm.npz"
    warm.save(path, HASH)
    assert drafts(TokenRecycling(warm=str(path), tokenizer_hash=HASH)) == drafts(warm)
    assert os.listdir(tmp_path) == ["warm.npz"]


def test_a_file_for_another_tokenizer_is_refused(warm: TokenRecycling, tmp_path: Path) -> None:
    path = tmp_path / "warm.npz"
    warm.save(path, HASH)
    with pytest.raises(UsageError, match="made for tokenizer aaaaaaaaaaaa, the model has bbbbbbbbbbbb"):
        TokenRecycling().load(path, OTHER)


def test_a_file_of_another_k_is_refused(warm: TokenRecycling, tmp_path: Path) -> None:
    path = tmp_path / "warm.npz"
    warm.save(path, HASH)
    with pytest.raises(UsageError, match="k is 4"):
        TokenRecycling(k=4).load(path, HASH)


def test_warm_requires_the_hash_of_the_tokenizer() -> None:
    with pytest.raises(UsageError, match="tokenizer_hash"):
        TokenRecycling(warm="warm.npz")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.npz: cannot read"):
        TokenRecycling().load(tmp_path / "absent.npz", HASH)


def test_damaged_files_are_refused(warm: TokenRecycling, tmp_path: Path) -> None:
    """They are cut anywhere, filled with something else, or have inverted bytes in the middle."""
    path = tmp_path / "warm.npz"
    warm.save(path, HASH)
    complete = path.read_bytes()
    middle = len(complete) // 2
    flipped = complete[:middle] + bytes(byte ^ 0xFF for byte in complete[middle : middle + 8]) + complete[middle + 8 :]
    for content in (b"", b"not a matrix", complete[:10], complete[:middle], complete[:-1], flipped):
        path.write_bytes(content)
        proposer = TokenRecycling()
        with pytest.raises(UsageError, match=r"warm\.npz: "):
            proposer.load(path, HASH)
        assert len(proposer.shared_matrix) == 0


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "warm.npz"
    np.savez(path, tokenizer_hash=np.array(HASH), matrix=np.array([{}], dtype=object))
    with pytest.raises(UsageError, match="damaged, or not a recycling matrix"):
        TokenRecycling().load(path, HASH)


def test_on_a_full_disk_the_old_file_stays(warm: TokenRecycling, tmp_path: Path) -> None:
    path = tmp_path / "warm.npz"
    warm.save(path, HASH)
    before = path.read_bytes()
    assert len(before) > 64
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        with pytest.raises(SpecplugError, match=r"warm\.npz: cannot be written"):
            warm.save(path, OTHER)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["warm.npz"]


def test_paths_that_cannot_be_written_are_refused(warm: TokenRecycling, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecplugError, match="cannot be written"):
        warm.save(tmp_path / "file" / "warm.npz", HASH)
    for path in (tmp_path, Path("/dev/full")):
        with pytest.raises(UsageError, match="not a file"):
            warm.save(path, HASH)
    assert os.listdir(tmp_path) == ["file"]
    assert Path("/dev/full").is_char_device()


@pytest.mark.parametrize("options", [{"k": 0}, {"k": 65}, {"k": 4, "shape": "paper"}])
def test_options_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="k is"):
        TokenRecycling(**options)  # type: ignore[arg-type]
