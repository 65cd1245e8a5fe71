"""Each top-level package belongs to this distribution alone: another one of that name would shadow it on a worker."""

from collections.abc import Mapping
from importlib.metadata import packages_distributions

import pytest


@pytest.fixture(scope="module")
def owners() -> Mapping[str, list[str]]:
    return packages_distributions()


@pytest.mark.parametrize("package", ["schemas", "model_runner", "transforms", "pipelines", "jobs"])
def test_package_name_belongs_to_moebeam_alone(owners: Mapping[str, list[str]], package: str) -> None:
    assert set(owners.get(package, [])) == {"moebeam"}, "install the project first: pip install -e ."
