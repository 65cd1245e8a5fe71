"""What a run has come to so far, for commands that show it: its manifest and its account, brought up to date.

A run that ended by itself has published both. Of one that was killed, whoever looks first publishes what it left
(`transforms/publish/republish.py`), so that the tables, their views in DuckDB and all commands say the same. On a store
that may only be read, commands still say it, but the tables stay behind.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from moebeam.jobs.output.run_state import find_signs_of_life, read_manifest
from moebeam.schemas.errors import CommitError, FileDamaged
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.durable.commit import list_committed_shards
from moebeam.transforms.durable.journal_file import list_journaled_shards
from moebeam.transforms.money.account import Accounting
from moebeam.transforms.plan.plan_record import read_plan
from moebeam.transforms.publish.partial import PartialShard, read_partial
from moebeam.transforms.publish.publish_spec import read_spec
from moebeam.transforms.publish.republish import is_current, outline_manifest, republish
from moebeam.transforms.publish.rollup import read_ledger
from moebeam.transforms.publish.run_account import RunAccount, read_account, read_paid_lines

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CurrentRun:
    """A run as it is now.

    Attributes:
        manifest: what `manifest.json` says or would say of this moment; without tables, roll-up and checks while
            somebody is at work, or where it could not be written. None while nothing is planned, and in runs of older
            versions that were killed.
        is_published: whether `manifest.json` says all of it, and the tables that it names hold it.
    """

    layout: RunLayout
    manifest: dict[str, Any] | None
    account: RunAccount
    is_published: bool

    def read_ledgers(self) -> Iterator[pa.Table]:
        """Ledger lines of every paid attempt, wasted and journaled ones included, file by file or shard by shard.

        Raises:
            CommitError: a file is missing or damaged.
            OSError: the store failed.
        """
        if self.manifest is not None and self.is_published:
            files = self.manifest["files"]
            for file in (*files["ledger"], *files.get("partial", ())):
                yield read_ledger(storage.join(self.layout.output, file["path"]), file.get("sha256"))
        else:
            for found in read_paid_lines(self.layout, read_accounting(self.layout)):
                yield found.lines


def read_partials(layout: RunLayout) -> Iterator[PartialShard]:
    """Read the journaled answers of each shard that is not committed.

    Raises:
        OSError: the store failed.
    """
    accounting = read_accounting(layout)
    committed = {*list_committed_shards(layout)}
    for shard in list_journaled_shards(layout):
        if shard in committed:
            continue
        partial = read_partial(layout, shard, accounting)
        if partial.num_damaged:
            _LOGGER.warning(
                "%s: %d answers cannot be read and are left out; the next launch asks for them again",
                layout.shard_journal(shard),
                partial.num_damaged,
            )
        yield partial


def read_accounting(layout: RunLayout) -> Accounting:
    """The accounting that the run's launcher recorded; without prices in runs of older versions.

    Raises:
        OSError: the store failed.
    """
    spec = read_spec(layout)
    return spec.accounting if spec is not None and spec.accounting is not None else Accounting(run_id="")


def read_current_run(layout: RunLayout) -> CurrentRun:
    """Read a run, and publish what it left if it was killed.

    Raises:
        OutputError: the manifest is damaged.
        CommitError: a record or table is missing or damaged.
        OSError: the store failed.
    """
    manifest = bring_up_to_date(layout)
    if manifest is not None and is_current(manifest, layout):
        return CurrentRun(layout, manifest, RunAccount.from_manifest(manifest), is_published=True)
    account = read_live_account(layout)
    outline = outline_manifest(layout, account)
    told = manifest if outline is None else {**(manifest or {}), **outline}
    if manifest is not None and told is not None and manifest["status"] == "complete":
        told["status"] = "complete"
    return CurrentRun(layout, told, account, is_published=False)


def bring_up_to_date(layout: RunLayout) -> dict[str, Any] | None:
    """The manifest, once all that is committed and journaled is published, unless somebody is at work.

    A complete run is not exempt: who woke up beside it may have journaled paid answers after its manifest was written.

    Raises:
        OutputError: the manifest is damaged.
        FileDamaged: a record or table is damaged.
        OSError: the store failed.
    """
    manifest = read_manifest(layout)
    if is_current(manifest, layout) or find_signs_of_life(layout).is_alive:
        return manifest
    try:
        republish(layout, is_complete=manifest is not None and manifest["status"] == "complete")
    except FileDamaged:
        raise
    except (OSError, CommitError):
        pass  # what it cannot publish it can still say
    return read_manifest(layout)


def read_live_account(layout: RunLayout) -> RunAccount:
    """Read the account from what the store holds at this moment; publishes nothing.

    Raises:
        CommitError: a record or table is missing or damaged.
        OSError: the store failed.
    """
    return RunAccount() if read_plan(layout) is None else read_account(layout, read_accounting(layout))
