"""Pins a table of a lakehouse, as `[input] path` names it, to one version: all attempts of a run read the same rows."""

import contextlib

from moebeam.jobs.output.run_record import read_record
from moebeam.schemas.errors import OutputError
from moebeam.schemas.job.input_section import is_table_url
from moebeam.schemas.job.sections import Job
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.read.sources.lake_tables import pin_table, strip_pin


def pin_input(job: Job, layout: RunLayout) -> Job:
    """The job with its table at one version: the one that it names, that of its run so far, or the newest.

    Raises:
        InputPatternError: there is no such table or version.
    """
    path = job.input.path
    if not isinstance(path, str) or not is_table_url(path):
        return job
    if strip_pin(path) == path and storage.exists(layout.job):
        with contextlib.suppress(OutputError):
            kept = read_record(layout.output).request.job.input.path
            if isinstance(kept, str) and strip_pin(kept) == path:
                path = kept
    return job.model_copy(update={"input": job.input.model_copy(update={"path": pin_table(path)})})
