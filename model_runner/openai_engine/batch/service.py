"""A provider's Files and Batches: find, submit, wait, download.

Part of the `openai` engine in batch mode, between `runner.py` beside it and the official client, whose calls run on the
engine's event loop. What the client raises is an outage, which is waited for, and at its end `EngineUnavailable`:
requests that could not be sent stay unanswered and are no rejects.
"""

import asyncio
import logging
import tempfile
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import IO, Any, TypeVar
from urllib.parse import quote

import aiohttp
import httpx2
import openai

from moebeam.model_runner.openai_engine.batch.batch_state import BatchPage, BatchState, UploadedFile, read_reply
from moebeam.model_runner.openai_engine.batch.lines import CHAT_URL, DIGEST_KEY, BatchWindow, may_hold
from moebeam.model_runner.openai_engine.client import EndpointSpec, key_headers, make_client
from moebeam.model_runner.openai_engine.event_loop import BackgroundLoop
from moebeam.model_runner.openai_engine.failures import classify_failure
from moebeam.model_runner.openai_engine.outages.circuit import Circuit, OutagePolicy
from moebeam.model_runner.openai_engine.transport.bounded_client import bound_call
from moebeam.model_runner.openai_engine.transport.bounds import bound_file
from moebeam.schemas.errors import EngineTimeout, EngineUnavailable, MalformedResponse, RowError

_ENDED = frozenset({"completed", "expired", "cancelled", "failed"})
_MAX_AGE = timedelta(days=30)
"""Providers keep the files of a batch for about this long."""

_REPLY_BYTES = 8 << 20
"""A page of 100 batches, each with 16 keys of 512 characters, and more than room for what else is said of them."""
_MAX_PAGES = 1_000
_LOOK_S = 0.2
"""How soon a call in flight notices that nothing is waited for any more."""

_LOGGER = logging.getLogger(__name__)
Found = TypeVar("Found")


class GivenBack(Exception):
    """Nothing is waited for any more; batches stay at the provider."""


@dataclass(frozen=True, slots=True)
class BatchPolling:
    """How long to wait between polls of a batch, and between calls that fail.

    Attributes:
        max_failed_polls: calls in a row that may fail before that counts as an outage.
        queue_wait_s: before a batch is submitted again that was refused because too much is queued; twice as long each
            time.
    """

    first_poll_s: float = 5.0
    max_poll_s: float = 60.0
    max_failed_polls: int = 3
    queue_wait_s: float = 60.0


@dataclass(slots=True, weakref_slot=True)
class BatchService:
    """One provider's batches; threads may share it.

    Attributes:
        max_outage_s: how long a provider is waited for that answers nothing.
        sleep: None sleeps for real, and not past `give_back`.
        counts: batches submitted, and polls.
        circuit: the provider's outages; guarded by a lock.
    """

    spec: EndpointSpec
    secret: str = field(repr=False)
    polling: BatchPolling = field(default_factory=BatchPolling)
    sleep: Callable[[float], object] | None = None
    max_outage_s: float = 600.0
    counts: Counter[str] = field(default_factory=Counter[str])
    circuit: Circuit = field(init=False)
    _background: BackgroundLoop = field(init=False, repr=False)
    _client: openai.AsyncOpenAI = field(init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _is_given_back: threading.Event = field(default_factory=threading.Event)
    _has_worked: set[str] = field(default_factory=set[str])

    def __post_init__(self) -> None:
        polling = self.polling
        policy = OutagePolicy(
            self.max_outage_s,
            num_failures=polling.max_failed_polls,
            first_wait_s=polling.first_poll_s,
            max_wait_s=polling.max_poll_s,
        )
        self.circuit = Circuit(self.spec.profile.name, policy)
        self._background = BackgroundLoop.current()
        self._client = make_client(self.spec, self.secret)
        self._background.register_close(id(self), self._client.close)
        weakref.finalize(self, self._background.close_now, id(self)).atexit = False

    def give_back(self) -> None:
        """End all waits and calls; safe from any thread."""
        self._is_given_back.set()

    def wait(self, seconds: float) -> None:
        """Sleep.

        Raises:
            GivenBack: nothing is waited for any more.
        """
        (self.sleep or self._is_given_back.wait)(seconds)
        if self._is_given_back.is_set():
            raise GivenBack

    def find(self, window: BatchWindow) -> list[BatchState]:
        """The batches, of the last 30 days, that may hold lines of a window; none that failed to begin.

        Raises:
            EngineUnavailable: they cannot be listed.
        """
        oldest = (datetime.now(UTC) - _MAX_AGE).timestamp()

        def look() -> list[BatchState]:
            return [
                batch
                for batch in self._list()
                if (batch.created_at or oldest) >= oldest
                and batch.status != "failed"
                and may_hold(batch.metadata, window)
            ]

        return self._persist("find", "batches cannot be listed", look)

    def submit(self, window: BatchWindow) -> BatchState:
        """Upload a window and make one batch of it.

        Raises:
            EngineUnavailable: the provider takes none.
        """
        metadata = window.metadata
        uploaded = self._upload(window, f"moebeam-{metadata[DIGEST_KEY][:16]}.jsonl")
        batch = self._create(window, uploaded, metadata)
        self.counts["num_batches_submitted"] += 1
        if (batch.metadata or {}).get(DIGEST_KEY) != metadata[DIGEST_KEY]:
            _LOGGER.warning(
                "%s keeps no metadata: after a crash, batch %s would be submitted and paid again",
                self.spec.profile.name,
                batch.id,
            )
        return batch

    def wait_for_end(self, batch: BatchState) -> BatchState:
        """Wait for the end of a batch.

        Raises:
            EngineUnavailable: it cannot be polled any more.
        """
        wait_s = self.polling.first_poll_s
        while batch.status not in _ENDED:
            self.wait(wait_s)
            wait_s = min(self.polling.max_poll_s, wait_s * 1.5)
            batch = self._persist(
                "look", f"batch {batch.id} cannot be looked at", lambda batch_id=batch.id: self._look(batch_id)
            )
        return batch

    def download(self, file_id: str, max_bytes: int) -> IO[bytes]:
        """A file of a batch, whole, on this machine's disk and without a name; the caller closes it.

        Args:
            max_bytes: what its lines can need.
        Raises:
            EngineUnavailable: it cannot be fetched.
        """
        file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115, the caller reads it

        async def fetch() -> None:
            file.seek(0)
            file.truncate()
            response = self._client.files.with_streaming_response.content(file_id, extra_headers=self._headers)
            async with response as pieces:
                async for piece in pieces.iter_bytes():
                    file.write(piece)

        try:
            self._persist("download", f"file {file_id} cannot be downloaded", lambda: self._run(fetch(), max_bytes))
        except BaseException:
            file.close()
            raise
        file.seek(0)
        return file

    def _list(self) -> list[BatchState]:
        """All batches that the provider lists."""
        found: list[BatchState] = []
        params: dict[str, object] = {"limit": 100}
        for _ in range(_MAX_PAGES):
            page = read_reply(BatchPage, self._run(self._get("/batches", params)))
            found += page.data
            if not page.has_more or not page.data:
                return found
            params = {"limit": 100, "after": page.data[-1].id}
        raise MalformedResponse(f"batches: expected the end of the list within {_MAX_PAGES} pages, found more")

    def _look(self, batch_id: str) -> BatchState:
        self.counts["num_looks"] += 1
        return read_reply(BatchState, self._run(self._get(f"/batches/{quote(batch_id, safe='')}")))

    def _upload(self, window: BatchWindow, name: str) -> UploadedFile:
        async def send() -> bytes:
            window.file.seek(0)
            reply = await self._client.files.with_raw_response.create(
                file=(name, window.file), purpose="batch", extra_headers=self._headers
            )
            return reply.content

        def upload() -> UploadedFile:
            return read_reply(UploadedFile, self._run(send(), max(_REPLY_BYTES, window.num_bytes)))

        return self._persist("upload", "a batch's file cannot be uploaded", upload)

    async def _get(self, path: str, params: dict[str, object] | None = None) -> bytes:
        options: Any = {"headers": self._headers, "params": params or {}}
        return (await self._client.get(path, cast_to=httpx2.Response, options=options)).content

    async def _post(self, path: str, body: dict[str, object]) -> bytes:
        options: Any = {"headers": self._headers}
        return (await self._client.post(path, body=body, cast_to=httpx2.Response, options=options)).content

    @property
    def _headers(self) -> dict[str, Any]:
        return {**key_headers(self.spec.profile, self.secret)}

    def _run(self, call: Coroutine[Any, Any, Found], max_bytes: int = _REPLY_BYTES) -> Found:
        """Await a call, which runs on the event loop.

        Raises:
            GivenBack: nothing is waited for any more; the call is ended.
        """
        bounds = bound_file(max_bytes, self.spec.timeout_s)
        running = asyncio.run_coroutine_threadsafe(bound_call(call, bounds, "timeout_s"), self._background.loop)
        while True:
            try:
                return running.result(_LOOK_S)
            except TimeoutError:
                if running.done():
                    raise
                if self._is_given_back.is_set():
                    running.cancel()
                    raise GivenBack from None

    def _create(self, window: BatchWindow, uploaded: UploadedFile, metadata: dict[str, str]) -> BatchState:
        """Make a batch once: where a response is lost, the batch is searched for before another is made."""
        num_tries = 0

        def create() -> BatchState:
            nonlocal num_tries
            num_tries += 1
            if num_tries > 1:
                for batch in self.find(window):
                    if batch.input_file_id == uploaded.id:
                        return batch
            body: dict[str, object] = {
                "completion_window": "24h",
                "endpoint": CHAT_URL,
                "input_file_id": uploaded.id,
                "metadata": metadata,
            }
            return read_reply(BatchState, self._run(self._post("/batches", body)))

        return self._persist("create", "a batch cannot be made", create)

    def _persist(self, kind: str, what: str, call: Callable[[], Found]) -> Found:
        """Make a call until it succeeds, for as long as an outage is waited for.

        Args:
            kind: of call; a door that was never open to it is not waited for.
            what: what is told if it does not succeed.
        Raises:
            EngineUnavailable: it is refused, or the outage is too long.
        """
        wait_s = self.polling.first_poll_s
        while True:
            try:
                found = call()
            except (openai.OpenAIError, httpx2.TransportError, aiohttp.ClientError, RowError) as error:
                failure = classify_failure(error, self.spec.profile)
                is_shut = failure.consequence == "closed" and kind not in self._has_worked
                if (failure.consequence == "row" and not isinstance(error, EngineTimeout)) or is_shut:
                    raise EngineUnavailable(f"{what}: {failure.error}") from error
                with self._lock:
                    self.circuit.record_failure(failure, is_probe=self.circuit.is_open)
                    down, due_s = self.circuit.down, self.circuit.wait_s()
                if down is not None:
                    raise EngineUnavailable(f"{what}: {down}") from error
            else:
                with self._lock:
                    self.circuit.record_answer()
                    self._has_worked.add(kind)
                return found
            self.wait(due_s or wait_s)
            wait_s = min(self.polling.max_poll_s, wait_s * 2)
