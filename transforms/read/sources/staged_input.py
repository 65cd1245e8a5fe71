"""Executes an input that is no file of rows, once a run, and keeps its rows as Parquet.

Part of the scan before *read*, which then reads the staged file as any other. The rows are written into a scratch
folder first, and move into the run's folder once the run has claimed it; a later attempt finds them there. What
fingerprints the input is where the rows come from: the query's text and its files, or a table's snapshot.
"""

import hashlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from moebeam.schemas.canonical import fingerprint
from moebeam.schemas.errors import FileDamaged, InputChanged, InputPatternError
from moebeam.schemas.extras import require_extra
from moebeam.schemas.job.input_section import InputSection
from moebeam.schemas.store import storage
from moebeam.schemas.store.checked_file import open_checked
from moebeam.schemas.store.object_store import is_local
from moebeam.schemas.store.record_json import encode_record, read_record
from moebeam.schemas.store.run_layout import FRAME_NAME, RunLayout
from moebeam.schemas.store.streamed_file import streamed_file
from moebeam.transforms.read.claimed_file import check_claim
from moebeam.transforms.read.input_files import InputFile, files_fingerprint, list_input_files
from moebeam.transforms.read.input_scan import InputScan, StagedInput, scan_input

_COPY_BYTES = 4 << 20
_ROW_GROUP_ROWS = 10_000
_ROW_GROUP_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class StagedRecord:
    """`_moebeam/frames/KEY.json`: which frame holds an input's rows."""

    sha256: str
    num_rows: int


def scan_staged(
    section: InputSection,
    layout: RunLayout,
    *,
    limit: int | None = None,
    needed: Collection[str] | None = None,
    scratch: str | None = None,
) -> InputScan:
    """Scan an input that has to be executed, from what an earlier attempt of the run kept or else by executing it.

    Args:
        layout: of the run; nothing is written there.
        limit, needed: as for `scan_input`.
        scratch: folder below which the rows are written; None for the system's own.
    Returns:
        Its `staged` is what `keep_staged` has still to keep; None where the run has it.
    Raises:
        InputPatternError: it cannot be executed.
        InputChanged: a file changed meanwhile.
    """
    files = list_input_files(section)
    key = _find_key(section, files, needed)
    kept = _find_kept(layout, key)
    if kept is not None:
        return _scan_file(section, files, layout.frame(kept.sha256), limit, needed)
    staged = _execute(section, files, key, needed, scratch)
    return replace(_scan_file(section, files, staged.path, limit, needed), staged=staged)


def keep_staged(layout: RunLayout, staged: StagedInput) -> None:
    """Keep the rows of an input in the folder of a run, which the run has claimed; of two launchers one succeeds.

    Raises:
        InputChanged: an earlier attempt kept others, and has lost them since.
        OSError: the store failed.
    """
    path = layout.frame(staged.sha256)
    record = StagedRecord(staged.sha256, staged.num_rows)
    with Path(staged.path).open("rb") as source, streamed_file(path) as write:
        while content := source.read(_COPY_BYTES):
            write(content)
    if storage.create_exclusive(_record_path(layout, staged.key), encode_record(record)):
        return
    first = read_record(_record_path(layout, staged.key), StagedRecord, "the rows of an input")
    if first is not None and first.sha256 != staged.sha256 and _find_kept(layout, staged.key) is None:
        raise InputChanged(
            f"{layout.frame(first.sha256)}: expected the rows that the run began with ({first.num_rows:,}), found them "
            f"lost or damaged, and the input gives others by now ({staged.num_rows:,}); choose another output path"
        )


def _record_path(layout: RunLayout, key: str) -> str:
    return storage.join(layout.frames, f"{key}.json")


def _find_kept(layout: RunLayout, key: str) -> StagedRecord | None:
    """The record of rows that a run keeps whole."""
    try:
        record = read_record(_record_path(layout, key), StagedRecord, "the rows of an input")
        if record is not None:
            open_checked(layout.frame(record.sha256), record.sha256).close()
        return record
    except (FileDamaged, FileNotFoundError):
        return None


def _find_key(section: InputSection, files: list[InputFile], needed: Collection[str] | None) -> str:
    columns = None if section.query is not None or needed is None else sorted(needed)
    return fingerprint([section.query, [file.identity for file in files], columns])


def _scan_file(
    section: InputSection, files: list[InputFile], path: str, limit: int | None, needed: Collection[str] | None
) -> InputScan:
    update = {"path": path, "query": None, "format": "parquet"}
    scan = scan_input(section.model_copy(update=update), limit=limit, needed=needed)
    return replace(scan, fingerprint=files_fingerprint({file.path: file.identity for file in files}))


def _execute(
    section: InputSection, files: list[InputFile], key: str, needed: Collection[str] | None, scratch: str | None
) -> StagedInput:
    folder = _make_scratch(scratch)
    target = folder / FRAME_NAME
    try:
        if section.query is not None:
            require_extra("duckdb", "[input] query")
            # Here, because DuckDB is an extra.
            from moebeam.transforms.read.sources.query_text import parse_query
            from moebeam.transforms.read.sources.run_query import run_query

            run_query(section.query, parse_query(section.query, section.folder), target)
        else:
            from moebeam.transforms.read.sources.lake_tables import read_table

            schema, batches = read_table(section.paths[0], needed)
            _write_rows(schema, batches, target)
        for file in files:
            check_claim(file.path, file.mark)
        with target.open("rb") as source:
            sha256 = hashlib.file_digest(source, "sha256").hexdigest()
        staged = StagedInput(key, str(target), sha256, pq.read_metadata(target).num_rows)
    except BaseException:
        _remove_scratch(folder)
        raise
    weakref.finalize(staged, _remove_scratch, folder)
    return staged


def _make_scratch(scratch: str | None) -> Path:
    if scratch is None or not is_local(scratch):
        return Path(tempfile.mkdtemp(prefix="moebeam-input-"))
    try:
        os.makedirs(scratch, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=".scratch-", dir=scratch))
    except OSError as error:
        raise InputPatternError(f"[output] path: {scratch}: cannot be written: {error}") from error


def _remove_scratch(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _write_rows(schema: pa.Schema, batches: Iterable[pa.RecordBatch], target: Path) -> None:
    """Write batches as row groups of bounded rows and bytes."""
    with pq.ParquetWriter(target, schema, compression="zstd") as writer:
        held: list[pa.RecordBatch] = []
        for batch in batches:
            for start in range(0, batch.num_rows, _ROW_GROUP_ROWS):
                held.append(batch.slice(start, _ROW_GROUP_ROWS))
                if sum(piece.num_rows for piece in held) >= _ROW_GROUP_ROWS or (
                    sum(piece.nbytes for piece in held) >= _ROW_GROUP_BYTES
                ):
                    writer.write_table(pa.Table.from_batches(held, schema), row_group_size=_ROW_GROUP_ROWS)
                    held = []
        if held:
            writer.write_table(pa.Table.from_batches(held, schema), row_group_size=_ROW_GROUP_ROWS)
