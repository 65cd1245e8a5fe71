"""Tool calls are told apart by place, index and id, whatever a server leaves out."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebeam.model_runner.openai_engine.response.call_pieces import CallPiece, CallPieces
from moebeam.schemas.records import ToolCall

ROME, OSLO = '{"town": "Rome"}', '{"town": "Oslo"}'


def piece(index: int | None = None, id_: str = "", name: str = "", arguments: str = "") -> CallPiece:
    return CallPiece(index, id_, name, arguments)


def streamed(*events: list[CallPiece]) -> list[tuple[str, str]]:
    pieces = CallPieces()
    for event in events:
        pieces.add_event(event)
    return [(call.name, call.arguments) for call in pieces.finish()]


@pytest.mark.parametrize("indices", [(None, None), (0, 0), (5, 2), (0, 1)])
def test_calls_of_a_whole_message_go_by_their_place(indices: tuple[Any, Any]) -> None:
    pieces = CallPieces()
    pieces.add_whole([piece(indices[0], "same", "mail", ROME), piece(indices[1], "same", "mail", OSLO)])
    assert pieces.finish() == (ToolCall("same", "mail", ROME), ToolCall("same", "mail", OSLO))


def test_calls_without_an_id_are_named_by_their_place() -> None:
    pieces = CallPieces()
    pieces.add_whole([piece(name="mail", arguments=ROME), piece(name="post", arguments=OSLO)])
    assert [call.id for call in pieces.finish()] == ["call_0", "call_1"]


@pytest.mark.parametrize("index", [None, 0, 3])
def test_equal_or_missing_index_with_other_ids_is_another_call(index: int | None) -> None:
    found = streamed([piece(index, "x", "mail", ROME)], [piece(index, "y", "post", OSLO)])
    assert found == [("mail", ROME), ("post", OSLO)]


@pytest.mark.parametrize("index", [None, 0])
def test_two_calls_in_one_event_are_two_calls(index: int | None) -> None:
    assert streamed([piece(index, "", "mail", ROME), piece(index, "", "mail", OSLO)]) == [
        ("mail", ROME),
        ("mail", OSLO),
    ]


@pytest.mark.parametrize("index", [None, 0])
def test_without_ids_a_name_after_whole_arguments_opens_another_call(index: int | None) -> None:
    assert streamed([piece(index, "", "mail", ROME)], [piece(index, "", "mail", OSLO)]) == [
        ("mail", ROME),
        ("mail", OSLO),
    ]
    assert streamed([piece(index, "", "mail", "")], [piece(index, "", "post", OSLO)]) == [("mail", ""), ("post", OSLO)]


def test_interleaved_pieces_go_to_their_index_or_id() -> None:
    by_index = streamed(
        [piece(0, "x", "mail"), piece(1, "y", "post")],
        [piece(1, arguments=OSLO[:5])],
        [piece(0, arguments=ROME)],
        [piece(1, arguments=OSLO[5:])],
    )
    by_id = streamed(
        [piece(None, "x", "mail")],
        [piece(None, "y", "post")],
        [piece(None, "y", "", OSLO[:5])],
        [piece(None, "x", "", ROME)],
        [piece(None, "y", "", OSLO[5:])],
    )
    by_place = streamed(
        [piece(None, "x", "mail"), piece(None, "y", "post")],
        [piece(arguments=ROME[:3]), piece(arguments=OSLO[:5])],
        [piece(arguments=ROME[3:]), piece(arguments=OSLO[5:])],
    )
    assert by_index == by_id == by_place == [("mail", ROME), ("post", OSLO)]


def test_new_id_with_each_piece_is_still_one_call() -> None:
    assert streamed([piece(0, "x", "mail", ROME[:4])], [piece(0, "y", "", ROME[4:])]) == [("mail", ROME)]


def test_name_with_each_piece_is_still_one_call() -> None:
    assert streamed(*([piece(0, "", "mail", letter)] for letter in ROME)) == [("mail", ROME)]
    assert streamed(*([piece(None, "x", "mail", letter)] for letter in ROME)) == [("mail", ROME)]


def test_one_id_for_calls_of_two_indices_is_two_calls() -> None:
    assert streamed([piece(0, "x", "mail", ROME)], [piece(1, "x", "mail", OSLO)]) == [("mail", ROME), ("mail", OSLO)]


def test_calls_come_in_order_of_index() -> None:
    assert streamed([piece(1, "y", "post", OSLO)], [piece(0, "x", "mail", ROME)]) == [("mail", ROME), ("post", OSLO)]


def test_surrogate_pair_split_over_arguments_is_one_character() -> None:
    assert streamed([piece(0, "x", "mail", '{"a":"\ud83e')], [piece(0, arguments='\udd51"}')]) == [
        ("mail", '{"a":"\U0001f951"}')
    ]


@given(
    calls=st.lists(st.tuples(st.sampled_from(["mail", "post"]), st.text(max_size=12)), min_size=1, max_size=4),
    size=st.integers(1, 5),
    style=st.sampled_from(["index", "id", "both", "index -1 and id"]),
)
def test_calls_cut_into_any_pieces_come_back(calls: list[tuple[str, str]], size: int, style: str) -> None:
    events: list[list[CallPiece]] = []
    for place, (name, arguments) in enumerate(calls):
        index = place if style in ("index", "both") else None
        id_ = "" if style == "index" else f"c{place}"
        events.append([piece(index, id_, name)])
        events += [[piece(index, id_, "", arguments[start : start + size])] for start in range(0, len(arguments), size)]
    assert streamed(*events) == calls
