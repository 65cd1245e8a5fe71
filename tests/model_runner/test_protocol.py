"""Naming and loading engines."""

import os
import sys
import types
from pathlib import Path

import pytest

from moebeam.model_runner import protocol
from moebeam.model_runner.protocol import EngineConfig, add_counters, counters_since, load_runner
from moebeam.schemas.errors import EngineLoadError
from tests.support.engines.engine_configs import engine_config


def config(engine: str) -> EngineConfig:
    return engine_config(engine=engine, path="", name="m", revision="r")


def test_unknown_engine_is_refused_naming_the_known_ones() -> None:
    with pytest.raises(EngineLoadError, match="'warp'; expected one of: fake, openai, torch, transformers, vllm"):
        load_runner(config("warp"))


def test_engine_whose_package_is_missing_is_refused_naming_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(protocol.ENGINES, "absent", "package_that_is_not_installed:load")
    with pytest.raises(EngineLoadError, match="package_that_is_not_installed"):
        load_runner(config("absent"))


def test_loader_gets_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("scripted_engine")
    module.load = lambda given: ("loaded", given)  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "scripted_engine", module)
    monkeypatch.setitem(protocol.ENGINES, "scripted", "scripted_engine:load")
    assert load_runner(config("scripted")) == ("loaded", config("scripted"))


@pytest.mark.parametrize(
    ("chosen", "found"), [(None, "10000"), (("GOMP_SPINCOUNT", "7"), "7"), (("OMP_WAIT_POLICY", "ACTIVE"), "None")]
)
def test_libraries_find_what_an_engine_wants_while_it_is_imported_unless_the_user_chose(
    chosen: tuple[str, str] | None, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if chosen is not None:
        monkeypatch.setenv(*chosen)
    module = f"reads_environment_{found}"
    (tmp_path / f"{module}.py").write_text(
        "import os\nfound = str(os.environ.get('GOMP_SPINCOUNT'))\ndef load(config):\n    return found\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(protocol.ENGINES, "torch", f"{module}:load")
    before = dict(os.environ)
    assert load_runner(config("torch")) == found
    assert dict(os.environ) == before


def test_counters_add_up_but_peaks_stay_the_highest() -> None:
    assert add_counters({"steps": 2, "peak_bytes": 7}, {"steps": 3, "peak_bytes": 5, "calls": 1}) == {
        "steps": 5,
        "peak_bytes": 7,
        "calls": 1,
    }


def test_between_two_looks_sums_are_differences_and_peaks_are_not() -> None:
    before, now = {"steps": 2, "peak_bytes": 7}, {"steps": 5, "peak_bytes": 7, "calls": 1}
    assert counters_since(before, now) == {"steps": 3, "peak_bytes": 7, "calls": 1}
