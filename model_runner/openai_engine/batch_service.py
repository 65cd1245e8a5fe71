"""A provider's Files and Batches: find, submit, wait, download.

Part of the `openai` engine in batch mode, between `batch_runner.py` and the official client. Whatever the client raises
becomes `EngineUnavailable` here: requests that could not be sent stay unanswered and are no rejects.
"""

import logging
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import IO, Any

import httpx2
import openai
from openai.types import Batch, FileObject
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from moebeam.model_runner.openai_engine.batch_lines import CHAT_URL, DIGEST_KEY, BatchWindow, may_hold
from moebeam.model_runner.openai_engine.endpoint import EndpointSpec
from moebeam.model_runner.openai_engine.failures import classify_failure
from moebeam.schemas.errors import EngineUnavailable

_ENDED = frozenset({"completed", "expired", "cancelled", "failed"})
_MAX_AGE = timedelta(days=30)
"""Providers keep the files of a batch for about this long."""

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BatchPolling:
    """How long to wait between polls of a batch, and how many in a row may fail.

    Attributes:
        queue_wait_s: before a batch is submitted again that was refused because too much is queued; twice as long each
            time.
    """

    first_poll_s: float = 5.0
    max_poll_s: float = 60.0
    max_failed_polls: int = 60
    queue_wait_s: float = 60.0


@dataclass(slots=True, weakref_slot=True)
class BatchService:
    """One provider's batches; threads may share it.

    Attributes:
        counts: batches submitted, and polls.
    """

    spec: EndpointSpec
    secret: str = field(repr=False)
    polling: BatchPolling = field(default_factory=BatchPolling)
    sleep: Callable[[float], None] = time.sleep
    counts: Counter[str] = field(default_factory=Counter[str])
    _client: openai.OpenAI = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # OpenAI's own account variables must not reach another provider.
        foreign: dict[str, Any] = {"OpenAI-Organization": openai.Omit(), "OpenAI-Project": openai.Omit()}
        self._client = openai.OpenAI(
            api_key=self.secret or "none",
            base_url=self.spec.base_url,
            max_retries=self.spec.max_retries,
            timeout=self.spec.timeout_s,
            default_headers=None if self.spec.profile.name == "openai" else foreign,
        )
        # A cycle that is collected would finalize the sockets before the client that closes them.
        weakref.finalize(self, self._client.close)

    def find(self, window: BatchWindow) -> list[Batch]:
        """The batches, of the last 30 days, that may hold lines of a window; none that failed to begin.

        Raises:
            EngineUnavailable: they cannot be listed.
        """
        oldest = (datetime.now(UTC) - _MAX_AGE).timestamp()
        try:
            return [
                batch
                for batch in self._client.batches.list(limit=100)
                if batch.created_at >= oldest and batch.status != "failed" and may_hold(batch.metadata, window)
            ]
        except openai.OpenAIError as error:
            raise self._unavailable("batches cannot be listed", error) from error

    def submit(self, window: BatchWindow) -> Batch:
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

    def wait_for_end(self, batch: Batch) -> Batch:
        """Wait for the end of a batch.

        Raises:
            EngineUnavailable: it cannot be polled any more.
        """
        # The next poll is the retry of one that failed.
        batches = self._client.with_options(max_retries=0).batches
        wait_s, num_failed = self.polling.first_poll_s, 0
        while batch.status not in _ENDED:
            self.sleep(wait_s)
            wait_s = min(self.polling.max_poll_s, wait_s * 1.5)
            self.counts["num_looks"] += 1
            try:
                batch, num_failed = batches.retrieve(batch.id), 0
            except openai.OpenAIError as error:
                num_failed += 1
                if not self._is_transient(error) or num_failed > self.polling.max_failed_polls:
                    raise self._unavailable(f"batch {batch.id} cannot be looked at", error) from error
        return batch

    def download(self, file_id: str) -> IO[bytes]:
        """A file of a batch, whole, on this machine's disk and without a name; the caller closes it.

        Raises:
            EngineUnavailable: it cannot be fetched.
        """
        passing = (openai.APIConnectionError, httpx2.TransportError)
        file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115, the caller reads it
        try:
            for attempt in self._retrying(passing):
                with attempt, self._client.files.with_streaming_response.content(file_id) as response:
                    file.seek(0)
                    file.truncate()
                    for piece in response.iter_bytes():
                        file.write(piece)
        except (openai.OpenAIError, httpx2.TransportError) as error:
            file.close()
            raise self._unavailable(f"file {file_id} cannot be downloaded", error) from error
        except BaseException:
            file.close()
            raise
        file.seek(0)
        return file

    def _upload(self, window: BatchWindow, name: str) -> FileObject:
        window.file.seek(0)
        try:
            return self._client.files.create(file=(name, window.file), purpose="batch")
        except openai.OpenAIError as error:
            raise self._unavailable("a batch's file cannot be uploaded", error) from error

    def _create(self, window: BatchWindow, uploaded: FileObject, metadata: dict[str, str]) -> Batch:
        """Make a batch once: where a response is lost, the batch is searched for before another is made."""
        wait_s = self.polling.first_poll_s
        for num_left in range(self.spec.max_retries, -1, -1):
            try:
                # The client's own retries would not search.
                return self._client.with_options(max_retries=0).batches.create(
                    completion_window="24h", endpoint=CHAT_URL, input_file_id=uploaded.id, metadata=metadata
                )
            except openai.OpenAIError as error:
                failure = classify_failure(error, self.spec.profile, self.secret)
                if not self._is_transient(error) or not num_left:
                    raise self._unavailable("a batch cannot be made", error) from error
            self.sleep(failure.retry_after_s or wait_s)
            wait_s = min(self.polling.max_poll_s, wait_s * 2)
            for batch in self.find(window):
                if batch.input_file_id == uploaded.id:
                    return batch
        raise AssertionError("the last try returns or raises")

    def _is_transient(self, error: openai.OpenAIError) -> bool:
        return classify_failure(error, self.spec.profile, self.secret).consequence in ("retry", "overload")

    def _retrying(self, passing: tuple[type[Exception], ...]) -> Retrying:
        return Retrying(
            sleep=self.sleep,
            retry=retry_if_exception_type(passing),
            stop=stop_after_attempt(self.spec.max_retries + 1),
            wait=wait_exponential(self.polling.first_poll_s, self.polling.max_poll_s),
            reraise=True,
        )

    def _unavailable(self, what: str, error: Exception) -> EngineUnavailable:
        told = classify_failure(error, self.spec.profile, self.secret).error
        return EngineUnavailable(f"{what}: {told}")
