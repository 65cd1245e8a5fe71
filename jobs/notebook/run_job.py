"""`run_job`: a data frame of prompts in, a data frame of answers out, through the same pipeline as the command's.

The frame is kept below the output folder, so the run can be shown, resumed and retried like any other. Without an
output of the job's own the folder is temporary.
"""

import logging
import shutil
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import pyarrow as pa
import pyarrow.parquet as pq

from moebeam.jobs.check.job_source import JobSource, load_job_for_frame, with_input
from moebeam.jobs.console.console import logging_to, stderr_console
from moebeam.jobs.console.signals import draining_signals
from moebeam.jobs.console.summary import EXIT_STOPPED, LIMITS
from moebeam.jobs.notebook.frames import ArrowStream, Frame, read_frame
from moebeam.jobs.notebook.kept_frame import drop_unclaimed_frame, keep_frame
from moebeam.jobs.notebook.notebook_bar import describe_end, show_run
from moebeam.jobs.output.current_run import read_partials
from moebeam.schemas.column_types import loosen_sizes
from moebeam.schemas.errors import CommitError, JobError, JobInterrupted, OutputError, PipelineFailed, RunStopped
from moebeam.schemas.job.sections import Job
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.tables import RESULT_SCHEMA
from moebeam.transforms.durable.commit import open_committed, read_commits
from moebeam.transforms.publish.publish_spec import read_spec

if TYPE_CHECKING:
    import pandas as pd


@overload
def run_job(job: JobSource, data: "pd.DataFrame", *, progress: bool | None = None) -> "pd.DataFrame": ...
@overload
def run_job(
    job: JobSource, data: Sequence[Mapping[str, object]], *, progress: bool | None = None
) -> list[dict[str, Any]]: ...
@overload
def run_job(
    job: JobSource, data: pa.Table | pa.RecordBatch | pa.RecordBatchReader, *, progress: bool | None = None
) -> pa.Table: ...
@overload
def run_job(job: JobSource, data: ArrowStream, *, progress: bool | None = None) -> Any: ...
def run_job(job: JobSource, data: object, *, progress: bool | None = None) -> Any:
    """Answer the rows of a data frame.

    Called again with the same job and rows, it returns the answers of a finished run and goes on with an unfinished
    one, if the job names an `[output] path`.

    Args:
        job: a `Job`, the path of a job file, or a job file's sections as a mapping. Its `[input] path` is ignored;
            without an `[output] path` the tables live only as long as the call.
        data: one row a prompt: a frame of pandas, polars or pyarrow, anything with `__arrow_c_stream__`, or a list of
            dicts.
        progress: whether to show progress; None shows it in a notebook and on a terminal.
    Returns:
        Results and rejects in the order of `data`, with the columns of `results/`; `source_row` is the position. With
        `[sampling] n` a row comes as often as it has answers, numbered in `sample`. The kind is that of `data`, for
        unknown Arrow streams a `pyarrow.Table`; a pandas frame has the index of `data`, repeated where rows are.
    Raises:
        RunStopped: an interrupt or a limit of the job stopped the run; it carries what was answered.
        JobError: the job cannot run, or failed.
    """
    frame = read_frame(data)
    with _spare_output() as spare:
        loaded = load_job_for_frame(job, spare)
        return _answer(loaded, frame, progress, is_temporary=loaded.output.path == spare)


@contextmanager
def _spare_output() -> Generator[str]:
    """A temporary output, which is removed at the end unless a run in it was left unfinished: its answers are paid."""
    folder = Path(tempfile.mkdtemp(prefix="moebeam-"))
    output = folder / "output"
    is_unfinished = False
    try:
        yield str(output)
    except (JobInterrupted, PipelineFailed, KeyboardInterrupt) as error:
        if Path(RunLayout(str(output)).job).exists():
            is_unfinished = True
            error.add_note(f"The temporary output {output} is kept: moebeam resume {output} goes on.")
        raise
    finally:
        if not is_unfinished:
            shutil.rmtree(folder, ignore_errors=True)


def _answer(job: Job, frame: Frame, progress: bool | None, *, is_temporary: bool) -> Any:
    # Here, because Beam takes seconds to import.
    from moebeam.jobs.notebook.beam_in_notebooks import beam_outside_ipython
    from moebeam.jobs.run.launch import launch

    layout = RunLayout(job.output.path)
    named = with_input(job, keep_frame(layout, frame.table))
    stopping = draining_signals(_tell, drain_s=job.failures.drain_s, output=layout.output)
    try:
        with _showing_warnings(), beam_outside_ipython(), stopping as stop, show_run(progress) as view:
            summary = launch(named, stop=stop, progress=view and view.show)
            if view is not None:
                view.show_end(describe_end(summary))
    except JobInterrupted as error:
        drop_unclaimed_frame(layout, named.input.paths[0])
        answers = frame.restore(read_answers(layout, is_finished=False))
        message = f"{error}; {_explain_how_to_go_on(layout, is_temporary=is_temporary)}"
        raise RunStopped(message, answers=answers, output=layout.output) from error
    except JobError:
        drop_unclaimed_frame(layout, named.input.paths[0])
        raise
    is_stopped = summary.exit_code == EXIT_STOPPED
    answers = frame.restore(read_answers(layout, is_finished=not is_stopped))
    if is_stopped:
        larger = f" and a larger [limits] {summary.reason}" if summary.reason in LIMITS else ""
        message = f"{summary.message}; {_explain_how_to_go_on(layout, is_temporary=is_temporary)}{larger}"
        raise RunStopped(message, answers=answers, summary=summary.to_json(), output=layout.output)
    return answers


def _tell(line: str) -> None:
    stderr_console().print(line, soft_wrap=True, markup=False, highlight=False)


def _explain_how_to_go_on(layout: RunLayout, *, is_temporary: bool) -> str:
    where = f", with [output] path = {layout.output!r}" if is_temporary else ""
    return f"run_job with the same job and data goes on{where}"


def read_answers(layout: RunLayout, *, is_finished: bool = True) -> pa.Table:
    """Results and rejects, in input order.

    Args:
        is_finished: of an unfinished run, answers that are only journaled are read too; they are not validated yet.
    Raises:
        OutputError: the tables cannot be read.
    """
    tables: list[pa.Table] = []
    try:
        for commit in read_commits(layout).values():
            for name in ("results", "rejects"):
                if (source := open_committed(layout, commit, name)) is not None:
                    with source:
                        tables.append(pq.read_table(source))
        if not tables and (spec := read_spec(layout)) is not None:
            tables.append(spec.schema.empty_table())
        if not is_finished and storage.is_folder(layout.journal):
            tables += [partial.rows for partial in read_partials(layout)]
    except (CommitError, OSError, pa.ArrowException) as error:
        raise OutputError(f"{layout.output}: its tables cannot be read: {error}") from error
    found = [table.replace_schema_metadata(None) for table in tables if table.num_rows] or tables[:1]
    if any(table.schema != found[0].schema for table in found):
        found = [loosen_sizes(table) for table in found]
    answers = pa.concat_tables(found, promote_options="default") if found else RESULT_SCHEMA.empty_table()
    return answers.sort_by([("source_row", "ascending"), ("sample", "ascending")])


@contextmanager
def _showing_warnings() -> Generator[None]:
    """Show warnings as the command does, unless the caller has set up logging."""
    if logging.getLogger().handlers:
        yield
        return
    with logging_to(stderr_console(), is_debug=False):
        yield
