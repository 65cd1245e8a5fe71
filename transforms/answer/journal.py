"""Journal: stores paid answers as they arrive and replays them when a shard is answered again.

Part of *answer*, around the engine. `keeping_runner`, next to the engine, journals each answer; `JournaledRunner`,
outermost, replays journaled answers before anything is sent. If a process is killed, the shard's next attempt finds
what it had received (`transforms/durable/journal_file.py`) and sends only the rest. With an engine that asks for
admission before each send (`AdmittingRunner`), an answer is journaled before its slot goes to another request, so at
most the requests in flight are paid twice. Replayed completions keep their usage, provider and start time, so they cost
the same. Answers that were journaled but never used, because two attempts ran at once, become waste when the shard is
published (`transforms/answer/waste.py`): each answer is priced exactly once.
"""

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from moebeam.model_runner.admission import Admission, AdmittingRunner, Unlimited, Verdict
from moebeam.model_runner.protocol import ModelRunner
from moebeam.schemas.canonical import fingerprint
from moebeam.schemas.chat_options import options_json
from moebeam.schemas.records import Completion, Request
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.durable.journal_file import Entry, JournalContent, JournalWriter, read_journal

_LOGGER = logging.getLogger(__name__)


def request_key(request: Request) -> str:
    """SHA-256 (hex) of what a journaled answer must have been asked to fit a request: row, tenant and everything sent.

    The attempt number is left out, so a request that is resent unchanged may take the answer to any of its sendings.
    """
    sampling = request.sampling
    return fingerprint(
        {
            "row": request.request_id,
            "tenant": request.tenant,
            "messages": [{"role": m.role, "content": m.content, "extra": dict(m.extra)} for m in request.messages],
            "options": options_json(request.options),
            "sampling": {
                "max_tokens": sampling.max_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "stop": list(sampling.stop),
                "seed": sampling.seed,
                "min_p": sampling.min_p,
                "logprobs": sampling.logprobs,
            },
        }
    )


def is_paid(completion: Completion) -> bool:
    """Whether a completion is journaled: an answer, or a failure that used tokens. A free failure is better retried."""
    usage = completion.usage
    return completion.error is None or usage.prompt_tokens > 0 or usage.completion_tokens > 0


@dataclass(slots=True)
class ShardJournal:
    """One attempt's view of a shard's journal: what others have journaled, and what it journals itself.

    Attributes:
        kept: journaled by earlier attempts.
        takes_failures: whether paid failures are replayed; False where a failed row stops the run, which could
            otherwise never resume.
        references: (request id, attempt) -> where its answer is journaled, for every answer of this attempt.
        replayed: the keys of `references` that earlier attempts had journaled.
        asked: request id -> attempt and key of a request in flight.
    """

    kept: JournalContent
    writer: JournalWriter
    takes_failures: bool = True
    references: dict[tuple[str, int], str] = field(default_factory=dict[tuple[str, int], str])
    replayed: set[tuple[str, int]] = field(default_factory=set[tuple[str, int]])
    asked: dict[str, tuple[int, str]] = field(default_factory=dict[str, tuple[int, str]])
    _by_key: dict[str, deque[Entry]] = field(default_factory=dict[str, deque[Entry]])

    @classmethod
    def open(cls, layout: RunLayout, shard: str, *, takes_failures: bool = True) -> Self:
        """Read a shard's journal and open it for writing.

        Raises:
            OSError: the store failed.
        """
        kept = read_journal(layout, shard)
        if kept.num_damaged:
            _LOGGER.warning(
                "%s: %d lines are damaged; their answers are asked for again",
                layout.shard_journal(shard),
                kept.num_damaged,
            )
        journal = cls(kept, JournalWriter(layout, shard), takes_failures)
        for entry in kept.entries:
            if takes_failures or entry.completion.error is None:
                journal._by_key.setdefault(entry.key, deque()).append(entry)
        return journal

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if error is None:
            self.writer.close()
            return
        # The error in flight says more than one from the store, which shares its cause or follows it.
        with suppress(OSError):
            self.writer.close()

    def replay(self, request: Request) -> Completion | None:
        """The next unused answer to a request; None if there is none, and the request counts as sent."""
        key = request_key(request)
        waiting = self._by_key.get(key)
        if not waiting:
            self.asked[request.request_id] = (request.attempt, key)
            return None
        entry = waiting.popleft()
        place = (request.request_id, request.attempt)
        self.references[place] = entry.reference
        self.replayed.add(place)
        return entry.completion

    def keep(self, completion: Completion) -> None:
        """Journal an answer that just arrived, if it was sent and paid; safe from any thread.

        Raises:
            OSError: the store failed.
        """
        place = self.asked.pop(completion.request_id, None)
        if place is not None and is_paid(completion):
            attempt, key = place
            self.references[completion.request_id, attempt] = self.writer.append(key, attempt, completion)

    @property
    def counters(self) -> Mapping[str, float]:
        """Replayed answers and damaged lines, for the shard's commit; empty if earlier attempts left no journal."""
        if not self.kept.entries and not self.kept.num_damaged:
            return {}
        return {"num_replayed_answers": len(self.replayed), "num_damaged_journal_lines": self.kept.num_damaged}


@dataclass(frozen=True, slots=True)
class JournaledRunner:
    """Replays journaled answers and sends only the other requests."""

    runner: ModelRunner
    journal: ShardJournal

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """As `ModelRunner.generate`; replayed answers come before the engine's next one."""
        replayed: deque[Completion] = deque()

        def unanswered() -> Iterator[Request]:
            for request in requests:
                completion = self.journal.replay(request)
                if completion is not None:
                    replayed.append(completion)
                else:
                    yield request

        for completion in self.runner.generate(unanswered()):
            while replayed:
                yield replayed.popleft()
            yield completion
        yield from replayed


def keeping_runner(runner: ModelRunner, journal: ShardJournal) -> ModelRunner:
    """Wrap a runner so that answers are journaled before anyone sees them; its calls raise OSError if that fails."""
    return _KeepingAdmitting(runner, journal) if isinstance(runner, AdmittingRunner) else _Keeping(runner, journal)


@dataclass(frozen=True, slots=True)
class _Keeping:
    runner: ModelRunner
    journal: ShardJournal

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        for completion in self.runner.generate(requests):
            self.journal.keep(completion)
            yield completion


@dataclass(frozen=True, slots=True)
class _KeepingAdmitting:
    runner: AdmittingRunner
    journal: ShardJournal

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        return self.generate_admitted(requests, Unlimited())

    def generate_admitted(self, requests: Iterable[Request], admission: Admission) -> Iterator[Completion]:
        return self.runner.generate_admitted(requests, _KeepingAdmission(admission, self.journal))


@dataclass(frozen=True, slots=True)
class _KeepingAdmission:
    admission: Admission
    journal: ShardJournal

    def admit(self, request: Request) -> Verdict:
        return self.admission.admit(request)

    def settle(self, completion: Completion) -> None:
        self.journal.keep(completion)
        self.admission.settle(completion)
