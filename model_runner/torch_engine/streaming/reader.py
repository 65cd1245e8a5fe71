"""The thread that reads units of weights while others are computed with."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from threading import Condition, Thread
from weakref import finalize

from torch import Tensor

from moebeam.model_runner.torch_engine.streaming.buffers import Buffers, view_tensors
from moebeam.model_runner.torch_engine.streaming.direct_reads import RangeReader
from moebeam.model_runner.torch_engine.streaming.units import Unit
from moebeam.model_runner.torch_engine.weights.stored_tensors import Stored

Key = tuple[int, int]


@dataclass(slots=True)
class _Held:
    """A unit that was read."""

    unit: Unit
    buffer: Tensor
    is_taken: bool = False


class _State:
    """What the thread and its users share. It does not know the reader, so that an unused reader can be collected."""

    def __init__(self, buffers: Buffers, files: RangeReader) -> None:
        self.changed = Condition()
        self.buffers = buffers
        self.files = files
        self.expected: dict[Key, Unit] = {}  # in the order in which they are to be read
        self.wanted: Key | None = None
        self.being_read: Key | None = None
        self.held: dict[Key, _Held] = {}
        self.failure: Exception | None = None
        self.is_closed = False
        self.num_bytes_read = 0

    def find_next(self) -> tuple[Unit, Tensor] | None:
        """The next unit to read and its buffer, waited for under the lock; None once the reader is closed."""
        while not self.is_closed:
            unit = self.expected.get(self.wanted) if self.wanted is not None else None
            unit = unit or next(iter(self.expected.values()), None)
            if unit is not None:
                buffer = self.buffers.take(unit.num_bytes)
                while buffer is None and unit.key == self.wanted and self._evict_last():
                    buffer = self.buffers.take(unit.num_bytes)
                if buffer is not None:
                    return unit, buffer
                if unit.key == self.wanted:
                    raise MemoryError(f"no room for {unit.num_bytes:,} bytes of weights in {self.buffers.max_bytes:,}")
            self.changed.wait()
        return None

    def _evict_last(self) -> bool:
        """Give up what was read ahead last, for something that is needed now; whether there was any."""
        untaken = [held for held in self.held.values() if not held.is_taken]
        if untaken:
            self.buffers.give_back(self.held.pop(untaken[-1].unit.key).buffer)
        return bool(untaken)

    def close(self) -> None:
        with self.changed:
            self.is_closed = True
            self.changed.notify_all()


class WeightReader:
    """Reads the units that are expected, in their order, as far as there is room.

    Attributes:
        wait_s: seconds that `take` has waited.
    """

    def __init__(self, buffers: Buffers, files: RangeReader) -> None:
        self._state = _State(buffers, files)
        self._thread: Thread | None = None
        self.wait_s = 0.0
        finalize(self, self._state.close)

    @property
    def num_bytes_read(self) -> int:
        """Bytes that were read from files."""
        return self._state.num_bytes_read

    def expect(self, units: Iterable[Unit], *, is_urgent: bool = False) -> None:
        """Announce units that will be taken; urgent ones are read before all others."""
        state = self._state
        with state.changed:
            known = {*state.held, state.being_read}
            new = {unit.key: unit for unit in units if unit.key not in known}
            if not new:
                return
            state.expected = {**new, **state.expected} if is_urgent else {**state.expected, **new}
            state.changed.notify_all()
        if self._thread is None:
            self._thread = Thread(target=_read_units, args=(state,), daemon=True, name="moebeam-weights")
            self._thread.start()

    def take(self, unit: Unit) -> dict[str, Stored]:
        """The tensors of a unit, as soon as they were read; they are there until it is released.

        Raises:
            EngineLoadError: a file cannot be read.
        """
        state = self._state
        with state.changed:
            held = state.held.get(unit.key)
            if held is not None:
                held.is_taken = True
                return view_tensors(unit, held.buffer)
        started = time.perf_counter()
        self.expect([unit])
        with state.changed:
            state.wanted = unit.key
            state.changed.notify_all()
            while unit.key not in state.held and state.failure is None:
                state.changed.wait()
            state.wanted = None
            if state.failure is not None:
                raise state.failure
            held = state.held[unit.key]
            held.is_taken = True
        self.wait_s += time.perf_counter() - started
        return view_tensors(unit, held.buffer)

    def release(self, units: Iterable[Unit]) -> None:
        """Give up units, whether they were taken, were read, or are only expected."""
        state = self._state
        with state.changed:
            for unit in units:
                state.expected.pop(unit.key, None)
                held = state.held.pop(unit.key, None)
                if held is not None:
                    state.buffers.give_back(held.buffer)
            state.changed.notify_all()


def _read_units(state: _State) -> None:
    """Read until the reader is closed or a file fails."""
    while True:
        try:
            with state.changed:
                found = state.find_next()
                if found is None:
                    state.files.close()
                    return
                unit, buffer = found
                del state.expected[unit.key]
                state.being_read = unit.key
            state.buffers.fill(buffer, unit, state.files)
        except Exception as error:  # handed to whoever waits for the unit
            with state.changed:
                state.failure = error
                state.changed.notify_all()
            return
        with state.changed:
            state.being_read = None
            state.held[unit.key] = _Held(unit, buffer)
            state.num_bytes_read += unit.num_bytes
            state.changed.notify_all()
