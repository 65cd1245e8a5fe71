"""Outputs that a journal is kept in."""

from pathlib import Path

import pytest

from moebeam.schemas.store.run_layout import RunLayout


@pytest.fixture
def layout(tmp_path: Path) -> RunLayout:
    return RunLayout(str(tmp_path / "out"))


@pytest.fixture(params=["disk", "store"])
def any_layout(request: pytest.FixtureRequest, tmp_path: Path) -> RunLayout:
    return RunLayout(str(tmp_path / "out") if request.param == "disk" else f"memory://{tmp_path.name}/out")
