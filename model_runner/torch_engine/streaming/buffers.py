"""Buffers for units of weights, reused, under one limit of memory."""

import mmap
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from moebeam.model_runner.torch_engine.streaming.direct_reads import RangeReader
from moebeam.model_runner.torch_engine.streaming.units import Unit
from moebeam.model_runner.torch_engine.weights.stored_tensors import STORED_DTYPES, Stored


class Buffers:
    """Memory on the device of the model; not safe for threads.

    On a CPU a buffer is anonymous memory that begins at a page, which goes back to the system when it is dropped; heaps
    keep holes. On an accelerator it is memory of the device, filled from pinned memory of the host on a stream of its
    own. That way has not run on any accelerator yet.
    """

    def __init__(self, max_bytes: int, device: torch.device) -> None:
        self.max_bytes = max_bytes
        self._device = device
        self._free: dict[int, list[Tensor]] = {}
        self._num_bytes = 0
        self._staging: Tensor | None = None

    def take(self, num_bytes: int) -> Tensor | None:
        """A buffer of so many bytes, uint8; None if there is no room."""
        if self._free.get(num_bytes):
            return self._free[num_bytes].pop()
        sizes = sorted(size for size, buffers in self._free.items() if buffers)
        while sizes and self._num_bytes + num_bytes > self.max_bytes:
            self._free[sizes[-1]].pop()
            self._num_bytes -= sizes[-1]
            if not self._free[sizes[-1]]:
                sizes.pop()
        if self._num_bytes + num_bytes > self.max_bytes:
            return None
        self._num_bytes += num_bytes
        return self._allocate(num_bytes)

    def give_back(self, buffer: Tensor) -> None:
        """Let others have a buffer; the operations that read it may still wait on the device."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        self._free.setdefault(buffer.nbytes, []).append(buffer)

    def fill(self, buffer: Tensor, unit: Unit, reader: RangeReader) -> None:
        """Read a unit; needs no lock.

        Raises:
            EngineLoadError: a file cannot be read.
        """
        if self._device.type == "cpu":
            reader.read(unit.ranges, _view_bytes(buffer))
            return
        if self._staging is None or self._staging.nbytes < unit.num_bytes:
            self._staging = _pin(unit.num_bytes)
        reader.read(unit.ranges, _view_bytes(self._staging))
        stream = torch.Stream(device=self._device)
        with stream:
            buffer[: unit.num_bytes].copy_(self._staging[: unit.num_bytes], non_blocking=True)
        stream.synchronize()

    def _allocate(self, num_bytes: int) -> Tensor:
        if self._device.type != "cpu":
            return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        if not num_bytes:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)


def view_tensors(unit: Unit, buffer: Tensor) -> dict[str, Stored]:
    """The tensors of a unit that a buffer holds, by name."""
    found: dict[str, Stored] = {}
    for name, header in unit.tensors.items():
        dtype = STORED_DTYPES[header.dtype]
        content = buffer[unit.places[name] : unit.places[name] + header.num_bytes]
        if unit.places[name] % dtype.itemsize:
            content = content.clone()  # the format allows any offset, though writers align
        found[name] = Stored(header, content=content.view(dtype).view(header.shape))
    return found


def _view_bytes(buffer: Tensor) -> memoryview:
    found: Any = buffer.numpy()
    return memoryview(found)


def _pin(num_bytes: int) -> Tensor:
    """Host memory that begins at a page, pinned where the device can."""
    whole = torch.empty(num_bytes + mmap.PAGESIZE, dtype=torch.uint8)
    with suppress(RuntimeError):
        whole = whole.pin_memory()
    first = -whole.data_ptr() % mmap.PAGESIZE
    return whole[first : first + num_bytes]
