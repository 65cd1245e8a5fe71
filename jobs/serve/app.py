"""The ASGI application of `moebeam serve`: OpenAI's `/v1/files` and `/v1/batches`, `/metrics` and `/health`.

Specification: OpenAI's API reference, Files and Batches. A tenant sees nothing of another one: what is not its own is
not found. Nothing of a request is logged.
"""

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from moebeam.jobs.serve.api_errors import ApiError, make_error, show_error
from moebeam.jobs.serve.batch_queue import BatchQueue
from moebeam.jobs.serve.keys import Keys
from moebeam.jobs.serve.metrics import Metrics, MetricsMiddleware
from moebeam.jobs.serve.records import Batch, StoredFile, make_id
from moebeam.jobs.serve.requests import CreateBatch, ExpiresAfter, count_window_s, explain, read_body
from moebeam.jobs.serve.shelf import Shelf
from moebeam.jobs.serve.upload import UploadLimits, take_upload

RETRY_WINDOW_S = 600
"""How long a repeated request of a client's own retry is known as the one before."""

_LOOPBACK_HOSTS = ["127.0.0.1", "localhost", "[::1]", "testserver"]
_MAX_PAGE = {"files": 10_000, "batches": 100}
_Item = TypeVar("_Item", StoredFile, Batch)


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What a server is told.

    Attributes:
        num_runs: most batches that run at a time.
        max_waiting: most batches of a tenant that are not ended.
    """

    job: str
    keys: Keys
    limits: UploadLimits = field(default_factory=UploadLimits)
    num_runs: int = 1
    max_waiting: int = 1_000


class BatchServer:
    """The handlers of all routes."""

    def __init__(self, shelf: Shelf, settings: ServerSettings) -> None:
        self._shelf = shelf
        self._settings = settings
        self.metrics = Metrics(shelf)
        self._queue = BatchQueue(shelf, settings.job, num_runs=settings.num_runs, on_end=self.metrics.count_batch)
        self._creating = asyncio.Lock()

    def make_app(self) -> Starlette:
        """The application; its lifespan runs the queue."""
        routes = [
            Route("/v1/files", self.create_file, methods=["POST"]),
            Route("/v1/files", self.list_files, methods=["GET"]),
            Route("/v1/files/{file_id}", self.get_file, methods=["GET"]),
            Route("/v1/files/{file_id}", self.delete_file, methods=["DELETE"]),
            Route("/v1/files/{file_id}/content", self.get_content, methods=["GET"]),
            Route("/v1/batches", self.create_batch, methods=["POST"]),
            Route("/v1/batches", self.list_batches, methods=["GET"]),
            Route("/v1/batches/{batch_id}", self.get_batch, methods=["GET"]),
            Route("/v1/batches/{batch_id}/cancel", self.cancel_batch, methods=["POST"]),
            Route("/health", self.get_health, methods=["GET"]),
            Route("/metrics", self.metrics.show, methods=["GET"]),
        ]
        middleware = [Middleware(MetricsMiddleware, metrics=self.metrics)]
        if not self._settings.keys.are_needed:
            # Without keys, a page in a browser of this machine must not reach it under a name of its own.
            middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=_LOOPBACK_HOSTS))
        return Starlette(
            routes=routes,
            middleware=middleware,
            exception_handlers={ApiError: show_error, 404: _show_no_route, 405: _show_no_route, Exception: show_error},
            lifespan=self._run_queue,
        )

    @contextlib.asynccontextmanager
    async def _run_queue(self, app: Starlette) -> AsyncGenerator[None]:
        task = asyncio.create_task(self._queue.run(), name="batch queue")
        try:
            yield
        finally:
            self._queue.stop()
            await task

    async def create_file(self, request: Request) -> Response:
        tenant = self._find_tenant(request)
        file_id = make_id("file")
        target = self._shelf.new_content_path(tenant, file_id)
        try:
            upload = await take_upload(request, target, self._settings.limits)
            purpose = upload.fields.get("purpose")
            if purpose != "batch":
                raise ApiError(400, f"purpose: expected 'batch', found {purpose!r}", param="purpose")
            after = _read_expires_after(upload.fields)
            now = int(time.time())
            key = _request_key(request, "file", upload.size.sha256, upload.filename, str(after))
            async with self._creating:
                known = self._find_repeated(request, key, self._shelf.list_files(tenant))
                if known is not None:
                    return JSONResponse(known.to_json())
                file = StoredFile(
                    file_id=file_id,
                    tenant=tenant,
                    filename=upload.filename,
                    purpose=purpose,
                    num_bytes=upload.size.num_bytes,
                    num_lines=upload.size.num_lines,
                    sha256=upload.size.sha256,
                    created_at=now,
                    expires_at=None if after is None else now + after.seconds,
                    request_key=key,
                )
                await self._shelf.put_file(file, target)
        finally:
            target.unlink(missing_ok=True)
        self.metrics.count_upload(file)
        return JSONResponse(file.to_json())

    async def list_files(self, request: Request) -> Response:
        tenant = self._find_tenant(request)
        purpose = request.query_params.get("purpose")
        files = [file for file in self._shelf.list_files(tenant) if purpose is None or file.purpose == purpose]
        order = request.query_params.get("order", "desc")
        if order not in ("asc", "desc"):
            raise ApiError(400, f"order: expected asc or desc, found {order!r}", param="order")
        return _show_page(request, files if order == "desc" else files[::-1], "files")

    async def get_file(self, request: Request) -> Response:
        return JSONResponse(self._find(request, self._shelf.files, "file").to_json())

    async def delete_file(self, request: Request) -> Response:
        file = self._find(request, self._shelf.files, "file")
        users = [batch for batch in self._shelf.list_batches(file.tenant) if batch.input_file_id == file.file_id]
        if not all(batch.has_ended for batch in users):
            raise ApiError(409, f"{file.file_id}: a batch that is not ended reads it; cancel the batch first")
        await self._shelf.remove_file(file)
        return JSONResponse({"id": file.file_id, "object": "file", "deleted": True})

    async def get_content(self, request: Request) -> Response:
        file = self._find(request, self._shelf.files, "file")
        return FileResponse(self._shelf.content_path(file), media_type="application/jsonl", filename=file.filename)

    async def create_batch(self, request: Request) -> Response:
        tenant = self._find_tenant(request)
        body = await read_body(request, CreateBatch)
        file = self._shelf.files.get(body.input_file_id)
        if file is None or file.tenant != tenant:
            raise ApiError(400, f"input_file_id: there is no file {body.input_file_id!r}", param="input_file_id")
        if file.purpose != "batch":
            raise ApiError(
                400, f"input_file_id: expected a file of purpose 'batch', found {file.purpose!r}", param="input_file_id"
            )
        key = _request_key(request, "batch", body.model_dump_json())
        async with self._creating:
            known = self._find_repeated(request, key, self._shelf.list_batches(tenant))
            if known is not None:
                return JSONResponse(known.to_json())
            num_waiting = sum(not batch.has_ended for batch in self._shelf.list_batches(tenant))
            if num_waiting >= self._settings.max_waiting:
                raise ApiError(429, f"expected at most {self._settings.max_waiting:,} batches that are not ended")
            now = int(time.time())
            batch = Batch(
                batch_id=make_id("batch"),
                tenant=tenant,
                input_file_id=file.file_id,
                endpoint=body.endpoint,
                completion_window=body.completion_window,
                created_at=now,
                expires_at=now + count_window_s(body.completion_window),
                metadata=tuple((body.metadata or {}).items()),
                output_expires_after_s=body.output_expires_after and body.output_expires_after.seconds,
                num_lines=file.num_lines,
                request_key=key,
            )
            await self._shelf.put_batch(batch)
        self._queue.notice()
        return JSONResponse(batch.to_json())

    async def list_batches(self, request: Request) -> Response:
        return _show_page(request, list(self._shelf.list_batches(self._find_tenant(request))), "batches")

    async def get_batch(self, request: Request) -> Response:
        return JSONResponse(self._find(request, self._shelf.batches, "batch").to_json())

    async def cancel_batch(self, request: Request) -> Response:
        batch = self._find(request, self._shelf.batches, "batch")
        if batch.has_ended:
            raise ApiError(409, f"{batch.batch_id}: expected a batch at work, found one that is {batch.status}")
        if batch.status not in ("cancelling", "finalizing"):
            batch = await self._shelf.put_batch(batch.enter("cancelling"))
            self._queue.cancel(batch)
        return JSONResponse(batch.to_json())

    async def get_health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    def _find_tenant(self, request: Request) -> str:
        tenant = self._settings.keys.find_tenant(request.headers.get("authorization"))
        if tenant is None:
            raise ApiError(401, "expected an API key of this server as a bearer token", code="invalid_api_key")
        return tenant

    def _find(self, request: Request, items: Mapping[str, _Item], kind: str) -> _Item:
        """The tenant's own file or batch that a path names; another's is not found either."""
        tenant, name = self._find_tenant(request), str(request.path_params[f"{kind}_id"])
        item = items.get(name)
        if item is None or item.tenant != tenant:
            raise ApiError(404, f"there is no {kind} {name!r}", param=f"{kind}_id")
        return item

    def _find_repeated(self, request: Request, key: str, items: Iterator[_Item]) -> _Item | None:
        """What the same request made before: by its `Idempotency-Key`, or by the client's own count of retries.

        Raises:
            ApiError: the key came with another request.
        """
        named = request.headers.get("idempotency-key")
        if named is None and request.headers.get("x-stainless-retry-count", "0") == "0":
            return None
        for item in items:
            if named is not None and item.request_key.partition(" ")[0] == key.partition(" ")[0]:
                if item.request_key != key:
                    raise ApiError(409, "Idempotency-Key: expected the request that it came with first, found another")
                return item
            if named is None and item.request_key == key and time.time() - item.created_at <= RETRY_WINDOW_S:
                return item
        return None


def _request_key(request: Request, *parts: str) -> str:
    """What a request is known by: the digest of its `Idempotency-Key`, if any, and of its content."""
    named = request.headers.get("idempotency-key", "")
    digests = [hashlib.sha256("\0".join(texts).encode()).hexdigest()[:32] for texts in ((parts[0], named), parts)]
    return f"{digests[0] if named else '-'} {digests[1]}"


def _read_expires_after(fields: Mapping[str, str]) -> ExpiresAfter | None:
    given = {
        name: fields[f"expires_after[{name}]"] for name in ("anchor", "seconds") if f"expires_after[{name}]" in fields
    }
    if not given:
        return None
    try:
        return ExpiresAfter.model_validate(given)
    except ValidationError as error:
        raise explain(error) from error


def _show_page(request: Request, items: Sequence[StoredFile] | Sequence[Batch], kind: str) -> Response:
    """A page of a list: `limit` items behind the one that `after` names."""
    text = request.query_params.get("limit", "20" if kind == "batches" else str(_MAX_PAGE[kind]))
    most = _MAX_PAGE[kind]
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= most:
        raise ApiError(400, f"limit: expected 1 to {most}, found {text!r}", param="limit")
    ids = [item.file_id if isinstance(item, StoredFile) else item.batch_id for item in items]
    after = request.query_params.get("after")
    if after is not None and after not in ids:
        raise ApiError(400, f"after: expected the id of one of these {kind}, found {after!r}", param="after")
    first = 0 if after is None else ids.index(after) + 1
    page, limit = ids[first : first + int(text)], int(text)
    return JSONResponse(
        {
            "object": "list",
            "data": [item.to_json() for item in items[first : first + limit]],
            "first_id": page[0] if page else None,
            "last_id": page[-1] if page else None,
            "has_more": first + limit < len(ids),
        }
    )


async def _show_no_route(request: Request, error: Exception) -> Response:
    status_code = int(getattr(error, "status_code", 404))
    return make_error(status_code, "expected /v1/files or /v1/batches, found another path or method")
