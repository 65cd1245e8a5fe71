"""The `openai` engine in batch mode: requests as files that a provider answers within a day, at its batch price.

Stands where a model would in the *answer* stage, in place of the engine's `runner.py`. No batch is submitted twice: the
provider's batches are first searched for the same lines, so that a run resumed after a crash takes up what it finds
there, waits for it, and submits only what it does not answer. Batches stay at the provider when a run stops.

Lines on which the provider failed go out again in another batch. They become rejects where others of their batch were
answered, if only a canary; where none was, the provider is out.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from moebeam.model_runner.openai_engine.batch.batch_state import BatchState
from moebeam.model_runner.openai_engine.batch.lines import BatchWindow, format_batch_errors, read_outcomes, request_line
from moebeam.model_runner.openai_engine.batch.service import BatchService, GivenBack
from moebeam.model_runner.openai_engine.completions import to_completion, to_failed_completion
from moebeam.model_runner.openai_engine.failures import CallFailure, shorten
from moebeam.model_runner.openai_engine.options import OpenAIOptions
from moebeam.model_runner.openai_engine.responses import Answer
from moebeam.model_runner.protocol import EngineConfig, Outage
from moebeam.schemas.determinism import REMOTE, Determinism
from moebeam.schemas.errors import EngineLoadError, EngineUnavailable, MalformedResponse, RowError
from moebeam.schemas.records import Completion, LostCall, Request

_TOO_MUCH_QUEUED = "token_limit_exceeded"
_MAX_WINDOWS_IN_FLIGHT = 4


@dataclass(frozen=True, slots=True)
class _SubmittedWindow:
    """A window and the batches that are to answer it: found at the provider, or the one submitted for it."""

    window: BatchWindow
    batches: tuple[BatchState, ...]
    is_found: bool


@dataclass(frozen=True, slots=True)
class _Times:
    """When a batch was submitted, which decides the price, and how long it took."""

    started_at: datetime
    latency_ms: float

    @classmethod
    def from_batch(cls, batch: BatchState) -> "_Times":
        started_at = batch.created_at or datetime.now(UTC).timestamp()
        ended_at = batch.ended_at or started_at
        return cls(datetime.fromtimestamp(started_at, UTC), max(0.0, (ended_at - started_at) * 1000.0))


@dataclass(slots=True)
class _Reading:
    """What a batch held for its window, beside answers.

    Attributes:
        failures: by line id, of lines that were not answered.
        is_served: whether any line was answered, the canary included.
        lost: the canary, until a completion names it.
    """

    failures: dict[str, CallFailure] = field(default_factory=dict[str, CallFailure])
    is_served: bool = False
    lost: list[LostCall] = field(default_factory=list[LostCall])

    def take_lost(self) -> list[LostCall]:
        """The canary for the first completion that asks."""
        lost, self.lost = self.lost, []
        return lost

    def note(self, line_id: str, failure: CallFailure) -> None:
        """Take a failure; the first one of a line counts."""
        self.failures.setdefault(line_id, failure)

    def find_common_refusal(self) -> tuple[int, RowError] | None:
        """How many lines were refused and why, if all that failed were refused alike."""
        kinds = {failure.refusal for failure in self.failures.values()}
        if len(kinds) != 1 or kinds == {""}:
            return None
        return len(self.failures), next(iter(self.failures.values())).error


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
            EngineUnavailable: the provider cannot be asked, did not begin a batch, answers nobody or refuses
                everybody, or somebody cancelled a batch; what was answered came out before.
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
        except GivenBack:
            return
        finally:
            for left in submitted:
                left.window.file.close()

    def give_back(self) -> None:
        """See `StoppableRunner`: nothing is waited for any more; the next start takes up the batches."""
        self.service.give_back()

    def find_outage(self) -> Outage | None:
        """See `OutageReporter`."""
        return self.service.circuit.find_outage()

    def determinism(self) -> Determinism:
        """See `PromisingRunner`."""
        return REMOTE

    def counters(self) -> Mapping[str, float]:
        """See `CountingRunner`: batches submitted and taken up, polls, and outages."""
        circuit = self.service.circuit
        outages = {"num_outages": circuit.num_outages, "outage_s": circuit.outage_s}
        return {**self.service.counts, **{name: value for name, value in outages.items() if value}}

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
                window.make_room(request.sampling)
                window.num_prompt_tokens[request.request_id] = request.num_prompt_tokens
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
        service, spec = self.service, self.service.spec
        try:
            if submitted.is_found:
                for batch in batches:
                    if window.waiting:
                        yield from self._read_answers(service.wait_for_end(batch), window, _Reading())
                if not window.waiting:
                    return
                window = window.remaining()
                batches = (service.submit(window),)
            (batch,) = batches
            lost: list[LostCall] = []
            for num_left in range(spec.max_retries, -1, -1):
                batch, reading = self._wait_for_end(batch, window), _Reading(lost=lost)
                yield from self._read_answers(batch, window, reading)
                self._check_service(batch, window, reading)
                yield from self._reject(batch, window, reading, is_last=num_left == 0)
                if not window.waiting:
                    return
                lost = reading.lost
                window = window.remaining(spec.profile.max_tokens_field)
                batch = service.submit(window)
        finally:
            window.file.close()

    def _wait_for_end(self, batch: BatchState, window: BatchWindow) -> BatchState:
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
                service.wait(wait_s)
                wait_s *= 2
                batch = service.submit(window)
                continue
            told = shorten(format_batch_errors([(error.code, error.message) for error in errors]))
            raise EngineUnavailable(f"{service.spec.profile.name} did not begin batch {batch.id}: {told}")
        raise AssertionError("the last try returns or raises")

    def _read_answers(self, batch: BatchState, window: BatchWindow, reading: _Reading) -> Iterator[Completion]:
        """The answers that a batch holds for a window; what it holds beside them goes to `reading`."""
        service, times, canary = self.service, _Times.from_batch(batch), window.canary
        canary_id = canary.line_id if canary is not None else None
        last: Completion | None = None
        for file_id in filter(None, (batch.output_file_id, batch.error_file_id)):
            with service.download(file_id, window.max_file_bytes) as file:
                for outcome in read_outcomes(window.split_answers(file), service.spec.profile):
                    if outcome.line_id == canary_id and isinstance(outcome.result, Answer):
                        reading.is_served = True
                        reading.lost.append(self._lose_canary(outcome.result, times))
                    elif outcome.line_id not in window.waiting:
                        continue
                    elif isinstance(outcome.result, Answer):
                        reading.is_served, window.answered = True, outcome.line_id
                        reading.failures.pop(outcome.line_id, None)
                        if last is not None:
                            yield last
                        last = self._completion(window, outcome.line_id, outcome.result, times)
                    else:
                        reading.note(outcome.line_id, outcome.result)
        if last is not None:
            yield replace(last, lost_calls=tuple(reading.take_lost()))

    def _check_service(self, batch: BatchState, window: BatchWindow, reading: _Reading) -> None:
        """Check that what a batch left unanswered is no matter of all its lines.

        Raises:
            EngineUnavailable: the account is closed, the batch was cancelled, or all lines were refused alike.
        """
        name = self.service.spec.profile.name
        if not window.waiting:
            return
        closed = next((one.error for one in reading.failures.values() if one.consequence == "closed"), None)
        if closed is not None:
            raise EngineUnavailable(f"no provider can answer: {closed}")
        if batch.status == "cancelled":
            raise EngineUnavailable(
                f"{name}: batch {batch.id} was cancelled; resume the run to submit the "
                f"{len(window.waiting)} requests that it left again"
            )
        refusal = None if reading.is_served else reading.find_common_refusal()
        if refusal is not None and refusal[0] >= self.config.failures.max_same_refusals:
            raise EngineUnavailable(
                f"{name} refused all {refusal[0]} requests of batch {batch.id} alike: {refusal[1]}; "
                "raise [failures] max_same_refusals if they are the rows' own"
            )

    def _reject(
        self, batch: BatchState, window: BatchWindow, reading: _Reading, *, is_last: bool
    ) -> Iterator[Completion]:
        """Fail what the provider refused, and at the last try what it failed on while it answered others.

        Raises:
            EngineUnavailable: it was the last try, and none was answered.
        """
        name, times = self.service.spec.profile.name, _Times.from_batch(batch)
        missing = CallFailure("failed", MalformedResponse(f"{name}: batch {batch.id} has no line for this request"))
        for line_id, request_id in list(window.waiting.items()):
            failure = reading.failures.get(line_id, missing)
            if failure.consequence == "row" or (is_last and reading.is_served):
                del window.waiting[line_id]
                yield self._fail(request_id, failure.error, times, reading.take_lost())
        if is_last and window.waiting:
            failure = reading.failures.get(next(iter(window.waiting)), missing)
            raise EngineUnavailable(
                f"{name}: batch {batch.id} answered none of its {len(window.waiting)} requests ({failure.error})"
            )

    def _lose_canary(self, answer: Answer, times: _Times) -> LostCall:
        spec, num_prompt_tokens = self.service.spec, answer.usage.prompt_tokens or 0
        return LostCall(spec.profile.name, spec.model, "canary", times.started_at, num_prompt_tokens, 1, "batch")

    def _completion(self, window: BatchWindow, line_id: str, answer: Answer, times: _Times) -> Completion:
        """The completion of a line, which then waits no more."""
        request_id = window.waiting.pop(line_id)
        if not answer.has_known_reason:
            self.service.counts["num_unknown_finish_reasons"] += 1
        return to_completion(
            request_id,
            answer,
            self.service.spec,
            self.config.revision,
            started_at=times.started_at,
            latency_ms=times.latency_ms,
            price_mode="batch",
            num_prompt_tokens=window.num_prompt_tokens.get(request_id),
        )

    def _fail(self, request_id: str, error: RowError, times: _Times, lost: Sequence[LostCall] = ()) -> Completion:
        return to_failed_completion(
            request_id,
            error,
            self.service.spec,
            started_at=times.started_at,
            latency_ms=times.latency_ms,
            lost_calls=lost,
        )
