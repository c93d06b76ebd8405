"""The choice of engine settings by the time of whole requests: arithmetic over given costs."""

import numpy as np
import pytest

from specplug.core import int_array
from specplug.engines.llama_cpp.settings_table import label
from specplug.planning.request_time import ALL_ROWS, SettingCosts
from specplug.profile import Runtime
from specplug.registry import ProposerSpec
from specplug.tune.engine_choice import (
    UNLIMITED,
    EngineChoice,
    choose_with_drafts,
    equal_nodes,
    first_choice,
    request_ms,
    with_setting,
)
from specplug.tune.expense import Expense, Line
from specplug.tune.trace import Answer, Trace

BF16 = Runtime(threads=2, flash_attention=True, kv_type="bf16")
OFF = Runtime(threads=2, flash_attention=False, kv_type="f16")
STOCK = Runtime(threads=2, flash_attention=True, kv_type="f16")
OPEN = Runtime(threads=2)
SHORT, LONG = [(100, 100)], [(4000, 100)]
METHODS = [ProposerSpec("ngram"), ProposerSpec("suffix")]
FREE = Expense(propose={"ngram": Line(), "suffix": Line()}, observe={"ngram": Line(), "suffix": Line()})


def costs(
    one_row: float, per_row: float = 0.1, *, long: float = 1.0, prompt: float = 1.0, equal: int = 1
) -> SettingCosts:
    """`one_row` ms for one row and that times `per_row` for each further one; `long` times that at 4,096 tokens."""
    rows = (1, 2, 4, 8, 16)
    line = tuple(one_row * (1 + per_row * (n - 1)) for n in rows)
    return SettingCosts((128, 4096), rows, (line, tuple(long * ms for ms in line)), (prompt, prompt), equal)


def trace(*, repeats: bool) -> Trace:
    """Four answers of 96 tokens that repeat after six tokens, or never."""
    random = np.random.default_rng(0)
    answers = []
    for place in range(4):
        tokens = [10 * place + at % 6 for at in range(96)] if repeats else random.permutation(20_000)[:96].tolist()
        topk = np.zeros((95, 4), dtype=np.int32)
        answers.append(Answer(str(place), 0, "chat", int_array([place + 1]), int_array(tokens), topk))
    return Trace({"max_tokens": 96}, tuple(answers))


def choose(table: dict[Runtime, SettingCosts], *, repeats: bool, allow_rounding: bool = False) -> EngineChoice:
    first = first_choice(table, STOCK, SHORT, base=OPEN, sequences=1, allow_rounding=allow_rounding)
    return choose_with_drafts(first, trace(repeats=repeats), FREE, METHODS, base=OPEN, allow_rounding=allow_rounding)


def test_plain_decoding_takes_the_fastest_setting_for_the_length_of_the_requests() -> None:
    table = {STOCK: costs(10, long=3), OFF: costs(11), BF16: costs(12)}
    assert first_choice(table, STOCK, SHORT, base=OPEN, sequences=1, allow_rounding=True).plain == STOCK
    assert first_choice(table, STOCK, LONG, base=OPEN, sequences=1, allow_rounding=True).plain == OFF


def test_the_prompt_counts() -> None:
    table = {STOCK: costs(10), OFF: costs(9, prompt=2)}
    assert first_choice(table, STOCK, [(10, 100)], base=OPEN, sequences=1, allow_rounding=True).plain == OFF
    assert first_choice(table, STOCK, [(500, 100)], base=OPEN, sequences=1, allow_rounding=True).plain == STOCK
    assert request_ms(table[OFF], [(500, 100), (500, 100)]) == pytest.approx(2 * (1000 + 900))


def test_drafts_take_an_equal_setting_and_plain_decoding_the_fastest() -> None:
    table = {STOCK: costs(10), OFF: costs(8), BF16: costs(12, equal=ALL_ROWS)}
    choice = first_choice(table, STOCK, SHORT, base=OPEN, sequences=1, allow_rounding=False)
    assert (choice.plain, choice.drafting, choice.equal, choice.nodes) == (OFF, BF16, True, ALL_ROWS - 1)
    assert choice.plain_scale == pytest.approx(8 / 12)
    allowed = first_choice(table, STOCK, SHORT, base=OPEN, sequences=1, allow_rounding=True)
    assert (allowed.drafting, allowed.equal) == (OFF, False)


def test_rows_that_agree_limit_the_drafts() -> None:
    assert [equal_nodes(costs(1, equal=rows), 1) for rows in (1, 2, 3, ALL_ROWS)] == [0, 1, 2, ALL_ROWS - 1]
    assert [equal_nodes(costs(1, equal=rows), 4) for rows in (3, 8)] == [0, 4]
    one_token = {STOCK: costs(10), BF16: costs(12, equal=2)}
    choice = first_choice(one_token, STOCK, SHORT, base=OPEN, sequences=1, allow_rounding=False)
    assert (choice.drafting, choice.equal) == (STOCK, False), "one draft token is too few to choose a setting for"


def test_the_setting_with_flat_passes_wins_where_drafts_are_accepted() -> None:
    table = {STOCK: costs(10, per_row=1.0, equal=ALL_ROWS), BF16: costs(11, per_row=0.02, equal=ALL_ROWS)}
    assert choose(table, repeats=False).drafting == STOCK
    choice = choose(table, repeats=True)
    assert (choice.drafting, choice.plain) == (BF16, STOCK)
    assert choice.drafted[BF16] < 0.5 * request_ms(table[BF16], SHORT)


def test_what_equality_costs_is_reported() -> None:
    table = {STOCK: costs(10, per_row=0.02), BF16: costs(10, per_row=0.02, equal=3)}
    choice = choose(table, repeats=True)
    assert (choice.drafting, choice.nodes, choice.equal) == (BF16, 2, True)
    described = choice.as_mapping()
    assert described["equality_costs"] == pytest.approx(choice.drafted[BF16] / min(choice.rounding.values()), abs=1e-3)
    assert described["equality_costs"] > 1.5
    allowed = choose(table, repeats=True, allow_rounding=True)
    assert (allowed.nodes, allowed.equal) == (UNLIMITED, False) and allowed.as_mapping()["equality_costs"] is None


def test_without_an_equal_setting_the_fastest_one_drafts() -> None:
    table = {STOCK: costs(10), OFF: costs(8)}
    choice = choose(table, repeats=True)
    assert (choice.drafting, choice.equal, choice.nodes) == (OFF, False, UNLIMITED)


def test_drafts_do_not_pay_where_prompts_take_longer_than_tokens_save() -> None:
    table = {OFF: costs(10), BF16: costs(10, prompt=3, equal=ALL_ROWS)}
    choice = first_choice(table, STOCK, SHORT, base=OPEN, sequences=1, allow_rounding=False)
    assert not choice.pays(1.2) and choice.pays(1.3)  # 200 ms more for the prompt, of 1,000 ms of tokens


def test_the_document_names_the_settings_and_their_gain() -> None:
    table = {STOCK: costs(10), OFF: costs(8), BF16: costs(12, equal=ALL_ROWS)}
    described = first_choice(table, STOCK, SHORT, base=OPEN, sequences=1, allow_rounding=False).as_mapping()
    assert described["settings_speedup"] == pytest.approx(1100 / 900, abs=1e-3)
    assert [line["setting"] for line in described["settings"]] == [label(one) for one in (OFF, STOCK, BF16)]
    assert SettingCosts.from_mapping(described["settings"][2]) == table[BF16]


def test_a_setting_changes_nothing_else() -> None:
    runtime = Runtime(threads=3, context=9000, batch=64)
    assert with_setting(runtime, OFF) == Runtime(
        threads=3, context=9000, batch=64, flash_attention=False, kv_type="f16"
    )


def test_settings_that_the_user_named_are_kept() -> None:
    """llama.cpp's own setting is measured for the report, and not taken where it is another one."""
    table = {STOCK: costs(5, equal=ALL_ROWS), BF16: costs(10, equal=ALL_ROWS), OFF: costs(6)}
    named = Runtime(threads=2, kv_type="bf16")
    first = first_choice(table, STOCK, SHORT, base=named, sequences=1, allow_rounding=True)
    assert (first.plain, first.drafting, first.stock) == (BF16, BF16, STOCK)
    assert first.as_mapping()["settings_speedup"] == pytest.approx(600 / 1100, abs=1e-3)
    chosen = choose_with_drafts(first, trace(repeats=True), FREE, METHODS, base=named, allow_rounding=True)
    assert chosen.drafting == BF16 and STOCK not in chosen.drafted


def test_a_gain_within_the_noise_keeps_the_usual_setting() -> None:
    table = {STOCK: costs(10.05, equal=ALL_ROWS), OFF: costs(10, equal=ALL_ROWS)}
    choice = first_choice(table, STOCK, SHORT, base=OPEN, sequences=1, allow_rounding=False)
    assert (choice.plain, choice.drafting) == (STOCK, STOCK)


def test_without_llama_cpps_own_setting_there_is_no_comparison_with_it() -> None:
    choice = first_choice({BF16: costs(10, equal=ALL_ROWS)}, STOCK, SHORT, base=OPEN, sequences=1, allow_rounding=False)
    assert choice.as_mapping()["settings_speedup"] is None
