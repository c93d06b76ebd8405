"""How long a proposer is not asked, worked out by hand for proposers that pay, that do not, and that decline."""

import pytest

from specplug.planning.back_off import BackOff
from specplug.planning.constants import COST_SHARE, MAX_COOLDOWN, RETRIES_PER_TEXT


def cooldowns(back_off: BackOff, times: int, spent_ms: float, plain_ms: float) -> list[int]:
    """The cooldown after each of `times` drafts that save nothing."""
    found = []
    for _ in range(times):
        assert back_off.tick()
        back_off.record(spent_ms, 0.0, plain_ms)
        found.append(0)
        while back_off.cooldown:
            assert not back_off.tick()
            found[-1] += 1
    return found


# -- cheap proposers -------------------------------------------------------------------------------------------------


def test_a_proposer_that_never_pays_is_asked_ever_more_rarely() -> None:
    expected = [1, 3, 7, 15, 31, 63, MAX_COOLDOWN, MAX_COOLDOWN, MAX_COOLDOWN]
    assert cooldowns(BackOff(), 9, spent_ms=10.0, plain_ms=10.0) == expected


def test_a_cooldown_is_no_longer_than_the_cost_share_requires() -> None:
    """1/128 ms of a plain step of 100/128 ms is 1%: asked in every third step it is below 0.4%, in every second not."""
    assert COST_SHARE == 0.004
    assert cooldowns(BackOff(), 4, spent_ms=1 / 128, plain_ms=100 / 128) == [1, 2, 2, 2]


def test_a_proposer_of_negligible_cost_is_always_asked() -> None:
    assert cooldowns(BackOff(), 5, spent_ms=0.001, plain_ms=10.0) == [0] * 5


def test_a_proposer_whose_first_call_took_no_time_backs_off_as_well() -> None:
    back_off = BackOff()
    back_off.record(0.0, 0.0, 10.0)  # as a coarse clock reports it
    for _ in range(20):
        if back_off.tick():
            back_off.record(10.0, 0.0, 10.0)
    assert back_off.num_asked < 10


def test_a_proposer_that_pays_is_asked_in_every_step() -> None:
    back_off = BackOff()
    for _ in range(10):
        assert back_off.tick()
        back_off.record(5.0, 1e3, 10.0)


def test_a_proposer_that_pays_again_is_asked_in_every_step_again() -> None:
    back_off = BackOff()
    cooldowns(back_off, 8, spent_ms=10.0, plain_ms=10.0)
    assert back_off.tick()
    back_off.record(10.0, 1e3, 10.0)
    assert back_off.tick()
    assert cooldowns(back_off, 3, spent_ms=10.0, plain_ms=10.0) == [1, 3, 7]


def test_the_cost_of_asking_is_a_running_mean() -> None:
    """The first five have equal weights: 3. The sixth moves the mean a fifth of the way from 3 to 13."""
    back_off = BackOff()
    for spent_ms in (1.0, 2.0, 3.0, 4.0, 5.0):
        back_off.record(spent_ms, 1e3, 10.0)
    assert back_off.cost_ms == pytest.approx(3.0)
    back_off.record(13.0, 1e3, 10.0)
    assert back_off.cost_ms == pytest.approx(5.0)
    assert back_off.num_asked == 6


# -- expensive proposers ---------------------------------------------------------------------------------------------


def test_an_expensive_proposer_is_judged_by_its_mean_gain() -> None:
    """It gains 6 ms in every second step and loses 4 ms in the others: 1 ms per step."""
    back_off = BackOff(expensive=True)
    for step in range(100):
        assert back_off.tick()
        back_off.record(4.0, 10.0 if step % 2 else 0.0, 10.0)


def test_an_expensive_proposer_that_loses_backs_off_after_its_retries() -> None:
    back_off = BackOff(expensive=True)
    expected = [0] * RETRIES_PER_TEXT + [1, 3, 7, 15]
    assert cooldowns(back_off, RETRIES_PER_TEXT + 4, spent_ms=10.0, plain_ms=10.0) == expected
    cooldowns(back_off, 12, spent_ms=100.0, plain_ms=1.0)
    assert back_off.last_cooldown == MAX_COOLDOWN


def test_a_small_loss_is_within_the_confidence_margin_while_few_drafts_were_seen() -> None:
    """It loses 2 ms each time: after n drafts the margin is 10 / sqrt(n) ms, which is more for n below 25."""
    back_off = BackOff(expensive=True)
    for _ in range(24):
        assert back_off.tick()
        back_off.record(2.0, 0.0, 10.0)
    assert back_off.cooldown == 0
    back_off.record(2.0, 0.0, 10.0)
    assert back_off.cooldown > 0


def test_an_expensive_proposer_that_declines_is_asked_again_soon_and_counts_as_no_loss() -> None:
    back_off = BackOff(expensive=True)
    found = []
    for _ in range(5):
        back_off.decline()
        found.append(back_off.cooldown)
        while not back_off.tick():
            pass
    assert found == [1, 3, 7, 7, 7]
    back_off.record(1.0, 10.0, 10.0)
    assert back_off.tick() and back_off.gain_ms == 9.0 and back_off.retries_left == RETRIES_PER_TEXT - 1


def test_declining_neither_ends_a_longer_cooldown_nor_restores_retries() -> None:
    back_off = BackOff(expensive=True)
    cooldowns(back_off, RETRIES_PER_TEXT + 6, spent_ms=10.0, plain_ms=10.0)
    assert back_off.last_cooldown == 63
    back_off.decline()
    assert back_off.cooldown == 63
    back_off.record(10.0, 0.0, 10.0)
    assert back_off.cooldown == MAX_COOLDOWN
    back_off.start_text()
    retries = back_off.retries_per_text
    for _ in range(3):
        back_off.decline()
        back_off.start_text()
    assert back_off.retries_left == retries == RETRIES_PER_TEXT // 2


def test_a_new_text_grants_an_expensive_proposer_new_retries_and_fewer_where_it_lost() -> None:
    back_off = BackOff(expensive=True)
    for retries in (RETRIES_PER_TEXT // 2, RETRIES_PER_TEXT // 4, 2, 2):
        cooldowns(back_off, RETRIES_PER_TEXT + 3, spent_ms=10.0, plain_ms=10.0)
        back_off.start_text()
        assert cooldowns(back_off, retries + 1, spent_ms=10.0, plain_ms=10.0) == [0] * retries + [1]
    for _ in range(40):
        back_off.record(1.0, 10.0, 10.0)
    back_off.start_text()
    assert back_off.retries_left == RETRIES_PER_TEXT
    cheap = BackOff()
    cooldowns(cheap, 3, spent_ms=10.0, plain_ms=10.0)
    cooldown = cheap.cooldown
    cheap.start_text()
    assert cheap.cooldown == cooldown
