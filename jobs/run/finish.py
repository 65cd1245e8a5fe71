"""The end of an attempt: a complete run is committed to the job's tables in a lakehouse, and summarized.

The launcher commits, not a worker: the catalog is configured, and its credentials lie, where a person starts the run. A
run whose launcher is gone by then, as on a cluster, is committed by whoever resumes it.
"""

import logging
from collections.abc import Mapping
from typing import Any

from moebeam.jobs.console.summary import RunStatus, RunSummary
from moebeam.jobs.output.run_state import announce_presence
from moebeam.jobs.run.summarize import summarize_run
from moebeam.schemas.errors import TableCommitFailed
from moebeam.schemas.job.sections import Job
from moebeam.schemas.lakehouse.table_url import parse_table_url
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.publish.lakehouse.commit_run import TableReceipt, commit_run
from moebeam.transforms.publish.publish_spec import read_spec

_LOGGER = logging.getLogger(__name__)


def finish_run(manifest: Mapping[str, Any], job: Job, status: RunStatus, started: float) -> RunSummary:
    """Commit a run, if it is complete and its job names a table, and summarize it.

    Args:
        started: start of this attempt, on the monotonic clock.
    Raises:
        TableCommitFailed: the run is complete, but not committed.
        MissingExtra: the format's library is not installed.
        OSError: the store failed.
    """
    return summarize_run(manifest, job, status, started, _commit(manifest, job))


def _commit(manifest: Mapping[str, Any], job: Job) -> TableReceipt | None:
    if job.output.table is None or manifest["status"] != "complete" or manifest["input"]["limit"] is not None:
        return None
    layout = RunLayout(job.output.path)
    if (spec := read_spec(layout)) is None:
        raise TableCommitFailed(
            f"[output] table: {layout.publish_record}: expected the run's columns, found no such record; run the job "
            "anew"
        )
    with announce_presence(layout):
        url = parse_table_url(job.output.table)
        receipt = commit_run(layout, manifest, spec.schema, url, job.output.replace_where)
    _LOGGER.info("committed to %s", receipt.url)
    return receipt
