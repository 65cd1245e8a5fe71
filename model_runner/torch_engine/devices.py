"""The device that a job names, or the accelerator at hand, through torch's own registry; no vendor is named here."""

import ctypes
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from schemas.errors import EngineLoadError

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Of `mallopt(3)`."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and how weights are kept.

    Attributes:
        is_packed: whether copies in a faster layout may replace mapped weights.
    """

    device: torch.device
    dtype: torch.dtype
    is_packed: bool = True


def pick_device(name: str) -> torch.device:
    """The device of a name; `auto` takes the accelerator that torch finds, else the CPU.

    Raises:
        EngineLoadError: torch does not know the device.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise EngineLoadError(f"expected `auto` or a torch device, found {name!r}: {error}") from error


def keep_freed_memory(device: torch.device) -> None:
    """Let the C library keep what a step frees for the next, instead of giving it back to the system.

    A step's larger tensors are allocated anew in every layer. Pages that come fresh from the system cost 15 times what
    writing them again does (33 MB: 14.3 against 0.9 ms, `docs/adr/0003`). Only glibc and only a CPU need it.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def num_threads(num: int) -> Generator[None]:
    """Let torch compute on this many CPU threads meanwhile."""
    before = torch.get_num_threads()
    if before == num:
        yield
        return
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def available_bytes(device: torch.device) -> int:
    """Memory that is free on a device."""
    if device.type != "cpu":
        accelerator: Any = torch.accelerator
        if hasattr(accelerator, "get_memory_info"):
            return int(accelerator.get_memory_info(device)[0])
    return int(psutil.virtual_memory().available)
