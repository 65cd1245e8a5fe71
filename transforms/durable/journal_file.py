"""The journal's files: completions as lines, appended on disk, batched into small objects in object stores.

Part of *answer*, below `transforms/answer/journal.py`. A line is a checksum and, under it, the line's number in its
file and a JSON object: an answer and its usage, and of the request only a digest. A request that was given up at a stop
has a line, too, if the provider may bill it: with the error `given_up` and its lost calls, which the request's next
answer takes over. It is no answer.

On disk each writer appends to one file: a line survives its process at once, and the machine after at most
`DISK_DELAY_S` or `DISK_GROUP` answers. Object stores cannot append: answers that arrive within `STORE_DELAY_S`, or
`STORE_GROUP` of them, become one numbered object, and until then a killed process loses them.
"""

import json
import threading
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from moebeam.schemas.errors import EngineFailed, RequestGivenUp, RowError
from moebeam.schemas.records import Completion, LostCall, TokenLogprob, ToolCall, Usage
from moebeam.schemas.store import storage
from moebeam.schemas.store.appended_file import AppendedFile
from moebeam.schemas.store.run_layout import RunLayout

DISK_DELAY_S = 0.2
DISK_GROUP = 64
STORE_DELAY_S = 1.0
STORE_GROUP = 256

_SUFFIX = ".jsonl"


@dataclass(frozen=True, slots=True)
class Entry:
    """A journaled completion.

    Attributes:
        reference: its file and line, below the folder of the shard's journal.
        key: digest of the request, see `journal.request_key`.
        attempt: the request's attempt number at the time.
    """

    reference: str
    key: str
    attempt: int
    completion: Completion

    @property
    def is_given_up(self) -> bool:
        """Whether it only says that calls were lost: it is never replayed, and used up by an answer of the same key."""
        return isinstance(self.completion.error, RequestGivenUp)


@dataclass(frozen=True, slots=True)
class JournalContent:
    """Everything the writers of a shard have journaled.

    Attributes:
        num_damaged: answers that cannot be read, except one whose line its writer left unfinished at the end.
    """

    entries: tuple[Entry, ...]
    num_damaged: int = 0


def list_journaled_shards(layout: RunLayout) -> list[str]:
    """Shards of which any answer was journaled, committed ones included.

    Raises:
        OSError: the store failed.
    """
    paths = (path for path, _ in storage.list_files(layout.journal))
    return sorted({path.rpartition("/")[0].rpartition("/")[2] for path in paths})


def read_journal(layout: RunLayout, shard: str) -> JournalContent:
    """Read what all writers journaled for a shard, in order of attempt and start time.

    Raises:
        OSError: the store failed.
    """
    entries: list[Entry] = []
    num_damaged = 0
    folder = layout.shard_journal(shard)
    for name in storage.list_names(folder, _SUFFIX):
        found, damaged = _read_lines(name, storage.read_bytes(storage.join(folder, name)))
        entries += found
        num_damaged += damaged
    entries.sort(key=lambda entry: (entry.attempt, entry.completion.started_at, entry.reference))
    return JournalContent(tuple(entries), num_damaged)


def _read_lines(name: str, content: bytes) -> tuple[list[Entry], int]:
    entries: list[Entry] = []
    num_bad = last = 0
    *lines, rest = content.split(b"\n")
    # A line without its end was never acknowledged, unless it is there to the last byte and only its end is damaged.
    for place, line in enumerate([*lines, rest[:-1]], start=1):
        try:
            last, entry = _parse_line(line, name, place)
            entries.append(entry)
            num_bad = 0
        except (ValueError, KeyError, TypeError):
            num_bad += place <= len(lines)
    # A damaged byte may join two lines or cut one in two: up to the last good line, numbers tell what is missing.
    return entries, last - len(entries) + num_bad


class JournalWriter:
    """Journals the answers of one attempt at a shard, from any thread; its own thread makes them durable.

    Raises:
        OSError: from `append` and `close`, once the store has failed; earlier answers may be lost.
    """

    def __init__(self, layout: RunLayout, shard: str) -> None:
        self._folder = layout.shard_journal(shard)
        self._attempt = uuid.uuid4().hex
        self._is_disk = storage.is_local(self._folder)
        self._file: AppendedFile | None = None
        self._number = 0
        self._num_lines = 0
        self._waiting: list[bytes] = []
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
        content = _format_content(key, attempt, completion)
        with self._state:
            self._raise_error()
            if self._is_closing:
                raise ValueError("the journal was closed before this answer arrived")
            line = _format_line(self._num_lines + 1, content)
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

    def close(self) -> None:
        """Make waiting answers durable and close the file.

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

    def _keep(self) -> None:
        """Make groups of lines durable until closed or the store fails."""
        delay_s, most = (DISK_DELAY_S, DISK_GROUP) if self._is_disk else (STORE_DELAY_S, STORE_GROUP)
        while True:
            with self._state:
                self._state.wait_for(lambda: self._waiting or self._is_closing)
                self._state.wait_for(lambda: len(self._waiting) >= most or self._is_closing, timeout=delay_s)
                lines, self._waiting = self._waiting, []
                if not lines:
                    return
                path = storage.join(self._folder, self._name())
                if not self._is_disk:
                    self._number += 1
                    self._num_lines = 0
            try:
                if self._file is not None:
                    self._file.sync()
                else:
                    storage.write_whole(path, b"".join(lines))
            except OSError as error:
                self._error = error
                return

    def _name(self) -> str:
        return f"{self._attempt}-{self._number:06d}{_SUFFIX}"

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error


def _format_line(number: int, content: bytes) -> bytes:
    numbered = b"%d %s" % (number, content)
    return b"%08x %s\n" % (zlib.crc32(numbered), numbered)


def _format_content(key: str, attempt: int, completion: Completion) -> bytes:
    error = completion.error
    values: dict[str, Any] = {
        "key": key,
        "attempt": attempt,
        "request_id": completion.request_id,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "provider_finish_reason": completion.provider_finish_reason,
        "usage": asdict(completion.usage),
        "started_at": completion.started_at.isoformat(),
        "latency_ms": completion.latency_ms,
        "provider": completion.provider,
        "model": completion.model,
        "model_revision": completion.model_revision,
        "reasoning_content": completion.reasoning_content,
        "tool_calls": [asdict(call) for call in completion.tool_calls],
        "logprobs": completion.logprobs,
        "top_logprobs": completion.top_logprobs
        and [[[likely.token, likely.logprob] for likely in place] for place in completion.top_logprobs],
        "repaired": completion.repaired,
        "price_mode": completion.price_mode,
        "error": error and {"type": error.error_type, "message": str(error)},
        "lost_calls": [{**asdict(call), "started_at": call.started_at.isoformat()} for call in completion.lost_calls],
    }
    # A provider's JSON may hold lone surrogates. Each is kept as it is: as escapes, two adjacent ones would be read
    # back as one character.
    return json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")


def _parse_line(line: bytes, name: str, place: int) -> tuple[int, Entry]:
    """Parse one line of a file: its number, and what it says.

    Args:
        place: counted in the file, for lines of older versions, which have no number.
    Raises:
        ValueError, KeyError, TypeError: the line is damaged.
    """
    checksum, _, content = line.partition(b" ")
    if int(checksum, 16) != zlib.crc32(content):
        raise ValueError("checksum")
    number = place
    if not content.startswith(b"{"):
        counted, _, content = content.partition(b" ")
        number = int(counted)
    values: dict[str, Any] = json.loads(content.decode("utf-8", "surrogatepass"))
    key, attempt, error, logprobs = (values.pop(name) for name in ("key", "attempt", "error", "logprobs"))
    usage, calls = Usage(**values.pop("usage")), tuple(ToolCall(**call) for call in values.pop("tool_calls"))
    started_at = datetime.fromisoformat(values.pop("started_at"))
    likeliest = values.pop("top_logprobs", None)
    repaired = tuple(values.pop("repaired", ()))
    lost_calls = tuple(_parse_lost_call(**call) for call in values.pop("lost_calls", ()))
    completion = Completion(
        **values,
        usage=usage,
        started_at=started_at,
        tool_calls=calls,
        logprobs=None if logprobs is None else tuple(logprobs),
        top_logprobs=likeliest and tuple(tuple(TokenLogprob(*likely) for likely in place) for place in likeliest),
        error=None if error is None else _error_types().get(error["type"], EngineFailed)(error["message"]),
        lost_calls=lost_calls,
        repaired=repaired,
    )
    return number, Entry(f"{name}:{number}", key, attempt, completion)


def _parse_lost_call(*, started_at: str, **values: Any) -> LostCall:
    return LostCall(**values, started_at=datetime.fromisoformat(started_at))


def _error_types() -> dict[str, type[RowError]]:
    return {kind.error_type: kind for kind in _subclasses(RowError)}


def _subclasses(kind: type[RowError]) -> Iterator[type[RowError]]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
