"""The demo: `python -m moebeam.jobs.demo.run_demo --rows 2000 --folder demo_run`.

Makes support tickets as Parquet, writes a job file beside them, runs it with the embedded checkpoint as `moebeam run`
would, and shows five answers and the query that an analyst would type.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from moebeam.jobs.commands.cli import run_command
from moebeam.jobs.demo.tickets import (
    SYSTEM_PROMPT,
    USER_TEMPLATE,
    generate_tickets,
    list_expected_answers,
    make_tickets_table,
)
from moebeam.schemas.extras import require_extra

SEED = 2026
NUM_SHOWN = 5
_HERE = Path(__file__).parent

ANALYST_QUERY = """\
SELECT output.category                         AS category,
       count(*)                                AS tickets,
       count(*) FILTER (output.priority = 'urgent') AS urgent,
       sum(cost_allocated)                     AS cost,
       round(sum(cached_tokens) / sum(prompt_tokens), 3) AS cache_share
FROM '{output}/results/*.parquet'
GROUP BY ALL ORDER BY tickets DESC"""


def main() -> int:
    """Run the demo; returns the exit code of its job."""
    parser = argparse.ArgumentParser(description="Answer generated support tickets with the embedded checkpoint.")
    parser.add_argument("--rows", type=int, default=2000, help="tickets to generate")
    parser.add_argument("--folder", type=Path, default=Path("demo_run"), help="where everything is written")
    arguments = parser.parse_args()
    for extra in ("torch", "duckdb"):
        require_extra(extra, "the demo")
    folder: Path = arguments.folder
    expected = write_demo(folder, arguments.rows)
    console = Console(soft_wrap=True)
    console.print(f"$ moebeam run {folder / 'job.toml'}", highlight=False)
    exit_code = run_command(["run", str(folder / "job.toml")])
    if exit_code in (0, 3):
        show_answers(console, folder / "output", expected)
    return exit_code


def write_demo(folder: Path, num_rows: int) -> dict[str, str]:
    """Write tickets, job file, schema and prices into a folder; returns the right answers by ticket id."""
    folder.mkdir(parents=True, exist_ok=True)
    tickets = generate_tickets(num_rows, seed=SEED, split="held_out", num_customers=max(1, num_rows // 10))
    pq.write_table(make_tickets_table(tickets), folder / "tickets.parquet", row_group_size=100)
    job = (_HERE / "job.toml").read_text().replace("@SYSTEM@", SYSTEM_PROMPT).replace("@TEMPLATE@", USER_TEMPLATE)
    (folder / "job.toml").write_text(job)
    for name in ("ticket.schema.json", "prices.csv"):
        shutil.copyfile(_HERE / name, folder / name)
    return list_expected_answers(tickets)


def show_answers(console: Console, output: Path, expected: dict[str, str]) -> None:
    """Print five answers, how many are right, and an analyst's query with its result."""
    import duckdb  # only the demo needs it

    results = pq.read_table(output / "results").sort_by("custom_id")
    table = Table(title=f"{NUM_SHOWN} of {results.num_rows} answers")
    table.add_column("ticket", no_wrap=True)
    table.add_column("answer", overflow="fold")
    table.add_column("tokens in + out", no_wrap=True)
    table.add_column("cost", no_wrap=True)
    for row in results.slice(0, NUM_SHOWN).to_pylist():
        tokens = f"{row['prompt_tokens']} + {row['completion_tokens']}"
        table.add_row(row["custom_id"], row["output_json"], tokens, f"{row['cost']:.7f} {row['currency']}")
    Console(width=120).print(table)
    right = _count_right(results, expected)
    console.print(f"{right} of {len(expected)} answers are exactly right (wordings the model never saw in training).\n")
    query = ANALYST_QUERY.format(output=output)
    console.print(query, highlight=False)
    console.print(str(duckdb.sql(query)), highlight=False)


def _count_right(results: pa.Table, expected: dict[str, str]) -> int:
    rows: list[dict[str, Any]] = results.select(["custom_id", "output_json"]).to_pylist()
    return sum(json.loads(row["output_json"]) == json.loads(expected[row["custom_id"]]) for row in rows)


if __name__ == "__main__":
    raise SystemExit(main())
