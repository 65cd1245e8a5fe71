"""The standard error of an engine's process, read as it comes, so that its exit can be explained.

Part of `process_link.py`. The process never waits for its log to be read, and only the last lines are kept.
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
    """The last lines of a log that a thread of its own reads."""

    def __init__(self, stderr: IO[bytes], logger: logging.Logger, *, max_lines: int = 200) -> None:
        """Begin to read.

        Args:
            stderr: closed when it ends.
            logger: gets every line, as debug.
            max_lines: how many of the last ones are kept.
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
        """Wait for its end: until the process and all that share its standard error have ended."""
        self._reader.join(timeout_s)

    def _read(self) -> None:
        with self._stderr:
            for line in self._stderr:
                text = line.decode(errors="replace").rstrip()
                self._lines.append(text)
                self._logger.debug("%s", text)
