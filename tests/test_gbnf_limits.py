from time import process_time

import pytest

from specplug.constraints.gbnf_limits import MAX_BYTES, MAX_DEPTH, check_gbnf
from specplug.errors import UsageError


@pytest.mark.parametrize("part", ["[", '"', '["', "[\\\\", '"\\\\', "[a", "#[", "#[\n"])
@pytest.mark.parametrize("end", ["", "\\", "]", '"'])
def test_the_time_for_parts_that_are_not_closed_is_in_proportion(part: str, end: str) -> None:
    grammar = part * (MAX_BYTES // len(part) - 1) + end
    began = process_time()
    check_gbnf(grammar)
    assert process_time() - began < 0.5


@pytest.mark.parametrize("before", ["", '"\\\\" ', '[\\]"] ', '"\\"[" ', "# [\n"])
def test_parentheses_count_outside_of_literals(before: str) -> None:
    check_gbnf("root ::= " + before + "(" * MAX_DEPTH)
    with pytest.raises(UsageError, match="nested deeper"):
        check_gbnf("root ::= " + before + "(" * (MAX_DEPTH + 1))


@pytest.mark.parametrize("quoted", ['"{}"', "[{}]", "# {}", '"{}', "[{}"])
def test_parentheses_in_texts_do_not_count(quoted: str) -> None:
    check_gbnf("root ::= " + quoted.replace("{}", "(" * 1000))
