import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specplug.constraints.json_spacing import PYTHONS, Spacing, respaced, spacing_of


@pytest.mark.parametrize(
    ("text", "item", "key"),
    [
        (b"", ", ", ": "),
        (b'{"a":', ", ", ": "),  # the space may follow
        (b'{"a":1', ", ", ":"),
        (b'{"a":1, "b": 2,"c" : 3', ",", " : "),
        (b'{"a": "x, y:z",', ", ", ": "),  # inside a string
        (b'{"a": "quo\\"te:1,2', ", ", ": "),
        (b'["a" , "b" , "c"', " , ", ": "),
        (b'a  ,b : {"c":1,"d":2} , e : ', ",", ":"),  # outside of the JSON
    ],
)
def test_the_last_separators_count(text: bytes, item: str, key: str) -> None:
    assert spacing_of(text) == Spacing(item, key)


@pytest.mark.parametrize(
    ("text", "spacing", "expected"),
    [
        (b'{ "a" :1 , "b":[ 2,3 ] }', PYTHONS, b'{"a": 1, "b": [2, 3]}'),
        (b'{"a": "x , y" , "b": 2}', Spacing(",", ":"), b'{"a":"x , y","b":2}'),
        (b'{"a" ', PYTHONS, b'{"a"'),
        (b'{"a":', PYTHONS, b'{"a":'),  # its space may follow
        (b'{"a": ', PYTHONS, b'{"a": '),
        (b'{"a": 1 ,', Spacing(" , ", ": "), b'{"a": 1 ,'),
        (b'Say , "so :  ', PYTHONS, b'Say , "so :  '),  # no JSON
        (b'a  : "{ "a" :1} ,  {"b":2 } , ', PYTHONS, b'a  : "{"a": 1} ,  {"b": 2} , '),
        (b'{"a": "one  two', PYTHONS, b'{"a": "one  two'),
        (b'{"a": "\\" , ', PYTHONS, b'{"a": "\\" , '),
    ],
)
def test_a_text_gets_other_spaces(text: bytes, spacing: Spacing, expected: bytes) -> None:
    assert respaced(text, spacing) == expected


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(values, st.sampled_from([", ", ",", " , "]), st.sampled_from([": ", ":", " :"]))
def test_every_json_text_is_respaced_as_python_writes_it(value: object, item: str, key: str) -> None:
    text = json.dumps(value, separators=(item, key)).encode()
    assert respaced(text, PYTHONS) == json.dumps(value).encode()
    assert respaced(text, spacing_of(text)) == text
    for end in range(len(text)):  # a beginning has the same bytes without spaces
        assert respaced(text[:end], PYTHONS).replace(b" ", b"") == text[:end].replace(b" ", b"")
