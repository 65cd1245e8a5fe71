from pathlib import Path

import pytest


@pytest.fixture
def job_file(tmp_path: Path) -> str:
    path = tmp_path / "job.toml"
    path.write_text('[input]\npath = "in.parquet"\n[output]\npath = "out"\n')
    return str(path)
