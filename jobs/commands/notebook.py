"""The notebook's way in: a data frame of prompts in, a data frame of answers out, through the same pipeline."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from moebeam.jobs.check.job_file import load_job
from moebeam.schemas.errors import InputPatternError
from moebeam.schemas.extras import require_extra
from moebeam.schemas.job.sections import Job

if TYPE_CHECKING:
    import pandas as pd

_ROW_GROUP_ROWS = 10_000


def run_job(job: Job | str | Path | Mapping[str, Any], data: "pd.DataFrame") -> "pd.DataFrame":
    """Answer the rows of a data frame.

    Args:
        job: a `Job`, the path of a job file, or a job file's sections as a mapping. Its `[input] path` is ignored;
            without an `[output] path` the tables live only as long as the call.
        data: one row a prompt; the index is not read.
    Returns:
        Results and rejects in the order of `data`, with the columns of `results/`; `source_row` is the position.
    Raises:
        JobError: the job cannot run; `MissingExtra` if pandas is not installed.
    """
    require_extra("pandas", "run_job")
    # Here, because Beam takes seconds to import.
    from moebeam.jobs.run.launch import launch

    with tempfile.TemporaryDirectory(prefix="moebeam-") as folder:
        source = str(Path(folder) / "data.parquet")
        try:
            pq.write_table(pa.Table.from_pandas(data, preserve_index=False), source, row_group_size=_ROW_GROUP_ROWS)
        except (pa.ArrowException, ValueError) as error:
            raise InputPatternError(f"data: expected columns that Parquet can hold, found: {error}") from error
        resolved = _with_paths(job, source, str(Path(folder) / "output"))
        launch(resolved)
        tables = [pq.read_table(f"{resolved.output.path}/{name}") for name in ("results", "rejects")]
        answered: pd.DataFrame = pa.concat_tables(tables).sort_by("source_row").to_pandas()
        return answered


def _with_paths(job: Job | str | Path | Mapping[str, Any], source: str, output: str) -> Job:
    if isinstance(job, Job):
        return job.model_copy(update={"input": job.input.model_copy(update={"path": source})})
    if isinstance(job, Mapping):
        sections = {name: dict(section) for name, section in job.items()}
        sections["input"] = {**sections.get("input", {}), "path": source, "format": "parquet"}
        sections["output"] = {"path": output, **sections.get("output", {})}
        return Job.model_validate(sections)
    return load_job(str(job), [f"input.path={source}"])
