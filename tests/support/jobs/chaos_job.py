"""A whole run against aimock while it drops, garbles, refuses and cuts calls; what must hold of its tables afterwards.

Tests run it with some hundred rows, `python -m benchmarks.chaos` with ten thousand.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from moebeam.jobs.run.launch import launch
from moebeam.schemas.job.sections import Job
from tests.support.servers.aimock_server import Aimock

CHAOS = {"drop": 0.05, "malformed": 0.05, "ratelimit": 0.05, "disconnect": 0.02}
KEY_VARIABLE = "MOEBEAM_CHAOS_KEY"
MODEL = "deepseek-v4-flash"
PRICES = f"""\
provider,model,effective_from_utc,effective_to_utc,window_utc,currency,cache_hit_per_mtok,cache_miss_per_mtok,\
output_per_mtok,evidence,note
sglang,{MODEL},2020-01-01T00:00:00Z,,,USD,0.028,0.14,0.28,the mission's reference prices,
"""
KINDS: Mapping[str, tuple[int, int]] = {"alpha": (1100, 31), "beta": (907, 7), "gamma": (64, 301)}
"""Word in a question -> prompt and answer tokens of its fixture. aimock tells nothing of cached tokens."""


@dataclass(frozen=True, slots=True)
class ChaosFigures:
    """What became of a run.

    Attributes:
        num_lines: of the ledger.
        num_twice: requests with more than one ledger line of outcome `answered`.
        num_wrong_usage: such lines whose usage is not that of the fixture.
        cost: of the ledger; `fixtures_cost` of the fixtures of the rows that were answered.
        failed_calls: by kind, as the engine counted them.
    """

    num_rows: int
    num_results: int
    num_rejects: int
    num_lines: int
    num_twice: int
    num_wrong_usage: int
    cost: Decimal
    fixtures_cost: Decimal
    num_calls: int
    failed_calls: Mapping[str, int]
    num_lost_calls: int
    lost_cost_at_most: Decimal
    num_lost_calls_of_engine: int
    checks: Mapping[str, str]
    elapsed_s: float


def kind_of(row: int) -> str:
    return tuple(KINDS)[row % len(KINDS)]


def find_cost(row: int) -> Decimal:
    """What the fixture of a row costs, by the arithmetic of the price list; all its input is charged as missed."""
    prompt, output = KINDS[kind_of(row)]
    return (prompt * Decimal("0.14") + output * Decimal("0.28")) / 10**6


def fixtures() -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    for word, (prompt, output) in KINDS.items():
        usage = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
        response = {"content": f"answer {word}", "usage": usage, "model": MODEL}
        found.append({"match": {"userMessage": word}, "response": response})
    return found


def chaos_job(folder: Path, num_rows: int, base_url: str, **model: Any) -> Job:
    """Write the input; the job over it."""
    rows = range(num_rows)
    texts = [f"question {row} of kind {kind_of(row)}" for row in rows]
    pq.write_table(pa.table({"text": texts, "n": list(rows)}), folder / "in.parquet", row_group_size=1000)
    (folder / "prices.csv").write_text(PRICES)
    values: dict[str, Any] = {
        "input": {"path": str(folder / "in.parquet"), "passthrough": ["n"]},
        "prompt": {"template": "{{ text }}"},
        "output": {"path": str(folder / "out"), "max_reject_share": 1.0},
        "model": {
            "engine": "openai",
            "provider": "sglang",
            "name": MODEL,
            "base_url": base_url,
            "max_concurrency": 64,
            **model,
        },
        "sampling": {"max_tokens": 400},
        "accounting": {"price_book": str(folder / "prices.csv")},
        "plan": {"max_shard_rows": 1000},
    }
    return Job.model_validate(values)


def run_chaos(folder: Path, num_rows: int) -> ChaosFigures:
    """Run it to its end, and look at its tables."""
    with Aimock(folder, fixtures(), CHAOS) as served:
        summary = launch(chaos_job(folder, num_rows, served.base_url))
    output = folder / "out"
    manifest = json.loads((output / "manifest.json").read_text())
    results, rejects, ledger = (pq.read_table(output / name) for name in ("results", "rejects", "ledger"))
    assert summary.cost is not None
    answered = sorted([*results.column("n").to_pylist(), *rejects.column("n").to_pylist()])
    assert answered == list(range(num_rows)), "each row of the input is in results or rejects, once"
    lines = duckdb.sql(
        "SELECT source_row, count(*), min(cache_miss_tokens), min(visible_output_tokens), count(cache_hit_tokens) "
        "FROM ledger WHERE outcome = 'answered' GROUP BY ALL"
    ).fetchall()
    wrong = sum((miss, output, num_known) != (*KINDS[kind_of(row)], 0) for row, _, miss, output, num_known in lines)
    engine: dict[str, float] = manifest["engine"]
    return ChaosFigures(
        num_rows=num_rows,
        num_results=results.num_rows,
        num_rejects=rejects.num_rows,
        num_lines=ledger.num_rows,
        num_twice=sum(times > 1 for _, times, *_ in lines),
        num_wrong_usage=wrong,
        cost=sum((cost for cost in ledger.column("cost").to_pylist() if cost is not None), Decimal(0)),
        fixtures_cost=sum((find_cost(row) for row in results.column("n").to_pylist()), Decimal(0)),
        num_calls=int(engine["num_calls"]),
        failed_calls={
            kind: int(engine.get(f"num_{kind}", 0))
            for kind in ("engine_failed", "malformed_response", "engine_overloaded", "engine_timeout")
        },
        num_lost_calls=sum(count or 0 for count in ledger.column("num_lost_calls").to_pylist()),
        lost_cost_at_most=Decimal(manifest["totals"]["lost_costs_at_most"].get("USD", "0")),
        num_lost_calls_of_engine=int(engine.get("num_lost_calls", 0)),
        checks=manifest["checks"],
        elapsed_s=summary.elapsed_s,
    )
