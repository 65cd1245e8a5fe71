"""A shard's tables: what answered, merged and rejected rows carry."""

from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from moebeam.model_runner.prefix_tree import prefix_key
from moebeam.schemas.answers import AccountedAnswer, ValidatedAnswer
from moebeam.schemas.errors import EngineFailed, NotJson, RowError
from moebeam.schemas.prices import PriceLine
from moebeam.schemas.records import Completion, Sampling, Usage, sampling_json
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.tables import plan_schema
from moebeam.transforms.answer.shard_tables import PlannedRows, shard_tables
from moebeam.transforms.durable.commit import commit_shard, sum_tables
from moebeam.transforms.money.account import Accounting, charge
from moebeam.transforms.money.price_book import PriceBook

LINE = PriceLine(
    line_id="7",
    provider="p",
    model="m",
    effective_from=datetime(2026, 1, 1, tzinfo=UTC),
    effective_to=None,
    windows=(),
    currency="USD",
    cache_hit=Decimal("0.1"),
    cache_miss=Decimal(1),
    output=Decimal(2),
)
RUN = Accounting("run", PriceBook("book@1", (), {}))


def planned(prompts: list[list[int] | None], merged_into: list[str | None]) -> PlannedRows:
    rows = [
        {
            "custom_id": f"r{row}",
            "source_file": "f",
            "source_row": 10 - row,
            "unit": 0,
            "scope": "row",
            "num_rows": 1,
            "sample": 0,
            "prefix_key": None if tokens is None else prefix_key("", np.array(tokens, np.int32)),
            "num_prompt_tokens": None if tokens is None else len(tokens),
            "sampling": sampling_json(Sampling(max_tokens=4)),
            "tenant": "t",
            "cost_center": "c",
            "error_type": "null_value" if tokens is None else None,
            "error_stage": "render" if tokens is None else None,
            "merged_into": merged_into[row],
            "passthrough": {"extra": row},
        }
        for row, tokens in enumerate(prompts)
    ]
    return PlannedRows.from_table(pa.Table.from_pylist(rows, schema=plan_schema([pa.field("extra", pa.int64())])))


def accounted(
    row: int, usage: Usage, *, error: RowError | None = None, priced: bool = True, attempt: int = 1
) -> AccountedAnswer:
    started = datetime(2026, 5, 1, tzinfo=UTC)
    completion = Completion(str(row), f"answer {row}", "stop", usage, started, 5.0, "p", "m", "rev", error=error)
    return AccountedAnswer(
        ValidatedAnswer(completion, None, error, attempt=attempt), charge(usage, LINE) if priced else None
    )


def test_the_row_that_was_asked_pays_and_the_cost_is_allocated_to_all_who_used_it() -> None:
    rows = planned([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 9]], [None, "r0", None])
    answers = {0: [accounted(0, Usage(4, 2, 0))], 2: [accounted(2, Usage(3, 1, 2))]}
    tables = shard_tables("s0", rows, answers, RUN)
    results = {row["custom_id"]: row for row in tables["results"].to_pylist()}
    assert [results[name]["output_text"] for name in ("r0", "r1", "r2")] == ["answer 0", "answer 0", "answer 2"]
    assert (results["r0"]["cost"], results["r1"]["cost"]) == (Decimal("0.000008"), Decimal(0))
    assert results["r2"]["cost"] == Decimal("0.0000032")
    assert (results["r1"]["attempts"], results["r1"]["prompt_tokens"], results["r1"]["latency_ms"]) == (0, 0, None)
    # Tokens 1 and 2 were billed 2 misses and 2 hits to three rows; tokens 3 and 4 and the output to two of them.
    shared = Decimal("0.0000022") / 3
    assert abs(results["r1"]["cost_allocated"] - (shared + Decimal("0.000003"))) < Decimal("1e-11")
    assert abs(results["r2"]["cost_allocated"] - (shared + Decimal("0.000003"))) < Decimal("1e-11")
    assert sum(row["cost_allocated"] for row in results.values()) == Decimal("0.0000112")
    ledger = tables["ledger"].to_pylist()
    assert [(line["custom_id"], line["outcome"], line["price_line"]) for line in ledger] == [
        ("r0", "answered", "7"),
        ("r2", "answered", "7"),
    ]
    assert sum(line["cost_allocated"] for line in ledger) == Decimal("0.0000112")
    # A line carries the shares of all rows that it answers.
    shares = {name: row["cost_allocated"] for name, row in results.items()}
    assert [line["cost_allocated"] for line in ledger] == [shares["r0"] + shares["r1"], shares["r2"]]


def test_a_failed_request_rejects_its_merged_rows_and_is_still_paid() -> None:
    rows = planned([[1], [1]], [None, "r0"])
    tables = shard_tables("s0", rows, {0: [accounted(0, Usage(1, 0, 0), error=EngineFailed("broke"))]}, RUN)
    assert tables["results"].num_rows == 0
    rejects = tables["rejects"].to_pylist()
    assert [row["error_type"] for row in rejects] == ["engine_failed"] * 2
    assert {row["error_message"] for row in rejects} == {"broke"}
    assert [line["outcome"] for line in tables["ledger"].to_pylist()] == ["rejected"]
    assert sum(row["cost"] for row in rejects) == Decimal("0.000001")


def test_rows_come_out_in_input_order_with_their_passthrough_columns() -> None:
    rows = planned([[1], [2], None], [None, None, None])
    tables = shard_tables("s0", rows, {0: [accounted(0, Usage(1, 1, 0))], 1: [accounted(1, Usage(1, 1, 0))]}, RUN)
    assert tables["results"].column("custom_id").to_pylist() == ["r1", "r0"]
    assert tables["results"].column("extra").to_pylist() == [1, 0]
    (reject,) = tables["rejects"].to_pylist()
    assert (reject["extra"], reject["error_type"], reject["cost"], reject["attempts"]) == (
        2,
        "null_value",
        Decimal(0),
        0,
    )


def test_every_attempt_is_in_the_ledger_and_the_row_pays_for_all_of_them() -> None:
    rows = planned([[1, 2], [1, 2], [1, 9]], [None, "r0", None])
    first = accounted(0, Usage(2, 1, 0), error=NotJson("no"))
    second = accounted(0, Usage(5, 2, 2), attempt=2)
    tables = shard_tables("s0", rows, {0: [first, second], 2: [accounted(2, Usage(2, 1, 1))]}, RUN)
    results = {row["custom_id"]: row for row in tables["results"].to_pylist()}
    paid = results["r0"]
    assert (paid["attempts"], paid["prompt_tokens"], paid["cached_tokens"], paid["computed_tokens"]) == (2, 7, 2, 5)
    assert (paid["completion_tokens"], paid["latency_ms"], paid["status"]) == (3, 10.0, "ok")
    for row in (results["r0"], results["r1"]):
        (failed,) = row["failed_attempts"]
        assert (failed["attempt"], failed["error_type"], failed["output_text"]) == (1, "not_json", "answer 0")
    assert results["r2"]["failed_attempts"] is None
    ledger = tables["ledger"].to_pylist()
    assert [(line["custom_id"], line["attempt"], line["outcome"]) for line in ledger] == [
        ("r0", 1, "rejected"),
        ("r0", 2, "answered"),
        ("r2", 1, "answered"),
    ]
    assert paid["cost"] == ledger[0]["cost"] + ledger[1]["cost"]
    # A later attempt is its row's own affair; the first shares its prefix with the third row.
    assert ledger[1]["cost_allocated"] == ledger[1]["cost"]
    for name in ("cost", "cost_allocated"):
        assert sum(row[name] for row in results.values()) == sum(line[name] for line in ledger)
    assert sum(line["cost_allocated"] for line in ledger) == sum(line["cost"] for line in ledger)


def test_attempts_without_a_price_are_named_and_never_zero() -> None:
    rows = planned([[1], [2]], [None, None])
    priced, unpriced = accounted(0, Usage(1, 1, 0)), accounted(0, Usage(1, 1, 0), priced=False, error=NotJson("no"))
    tables = shard_tables("s0", rows, {0: [unpriced, priced], 1: [unpriced, unpriced]}, RUN)
    rows_found = {row["custom_id"]: row for name in ("results", "rejects") for row in tables[name].to_pylist()}
    known = rows_found["r0"]
    assert (known["cost"], known["cost_allocated"], known["cost_basis"]) == (*[priced.charge.cost] * 2, "partial")
    assert (rows_found["r1"]["cost"], rows_found["r1"]["cost_basis"]) == (None, None)
    assert [line["cost"] for line in tables["ledger"].to_pylist()] == [None, priced.charge.cost, None, None]


def test_answer_without_a_usage_has_no_tokens_and_no_cost_but_estimates() -> None:
    rows = planned([[1, 2], [1, 2], [9]], [None, "r0", None])
    counted = accounted(0, Usage(2, 1, 0), error=NotJson("no"))
    unknown = accounted(0, Usage(None, None).with_estimates(20, 6), priced=False, attempt=2)
    tables = shard_tables("s0", rows, {0: [counted, unknown], 2: [accounted(2, Usage(1, 1, 0))]}, RUN)
    results = {row["custom_id"]: row for row in tables["results"].to_pylist()}
    names = ("prompt_tokens", "cached_tokens", "computed_tokens", "completion_tokens", "reasoning_tokens")
    assert [results["r0"][name] for name in names] == [None] * 5
    # The row's estimate is of all its attempts, the line's of what that attempt does not say.
    assert (results["r0"]["estimated_prompt_tokens"], results["r0"]["estimated_completion_tokens"]) == (22, 7)
    assert (results["r0"]["usage_status"], results["r0"]["cost_basis"]) == ("missing", "partial")
    assert (results["r1"]["usage_status"], results["r1"]["prompt_tokens"]) == (None, 0)
    assert (results["r2"]["usage_status"], results["r2"]["estimated_prompt_tokens"]) == ("reported", None)
    first, second, _ = tables["ledger"].to_pylist()
    assert (first["usage_status"], first["estimated_prompt_tokens"]) == ("reported", None)
    assert (second["usage_status"], second["estimated_prompt_tokens"], second["cache_miss_tokens"]) == (
        "missing",
        20,
        None,
    )
    totals = sum_tables(tables)
    assert (totals.num_unknown_usage, totals.num_unpriced, totals.estimated_completion_tokens) == (1, 1, 6)
    assert (totals.prompt_tokens, totals.completion_tokens, totals.cached_tokens) == (3, 2, None)


def test_usage_that_contradicts_itself_stands_in_the_row_and_bounds_the_bill_in_the_ledger() -> None:
    rows = planned([[1, 2]], [None])
    tables = shard_tables("s0", rows, {0: [accounted(0, Usage(10, 4, 25, 30))]}, RUN)
    (row,), (line,) = tables["results"].to_pylist(), tables["ledger"].to_pylist()
    assert (row["prompt_tokens"], row["cached_tokens"], row["computed_tokens"]) == (10, 25, None)
    assert (row["completion_tokens"], row["reasoning_tokens"]) == (4, 30)
    assert row["usage_status"] == line["usage_status"] == "contradictory"
    assert row["cost_basis"] == line["cost_basis"] == "upper_bound"
    classes = ("cache_hit_tokens", "cache_miss_tokens", "visible_output_tokens", "reasoning_tokens")
    assert [line[name] for name in classes] == [None, 35, 4, 30]
    assert row["cost"] == line["cost"] == Decimal("0.000103")
    assert sum_tables(tables).prompt_tokens == 35


def test_request_that_nobody_answered_has_no_status() -> None:
    rows = planned([[1]], [None])
    refused = accounted(0, Usage(0, 0, 0), error=EngineFailed("refused"), priced=False)
    tables = shard_tables("s0", rows, {0: [refused]}, RUN)
    assert tables["rejects"].column("usage_status").to_pylist() == [None]
    assert tables["ledger"].column("usage_status").to_pylist() == [None]


def test_provider_word_for_the_end_and_what_was_mended_stand_in_the_row() -> None:
    one = accounted(0, Usage(1, 1, 0))
    completion = replace(one.answer.completion, provider_finish_reason="eos", repaired=("text_for_json",))
    tables = shard_tables(
        "s0", planned([[1]], [None]), {0: [replace(one, answer=replace(one.answer, completion=completion))]}, RUN
    )
    assert tables["results"].column("provider_finish_reason").to_pylist() == ["eos"]
    assert tables["results"].column("repaired").to_pylist() == [["text_for_json"]]


def test_attempts_priced_in_two_currencies_have_no_sum_and_still_agree_with_the_ledger(tmp_path: Path) -> None:
    rows = planned([[1, 2], [1, 2], [1, 9]], [None, "r0", None])
    yuan = replace(LINE, currency="CNY", line_id="8")
    first, again = accounted(0, Usage(2, 1, 0), error=NotJson("no")), accounted(0, Usage(5, 2, 2), attempt=2)
    answers = {
        0: [first, replace(again, charge=charge(Usage(5, 2, 2), yuan))],
        2: [accounted(2, Usage(2, 1, 1))],
    }
    tables = shard_tables("s0", rows, answers, RUN)
    results = {row["custom_id"]: row for row in tables["results"].to_pylist()}
    for name in ("r0", "r1"):
        row = results[name]
        assert (row["cost"], row["cost_allocated"], row["currency"]) == (None, None, None)
        assert row["cost_basis"] == "mixed_currency"
        assert [entry["currency"] for entry in row["costs_by_currency"]] == ["USD", "CNY"]
    assert results["r2"]["costs_by_currency"] is None
    paid = {entry["currency"]: entry["cost"] for entry in results["r0"]["costs_by_currency"]}
    assert paid == {"USD": Decimal("0.000004"), "CNY": Decimal("0.0000072")}
    shares = [entry["cost_allocated"] for name in ("r0", "r1") for entry in results[name]["costs_by_currency"][1:]]
    assert shares == [Decimal("0.0000036")] * 2
    commit = commit_shard(RunLayout(str(tmp_path)), "run", "s0", tables)
    assert commit.totals.costs == {"CNY": "0.000007200000", "USD": "0.000007100000"}


@given(st.lists(st.tuples(st.sampled_from(["USD", "CNY", None]), st.integers(0, 9)), min_size=1, max_size=4), st.data())
def test_rows_and_ledger_agree_whatever_currencies_attempts_have(first: list[Any], data: st.DataObject) -> None:
    prompts: list[list[int] | None] = [[1, 2], [1, 2], [1, 9]]
    others = data.draw(
        st.lists(st.tuples(st.sampled_from(["USD", "CNY", None]), st.integers(0, 9)), min_size=1, max_size=3)
    )
    answers: dict[int, list[AccountedAnswer]] = {}
    for row, attempts in ((0, first), (2, others)):
        for number, (currency, output) in enumerate(attempts, 1):
            one = accounted(row, Usage(2, output, 1), attempt=number, priced=False)
            line = None if currency is None else replace(LINE, currency=currency)
            answers.setdefault(row, []).append(replace(one, charge=line and charge(Usage(2, output, 1), line)))
    tables = shard_tables("s0", planned(prompts, [None, "r0", None]), answers, RUN)
    costs = sum_tables(tables).costs or {}
    for currency in ("USD", "CNY"):
        charges = [a.charge for attempts in answers.values() for a in attempts if a.charge is not None]
        expected = sum((c.cost for c in charges if c.line.currency == currency), Decimal(0))
        assert Decimal(costs.get(currency, "0")) == expected


def test_the_amounts_of_the_token_classes_are_the_cost() -> None:
    tables = shard_tables("s0", planned([[1, 2, 3]], [None]), {0: [accounted(0, Usage(3, 5, 1, 2))]}, RUN)
    (line,) = tables["ledger"].to_pylist()
    amounts = [line[f"{name}_cost"] for name in ("cache_hit", "cache_miss", "visible_output", "reasoning")]
    assert amounts == [Decimal(text) for text in ("0.0000001", "0.000002", "0.000006", "0.000004")]
    assert sum(amounts) == line["cost"]


def test_tags_are_the_columns_that_are_not_null() -> None:
    rows = planned([[1], None], [None, None])
    accounting = Accounting("run", tag_columns=("extra",))
    tables = shard_tables("s0", rows, {0: [accounted(0, Usage(1, 1), priced=False, error=NotJson("no"))]}, accounting)
    (line,) = tables["ledger"].to_pylist()
    assert (line["tags"], line["error_type"], line["finish_reason"]) == ([("extra", "0")], "not_json", "stop")


def test_without_a_price_nothing_is_zero() -> None:
    rows = planned([[1]], [None])
    (row,) = shard_tables("s0", rows, {0: [accounted(0, Usage(1, 1), priced=False)]}, Accounting("run"))[
        "results"
    ].to_pylist()
    assert (row["cost"], row["cost_allocated"], row["currency"], row["cost_basis"]) == (None,) * 4
    assert (row["cached_tokens"], row["computed_tokens"]) == (None, None)


def test_a_shard_of_rejects_needs_no_answers(tmp_path: Path) -> None:
    tables = shard_tables("s0", planned([None, None], [None, None]), {}, RUN)
    assert [tables[name].num_rows for name in ("results", "rejects", "ledger")] == [0, 2, 0]
