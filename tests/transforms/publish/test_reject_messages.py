"""Messages of rejects are counted by kind, in bounded memory, and without what they quote of rows."""

import pyarrow as pa
import pytest

from moebeam.transforms.publish import reject_messages
from moebeam.transforms.publish.reject_messages import (
    MessageCount,
    count_messages,
    drop_quotes,
    list_commonest,
    merge_messages,
    parse_commonest,
)


def rejects(*rows: tuple[str, str, str]) -> pa.Table:
    columns = zip(*rows, strict=True)
    return pa.table(dict(zip(reject_messages.MESSAGE_COLUMNS, map(list, columns), strict=True)))


def test_the_commonest_message_comes_first_and_numbers_make_no_kind_of_their_own() -> None:
    no_model = "deepseek: HTTP 400: Model Not Exist"
    found = count_messages(
        rejects(
            ("not_json", "validate", "expected a value at line 1 column 7"),
            *[("request_refused", "run", no_model)] * 3,
            ("not_json", "validate", "expected a value at line 2 column 5"),
            ("request_refused", "run", "deepseek: HTTP 413: Model Not Exist"),
        )
    )
    assert [(count.message, count.num_rows) for count in found] == [
        (no_model, 3),
        ("expected a value at line 1 column 7", 2),
        ("deepseek: HTTP 413: Model Not Exist", 1),
    ]
    assert parse_commonest(list_commonest(found)) == found  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ('at /score: Type: expected integer, found "a secret"', "at /score: Type: expected integer"),
        ("KeyError: 'a secret'", "KeyError"),
        ("Ticket raised ValueError: a secret", "Ticket"),
        ("expected JSON, found an empty text", "expected JSON"),
    ],
)
def test_what_a_message_quotes_of_a_row_stays_in_the_table(message: str, shown: str) -> None:
    assert drop_quotes("validate", message) == shown


def test_a_providers_message_stays_whole_on_one_line_and_is_cut_where_it_is_long() -> None:
    assert (
        drop_quotes("run", "x: HTTP 404: the model 'm'\n does not exist") == "x: HTTP 404: the model 'm' does not exist"
    )
    assert len(drop_quotes("run", "x" * 1000)) == 200


def test_memory_is_bounded_and_the_commonest_kinds_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reject_messages, "_MAX_KINDS", 3)
    counts = [MessageCount("t", f"message {letter}", 1 + (letter == "c")) for letter in "abcdef"]
    merged = merge_messages(counts)
    assert (len(merged), merged[0]) == (3, MessageCount("t", "message c", 2))
