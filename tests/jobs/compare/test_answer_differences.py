from typing import Any

import pytest

from moebeam.jobs.compare.answers import Answer, Difference, find_differences

SAID: dict[str, Any] = {
    "status": "ok",
    "error_type": None,
    "text": '{"a": 1}',
    "json": '{"a": 1}',
    "calls": (),
    "reasoning": None,
}


def answer(**changes: Any) -> Answer:
    return Answer(**{**SAID, **changes})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"status": "rejected", "error_type": "not_json"}, [("status", "", "ok", "rejected (not_json)")]),
        ({"json": '{"a":1.0}'}, []),
        ({"json": '{"a": true}'}, [("json", "/a", "1", "true")]),
        ({"json": '{"a": 1, "b/c": 2}'}, [("json", "/b~1c", "missing", "2")]),
        ({"json": None}, [("json", "", '{"a": 1}', "none")]),
        ({"text": '{"a": 2}'}, [("text", "character 6", '{"a": 1}', '{"a": 2}')]),
        ({"text": '{"a": 1} '}, [("text", "character 8", '{"a": 1}', '{"a": 1} ')]),
        ({"reasoning": "so"}, [("reasoning", "", "none", "so")]),
        ({"calls": (("f", "{}"),)}, [("calls", "", "0 calls", "1 calls")]),
    ],
)
def test_answers_differ_in_what_was_changed_and_where_it_begins(
    changes: dict[str, Any], expected: list[tuple[str, str, str, str]]
) -> None:
    assert find_differences(answer(), answer(**changes)) == [Difference(*each) for each in expected]  # pyright: ignore[reportArgumentType]


def test_arguments_of_calls_are_compared_by_value_and_ids_not_at_all() -> None:
    row = {"status": "ok", "error_type": None, "output_text": "", "output_json": None, "reasoning_content": None}
    calls = [
        [{"id": number, "name": "f", "arguments": arguments}]
        for number, arguments in (("1", '{"x": [1, 2]}'), ("2", '{ "x":[1,2] }'), ("3", '{"x": [1, 3]}'))
    ]
    first, same, other = (Answer.from_row({**row, "tool_calls": each}) for each in calls)
    assert find_differences(first, same) == []
    assert find_differences(first, other) == [Difference("calls", "/0/arguments/x/1", "2", "3")]


def test_json_that_cannot_be_read_is_compared_as_text() -> None:
    deep = "[" * 200_000
    assert find_differences(answer(json=deep), answer(json=deep + "1"))[0].place == "character 200,000"


def test_a_long_text_is_shown_around_its_first_difference_alone() -> None:
    (found,) = find_differences(answer(text="x" * 500 + "a" + "y" * 500), answer(text="x" * 500 + "b" + "y" * 500))
    assert found.place == "character 500"
    assert found.a.startswith("…xxx") and "xa" in found.a and len(found.a) < 60
