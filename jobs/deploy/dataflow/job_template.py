"""A job template: the pipeline as Dataflow's service can start it later, instead of a run.

`--template_location` asks for one. Dataflow's launcher of flex templates does so too: it runs this command, then starts
the service's job from what the command wrote.
"""

import time
from typing import TYPE_CHECKING

import apache_beam as beam
from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions

from moebeam.jobs.console.summary import EXIT_DONE, RunSummary
from moebeam.jobs.deploy.dataflow.dataflow_options import is_dataflow
from moebeam.schemas.errors import PipelineFailed

if TYPE_CHECKING:
    from moebeam.jobs.check.preflight import CheckedJob


def template_location(options: PipelineOptions) -> str | None:
    """Where a template is to be written; None where the job is to run."""
    if not is_dataflow(options):
        return None
    location: str | None = options.view_as(GoogleCloudOptions).template_location
    return location


def write_template(pipeline: beam.Pipeline, location: str) -> None:
    """Stage a pipeline and write its job template.

    Raises:
        PipelineFailed: it could not be staged or written; Beam's client says why.
    """
    try:
        # What this returns stands for no job, and most of its methods fail for want of one.
        pipeline.run()
    except Exception as error:  # the client's errors come from several libraries without a common base
        raise PipelineFailed(f"--template_location={location}: cannot be written: {error}") from error


def staged_summary(checked: "CheckedJob", location: str, started: float) -> RunSummary:
    """What is said of a template that was written: nothing was answered yet.

    Args:
        started: of this command, by the monotonic clock.
    """
    output = checked.layout.output
    message = f"{location} starts the job, once or again until it is done; moebeam status {output} shows how far it is"
    if isinstance(checked.job.limits.deadline, float):
        message += "; the minutes of [limits] deadline count from now, not from its start"
    return RunSummary(
        status="staged",
        exit_code=EXIT_DONE,
        run_id=checked.identity.run_id,
        output=output,
        rows_in=checked.scan.num_rows,
        num_results=0,
        num_rejects=0,
        num_unreadable=0,
        rejects_by_type={},
        prompt_tokens=0,
        cached_tokens=0,
        computed_tokens=0,
        completion_tokens=0,
        reasoning_tokens=0,
        max_hit_rate=None,
        cost=None,
        cost_allocated=None,
        cost_basis=None,
        currency=None,
        price_book=checked.prices.version if checked.prices else None,
        elapsed_s=time.monotonic() - started,
        message=message,
    )
