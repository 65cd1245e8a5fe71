"""The job file guide names every key, its default and what it is for, as the code has them."""

from pathlib import Path

from jobs.job_file_guide import job_file_guide

GUIDE = Path(__file__).parents[2] / "docs" / "job-file.md"


def test_the_guide_is_what_the_code_says() -> None:
    assert GUIDE.read_text() == job_file_guide(), "run: python -m jobs.job_file_guide > docs/job-file.md"
