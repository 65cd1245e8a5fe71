"""One event loop in a thread of its own, shared by all threads of a process that ask remote engines.

Beam's worker threads call `generate` at the same time; their requests run on this loop, so that connections and
limits are shared and the number of threads does not matter.
"""

import asyncio
import atexit
import contextlib
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

_CLOSE_TIMEOUT_S = 5.0
_lock = threading.Lock()
_current: "BackgroundLoop | None" = None


class BackgroundLoop:
    """An event loop that runs until the process ends."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._process = os.getpid()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closers: dict[int, Callable[[], Awaitable[None]]] = {}
        self._thread = threading.Thread(target=self.loop.run_forever, name="openai-engine", daemon=True)
        self._thread.start()
        atexit.register(self._end)

    @classmethod
    def current(cls) -> "BackgroundLoop":
        """The process's loop, made on first use; a forked process gets one of its own."""
        global _current
        with _lock:
            if _current is None or _current._process != os.getpid():
                _current = cls()
            return _current

    def call(self, function: Callable[..., object], *args: object) -> None:
        """Call a function on the loop, soon; from any thread."""
        self.loop.call_soon_threadsafe(function, *args)

    def spawn(self, work: Coroutine[Any, Any, object]) -> "asyncio.Task[Any]":
        """Start a coroutine; only on the loop's own thread. The task is kept until it is done."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def register_close(self, key: int, close: Callable[[], Awaitable[None]]) -> None:
        """Register what is closed when the process ends, unless `close_now` came first."""
        self._closers[key] = close

    def close_now(self, key: int) -> None:
        """Close what was registered; does not wait, and may be called during garbage collection."""
        close = self._closers.pop(key, None)
        if close is not None and not self.loop.is_closed():
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(lambda: self.spawn(_await_close(close)))

    def _end(self) -> None:
        if self._process != os.getpid():
            return
        ending = asyncio.run_coroutine_threadsafe(self._close_all(), self.loop)
        with contextlib.suppress(Exception):
            ending.result(_CLOSE_TIMEOUT_S)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(_CLOSE_TIMEOUT_S)

    async def _close_all(self) -> None:
        own = asyncio.current_task()
        others = [task for task in asyncio.all_tasks() if task is not own]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.gather(*(_await_close(close) for close in self._closers.values()), return_exceptions=True)
        self._closers.clear()


class Bell:
    """Wakes all who sleep beside it, in the order in which they fell asleep; lives on one event loop."""

    def __init__(self) -> None:
        self._sleepers: dict[asyncio.Future[None], None] = {}

    def ring(self) -> None:
        """Wake everybody."""
        for sleeper in self._sleepers:
            _wake(sleeper)

    @classmethod
    async def sleep(cls, seconds: float, bells: "Sequence[Bell]") -> None:
        """Sleep until one of the bells rings, at most so many seconds."""
        loop = asyncio.get_running_loop()
        sleeper: asyncio.Future[None] = loop.create_future()
        timer = loop.call_later(seconds, _wake, sleeper)
        for bell in bells:
            bell._sleepers[sleeper] = None
        try:
            await sleeper
        finally:
            timer.cancel()
            for bell in bells:
                del bell._sleepers[sleeper]


def _wake(sleeper: "asyncio.Future[None]") -> None:
    if not sleeper.done():
        sleeper.set_result(None)


async def _await_close(close: Callable[[], Awaitable[None]]) -> None:
    await close()
