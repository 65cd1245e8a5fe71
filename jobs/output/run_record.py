"""Job and input records in an output folder, from which a run can be shown, resumed and retried.

`_moebeam/job.json` holds the identity (`jobs/check/identity.py`), the job as the last attempt read it, and the trial's
limit; `_moebeam/input.json` holds the input scan. Neither contains secrets: credentials come from the environment, and
paths with credentials are refused before the run.
"""

import base64
import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, cast

import pyarrow as pa
from pydantic import ValidationError

from moebeam.schemas.canonical import Json, fingerprint
from moebeam.schemas.errors import FileDamaged, InputChanged, InputPatternError, JobFileError, OutputError
from moebeam.schemas.job.sections import InputSection, Job
from moebeam.schemas.store import storage
from moebeam.schemas.store.record_json import decode_record, encode_record
from moebeam.schemas.store.run_layout import RunLayout, find_frame_digest
from moebeam.schemas.store.sealed_json import unseal_json
from moebeam.transforms.answer.reuse import ReuseSource
from moebeam.transforms.plan.plan_record import read_plan
from moebeam.transforms.read.claimed_file import check_claim
from moebeam.transforms.read.file_format import InputFormat
from moebeam.transforms.read.input_files import files_fingerprint, identify_files
from moebeam.transforms.read.input_scan import InputScan, InputUnit

_NUM_SHOWN_FILES = 3
_URL = re.compile(r"[a-z][a-z0-9+.-]*://\S+", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class RetryOf:
    """The rejects that a run retries, and their run; `kinds` are sorted error types."""

    output: str
    run_id: str
    kinds: tuple[str, ...]

    @property
    def identity(self) -> Json:
        """The identity of a retry; independent of where the folder lies."""
        return {"run_id": self.run_id, "kinds": list(self.kinds)}


@dataclass(frozen=True, slots=True)
class RunRequest:
    """The request behind a run; the same for all of its attempts.

    Attributes:
        limit: for a trial, answer only this many rows from the start.
        retry_of: answer these rejects of an earlier run instead of the input.
        reuse: reuse the answers of this earlier run.
    """

    job: Job
    limit: int | None = None
    retry_of: RetryOf | None = None
    reuse: ReuseSource | None = None

    def to_json(self, currency: str | None) -> dict[str, Json]:
        """Build the contents of `job.json` besides the identity; `currency` is that of the current price, if any."""
        return {
            "job": self.job.model_dump(mode="json", by_alias=True),
            "folder": self.job.folder,
            "limit": self.limit,
            "currency": currency,
            "retry_of": asdict(self.retry_of) if self.retry_of is not None else None,
            "reuse": asdict(self.reuse) if self.reuse is not None else None,
            "product_version": version("moebeam"),
        }


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run as its output folder describes it.

    Attributes:
        parts: the identity's digests by name.
        request: with the job as the last attempt read it and this folder as output.
        currency: of the price that applied at the start; None without a price book.
    """

    layout: RunLayout
    parts: Mapping[str, str]
    run_id: str
    request: RunRequest
    currency: str | None


def read_record(output: str) -> RunRecord:
    """Read the record of the run in a folder.

    Raises:
        OutputError: no such folder, no run in it, or an invalid record.
    """
    layout = RunLayout(output)
    try:
        content = storage.read_bytes(layout.job)
    except FileNotFoundError as error:
        raise OutputError(_explain_missing_run(layout)) from error
    except OSError as error:
        raise OutputError(f"{output}: cannot be looked at: {error}") from error
    try:
        found: Any = json.loads(unseal_json(content))
        if isinstance(found, dict) and "job" not in found:
            raise OutputError(
                f"{layout.job}: was written by an older version, which did not keep the job; "
                "run `moebeam run JOB.toml` again instead"
            )
        job = Job.model_validate_json(json.dumps(found["job"]), strict=True)
        job = job.model_copy(
            update={
                "output": job.output.model_copy(update={"path": output}),
                "input": _move_frame(job.input, RunLayout(job.output.path), layout),
            }
        )
        retry = found["retry_of"]
        return RunRecord(
            layout=layout,
            parts={str(name): str(part) for name, part in found["parts"].items()},
            run_id=str(found["fingerprint"])[:16],
            request=RunRequest(
                job if found["folder"] is None else job.in_folder(found["folder"]),
                limit=found["limit"],
                retry_of=retry and RetryOf(retry["output"], retry["run_id"], tuple(retry["kinds"])),
                reuse=found.get("reuse") and ReuseSource(**found["reuse"]),
            ),
            currency=found["currency"],
        )
    except ValidationError as error:
        raise OutputError(
            f"{layout.job}: its job is not one that this version understands: {error.errors()[0]['msg']}"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(
            f"{layout.job}: expected the record of a run, found a damaged file: {error!r}; moebeam run JOB.toml, with "
            "the job of this run, writes it again"
        ) from error


def _move_frame(section: InputSection, before: RunLayout, now: RunLayout) -> InputSection:
    """The input of a run whose data frame moved along with its output folder; any other input stays."""
    path, frames = section.paths[0] if section.paths else "", f"{storage.normalize_path(before.frames)}/"
    if find_frame_digest(path) is None or not path.startswith(frames):
        return section
    return section.model_copy(update={"path": storage.join(storage.normalize_path(now.frames), path[len(frames) :])})


def _explain_missing_run(layout: RunLayout) -> str:
    output = layout.output
    with contextlib.suppress(OSError):
        if not storage.is_folder(output):
            return f"{output}: expected the output folder of a run, found no such folder"
        if storage.exists(layout.manifest) or storage.exists(layout.plan_record):
            return f"{layout.job}: expected the record of a run, found no such file; the run cannot be told apart"
    return f"{output}: expected the output folder of a run, found no _moebeam/job.json in it"


@dataclass(frozen=True, slots=True)
class InputRecord:
    """The input scan, without its units.

    Attributes:
        section: `[input]` at the time of the scan; `limit` is the trial's.
        num_rows: rows to read.
        num_unreadable: files that cannot be opened.
        schema: Arrow schema of the needed columns, in base64.
        files: path -> digest that changes with the file; empty for a retry, which reads no input.
    """

    section: str
    limit: int | None
    fingerprint: str
    format: InputFormat
    num_rows: int
    num_files: int
    num_unreadable: int
    names: tuple[str, ...]
    schema: str
    files: Mapping[str, str]

    @classmethod
    def from_scan(
        cls, scan: InputScan, section: InputSection, limit: int | None, files: Mapping[str, Json]
    ) -> "InputRecord":
        return cls(
            section=_digest(section),
            limit=limit,
            fingerprint=scan.fingerprint,
            format=scan.format,
            num_rows=scan.num_rows,
            num_files=scan.num_files,
            num_unreadable=scan.num_unreadable_files,
            names=scan.names,
            schema=base64.b64encode(scan.schema.serialize().to_pybytes()).decode(),
            files={path: fingerprint(mark)[:16] for path, mark in files.items()},
        )

    def scan(self, num_rows: int | None = None) -> InputScan:
        """Restore the scan for a planned run: counts and types, but no units to read.

        Args:
            num_rows: rows of a part of the input; None for all.
        """
        rows = self.num_rows if num_rows is None else num_rows
        num_unreadable = self.num_unreadable if num_rows is None else 0
        whole = InputUnit(0, "", "", self.format, 0, 0, rows)
        unreadable = (InputUnit(1 + i, "", "", self.format, 0, 0, None, error="unread") for i in range(num_unreadable))
        return InputScan(
            units=(whole, *unreadable),
            schema=pa.ipc.read_schema(pa.py_buffer(base64.b64decode(self.schema))),
            names=self.names,
            format=self.format,
            num_files=self.num_files,
            fingerprint=self.fingerprint,
        )


def input_record_path(layout: RunLayout) -> str:
    return storage.join(layout.state, "input.json")


def save_input(layout: RunLayout, request: RunRequest, scan: InputScan) -> None:
    """Save the scan, unless an earlier attempt did.

    Raises:
        InputChanged: the input has changed since the scan.
        OutputError: the folder cannot be written.
    """
    if read_input_record(layout) is not None:
        return
    section, is_retry = request.job.input, request.retry_of is not None
    files = {} if is_retry else identify_files(section)
    if not is_retry and files_fingerprint(files) != scan.fingerprint:
        for path, claim in {unit.path: unit.claim for unit in scan.units}.items():
            check_claim(path, claim)
        raise InputChanged(
            f"[input] path {section.shown_path}: expected the {scan.num_files:,} files that were checked, found files "
            "added, removed or changed since; run again once nothing writes there"
        )
    record = InputRecord.from_scan(scan, section, request.limit, files)
    try:
        storage.write_whole(input_record_path(layout), encode_record(record))
    except OSError as error:
        raise OutputError(f"[output] path {layout.output!r}: cannot be written: {error}") from error


def read_input_record(layout: RunLayout) -> InputRecord | None:
    """Read the saved record of the input; None if missing or unreadable."""
    with contextlib.suppress(OSError, ValueError):
        return decode_record(storage.read_bytes(input_record_path(layout)), InputRecord)
    return None


def read_saved_scan(layout: RunLayout, request: RunRequest) -> InputScan | None:
    """Restore the scan of a planned run without reading the input; None if the input must be scanned.

    The files are still listed and must match the plan; a retry's rows come from its plan alone.

    Raises:
        InputPatternError: the files cannot be listed.
    """
    # A damaged record of the plan is made again, or the plan is.
    with contextlib.suppress(OSError, FileDamaged):
        record, section = read_input_record(layout), request.job.input
        if record is None or record.limit != request.limit or record.section != _digest(section):
            return None
        if request.retry_of is not None:
            return record.scan()
        if read_plan(layout) is not None and files_fingerprint(identify_files(section)) == record.fingerprint:
            return record.scan()
    return None


def describe_changed_files(layout: RunLayout, section: InputSection) -> str:
    """List the input files that changed since the run began, in parentheses; empty if unknown."""
    record = read_input_record(layout)
    if record is None or not record.files:
        return ""
    try:
        found = {path: fingerprint(mark)[:16] for path, mark in identify_files(section).items()}
    except InputPatternError:
        return ""
    groups = {
        "changed": [path for path in record.files if path in found and found[path] != record.files[path]],
        "missing": [path for path in record.files if path not in found],
        "new": [path for path in found if path not in record.files],
    }
    differences = [f"{name}: {_format_names(paths)}" for name, paths in groups.items() if paths]
    return f" ({'; '.join(differences)})" if differences else ""


def _format_names(paths: list[str]) -> str:
    names = ", ".join(path.rpartition("/")[2] for path in paths[:_NUM_SHOWN_FILES])
    more = len(paths) - _NUM_SHOWN_FILES
    return f"{names} and {more} more" if more > 0 else names


def _digest(section: InputSection) -> str:
    return fingerprint(section.model_dump(mode="json"))


def find_secrets(job: Job) -> list[JobFileError]:
    """Find paths with credentials, which must not be written to the output folder."""
    problems: list[JobFileError] = []
    for place, text in _find_texts(job.model_dump(mode="json", by_alias=True), ()):
        if _URL.fullmatch(text) and _has_credentials(text):
            section, *inner = place
            problems.append(
                JobFileError(
                    f"[{section}] {'.'.join(inner)}: holds credentials; give them through the environment instead"
                )
            )
    return problems


def _find_texts(value: object, place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield every string of a job with its key path; array tables are numbered from 1."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping):
        for key, inner in cast("Mapping[str, object]", value).items():
            yield from _find_texts(inner, (*place, key))
    elif isinstance(value, list):
        for number, inner in enumerate(cast("list[object]", value), start=1):
            yield from _find_texts(inner, (*place, str(number)))


def _has_credentials(url: str) -> bool:
    # A table's URL holds that of its store.
    authorities = [part.partition("/")[0] for part in url.split("://")[1:]]
    query = url.partition("?")[2].lower()
    return any("@" in authority for authority in authorities) or any(
        word in query for word in ("signature=", "sig=", "token=", "secret", "password=")
    )
