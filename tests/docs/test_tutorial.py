"""The tutorial's shell commands, run in order as a reader would, leave the files that it names."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

pytestmark = pytest.mark.integration

TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text("utf-8")
SHOWN = ("my-reviews/output/results", "my-reviews/output/ledger", "my-reviews/output/manifest.json")


def shell_script() -> str:
    """All `sh` blocks as one script; the install is left out, because the tests run in an environment that has it."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", TUTORIAL, re.MULTILINE | re.DOTALL)
    script = "".join(blocks)
    assert "make demo\n" in script
    return "set -euo pipefail\n" + script.replace("make demo\n", "")


def test_the_commands_run_and_leave_what_is_shown(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ended = subprocess.run(
        ["bash", "-c", shell_script()],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert all((tmp_path / name).exists() for name in SHOWN)
    assert all(name.removeprefix("my-reviews/") in TUTORIAL for name in SHOWN)
    assert "<script" not in (tmp_path / "my-reviews" / "report.html").read_text("utf-8")
    assert re.search(r"DE\W+negative\W+\d+", ended.stdout)
