"""How much time trying uncertain row counts takes, and what it brings, over a toy target."""

from itertools import count

import pytest

from specplug.core import int_array
from specplug.planning.constants import EXPLORING_RESERVE, EXPLORING_SHARE
from specplug.planning.cost import CostCurve
from specplug.planning.cost_learning import CostLearning
from specplug.planning.fusion import Fusion
from specplug.planning.speculator import Speculator
from specplug.profile import PlannerSettings, Profile
from specplug.proposers.ngram import Ngram
from specplug.testing import verify_known

LIMIT = 9
ESTIMATE = [1.0 + 1.6 * (rows - 1) ** 0.64 for rows in range(1, LIMIT + 1)]
"""Four rows are believed to take 4.2 times as long as one."""

UNIQUE = list(range(100, 1100))


def decode(true_ms: list[float], text: list[int], sequences: int = 1) -> tuple[float, float, list[int]]:
    """The time of decoding a text after a prompt with its first half, until one of the sequences has ended; the time of
    plain decoding for the same tokens; and the rows of every pass."""
    learning = CostLearning(LIMIT, spread=0.35)
    curve = CostCurve([0], range(1, LIMIT + 1), [ESTIMATE], learning=learning)
    fusion = Fusion([Ngram(max_draft=8)], clock=count(step=1000).__next__)
    one = Speculator(fusion, curve, Profile("toy", planner=PlannerSettings(max_nodes=LIMIT - sequences)))
    prompt = [*text[: len(text) // 2], *range(5, 25)]
    seqs = list(range(sequences))
    for seq in seqs:
        one.begin(seq, int_array([*prompt, text[0]]))
    emitted: list[list[int]] = [[text[0]] for _ in seqs]
    spent, rows_seen = 0.0, []
    while all(len(own) < len(text) for own in emitted):
        drafts = one.plan(seqs, 0, [len(text) - len(own) - 1 for own in emitted])
        pairs = zip(drafts, emitted, strict=True)
        steps = [verify_known(draft, text[len(own) :], [*prompt, *own], None) for draft, own in pairs]
        for own, step in zip(emitted, steps, strict=True):
            own += step.emitted
        rows_seen.append(sequences + sum(map(len, drafts)))
        spent += true_ms[rows_seen[-1] - 1]
        one.observe(seqs, steps, target_ms=true_ms[rows_seen[-1] - 1])
    tokens = sum(len(own) - 1 for own in emitted)
    return spent, tokens * true_ms[sequences - 1] / sequences, rows_seen


def test_decoding_begins_with_a_plain_pass() -> None:
    _, _, rows = decode([20.0] * LIMIT, UNIQUE[:50])
    assert rows[0] == 1


def test_cheap_rows_are_found() -> None:
    """Rows that are free are believed to be expensive: the second half of the text is copied from the prompt."""
    spent, plain, rows = decode([20.0] * LIMIT, [7, *UNIQUE[:400], *UNIQUE[:400]])
    assert max(rows) >= LIMIT - 1
    assert spent < 0.5 * plain


@pytest.mark.parametrize("sequences", [1, 3])
def test_expensive_rows_cost_their_share_at_most(sequences: int) -> None:
    """n rows take n times as long as one, and every draft is wrong from its second token on."""
    true_ms = [20.0 * rows for rows in range(1, LIMIT + 1)]
    text = [token for i in range(600) for token in (3, 4, UNIQUE[i])]  # after 3 comes 4, and then never the same
    spent, plain, rows = decode(true_ms, text, sequences)
    assert any(one > sequences for one in rows), "nothing was tried"
    lost = spent - plain
    assert lost <= EXPLORING_SHARE * spent + EXPLORING_RESERVE * true_ms[sequences - 1]
    assert lost / plain <= 0.03
