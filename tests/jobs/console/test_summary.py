import json
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebeam.jobs.console.summary import CheckReport, choose_exit_code
from tests.support.jobs.run_summaries import summary


def code(**changes: object) -> int:
    values: dict[str, object] = {
        "is_complete": True,
        "answers_in": 100,
        "num_rejects": 0,
        "num_unreadable": 0,
        "max_reject_share": 0.0,
    }
    return choose_exit_code(**{**values, **changes})  # pyright: ignore[reportArgumentType]


def test_a_run_without_rejects_exits_with_0_and_one_with_any_with_3():
    assert code() == 0
    assert code(num_rejects=1) == 3


def test_zero_rows_are_a_success():
    assert code(answers_in=0) == 0


@given(st.integers(0, 100), st.integers(0, 100))
def test_rejects_are_allowed_exactly_up_to_the_share(num_rejects: int, percent: int):
    # percent / 100 is a float a little off for many values, such as 0.29.
    assert code(num_rejects=num_rejects, max_reject_share=percent / 100) == (0 if num_rejects <= percent else 3)


def test_an_unreadable_file_exits_with_3_whatever_share_is_allowed():
    assert code(num_unreadable=1, max_reject_share=1.0) == 3


def test_an_incomplete_run_exits_with_4_even_with_rejects():
    assert code(is_complete=False, num_rejects=5, num_unreadable=1) == 4


def test_json_keeps_money_exact_and_without_exponent():
    tiny = summary(cost=Decimal("0.000000120000"), cost_allocated=Decimal("0E-12"))
    answer = json.loads(json.dumps(tiny.to_json()))
    assert answer["cost"] == "0.000000120000"
    assert answer["cost_allocated"] == "0.000000000000"


def test_json_keeps_null_apart_from_zero_and_orders_rejects():
    rejects = {"truncated": 1, "not_json": 2}
    answer = summary(cost=None, cached_tokens=None, cost_allocated=None, rejects_by_type=rejects).to_json()
    assert (answer["cost"], answer["cached_tokens"]) == (None, None)
    assert list(answer["rejects_by_type"]) == ["not_json", "truncated"]  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert answer["exit_code"] == 0


def test_a_report_becomes_json():
    report = CheckReport(
        output="o",
        num_files=1,
        num_rows=7,
        limit=None,
        columns=("a", "b"),
        engine="fake",
        model="m",
        schema=None,
        price=None,
    )
    assert json.loads(json.dumps(report.to_json()))["columns"] == ["a", "b"]


def test_records_of_a_run_cannot_be_changed():
    with pytest.raises(AttributeError):
        summary().exit_code = 3  # pyright: ignore[reportAttributeAccessIssue]
