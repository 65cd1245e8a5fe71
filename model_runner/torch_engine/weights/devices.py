"""Where the engine keeps weights and state: placement and memory; no vendor is named here."""

import ctypes
import sys
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from moebeam.schemas.errors import EngineLoadError

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Of `mallopt(3)`."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and how weights are kept.

    Attributes:
        is_packed: whether weights may be copied into a faster layout instead of staying mapped.
        max_weight_bytes: most memory for weights; layers that do not fit are read when they are computed. 0: all fit.
    """

    device: torch.device
    dtype: torch.dtype
    is_packed: bool = True
    max_weight_bytes: int = 0


def keep_freed_memory(device: torch.device) -> None:
    """Make the C library reuse the memory that a step frees instead of returning it to the system.

    Every layer allocates its larger tensors anew. Fresh pages from the system cost 15 times as much as rewriting used
    ones (33 MB: 14.3 against 0.9 ms, `docs/adr/0003`). Only glibc on a CPU needs this.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, -1)


def touch_memory(device: torch.device, num_bytes: int) -> None:
    """Touch memory now rather than during the first steps; `keep_freed_memory` then keeps it.

    First touches took 1.5 to 2.4 of the first 11 seconds of a run (`docs/adr/0003`).
    """
    if device.type == "cpu" and sys.platform == "linux":
        torch.zeros(num_bytes, dtype=torch.uint8)


def available_bytes(device: torch.device) -> int:
    """Measure a device's free memory.

    Raises:
        EngineLoadError: the device does not say.
    """
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    accelerator: Any = torch.accelerator
    try:
        return int(accelerator.get_memory_info(device)[0])
    except (RuntimeError, AttributeError) as error:
        raise EngineLoadError(
            f"device {str(device)!r} does not say how much memory is free; set [model] max_cache_bytes"
        ) from error
