"""The journal's files: lines (`journal_lines.py`), appended on disk, batched into small objects in object stores.

Part of *answer*, below `transforms/answer/journal.py`. Each attempt at a shard writes files of its own, whose names
begin with the generation of its lease: what a late holder still journals is never mixed with its successor's.

On disk each writer appends to one file: a line survives its process at once, and the machine after at most
`DISK_DELAY_S` or `DISK_GROUP` lines. Object stores cannot append: lines that arrive within `STORE_DELAY_S`, or
`STORE_GROUP` of them, become one numbered object, and until then a killed process loses them. A call that is about to
leave waits for the object that says so; such objects follow each other every `STORE_PACE_S` at most.
"""

import threading
import time
import uuid
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from moebeam.schemas.records import Completion
from moebeam.schemas.store import storage
from moebeam.schemas.store.appended_file import AppendedFile
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.durable.journal_lines import (
    Departure,
    Dismissal,
    Entry,
    Line,
    format_answer,
    format_departure,
    format_dismissal,
    in_flight_entry,
    number_line,
    parse_line,
)

DISK_DELAY_S = 0.2
DISK_GROUP = 128
STORE_DELAY_S = 1.0
STORE_GROUP = 512
STORE_PACE_S = 0.2

_MAX_READS = 16
"""Objects of a store that are read at a time."""

_SUFFIX = ".jsonl"


@dataclass(frozen=True, slots=True)
class JournalContent:
    """Everything the writers of a shard have journaled.

    Attributes:
        entries: answers, and calls that were in flight when their writer died, in order of attempt and start time.
        num_damaged: lines that cannot be read or used, except one that its writer left unfinished at the end.
        damaged: file name -> those lines of it that are still there.
        num_bytes: of all files.
    """

    entries: tuple[Entry, ...]
    num_damaged: int = 0
    damaged: Mapping[str, bytes] = field(default_factory=dict[str, bytes])
    num_bytes: int = 0


def list_journaled_shards(layout: RunLayout) -> list[str]:
    """Shards of which anything was journaled, committed ones included.

    Raises:
        OSError: the store failed.
    """
    return sorted(journal_sizes(layout))


def journal_sizes(layout: RunLayout) -> dict[str, int]:
    """Bytes of the journal of each shard that has one.

    Raises:
        OSError: the store failed.
    """
    sizes: dict[str, int] = {}
    for path, info in storage.list_files(layout.journal):
        shard = path.rpartition("/")[0].rpartition("/")[2]
        sizes[shard] = sizes.get(shard, 0) + int(info.get("size") or 0)
    return sizes


def read_journal(layout: RunLayout, shard: str) -> JournalContent:
    """Read what all writers journaled for a shard.

    Raises:
        OSError: the store failed.
    """
    folder = layout.shard_journal(shard)
    names = storage.list_names(folder, _SUFFIX)
    by_writer: dict[str, list[tuple[str, Line]]] = {}
    damaged: dict[str, bytes] = {}
    num_damaged = num_bytes = 0
    for name, content in zip(names, _read_all(folder, names), strict=True):
        lines, num_missing, bad = _read_lines(name, content)
        by_writer.setdefault(name.rpartition("-")[0], []).extend(lines)
        num_damaged += num_missing
        num_bytes += len(content)
        if bad:
            damaged[name] = bad
    entries = [entry for lines in by_writer.values() for entry in _find_entries(lines)]
    entries.sort(key=lambda entry: (entry.attempt, entry.completion.started_at, entry.reference))
    return JournalContent(tuple(entries), num_damaged, damaged, num_bytes)


def _read_all(folder: str, names: list[str]) -> Iterable[bytes]:
    paths = [storage.join(folder, name) for name in names]
    if storage.is_local(folder) or len(paths) < 2:
        return map(storage.read_bytes, paths)
    with ThreadPoolExecutor(_MAX_READS) as pool:
        return list(pool.map(storage.read_bytes, paths))


def _read_lines(name: str, content: bytes) -> tuple[list[tuple[str, Line]], int, bytes]:
    """The lines of a file with their references, how many are damaged, and what is left of those."""
    found: list[tuple[str, Line]] = []
    bad: list[bytes] = []
    num_bad = last = 0
    *lines, rest = content.split(b"\n")
    # A line without its end was never acknowledged, unless it is there to the last byte and only its end is damaged.
    for place, line in enumerate([*lines, rest[:-1]], start=1):
        try:
            last, parsed = parse_line(line, name, place)
            found.append((f"{name}:{last}", parsed))
            num_bad = 0
        except (ValueError, RecursionError):
            if place <= len(lines):
                num_bad += 1
                bad.append(line + b"\n")
    # A damaged byte may join two lines or cut one in two: up to the last good line, numbers tell what is missing.
    return found, last - len(found) + num_bad, b"".join(bad)


def _find_entries(lines: Iterable[tuple[str, Line]]) -> list[Entry]:
    """What one writer's lines come to: its answers, and departures that nothing ended."""
    entries: list[Entry] = []
    away: dict[tuple[str, int], list[tuple[str, Departure]]] = {}
    for reference, line in lines:
        match line:
            case Departure():
                away.setdefault((line.request_id, line.attempt), []).append((reference, line))
            case Dismissal():
                if departed := away.get((line.request_id, line.attempt)):
                    departed.pop()
            case Entry():
                away.pop((line.completion.request_id, line.attempt), None)
                entries.append(line)
    return entries + [in_flight_entry(*departure) for departed in away.values() for departure in departed]


class JournalWriter:
    """Journals what happens in one attempt at a shard, from any thread; its own thread makes it durable.

    Args:
        generation: of the lease under which the shard is answered.
    Raises:
        OSError: from all methods, once the store has failed; earlier answers may be lost.
    """

    def __init__(self, layout: RunLayout, shard: str, generation: int = 0) -> None:
        self._folder = layout.shard_journal(shard)
        self._attempt = f"{generation:06d}.{uuid.uuid4().hex}"
        self._is_disk = storage.is_local(self._folder)
        self._file: AppendedFile | None = None
        self._number = 0
        self._num_lines = 0
        self._waiting: list[bytes] = []
        self._awaited: list[Future[None]] = []
        self._is_closing = False
        self._error: OSError | None = None
        self._state = threading.Condition()
        self._keeper: threading.Thread | None = None

    def append(self, key: str, attempt: int, completion: Completion) -> str:
        """Journal a completion; returns its reference.

        Raises:
            OSError: the store failed, now or since the last answer.
            ValueError: the writer is closed.
        """
        content = format_answer(key, attempt, completion)
        with self._state:
            return self._append(content)

    def announce(self, departure: Departure) -> Future[None] | None:
        """Journal that a call is about to leave; if a future comes, it may not leave before that is done.

        Raises:
            OSError, ValueError: as from `append`; OSError from the future, too.
        """
        content = format_departure(departure)
        with self._state:
            self._append(content)
            if self._is_disk:
                return None
            future: Future[None] = Future()
            future.set_running_or_notify_cancel()
            self._awaited.append(future)
            return future

    def dismiss(self, dismissal: Dismissal) -> None:
        """Journal that a call that left is not billed.

        Raises:
            OSError, ValueError: as from `append`.
        """
        content = format_dismissal(dismissal)
        with self._state:
            self._append(content)

    def close(self) -> None:
        """Make waiting lines durable and close the file.

        Raises:
            OSError: the store failed.
        """
        with self._state:
            self._is_closing = True
            self._state.notify()
        if self._keeper is not None:
            self._keeper.join()
        if self._file is not None:
            self._file.close()
        self._raise_error()

    def _append(self, content: bytes) -> str:
        self._raise_error()
        if self._is_closing:
            raise ValueError("the journal was closed before this line arrived")
        line = number_line(self._num_lines + 1, content)
        if self._is_disk:
            if self._file is None:
                self._file = AppendedFile(storage.join(self._folder, self._name()))
            self._file.write(line)
        self._waiting.append(line)
        self._num_lines += 1
        reference = f"{self._name()}:{self._num_lines}"
        if self._keeper is None:
            self._keeper = threading.Thread(target=self._keep, name=f"journal-{self._attempt}", daemon=True)
            self._keeper.start()
        self._state.notify()
        return reference

    def _keep(self) -> None:
        """Make groups of lines durable until closed or the store fails."""
        delay_s, most = (DISK_DELAY_S, DISK_GROUP) if self._is_disk else (STORE_DELAY_S, STORE_GROUP)
        written_at = 0.0
        while True:
            with self._state:
                self._state.wait_for(lambda: self._waiting or self._is_closing)
                self._state.wait_for(lambda: self._is_full(most) or self._awaited, timeout=delay_s)
                if self._awaited:
                    pause_s = written_at + STORE_PACE_S - time.monotonic()
                    self._state.wait_for(lambda: self._is_full(most), timeout=max(0.0, pause_s))
                lines, self._waiting = self._waiting, []
                awaited, self._awaited = self._awaited, []
                if not lines:
                    return
                path = storage.join(self._folder, self._name())
                if not self._is_disk:
                    self._number += 1
                    self._num_lines = 0
            written_at = time.monotonic()
            try:
                if self._file is not None:
                    self._file.sync()
                else:
                    storage.write_whole(path, b"".join(lines))
            except OSError as error:
                self._fail(error, awaited)
                return
            for future in awaited:
                future.set_result(None)

    def _is_full(self, most: int) -> bool:
        return len(self._waiting) >= most or self._is_closing

    def _fail(self, error: OSError, awaited: list[Future[None]]) -> None:
        with self._state:
            self._error = error
            awaited, self._awaited = [*awaited, *self._awaited], []
        for future in awaited:
            future.set_exception(error)

    def _name(self) -> str:
        return f"{self._attempt}-{self._number:06d}{_SUFFIX}"

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error
