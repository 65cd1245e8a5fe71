"""Commit: makes a shard's tables durable exactly once, whatever is killed or repeated.

Ends *answer*. Tables are staged under names unique to this attempt; then one commit record is created exclusively, and
whoever creates it wins. It names the staged files, so a loser's files are never seen.
"""

import hashlib
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc

from moebeam.schemas.answers import ShardCommit, StagedFile, Totals
from moebeam.schemas.arrow import encode_parquet_file, list_values
from moebeam.schemas.determinism import Determinism
from moebeam.schemas.errors import CommitError, FileDamaged
from moebeam.schemas.prices import EXACT
from moebeam.schemas.store import storage
from moebeam.schemas.store.checked_file import open_checked
from moebeam.schemas.store.record_json import encode_record, read_record
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.tables import RESULT_SCHEMA, TABLES, Table
from moebeam.transforms.money.accelerator_time import with_accelerator_seconds


def read_commit(layout: RunLayout, shard: str) -> ShardCommit | None:
    """A shard's commit record; None if it is not committed.

    Raises:
        CommitError: the record exists but cannot be read.
    """
    return read_record(layout.shard_commit(shard), ShardCommit, "a commit record")


def list_committed_shards(layout: RunLayout) -> list[str]:
    """Names of the shards that are committed.

    Raises:
        OSError: the store failed.
    """
    return [name.removesuffix(".json") for name in storage.list_names(layout.commits, ".json")]


def read_commits(layout: RunLayout) -> dict[str, ShardCommit]:
    """All commit records by shard, in order of their shards.

    Raises:
        CommitError: a record cannot be read.
        OSError: the store failed.
    """
    shards = list_committed_shards(layout)
    return {shard: commit for shard in shards if (commit := read_commit(layout, shard)) is not None}


def open_committed(layout: RunLayout, commit: ShardCommit, table: Table) -> BinaryIO | None:
    """Open a table of a committed shard, checked, from where it is published or else staged; None if it has no row.

    Raises:
        FileDamaged: neither file is what was committed.
        CommitError: there is neither.
        OSError: the store failed.
    """
    file = next((file for file in commit.files if file.table == table), None)
    if file is None:
        return None
    published, staged = layout.published_file(table, commit.shard), storage.join(layout.output, file.path)
    damage: FileDamaged | None = None
    for path in (published, staged):
        try:
            return open_checked(path, file.sha256)
        except FileNotFoundError:
            continue
        except FileDamaged as error:
            damage = damage or error
    raise damage or CommitError(f"{published}: expected the {table} of shard {commit.shard}, found no file")


def commit_shard(
    layout: RunLayout,
    run_id: str,
    shard: str,
    tables: Mapping[Table, pa.Table],
    engine: Mapping[str, float] | None = None,
    determinism: Determinism | None = None,
) -> ShardCommit:
    """Stage a shard's tables and commit them; returns the winner's record if another copy was first.

    Args:
        engine: what the engine counted for this shard; its seconds are spread over the ledger lines.
        determinism: what the engine promises.
    Raises:
        CommitError: the tables contradict each other, or the store cannot create exclusively.
        OSError: the store failed; nothing is committed.
    """
    attempt = uuid.uuid4().hex
    totals = sum_tables(tables)
    tables = {**tables, "ledger": with_accelerator_seconds(tables["ledger"], engine)}
    files = tuple(_stage(layout, shard, attempt, table, tables[table]) for table in TABLES if tables[table].num_rows)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    commit = ShardCommit(shard, run_id, attempt, now, files, totals, engine, determinism)
    if storage.create_exclusive(layout.shard_commit(shard), encode_record(commit)):
        return commit
    storage.remove_files([storage.join(layout.output, file.path) for file in files])
    winner = read_commit(layout, shard)
    if winner is None:
        raise CommitError(f"{layout.shard_commit(shard)}: expected the record of another attempt, found none")
    return winner


def sum_tables(tables: Mapping[Table, pa.Table]) -> Totals:
    """Totals of a shard's tables, after checking that rows and ledger agree.

    Raises:
        CommitError: tokens or costs of the rows differ from the ledger's.
    """
    rows = pa.concat_tables([tables[name].select(RESULT_SCHEMA.names) for name in ("results", "rejects")])
    results, rejects, ledger = tables["results"], tables["rejects"], tables["ledger"]
    paid = ledger_totals(ledger)
    is_row = pc.equal(rejects.column("scope"), pa.scalar("row"))
    row_rejects, unreadable = rejects.filter(is_row), rejects.filter(pc.invert(is_row))
    costs = costs_by_currency(rows, "cost")
    counted, billed = _with_sound_usage(rows, ledger)
    _check_equal("prompt_tokens", _sum(counted, "prompt_tokens"), billed.prompt_tokens)
    _check_equal("completion_tokens", _sum(counted, "completion_tokens"), billed.completion_tokens)
    _check_equal("reasoning_tokens", _sum(counted, "reasoning_tokens"), billed.reasoning_tokens)
    _check_equal("cost", costs, costs_by_currency(ledger, "cost"))
    _check_equal("cost_allocated of the rows", costs_by_currency(rows, "cost_allocated"), costs)
    _check_equal("cost_allocated of the ledger", costs_by_currency(ledger, "cost_allocated"), costs)
    return replace(
        paid,
        num_results=results.num_rows,
        num_reused=results.num_rows - results.column("reused_from").null_count,
        num_rejects=row_rejects.num_rows,
        num_unreadable=unreadable.num_rows,
        num_unreadable_rows=_sum(unreadable, "num_rows"),
        rejects_by_type=_counts(rejects.column("error_type")),
        num_further_samples=_count_further_samples(rows.filter(pc.equal(rows.column("scope"), pa.scalar("row")))),
    )


def _with_sound_usage(rows: pa.Table, ledger: pa.Table) -> tuple[pa.Table, Totals]:
    """Rows, and totals of the ledger, without requests some attempt of which has a missing or contradictory usage.

    Of those a row says what the provider reported, if anything, and the ledger what may be billed.
    """
    is_other: Any = pc.not_equal(rows.column("usage_status"), pa.scalar("reported"))
    is_doubtful = pc.fill_null(is_other, False)
    if not pc.any(is_doubtful).as_py():
        return rows, ledger_totals(ledger)
    doubtful = set(_answers_of(rows.filter(is_doubtful)))
    is_billed = pa.array([answer not in doubtful for answer in _answers_of(ledger)], pa.bool_())
    return rows.filter(pc.invert(is_doubtful)), ledger_totals(ledger.filter(is_billed))


def _answers_of(table: pa.Table) -> Iterator[tuple[str, int]]:
    """The answer that each line is about: its row's id and its number among the row's samples."""
    return zip(list_values(table, "custom_id"), list_values(table, "sample"), strict=True)


def _count_further_samples(rows: pa.Table) -> int:
    """Rows beyond the first of their row of the input."""
    if not pc.any(pc.greater(rows.column("sample"), pa.scalar(0, pa.int32()))).as_py():
        return 0
    return rows.num_rows - rows.group_by(["source_file", "source_row"]).aggregate([]).num_rows


def ledger_totals(ledger: pa.Table) -> Totals:
    """Totals of a ledger alone: attempts, their tokens and their cost, nothing about rows."""
    is_unknown: Any = pc.or_(
        pc.is_null(ledger.column("cache_miss_tokens")), pc.is_null(ledger.column("visible_output_tokens"))
    )
    hits, reasoning = _sum(ledger, "cache_hit_tokens"), _sum(ledger, "reasoning_tokens")
    lost = costs_by_currency(ledger, "lost_cost_at_most")
    return Totals(
        num_attempts=ledger.num_rows,
        num_unpriced=ledger.column("cost").null_count,
        num_upper_bound=_counts(ledger.column("cost_basis")).get("upper_bound", 0),
        prompt_tokens=hits + _sum(ledger, "cache_miss_tokens"),
        cached_tokens=None if ledger.column("cache_hit_tokens").null_count else hits,
        completion_tokens=_sum(ledger, "visible_output_tokens") + reasoning,
        reasoning_tokens=reasoning,
        costs={currency: format(amount, "f") for currency, amount in costs_by_currency(ledger, "cost").items()},
        rejects_by_type={},
        num_lost_calls=_sum(ledger, "num_lost_calls"),
        lost_costs_at_most={currency: format(amount, "f") for currency, amount in lost.items()},
        num_unknown_usage=int(pc.sum(is_unknown).as_py() or 0),
        estimated_prompt_tokens=_sum(ledger, "estimated_prompt_tokens"),
        estimated_completion_tokens=_sum(ledger, "estimated_completion_tokens"),
    )


def _stage(layout: RunLayout, shard: str, attempt: str, table: Table, rows: pa.Table) -> StagedFile:
    content = encode_parquet_file(rows)
    path = layout.staged_file(shard, attempt, table)
    storage.write_whole(path, content)
    return StagedFile(table, layout.relative(path), rows.num_rows, len(content), hashlib.sha256(content).hexdigest())


def _check_equal(what: str, rows: object, ledger: object) -> None:
    if rows != ledger:
        raise CommitError(
            f"{what}: expected rows and ledger to agree, found {rows} in the rows, {ledger} in the ledger"
        )


def _sum(table: pa.Table, name: str) -> int:
    """The sum of a column; 0 where a table of an older version lacks it."""
    if name not in table.schema.names:
        return 0
    return int(pc.sum(table.column(name)).as_py() or 0)


def _counts(column: "pa.ChunkedArray[Any]") -> dict[str, int]:
    return dict(sorted(Counter(value for value in column.to_pylist() if value is not None).items()))


def costs_by_currency(table: pa.Table, column: str) -> dict[str, Decimal]:
    """Sum a column of amounts, such as `cost`, of rows or ledger lines by currency, in order of currency.

    A row whose attempts were priced in several currencies adds to each.
    """
    sums: dict[str, Decimal] = {}
    amounts = list(zip(list_values(table, "currency"), list_values(table, column), strict=True))
    if "costs_by_currency" in table.schema.names:
        mixed = list_values(table, "costs_by_currency")
        amounts += [(entry["currency"], entry[column]) for entries in mixed for entry in entries or ()]
    for currency, amount in amounts:
        if currency is not None and amount is not None:
            sums[currency] = EXACT.add(sums.get(currency, Decimal(0)), amount)
    return dict(sorted(sums.items()))
