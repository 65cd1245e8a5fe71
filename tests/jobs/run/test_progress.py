import io
import subprocess
import time
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal

import duckdb
import pytest
from rich.console import Console

from moebeam.jobs.console.formats import (
    format_duckdb_command,
    format_duration,
    format_money,
    format_outage,
    format_outage_end,
)
from moebeam.jobs.console.summary import CheckReport, ProgressSnapshot, RunSummary
from moebeam.jobs.run.progress import StageRates, print_report, print_summary, show_progress
from moebeam.transforms.durable.progress import OutageNote
from tests.support.jobs.progress_snapshots import answering_snapshot
from tests.support.jobs.run_summaries import summary

START = answering_snapshot(rows_total=2000, shards_total=8)
SUMMARY = summary(
    output="/data/out",
    rows_in=2000,
    num_results=1990,
    num_rejects=10,
    rejects_by_type={"truncated": 7, "not_json": 3},
    prompt_tokens=1_000_000,
    cached_tokens=812_000,
    computed_tokens=188_000,
    completion_tokens=64_000,
    max_hit_rate=0.84,
    cost=Decimal("1.5"),
    cost_allocated=Decimal("1.5"),
    price_book="prices.csv",
    elapsed_s=75.0,
)


def at(elapsed_s: float, rows_done: int, **changes: object) -> ProgressSnapshot:
    return replace(START, elapsed_s=elapsed_s, rows_done=rows_done, **changes)


def plain_console(*, is_terminal: bool = False, width: int = 80) -> Console:
    return Console(file=io.StringIO(), force_terminal=is_terminal, width=width, color_system=None)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def shown(summary: RunSummary) -> str:
    console = plain_console()
    print_summary(console, summary)
    return text_of(console)


def test_the_eta_follows_the_last_half_minute():
    rates = StageRates()
    for second in range(101):
        # Ten rows a second at first, one a second for the last 50 seconds.
        rates.add(at(second, 10 * second if second <= 50 else 450 + second))
    assert rates.eta_s == pytest.approx(1450)


def test_rates_start_again_at_every_stage():
    rates = StageRates()
    rates.add(at(0, 0, stage="render"))
    rates.add(at(1, 2000, stage="render"))
    rates.add(at(2, 0))
    assert rates.eta_s is None
    rates.add(at(4, 20, prompt_tokens=150, completion_tokens=50))
    assert rates.eta_s == pytest.approx(198)
    assert rates.tokens_per_s == pytest.approx(100)


def test_rates_are_unknown_without_time_or_total():
    rates = StageRates()
    rates.add(at(1, 0, rows_total=None))
    rates.add(at(1, 5, rows_total=None))
    assert (rates.eta_s, rates.tokens_per_s) == (None, None)
    rates.add(at(2, 9, rows_total=None))
    assert rates.eta_s is None


def test_without_a_terminal_lines_come_at_most_every_five_seconds_and_at_stage_changes():
    console = plain_console()
    now = 0.0
    with show_progress(console, clock=lambda: now) as show:
        for tick in range(110):
            now = tick / 10
            show(at(now, tick, stage="plan" if tick < 20 else "answer"))
    starts = [line.split(" rows")[0] for line in text_of(console).splitlines()]
    assert starts == ["plan: 0/2,000", "answer: 20/2,000", "answer: 70/2,000", "answer: 109/2,000"]


OUTAGE = OutageNote(
    "deepseek",
    since=datetime(2026, 11, 30, 12, 3).astimezone(),
    next_try_at=datetime(2026, 11, 30, 12, 4, 8).astimezone(),
    message="connection refused",
    written_at=0.0,
)


def test_an_outage_is_told_in_local_time_with_its_next_try() -> None:
    at_four = datetime(2026, 11, 30, 12, 4).astimezone()
    assert format_outage(OUTAGE, at_four) == "deepseek unreachable since 12:03, next try in 8 s: connection refused"
    late = OUTAGE.next_try_at.astimezone(UTC)
    assert format_outage(OUTAGE, late) == "deepseek unreachable since 12:03, trying again: connection refused"
    assert format_outage_end(OUTAGE, at_four) == "deepseek answers again after 60 s"


def test_without_a_terminal_an_outage_is_told_at_once_then_now_and_then_and_when_it_is_over() -> None:
    console = plain_console()
    now = 0.0
    with show_progress(console, clock=lambda: now) as show:
        for tick in range(100):
            now = tick / 10
            show(at(now, 5, outage=OUTAGE if 10 <= tick < 70 else None))
    lines = text_of(console).splitlines()
    told = [line.split(" rows, ")[-1].split(" since")[0].split(" after")[0] for line in lines]
    assert told == [
        "0/8 shards",
        "deepseek unreachable",
        "deepseek unreachable",
        "deepseek answers again",
        "0/8 shards",
    ]


def test_the_bar_shows_why_a_run_waits_or_ends_and_keeps_the_end_of_an_outage() -> None:
    console = plain_console(is_terminal=True, width=200)
    with show_progress(console) as show:
        show(at(1, 5, outage=OUTAGE))
        console.print("stopping")
        show(at(2, 5, outage=OUTAGE, stop="stopping: stopped by SIGTERM"))
        show(at(3, 5))
    text = text_of(console)
    assert "deepseek answers again after" in text
    assert text.index("stopping") < text.index("deepseek answers again")


def test_without_a_terminal_nothing_is_repeated_or_wrapped_or_coloured():
    console = plain_console()
    with show_progress(console) as show:
        show(
            at(1, 1234, num_rejects=12, prompt_tokens=1000, cached_tokens=812, cost=Decimal("0.0123"), currency="USD"),
        )
    assert text_of(console) == (
        "answer: 1,234/2,000 rows, 12 rejects, 0/8 shards, 81.2% cache hits, 0.0123 USD so far\n"
    )


def test_an_error_inside_still_shows_the_last_snapshot():
    console = plain_console()
    with pytest.raises(KeyError), show_progress(console, clock=lambda: 0.0) as show:
        show(at(0, 0))
        show(at(1, 77))
        raise KeyError
    assert "77/2,000" in text_of(console)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_on_a_terminal_the_bar_shows_rows_tokens_hits_cost_and_eta(width: int):
    console = plain_console(is_terminal=True, width=width)
    with show_progress(console) as show:
        show(at(0, 0))
        show(at(10, 1000, prompt_tokens=900, cached_tokens=450, completion_tokens=100, cost=Decimal(2), currency="EUR"))
        time.sleep(0.3)
    text = text_of(console)
    for part in ["answer", "1,000/2,000", "100 tokens/s", "50.0%", "2.00 EUR", "ETA 10 s"]:
        assert part in text.replace("\n", " ")


def test_the_summary_says_what_came_out_and_what_it_cost():
    text = shown(SUMMARY)
    for part in [
        "done in 1:15 min",
        "2,000",
        "1,990",
        "10 (3 not_json, 7 truncated)",
        "812,000 cache hit, 188,000 cache miss, 64,000 output",
        "81.2% of prompt tokens; the plan allows 84.0%",
        "1.50 USD, 0.750 USD per 1,000 rows",
        "/data/out/results",
    ]:
        assert part in text


def test_the_summary_tells_unknown_from_zero():
    text = shown(replace(SUMMARY, cached_tokens=None, cost=None, price_book=None, max_hit_rate=None))
    assert "cache hits unknown" in text
    assert "unknown: the job names no price book" in text
    assert "0.00" not in text


def test_a_run_that_only_took_over_answers_cost_nothing():
    reused = replace(SUMMARY, cost=None, num_reused=1990, prompt_tokens=0, completion_tokens=0)
    text = shown(reused)
    assert "none, nothing was asked" in text and "1,990 of the results" in text
    assert "unknown: no price applies" in shown(replace(reused, prompt_tokens=5))


def test_an_upper_bound_is_called_one():
    assert "at most 1.50 USD" in shown(replace(SUMMARY, cost_basis="upper_bound"))


def test_a_summary_of_nothing_divides_nothing_by_zero():
    text = shown(
        replace(SUMMARY, rows_in=0, num_results=0, num_rejects=0, prompt_tokens=0, cached_tokens=0, cost=Decimal(0))
    )
    assert "none, no prompt was run" in text
    assert "0.00 USD" in text
    assert "per 1,000" not in text


@pytest.mark.parametrize(
    ("changes", "headline"),
    [
        ({"status": "already_done"}, "already done: nothing was run"),
        ({"status": "incomplete", "exit_code": 4}, "stopped before the end; nothing is lost"),
        ({"exit_code": 3}, "more rejects than the job allows (exit code 3)"),
        ({"exit_code": 3, "num_unreadable": 2}, "unreadable input (exit code 3)"),
    ],
)
def test_the_headline_says_how_the_run_ended(changes: dict[str, object], headline: str):
    assert headline in shown(replace(SUMMARY, **changes)).splitlines()[0]


def test_a_stopped_run_says_how_to_go_on_and_shows_no_query():
    text = shown(replace(SUMMARY, status="incomplete", exit_code=4, message="stopped by SIGTERM"))
    assert "moebeam resume /data/out, or the same command again" in text
    assert "stopped by SIGTERM" in text
    assert "duckdb" not in text


def test_a_run_of_rejects_only_offers_to_query_the_rejects():
    assert "/rejects/*.parquet" in shown(replace(SUMMARY, num_results=0))


def test_text_from_elsewhere_is_not_read_as_markup():
    assert "/data/[red]out[/red]/results" in shown(replace(SUMMARY, output="/data/[red]out[/red]"))


def test_the_query_survives_the_shell_and_runs(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp('it\'s "$HOME" `x`')
    duckdb.sql("SELECT 1 AS custom_id, '{}' AS output_json, 2 AS cost").write_parquet(str(folder / "a.parquet"))
    command = format_duckdb_command("SELECT custom_id, output_json, cost FROM '{}'", f"{folder}/*.parquet")
    assert command.startswith("duckdb -c ")
    echo = ["sh", "-c", command.replace("duckdb -c", "printf %s", 1)]
    sql = subprocess.run(echo, check=True, capture_output=True, text=True).stdout
    assert duckdb.sql(sql).fetchall() == [(1, "{}", 2)]


def test_the_query_stays_on_one_line_however_long_the_path():
    assert f"/{'x' * 300}/results/*.parquet" in shown(replace(SUMMARY, output=f"/{'x' * 300}"))


def test_the_report_of_a_check_names_rows_columns_engine_schema_and_price():
    console = plain_console(width=200)
    columns = tuple(f"c{number}" for number in range(15))
    report = CheckReport(
        output="/out",
        num_files=3,
        num_rows=2000,
        limit=20,
        columns=columns,
        engine="fake",
        model="tiny",
        schema="/s.json",
        price="deepseek-chat: hit 0.07, miss 0.27, output 1.10 USD per 1,000,000 tokens",
        warnings=("the template uses no column",),
    )
    print_report(console, report)
    text = text_of(console)
    for part in ["2,000 rows in 3 files, of which at most 20 will run", "c11 and 3 more", "fake, tiny", "/s.json"]:
        assert part in text
    assert "hit 0.07" in text
    assert "warning: the template uses no column" in text


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        ("0", "0.00 USD"),
        ("0E-12", "0.00 USD"),
        ("1234.5", "1,234.50 USD"),
        ("0.5", "0.500 USD"),
        ("0.000001234567", "0.00000123 USD"),
        ("-0.0123", "-0.0123 USD"),
    ],
)
def test_small_amounts_keep_three_digits(amount: str, text: str):
    assert format_money(Decimal(amount), "USD") == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (12, "12 s"), (59.7, "1:00 min"), (3725, "1:02:05")]
)
def test_durations_read_naturally(seconds: float, text: str):
    assert format_duration(seconds) == text
