"""Keeps one engine process running: restarts it after an exit, until the engine is closed."""

import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from moebeam.model_runner.engine_process.process_link import ProcessLink
from moebeam.schemas.errors import EngineLoadError

Link = TypeVar("Link", bound=ProcessLink)


class Supervisor(Generic[Link]):
    """An engine's process, which ends with this object or with our own process. Thread-safe.

    Args:
        start: starts a process and loads its engine; the argument is the process that it replaces.
    """

    def __init__(self, start: Callable[[Link | None], Link]) -> None:
        self._start = start
        self._lock = threading.Lock()
        self._links: list[Link] = [start(None)]
        self.close = weakref.finalize(self, _close_all, self._links)
        """Ends the process for good; it is not restarted."""

    @property
    def last(self) -> Link:
        """The process started last, running or not."""
        return self._links[-1]

    def running(self) -> Link:
        """Return the running process; starts a new one if the last has ended.

        Raises:
            EngineLoadError: it cannot be started, or the engine was closed.
        """
        with self._lock:
            if not self.close.alive:
                raise EngineLoadError("the engine was closed; load it again")
            if not self.last.is_alive:
                self._links[:] = [self._start(self.last)]
            return self.last


def _close_all(links: Iterable[ProcessLink]) -> None:
    for link in links:
        link.close()
