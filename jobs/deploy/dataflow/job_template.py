"""Writes a job template, from which Dataflow can start the pipeline later, instead of running it.

`--template_location` asks for one. Dataflow's flex template launcher sets it too: it runs this command, then starts the
job from the written template.
"""

import time

import apache_beam as beam
from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions

from moebeam.jobs.check.preflight import CheckedJob
from moebeam.jobs.console.summary import EXIT_DONE, RunSummary
from moebeam.jobs.deploy.dataflow.dataflow_options import is_dataflow
from moebeam.schemas.errors import PipelineFailed


def template_location(options: PipelineOptions) -> str | None:
    """Where to write a template; None if the job should run."""
    if not is_dataflow(options):
        return None
    location: str | None = options.view_as(GoogleCloudOptions).template_location
    return location


def write_template(pipeline: beam.Pipeline, location: str) -> None:
    """Stage a pipeline and write its job template.

    Raises:
        PipelineFailed: staging or writing failed, with the reason from Beam's client.
    """
    try:
        # The result has no job behind it, so most of its methods fail.
        pipeline.run()
    except Exception as error:  # the client's errors come from several libraries without a common base
        raise PipelineFailed(f"--template_location={location}: cannot be written: {error}") from error


def summarize_template(checked: CheckedJob, location: str, started: float) -> RunSummary:
    """Summarize a written template: no row is answered yet.

    Args:
        started: start of this command, on the monotonic clock.
    """
    output = checked.request.job.output.path
    message = f"{location} starts the job, once or again until it is done; moebeam status {output} shows how far it is"
    if isinstance(checked.request.job.limits.deadline, float):
        message += "; the minutes of [limits] deadline count from now, not from its start"
    return RunSummary(
        status="staged",
        exit_code=EXIT_DONE,
        run_id=checked.identity.run_id,
        output=output,
        rows_in=checked.scan.num_rows,
        price_book=checked.prices.version if checked.prices else None,
        elapsed_s=time.monotonic() - started,
        message=message,
    )
