"""Begins an attempt of a checked job: claims its output, and forgets what stopped the attempt before."""

from moebeam.jobs.check.preflight import CheckedJob
from moebeam.jobs.output.run_record import save_input
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.durable.stop import forget_stop


def begin_attempt(checked: CheckedJob) -> tuple[CheckedJob, str]:
    """Claim the output folder and keep the record of the input there.

    Returns:
        The job, over the input that is kept, and the run's key as `CheckedJob.claim_output` returns it.
    Raises:
        OutputError: the folder belongs to another job or cannot be written.
        InputChanged: the input has changed since the check.
        OSError: the store failed.
    """
    layout = RunLayout(checked.request.job.output.path)
    run_key = checked.claim_output()
    checked = checked.keep_input()
    save_input(layout, checked.request, checked.scan)
    storage.remove_files([layout.stop, layout.failure])
    forget_stop(layout)
    return checked, run_key
