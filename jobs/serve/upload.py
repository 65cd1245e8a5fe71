"""Takes an upload of `POST /v1/files`: multipart, to disk, within limits, and counts what it holds."""

import hashlib
import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import anyio.to_thread
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from moebeam.jobs.serve.api_errors import ApiError

_FORM_BYTES = 64 << 10
"""What a form may hold besides its file."""

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class UploadLimits:
    """Most that a file may hold; OpenAI's by default."""

    max_bytes: int = 200 << 20
    max_lines: int = 50_000


class FileSize:
    """What a file holds, as far as its bytes were added.

    Attributes:
        num_lines: those that are not blank, the one that is not ended yet among them.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self._digest = hashlib.sha256()
        self._num_ended = 0
        self._has_text = False

    def add(self, chunk: bytes) -> None:
        """Count the next bytes."""
        self.num_bytes += len(chunk)
        self._digest.update(chunk)
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            self._num_ended += self._has_text or bool(end.strip())
            self._has_text = False
        self._has_text = self._has_text or bool(rest.strip())

    @property
    def num_lines(self) -> int:
        return self._num_ended + self._has_text

    @property
    def sha256(self) -> str:
        """The digest in hex."""
        return self._digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Upload:
    """What was uploaded: its content is at the path that it was to go to."""

    filename: str
    fields: Mapping[str, str]
    size: FileSize


async def take_upload(request: Request, target: Path, limits: UploadLimits) -> Upload:
    """Write the file of a form to a path, durably.

    Raises:
        ApiError: it is no form with one file, or too large, or has too many lines.
        OSError: it cannot be written.
    """
    stream = _limit(request.stream(), limits)
    parser = MultiPartParser(request.headers, stream, max_files=1, max_fields=8, max_part_size=_FORM_BYTES)
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, AssertionError) as error:
        raise ApiError(400, f"expected a multipart form with `file` and `purpose`, found: {error}") from error
    try:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise ApiError(400, "file: expected a file, found none", param="file")
        fields = {name: value for name, value in form.items() if isinstance(value, str)}
        size = await anyio.to_thread.run_sync(_keep, file.file, target, limits)
        return Upload(file.filename or "upload.jsonl", fields, size)
    finally:
        await form.close()


async def _limit(stream: AsyncIterator[bytes], limits: UploadLimits) -> AsyncGenerator[bytes]:
    num_bytes = 0
    async for chunk in stream:
        num_bytes += len(chunk)
        if num_bytes > limits.max_bytes + _FORM_BYTES:
            raise ApiError(413, f"file: expected at most {limits.max_bytes:,} bytes, found more", param="file")
        yield chunk


def _keep(source: BinaryIO, target: Path, limits: UploadLimits) -> FileSize:
    """Copy a file, durably."""
    size = FileSize()
    source.seek(0)
    with open(target, "wb") as sink:
        while chunk := source.read(_CHUNK_BYTES):
            size.add(chunk)
            if size.num_bytes > limits.max_bytes:
                raise ApiError(413, f"file: expected at most {limits.max_bytes:,} bytes, found more", param="file")
            if size.num_lines > limits.max_lines:
                raise ApiError(400, f"file: expected at most {limits.max_lines:,} lines, found more", param="file")
            sink.write(chunk)
        sink.flush()
        os.fsync(sink.fileno())
    return size


def measure_file(path: Path) -> FileSize:
    """Measure a whole file."""
    size = FileSize()
    with open(path, "rb") as source:
        while chunk := source.read(_CHUNK_BYTES):
            size.add(chunk)
    return size
