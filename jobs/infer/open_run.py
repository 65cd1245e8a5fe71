"""Opens a run over kept rows, on a worker: what the launcher does for a run over files.

It runs when all rows lie in the run's folder, and may run again: for a bundle that is tried again, and in the next
attempt over the same folder.
"""

from dataclasses import dataclass, replace

from moebeam.jobs.check.job_source import with_input
from moebeam.jobs.check.preflight import CheckedParts, check_job
from moebeam.jobs.output.run_state import read_manifest
from moebeam.jobs.run.begin_attempt import begin_attempt
from moebeam.jobs.run.main_job import make_main_job
from moebeam.model_runner.protocol import require_packages
from moebeam.pipelines.main_job import MainJob
from moebeam.schemas.job.sections import Job
from moebeam.schemas.redaction.guard_logs import guard_logs
from moebeam.schemas.redaction.known_secrets import learn_environment
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.keep.cut_files import FileCut
from moebeam.transforms.keep.kept_file import write_kept_file
from moebeam.transforms.keep.row_batches import RowColumns
from moebeam.transforms.plan.mend_plan import mend_record
from moebeam.transforms.plan.plan_record import PlanRecord
from moebeam.transforms.publish.publish_spec import save_spec


@dataclass(frozen=True, slots=True)
class RunOpener:
    """A job that was checked where the pipeline was built, whose rows are not known yet."""

    job: Job
    parts: CheckedParts
    columns: RowColumns

    def __call__(self, cut: FileCut) -> MainJob:
        """Claim the run's folder for these rows.

        Raises:
            OutputError: it belongs to another job, or to other rows.
            JobError: the job cannot run over these rows.
        """
        guard_logs()
        learn_environment()
        layout = RunLayout(self.job.output.path)
        if not cut.num_rows:
            write_kept_file(layout, cut, 0, [], self.columns)
        job = with_input(self.job, storage.normalize_path(layout.kept_rows(cut.digest)))
        checked = check_job(job, parts=self.parts)
        manifest = read_manifest(layout)
        if manifest is not None and manifest["status"] == "complete":
            # Nothing is planned or answered: *publish* finds the manifest.
            return _with_plan(make_main_job(checked, PlanRecord(())))
        require_packages(job.model)
        checked, run_key = begin_attempt(checked)
        main_job = make_main_job(checked, mend_record(layout), run_key)
        save_spec(main_job.publish)
        return _with_plan(main_job)


def _with_plan(job: MainJob) -> MainJob:
    return replace(job, plan=replace(job.plan, is_planned=job.planned is not None))
