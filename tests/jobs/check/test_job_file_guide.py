"""The job file guide names every key, its default and what it is for, as the code has them."""

from moebeam.jobs.check.job_file_guide import job_file_guide
from tests.support.paths import ROOT

GUIDE = ROOT / "docs" / "job-file.md"


def test_the_guide_is_what_the_code_says() -> None:
    assert GUIDE.read_text() == job_file_guide(), "run: python -m moebeam.jobs.check.job_file_guide > docs/job-file.md"
