"""The job of `run_job`, whether it comes as a `Job`, a job file or a mapping, with its input left open."""

import os
from collections.abc import Mapping, Sequence
from datetime import date, time
from numbers import Integral, Real
from typing import Any, TypeAlias, cast

from pydantic import BaseModel

from moebeam.jobs.check.job_file import find_folder, make_job, read_sections
from moebeam.schemas.errors import JobFileError
from moebeam.schemas.job.sections import Job
from moebeam.schemas.store import storage

JobSource: TypeAlias = "Job | str | os.PathLike[str] | Mapping[str, Any]"

_NO_INPUT = "data"
"""Stands for the frame while a job is checked that names no input."""


def load_job_for_frame(source: JobSource, spare_output: str) -> Job:
    """Read and check a job as `load_job` does; relative paths of a mapping are relative to the working directory.

    Args:
        spare_output: the output of a job that names none.
    Returns:
        The job; its input is still to be named.
    Raises:
        JobFileError: all problems, one a line.
    """
    if isinstance(source, Job):
        output = source.output.path
        path = os.path.abspath(output) if storage.is_local(output) else output
        return source.model_copy(update={"output": source.output.model_copy(update={"path": path})})
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        sections, name, folder = read_sections(path), path.rsplit("/", 1)[-1], find_folder(path)
    elif isinstance(cast("object", source), Mapping):
        sections, name, folder = _plain_sections(source), "job", os.getcwd()
    else:
        raise JobFileError(f"job: expected a Job, a path or a mapping of sections, found {type(source).__name__}")
    _complete(sections, "input", {"path": _NO_INPUT, "format": "parquet"}, is_forced=True)
    if isinstance(sections["input"], dict):
        sections["input"].pop("query", None)
    _complete(sections, "output", {"path": spare_output}, is_forced=False)
    return make_job(sections, name, folder)


def with_input(job: Job, path: str) -> Job:
    """The job over a Parquet file."""
    named = job.model_copy(
        update={"input": job.input.model_copy(update={"path": path, "query": None, "format": "parquet"})}
    )
    return named if job.folder is None else named.in_folder(job.folder)


def _complete(sections: dict[str, Any], name: str, keys: Mapping[str, str], *, is_forced: bool) -> None:
    """Set keys of a section; one that is no section stays, to be refused."""
    section = sections.setdefault(name, {})
    if isinstance(section, Mapping):
        given = cast("Mapping[str, Any]", section)
        sections[name] = {**given, **keys} if is_forced else {**keys, **given}


def _plain_sections(sections: Mapping[str, Any]) -> dict[str, Any]:
    plain = _plain(sections)
    assert isinstance(plain, dict)
    return cast("dict[str, Any]", plain)


def _plain(value: object) -> object:
    """A Python value as TOML would give it: paths and dates as text, sections as tables, numpy's numbers as numbers."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", by_alias=True, exclude_unset=True)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in cast("Mapping[object, object]", value).items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(inner) for inner in cast("Sequence[object]", value)]
    if isinstance(value, os.PathLike):
        return os.fspath(cast("os.PathLike[str]", value))
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)
