import json
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebeam.schemas.contract.strict_json import MAX_DEPTH, keep_last_keys, measure_depth, parse_json
from moebeam.schemas.errors import NotJson


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('{"a": 1', "line 1, column 8 (character 7)"),
        ('{"a": 1} and more', "line 1, column 10 (character 9)"),
        ('{"a": 1}{"a": 1}', "line 1, column 9 (character 8)"),
        ("```json\n{}\n```", "line 1, column 1 (character 0)"),
        ('[1,\n2,\n"three" 4]', "line 3, column 9 (character 15)"),
        ("{'a': 1}", "line 1, column 2 (character 1)"),
        ('["a\nb"]', "line 1, column 4 (character 3)"),
        ("[1, NaN]", "NaN is not JSON at line 1, column 5 (character 4)"),
        ('["NaN", -Infinity]', "-Infinity is not JSON at line 1, column 9 (character 8)"),
        ('{"Infinity": Infinity}', "Infinity is not JSON at line 1, column 14 (character 13)"),
        ("[-1e4300]", "-1e4300 has more than 4300 digits at line 1, column 2 (character 1)"),
        ("[01]", "line 1, column 3 (character 2)"),
        ("[\u0661]", "line 1, column 2 (character 1)"),
        ("\ufeff{}", "(character 0)"),
    ],
)
def test_malformed_answer_is_refused_with_its_position(text: str, where: str) -> None:
    with pytest.raises(NotJson) as caught:
        parse_json(text)
    assert where in str(caught.value)


@pytest.mark.parametrize(("text", "value"), [("1e400", 10**400), ("-1.5e999", -15 * 10**998), ("1e-400", 0)])
def test_a_number_beyond_a_double_is_the_integer_that_it_says(text: str, value: int) -> None:
    assert parse_json(text) == value


@pytest.mark.parametrize("text", ["1e4300", "-1e999999999", "1e99999999999999999999", "9" * 400 + ".5"])
def test_a_number_that_nothing_holds_is_refused(text: str) -> None:
    with pytest.raises(NotJson, match=r"more than 4300 digits|no integer"):
        parse_json(text)


def test_a_text_is_kept_unless_a_key_repeats() -> None:
    for text, expected in [
        ('{"a": 1.50, "b": [{"a": 2}]}', '{"a": 1.50, "b": [{"a": 2}]}'),
        ('{"a": 1, "b": {"c": 1, "\\u0063": 2}, "a": "é"}', '{"a": "é", "b": {"c": 2}}'),
    ]:
        assert keep_last_keys(text, parse_json(text)) == expected


@pytest.mark.parametrize("text", ['"\\ud800"', '{"\\uDC00": 1}', '"\ud800"', '{"a": ["\\ud83d x"]}'])
def test_lone_surrogate_is_refused_because_no_file_could_hold_it(text: str) -> None:
    with pytest.raises(NotJson, match="surrogate"):
        parse_json(text)


def test_surrogate_pair_and_escapes_are_characters() -> None:
    assert parse_json('"\\ud83d\\ude00"') == "\U0001f600"


def test_integer_beyond_pythons_limit_is_a_row_error() -> None:
    with pytest.raises(NotJson, match="integer is too long"):
        parse_json("1" * (sys.get_int_max_str_digits() + 1))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=20,
)


@settings(deadline=None)
@given(json_values, st.booleans())
def test_parse_is_the_inverse_of_writing(value: Any, ensure_ascii: bool) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=ensure_ascii)) == value


@pytest.mark.parametrize("depth", [0, 1, 2, MAX_DEPTH, 100_000])
def test_depth_counts_nested_containers_however_many(depth: int) -> None:
    value: Any = 1
    for level in range(depth):
        value = {"a": 0, "b": value} if level % 2 else [value, 0]
    assert measure_depth(value) == depth


def test_depth_limit_is_the_same_whatever_the_callers_stack() -> None:
    def from_deeper(levels: int, text: str) -> Any:
        return from_deeper(levels - 1, text) if levels else parse_json(text)

    deepest = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    for levels in (0, sys.getrecursionlimit() // 2):
        assert measure_depth(from_deeper(levels, deepest)) == MAX_DEPTH
        with pytest.raises(NotJson, match=f"^nested deeper than {MAX_DEPTH} levels$"):
            from_deeper(levels, f"[{deepest}]")
        with pytest.raises(NotJson, match=f"^nested deeper than {MAX_DEPTH} levels$"):
            from_deeper(levels, "[" * 5000)
