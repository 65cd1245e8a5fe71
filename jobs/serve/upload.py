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


@dataclass(frozen=True, slots=True)
class Upload:
    """What was uploaded: its content is at the path that it was to go to."""

    filename: str
    fields: Mapping[str, str]
    num_bytes: int
    num_lines: int
    sha256: str


async def take_upload(request: Request, target: Path, limits: UploadLimits) -> Upload:
    """Write the file of a form to a path, durably.

    Raises:
        ApiError: it is no form with one file, or too large, or has too many lines.
        OSError: it cannot be written.
    """
    stream = _limit(request.stream(), limits.max_bytes + _FORM_BYTES, limits)
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
        num_bytes, num_lines, digest = await anyio.to_thread.run_sync(_keep, file.file, target, limits)
        return Upload(file.filename or "upload.jsonl", fields, num_bytes, num_lines, digest)
    finally:
        await form.close()


async def _limit(stream: AsyncIterator[bytes], max_bytes: int, limits: UploadLimits) -> AsyncGenerator[bytes]:
    num_bytes = 0
    async for chunk in stream:
        num_bytes += len(chunk)
        if num_bytes > max_bytes:
            raise _too_large(limits)
        yield chunk


def _keep(source: BinaryIO, target: Path, limits: UploadLimits) -> tuple[int, int, str]:
    """Copy a file; returns its bytes, its lines that are not blank, and its digest."""
    digest = hashlib.sha256()
    num_bytes = num_lines = 0
    rest = b""
    source.seek(0)
    with open(target, "wb") as sink:
        while chunk := source.read(_CHUNK_BYTES):
            num_bytes += len(chunk)
            if num_bytes > limits.max_bytes:
                raise _too_large(limits)
            digest.update(chunk)
            sink.write(chunk)
            *lines, rest = (rest + chunk).split(b"\n")
            num_lines += sum(1 for line in lines if line.strip())
            if num_lines > limits.max_lines:
                raise _too_many(limits)
        num_lines += bool(rest.strip())
        if num_lines > limits.max_lines:
            raise _too_many(limits)
        sink.flush()
        os.fsync(sink.fileno())
    return num_bytes, num_lines, digest.hexdigest()


def _too_large(limits: UploadLimits) -> ApiError:
    return ApiError(413, f"file: expected at most {limits.max_bytes:,} bytes, found more", param="file")


def _too_many(limits: UploadLimits) -> ApiError:
    return ApiError(400, f"file: expected at most {limits.max_lines:,} lines, found more", param="file")


def measure_file(path: Path) -> tuple[int, int, str]:
    """The bytes, lines that are not blank, and SHA-256 of a file."""
    digest = hashlib.sha256()
    num_bytes = num_lines = 0
    with open(path, "rb") as source:
        for line in source:
            digest.update(line)
            num_bytes += len(line)
            num_lines += bool(line.strip())
    return num_bytes, num_lines, digest.hexdigest()
