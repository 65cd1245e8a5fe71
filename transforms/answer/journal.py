"""Journal: stores paid answers as they arrive and replays them when a shard is answered again.

Part of *answer*, around the engine. `keeping_runner`, next to the engine, journals each answer; `JournaledRunner`,
outermost, replays journaled answers before anything is sent. If a process is killed, the shard's next attempt finds
what it had received (`transforms/durable/journal_file.py`) and sends only the rest. With an engine that asks for
admission before each send (`AdmittingRunner`), an answer is journaled before its slot goes to another request, so at
most the requests in flight are paid twice. Replayed completions keep their usage, provider and start time, so they cost
the same. Answers that were journaled but never used, because two attempts ran at once, become waste when the shard is
published (`transforms/answer/waste.py`): each answer is priced exactly once.

Where answers cost nothing but time, none is written as it arrives: `keep_late` journals those of a shard that stops
before its end, and the next attempt asks the rest. It hands engines that plan prefixes the kept answers too, in their
places, so that the rest counts the hits that it would have had without the stop (`Request.earlier`).
"""

import json
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

from moebeam.model_runner.admission import Admission, AdmittingRunner, Unlimited, Verdict
from moebeam.model_runner.protocol import ModelRunner
from moebeam.schemas.canonical import fingerprint
from moebeam.schemas.chat_options import options_json
from moebeam.schemas.errors import RequestGivenUp
from moebeam.schemas.records import Completion, LostCall, Request, sampling_json
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.durable.journal_file import Entry, JournalContent, JournalWriter, read_journal

_LOGGER = logging.getLogger(__name__)


def request_key(request: Request) -> str:
    """SHA-256 (hex) of what a journaled answer must have been asked to fit a request: row, tenant and everything sent.

    The attempt number is left out, so a request that is resent unchanged may take the answer to any of its sendings.
    """
    return fingerprint(
        {
            "row": request.request_id,
            "tenant": request.tenant,
            "messages": [{"role": m.role, "content": m.content, "extra": dict(m.extra)} for m in request.messages],
            "options": options_json(request.options),
            "sampling": json.loads(sampling_json(request.sampling)),
        }
    )


def is_paid(completion: Completion) -> bool:
    """Whether a completion is journaled: an answer, or a failure that used tokens. A free failure is better retried."""
    return completion.error is None or not completion.usage.is_nothing


@dataclass(slots=True)
class ShardJournal:
    """One attempt's view of a shard's journal: what others have journaled, and what it journals itself.

    Attributes:
        kept: journaled by earlier attempts.
        takes_failures: whether paid failures are replayed; False where a failed row stops the run, which could
            otherwise never resume.
        is_prompt: whether answers are journaled as they arrive; else only by `keep_late`.
        references: (request id, attempt) -> where its answer is journaled, for every answer of this attempt that is.
        replayed: the keys of `references` that earlier attempts had journaled.
        asked: request id -> attempt and key of a request in flight; the key is empty where it is not needed.
    """

    kept: JournalContent
    writer: JournalWriter
    takes_failures: bool = True
    is_prompt: bool = True
    references: dict[tuple[str, int], str] = field(default_factory=dict[tuple[str, int], str])
    replayed: set[tuple[str, int]] = field(default_factory=set[tuple[str, int]])
    asked: dict[str, tuple[int, str]] = field(default_factory=dict[str, tuple[int, str]])
    _by_key: dict[str, deque[Entry]] = field(default_factory=dict[str, deque[Entry]])
    _lost: dict[str, list[LostCall]] = field(default_factory=dict[str, list[LostCall]])
    _keys: dict[tuple[str, int], str] = field(default_factory=dict[tuple[str, int], str])
    _given_up: list[tuple[int, Completion]] = field(default_factory=list[tuple[int, Completion]])

    @classmethod
    def open(cls, layout: RunLayout, shard: str, *, takes_failures: bool = True, is_prompt: bool = True) -> Self:
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
        journal = cls(kept, JournalWriter(layout, shard), takes_failures, is_prompt)
        for entry in kept.entries:
            if entry.is_given_up:
                journal._lost.setdefault(entry.key, []).extend(entry.completion.lost_calls)
            elif takes_failures or entry.completion.error is None:
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
        place = (request.request_id, request.attempt)
        # A first attempt's key can be made again from the plan, if it is ever needed.
        key = request_key(request) if self.is_prompt or self.kept.entries or request.attempt > 1 else ""
        waiting = self._by_key.get(key)
        if not waiting:
            self.asked[request.request_id] = (request.attempt, key)
            if not self.is_prompt and key:
                self._keys[place] = key
            return None
        entry = waiting.popleft()
        self.references[place] = entry.reference
        self.replayed.add(place)
        return self._with_lost_calls(key, entry.completion)

    def keep(self, completion: Completion) -> None:
        """Journal an answer that just arrived, if it was sent and paid; safe from any thread.

        Raises:
            OSError: the store failed.
        """
        place = self.asked.get(completion.request_id)
        if place is None:
            return
        attempt, key = place
        if isinstance(completion.error, RequestGivenUp):
            del self.asked[completion.request_id]
            if completion.lost_calls:
                if key:
                    self.writer.append(key, attempt, completion)
                else:
                    self._given_up.append((attempt, completion))
        elif is_paid(completion) and (self.is_prompt or key in self._lost):
            # An answer that takes lost calls over is journaled in any case: by its key they are known to be used up.
            self.references[completion.request_id, attempt] = self.writer.append(key, attempt, completion)

    def take_over(self, completion: Completion) -> Completion:
        """A completion that comes out, with the calls that earlier attempts had lost over its request.

        Only one that is journaled takes them, so that they are told once; those that none takes become waste.
        """
        attempt, key = self.asked.pop(completion.request_id, (0, ""))
        if (completion.request_id, attempt) not in self.references:
            return completion
        return self._with_lost_calls(key, completion)

    def keep_late(self, answers: Iterable[tuple[int, Completion]], requests: Iterable[Request]) -> None:
        """Journal the answers of an attempt that ends before its shard, where they are not journaled already.

        Args:
            answers: attempt numbers and completions, as they came out.
            requests: the first attempts of those answered or given up, built anew.
        Raises:
            OSError: the store failed.
        """
        given_up, self._given_up = self._given_up, []
        left = [
            (attempt, completion)
            for attempt, completion in answers
            if (completion.request_id, attempt) not in self.references and is_paid(completion)
        ]
        if not left and not given_up:
            return
        keys = {(request.request_id, 1): request_key(request) for request in requests} | self._keys
        for attempt, completion in (*left, *given_up):
            place = (completion.request_id, attempt)
            reference = self.writer.append(keys[place], attempt, completion)
            if not isinstance(completion.error, RequestGivenUp):
                self.references[place] = reference

    @property
    def given_up(self) -> Sequence[str]:
        """Ids of the requests that `keep_late` has to journal as given up."""
        return [completion.request_id for _, completion in self._given_up]

    @property
    def counters(self) -> Mapping[str, float]:
        """Replayed answers and damaged lines, for the shard's commit; empty if earlier attempts left no journal."""
        if not self.kept.entries and not self.kept.num_damaged:
            return {}
        return {"num_replayed_answers": len(self.replayed), "num_damaged_journal_lines": self.kept.num_damaged}

    def _with_lost_calls(self, key: str, completion: Completion) -> Completion:
        lost = self._lost.pop(key, None)
        return completion if not lost else replace(completion, lost_calls=(*lost, *completion.lost_calls))


@dataclass(frozen=True, slots=True)
class JournaledRunner:
    """Replays journaled answers and sends only the other requests.

    Attributes:
        plans_prefixes: whether the engine takes requests with `Request.earlier`.
    """

    runner: ModelRunner
    journal: ShardJournal
    plans_prefixes: bool = False

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """As `ModelRunner.generate`; replayed answers come before the engine's next one."""
        replayed: deque[Completion] = deque()

        def unanswered() -> Iterator[Request]:
            for request in requests:
                completion = self.journal.replay(request)
                if completion is None:
                    yield request
                elif self.plans_prefixes:
                    yield replace(request, earlier=completion)
                else:
                    replayed.append(completion)

        for completion in self.runner.generate(unanswered()):
            while replayed:
                yield replayed.popleft()
            yield self.journal.take_over(completion)
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
