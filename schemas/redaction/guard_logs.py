"""Logs without secrets: every record of this process passes here before any handler sees it, whoever wrote it.

Streams that libraries print to beside their logs are wrapped in `HidingStream`.
"""

import io
import logging
import threading
import traceback
from typing import Any, TextIO

from moebeam.schemas.redaction.hide import hide_in_message

_MAX_LINE_CHARACTERS = 100_000
"""A line that is longer is passed on in parts, such as a progress bar that never ends its line."""


class _GuardedRecords:
    """Makes records as the factory before it did, and hides what their message and traceback hold."""

    def __init__(self, before: Any) -> None:
        self._before = before

    def __call__(self, *args: Any, **values: Any) -> logging.LogRecord:
        record: logging.LogRecord = self._before(*args, **values)
        try:
            text = record.getMessage()
            trace = "".join(traceback.format_exception(*record.exc_info)) if record.exc_info else ""
            hidden, hidden_trace = hide_in_message(text), hide_in_message(trace)
        except Exception:  # a broken record is the handler's matter, which says so
            return record
        if hidden_trace != trace:
            record.exc_info = None
            hidden = f"{hidden}\n{hidden_trace}"
        if hidden != text:
            record.msg, record.args = hidden, ()
        return record


def guard_logs() -> None:
    """Guard the logs of this process from now on; a second call changes nothing."""
    before = logging.getLogRecordFactory()
    if not isinstance(before, _GuardedRecords):
        logging.setLogRecordFactory(_GuardedRecords(before))


class HidingStream(io.TextIOBase):
    """A text stream that hides secrets in each line before it passes it on; safe from any thread."""

    def __init__(self, sink: TextIO) -> None:
        super().__init__()
        self._sink = sink
        self._rest = ""
        self._lock = threading.RLock()

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._sink.fileno()

    def write(self, text: str, /) -> int:
        with self._lock:
            whole, newline, self._rest = (self._rest + text).rpartition("\n")
            if len(self._rest) > _MAX_LINE_CHARACTERS:
                whole, newline, self._rest = f"{whole}{newline}{self._rest}", "\n", ""
            if newline:
                self._sink.write(hide_in_message(whole) + newline)
                self._sink.flush()
        return len(text)

    def flush(self) -> None:
        """Nothing: a line is passed on when it is whole, since a part of it may end within a secret."""

    def close(self) -> None:
        if self._rest:
            self.write("\n")
        super().close()
