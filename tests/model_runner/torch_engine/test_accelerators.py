"""The device of a job: whatever torch has registered, one engine each, and no vendor by name."""

import logging
import multiprocessing
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moebeam.model_runner.torch_engine import accelerators
from moebeam.model_runner.torch_engine.accelerators import pick_device
from moebeam.model_runner.torch_engine.weights import devices
from moebeam.schemas.errors import EngineLoadError
from tests.support.paths import ROOT


@pytest.fixture
def three_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 3)
    monkeypatch.setattr(torch, "get_device_module", lambda kind: SimpleNamespace())
    monkeypatch.setattr(accelerators, "host_folder", lambda: tmp_path)


def test_each_engine_takes_an_accelerator_of_its_own_and_gives_it_back(three_devices: None) -> None:
    first, second, third = (pick_device("auto") for _ in range(3))
    assert [str(taken.device) for taken in (first, second, third)] == ["xpu:0", "xpu:1", "xpu:2"]
    del second
    assert str(pick_device("auto").device) == "xpu:1"


def test_more_engines_than_accelerators_share_and_say_so(three_devices: None, caplog: pytest.LogCaptureFixture) -> None:
    taken = [pick_device("auto") for _ in range(3)]
    with caplog.at_level(logging.WARNING):
        late = pick_device("auto")
    assert late.claim is None and late.device.type == "xpu"
    assert "all 3 devices of kind xpu are taken" in caplog.text
    assert len(taken) == 3


def test_a_device_is_known_by_its_hardware_not_by_its_place(
    three_devices: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where another process sees but some of the devices, under other numbers."""

    def seen(*names: str) -> None:
        module = SimpleNamespace(get_device_properties=lambda index: SimpleNamespace(uuid=names[index]))
        monkeypatch.setattr(torch, "get_device_module", lambda kind: module)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: len(names))

    seen("a", "b", "c")
    first = pick_device("auto")
    seen("c", "a", "b")
    second = pick_device("auto")
    assert [str(taken.device) for taken in (first, second)] == ["xpu:0", "xpu:0"]
    seen("c", "a")
    assert pick_device("auto").claim is None


def _claim_and_die() -> None:
    assert pick_device("auto").claim is not None
    raise SystemExit(0)


def test_a_process_that_died_keeps_no_device(three_devices: None) -> None:
    process = multiprocessing.get_context("fork").Process(target=_claim_and_die)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert str(pick_device("auto").device) == "xpu:0"


def test_a_named_device_is_taken_as_it_is(three_devices: None) -> None:
    assert [pick_device("xpu:1").claim for _ in range(2)] == [None, None]
    with pytest.raises(EngineLoadError, match="expected `auto` or a torch device, found 'abakus'"):
        pick_device("abakus")


def test_without_an_accelerator_it_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert pick_device("auto").device == torch.device("cpu")


def test_a_device_that_does_not_say_what_is_free_asks_for_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(device: torch.device) -> tuple[int, int]:
        raise RuntimeError("no such allocator")

    monkeypatch.setattr(torch.accelerator, "get_memory_info", unknown)
    with pytest.raises(EngineLoadError, match=r"'xpu:1' does not say .*set \[model\] max_cache_bytes"):
        devices.available_bytes(torch.device("xpu:1"))


def test_no_vendor_is_named_in_the_engines() -> None:
    named = re.compile(r"\bcuda\b|\brocm\b|\bhip\b|\bnpu\b|\bmlu\b|\bxpu\b|\bmps\b|torch\.(cuda|npu|xpu|mps)")
    sources = (ROOT / "model_runner" / "torch_engine").rglob("*.py")
    found = [f"{path.name}: {match.group()}" for path in sources if (match := named.search(path.read_text()))]
    assert found == []
