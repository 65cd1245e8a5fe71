"""The files of `[input] path`: found, told apart by what changes when they do, and with the columns of their folders.

Before `input_scan.py`, which opens them. Listing alone; a run that is resumed checks its input by these functions.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moebeam.schemas.canonical import Json, fingerprint
from moebeam.schemas.errors import InputPatternError
from moebeam.schemas.extras import require_extra
from moebeam.schemas.job.input_section import InputSection, is_table_url
from moebeam.schemas.store import storage
from moebeam.schemas.store.file_mark import FileMark, mark_listed
from moebeam.schemas.store.file_patterns import FoundFile, find_files
from moebeam.schemas.store.run_layout import RunLayout, find_frame_digest
from moebeam.transforms.read.partitions import read_partitions


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file of the input.

    Attributes:
        mark: what the file is claimed to be while the run reads it; None for a link that leads nowhere, and a table.
        partitions: columns that its folders give, by `partitions.read_partitions`.
    """

    path: str
    identity: Json
    mark: FileMark | None
    partitions: Mapping[str, str | None]


def list_input_files(section: InputSection) -> list[InputFile]:
    """List the input's files by path, each once.

    Raises:
        InputPatternError: a path has no files, is a run that is not finished, or cannot be listed.
    """
    if any(map(is_table_url, section.paths)):
        return [_list_table(section.paths[0])]
    found = {file.path: file for file in _find_query_files(section)}
    found |= {file.path: file for path in section.paths for file in _find_path(path)}
    return [
        InputFile(path, _identify(path, file.info), mark_listed(path, file.info), read_partitions(path, file.root))
        for path, file in sorted(found.items())
    ]


def _find_query_files(section: InputSection) -> tuple[FoundFile, ...]:
    if section.query is None:
        return ()
    require_extra("duckdb", "[input] query")
    # Here, because DuckDB is an extra.
    from moebeam.transforms.read.sources.query_text import parse_query

    return parse_query(section.query, section.folder).files


def _list_table(url: str) -> InputFile:
    """A table, whose pinned version never changes."""
    return InputFile(url, {"table": url}, None, {})


def identify_files(section: InputSection) -> dict[str, Json]:
    """Identity of each input file, which changes when the file does; only lists, opens nothing.

    Raises:
        InputPatternError: as `list_input_files`.
    """
    return {file.path: file.identity for file in list_input_files(section)}


def files_fingerprint(files: Mapping[str, Json]) -> str:
    """The input's fingerprint, `InputScan.fingerprint`, from the result of `identify_files`."""
    return fingerprint(list(files.values()))


def _find_path(path: str) -> Iterator[FoundFile]:
    try:
        files = find_files(_find_results(path))
    except OSError as error:
        raise InputPatternError(f"[input] path {path!r}: cannot be listed: {error}") from error
    if not files:
        raise InputPatternError(f"[input] path {path!r}: expected at least one file, found none")
    for file in files:
        if any("\ud800" <= character <= "\udfff" for character in file.path):
            raise InputPatternError(f"[input] path {path!r}: expected file names in UTF-8, found {file.path!r}")
        yield file


def _find_results(path: str) -> str:
    """A run's output stands for its results; any other path for itself.

    Raises:
        InputPatternError: the run is not finished: rows that it still answers would be missing in silence.
        OSError: the store failed.
    """
    folder = path.rstrip("/")
    if not folder or not storage.is_folder(path):
        return path
    parent, _, name = folder.rpartition("/")
    for output in (folder, parent) if name == "results" else (folder,):
        layout = RunLayout(output)
        if not storage.exists(layout.job):
            continue
        if not _is_complete(layout):
            raise InputPatternError(
                f"[input] path {path!r}: expected a finished run, found one with rows left; "
                f"moebeam resume {output} first"
            )
        return layout.table("results")
    return path


def _is_complete(layout: RunLayout) -> bool:
    try:
        manifest: Json = json.loads(storage.read_bytes(layout.manifest))
    except (FileNotFoundError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("status") == "complete"


def _identify(path: str, info: Mapping[str, Any]) -> Json:
    """What changes when a file changes: its size, and the store's version mark or time; a frame's digest is enough."""
    if (digest := find_frame_digest(path)) is not None:
        return {"frame": digest}
    marks = {
        key: str(info[key])
        for key in ("ETag", "etag", "mtime", "generation", "LastModified", "blob_id")
        if info.get(key)
    }
    return {"path": path, "size": int(info.get("size") or 0), **marks}
