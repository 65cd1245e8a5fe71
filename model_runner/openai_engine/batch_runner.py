"""The `openai` engine in batch mode: requests as files that a provider answers within a day, at its batch price.

Stands where a model would in the *answer* stage, in place of `runner.py`. No batch is submitted twice: the provider's
batches are first searched for the same lines, so that a run resumed after a crash takes up what it finds there, waits
for it, and submits only what it does not answer. Batches stay at the provider when a run stops.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from openai.types import Batch

from moebeam.model_runner.openai_engine.batch_lines import BatchWindow, format_batch_errors, read_outcomes, request_line
from moebeam.model_runner.openai_engine.batch_service import BatchService
from moebeam.model_runner.openai_engine.completions import to_completion, to_failed_completion
from moebeam.model_runner.openai_engine.failures import redact
from moebeam.model_runner.openai_engine.options import OpenAIOptions
from moebeam.model_runner.openai_engine.responses import Answer
from moebeam.model_runner.protocol import EngineConfig
from moebeam.schemas.errors import EngineLoadError, EngineUnavailable, MalformedResponse, RowError
from moebeam.schemas.records import Completion, Request

_TOO_MUCH_QUEUED = "token_limit_exceeded"
_MAX_WINDOWS_IN_FLIGHT = 4


@dataclass(frozen=True, slots=True)
class _SubmittedWindow:
    """A window and the batches that are to answer it: found at the provider, or the one submitted for it."""

    window: BatchWindow
    batches: tuple[Batch, ...]
    is_found: bool


@dataclass(frozen=True, slots=True)
class _Times:
    """When a batch was submitted, which decides the price, and how long it took."""

    started_at: datetime
    latency_ms: float

    @classmethod
    def from_batch(cls, batch: Batch) -> "_Times":
        ended_at = batch.completed_at or batch.expired_at or batch.cancelled_at or batch.created_at
        return cls(datetime.fromtimestamp(batch.created_at, UTC), max(0.0, (ended_at - batch.created_at) * 1000.0))


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class BatchRunner:
    """Answers requests through one provider's batches.

    Attributes:
        scope: whose requests these are, such as a run's id: batches of other scopes are not taken up.
    """

    config: EngineConfig
    service: BatchService
    scope: str = ""

    def __post_init__(self) -> None:
        profile = self.service.spec.profile
        if not profile.has_batches:
            raise EngineLoadError(f"model.mode: expected a provider with batches, found {profile.name}")
        if self.config.options_as(OpenAIOptions).fallbacks:
            raise EngineLoadError("model.fallbacks: expected none in batch mode, whose batches lie at one provider")

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Answer requests, those of a batch together when it has ended; up to four batches are in flight.

        Raises:
            EngineUnavailable: the provider cannot be asked, did not begin a batch, or somebody cancelled one; what was
                answered came out before.
        """
        submitted: deque[_SubmittedWindow] = deque()
        try:
            for sent in self._windows(requests):
                if isinstance(sent, Completion):
                    yield sent
                    continue
                submitted.append(self._start(sent))
                if len(submitted) == _MAX_WINDOWS_IN_FLIGHT:
                    yield from self._collect(submitted.popleft())
            while submitted:
                yield from self._collect(submitted.popleft())
        finally:
            for left in submitted:
                left.window.file.close()

    def counters(self) -> Mapping[str, float]:
        """See `CountingRunner`: batches submitted and taken up, and polls."""
        return dict(self.service.counts)

    def _windows(self, requests: Iterable[Request]) -> Iterator[BatchWindow | Completion]:
        """Gather requests into windows; yields a failed completion for each that the provider is known to refuse."""
        spec = self.service.spec
        window = BatchWindow()
        try:
            for request in requests:
                try:
                    line_id, line = request_line(request, spec.profile, spec.model, scope=self.scope)
                except RowError as error:
                    yield self._fail(request.request_id, error, _Times(datetime.now(UTC), 0.0))
                    continue
                if not window.has_room(line):
                    yield window
                    window = BatchWindow()
                window.add(line_id, request.request_id, line)
        except BaseException:
            window.file.close()
            raise
        if window.waiting:
            yield window
        else:
            window.file.close()

    def _start(self, window: BatchWindow) -> _SubmittedWindow:
        """Take up the batches that have the requests already, or submit one."""
        try:
            found = self.service.find(window)
            if found:
                self.service.counts["num_batches_taken_up"] += len(found)
                return _SubmittedWindow(window, tuple(found), is_found=True)
            return _SubmittedWindow(window, (self.service.submit(window),), is_found=False)
        except BaseException:
            window.file.close()
            raise

    def _collect(self, submitted: _SubmittedWindow) -> Iterator[Completion]:
        """Wait until a window's batches have ended; yields its completions."""
        window, batches = submitted.window, submitted.batches
        try:
            if submitted.is_found:
                for batch in batches:
                    if window.waiting:
                        yield from self._read_answers(self.service.wait_for_end(batch), window, is_final=False)
                if not window.waiting:
                    return
                window = window.remaining()
                batches = (self.service.submit(window),)
            (batch,) = batches
            yield from self._read_answers(self._wait_for_end(batch, window), window, is_final=True)
        finally:
            window.file.close()

    def _wait_for_end(self, batch: Batch, window: BatchWindow) -> Batch:
        """Wait for the end of a batch; submits it again while the provider has too much queued to begin it.

        Raises:
            EngineUnavailable: it did not begin.
        """
        service = self.service
        wait_s = service.polling.queue_wait_s
        for num_left in range(service.spec.max_retries, -1, -1):
            batch = service.wait_for_end(batch)
            if batch.status != "failed":
                return batch
            errors = (batch.errors.data if batch.errors is not None else None) or []
            if num_left and any(error.code == _TOO_MUCH_QUEUED for error in errors):
                service.sleep(wait_s)
                wait_s *= 2
                batch = service.submit(window)
                continue
            told = redact(format_batch_errors([(error.code, error.message) for error in errors]), service.secret)
            raise EngineUnavailable(f"{service.spec.profile.name} did not begin batch {batch.id}: {told}")
        raise AssertionError("the last try returns or raises")

    def _read_answers(self, batch: Batch, window: BatchWindow, *, is_final: bool) -> Iterator[Completion]:
        """The completions that a batch holds for a window.

        Args:
            is_final: whether the batch was submitted for this window, so that what it did not answer has failed; else
                that goes on waiting.
        """
        service, times = self.service, _Times.from_batch(batch)
        closed: RowError | None = None
        failures: dict[str, RowError] = {}
        for file_id in filter(None, (batch.output_file_id, batch.error_file_id)):
            with service.download(file_id) as lines:
                for outcome in read_outcomes(lines, service.spec.profile, service.secret):
                    if outcome.line_id not in window.waiting:
                        continue
                    if isinstance(outcome.result, Answer):
                        failures.pop(outcome.line_id, None)
                        yield self._completion(window.waiting.pop(outcome.line_id), outcome.result, times)
                        continue
                    failures.setdefault(outcome.line_id, outcome.result.error)
                    if outcome.result.consequence == "endpoint":
                        closed = closed or outcome.result.error
        if not is_final or not window.waiting:
            return
        if closed is not None:
            raise EngineUnavailable(f"no provider can answer: {closed}")
        if batch.status == "cancelled":
            raise EngineUnavailable(
                f"{service.spec.profile.name}: batch {batch.id} was cancelled; resume the run to submit the "
                f"{len(window.waiting)} requests that it left again"
            )
        missing = MalformedResponse(f"{service.spec.profile.name}: batch {batch.id} has no line for this request")
        while window.waiting:
            line_id, request_id = window.waiting.popitem()
            yield self._fail(request_id, failures.get(line_id, missing), times)

    def _completion(self, request_id: str, answer: Answer, times: _Times) -> Completion:
        return to_completion(
            request_id,
            answer,
            self.service.spec,
            self.config.revision,
            started_at=times.started_at,
            latency_ms=times.latency_ms,
            price_mode="batch",
        )

    def _fail(self, request_id: str, error: RowError, times: _Times) -> Completion:
        return to_failed_completion(
            request_id, error, self.service.spec, started_at=times.started_at, latency_ms=times.latency_ms
        )
