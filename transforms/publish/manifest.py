"""Publishes tables that appear whole, and the manifest last.

The core of *publish*; `step.py` wraps it for Beam. Everything here is idempotent: names derive from shards.
"""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from functools import reduce

from moebeam.model_runner.protocol import add_counters
from moebeam.schemas.answers import ShardCommit, Totals
from moebeam.schemas.arrow import encode_parquet_file
from moebeam.schemas.canonical import Json
from moebeam.schemas.column_types import loosen_sizes
from moebeam.schemas.determinism import merge_determinisms
from moebeam.schemas.errors import CommitError, FileDamaged
from moebeam.schemas.store import storage
from moebeam.schemas.store.checked_file import read_checked
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.tables import LEDGER_SCHEMA, TABLES, TABLES_VERSION, Table
from moebeam.transforms.answer.waste import Waste, publish_waste
from moebeam.transforms.durable.stop import read_stop
from moebeam.transforms.plan.plan_record import PlanRecord, read_plan
from moebeam.transforms.publish.invariants import RowSums, check_invariants
from moebeam.transforms.publish.manifest_file import format_manifest, read_manifest_file
from moebeam.transforms.publish.partial import write_partials
from moebeam.transforms.publish.publish_spec import PublishSpec, read_spec
from moebeam.transforms.publish.reject_messages import list_commonest
from moebeam.transforms.publish.rollup import Rollup
from moebeam.transforms.publish.run_account import RunAccount, digest_of_state, read_account, sum_totals

EMPTY_SHARD = "empty"

MANIFEST_VERSION = 1


@dataclass(frozen=True, slots=True)
class RunAccounts:
    """A run's sums from its published files, independent of its commits."""

    ledger: Rollup
    rows: RowSums


def publish_shard(commit: ShardCommit, layout: RunLayout) -> None:
    """Copy a shard's committed files to their visible names; where the staged file is gone, its copy must be whole.

    Raises:
        CommitError: a committed file is missing or damaged.
    """
    for file in commit.files:
        target = layout.published_file(file.table, commit.shard)
        staged = storage.join(layout.output, file.path)
        try:
            read_checked(staged, file.sha256)
            storage.copy_whole(staged, target)
        except (FileNotFoundError, FileDamaged) as error:
            # An earlier attempt or another launcher has published it, and dropped the staged file if it was whole.
            try:
                read_checked(target, file.sha256)
            except FileNotFoundError:
                if isinstance(error, FileDamaged):
                    raise error from None
                raise CommitError(
                    f"{staged}: expected the {file.table} of shard {commit.shard}, found no file"
                ) from None


def write_manifest(
    commits: Iterable[ShardCommit],
    spec: PublishSpec,
    accounts: RunAccounts | None = None,
    *,
    can_complete: bool = True,
    num_journal_bytes: int | None = None,
) -> str:
    """Check the run as a whole and write `manifest.json`; returns its text.

    A run with shards left to answer gets `status = "incomplete"`, unless another launcher has completed it meanwhile,
    and its journaled answers in `partial/`. What a complete run no longer needs is removed before the manifest appears,
    so that no leftovers coexist with it; if the launcher is killed in between, the next one repeats this.

    Args:
        accounts: of the same commits; None leaves the roll-up and the checks out of the manifest.
        can_complete: False leaves a run whose last shard is committed incomplete: its next launch completes it.
        num_journal_bytes: size of the journals of which commits and waste tell everything, see `record_unused`; where
            the journals of a complete run are larger, somebody has journaled since.
    Raises:
        CommitError: rows were lost or duplicated, or the accounts of the run contradict each other.
    """
    layout = spec.layout
    ordered = sorted(commits, key=lambda commit: commit.shard)
    plan = read_plan(layout)
    if plan is None:
        if not ordered and (complete := _complete_manifest(layout)) is not None:
            return complete
        raise CommitError(f"{layout.plan_record}: expected the run's plan, found none")
    is_complete = can_complete and [commit.shard for commit in ordered] == [shard.shard for shard in plan.shards]
    if not is_complete and (complete := _complete_manifest(layout)) is not None:
        return complete
    totals = sum_totals(commit.totals for commit in ordered)
    if is_complete:
        _check_rows(totals, spec, plan)
    engine = reduce(add_counters, (commit.engine or {} for commit in ordered), {})
    promise = merge_determinisms(commit.determinism for commit in ordered if commit.determinism is not None)
    checks = accounts and check_invariants(accounts.ledger, accounts.rows, totals, engine)
    wasted = publish_waste(layout)
    account = RunAccount(totals, wasted=sum_totals(waste.totals for waste in wasted))
    partials: list[Json] = []
    if spec.accounting is not None and not is_complete:
        by_shard = {commit.shard: commit for commit in ordered}
        account = read_account(layout, spec.accounting, by_shard, is_waste_recorded=True)
        partials = [*write_partials(layout, spec.accounting, by_shard)]
    reason, message = (None, None) if is_complete else _find_reason(layout)
    files = {table: _list_files(table, ordered, wasted, spec) for table in TABLES}
    manifest: dict[str, Json] = {
        "manifest_version": MANIFEST_VERSION,
        "tables_version": TABLES_VERSION,
        "status": "complete" if is_complete else "incomplete",
        "reason": reason,
        "reason_message": message,
        "run_id": spec.run_id,
        **spec.described,
        "rows_in": spec.num_input_rows - totals.num_unreadable_rows,
        "answers_in": plan.num_rows - totals.num_unreadable,
        "num_shards": len(plan.shards),
        "num_committed_shards": len(ordered),
        "max_hit_rate": plan.max_hit_rate,
        **account.to_json(),
        "rejects_by_message": accounts and list_commonest(accounts.rows.messages),
        "engine": engine,
        "determinism": promise and {**asdict(promise)},
        "checks": checks,
        "rollup": accounts and accounts.ledger.to_json(),
        "files": {**files, "partial": partials} if partials else files,
        "state_digest": None if is_complete else digest_of_state(layout),
        "num_journal_bytes": num_journal_bytes if is_complete else None,
    }
    for folder in (*map(layout.table, TABLES), layout.output):
        storage.sync_folder(folder)
    if is_complete:
        _remove_leftovers(layout)
    if spec.views is not None:
        storage.write_whole(views_path(layout), spec.views.encode())
    text = format_manifest(manifest)
    storage.write_whole(layout.manifest, text.encode())
    return text


def _find_reason(layout: RunLayout) -> tuple[str | None, str | None]:
    """Why the run stopped, as kind and message; what an earlier manifest said, once the note of it is gone."""
    if (stop := read_stop(layout)) is not None:
        return stop.kind, stop.message
    with contextlib.suppress(FileDamaged):
        if (manifest := read_manifest_file(layout)) is not None:
            return manifest.get("reason"), manifest.get("reason_message")
    return None, None


def views_path(layout: RunLayout) -> str:
    """Path of the DuckDB views over a run's tables."""
    return storage.join(layout.output, "views.sql")


def mend_views(layout: RunLayout) -> bool:
    """Write a run's views again where they are not those of its record; False if they are, or are not there.

    Nothing of moebeam reads them, so nothing else would notice.

    Raises:
        FileDamaged: the record itself is damaged.
        OSError: the store failed.
    """
    spec, path = read_spec(layout), views_path(layout)
    if spec is None or spec.views is None or not storage.exists(path):
        return False
    if storage.read_bytes(path) == spec.views.encode():
        return False
    storage.write_whole(path, spec.views.encode())
    return True


def _complete_manifest(layout: RunLayout) -> str | None:
    """The manifest of a complete run; None if there is none."""
    with contextlib.suppress(FileDamaged):
        if (manifest := read_manifest_file(layout)) is not None and manifest["status"] == "complete":
            return format_manifest(manifest)
    return None


def _remove_leftovers(layout: RunLayout) -> None:
    """Remove what only an unfinished run needs, and the temporary files of killed writers."""
    for folder in (layout.partial, layout.staging, layout.sorted_runs, layout.progress, layout.leases):
        storage.remove_tree(folder)
    storage.remove_files(passing_files(layout))


def passing_files(layout: RunLayout) -> list[str]:
    """Temporary files that killed writers left beside their targets."""
    folders = (*map(layout.table, TABLES), layout.partial, layout.plan, layout.commits, layout.state, layout.output)
    return [
        storage.join(folder, name)
        for folder in folders
        for name in storage.list_names(folder)
        if storage.is_passing(name)
    ]


def _check_rows(totals: Totals, spec: PublishSpec, plan: PlanRecord) -> None:
    """Check that every readable row has an outcome, and as many as it was planned to have answers."""
    expected = spec.num_input_rows - totals.num_unreadable_rows
    found = totals.num_results + totals.num_rejects
    if totals.num_rows != expected:
        samples = f" - {totals.num_further_samples} further samples" if totals.num_further_samples else ""
        raise CommitError(
            f"rows: expected results + rejects = {expected} rows of readable input, "
            f"found {totals.num_results} + {totals.num_rejects}{samples} = {totals.num_rows}"
        )
    if found + totals.num_unreadable != plan.num_rows:
        raise CommitError(
            f"answers: expected {plan.num_rows} outcomes by the plan, found {totals.num_results} results + "
            f"{totals.num_rejects} rejects + {totals.num_unreadable} unreadable files and row groups"
        )


def _list_files(table: Table, commits: Sequence[ShardCommit], wasted: Sequence[Waste], spec: PublishSpec) -> list[Json]:
    """Manifest entries of a table's files; a table without any row gets a typed, empty file."""
    layout = spec.layout
    empty = layout.published_file(table, EMPTY_SHARD)
    files: list[Json] = [
        {
            "path": layout.relative(layout.published_file(table, commit.shard)),
            "num_rows": file.num_rows,
            "num_bytes": file.num_bytes,
            "sha256": file.sha256,
        }
        for commit in commits
        for file in commit.files
        if file.table == table
    ]
    if table == "ledger":
        files += [
            {"path": waste.path, "num_rows": waste.num_rows, "num_bytes": waste.num_bytes, "sha256": waste.sha256}
            for waste in wasted
        ]
    if files:
        storage.remove_files([empty])
        return files
    rows = spec.schema.empty_table()
    empty_tables = {"results": rows, "rejects": loosen_sizes(rows), "ledger": LEDGER_SCHEMA.empty_table()}
    storage.write_whole(empty, encode_parquet_file(empty_tables[table]))
    return []


def find_cost(totals: Totals) -> tuple[Decimal | None, str | None]:
    """A run's cost and currency; None if nothing was priced, or in several currencies."""
    return find_sole_amount(totals.costs)


def find_sole_amount(amounts: Mapping[str, str] | None) -> tuple[Decimal | None, str | None]:
    """The amount and its currency if there is only one; None for none or several."""
    if amounts is None or len(amounts) != 1:
        return None, None
    ((currency, amount),) = amounts.items()
    return Decimal(amount), currency
