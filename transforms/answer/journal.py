"""Journal: answers that are paid to a provider are kept as they arrive, and used again when a shard is answered anew.

Part of *answer*, around the engine: `JournaledRunner` takes kept answers out before anything is asked, and
`keeping_runner`, next to the engine, puts new ones in. A shard whose process was killed is answered again by another
attempt; what the first one had received it finds here (`journal_file.py`), and asks only for the rest. An engine that
asks before it sends (`AdmittingRunner`) has an answer kept before it gives the answer's place to another request, so
that no more is paid again than was in flight. Replayed completions are what they were, with their usage, provider and
start, so they cost what they cost. What was kept and never used, because two attempts were at work at once, becomes
waste when the shard is published (`transforms/answer/waste.py`); so each answer is priced exactly once.
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
    """What a journaled answer must have been asked for to be an answer to this request: SHA-256, hexadecimal.

    The row, its tenant, and all that is sent of it. Not the number of the attempt: a request that is sent again as it
    was may take the answer that came to an earlier or a later sending of it.
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
    """Whether a completion is worth keeping: an answer, or a failure that used tokens.

    A failure that cost nothing is better asked again.
    """
    usage = completion.usage
    return completion.error is None or usage.prompt_tokens > 0 or usage.completion_tokens > 0


@dataclass(slots=True)
class ShardJournal:
    """The journal as one attempt of a shard sees it: what others have kept, and what it keeps itself.

    Attributes:
        kept: by earlier attempts.
        takes_failures: whether a failure that was paid is taken again; where a failed row stops the run it is not, or
            the run could never go on.
        references: (request id, attempt) -> where its answer is kept, of all answers of this attempt.
        replayed: those of them that earlier attempts had kept.
        asked: request id -> attempt and key of what is on its way.
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
        """Read what is kept of a shard, and be ready to keep more.

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
        # The error on its way says more than one of the store, which has the same cause or comes after it.
        with suppress(OSError):
            self.writer.close()

    def replay(self, request: Request) -> Completion | None:
        """The next kept answer to a request, each once; None where none is left, and it is to be asked."""
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
        """Keep an answer that has just arrived, if it was asked for and paid; from any thread.

        Raises:
            OSError: the store failed.
        """
        place = self.asked.pop(completion.request_id, None)
        if place is not None and is_paid(completion):
            attempt, key = place
            self.references[completion.request_id, attempt] = self.writer.append(key, attempt, completion)

    @property
    def counters(self) -> Mapping[str, float]:
        """What became of kept answers, for the shard's commit; nothing where none was kept before."""
        if not self.kept.entries and not self.kept.num_damaged:
            return {}
        return {"num_replayed_answers": len(self.replayed), "num_damaged_journal_lines": self.kept.num_damaged}


@dataclass(frozen=True, slots=True)
class JournaledRunner:
    """A runner that is asked only for what the journal does not hold."""

    runner: ModelRunner
    journal: ShardJournal

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """As `ModelRunner.generate`; kept answers come as soon as their requests are pulled."""
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
    """The same runner, whose answers are kept before anybody sees them; its calls raise OSError where that fails."""
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
