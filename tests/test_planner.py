from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specplug.core import EMPTY, NO_LIMITS, ROOT, Bucket, Draft, DraftLimits
from specplug.planning.acceptance import AcceptanceTable
from specplug.planning.constants import MIN_SPEEDUP
from specplug.planning.cost import CostCurve
from specplug.planning.even_chains import best_length
from specplug.planning.planner import Plan, Planner, best_nodes

Node = tuple[int, int]
"""Sequence and node."""

FLAT = [10.0] * 16
STEEP = [float(10 * rows) for rows in range(1, 17)]


def curve(ms: Sequence[float]) -> CostCurve:
    return CostCurve([0], range(1, len(ms) + 1), [ms])


def planner(
    probabilities: Sequence[float],
    ms: Sequence[float],
    *,
    max_nodes: int = 64,
    trees: bool = True,
    static: bool = False,
    limits: DraftLimits = NO_LIMITS,
) -> Planner:
    table = AcceptanceTable([Bucket(f"bucket {i}", p) for i, p in enumerate(probabilities)])
    return Planner(table, curve(ms), max_nodes=max_nodes, trees=trees, static=static, limits=limits)


def forest(parents: Sequence[Sequence[int]]) -> list[Draft]:
    """One draft per list of parents. Tokens and buckets number the nodes of all drafts, which identifies each."""
    drafts, first = [], 0
    for line in parents:
        ids = range(first, first + len(line))
        drafts.append(Draft.of(ids, line, ids))
        first += len(line)
    return drafts


def chosen(plan: Plan) -> set[int]:
    return {token for draft in plan.drafts for token in draft.tokens.tolist()}


def worth(parents: Sequence[Sequence[int]], probabilities: Sequence[float]) -> list[list[float]]:
    """The path probability of every node, multiplied up to the root."""
    found, first = [], 0
    for line in parents:
        found.append([])
        for node in range(len(line)):
            product, at = 1.0, node
            while at != ROOT:
                product *= probabilities[first + at]
                at = line[at]
            found[-1].append(product)
        first += len(line)
    return found


def subtrees(parents: Sequence[Sequence[int]]) -> Iterator[tuple[Node, ...]]:
    """Every set of nodes that contains the parents of all of them."""
    nodes = [(seq, node) for seq, line in enumerate(parents) for node in range(len(line))]
    for count in range(len(nodes) + 1):
        for some in combinations(nodes, count):
            if all(parents[seq][node] == ROOT or (seq, parents[seq][node]) in some for seq, node in some):
                yield some


def best_rate(
    parents: Sequence[Sequence[int]], paths: Sequence[Sequence[float]], ms: Sequence[float], max_nodes: int
) -> float:
    """The most expected tokens per millisecond of any allowed subtrees, or that of plain decoding within the margin."""
    sequences = len(parents)
    plain = sequences / ms[sequences - 1]
    best = max(
        (sequences + sum(paths[seq][node] for seq, node in some)) / ms[sequences + len(some) - 1]
        for some in subtrees(parents)
        if len(some) <= max_nodes and sequences + len(some) <= len(ms)
    )
    return best if best > MIN_SPEEDUP * plain else plain


@st.composite
def parent_lists(draw: st.DrawFn) -> list[list[int]]:
    """One or two trees, of at most seven nodes together."""
    first = draw(st.integers(0, 7))
    sizes = [first, draw(st.integers(0, 7 - first))][: draw(st.integers(1, 2))]
    return [[draw(st.integers(ROOT, node - 1)) for node in range(size)] for size in sizes]


chances = st.lists(st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0.0, 1.0)), min_size=7, max_size=7)
costs = st.lists(st.floats(1.0, 30.0), min_size=2, max_size=10)


# -- the best subtrees -----------------------------------------------------------------------------------------------


@given(parent_lists(), chances, costs, st.integers(1, 8))
def test_best_nodes_equals_brute_force(
    parents: list[list[int]], probabilities: list[float], ms: list[float], max_nodes: int
) -> None:
    paths = worth(parents, probabilities)
    ranked, count = best_nodes(forest(parents), paths, ms, max_nodes)
    nodes = {(seq, node) for _, seq, node in ranked[:count]}
    assert len(nodes) == count <= max_nodes
    assert all(parents[seq][node] == ROOT or (seq, parents[seq][node]) in nodes for seq, node in nodes)
    sequences = len(parents)
    rate = (sequences + sum(paths[seq][node] for seq, node in nodes)) / ms[sequences + count - 1]
    assert rate == pytest.approx(best_rate(parents, paths, ms, max_nodes))


@given(parent_lists(), chances, costs, st.integers(1, 8))
def test_a_plan_equals_brute_force(
    parents: list[list[int]], probabilities: list[float], ms: list[float], max_nodes: int
) -> None:
    paths = worth(parents, probabilities)
    plan = planner(probabilities, ms, max_nodes=max_nodes).plan(forest(parents), 0)
    assert_is_a_plan(plan, parents)
    sequences, nodes = len(parents), chosen(plan)
    flat = [p for line in paths for p in line]
    assert len(nodes) <= max_nodes
    assert plan.rows == sequences + len(nodes) <= len(ms)
    assert plan.expected_tokens == pytest.approx(sequences + sum(flat[node] for node in nodes))
    assert plan.expected_ms == pytest.approx(ms[plan.rows - 1])
    assert plan.expected_tokens / plan.expected_ms == pytest.approx(best_rate(parents, paths, ms, max_nodes))


def assert_is_a_plan(plan: Plan, parents: Sequence[Sequence[int]]) -> None:
    """One well-formed draft per sequence, in which every node has the parent that it had."""
    assert len(plan.drafts) == len(parents)
    first = 0
    for draft, line in zip(plan.drafts, parents, strict=True):
        draft.check()
        ids = draft.tokens.tolist()
        assert draft.buckets.tolist() == ids
        assert set(ids) <= set(range(first, first + len(line)))
        for token, parent in zip(ids, draft.parents.tolist(), strict=True):
            old = line[token - first]
            assert (ROOT if parent == ROOT else ids[parent]) == (ROOT if old == ROOT else first + old)
        first += len(line)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("trees", [False, True])
def test_empty_drafts(trees: bool, static: bool) -> None:
    plan = planner([], STEEP, trees=trees, static=static).plan([EMPTY] * 3, 0)
    assert [len(draft) for draft in plan.drafts] == [0, 0, 0]
    assert (plan.rows, plan.expected_tokens, plan.expected_ms) == (3, 3.0, 30.0)


def test_nothing_is_verified_where_nothing_pays() -> None:
    """Twice the rows take twice the time: a draft token that is accepted in 99 of 100 cases loses."""
    plan = planner([0.99, 0.99, 0.99], STEEP).plan(forest([[ROOT, 0], [ROOT]]), 0)
    assert chosen(plan) == set()
    assert (plan.rows, plan.expected_tokens, plan.expected_ms) == (2, 2.0, 20.0)


def test_everything_is_verified_where_rows_are_free() -> None:
    drafts = forest([[ROOT, 0, 0], [ROOT]])
    plan = planner([0.5, 0.5, 0.25, 0.125], FLAT).plan(drafts, 0)
    assert plan.drafts[0] is drafts[0]
    assert (plan.rows, plan.expected_tokens, plan.expected_ms) == (6, pytest.approx(3.0), 10.0)  # 2+.5+.25+.125+.125


def test_a_larger_pass_is_chosen_where_it_takes_less_time() -> None:
    """T(6) = 20 and T(8) = 16: six rows yield 1 + 5 x 0.5 = 3.5 tokens in 20 ms, eight yield 4.5 in 16 ms."""
    ms = [10.0, 14.0, 16.0, 17.0, 18.0, 20.0, 20.0, 16.0, 40.0]
    plan = planner([0.5] * 8, ms).plan(forest([[ROOT] * 8]), 0)
    assert plan.rows == 8
    assert plan.expected_tokens / plan.expected_ms == pytest.approx(4.5 / 16.0)


def test_the_sequence_with_the_likelier_draft_gets_the_rows() -> None:
    """Two rows beyond the two roots are free: 0.9 and 0.81 of the second tree against 0.6 of the first."""
    plan = planner([0.6, 0.6, 0.9, 0.9], [10.0, 10.0, 10.0, 10.0, 99.0]).plan(forest([[ROOT, 0], [ROOT, 0]]), 0)
    assert chosen(plan) == {2, 3}
    assert len(plan.drafts[0]) == 0


def test_the_cost_of_a_row_besides_the_pass_counts() -> None:
    """1.5 tokens in 12 ms beat 1 in 10 ms; with 10 ms per row 1.5 in 32 ms do not beat 1 in 20 ms."""
    one = planner([0.5], [10.0, 12.0])
    assert one.plan(forest([[ROOT]]), 0).rows == 2
    plan = one.plan(forest([[ROOT]]), 0, row_ms=10.0)
    assert (plan.rows, plan.expected_ms) == (1, 20.0)


@given(parent_lists(), chances, costs)
def test_more_expensive_rows_make_no_larger_plans(
    parents: list[list[int]], probabilities: list[float], ms: list[float]
) -> None:
    one, drafts = planner(probabilities, ms), forest(parents)
    rows = [one.plan(drafts, 0, row_ms).rows for row_ms in (0.0, 1.0, 100.0)]
    assert rows == sorted(rows, reverse=True)


def test_a_plan_depends_on_the_context() -> None:
    """A second row is free in an empty cache and costs as much as the first in a full one."""
    cost = CostCurve([64, 1088], [1, 2], [[10.0, 10.0], [20.0, 40.0]])
    one = Planner(AcceptanceTable([Bucket("bucket", 0.5)]), cost, max_nodes=4)
    assert [one.plan(forest([[ROOT]]), context).rows for context in (0, 1088)] == [2, 1]


def test_a_plan_follows_the_learned_acceptance() -> None:
    """The prior counts as 2 of 4; after 20 misses less than a tenth is left."""
    one, drafts = planner([0.5], [10.0, 12.0]), [Draft.chain([7], [0])]
    assert one.plan(drafts, 0).rows == 2
    for _ in range(20):
        one.learn(drafts[0], [8])
    assert one.plan(drafts, 0).rows == 1
    one.learn(EMPTY, [8])


# -- chains ----------------------------------------------------------------------------------------------------------


@given(parent_lists(), chances, costs, st.integers(1, 8))
def test_without_trees_a_plan_is_the_beginning_of_the_best_path(
    parents: list[list[int]], probabilities: list[float], ms: list[float], max_nodes: int
) -> None:
    paths = worth(parents, probabilities)
    plan = planner(probabilities, ms, max_nodes=max_nodes, trees=False).plan(forest(parents), 0)
    assert_is_a_plan(plan, parents)
    first = 0
    best_sums = []
    for draft, line, values in zip(plan.drafts, parents, paths, strict=True):
        assert draft.parents.tolist() == list(range(-1, len(draft) - 1))
        leaves = [leaf for leaf in range(len(line)) if leaf not in line]
        best_sums.append(max((sum(values[node] for node in to_root(leaf, line)) for leaf in leaves), default=0.0))
        prefix = [token - first for token in draft.tokens.tolist()]
        best = [leaf for leaf in leaves if sum(values[node] for node in to_root(leaf, line)) > best_sums[-1] - 1e-9]
        assert not prefix or any(to_root(leaf, line)[::-1][: len(prefix)] == prefix for leaf in best)
        first += len(line)
    free = planner(probabilities, FLAT, trees=False).plan(forest(parents), 0)
    drafted = len(parents) + sum(best_sums)
    assert free.expected_tokens == pytest.approx(drafted if drafted > MIN_SPEEDUP * len(parents) else len(parents))


def to_root(node: int, parents: Sequence[int]) -> list[int]:
    path = []
    while node != ROOT:
        path.append(node)
        node = parents[node]
    return path


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=2),
    st.lists(st.floats(0.01, 1.0), min_size=7, max_size=7),
    costs,
    st.integers(1, 8),
)
def test_chains_are_planned_alike_with_and_without_trees(
    lengths: list[int], probabilities: list[float], ms: list[float], max_nodes: int
) -> None:
    parents = [list(range(-1, min(length, 7 // len(lengths)) - 1)) for length in lengths]
    plans = [
        planner(probabilities, ms, max_nodes=max_nodes, trees=trees).plan(forest(parents), 0) for trees in (False, True)
    ]
    assert chosen(plans[0]) == chosen(plans[1])


# -- the time that a proposer saves ----------------------------------------------------------------------------------


@given(parent_lists(), chances, costs, st.integers(1, 8), st.sets(st.integers(0, 6), max_size=3))
def test_time_saved_without_some_nodes_equals_that_of_a_plan_without_them(
    parents: list[list[int]], probabilities: list[float], ms: list[float], max_nodes: int, some: set[int]
) -> None:
    drafts, one = forest(parents), planner(probabilities, ms, max_nodes=max_nodes)
    without: set[int] = set()
    kept = []
    for draft in drafts:
        tokens = draft.tokens.tolist()
        for token, parent in zip(tokens, draft.parents.tolist(), strict=True):
            if token in some or (parent != ROOT and tokens[parent] in without):
                without.add(token)
        kept.append(draft.select([node for node, token in enumerate(tokens) if token not in without]))
    saved = one.saved_ms(one.plan(drafts, 0), 0, frozenset(without))
    plan, sequences = one.plan(kept, 0), len(drafts)
    plain = ms[min(sequences, len(ms)) - 1]
    assert saved == pytest.approx(plan.expected_tokens / sequences * plain - plan.expected_ms if chosen(plan) else 0.0)


def test_saved_time_does_not_charge_reading_top_ids() -> None:
    """Two tokens in 12 ms instead of one in 10; each row costs 1 ms more where top ids are read."""
    one = planner([1.0], [10.0, 12.0])
    assert one.saved_ms(one.plan(forest([[ROOT]]), 0, row_ms=1.0), 0, frozenset()) == pytest.approx(8.0)


# -- static ----------------------------------------------------------------------------------------------------------


@given(parent_lists(), chances, st.integers(1, 8))
def test_static_takes_the_likeliest_whatever_they_cost(
    parents: list[list[int]], probabilities: list[float], max_nodes: int
) -> None:
    plan = planner(probabilities, STEEP, max_nodes=max_nodes, static=True).plan(forest(parents), 0)
    assert_is_a_plan(plan, parents)
    paths = [p for line in worth(parents, probabilities) for p in line]
    assert len(chosen(plan)) == min(len(paths), max_nodes)
    best = sum(sorted(paths, reverse=True)[:max_nodes])
    assert sum(paths[node] for node in chosen(plan)) == pytest.approx(best)


def test_max_nodes_leaves_room_for_the_root() -> None:
    assert planner([0.5] * 8, [10.0] * 4, max_nodes=64, static=True).max_nodes == 3
    assert planner([0.5] * 8, [10.0] * 4, max_nodes=64).plan(forest([[ROOT] * 8]), 0).rows == 4


# -- the margin, and changes of the row count ------------------------------------------------------------------------


def test_nothing_is_verified_for_a_gain_below_the_margin() -> None:
    for gain, rows in ((MIN_SPEEDUP - 1.001, 1), (MIN_SPEEDUP - 0.999, 2)):
        assert planner([gain], [10.0, 10.0]).plan([Draft.chain([0], [0])], 0).rows == rows


@pytest.mark.parametrize(
    ("last_rows", "rows", "saved"),
    [
        (1, 1, 0.0),  # leaving and returning costs 2 x 1.0, which is all that the draft saves
        (0, 1, 0.0),
        (3, 3, 2.0),  # the same shape again costs nothing more
        (2, 3, 1.0),  # one change; returning to plain decoding was charged when it was left
    ],
)
def test_another_row_count_costs_one_change_and_leaving_plain_decoding_two(
    last_rows: int, rows: int, saved: float
) -> None:
    """Two sure draft tokens: 3 tokens in a pass of 28 ms instead of three passes of 10 ms."""
    table = AcceptanceTable([Bucket("sure", 1.0)])
    table.probability[0] = 1.0
    cost = CostCurve([0], [1, 2, 3], [[10.0, 25.0, 28.0]], change_ms=1.0)
    one = Planner(table, cost, max_nodes=2)
    drafts = [Draft.chain([5, 6], [0, 0])]
    plan = one.plan(drafts, 0, last_rows=last_rows)
    assert plan.rows == rows
    assert one.saved_ms(plan, 0, frozenset()) == pytest.approx(saved)


# -- whether another draft token pays --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ms", "path", "rate", "draft_token_ms", "expected"),
    [
        (FLAT, [], 0.8, 1.0, True),  # 1.8 tokens in 11 ms against 1 in 10
        (FLAT, [], 0.8, 1000.0, False),
        (STEEP, [], 0.99, 0.0, False),  # n rows cost n times as much as one
        ([10.0, 25.0, 25.0, 25.0], [], 0.9, 1.0, True),  # three draft tokens: 3.44 in 28 ms; one: 1.9 in 26
        ([10.0, 25.0, 25.0, 25.0], [], 0.7, 1.0, False),  # 2.53 in 28 ms
        (FLAT, [0.9], 0.8, 1.0, True),  # 2.62 in 12 ms against 1.9 in 11
        (FLAT, [0.1], 0.8, 5.0, False),  # 1.18 in 20 ms against 1.1 in 15
        (FLAT[:2], [0.9], 0.9, 0.1, False),  # the cost curve ends there
    ],
)
def test_another_token_is_drafted_where_further_ones_yield_more_per_millisecond(
    ms: list[float], path: list[float], rate: float, draft_token_ms: float, expected: bool
) -> None:
    assert planner([0.5], ms).another_pays(path, rate, draft_token_ms, 0, 1) is expected


def test_a_draft_token_of_one_of_many_sequences_is_weighed_against_the_pass_of_all() -> None:
    """T grows by 1 ms per row: 4 sequences take 13 ms without drafts. With one of 0.8: 4.8 tokens in 15 ms."""
    ms = [10.0 + row for row in range(16)]
    assert planner([0.5], ms).another_pays([], 0.8, 1.0, 0, 4)
    assert not planner([0.5], ms).another_pays([], 0.1, 1.0, 0, 4)


def test_a_static_planner_drafts_up_to_its_size() -> None:
    static = planner([0.5], STEEP, max_nodes=3, static=True)
    assert [static.another_pays([0.1] * n, 0.0, 1e9, 0, 1) for n in range(5)] == [True, True, True, False, False]


# -- limits of the target's memory -----------------------------------------------------------------------------------


def test_where_a_memory_holds_no_trees_the_likeliest_chain_is_verified() -> None:
    """Path probabilities 0.5, 0.4 and 0.45: as a tree all three pay, as a chain the first two sum to more."""
    drafts, probabilities = forest([[ROOT, 0, ROOT]]), [0.5, 0.8, 0.45]
    assert chosen(planner(probabilities, FLAT).plan(drafts, 0)) == {0, 1, 2}
    assert chosen(planner(probabilities, FLAT, limits=DraftLimits(trees=False)).plan(drafts, 0)) == {0, 1}


def test_nodes_deeper_than_a_memory_can_take_back_are_cut_before_the_choice() -> None:
    """Sums of path probabilities: 0.5 + 0.5 + 0.5 below the first child, 0.9 for the second.

    Down to a depth of 1 that leaves 0.5 and 0.9, of which a chain takes the better.
    """
    drafts, probabilities = forest([[ROOT, 0, 1, ROOT]]), [0.5, 1.0, 1.0, 0.9]
    assert chosen(planner(probabilities, FLAT, limits=DraftLimits(depth=2)).plan(drafts, 0)) == {0, 1, 3}
    assert chosen(planner(probabilities, FLAT, limits=DraftLimits(depth=1)).plan(drafts, 0)) == {0, 3}
    chains = planner(probabilities, FLAT, limits=DraftLimits(trees=False, depth=1))
    assert chosen(chains.plan(drafts, 0)) == {3}
    assert chosen(planner(probabilities, FLAT, trees=False).plan(drafts, 0)) == {0, 1, 2}
    static = planner(probabilities, STEEP, static=True, limits=DraftLimits(depth=0))
    assert chosen(static.plan(drafts, 0)) == set()


def test_a_chain_is_not_drafted_deeper_than_can_be_taken_back() -> None:
    for static in (False, True):
        one = planner([0.9], FLAT, static=static, limits=DraftLimits(depth=2))
        assert [one.another_pays([0.9] * n, 0.9, 0.1, 0, 1) for n in range(4)] == [True, True, False, False]


@pytest.mark.parametrize(
    ("ms", "rows", "saved"),
    [
        ([10.0, 12.0], 2, 6.0),  # 1.9 tokens in 12 ms and a tenth of 10 ms, which plain decoding takes 19 ms for
        ([10.0, 17.0], 2, 1.0),
        ([10.0, 18.5], 1, 0.0),  # 19.5 ms: no gain
    ],
)
def test_a_rejected_draft_costs_its_right_rows_again(ms: list[float], rows: int, saved: float) -> None:
    one = planner([0.9], ms, limits=DraftLimits(trees=False, rereads=True))
    plan = one.plan(forest([[ROOT]]), 0)
    assert (plan.rows, plan.expected_ms) == (rows, 10.0 if rows == 1 else pytest.approx(ms[1] + 1.0))
    assert one.saved_ms(plan, 0, frozenset()) == pytest.approx(saved)
    assert one.another_pays([], 0.9, 0.0, 0, 1) == (rows == 2)
    assert one.rate(plan, 0) == pytest.approx(plan.expected_tokens / plan.expected_ms)


def test_only_long_sure_chains_pay_where_a_rejection_costs_a_pass() -> None:
    """With rows at no further cost, a chain of k tokens at p each costs 1 + (1 - p^k) passes and gives its tokens."""
    limits, ms = DraftLimits(trees=False, rereads=True), [10.0] * 9
    for p, length in [(0.3, 0), (0.6, 8), (0.99, 8)]:
        one = planner([p] * 8, ms, limits=limits)
        assert len(one.plan(forest([[ROOT, 0, 1, 2, 3, 4, 5, 6]]), 0).drafts[0]) == length


@pytest.mark.parametrize("rereads", [False, True])
def test_the_common_length_equals_brute_force(rereads: bool) -> None:
    """Every length is tried by summing over all outcomes of every chain."""
    random = np.random.default_rng(0)
    for _ in range(60):
        n = int(random.integers(1, 4))
        paths = [np.cumprod(random.uniform(0.3, 1, int(random.integers(0, 5)))).tolist() for _ in range(n)]
        ms = np.cumsum(random.uniform(0.5, 3, 16)).tolist()
        rates = {}
        for length in range(5):
            rows, tokens, again = n * (1 + length), 0.0, 0.0
            if rows > len(ms) or (length and not any(len(path) >= length for path in paths)):
                continue
            for path in paths:
                reached = [1.0, *path, *[0.0] * 9]
                for accepted in range(length + 1):
                    p = reached[accepted] - (reached[accepted + 1] if accepted < length else 0.0)
                    tokens += p * (1 + accepted)
                    again += p * ms[accepted] * (accepted < length)
            rates[length] = tokens / (ms[rows - 1] + again * rereads)
        choice = best_length(paths, ms, 99, rereads=rereads)
        rates[0] *= MIN_SPEEDUP
        assert rates[choice.length] == pytest.approx(max(rates.values()))
        if choice.length:
            assert choice.tokens / (choice.pass_ms + choice.reread_ms) == pytest.approx(rates[choice.length])


def test_sequences_of_a_pass_get_equally_many_rows() -> None:
    one = planner([0.9, 0.5], [10.0, 10.5, 11.0, 11.5, 12.0, 12.5, 13.0], limits=DraftLimits(trees=False, even=True))
    plan = one.plan(forest([[ROOT, 0], []]), 0)
    assert [len(draft) for draft in plan.drafts] == [2, 0]
    assert plan.rows == 6 == one.limits.rows(plan.drafts), "the second sequence has as many rows"
    assert one.saved_ms(plan, 0, frozenset()) > 0
