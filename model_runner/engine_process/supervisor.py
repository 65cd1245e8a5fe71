"""Keeps one engine process running: starts another when the last one has ended, until the engine is closed."""

import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from moebeam.model_runner.engine_process.process_link import ProcessLink
from moebeam.schemas.errors import EngineLoadError

Link = TypeVar("Link", bound=ProcessLink)


class Supervisor(Generic[Link]):
    """The process of an engine, which ends with this object or with our own process. Safe for several threads.

    Args:
        start: starts a process with its engine loaded, in place of the one that it is given.
    """

    def __init__(self, start: Callable[[Link | None], Link]) -> None:
        self._start = start
        self._lock = threading.Lock()
        self._links: list[Link] = [start(None)]
        self.close = weakref.finalize(self, _close_all, self._links)
        """Ends the process; another one is never started."""

    @property
    def last(self) -> Link:
        """The process that was started last, whether it runs or not."""
        return self._links[-1]

    def running(self) -> Link:
        """The running process; another is started if the last one has ended.

        Raises:
            EngineLoadError: none can be started, or the engine was closed.
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
