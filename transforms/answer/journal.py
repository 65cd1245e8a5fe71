"""Journal: stores paid answers as they arrive and replays them when a shard is answered again.

Part of *answer*, around the engine. `keeping_runner`, next to the engine, journals each answer; `JournaledRunner`,
outermost, replays journaled answers before anything is sent. If a process is killed, the shard's next attempt finds
what it had received (`transforms/durable/journal_file.py`) and sends only the rest. With an engine that asks for
admission before each send (`AdmittingRunner`), an answer is journaled before its slot goes to another request, so at
most the requests in flight are paid twice; each of their calls is journaled before it leaves. Replayed completions keep
their usage, provider and start time, so they cost the same. What was journaled but never used, because two attempts ran
at once or a call was given up or in flight at a kill, becomes waste when the shard is published
(`transforms/answer/waste.py`): each answer is priced exactly once, and a row's own line is as in an undisturbed run.

Where answers cost nothing but time, none is written as it arrives: `keep_late` journals those of a shard that stops
before its end, and the next attempt asks the rest. It hands engines that plan prefixes the kept answers too, in their
places, so that the rest counts the hits that it would have had without the stop (`Request.earlier`).
"""

import asyncio
import json
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
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
from moebeam.schemas.redaction.hide import hide_in_completion
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.durable.journal_file import JournalContent, JournalWriter, read_journal
from moebeam.transforms.durable.journal_lines import Departure, Dismissal, Entry, is_paid

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
    _by_key: dict[tuple[str, str], deque[Entry]] = field(default_factory=dict[tuple[str, str], deque[Entry]])
    _keys: dict[tuple[str, int], str] = field(default_factory=dict[tuple[str, int], str])
    _given_up: list[tuple[int, Completion]] = field(default_factory=list[tuple[int, Completion]])

    @classmethod
    def open(
        cls,
        layout: RunLayout,
        shard: str,
        *,
        takes_failures: bool = True,
        is_prompt: bool = True,
        generation: int = 0,
    ) -> Self:
        """Read a shard's journal and open it for writing; lines that cannot be used are set aside.

        Args:
            generation: of the lease under which the shard is answered.
        Raises:
            OSError: the store failed.
        """
        kept = read_journal(layout, shard)
        if kept.num_damaged:
            _LOGGER.warning(
                "%s: %d lines are damaged; their answers are asked for again, and what is left of them is in %s",
                layout.shard_journal(shard),
                kept.num_damaged,
                layout.damaged,
            )
        for name, lines in kept.damaged.items():
            storage.write_whole(storage.join(layout.damaged, f"journal~{shard}~{name}"), lines)
        journal = cls(kept, JournalWriter(layout, shard, generation), takes_failures, is_prompt)
        for entry in kept.entries:
            if entry.is_answer and (takes_failures or entry.completion.error is None):
                journal._by_key.setdefault((entry.key, entry.completion.request_id), deque()).append(entry)
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
        waiting = self._by_key.get((key, request.request_id))
        if not waiting:
            self.asked[request.request_id] = (request.attempt, key)
            if not self.is_prompt and key:
                self._keys[place] = key
            return None
        entry = waiting.popleft()
        self.references[place] = entry.reference
        self.replayed.add(place)
        return entry.completion

    def announce(self, request: Request, call: LostCall) -> Future[None] | None:
        """Journal that a call leaves, as `JournalWriter.announce`; nothing where answers are not journaled either.

        Raises:
            OSError: the store failed.
        """
        place = self.asked.get(request.request_id)
        if place is None or not self.is_prompt:
            return None
        attempt, key = place
        return self.writer.announce(Departure(key, attempt, request.request_id, call))

    def dismiss(self, request: Request) -> None:
        """Journal that the call that left last for a request is not billed.

        Raises:
            OSError: the store failed.
        """
        place = self.asked.get(request.request_id)
        if place is not None and self.is_prompt:
            self.writer.dismiss(Dismissal(request.request_id, place[0]))

    def keep(self, completion: Completion) -> None:
        """Journal what just arrived, if it was sent and may be paid; safe from any thread.

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
        elif self.is_prompt and (is_paid(completion) or completion.lost_calls):
            self.references[completion.request_id, attempt] = self.writer.append(key, attempt, completion)

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
            self.journal.asked.pop(completion.request_id, None)
            yield completion
        yield from replayed


def keeping_runner(runner: ModelRunner, journal: ShardJournal) -> ModelRunner:
    """Wrap a runner so that answers are journaled before anyone sees them; its calls raise OSError if that fails.

    Answers lose the run's secrets here, before they are validated: so a replayed one is the same answer.
    """
    return _KeepingAdmitting(runner, journal) if isinstance(runner, AdmittingRunner) else _Keeping(runner, journal)


@dataclass(frozen=True, slots=True)
class _Keeping:
    runner: ModelRunner
    journal: ShardJournal

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        for completion in self.runner.generate(requests):
            hidden = hide_in_completion(completion)
            self.journal.keep(hidden)
            yield hidden


@dataclass(frozen=True, slots=True)
class _KeepingAdmitting:
    runner: AdmittingRunner
    journal: ShardJournal

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        return self.generate_admitted(requests, Unlimited())

    def generate_admitted(self, requests: Iterable[Request], admission: Admission) -> Iterator[Completion]:
        for completion in self.runner.generate_admitted(requests, _KeepingAdmission(admission, self.journal)):
            yield hide_in_completion(completion)


@dataclass(frozen=True, slots=True)
class _KeepingAdmission:
    admission: Admission
    journal: ShardJournal

    def admit(self, request: Request) -> Verdict:
        return self.admission.admit(request)

    def settle(self, completion: Completion) -> None:
        completion = hide_in_completion(completion)
        self.journal.keep(completion)
        self.admission.settle(completion)

    async def depart(self, request: Request, call: LostCall) -> bool:
        journaled, may_leave = self.journal.announce(request, call), False
        try:
            if journaled is not None:
                await asyncio.wrap_future(journaled)
            # Asked last: the process may have been stopped while it waited.
            may_leave = await self.admission.depart(request, call)
            return may_leave
        finally:
            if not may_leave:
                self.journal.dismiss(request)

    def dismiss(self, request: Request) -> None:
        self.journal.dismiss(request)
