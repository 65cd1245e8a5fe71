"""Paths of a run below its output folder.

results/ rejects/ ledger/   what analysts read: whole Parquet files, published after commit
partial/                    of an unfinished run: the journaled answers of shards that are not committed
manifest.json               last of all: counts, sums, files
_moebeam/job.json           whose output this is
_moebeam/quote.json         the estimate that `moebeam estimate --save` wrote
_moebeam/frames/            rows that `run_job` or `Infer` answers, in a folder named by their digest
_moebeam/stop               the launcher was asked to stop; workers look for it
_moebeam/failure.json       why the last launch failed
_moebeam/publish.json       what *publish* needs, so that a run can be published after its launcher was killed
_moebeam/plan/              runs/ (while planning), one sealed Arrow file a shard, plan.json when complete
_moebeam/progress/          progress of each shard, for people and for budgets
_moebeam/staging/           a shard's tables before commit, under names no `*.parquet` glob matches
_moebeam/leases/            which worker answers which shard, see `transforms/durable/lease.py`
_moebeam/journal/           paid answers in order of arrival, one folder per shard
_moebeam/commits/           one record per committed shard; the first one wins
_moebeam/tables/            receipts: where the run was committed in a lakehouse
_moebeam/damaged/           files and lines that could not be used, set aside
_moebeam/logs/              what worker processes on this machine printed and logged, a file for each

Records carry a digest (`sealed_json.py`), plans and runs a checksum of each block (`sealed_file.py`), journals one of
each line; commits and the manifest name the digests of tables (`checked_file.py`).

What is kept on a host and not in the output folder, such as cached checkpoints, is not listed here.
"""

import re
from dataclasses import dataclass

from moebeam.schemas.store import storage
from moebeam.schemas.store.disk_files import STATE_FOLDER
from moebeam.schemas.tables import Table

FRAME_NAME = "data.parquet"
_FRAME = re.compile(r"/_moebeam/frames/([0-9a-f]{64})(?:/data(?:-\d{5,})?\.parquet)?\Z")


def find_frame_digest(path: str) -> str | None:
    """The digest in the path of rows that `run_job` or `Infer` keeps, file or folder; None for any other path."""
    found = _FRAME.search(path)
    return found[1] if found is not None else None


@dataclass(frozen=True, slots=True)
class RunLayout:
    """Paths of a run; `output` is a folder on disk or an object-store prefix."""

    output: str

    def relative(self, path: str) -> str:
        """A path of the run as manifest and commits name it, from the output folder on."""
        return path.removeprefix(self.output.rstrip("/") + "/")

    @property
    def manifest(self) -> str:
        return storage.join(self.output, "manifest.json")

    @property
    def state(self) -> str:
        return storage.join(self.output, STATE_FOLDER)

    @property
    def job(self) -> str:
        return storage.join(self.state, "job.json")

    @property
    def quote(self) -> str:
        return storage.join(self.state, "quote.json")

    @property
    def frames(self) -> str:
        return storage.join(self.state, "frames")

    def frame(self, digest: str) -> str:
        """Where a data frame is kept; one file name for all of them, because derived ids begin with it."""
        return storage.join(self.frames, digest, FRAME_NAME)

    def kept_rows(self, digest: str) -> str:
        """The folder of the files in which `Infer` keeps its rows."""
        return storage.join(self.frames, digest)

    def kept_file(self, digest: str, number: int) -> str:
        return storage.join(self.kept_rows(digest), f"data-{number:05d}.parquet")

    @property
    def stop(self) -> str:
        return storage.join(self.state, "stop")

    @property
    def failure(self) -> str:
        return storage.join(self.state, "failure.json")

    @property
    def publish_record(self) -> str:
        return storage.join(self.state, "publish.json")

    @property
    def plan(self) -> str:
        return storage.join(self.state, "plan")

    @property
    def sorted_runs(self) -> str:
        return storage.join(self.plan, "runs")

    @property
    def plan_record(self) -> str:
        return storage.join(self.plan, "plan.json")

    @property
    def plan_before(self) -> str:
        """The record of a damaged plan, until it is made again."""
        return storage.join(self.plan, "plan-before.json")

    @property
    def commits(self) -> str:
        return storage.join(self.state, "commits")

    @property
    def staging(self) -> str:
        return storage.join(self.state, "staging")

    @property
    def leases(self) -> str:
        return storage.join(self.state, "leases")

    @property
    def logs(self) -> str:
        return storage.join(self.state, "logs")

    @property
    def progress(self) -> str:
        return storage.join(self.state, "progress")

    @property
    def damaged(self) -> str:
        return storage.join(self.state, "damaged")

    def table_receipt(self, name: str) -> str:
        return storage.join(self.state, "tables", f"{name}.json")

    @property
    def journal(self) -> str:
        return storage.join(self.state, "journal")

    def shard_journal(self, shard: str) -> str:
        return storage.join(self.journal, shard)

    def sorted_run_file(self, run_id: str) -> str:
        return storage.join(self.sorted_runs, f"{run_id}.arrow")

    def sorted_run_samples(self, run_id: str) -> str:
        return storage.join(self.sorted_runs, f"{run_id}.samples")

    def shard_plan(self, shard: str) -> str:
        return storage.join(self.plan, f"{shard}.arrow")

    def shard_commit(self, shard: str) -> str:
        return storage.join(self.commits, f"{shard}.json")

    def lease(self, shard: str, generation: int) -> str:
        return storage.join(self.leases, f"{shard}.{generation}.json")

    def staged_file(self, shard: str, attempt: str, table: Table) -> str:
        return storage.join(self.staging, f"{shard}.{attempt}.{table}.parquet-staged")

    def table(self, table: Table) -> str:
        return storage.join(self.output, table)

    @property
    def partial(self) -> str:
        return storage.join(self.output, "partial")

    def partial_file(self, shard: str) -> str:
        return storage.join(self.partial, f"part-{shard}.parquet")

    def published_file(self, table: Table, shard: str) -> str:
        return storage.join(self.table(table), f"part-{shard}.parquet")

    def progress_file(self, stage: str, name: str) -> str:
        return storage.join(self.progress, f"{stage}-{name}.json")
