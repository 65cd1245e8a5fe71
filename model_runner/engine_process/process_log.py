"""Reads the standard error of an engine's process continuously, to explain its exit; used by `process_link.py`.

The process never blocks on its log, and only the last lines are kept.
"""

import logging
import re
import threading
from collections import deque
from collections.abc import Iterator
from typing import IO

_ERROR = re.compile(r"\b\w+(Error|Exception): |^\w+(Error|Exception)$|^Fatal ")
_NUM_ERRORS = 3


class ProcessLog:
    """The last lines of a log, read on a separate thread."""

    def __init__(self, stderr: IO[bytes], logger: logging.Logger, *, max_lines: int = 200) -> None:
        """Start reading.

        Args:
            stderr: closed at its end.
            logger: gets every line at debug level.
            max_lines: number of last lines kept.
        """
        self._stderr, self._logger = stderr, logger
        self._lines: deque[str] = deque(maxlen=max_lines)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __iter__(self) -> Iterator[str]:
        """The lines kept so far, oldest first."""
        return iter(tuple(self._lines))

    def last_errors(self) -> list[str]:
        """The last few lines that name an error, each once."""
        return list(dict.fromkeys(line for line in self if _ERROR.search(line)))[-_NUM_ERRORS:]

    def wait(self, timeout_s: float) -> None:
        """Wait for the end of the log: until all processes that share this standard error have exited."""
        self._reader.join(timeout_s)

    def _read(self) -> None:
        with self._stderr:
            for line in self._stderr:
                text = line.decode(errors="replace").rstrip()
                self._lines.append(text)
                self._logger.debug("%s", text)
