"""`import moebeam` is the public surface: what `__all__` names, what docs/api.md describes, and nothing heavy."""

import importlib.metadata
import re
import subprocess
import sys

import pytest

import moebeam
from moebeam.schemas import errors
from tests.support.paths import ROOT

HEAVY = ("apache_beam", "openai", "pandas", "pyarrow", "torch", "transformers")


def documented_names() -> list[str]:
    """The names that rows of the page's tables begin with."""
    page = (ROOT / "docs" / "api.md").read_text()
    return re.findall(r"^\| `(\w+)[`(]", page, re.MULTILINE)


def test_the_page_describes_each_public_name_once() -> None:
    assert sorted(documented_names()) == sorted(moebeam.__all__)
    assert len(set(moebeam.__all__)) == len(moebeam.__all__)


@pytest.mark.parametrize("name", moebeam.__all__)
def test_a_public_name_is_found_and_listed(name: str) -> None:
    assert getattr(moebeam, name) is not None
    assert name in dir(moebeam)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = moebeam.no_such_name
    assert not hasattr(moebeam, "JobErro")


def test_every_error_that_stops_a_job_is_public_with_its_exit_code() -> None:
    kinds = {kind.__name__: kind.exit_code for kind in vars(errors).values() if is_job_error(kind)}
    page = (ROOT / "docs" / "api.md").read_text()
    documented = dict(re.findall(r"^\| `(\w+)` \| (\d) \|", page, re.MULTILINE))
    assert documented == {name: str(code) for name, code in kinds.items()}


def is_job_error(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, errors.JobError)


def test_the_version_is_that_of_the_installed_package() -> None:
    assert moebeam.__version__ == importlib.metadata.version("moebeam")


@pytest.mark.parametrize("statement", ["import moebeam", "from moebeam import JobError, load_job"])
def test_importing_loads_nothing_heavy(statement: str) -> None:
    heavy = HEAVY if statement == "import moebeam" else ("apache_beam", "openai", "pandas", "torch", "transformers")
    code = f"import sys; {statement}; print([name for name in {heavy!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
