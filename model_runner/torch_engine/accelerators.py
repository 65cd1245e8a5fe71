"""Picks the device that a job names, or a free accelerator, through torch's own registry; no vendor is named here."""

import contextlib
import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
from filelock import FileLock, Timeout

from moebeam.model_runner.host_folder import host_folder
from moebeam.schemas.errors import EngineLoadError

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Device:
    """A device for an engine.

    Attributes:
        claim: lock that keeps other engines of this host from the device; None if the device is shared.
    """

    device: torch.device
    claim: FileLock | None = None


def pick_device(name: str) -> Device:
    """Find the device of a name; `auto` takes an accelerator that torch finds, else the CPU.

    Of several accelerators `auto` takes one that no other engine of this host has claimed, so that workers spread over
    all of them. If there are more workers than accelerators, the rest share.

    Raises:
        EngineLoadError: torch does not know the device.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return Device(torch.device("cpu")) if found is None else _claim_free_device(found.type)
    try:
        return Device(torch.device(name))
    except RuntimeError as error:
        raise EngineLoadError(f"expected `auto` or a torch device, found {name!r}: {error}") from error


def _claim_free_device(kind: str) -> Device:
    num_devices = torch.accelerator.device_count()
    if num_devices <= 1:
        return Device(torch.device(kind))
    folder = host_folder() / "devices"
    folder.mkdir(exist_ok=True)
    for index in range(num_devices):
        claim = FileLock(folder / f"{_hardware_name(kind, index)}.lock")
        with contextlib.suppress(Timeout):
            claim.acquire(timeout=0)
            return Device(torch.device(kind, index), claim)
    index = os.getpid() % num_devices
    _LOGGER.warning(
        "all %d devices of kind %s are taken by engines of this host; sharing %s:%d", num_devices, kind, kind, index
    )
    return Device(torch.device(kind, index))


def _hardware_name(kind: str, index: int) -> str:
    """Name a device the same way in all processes, whichever devices each can see, if it reports a UUID."""
    module: Any = torch.get_device_module(kind)
    with contextlib.suppress(AttributeError, RuntimeError):
        return f"{kind}-{module.get_device_properties(index).uuid}"
    return f"{kind}-{index}"
