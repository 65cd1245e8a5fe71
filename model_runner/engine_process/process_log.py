"""What an engine's process last said: its standard error, read as it comes, so that its death can be explained.

Part of the engines that live in a process of their own, `isolated_runner.py` and `vllm_runner.py`. The process never
waits for its log to be read, and only the last lines are held.
"""

import logging
import threading
from collections import deque
from collections.abc import Iterator
from typing import IO


class ProcessLog:
    """The end of a log that a thread of its own reads."""

    def __init__(self, stderr: IO[bytes], logger: logging.Logger, *, max_lines: int) -> None:
        """Begin to read.

        Args:
            stderr: closed when it ends.
            logger: told every line, as debug.
            max_lines: how many of the last ones are held.
        """
        self._stderr, self._logger = stderr, logger
        self._lines: deque[str] = deque(maxlen=max_lines)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __iter__(self) -> Iterator[str]:
        """The lines held so far, oldest first."""
        return iter(tuple(self._lines))

    def wait(self, timeout_s: float) -> None:
        """Wait for its end: until the process and all that share its standard error have ended."""
        self._reader.join(timeout_s)

    def _read(self) -> None:
        with self._stderr:
            for line in self._stderr:
                text = line.decode(errors="replace").rstrip()
                self._lines.append(text)
                self._logger.debug("%s", text)
