"""The server's figures in Prometheus' form, at `/metrics`; they name no tenant."""

import time
from collections import Counter as Counts

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moebeam.jobs.serve.records import Batch, StoredFile
from moebeam.jobs.serve.shelf import Shelf

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0)


class Metrics:
    """Counts what the server does; a registry of its own, so that servers of one process do not share it."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._registry = CollectorRegistry()
        registry = self._registry
        self.requests = Counter("moebeam_http_requests", "Requests", ["route", "method", "status"], registry=registry)
        self.seconds = Histogram(
            "moebeam_http_seconds", "Seconds of a request", ["route"], buckets=_SECONDS, registry=registry
        )
        self._batches = Gauge("moebeam_batches", "Batches by status", ["status"], registry=registry)
        self._lines = Counter("moebeam_uploaded_lines", "Lines of uploaded files", registry=registry)
        self._bytes = Counter("moebeam_uploaded_bytes", "Bytes of uploaded files", registry=registry)
        self._answered = Counter("moebeam_answered_lines", "Lines of ended batches", ["outcome"], registry=registry)
        self._tokens = Counter("moebeam_tokens", "Tokens of ended batches", ["kind"], registry=registry)

    def count_upload(self, file: StoredFile) -> None:
        self._lines.inc(file.num_lines)
        self._bytes.inc(file.num_bytes)

    def count_batch(self, batch: Batch) -> None:
        """Count a batch that has ended."""
        self._answered.labels("completed").inc(batch.num_completed)
        self._answered.labels("failed").inc(batch.num_failed)
        if batch.usage is not None:
            self._tokens.labels("prompt").inc(batch.usage.prompt_tokens)
            self._tokens.labels("cached").inc(batch.usage.cached_tokens)
            self._tokens.labels("completion").inc(batch.usage.completion_tokens)

    async def show(self, request: Request) -> Response:
        self._batches.clear()
        for status, number in Counts(batch.status for batch in self._shelf.batches.values()).items():
            self._batches.labels(status).set(number)
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)


class MetricsMiddleware:
    """Counts requests by the handler's name, never by path, which holds ids."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, note_status)
        finally:
            route = getattr(scope.get("endpoint"), "__name__", "other")
            self._metrics.requests.labels(route, scope["method"], status).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - started)
